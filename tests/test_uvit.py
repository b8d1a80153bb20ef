"""U-ViTs: a time of their own for each modality, step caching, training that fits the kind of model, sampling."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from denoisers import drawn, predict

from engine import Engine, Request, checkpoint
from engine.config import Config, DiffusionConfig, Modality, ModelConfig, UViTConfig
from engine.diffusion.loss import DROPPED, DenoisingLoss, distinct_times
from engine.errors import InputError
from engine.model.blocks import InnerCache
from engine.model.denoiser import build
from engine.presets import PRESETS

T_IMAGE, T_TEXT = torch.tensor([1, 1000]), torch.tensor([700, 250])


def random_model(preset):
    torch.manual_seed(0)
    model = build(preset.model).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_each_modality_has_a_time_of_its_own_and_unwanted_outputs_are_zero():
    config = PRESETS["uvit-tiny"].model
    model = random_model(PRESETS["uvit-tiny"])
    parts = {"image": drawn(2, 16, 4), "text": drawn(2, 6, 8)}
    times = {"image": T_IMAGE, "text": T_TEXT}
    before = predict(model, parts, times)
    later = predict(model, parts, times | {"text": T_TEXT + 9})
    assert not torch.allclose(before["image"], later["image"]) and not torch.allclose(before["text"], later["text"])

    inputs = torch.cat([parts["image"].flatten(1), parts["text"].flatten(1)], 1)
    index = torch.full((2, config.tokens), 5).int()
    table = model.time_table(torch.arange(10))
    both, one = model(inputs, table, index), model(inputs, table, index, ("text",))
    assert torch.equal(one[:, config.state_slices["text"]], both[:, config.state_slices["text"]])
    assert not one[:, config.state_slices["image"]].any()


def test_a_partly_known_modality_is_labelled_with_its_latest_time():
    config, model = PRESETS["uvit-tiny"].model, random_model(PRESETS["uvit-tiny"])
    inputs, table = drawn(1, config.size), model.time_table(torch.arange(1001))
    index = torch.full((1, config.tokens), 600).int()
    infill = index.clone()
    infill[:, 3:7] = 0
    assert torch.equal(model(inputs, table, index), model(inputs, table, infill))


@pytest.mark.parametrize("norm", ["pre", "post"])
@torch.no_grad()
def test_inner_blocks_results_are_cached_and_used_again_row_by_row(norm):
    tiny = PRESETS["uvit-tiny"]
    config = replace(tiny.model, shared_depth=5, uvit=replace(tiny.model.uvit, norm=norm, extra_tokens=1))
    model = random_model(replace(tiny, model=config))
    inputs, others, table = drawn(3, config.size), drawn(3, config.size, seed=4), model.time_table(torch.arange(1001))
    index = torch.tensor([[600], [1], [1000]]).int().expand(3, config.tokens)
    cache = model.new_cache(3).fill_(torch.nan)  # shows in whatever reads it before it is written
    expected, changed = model(inputs, table, index), model(others, table, index)

    everywhere = InnerCache(cache, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(model(inputs, table, index, inner=everywhere), expected)
    called = []
    for name, block in model.named_modules():
        if hasattr(block, "qkv"):
            block.register_forward_hook(lambda *_, n=name: called.append(n))
    torch.testing.assert_close(model(inputs, table, index, inner=InnerCache(cache, None)), expected)
    assert called == ["in_blocks.0", "out_blocks.1"]

    stale = model(others, table, index, inner=InnerCache(cache, None))
    some = model(others, table, index, inner=InnerCache(cache, torch.tensor([False, True, False])))
    torch.testing.assert_close(some[1], changed[1])
    torch.testing.assert_close(some[[0, 2]], stale[[0, 2]])
    assert not torch.allclose(stale, changed, atol=1e-3)


@pytest.mark.parametrize("preset", ["uvit-tiny", "conditional"])
def test_every_parameter_is_trained(preset):
    config = PRESETS["uvit-tiny"]
    if preset == "conditional":
        uvit = UViTConfig(("image",), ("image",), patch=2, extra_tokens=1)
        config = Config(replace(config.model, uvit=uvit), DiffusionConfig("cosine", time_sampling="conditional",
                        conditioning="clean"))  # fmt: skip
    model = random_model(config)

    def denoise(inputs, times):
        distinct, index = distinct_times(times, len(times) * 2 + 2)
        return model(inputs, model.time_table(distinct), index)

    loss, x0, noise = DenoisingLoss(config), drawn(4, config.model.size), drawn(4, config.model.size)
    sum(loss(denoise, x0, noise, loss.draw(4, torch.Generator().manual_seed(0))).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_conditional_training_knows_the_condition_clean_or_drops_it():
    model = PRESETS["uvit-t2i-coco256"].model
    config = Config(model, DiffusionConfig(time_sampling="conditional", conditioning="clean"))
    times, generate, dropped = DenoisingLoss(config).draw(400, torch.Generator().manual_seed(0))
    image, text = (slice_ for slice_ in model.token_slices.values())
    assert generate[:, image].all() and not generate[:, text].any() and not dropped[:, image].any()
    assert (times[:, image] >= 1).all() and set(times[:, text].unique().tolist()) == {0, 1000}
    assert dropped[:, text].all(1).float().mean() == pytest.approx(DROPPED, abs=0.05)


UVIT = UViTConfig(("image", "text"), ("image", "text"))
MODEL = {"modalities": (Modality("image", 16, 8, 0), Modality("text", 5, 3, 0)), "shared_depth": 3, "dim": 64}


@pytest.mark.parametrize(
    "model, uvit, key",
    [
        ({"time_conditioning": "adaln"}, {}, "time_conditioning"),
        ({"shared_depth": 0}, {}, "shared_depth"),
        ({"modalities": (Modality("image", 16, 8, 1), Modality("text", 5, 3, 0))}, {}, "image.depth"),
        ({}, {"timed": ("image", "sound")}, "uvit.timed"),
        ({}, {"predicted": ()}, "uvit.predicted"),
        ({}, {"norm": "both"}, "uvit.norm"),
        ({}, {"patch": 3}, "uvit.patch"),
        ({}, {"extra_tokens": -1}, "uvit.extra_tokens"),
    ],
)
def test_an_impossible_u_vit_is_refused_by_the_key(model, uvit, key):
    with pytest.raises(InputError) as error:
        ModelConfig(**{**MODEL, "time_conditioning": "token", **model}, uvit=replace(UVIT, **uvit))
    assert error.value.argument == key


@pytest.mark.parametrize(
    "uvit, times, conditioning, key",
    [
        (UVIT, "masked", "clean", "time_sampling"),
        (UVIT, "conditional", "clean", "time_sampling"),
        (replace(UVIT, predicted=("image",)), "shared", "renoise", "time_sampling"),
        (replace(UVIT, timed=("image",)), "independent", "clean", "uvit.timed"),
    ],
)
def test_training_times_that_do_not_fit_the_model_are_refused(uvit, times, conditioning, key):
    model = ModelConfig(**MODEL, time_conditioning="token", uvit=uvit)
    with pytest.raises(InputError) as error:
        Config(model, DiffusionConfig(time_sampling=times, conditioning=conditioning))
    assert error.value.argument == key


@pytest.fixture
def u_vit_checkpoint(tiny_checkpoint, tmp_path):
    """A folder like `tiny_checkpoint`, of a model that can be chosen."""

    def save(config):
        folder = shutil.copytree(tiny_checkpoint, tmp_path / "u-vit")
        checkpoint.save(folder, config, random_model(config).state_dict(), torch.float32)
        return folder

    return save


def test_a_u_vit_is_saved_loaded_and_sampled_from(u_vit_checkpoint):
    folder = u_vit_checkpoint(PRESETS["uvit-tiny"])
    assert checkpoint.load(folder).config == PRESETS["uvit-tiny"]
    with Engine.from_pretrained(folder, device="cpu", dtype="float32") as engine:
        requests = [
            Request(steps=2, seed=5),
            Request(prompt="red _", steps=3, step_cache=2),
            Request(prompt="big dog", steps=2),
        ]
        together = engine.generate(requests)
        alone = engine.generate(requests[1])
    assert [r.task for r in together] == ["joint", "infill", "text-to-image"]
    assert together[1].text == alone.text
    assert np.abs(np.asarray(together[1].image, int) - np.asarray(alone.image, int)).max() <= 1


def test_a_u_vit_of_one_block_has_no_inner_blocks_to_cache(u_vit_checkpoint):
    config = PRESETS["uvit-tiny"]
    folder = u_vit_checkpoint(replace(config, model=replace(config.model, shared_depth=1)))
    with (
        Engine.from_pretrained(folder, device="cpu", dtype="float32") as engine,
        pytest.raises(InputError, match="^step_cache: 2"),
    ):
        engine.generate(Request(steps=2, step_cache=2))


def test_a_text_to_image_model_refuses_to_write_texts(u_vit_checkpoint):
    tiny = PRESETS["uvit-tiny"]
    model = replace(tiny.model, uvit=UViTConfig(("image",), ("image",), patch=1))
    config = replace(tiny, model=model, diffusion=replace(tiny.diffusion, time_sampling="conditional"))
    with Engine.from_pretrained(u_vit_checkpoint(config), device="cpu", dtype="float32") as engine:
        assert engine.generate(Request(prompt="red dog", steps=2)).text == "red dog"
        for request in (Request(), Request(prompt="red _")):
            with pytest.raises(InputError, match="^prompt: "):
                engine.generate(request)
        engine.warmup(batch=2)
