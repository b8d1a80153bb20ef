"""Models whose text is categorical: the head gives words' probabilities, and the prediction is x̂0."""

import json
import math
from dataclasses import replace

import pytest
import torch
from denoisers import N, diffusion, sample
from engine_cases import levels, noise, random_checkpoint
from train_cases import captioned_images, small_sample_sheets

from engine import Engine, InputError, Request, checkpoint
from engine.codecs.text import TextCodec
from engine.config import Config, Modality, ModelConfig
from engine.diffusion.loss import DenoisingLoss
from engine.diffusion.solver_table import SolverOptions, solver_table
from engine.model.denoiser import Denoiser, build
from engine.presets import PRESETS
from engine.sampling.batch import SampleSpec
from engine.training import stages
from engine.training.options import TrainOptions

MODEL = ModelConfig((Modality("image", 4, 3, depth=1), Modality("text", 5, 8, depth=1, categories=7)), 1, 64)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(MODEL).eval()
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        network.branches["text"].values.normal_()
    return network.requires_grad_(False)


def test_the_prediction_is_the_mean_of_the_vectors_by_their_probabilities(network):
    inputs, times = torch.randn(2, MODEL.size), torch.full((2, MODEL.tokens), 500, dtype=torch.int32)
    denoiser, text = Denoiser(network, N), MODEL.state_slices["text"]
    table = network.time_table(torch.arange(N + 1))
    logits = network(inputs, table, times, logits=True)[:, MODEL.head_slices["text"]].unflatten(1, (5, 7))
    temperature = torch.tensor([[1.0, 0.5], [1.0, 2.0]])
    for scale, given in ((torch.ones(2), None), (temperature[:, 1], temperature)):
        expected = (logits / scale[:, None, None]).softmax(-1) @ network.branches["text"].values
        found = denoiser(inputs, times, temperature=given)
        torch.testing.assert_close(found[:, text], expected.flatten(1))
    torch.testing.assert_close(found[:, : text.start], denoiser(inputs, times)[:, : text.start])


def test_a_low_temperature_leaves_the_likeliest_vector(network):
    inputs, times = torch.randn(3, MODEL.size), torch.full((3, MODEL.tokens), 900, dtype=torch.int32)
    cold = Denoiser(network, N)(inputs, times, temperature=torch.full((3, 2), 0.01))[:, MODEL.state_slices["text"]]
    distances = torch.cdist(cold.unflatten(1, (5, 8)), network.branches["text"].values.expand(3, -1, -1))
    assert distances.min(-1).values.median() < 1e-3


@pytest.mark.parametrize("solver", ["dpm++", "ddim", "ddpm", "unipc"])
def test_samples_end_at_what_a_certain_model_predicts(solver):
    """Whatever the solver, and the modality beside it that predicts v as before."""
    wanted = torch.randn(MODEL.size, generator=torch.Generator().manual_seed(1))

    class Certain:
        can_cache = False

        def __call__(self, inputs, times, outputs=None, *_, temperature=None):
            assert temperature is not None and (temperature == 0.5).all()
            prediction = torch.zeros_like(inputs)
            part = MODEL.state_slices["text"]
            prediction[:, part] = wanted[part]
            return prediction

    options = SolverOptions(solver, categorical=(1,), temperature=0.5)
    table = solver_table(diffusion(), [1000, 700, 400, 100], 2, options)
    generate, known = torch.ones(MODEL.size, dtype=torch.bool), torch.zeros(MODEL.size)
    model = replace(MODEL, modalities=tuple(replace(m, depth=0) for m in MODEL.modalities))
    (state,) = sample(Certain(), [SampleSpec(0, table, generate, known)], model)
    torch.testing.assert_close(state[MODEL.state_slices["text"]], wanted[MODEL.state_slices["text"]])


def test_the_loss_is_the_cross_entropy_of_the_generated_tokens():
    config = Config(MODEL, diffusion())
    loss, random = DenoisingLoss(config), torch.Generator().manual_seed(0)
    draws = loss.draw(64, random)
    x0, noise = torch.randn(2, 64, MODEL.size, generator=random)
    words = torch.randint(7, (64, 5), generator=random)
    logits = torch.randn(64, 5, 7, generator=random)

    def denoise(inputs, times):
        return torch.cat([inputs[:, :12], logits[: len(inputs)].flatten(1)], dim=1)

    found = loss(denoise, x0, noise, draws, categories={"text": words})["text"]
    generated = draws.generate[:, 4:]
    expected = torch.nn.functional.cross_entropy(logits[generated], words[generated])
    torch.testing.assert_close(found, 0.2 * expected)
    first, second = (
        loss(lambda x, t, p=p: torch.cat([x[:, :12], logits[p].flatten(1)], 1), x0[p], noise[p], draws, None, p,
             {"text": words})["text"]
        for p in (slice(0, 40), slice(40, 64))
    )  # fmt: skip
    torch.testing.assert_close(first + second, found)


def test_a_u_vit_has_no_categories():
    uvit = PRESETS["uvit-tiny"].model
    with pytest.raises(InputError, match="^text.categories: 7 "):
        replace(uvit, modalities=(uvit.modalities[0], replace(uvit.modalities[1], categories=7)))


@pytest.fixture(scope="module")
def categorical(tmp_path_factory):
    """An engine of the tiny preset with a categorical text."""
    config = as_categorical(PRESETS["tiny"], 32)
    folder = random_checkpoint(tmp_path_factory.mktemp("categorical") / "tiny", config)
    with Engine.from_pretrained(folder, dtype="float32") as engine:
        yield engine


def as_categorical(config, categories=1):
    image, text = config.model.modalities
    model = replace(config.model, modalities=(image, replace(text, categories=categories)))
    return replace(config, model=model, sampling=replace(config.sampling, temperature={"image-to-text": 0.5}))


def test_a_batch_of_temperatures_is_what_each_gives_alone(categorical):
    requests = [Request(steps=3, seed=i, temperature=t, image=noise(i) if i % 2 else None)
                for i, t in enumerate((None, None, 0.1, 0.1, 3.0, 3.0))]  # fmt: skip
    together, alone = categorical.generate(requests), [categorical.generate(request) for request in requests]
    for a, b in zip(together, alone, strict=True):
        assert a.text == b.text and abs(levels(a.image) - levels(b.image)).max() <= 1


def test_the_temperature_is_the_requests_or_the_checkpoints_for_the_task(categorical):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        forward = type(categorical._denoiser).__call__
        patch.setattr(type(categorical._denoiser), "__call__", lambda *a, temperature=None, **more: (
            seen.append(temperature) or forward(*a, temperature=temperature, **more)))  # fmt: skip
        for request in (Request(image=noise(1), steps=1), Request(image=noise(1), steps=1, temperature=0.2),
                        Request(steps=1)):  # fmt: skip
            categorical.generate(request)
    text = [round(float(t[0, 1]), 6) for t in seen if t is not None]
    assert text == [0.5, 0.2, 1.0]
    assert seen[-1] is None, "the image's step of a joint sample needs none"


def test_a_temperature_is_for_models_that_give_probabilities(engine):
    with pytest.raises(InputError, match="^temperature: 0.5 is for models that give probabilities; leave it out"):
        engine.generate(Request(prompt="red cat", temperature=0.5))
    for value in (0, -1, float("nan"), "hot"):
        with pytest.raises(InputError, match="^temperature: .*use a number from 0.01 to 100"):
            Request(temperature=value)


def test_training_takes_as_many_categories_as_the_captions_have_words(tmp_path):
    data, config = captioned_images(tmp_path), as_categorical(PRESETS["tiny"])
    with small_sample_sheets(1):
        options = TrainOptions(data, tmp_path / "run", "tiny", steps=2, autoencoder_steps=1, config=config)
        stages.train(options)
        loaded = checkpoint.load(tmp_path / "run" / "checkpoint")
        vectors = loaded.codec("text").vectors
        assert loaded.config.model.modality("text").categories == len(vectors) == 7  # six words and the end
        assert torch.equal(loaded.network.branches["text"].values, vectors)
        rows = [json.loads(line) for line in (tmp_path / "run" / "denoiser" / "curve.jsonl").read_text().splitlines()]
        assert 0 < rows[-1]["text"] < 0.25 * math.log(7)
        source = str(tmp_path / "run" / "checkpoint")
        stages.train(replace(options, out=tmp_path / "on", init=source, learning_rate=1e-9))
        before, after = (checkpoint.load(tmp_path / run / "checkpoint").network for run in ("run", "on"))
        for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        with pytest.raises(InputError, match="^init: .*text as categories True, where the preset has .* False"):
            stages.train(replace(options, out=tmp_path / "plain", init=source, config=PRESETS["tiny"]))


def test_a_vocabulary_of_another_size_than_the_models_is_refused(categorical, tmp_path):
    codec = categorical.codecs["text"]
    codec.save(tmp_path)
    modality = replace(categorical.config.model.modality("text"), categories=31)
    with pytest.raises(InputError, match="^checkpoint: .* has 32 word vectors, the model gives probabilities of 31"):
        TextCodec.load(tmp_path, {}, modality)
