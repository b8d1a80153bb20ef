"""What the sampler makes of its samples' seeds, tables and masks, whatever shares their batch."""

import pytest
import torch
from denoisers import FunctionDenoiser, N, initial_noise, masked, sample, table

from engine.config import Modality, ModelConfig
from engine.diffusion.solver_table import GuidanceOptions
from engine.errors import InputError
from engine.kernels.cfg_step import cfg_step, init_state
from engine.sampling.batch import SampleSpec, batch_constants, new_state

SMALL = ModelConfig((Modality("image", 6, 4, depth=0), Modality("text", 5, 2, depth=0)), shared_depth=1, dim=64)
BOTH = (0, 1)


def mix(inputs, times, outputs):
    """Mixes all of a row's elements and times; elements of modalities not asked for are poison."""
    t = torch.cat([times[:, :6].repeat_interleave(4, 1), times[:, 6:].repeat_interleave(2, 1)], dim=1)
    mixed = torch.tanh(inputs + 0.7 * inputs.roll(5, 1) - 0.4 * inputs.roll(11, 1))
    mixed = mixed * torch.cos(t / N + t.roll(3, 1) / N)
    for name, part in SMALL.state_slices.items():
        if name not in outputs:
            mixed[:, part] = float("nan")
    return mixed


MIXING = FunctionDenoiser(mix)


def small_spec(seed, generate, steps, null=None, on_arrival=None, **options):
    known = torch.randn(SMALL.size, generator=torch.Generator().manual_seed(seed % 100))
    return SampleSpec(seed, table(steps, **options), generate, known, null, on_arrival or {})


def small_mask(image, text):
    generate = torch.zeros(SMALL.size, dtype=torch.bool)
    generate[SMALL.state_slices["image"]] = torch.tensor(image).repeat_interleave(4)
    generate[SMALL.state_slices["text"]] = torch.tensor(text).repeat_interleave(2)
    return generate


ON, OFF = [True] * 6, [False] * 6
JOINT, TO_IMAGE, TO_TEXT = small_mask(ON, ON[:5]), small_mask(ON, OFF[:5]), small_mask(OFF, ON[:5])
INFILL = small_mask([True, False] * 3, [False, True, True, False, False])
ELEMENTS = torch.arange(SMALL.size) % 3 == 0


def mixed_specs():
    text_first, image_first = ((1,), (0,)), ((0,), (1,))
    return [
        small_spec(1, TO_IMAGE, 4, guidance=masked(3.0)),
        small_spec(2, TO_TEXT, 7, solver="ddim", eta=0.5, guidance=masked(2.0), conditioning="renoise"),
        small_spec(3, JOINT, 9, solver="ddpm", guidance=GuidanceOptions("unidiffuser", 2.0, modalities=BOTH)),
        small_spec(2**64 - 1, INFILL, 5, resample=3, jump=2, guidance=masked(1.5)),
        small_spec(5, JOINT, 6, guidance=GuidanceOptions("alternate", 4.0, modalities=BOTH)),
        small_spec(6, TO_IMAGE, 3, guidance=GuidanceOptions("empty", 2.0), null=torch.zeros(SMALL.size)),
        small_spec(7, ELEMENTS, 6, conditioning="renoise", guidance=masked(2.0, (200, 700))),
        small_spec(8, torch.zeros(SMALL.size, dtype=torch.bool), 2),
        small_spec(9, TO_IMAGE, 1),
        small_spec(10, JOINT, 4, order=text_first, guidance=masked(3.0, first_stage=1)),
        small_spec(11, JOINT, 5, order=image_first, solver="ddpm", guidance=masked(2.0, (300, 800), 1)),
        small_spec(12, INFILL, 4, order=text_first, solver="ddim", resample=2, jump=2, guidance=masked(2.0)),
    ]


def test_mixed_tasks_solvers_steps_masks_orders_and_guidance_in_one_batch_equal_separate_runs():
    specs = mixed_specs()
    together = sample(MIXING, specs, SMALL)
    backwards = sample(MIXING, specs[::-1], SMALL)
    assert together.isfinite().all()
    for i, spec in enumerate(specs):
        alone = sample(MIXING, [spec], SMALL)[0]
        assert torch.equal(together[i], alone), i
        assert torch.equal(backwards[len(specs) - 1 - i], alone), i


def test_known_values_come_back_bit_for_bit():
    specs = mixed_specs()
    for spec, result in zip(specs, sample(MIXING, specs, SMALL), strict=True):
        assert torch.equal(result[~spec.generate], spec.known[~spec.generate])
        assert not (result[spec.generate] == spec.known[spec.generate]).any()


@pytest.mark.parametrize("number", [3, 11])
def test_values_hidden_behind_the_mask_do_not_matter(number):
    spec = mixed_specs()[number]
    hidden = torch.where(spec.generate, float("nan"), spec.known)
    other = SampleSpec(spec.seed, spec.table, spec.generate, hidden)
    assert torch.equal(sample(MIXING, [other], SMALL), sample(MIXING, [spec], SMALL))


@pytest.mark.parametrize("options", [{}, {"order": ((1,), (0,))}])
def test_guidance_changes_no_random_number(options):
    """The unguided sample, and the same one with an extra pass of weight w → 1, are the same."""
    generate = JOINT if options else TO_IMAGE
    plain = sample(MIXING, [small_spec(4, generate, 6, solver="ddpm", **options)], SMALL)
    barely = sample(MIXING, [small_spec(4, generate, 6, solver="ddpm", guidance=masked(1 + 1e-6), **options)], SMALL)
    torch.testing.assert_close(plain, barely, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"order": ((1,), (0,))}, {"order": ((0,), (1,)), "solver": "ddpm"}])
def test_different_seeds_give_different_samples_and_the_same_seed_the_same(options):
    specs = [small_spec(seed, JOINT, 5, **options) for seed in (1, 2, 1)]
    first, second, third = sample(MIXING, specs, SMALL)
    assert torch.equal(first, third) and not torch.isclose(first, second).any()


def recorded(specs):
    """Every call of the denoiser: inputs, times and outputs."""
    calls = []

    def record(inputs, times, outputs):
        calls.append((inputs.clone(), times.clone(), outputs))
        return mix(inputs, times, outputs)

    sample(FunctionDenoiser(record), specs, SMALL)
    return calls


def test_only_the_passes_and_outputs_that_are_needed_are_computed():
    interval = small_spec(1, TO_IMAGE, 4, guidance=masked(2.0, (300, 600)))  # times 1000, 750, 500, 250
    assert [(len(x), outputs) for x, _, outputs in recorded([interval])] == [(n, ("image",)) for n in (1, 1, 2, 1)]
    both = recorded([interval, small_spec(2, JOINT, 2)])
    assert [(len(x), outputs) for x, _, outputs in both] == [
        (2, ("image", "text")), (2, ("image", "text")), (2, ("image",)), (1, ("image",)),
    ]  # fmt: skip
    ordered = recorded([small_spec(3, JOINT, 2, order=((1,), (0,)), guidance=masked(2.0, first_stage=1))])
    assert [(len(x), outputs) for x, _, outputs in ordered] == [(1, ("text",))] * 2 + [(2, ("image",))] * 2
    assert recorded([small_spec(3, ~JOINT, 4)]) == []


def inputs_of(calls, modality):
    elements, tokens = SMALL.state_slices[modality], SMALL.token_slices[modality]
    return [(x[:, elements], t[:, tokens]) for x, t, _ in calls]


def test_a_fully_known_modality_has_the_same_inputs_at_every_step_under_clean_conditioning():
    first, *others = inputs_of(recorded([small_spec(1, TO_IMAGE, 5, guidance=masked(2.0))]), "text")
    for values, times in others:
        assert torch.equal(values, first[0]) and torch.equal(times, first[1])
    assert first[1].unique().tolist() == [0, N]


def test_noise_of_renoised_known_values_and_of_dropped_ones_is_fresh_at_every_step():
    calls = recorded([small_spec(1, TO_IMAGE, 5, conditioning="renoise", guidance=masked(2.0))])
    inputs = inputs_of(calls, "text")
    for (before, _), (after, _) in zip(inputs, inputs[1:], strict=False):
        assert not torch.isclose(before, after).any()


def test_a_modality_waits_as_its_initial_noise_and_rests_as_what_it_became():
    spec = small_spec(6, JOINT, 3, order=((1,), (0,)))
    calls, result = recorded([spec]), sample(MIXING, [spec], SMALL)
    noise = initial_noise(torch.tensor([6]), SMALL.size)
    for values, times in inputs_of(calls, "image")[:4]:
        assert torch.equal(values, noise[:, SMALL.state_slices["image"]]) and (times == N).all()
    for values, times in inputs_of(calls, "text")[3:]:
        assert torch.equal(values, result[:, SMALL.state_slices["text"]]) and (times == 0).all()


def test_the_unconditional_pass_of_a_later_stage_sees_noise_in_place_of_the_earlier_modality():
    spec = small_spec(6, JOINT, 3, order=((1,), (0,)), guidance=masked(2.0, first_stage=1))
    calls = recorded([spec])
    dropped = inputs_of(calls, "text")[3:]
    for values, times in dropped:
        assert (times[0] == 0).all() and (times[1] == N).all()
        assert not torch.isclose(values[0], values[1]).any() and torch.equal(values[1], dropped[0][0][1])
    for values, _ in inputs_of(calls, "image")[3:]:
        assert torch.equal(values[0], values[1])


class Rounded:
    """Rounds tokens, and remembers their shapes."""

    def __init__(self):
        self.shapes = []

    def __call__(self, tokens):
        self.shapes.append(tuple(tokens.shape))
        return tokens.round()


def test_later_modalities_are_given_what_a_sample_makes_of_those_that_have_arrived():
    text, rounded, order = SMALL.state_slices["text"], Rounded(), ((1,), (0,))
    specs = [small_spec(seed, JOINT, 3, order=order, on_arrival={"text": rounded}) for seed in (1, 2)]
    plain = small_spec(1, JOINT, 3, order=order)
    calls, results = recorded([*specs, plain]), sample(MIXING, [*specs, plain], SMALL)
    expected = sample(MIXING, [plain], SMALL)
    assert torch.equal(results[2], expected[0]), "the neighbour has no such function"
    assert torch.equal(results[0, text], expected[0, text].round()) and not torch.equal(results[0], expected[0])
    for values, times in inputs_of(calls, "text")[3:]:
        assert torch.equal(values[:2], results[:2, text]) and (times == 0).all()
    assert rounded.shapes == [(2, 5, 2)] * 2, "[n, L, C], once a run for both samples"
    assert torch.equal(sample(MIXING, specs[:1], SMALL)[0], results[0])


def test_what_is_known_of_a_modality_that_arrives_stays_as_it_is():
    zeros = {"text": torch.zeros_like}
    spec = small_spec(1, INFILL, 3, order=((1,), (0,)), on_arrival=zeros)
    (result,), text = sample(MIXING, [spec], SMALL), SMALL.state_slices["text"]
    assert torch.equal(result[text], torch.where(INFILL, 0.0, spec.known)[text])


@pytest.mark.parametrize("order", [(), ((0,), (1,))], ids=["together", "last"])
def test_a_modality_that_no_other_waits_for_is_left_as_it_came_out(order):
    def never(tokens):
        raise AssertionError("nothing is given to others")

    spec, plain = (small_spec(1, JOINT, 3, order=order, on_arrival=f) for f in ({"text": never}, None))
    assert torch.equal(sample(MIXING, [spec], SMALL), sample(MIXING, [plain], SMALL))


def test_progress_counts_the_steps_of_all_samples_and_cancels_by_raising():
    seen = []
    specs = [small_spec(1, JOINT, steps) for steps in (3, 5)]
    sample(MIXING, specs, SMALL, lambda *progress: seen.append(progress))
    assert seen == [(2, 8), (4, 8), (6, 8), (7, 8), (8, 8)]

    def cancel(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(MIXING, specs, SMALL, cancel)


def test_sampling_starts_from_the_samples_own_initial_noise():
    first = []
    specs = [small_spec(seed, JOINT, 2) for seed in (5, 6)]
    sample(FunctionDenoiser(lambda x, *_: first.append(x.clone()) or x), specs, SMALL)
    assert torch.equal(first[0], initial_noise(torch.tensor([5, 6]), SMALL.size))


def test_steps_past_the_longest_table_of_the_batch_change_nothing():
    constants = batch_constants([small_spec(seed, JOINT, 2) for seed in (1, 2)], SMALL, "cpu")
    state = new_state(constants)
    init_state(constants, state)
    states = []
    for _ in range(4):
        cfg_step(torch.ones_like(state.inputs), constants, state)
        states.append(state.state.clone())
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2]) and torch.equal(states[2], states[3])


def test_no_samples_are_an_empty_result():
    assert sample(MIXING, [], SMALL, buckets=(1,)).shape == (0, SMALL.size)


NOTHING_KNOWN, ZEROS = torch.ones(SMALL.size, dtype=torch.bool), torch.zeros(SMALL.size)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**64}, "seed: 18446744073709551616"),
        ({"known": ZEROS + float("nan"), "generate": ~NOTHING_KNOWN}, "known: .*NaN"),
        ({"generate": NOTHING_KNOWN[1:]}, "generate: .*the shape of known"),
        ({"generate": ZEROS}, "generate: .*torch.float32"),
        ({"known": ZEROS[1:], "generate": NOTHING_KNOWN[1:]}, "generate: .*wrong shape"),
        ({"table": table([500], guidance=GuidanceOptions("empty", 2.0))}, "null: None is missing"),
        ({"table": table([500], 3)}, "table: 3 is the wrong number of modalities"),
        ({"table": table([500], 1)}, "table: 1 is the wrong number of modalities"),
        ({"generate": ELEMENTS}, "generate: .*partly known"),
        ({"table": table([500], step_cache=2)}, None),
        ({"table": table([500, 5], step_cache=2)}, "step_cache: .*use 1"),
    ],
)
def test_samples_that_cannot_be_made_are_refused_by_their_argument(change, message):
    values = {"seed": 1, "table": table([500]), "generate": NOTHING_KNOWN, "known": ZEROS, **change}
    if message is None:
        sample(MIXING, [SampleSpec(**values)], SMALL)
        return
    with pytest.raises(InputError, match=f"^{message}"):
        sample(MIXING, [SampleSpec(**values)], SMALL)
