"""The loop's slots: rows enter and leave between steps, and neither slots, buckets nor neighbours change a row."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import PRESETS, Modality, ModelConfig
from engine.model import InnerCache, PSUNet
from engine.sampler import Row, Sampler, sample
from engine.schedule import NoiseSchedule, solver_table, timesteps

N = 1000
MODEL = ModelConfig((Modality("image", 6, 4, depth=2), Modality("text", 5, 2, depth=1)), shared_depth=3, dim=64)
POWERS = (1, 2, 4, 8)


class Denoiser:
    """A small model of random weights in float32, which counts what it does."""

    def __init__(self, config=MODEL):
        torch.manual_seed(0)
        self.model = PSUNet(config).eval().requires_grad_(False)
        for weight in self.model.parameters():
            weight.normal_(std=0.2)
        self.table = self.model.time_table(torch.arange(N + 1))
        self.rows, self.encodings = [], []  # R of every forward; modality and R of every encoding

    def __call__(self, inputs, times, outputs, encoded=None, kept=None, refresh=None):
        self.rows.append(len(inputs))
        inner = None if kept is None else InnerCache(kept, refresh)
        return self.model(inputs, self.table, times, outputs, encoded, inner)

    def keep(self, rows):
        return self.model.keep(rows).fill_(torch.nan)

    def encode(self, name, inputs, times):
        self.encodings.append((name, len(inputs)))
        return self.model.encode(name, inputs, self.table, times)


def row(seed, task, steps, conditioning="clean", config=MODEL, null=None, **options):
    generate = torch.zeros(config.size, dtype=torch.bool)
    for name, part in config.state_slices.items():
        generate[part] = name in task
    if task == "infill":
        generate[:8], generate[-4:] = True, True
    table = solver_table(
        NoiseSchedule("cosine", N), timesteps(N, steps), prediction="v_prediction", conditioning=conditioning, **options
    )
    known = torch.randn(config.size, generator=torch.Generator().manual_seed(seed))
    return Row(seed, table, generate, known, null)


def mixed_rows():
    return [
        row(1, "image", 4, guidance_scale=3.0),
        row(2, "text", 7, solver="ddim", eta=0.5, guidance_scale=2.0),
        row(3, "image text", 9, solver="ddpm", guidance="alternate", guidance_scale=2.0, guided_modalities=(0, 1)),
        row(4, "infill", 5, resample=3, jump=2, guidance_scale=1.5),
        row(5, "image", 6, guidance_scale=2.0, guidance_interval=(200, 700)),
        row(6, "text", 3),
        row(7, "text", 6, conditioning="renoise", guidance_scale=2.0),
        row(8, "image", 1, guidance_scale=2.0),
        row(9, "text", 7, guidance_scale=2.0, guidance_interval=(200, 700), step_cache=3),
        row(10, "image text", 8, resample=2, jump=3, step_cache=2),
    ]


@pytest.fixture(scope="module")
def alone():
    """Each row by itself, with every block at every step."""
    return torch.cat([sample(d := Denoiser(), [row], MODEL, keep=d.keep) for row in mixed_rows()])


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("buckets", [(1,), (3,), (1, 2, 4), POWERS, range(1, 9), (16,)], ids=str)
@pytest.mark.parametrize("order", [range(10), (5, 0, 9, 7, 2, 4, 8, 1, 6, 3)], ids=str)
def test_rows_come_out_the_same_in_any_bucket_order_and_slot(alone, buckets, order):
    denoiser, rows = Denoiser(), mixed_rows()
    sampler = Sampler(denoiser, MODEL, buckets=buckets, encode=denoiser.encode, keep=denoiser.keep)
    assert_same(sampler.run([rows[i] for i in order]), alone[list(order)])
    assert {n for n in denoiser.rows} <= {passes * size for size in buckets for passes in (1, 2)}


def test_a_list_of_mixed_rows_takes_the_forwards_of_full_slots():
    rows = [row(seed, ("image", "text", "image text")[seed % 3], 10 + 5 * (seed % 11)) for seed in range(32)]
    for slots in (8, 32):
        sampler = Sampler(lambda x, *_: x, MODEL, buckets=(slots,))
        sampler.run(rows)
        full, longest = -(-sum(r.table.steps for r in rows) // slots), max(r.table.steps for r in rows)
        assert max(full, longest) <= sampler.forwards <= max(1.2 * full, longest)


def test_the_smallest_bucket_that_holds_the_live_rows_is_used():
    denoiser = Denoiser()
    Sampler(denoiser, MODEL, buckets=POWERS).run([row(i, "image", steps) for i, steps in enumerate((1, 2, 3, 4, 4))])
    assert denoiser.rows == [8, 4, 4, 2]


def test_rows_enter_while_others_are_under_way(alone):
    """From another thread, at any step."""
    denoiser, rows = Denoiser(), mixed_rows()
    sampler = Sampler(denoiser, MODEL, buckets=POWERS, encode=denoiser.encode, keep=denoiser.keep)
    with ThreadPoolExecutor(3) as pool:
        late = {}

        def enter(done, total):
            # Not at equality: another thread may have done several steps meanwhile.
            for at in (1, 4, 6):
                if done >= at and at not in late:
                    late[at] = pool.submit(sampler.run, [rows[at]])

        assert_same(sampler.run([rows[2]], enter)[0], alone[2])
        for i, future in late.items():
            assert_same(future.result()[0], alone[i])
    assert sampler.finished == len(late) + 1 == 4


def test_longer_tables_than_the_memory_holds_make_it_grow_under_way():
    long, short = row(1, "image", 130), row(2, "text", 9)
    expected = [sample(Denoiser(), [r], MODEL)[0] for r in (long, short)]
    denoiser = Denoiser()
    sampler = Sampler(denoiser, MODEL, buckets=(4,))
    with ThreadPoolExecutor(1) as pool:
        later = []

        def enter(done, total):
            if done == 4:
                later.append(pool.submit(sampler.run, [long]))

        assert_same(sampler.run([short], enter)[0], expected[1])
        assert_same(later[0].result()[0], expected[0])


def test_a_row_that_is_cancelled_leaves_its_slot_and_the_others_alone(alone):
    denoiser, rows = Denoiser(), mixed_rows()
    sampler = Sampler(denoiser, MODEL, buckets=POWERS, encode=denoiser.encode, keep=denoiser.keep)

    def cancel(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.run(rows[:4], cancel)
    assert_same(sampler.run([rows[4]])[0], alone[4])
    assert denoiser.rows[1:] == [1, 1, 2, 2, 2, 1], "nothing but the row that is wanted"


def test_a_failing_step_fails_one_caller_and_the_others_rows_begin_again(alone):
    denoiser, rows = Denoiser(), mixed_rows()
    both, failures = threading.Barrier(2), []

    def fails_at_the_fourth(*arguments, **more):
        if len(denoiser.rows) == 3 and not failures:
            failures.append(1)
            raise ZeroDivisionError
        return denoiser(*arguments, **more)

    sampler = Sampler(fails_at_the_fourth, MODEL, buckets=POWERS, encode=denoiser.encode, keep=denoiser.keep)

    def run(i):
        both.wait()
        try:
            return sampler.run([rows[i]])[0]
        except ZeroDivisionError:
            return None

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, (1, 2)))
    assert sum(result is None for result in results) == 1
    for i, result in zip((1, 2), results, strict=True):
        if result is not None:
            assert_same(result, alone[i])


def out_of_memory_beyond(rows, denoiser):
    def limited(inputs, *arguments, **more):
        if len(inputs) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoiser(inputs, *arguments, **more)

    return limited


def test_out_of_memory_halves_the_slots_once_and_says_so(alone):
    denoiser = Denoiser()
    limited = out_of_memory_beyond(9, denoiser)
    sampler = Sampler(limited, MODEL, buckets=POWERS, encode=denoiser.encode, keep=denoiser.keep)
    with pytest.warns(UserWarning, match="out of memory with 8 rows at a time; going on with 4"):
        assert_same(sampler.run(mixed_rows()), alone)
    sampler.denoiser = out_of_memory_beyond(2, denoiser)
    with pytest.raises(torch.OutOfMemoryError, match="^max_rows: memory does not suffice for 4 rows; use fewer"):
        sampler.run(mixed_rows())
    assert_same(sampler.run([mixed_rows()[5]])[0], alone[5])


def test_out_of_memory_for_a_single_row_is_an_error():
    sampler = Sampler(out_of_memory_beyond(0, Denoiser()), MODEL, buckets=POWERS)
    with pytest.raises(torch.OutOfMemoryError, match="^max_rows: memory does not suffice for 1 rows"):
        sampler.run([row(1, "image", 3)])


def calls_by_stack(denoiser):
    """How often the blocks of each stack have run, filled in as they do."""
    count = {}
    for name, module in denoiser.model.named_modules():
        if hasattr(module, "qkv"):
            stack = name.rpartition(".")[0]
            module.register_forward_hook(lambda *_, s=stack: count.update({s: count.get(s, 0) + 1}))
    return count


@pytest.mark.parametrize(
    ("task", "known", "made", "depth", "out_of"), [("text", "image", "text", 4, 17), ("image", "text", "image", 2, 13)]
)
def test_a_known_modality_runs_its_in_blocks_once_and_no_out_blocks(task, known, made, depth, out_of):
    """At the depths of coco256 the image passes 9 of its 17 blocks a step in image-to-text."""
    sizes = (Modality("image", 4, 4, depth=4), Modality("text", 3, 2, depth=2))
    assert [m.depth for m in sizes] == [m.depth for m in PRESETS["coco256"].model.modalities]
    config = replace(MODEL, modalities=sizes, shared_depth=PRESETS["coco256"].model.shared_depth)
    denoiser, steps = Denoiser(config), 5
    plain = sample(denoiser, [row(1, task, steps, config=config, guidance_scale=2.0)], config)
    count = calls_by_stack(denoiser)
    found = sample(denoiser, [row(1, task, steps, config=config, guidance_scale=2.0)], config, encode=denoiser.encode)
    assert_same(found, plain)
    assert count.pop(f"branches.{known}.in_blocks") == depth, "once, both passes together"
    assert f"branches.{known}.out_blocks" not in count
    assert count.pop(f"branches.{made}.in_blocks") == count.pop(f"branches.{made}.out_blocks") == (6 - depth) * steps
    shared = sum(count.values()) // steps
    assert (shared, shared + 2 * depth) == (9, out_of)
    assert denoiser.encodings == [(known, 2)]


def test_a_batch_encodes_nothing_once_for_all_that_changes_for_some_row():
    denoiser = Denoiser()
    count = calls_by_stack(denoiser)
    told, renoised, joint = row(1, "text", 3), row(2, "text", 3, "renoise"), row(3, "image text", 3)
    for other in (renoised, joint):
        count.clear()
        sample(denoiser, [told, other], MODEL, encode=denoiser.encode)
        assert count["branches.image.in_blocks"] == 2 * (1 + 3), "once for the row that could, then at every step"
        count.clear()
        sample(denoiser, [other], MODEL, encode=denoiser.encode)
        assert count["branches.image.in_blocks"] == 2 * 3


@pytest.mark.parametrize("interval", [(0, 999), (200, 700), (0, 300)], ids=str)
def test_guidance_that_begins_late_finds_the_dropped_values_encoded(interval):
    guided = row(1, "text", 8, guidance_scale=3.0, guidance_interval=interval)
    denoiser = Denoiser()
    expected = sample(denoiser, [guided], MODEL)
    assert_same(sample(denoiser, [guided], MODEL, encode=denoiser.encode), expected)
    unguided = sample(denoiser, [row(1, "text", 8)], MODEL)
    assert not torch.allclose(expected, unguided, atol=1e-2)


def test_empty_guidance_finds_its_null_values_encoded():
    guided = row(1, "text", 5, guidance="empty", guidance_scale=2.0, null=torch.ones(MODEL.size))
    denoiser = Denoiser()
    expected = sample(denoiser, [guided], MODEL)
    assert_same(sample(denoiser, [guided], MODEL, encode=denoiser.encode), expected)
    assert denoiser.encodings == [("image", 2)]


@pytest.mark.parametrize("shared_depth", [1, 3, 7])
def test_step_caching_runs_the_inner_blocks_at_some_steps_and_all_others_always(shared_depth):
    config, steps = replace(MODEL, shared_depth=shared_depth), 8
    denoiser = Denoiser(config)
    plain, cached = (row(1, "image text", steps, config=config, step_cache=k) for k in (1, 3))
    exact = sample(denoiser, [plain], config)
    count = calls_by_stack(denoiser)
    found = sample(denoiser, [cached], config, keep=denoiser.keep)
    pairs = shared_depth // 2
    inner = 0 if pairs == 0 else pairs - 1  # of each side; without a pair nothing is within one
    ran = 3 if pairs else steps  # at steps 0, 3 and 6
    assert count.pop("shared_middle") == ran
    assert count.pop("shared_in", 0) == count.pop("shared_out", 0) == min(pairs, 1) * steps + inner * ran
    assert count.pop("branches.image.in_blocks") == count.pop("branches.image.out_blocks") == 2 * steps
    assert found.isfinite().all() and torch.allclose(found, exact, atol=1e-3) == (pairs == 0)


def test_step_caching_changes_no_row_that_did_not_ask_for_it(alone):
    """And the one that did gets what it gets alone, whenever the others' blocks run."""
    denoiser = Denoiser()
    sampler = Sampler(denoiser, MODEL, buckets=(3,), keep=denoiser.keep)
    assert_same(sampler.run([mixed_rows()[i] for i in (0, 8, 9)]), alone[[0, 8, 9]])


def test_step_caching_is_refused_where_nothing_is_kept():
    with pytest.raises(ValueError, match="^step_cache: this model keeps nothing from step to step; use 1"):
        Sampler(Denoiser(), MODEL, buckets=POWERS).run([mixed_rows()[8]])


def test_a_row_of_more_passes_than_the_sampler_does_is_refused():
    wide = row(1, "image text", 3, guidance="unidiffuser", guidance_scale=2.0, guided_modalities=(0, 1))
    with pytest.raises(ValueError, match="^passes: a row needs 3, the sampler does 2; use more"):
        Sampler(Denoiser(), MODEL, buckets=POWERS).run([row(2, "image", 2), wide])


class Recorded:
    """Stands in for CUDA graphs: does the step that came first under its key, whatever comes later."""

    def __init__(self):
        self.steps, self.replays = {}, 0

    def __call__(self, key, step):
        self.replays += key in self.steps
        self.steps.setdefault(key, step)()

    def clear(self):
        self.steps.clear()


def test_the_first_step_of_a_kind_replayed_does_what_every_later_one_would(alone):
    """So that a captured one may be replayed: it reads and writes memory that stays where it is."""
    denoiser, graphs = Denoiser(), Recorded()
    sampler = Sampler(denoiser, MODEL, buckets=POWERS, encode=denoiser.encode, keep=denoiser.keep, graphs=graphs)
    for order in (range(10), (3, 1, 6), (7, 4, 9, 5, 0, 2, 8), range(10)):
        replays, forwards = graphs.replays, sampler.forwards
        assert_same(sampler.run([mixed_rows()[i] for i in order]), alone[list(order)])
    assert graphs.replays - replays == sampler.forwards - forwards, "nothing new the second time"
    sampler.run([row(1, "image", 130)])
    assert len(graphs.steps) == 1, "longer tables lie elsewhere, what was captured before is gone"


class Operations(TorchDispatchMode):
    """Collects the names of all operations that are run under it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **keywords or {})


def test_a_step_reads_nothing_on_the_host_and_brings_nothing_from_there():
    """Either would keep it from being captured."""
    operations, denoiser = Operations(), Denoiser()

    def recorded(key, step):
        with operations:
            step()

    parts = {"encode": denoiser.encode, "keep": denoiser.keep}
    Sampler(denoiser, MODEL, buckets=POWERS, graphs=recorded, **parts).run(mixed_rows())
    assert {"addmm", "gather", "where", "copy_"} <= operations.names
    waits = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "allclose"}
    assert not operations.names & (waits | {"lift_fresh", "lift_fresh_copy", "_pin_memory"})


def test_a_long_table_takes_memory_only_as_long_as_it_is_there(alone):
    denoiser = Denoiser()
    sampler = Sampler(denoiser, MODEL, buckets=POWERS, encode=denoiser.encode, keep=denoiser.keep)
    sampler.run([row(1, "image", 130)])
    lines = sampler._batches[1].rows.indices.shape[1]
    assert_same(sampler.run(mixed_rows()), alone)
    assert max(batch.rows.indices.shape[1] for batch in sampler._batches.values()) < lines


def test_progress_does_not_run_backwards_when_rows_begin_again():
    denoiser, seen = Denoiser(), []
    sampler = Sampler(out_of_memory_beyond(16, denoiser), MODEL, buckets=POWERS)

    def squeeze(done, total):
        seen.append(done)
        if len(seen) == 2:
            sampler.denoiser = out_of_memory_beyond(4, denoiser)

    with pytest.warns(UserWarning, match="out of memory"):
        sampler.run([row(i, "image", 5) for i in range(8)], squeeze)
    assert seen == sorted(set(seen)) and seen[-1] == 40


def test_nothing_is_kept_of_rows_that_are_done():
    denoiser = Denoiser()
    sampler = Sampler(denoiser, MODEL, buckets=POWERS, encode=denoiser.encode, keep=denoiser.keep)

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    rows = mixed_rows()
    sampler.run(rows)
    before = tensors()
    for _ in range(20):
        sampler.run(rows[::2])
        sampler.run(rows)
    assert tensors() <= before
