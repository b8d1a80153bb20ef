"""The denoising loss: the model's inputs and times, and the targets of its predictions."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from engine.config import Config, DiffusionConfig, Modality, ModelConfig
from engine.diffusion.loss import DROPPED, JOINT, WHOLE_MODALITY, DenoisingLoss, distinct_times
from engine.diffusion.schedule import NoiseSchedule
from engine.errors import InputError

MODEL = ModelConfig((Modality("image", 6, 4, depth=0), Modality("text", 5, 3, depth=0)), shared_depth=1, dim=64)
N = 1000
BATCH = 400
EVERY_KIND = [
    DiffusionConfig("cosine", N, prediction, conditioning, times)
    for prediction in ("epsilon", "v_prediction")
    for times, conditioning in (("shared", "renoise"), ("independent", "renoise"), ("masked", "clean"))
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(batch=BATCH):
    return torch.randn(batch, MODEL.size, generator=generator(9)) + 0.5


def per_element(x):
    """[B, L] → [B, N]."""
    return torch.cat([x[:, :6].repeat_interleave(4, 1), x[:, 6:].repeat_interleave(3, 1)], dim=1)


class Oracle:
    """A denoiser that knows x0: it solves its inputs for the noise and returns the exact target, plus `error`.

    `inputs` and `times` are the arguments of its last call.
    """

    def __init__(self, x0, diffusion, error=0.0):
        self.x0, self.diffusion, self.error = x0, diffusion, error
        schedule = NoiseSchedule(diffusion.schedule, diffusion.timesteps)
        self.alpha_bar = torch.as_tensor(schedule.alpha_bar)

    def __call__(self, inputs, times):
        self.inputs, self.times = inputs, times
        alpha_bar = self.alpha_bar[per_element(times)]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # float64
        noise = torch.where(sigma > 0, (inputs - alpha * self.x0) / sigma.clamp_min(1e-9), 0.0)
        v = self.diffusion.prediction == "v_prediction"
        return (alpha * noise - sigma * self.x0 if v else noise).float() + self.error


def loss_and_oracle(diffusion, error=0.0, seed=0, model=MODEL, x0=None, token_weights=None, **options):
    x0 = data() if x0 is None else x0
    oracle = Oracle(x0, diffusion, error)
    return loss_of(DenoisingLoss(Config(model, diffusion), **options), oracle, x0, seed, token_weights), oracle


def loss_of(loss, denoise, x0, seed=0, token_weights=None):
    random = generator(seed)
    draws = loss.draw(len(x0), random)
    return loss(denoise, x0, torch.randn(x0.shape, generator=random), draws, token_weights)


@pytest.mark.parametrize("diffusion", EVERY_KIND, ids=lambda d: f"{d.prediction}-{d.time_sampling}")
def test_a_perfect_denoiser_has_no_loss(diffusion):
    losses, _ = loss_and_oracle(diffusion)
    assert list(losses) == ["image", "text"]
    # float32 inputs at time 1, where σ is 0.006, give the noise to 1e-5.
    assert all(0 <= loss < 1e-8 for loss in losses.values())


@pytest.mark.parametrize("diffusion", EVERY_KIND, ids=lambda d: f"{d.prediction}-{d.time_sampling}")
def test_the_loss_is_the_mean_squared_error_over_what_is_generated(diffusion):
    error = torch.zeros(MODEL.size)
    error[MODEL.state_slices["image"]], error[MODEL.state_slices["text"]] = 0.5, 2.0
    losses, _ = loss_and_oracle(diffusion, error)
    assert losses["image"].item() == pytest.approx(0.25, rel=1e-3) and losses["text"].item() == pytest.approx(
        4, rel=1e-3
    )
    losses, _ = loss_and_oracle(diffusion, error, weights={"text": 0.25})
    assert losses["image"].item() == pytest.approx(0.25, rel=1e-3) and losses["text"].item() == pytest.approx(
        1, rel=1e-3
    )


def test_shared_times_are_one_per_sample_and_cover_all_noise():
    _, oracle = loss_and_oracle(DiffusionConfig("cosine", 10, time_sampling="shared"))
    assert (oracle.times == oracle.times[:, :1]).all()
    assert set(oracle.times.unique().tolist()) == set(range(1, 11))


def test_independent_times_are_one_per_modality():
    _, oracle = loss_and_oracle(DiffusionConfig("cosine", 10, time_sampling="independent"))
    image, text = oracle.times[:, :6], oracle.times[:, 6:]
    assert (image == image[:, :1]).all() and (text == text[:, :1]).all()
    pairs = {tuple(pair) for pair in torch.stack([image[:, 0], text[:, 0]], 1).tolist()}
    assert len(pairs) > 90 and {t for pair in pairs for t in pair} == set(range(1, 11))


MASKED = DiffusionConfig("cosine", N, "v_prediction", "clean", "masked")


def test_known_tokens_are_clean_at_time_0_and_dropped_ones_are_noise_at_time_n():
    diffusion = replace(MASKED, schedule="scaled_linear")  # which leaves 7 % of x0 at time N
    x0 = 50 + data()
    times, generate, dropped = DenoisingLoss(Config(MODEL, diffusion)).draw(BATCH, generator())
    _, oracle = loss_and_oracle(diffusion, x0=x0)
    assert torch.equal(oracle.times, times)

    known = ~generate & ~dropped
    assert known.any() and dropped.any() and not (dropped & generate).any()
    assert (times[known] == 0).all() and (times[dropped] == N).all() and (times[generate] > 0).all()
    assert torch.equal(oracle.inputs[per_element(known)], x0[per_element(known)])
    noise = oracle.inputs[per_element(dropped)]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    of_sample = torch.where(generate, times, 0).max(1, keepdim=True).values
    assert torch.equal(times[generate], of_sample.expand_as(times)[generate])  # one time for all generated tokens
    assert (dropped == ~generate)[dropped.any(1)].all()  # a sample drops all of its known tokens


def test_modalities_that_the_model_sees_as_a_whole_are_known():
    loss = DenoisingLoss(Config(MODEL, MASKED))
    draws = loss.draw(BATCH, generator())
    image, text = loss.known(draws, "image"), loss.known(draws, "text")
    seen = ~draws.generate & ~draws.dropped
    assert torch.equal(image, seen[:, :6].all(1)) and torch.equal(text, seen[:, 6:].all(1))
    assert 0.2 * BATCH < image.sum() < 0.6 * BATCH and not (image & text).any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("diffusion", EVERY_KIND, ids=lambda d: f"{d.prediction}-{d.time_sampling}")
def test_the_losses_of_parts_add_up_to_those_of_the_batch(diffusion, weighted):
    loss, x0, random = DenoisingLoss(Config(MODEL, diffusion)), data(40), generator(3)
    draws, noise = loss.draw(40, random), torch.randn(x0.shape, generator=random)
    weights = torch.rand(40, MODEL.tokens, generator=random) if weighted else None
    inputs = []

    def denoise(x, times):
        inputs.append(x)
        return x * times[:, :1] / N

    parts = [loss(denoise, x0[p], noise[p], draws, weights, p) for p in (slice(0, 1), slice(1, 23), slice(23, 40))]
    whole = loss(denoise, x0, noise, draws, weights)
    assert torch.equal(torch.cat(inputs[:3]), inputs[3])
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)


def test_losses_are_added_up_by_quartile_of_time():
    loss, x0, random = DenoisingLoss(Config(MODEL, MASKED)), data(), generator(3)
    draws, noise = loss.draw(BATCH, random), torch.randn(x0.shape, generator=random)
    quartile = (draws.times - 1).clamp_min(0) * 4 // N  # [B, L]
    oracle = Oracle(x0, MASKED, error=per_element(1.0 + quartile))
    loss.record_times()
    whole = loss(oracle, x0, noise, draws)
    by_time = loss.taken_by_time()
    assert by_time.shape == (2, 2, 4) and not loss.taken_by_time().any()
    torch.testing.assert_close(by_time[:, 0] / by_time[:, 1], torch.tensor([[1.0, 4, 9, 16]] * 2), rtol=1e-3, atol=0)
    sums = by_time.sum(2)  # [M, 2]
    torch.testing.assert_close(sums[:, 0] / sums[:, 1], torch.stack(list(whole.values())))


def test_predictions_of_known_tokens_do_not_affect_the_loss():
    times, generate, _ = DenoisingLoss(Config(MODEL, MASKED)).draw(BATCH, generator())
    exact, _ = loss_and_oracle(MASKED)
    wrong, _ = loss_and_oracle(MASKED, error=1e6 * ~per_element(generate))
    assert all(torch.equal(exact[name], wrong[name]) for name in exact)
    wrong, _ = loss_and_oracle(MASKED, error=1.0 * per_element(generate))
    assert all(loss.item() == pytest.approx(1, rel=1e-3) for loss in wrong.values())


@pytest.mark.parametrize("diffusion", [EVERY_KIND[0], MASKED], ids=["shared", "masked"])
def test_each_token_is_weighted(diffusion):
    _, generate, _ = DenoisingLoss(Config(MODEL, diffusion)).draw(BATCH, generator())
    weights = torch.rand(BATCH, MODEL.tokens, generator=generator(5)) * 3
    error = torch.rand(BATCH, MODEL.tokens, generator=generator(6)) + 0.5  # one per token
    plain, _ = loss_and_oracle(diffusion, per_element(error))
    losses, _ = loss_and_oracle(diffusion, per_element(error), token_weights=weights)
    for name, tokens in (("image", slice(6)), ("text", slice(6, None))):
        counted = (weights * generate)[:, tokens]
        mean = ((counted * error[:, tokens].square()).sum() / counted.sum()).item()
        assert losses[name].item() == pytest.approx(mean, rel=1e-3) and losses[name] != plain[name]
    scaled, _ = loss_and_oracle(diffusion, per_element(error), token_weights=weights / 100)
    assert all(scaled[name].item() == pytest.approx(losses[name].item()) for name in losses)


def test_tokens_of_weight_zero_have_no_loss():
    losses, _ = loss_and_oracle(MASKED, error=1.0, token_weights=torch.zeros(BATCH, MODEL.tokens))
    assert all(loss == 0 for loss in losses.values())


def test_masks_have_the_documented_proportions():
    batch = 20_000
    _, generate, dropped = DenoisingLoss(Config(MODEL, MASKED)).draw(batch, generator())
    image, text = generate[:, :6], generate[:, 6:]

    def share(x):
        return x.float().mean().item()

    assert generate.any(1).all()
    random = 1 - JOINT - WHOLE_MODALITY
    # Random masks may cover all or nothing of a modality, so the fractions below may be exceeded by a part of theirs.
    assert JOINT - 0.01 < share(generate.all(1)) < JOINT + random / 4
    for known, other in ((image, text), (text, image)):
        whole = ~known.any(1) & other.all(1)
        assert WHOLE_MODALITY / 2 - 0.01 < share(whole) < WHOLE_MODALITY / 2 + random / 4
    mixed = (image.any(1) & ~image.all(1)) | (text.any(1) & ~text.all(1))
    assert random / 2 < share(mixed) < random + 0.01
    knows = ~generate.all(1)
    assert share(dropped[knows].any(1)) == pytest.approx(DROPPED, abs=0.01)
    assert abs(share(image[mixed]) - 0.5) < 0.1 and abs(share(text[mixed]) - 0.5) < 0.1


@pytest.mark.parametrize("odds", [{}, {"text": 3}], ids=["even", "text"])
def test_choices_of_known_modalities_are_as_frequent_as_their_odds(odds):
    model = replace(MODEL, modalities=(*MODEL.modalities, Modality("sketch", 6, 4, depth=0)))
    draws = DenoisingLoss(Config(model, MASKED), odds=odds).draw(20_000, generator())
    seen = draws.times == 0
    parts = [seen[:, part] for part in model.token_slices.values()]
    whole, none = torch.stack([p.all(1) for p in parts], 1), torch.stack([~p.any(1) for p in parts], 1)  # [B, M]
    counts = Counter(map(tuple, whole[(whole | none).all(1)].tolist()))
    assert len(counts) == 7  # without (True, True, True)
    for known, count in counts.items():
        share = (3 if known[1] else 1) / 12 if odds else 1 / 6
        expected = (1 - DROPPED) * WHOLE_MODALITY * share if any(known) else JOINT + DROPPED * (1 - JOINT)
        assert expected - 0.01 < count / 20_000 < expected + 0.03, known
    # Half a sketch and nothing else, or with a word.
    half_sketch = ~(whole | none)[:, 2]
    assert (half_sketch & none[:, 0] & none[:, 1]).float().mean() > 0.01
    assert (half_sketch & none[:, 0] & ~(whole | none)[:, 1]).float().mean() > 0.01


@pytest.mark.parametrize("odds", [{"txt": 3.0}, {"text": 0}, {"text": -1.0}, {"text": float("nan")}], ids=str)
def test_odds_that_cannot_be_drawn_by_are_refused(odds):
    with pytest.raises(InputError, match="odds: .*give positive numbers of image or text"):
        DenoisingLoss(Config(MODEL, MASKED), odds=odds)


def test_of_three_modalities_some_wait_as_noise_while_others_are_generated():
    model = replace(MODEL, modalities=(*MODEL.modalities, Modality("sketch", 6, 4, depth=0)))
    times, generate, dropped = DenoisingLoss(Config(model, MASKED)).draw(20_000, generator())
    assert generate.any(1).all() and not (generate & dropped).any() and (times[dropped] == N).all()
    parts = model.token_slices.values()
    seen, moving, waiting = (
        torch.stack([x[:, part].all(1) for part in parts], 1) for x in (times == 0, generate, dropped)
    )
    counts = Counter(map(tuple, (seen * 1 + moving * 2 + waiting * 3)[(seen | moving | waiting).all(1)].tolist()))
    # With the text known: image and sketch together, or one before the other, as when sampling goes by an order.
    together, image_first, sketch_first = counts[2, 1, 2], counts[2, 1, 3], counts[3, 1, 2]
    assert together == pytest.approx(2 * image_first, rel=0.2) and image_first == pytest.approx(sketch_first, rel=0.2)
    assert (3, 2, 3) in counts and (2, 2, 2) in counts  # the text before all else; all together


def test_random_masks_have_single_words_and_runs_of_tokens():
    _, generate, _ = DenoisingLoss(Config(MODEL, MASKED)).draw(20_000, generator())
    seen = {tuple(row) for row in generate[:, 6:].long().tolist()}
    assert len(seen) == 2**5  # any words of a prompt may be holes


def test_with_a_single_modality_some_token_is_always_generated():
    model = ModelConfig((Modality("image", 6, 4, depth=0),), shared_depth=1, dim=64)
    _, generate, _ = DenoisingLoss(Config(model, MASKED)).draw(5000, generator())
    assert generate.any(1).all() and not generate.all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_formula(prediction):
    gamma = 5.0
    diffusion = DiffusionConfig("scaled_linear", N, prediction)
    losses, oracle = loss_and_oracle(diffusion, error=1.0, gamma=gamma)
    alpha_bar = oracle.alpha_bar[oracle.times[:, 0]]
    snr = alpha_bar / (1 - alpha_bar)
    if prediction == "epsilon":  # of x̂0 min(SNR, γ), of ε = min(SNR, γ)/SNR
        weight = torch.minimum(snr, torch.tensor(gamma)) / snr
    else:  # of x̂0 min(SNR + 1, γ + 1), of v = that / (SNR + 1)
        weight = torch.minimum(snr + 1, torch.tensor(gamma + 1)) / (snr + 1)
    assert weight.min() < 0.1 and weight.max() == 1
    assert all(loss.item() == pytest.approx(weight.mean().item(), rel=1e-4) for loss in losses.values())


def test_the_generator_decides_everything():
    for diffusion in EVERY_KIND:
        (first, a), (again, b), (other, c) = (loss_and_oracle(diffusion, error=0.3, seed=s) for s in (1, 1, 2))
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.times, b.times) and first == again
        assert not torch.equal(a.inputs, c.inputs)


def test_gradients_reach_the_prediction_of_generated_tokens_only():
    x0, predictions = data(), []

    def denoise(inputs, times):
        predictions.append(torch.zeros_like(inputs, requires_grad=True))
        return predictions[0]

    sum(loss_of(DenoisingLoss(Config(MODEL, MASKED)), denoise, x0).values()).backward()
    _, generate, _ = DenoisingLoss(Config(MODEL, MASKED)).draw(BATCH, generator())
    assert torch.equal(predictions[0].grad != 0, per_element(generate))


def test_low_precision_predictions_are_compared_in_float32():
    diffusion = replace(MASKED, prediction="epsilon")
    loss = loss_of(DenoisingLoss(Config(MODEL, diffusion)), lambda x, t: torch.zeros_like(x).bfloat16(), data())
    assert all(value.dtype == torch.float32 and value.isfinite() for value in loss.values())


def test_distinct_times_index_back_to_the_times():
    times = torch.tensor([[5, 0, 5], [1000, 7, 0]])
    distinct, index = distinct_times(times, 6)
    assert distinct.tolist() == [0, 5, 7, 1000, 1000, 1000] and index.dtype == torch.int32
    assert torch.equal(distinct[index.long()], times)
