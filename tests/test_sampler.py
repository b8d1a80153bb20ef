import pytest
import torch

from engine.batch import batch_rows, new_progress
from engine.config import Modality, ModelConfig
from engine.kernels.cfg_step import begin, cfg_step, initial_noise
from engine.sampler import Row, sample
from engine.schedule import NoiseSchedule, solver_table, timesteps

N = 1000
SMALL = ModelConfig((Modality("image", 6, 4, depth=0), Modality("text", 5, 2, depth=0)), shared_depth=1, dim=64)


def table(times, conditioning="clean", **options):
    return solver_table(
        NoiseSchedule("cosine", N), times, prediction="v_prediction", conditioning=conditioning, **options
    )


def mixing_denoiser(inputs, times, outputs):
    """Mixes all of a row's elements and times; elements of modalities not asked for are poison."""
    t = torch.cat([times[:, :6].repeat_interleave(4, 1), times[:, 6:].repeat_interleave(2, 1)], dim=1)
    mixed = torch.tanh(inputs + 0.7 * inputs.roll(5, 1) - 0.4 * inputs.roll(11, 1))
    mixed = mixed * torch.cos(t / N + t.roll(3, 1) / N)
    for name, part in SMALL.state_slices.items():
        if name not in outputs:
            mixed[:, part] = float("nan")
    return mixed


def small_row(seed, generate, steps, conditioning="clean", null=None, **options):
    known = torch.randn(SMALL.size, generator=torch.Generator().manual_seed(seed % 100))
    return Row(seed, table(timesteps(N, steps), conditioning, **options), generate, known, null)


def small_mask(image, text):
    generate = torch.zeros(SMALL.size, dtype=torch.bool)
    generate[SMALL.state_slices["image"]] = torch.tensor(image).repeat_interleave(4)
    generate[SMALL.state_slices["text"]] = torch.tensor(text).repeat_interleave(2)
    return generate


ON, OFF = [True] * 6, [False] * 6
ELEMENTS = torch.arange(SMALL.size) % 3 == 0


def mixed_rows():
    to_image, to_text = small_mask(ON, OFF[:5]), small_mask(OFF, ON[:5])
    joint, infill = small_mask(ON, ON[:5]), small_mask([True, False] * 3, [False, True, True, False, False])
    return [
        small_row(1, to_image, 4, solver="dpm++", guidance_scale=3.0),
        small_row(2, to_text, 7, solver="ddim", eta=0.5, guidance_scale=2.0, conditioning="renoise"),
        small_row(3, joint, 9, solver="ddpm", guidance="unidiffuser", guidance_scale=2.0, guided_modalities=(0, 1)),
        small_row(2**64 - 1, infill, 5, solver="dpm++", resample=3, jump=2, guidance_scale=1.5),
        small_row(5, joint, 6, solver="dpm++", guidance="alternate", guidance_scale=4.0, guided_modalities=(0, 1)),
        small_row(6, to_image, 3, guidance="empty", guidance_scale=2.0, null=torch.zeros(SMALL.size)),
        small_row(7, ELEMENTS, 6, conditioning="renoise", guidance_scale=2.0, guidance_interval=(200, 700)),
        small_row(8, torch.zeros(SMALL.size, dtype=torch.bool), 2),
        small_row(9, to_image, 1),
    ]


def test_mixed_tasks_solvers_steps_masks_and_guidance_in_one_batch_equal_separate_runs():
    rows = mixed_rows()
    together = sample(mixing_denoiser, rows, SMALL)
    backwards = sample(mixing_denoiser, rows[::-1], SMALL)
    assert together.isfinite().all()
    for i, row in enumerate(rows):
        alone = sample(mixing_denoiser, [row], SMALL)[0]
        assert torch.equal(together[i], alone), i
        assert torch.equal(backwards[len(rows) - 1 - i], alone), i


def test_known_values_come_back_bit_for_bit():
    rows = mixed_rows()
    for row, result in zip(rows, sample(mixing_denoiser, rows, SMALL), strict=True):
        assert torch.equal(result[~row.generate], row.known[~row.generate])
        assert not (result[row.generate] == row.known[row.generate]).any()


def test_values_hidden_behind_the_mask_do_not_matter():
    row = mixed_rows()[3]
    hidden = torch.where(row.generate, float("nan"), row.known)
    other = Row(row.seed, row.table, row.generate, hidden)
    assert torch.equal(sample(mixing_denoiser, [other], SMALL), sample(mixing_denoiser, [row], SMALL))


def test_guidance_changes_no_random_number():
    """The unguided row, and the same row with an extra pass of weight w → 1, are the same sample."""
    generate = small_mask(ON, OFF[:5])
    plain = sample(mixing_denoiser, [small_row(4, generate, 6, solver="ddpm")], SMALL)
    barely = sample(mixing_denoiser, [small_row(4, generate, 6, solver="ddpm", guidance_scale=1 + 1e-6)], SMALL)
    torch.testing.assert_close(plain, barely, atol=1e-4, rtol=0)


def test_different_seeds_give_different_samples_and_the_same_seed_the_same():
    generate = small_mask(ON, ON[:5])
    first, second, third = sample(mixing_denoiser, [small_row(seed, generate, 5) for seed in (1, 2, 1)], SMALL)
    assert torch.equal(first, third) and not torch.isclose(first, second).any()


def recorded_calls(rows):
    calls = []

    def denoiser(inputs, times, outputs):
        calls.append((len(inputs), times.clone(), outputs))
        return mixing_denoiser(inputs, times, outputs)

    sample(denoiser, rows, SMALL)
    return calls


def test_only_the_passes_and_outputs_that_are_needed_are_computed():
    to_image, joint = small_mask(ON, OFF[:5]), small_mask(ON, ON[:5])
    interval = small_row(1, to_image, 4, guidance_scale=2.0, guidance_interval=(300, 600))  # times 1000, 750, 500, 250
    assert [(n, outputs) for n, _, outputs in recorded_calls([interval])] == [(n, ("image",)) for n in (1, 1, 2, 1)]
    both = recorded_calls([interval, small_row(2, joint, 2)])
    assert [(n, outputs) for n, _, outputs in both] == [
        (2, ("image", "text")), (2, ("image", "text")), (2, ("image",)), (1, ("image",)),
    ]  # fmt: skip
    assert recorded_calls([small_row(3, ~joint, 4)]) == []


def test_a_fully_known_modality_has_the_same_inputs_at_every_step_under_clean_conditioning():
    inputs = []

    def denoiser(x, times, outputs):
        inputs.append((x[:, SMALL.state_slices["text"]].clone(), times[:, SMALL.token_slices["text"]].clone()))
        return mixing_denoiser(x, times, outputs)

    sample(denoiser, [small_row(1, small_mask(ON, OFF[:5]), 5, guidance_scale=2.0)], SMALL)
    for values, times in inputs[1:]:
        assert torch.equal(values, inputs[0][0]) and torch.equal(times, inputs[0][1])
    assert inputs[0][1].unique().tolist() == [0, N]


def test_noise_of_renoised_known_values_and_of_dropped_ones_is_fresh_at_every_step():
    inputs = []

    def denoiser(x, times, outputs):
        inputs.append(x[:, SMALL.state_slices["text"]].clone())
        return mixing_denoiser(x, times, outputs)

    sample(denoiser, [small_row(1, small_mask(ON, OFF[:5]), 5, "renoise", guidance_scale=2.0)], SMALL)
    for before, after in zip(inputs, inputs[1:], strict=False):
        assert not torch.isclose(before, after).any()


def test_callback_counts_the_steps_of_all_rows_and_may_cancel_by_raising():
    seen = []
    rows = [small_row(1, small_mask(ON, ON[:5]), steps) for steps in (3, 5)]
    sample(mixing_denoiser, rows, SMALL, callback=lambda *progress: seen.append(progress))
    assert seen == [(2, 8), (4, 8), (6, 8), (7, 8), (8, 8)]

    def cancel(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(mixing_denoiser, rows, SMALL, callback=cancel)


def test_sampling_starts_from_the_rows_own_initial_noise():
    first = []
    rows = [small_row(seed, small_mask(ON, ON[:5]), 2) for seed in (5, 6)]
    sample(lambda x, *_: first.append(x.clone()) or x, rows, SMALL)
    assert torch.equal(first[0], initial_noise(torch.tensor([5, 6]), SMALL.size))


def test_steps_past_the_longest_table_of_the_batch_change_nothing():
    constants = batch_rows([small_row(seed, small_mask(ON, ON[:5]), 2) for seed in (1, 2)], SMALL, "cpu")
    progress = new_progress(constants)
    begin(constants, progress)
    states = []
    for _ in range(4):
        cfg_step(torch.ones_like(progress.inputs), constants, progress)
        states.append(progress.state.clone())
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2]) and torch.equal(states[2], states[3])


NOTHING_KNOWN, ZEROS = torch.ones(SMALL.size, dtype=torch.bool), torch.zeros(SMALL.size)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**64}, "seed: 18446744073709551616"),
        ({"known": ZEROS + float("nan"), "generate": ~NOTHING_KNOWN}, "known: .*NaN"),
        ({"generate": NOTHING_KNOWN[1:]}, "generate: .*does not fit"),
        ({"generate": ZEROS}, "generate: torch.float32 .*does not fit"),
        ({"known": ZEROS[1:], "generate": NOTHING_KNOWN[1:]}, "generate: shape .*does not fit"),
        ({"table": table([500], guidance="empty", guidance_scale=2.0)}, "null: None"),
        ({"table": table([500], guidance="alternate", guidance_scale=2.0, guided_modalities=(2,))}, "has only 2"),
        ({"generate": ELEMENTS}, "partly known"),
    ],
)
def test_rows_that_cannot_be_sampled_are_refused_by_name(change, message):
    values = {"seed": 1, "table": table([500]), "generate": NOTHING_KNOWN, "known": ZEROS, **change}
    with pytest.raises(ValueError, match=message):
        sample(mixing_denoiser, [Row(**values)], SMALL)
