"""Samples in a network's slots: neither slots, buckets, neighbours nor what is kept from step to step changes one."""

from dataclasses import replace

import pytest
import torch
from denoisers import CountingDenoiser, N, count_blocks, masked, sample, table, without_reuse
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import Modality, ModelConfig
from engine.diffusion.solver_table import GuidanceOptions
from engine.errors import InputError
from engine.model.denoiser import Denoiser
from engine.presets import PRESETS
from engine.sampling.batch import Batch, SampleSpec, batch_constants
from engine.sampling.sampler import Sampler
from engine.sampling.step import denoise_step

MODEL = ModelConfig((Modality("image", 6, 4, depth=2), Modality("text", 5, 2, depth=1)), shared_depth=3, dim=64)
POWERS = (1, 2, 4, 8)
TEXT_FIRST, IMAGE_FIRST = ((1,), (0,)), ((0,), (1,))


def spec(seed, task, steps, config=MODEL, null=None, on_arrival=None, **options):
    generate = torch.zeros(config.size, dtype=torch.bool)
    for name, part in config.state_slices.items():
        generate[part] = name in task
    if task == "infill":
        generate[:8], generate[-4:] = True, True
    known = torch.randn(config.size, generator=torch.Generator().manual_seed(seed))
    return SampleSpec(seed, table(steps, len(config.modalities), **options), generate, known, null, on_arrival or {})


def halved(tokens):
    return tokens / 2


def mixed_specs():
    return [
        spec(1, "image", 4, guidance=masked(3.0)),
        spec(2, "text", 7, solver="ddim", eta=0.5, guidance=masked(2.0)),
        spec(3, "image text", 9, solver="ddpm", guidance=GuidanceOptions("alternate", 2.0, modalities=(0, 1))),
        spec(4, "infill", 5, resample=3, jump=2, guidance=masked(1.5)),
        spec(5, "image", 6, guidance=masked(2.0, (200, 700))),
        spec(6, "text", 3),
        spec(7, "text", 6, conditioning="renoise", guidance=masked(2.0)),
        spec(8, "image", 1, guidance=masked(2.0)),
        spec(9, "text", 7, guidance=masked(2.0, (200, 700)), step_cache=3),
        spec(10, "image text", 8, resample=2, jump=3, step_cache=2),
        spec(11, "image text", 4, order=TEXT_FIRST, guidance=masked(2.0, first_stage=1), on_arrival={"text": halved}),
        spec(12, "image text", 3, order=IMAGE_FIRST, guidance=masked(2.0, (200, 700), 1), step_cache=2),
        spec(13, "infill", 4, order=TEXT_FIRST, solver="ddpm", guidance=masked(1.5)),
    ]


EVERY = range(13)


@pytest.fixture(scope="module")
def alone():
    """Each sample by itself; all blocks run at every step but where its own step cache leaves them out."""
    return torch.cat([sample(CountingDenoiser(MODEL), [one], without_reuse(MODEL)) for one in mixed_specs()])


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "buckets, order",
    [
        ((1,), EVERY),
        ((3,), EVERY),
        ((3,), (5, 0, 9, 7, 12, 2, 4, 8, 1, 11, 6, 3, 10)),
        ((1, 2, 4), EVERY),
        (POWERS, (5, 0, 9, 7, 12, 2, 4, 8, 1, 11, 6, 3, 10)),
        (range(1, 9), EVERY),
        ((16,), (5, 0, 9, 7, 12, 2, 4, 8, 1, 11, 6, 3, 10)),
    ],
    ids=str,
)
def test_samples_come_out_the_same_in_any_bucket_order_and_slot(alone, buckets, order):
    denoiser, specs = CountingDenoiser(MODEL), mixed_specs()
    assert_same(sample(denoiser, [specs[i] for i in order], MODEL, buckets=buckets), alone[list(order)])
    assert {n for n in denoiser.rows} <= {passes * size for size in buckets for passes in (1, 2)}


def test_the_smallest_bucket_that_holds_the_samples_is_computed():
    denoiser = CountingDenoiser(MODEL)
    sample(denoiser, [spec(i, "image", steps) for i, steps in enumerate((1, 2, 3, 4, 4))], MODEL, buckets=POWERS)
    assert denoiser.rows == [8, 4, 4, 2]


def entering(sampler, first, late):
    """The first sample's state, and those that are submitted when so many of its steps are done."""
    futures = {}

    def enter(done, total):
        if done in late:
            futures[done] = sampler.submit([late[done]])

    return sampler.run([first], enter)[0], [futures[done].result(60)[0] for done in late]


def test_samples_enter_while_others_are_under_way(alone):
    denoiser, specs = CountingDenoiser(MODEL), mixed_specs()
    sampler = Sampler(denoiser, MODEL, buckets=POWERS)
    first, others = entering(sampler, specs[2], {1: specs[1], 4: specs[11], 6: specs[6]})
    assert_same(torch.stack([first, *others]), alone[[2, 1, 11, 6]])
    assert (sampler.finished, max(denoiser.rows)) == (4, 8), "they shared steps"


def test_longer_tables_than_the_memory_holds_make_it_grow_under_way():
    long, short = spec(1, "image", 66), spec(2, "text", 9)
    expected = [sample(CountingDenoiser(MODEL), [one], MODEL)[0] for one in (short, long)]
    first, (late,) = entering(Sampler(CountingDenoiser(MODEL), MODEL, buckets=(4,)), short, {4: long})
    assert_same(torch.stack([first, late]), torch.stack(expected))


def test_more_passes_than_the_memory_holds_make_it_grow_under_way(alone):
    """Features and inner blocks' results that samples of two passes have kept move along."""
    wide = spec(1, "image text", 3, guidance=GuidanceOptions("unidiffuser", 2.0, modalities=(0, 1)))
    expected, denoiser = sample(CountingDenoiser(MODEL), [wide], without_reuse(MODEL))[0], CountingDenoiser(MODEL)
    for i in (8, 10):
        first, (late,) = entering(Sampler(denoiser, MODEL, buckets=POWERS), mixed_specs()[i], {2: wide})
        assert_same(torch.stack([first, late]), torch.stack([alone[i], expected]))
        assert 3 * 2 in denoiser.rows


class Failing(CountingDenoiser):
    """Raises at its calls of so many rows or more, each of which `error` makes an exception for."""

    def __init__(self, rows, error):
        super().__init__(MODEL)
        self.limit, self.error = rows, error

    def __call__(self, inputs, *arguments, **more):
        if len(inputs) >= self.limit and (error := self.error()) is not None:
            raise error
        return super().__call__(inputs, *arguments, **more)


def test_samples_that_start_again_after_running_out_of_memory_come_out_the_same(alone):
    denoiser = Failing(10, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.warns(UserWarning, match="out of memory with 8 samples at a time; continuing with 4"):
        assert_same(sample(denoiser, mixed_specs(), MODEL, buckets=POWERS), alone)


def test_samples_that_start_again_after_a_failed_step_come_out_the_same(alone):
    errors = iter([None, None, None, ZeroDivisionError()])
    assert_same(sample(Failing(1, lambda: next(errors, None)), mixed_specs(), MODEL, buckets=POWERS), alone)


# --- What is computed once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "known", "made", "depth", "out_of"), [("text", "image", "text", 4, 17), ("image", "text", "image", 2, 13)]
)
def test_a_known_modality_runs_its_in_blocks_once_and_no_out_blocks(task, known, made, depth, out_of):
    """At the depths of coco256 the image passes 9 of its 17 blocks a step in image-to-text."""
    sizes = (Modality("image", 4, 4, depth=4), Modality("text", 3, 2, depth=2))
    assert [m.depth for m in sizes] == [m.depth for m in PRESETS["coco256"].model.modalities]
    config = replace(MODEL, modalities=sizes, shared_depth=PRESETS["coco256"].model.shared_depth)
    denoiser, steps = CountingDenoiser(config), 5
    guided = spec(1, task, steps, config, guidance=masked(2.0))
    plain = sample(denoiser, [guided], without_reuse(config))
    count = count_blocks(denoiser)
    assert_same(sample(denoiser, [guided], config), plain)
    assert count.pop(f"branches.{known}.in_blocks") == depth, "once, both passes together"
    assert f"branches.{known}.out_blocks" not in count
    assert count.pop(f"branches.{made}.in_blocks") == count.pop(f"branches.{made}.out_blocks") == (6 - depth) * steps
    shared = sum(count.values()) // steps
    assert (shared, shared + 2 * depth) == (9, out_of)
    assert denoiser.features == [(known, 2)]


@pytest.mark.parametrize("order, first, last", [(TEXT_FIRST, "text", "image"), (IMAGE_FIRST, "image", "text")])
def test_in_blocks_of_a_modality_that_waits_or_has_arrived_run_once(order, first, last):
    denoiser, steps = CountingDenoiser(MODEL), 5
    ordered = spec(1, "image text", steps, order=order, guidance=masked(2.0, first_stage=1))
    plain = sample(denoiser, [ordered], without_reuse(MODEL))
    count, depth = count_blocks(denoiser), {m.name: m.depth for m in MODEL.modalities}
    assert_same(sample(denoiser, [ordered], MODEL), plain)
    assert count[f"branches.{first}.in_blocks"] == (steps + 1) * depth[first], "as it moves, and once it has arrived"
    # Its first move still finds it as it waited: at the same time N.
    assert count[f"branches.{last}.in_blocks"] == (1 + steps - 1) * depth[last]
    assert count[f"branches.{first}.out_blocks"] == steps * depth[first]
    assert count[f"branches.{last}.out_blocks"] == steps * depth[last]
    assert denoiser.features == [(last, 2), (first, 2)]


def test_a_known_modality_runs_its_in_blocks_once_whichever_modality_is_guided():
    denoiser = CountingDenoiser(MODEL)
    turns = spec(1, "text", 6, guidance=GuidanceOptions("alternate", 2.0, modalities=(0, 1)))
    plain = sample(denoiser, [turns], without_reuse(MODEL))
    assert_same(sample(denoiser, [turns], MODEL), plain)
    assert denoiser.features == [("image", 2)]


def test_captured_steps_compute_nothing_once_for_all_that_changes_for_some_sample():
    denoiser = CountingDenoiser(MODEL)
    count = count_blocks(denoiser)
    known, renoised, joint = spec(2, "text", 3), spec(2, "text", 3, conditioning="renoise"), spec(3, "image text", 3)
    for others in ([renoised], [joint], [known, renoised]):
        count.clear()
        sample(denoiser, [known, *others], MODEL, graphs=Recorded())
        assert count["branches.image.in_blocks"] == 2 * 3, "at every step"
    count.clear()
    sample(denoiser, [spec(1, "text", 5), joint], MODEL, graphs=Recorded())
    assert count["branches.image.in_blocks"] == 2 * (3 + 1), "once when the other has left"


def test_on_a_cpu_a_branch_runs_for_those_rows_that_need_it():
    denoiser = CountingDenoiser(MODEL)
    rows = count_blocks(denoiser, of=len)
    specs = [spec(1, "image", 3), spec(2, "text", 3), spec(3, "image text", 3)]
    sample(denoiser, specs, MODEL)
    # What is known enters once, with memory for two passes; what moves enters at every step, in the one that is on.
    assert rows.pop("branches.image.in_blocks") == 2 * (3 * 2 + 2 + 2)
    assert rows.pop("branches.text.in_blocks") == 3 * 2 + 2 + 2
    assert rows.pop("branches.image.out_blocks") == 2 * (2 + 2 + 2)
    assert rows.pop("branches.text.out_blocks") == 2 + 2 + 2
    assert set(rows.values()) == {3 * 3}, "the shared stack runs for all"


@pytest.mark.parametrize("interval", [(0, 999), (200, 700), (0, 300)], ids=str)
def test_guidance_that_begins_late_finds_the_features_of_what_it_drops(interval):
    guided = spec(1, "text", 8, guidance=masked(3.0, interval))
    denoiser = CountingDenoiser(MODEL)
    expected = sample(denoiser, [guided], without_reuse(MODEL))
    assert_same(sample(denoiser, [guided], MODEL), expected)
    assert denoiser.features
    unguided = sample(denoiser, [spec(1, "text", 8)], MODEL)
    assert not torch.allclose(expected, unguided, atol=1e-2)


def test_empty_guidance_finds_the_features_of_its_null_values():
    guided = spec(1, "text", 5, guidance=GuidanceOptions("empty", 2.0), null=torch.ones(MODEL.size))
    denoiser = CountingDenoiser(MODEL)
    expected = sample(denoiser, [guided], without_reuse(MODEL))
    assert_same(sample(denoiser, [guided], MODEL), expected)
    assert denoiser.features == [("image", 2)]


# --- Step caching --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_depth", [3, 7])
def test_step_caching_runs_the_inner_blocks_at_some_steps_and_all_others_always(shared_depth):
    config, steps = replace(MODEL, shared_depth=shared_depth), 8
    denoiser = CountingDenoiser(config)
    plain, cached = (spec(1, "image text", steps, config, step_cache=k) for k in (1, 3))
    exact = sample(denoiser, [plain], config)
    count = count_blocks(denoiser)
    found = sample(denoiser, [cached], config)
    inner, ran = shared_depth // 2 - 1, 3  # blocks of each side within the outermost pair; at steps 0, 3 and 6
    assert count.pop("shared_middle") == ran
    assert count.pop("shared_in") == count.pop("shared_out") == steps + inner * ran
    assert count.pop("branches.image.in_blocks") == count.pop("branches.image.out_blocks") == 2 * steps
    assert found.isfinite().all() and not torch.allclose(found, exact, atol=1e-3)


def test_step_caching_changes_no_sample_that_did_not_ask_for_it(alone):
    """And the one that did gets what it gets alone, whenever the others' blocks run."""
    chosen = [0, 8, 9, 11]
    found = sample(CountingDenoiser(MODEL), [mixed_specs()[i] for i in chosen], MODEL, buckets=(4,))
    assert_same(found, alone[chosen])


def test_step_caching_is_refused_where_there_is_nothing_to_cache():
    config = replace(MODEL, shared_depth=1)
    with pytest.raises(InputError, match="^step_cache: .*use 1"):
        Sampler(CountingDenoiser(config), config, buckets=POWERS).submit([spec(1, "image", 3, config, step_cache=2)])


# --- Capture -------------------------------------------------------------------------------------------------------


class Recorded:
    """Stands in for CUDA graphs: does the step that came first under its key, whatever comes later."""

    def __init__(self):
        self.steps, self.replays = {}, 0

    def __call__(self, key, step):
        self.replays += key in self.steps
        self.steps.setdefault(key, step)()

    def clear(self):
        self.steps.clear()


def test_the_first_step_of_a_plan_replayed_does_what_every_later_one_would(alone):
    """So that a captured one may be replayed: it reads and writes memory that stays where it is."""
    graphs = Recorded()
    sampler = Sampler(CountingDenoiser(MODEL), MODEL, buckets=POWERS, graphs=graphs)
    for order in (EVERY, (3, 1, 6), (7, 4, 9, 5, 0, 11, 2, 8), EVERY):
        replays, forwards = graphs.replays, sampler.forwards
        assert_same(sampler.run([mixed_specs()[i] for i in order]), alone[list(order)])
    assert graphs.replays - replays == sampler.forwards - forwards, "nothing new the second time"
    assert set(sampler.plans) == set(graphs.steps)
    sampler.run([spec(1, "image", 66)])
    assert len(graphs.steps) == 1, "longer tables lie elsewhere, what was captured before is gone"


class Operations(TorchDispatchMode):
    """Collects the names of all operations that are run under it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **keywords or {})


def test_off_the_cpu_a_step_reads_nothing_on_the_host_and_brings_nothing_from_there():
    """Either would keep it from being captured. Tensors on the meta device have no values to read."""
    sampler = Sampler(CountingDenoiser(MODEL), MODEL, buckets=POWERS)
    sampler.run(mixed_specs())
    sampler.close()
    denoiser, operations = Denoiser(CountingDenoiser(MODEL).network.to("meta"), N), Operations()
    for plan in sampler.plans:
        batch = Batch(batch_constants(mixed_specs()[: plan.slots], MODEL, "meta", plan.slots, lines=64, passes=2))
        for name in plan.cached:
            batch.new_features(name, denoiser.branch_features(name, batch.state.inputs, batch.state.times))
        batch.cache = denoiser.new_cache(2 * plan.slots)
        with operations:
            denoise_step(denoiser, batch, plan)
    assert {"addmm", "gather", "where", "copy_"} <= operations.names
    waits = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "allclose"}
    assert not operations.names & (waits | {"lift_fresh", "lift_fresh_copy", "pin_memory", "_pin_memory"})
