"""U-ViTs: published weights predict what their own networks do, times are a modality's, and training fits the kind."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import Engine, Request, checkpoint
from engine.checkpoint import CheckpointError
from engine.config import PRESETS, Config, ConfigError, DiffusionConfig, Modality, ModelConfig, UViTConfig
from engine.loss import DROPPED, DenoisingLoss, distinct_times
from engine.model import PSUNet
from engine.request import RequestError
from engine.uvit import UViT, initialise_from

DIM, LATENTS, SIDE, PATCH, WORDS = 128, 3, 8, 2, 5
TOKENS = (SIDE // PATCH) ** 2


class Published:
    """The networks as their papers and weights describe them: pictures [B, c, H, W], weights in a dictionary."""

    def __init__(self, weights, depth):
        self.w, self.half, self.post = weights, depth // 2, "clip_img_embed.weight" in weights

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attention(self, x, name):
        b, n, d = x.shape
        q, k, v = (y.reshape(b, n, d // 64, 64) for y in self.linear(x, f"{name}.attn.qkv").chunk(3, dim=-1))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).div(8).softmax(-1)
        return self.linear(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, n, d), f"{name}.attn.proj")

    def mlp(self, x, name):
        h = self.linear(x, f"{name}.mlp.fc1")
        return self.linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), f"{name}.mlp.fc2")

    def block(self, x, name, skip=None):
        if skip is not None:
            x = self.linear(torch.cat([x, skip], -1), f"{name}.skip_linear")
        if not self.post:
            x = x + self.attention(self.norm(x, f"{name}.norm1"), name)
            return x + self.mlp(self.norm(x, f"{name}.norm2"), name)
        if skip is not None:
            x = self.norm(x, f"{name}.norm1")
        x = self.norm(x + self.attention(x, name), f"{name}.norm2")
        return self.norm(x + self.mlp(x, name), f"{name}.norm3")

    def stack(self, x):
        skips = []
        for i in range(self.half):
            x = self.block(x, f"in_blocks.{i}")
            skips.append(x)
        x = self.block(x, "mid_block")
        for i in range(self.half):
            x = self.block(x, f"out_blocks.{i}", skips[-1 - i])
        return self.norm(x, "norm")

    def time(self, t):
        omega = 10000 ** (-torch.arange(DIM // 2) / (DIM // 2))
        return torch.cat([(t[:, None] * omega).cos(), (t[:, None] * omega).sin()], -1)[:, None]

    def patches(self, picture):
        w = self.w["patch_embed.proj.weight"]
        return F.conv2d(picture, w, self.w["patch_embed.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)

    def picture(self, x):
        return picture_of(self.linear(x, "decoder_pred"))

    def text_to_image(self, picture, t, text):
        x = torch.cat([self.time(t), self.linear(text, "context_embed"), self.patches(picture)], 1)
        y = self.picture(self.stack(x + self.w["pos_embed"])[:, 1 + WORDS :])
        if "final_layer.weight" in self.w:
            y = F.conv2d(y, self.w["final_layer.weight"], self.w["final_layer.bias"], padding=1)
        return y

    def joint(self, picture, clip, text, t_image, t_text):
        data_type = self.w["token_embedding.weight"][1].expand(len(text), 1, -1)
        given = [self.linear(text, "text_embed"), self.linear(clip, "clip_img_embed"), self.patches(picture)]
        x = torch.cat([self.time(t_image), self.time(t_text), data_type, *given], 1)
        position = self.w["pos_embed"]
        x = self.stack(x + torch.cat([position[:, :2], self.w["pos_embed_token"], position[:, 2:]], 1))
        text, clip, picture = x[:, 3:].split([WORDS, 1, TOKENS], 1)
        return self.picture(picture), self.linear(clip, "clip_img_out"), self.linear(text, "text_out")


def picture_of(tokens):
    """[B, L, p·p·c] → [B, c, H, W], pixel by pixel."""
    side = SIDE // PATCH
    picture = torch.empty(len(tokens), LATENTS, SIDE, SIDE)
    for y in range(SIDE):
        for x in range(SIDE):
            first = (y % PATCH * PATCH + x % PATCH) * LATENTS
            picture[:, :, y, x] = tokens[:, y // PATCH * side + x // PATCH, first : first + LATENTS]
    return picture


def published_weights(joint=False, depth=4, conv=True):
    generator = torch.Generator().manual_seed(depth)

    def random(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = {"patch_embed.proj.weight": random(DIM, LATENTS, PATCH, PATCH), "patch_embed.proj.bias": random(DIM)}

    def linear(name, out, into, bias=True):
        weights[f"{name}.weight"] = random(out, into)
        if bias:
            weights[f"{name}.bias"] = random(out)

    def norm(name):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + random(DIM), random(DIM)

    sides = [f"{side}_blocks.{i}" for side in ("in", "out") for i in range(depth // 2)]
    for block in ("mid_block", *sides):
        linear(f"{block}.attn.qkv", 3 * DIM, DIM, bias=False)
        linear(f"{block}.attn.proj", DIM, DIM)
        linear(f"{block}.mlp.fc1", 4 * DIM, DIM)
        linear(f"{block}.mlp.fc2", DIM, 4 * DIM)
        skip = block.startswith("out")
        if skip:
            linear(f"{block}.skip_linear", DIM, 2 * DIM)
        for name in ("norm1",) * (skip or not joint) + ("norm2",) + ("norm3",) * joint:
            norm(f"{block}.{name}")
    norm("norm")
    linear("decoder_pred", PATCH * PATCH * LATENTS, DIM)
    if joint:
        linear("text_embed", DIM, 7), linear("text_out", 7, DIM)
        linear("clip_img_embed", DIM, 9), linear("clip_img_out", 9, DIM)
        weights |= {"token_embedding.weight": random(2, DIM), "pos_embed_token": random(1, 1, DIM)}
        weights["pos_embed"] = random(1, 2 + WORDS + 1 + TOKENS, DIM)
    else:
        linear("context_embed", DIM, 7)
        weights["pos_embed"] = random(1, 1 + WORDS + TOKENS, DIM)
        if conv:
            weights["final_layer.weight"], weights["final_layer.bias"] = random(LATENTS, LATENTS, 3, 3), random(LATENTS)
    return weights


def predict(model, parts, times):
    """Predictions by modality; parts [B, L, C] and times [B] by modality."""
    config = model.config
    inputs = torch.cat([parts[m.name].flatten(1) for m in config.modalities], 1)
    index = torch.cat([times[m.name][:, None].expand(-1, m.tokens) for m in config.modalities], 1).int()
    with torch.inference_mode():
        out = model(inputs, model.time_table(torch.arange(1001)), index)
    return {m.name: out[:, config.state_slices[m.name]].unflatten(1, (m.tokens, m.channels)) for m in config.modalities}


def drawn(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGE, TEXT, CLIP = drawn(2, TOKENS, PATCH**2 * LATENTS), drawn(2, WORDS, 7), drawn(2, 1, 9)
T_IMAGE, T_TEXT = torch.tensor([1, 1000]), torch.tensor([700, 250])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("conv", [True, False], ids=["conv", "no conv"])
@pytest.mark.parametrize("depth", [2, 4])
def test_a_text_to_image_u_vit_predicts_what_the_published_network_does(depth, conv):
    weights = published_weights(depth=depth, conv=conv)
    expected = Published(weights, depth).text_to_image(picture_of(IMAGE), T_IMAGE, TEXT)
    model = checkpoint.convert_uvit(weights, text_tokens=WORDS)
    got = predict(model, {"image": IMAGE, "text": TEXT}, {"image": T_IMAGE, "text": torch.zeros(2).int()})
    torch.testing.assert_close(picture_of(got["image"]), expected, **CLOSE)
    assert expected.std() > 0.1 and not got["text"].any()


def test_unidiffuser_predicts_what_the_published_network_does():
    weights = published_weights(joint=True)
    expected = Published(weights, 4).joint(picture_of(IMAGE), CLIP, TEXT, T_IMAGE, T_TEXT)
    model = checkpoint.convert_uvit(weights, text_tokens=WORDS)
    times = {"image": T_IMAGE, "text": T_TEXT, "clip_image": T_IMAGE}
    got = predict(model, {"image": IMAGE, "text": TEXT, "clip_image": CLIP}, times)
    for found, wanted in zip((picture_of(got["image"]), got["clip_image"], got["text"]), expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_are_read_from_files_of_either_kind(tmp_path, suffix):
    from safetensors.torch import save_file

    weights, path = published_weights(), tmp_path / f"nnet.{suffix}"
    (torch.save if suffix == "pth" else save_file)(weights, path)
    torch.testing.assert_close(
        checkpoint.load_uvit(path, WORDS).state_dict(), checkpoint.convert_uvit(weights, WORDS).state_dict()
    )


class Unsafe:
    def __reduce__(self):
        return Path.touch, (Path("ran-code"),)


def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"pos_embed": Unsafe()}, "nnet.pth")
    with pytest.raises(CheckpointError, match="nnet.pth is damaged or holds more than weights"):
        checkpoint.load_uvit("nnet.pth")
    assert not Path("ran-code").exists()


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda w: w.pop("mid_block.mlp.fc1.weight"), "mid_block.mlp.fc1.weight"),
        (lambda w: w.pop("in_blocks.1.attn.proj.bias"), "in_blocks.1.proj.bias"),
        (lambda w: w.update({"time_embed.0.weight": drawn(4, 4)}), "time_embed.0.weight"),
        (lambda w: w.update(pos_embed=drawn(1, 99, DIM)), "93 image tokens"),
        (lambda w: w.clear(), "patch_embed.proj.weight"),
    ],
)
def test_weights_of_another_network_are_named(tmp_path, change, named):
    weights = published_weights()
    change(weights)
    torch.save(weights, tmp_path / "nnet.pth")
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")) as error:
        checkpoint.load_uvit(tmp_path / "nnet.pth", WORDS)
    assert "nnet.pth" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="nowhere.pth does not exist"):
        checkpoint.load_uvit(tmp_path / "nowhere.pth")


def random_model(preset):
    torch.manual_seed(0)
    model = checkpoint.build(preset.model).eval()
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


@pytest.mark.parametrize("preset", ["uvit-tiny", "conditional"])
def test_every_parameter_is_trained(preset):
    config = PRESETS["uvit-tiny"]
    if preset == "conditional":
        uvit = UViTConfig(("image",), ("image",), patch=2, extra_tokens=1)
        config = Config(replace(config.model, uvit=uvit), DiffusionConfig("cosine", times="conditional",
                        conditioning="clean"))  # fmt: skip
    model = random_model(config)

    def denoise(inputs, times):
        distinct, index = distinct_times(times, len(times) * 2 + 2)
        return model(inputs, model.time_table(distinct), index)

    losses = DenoisingLoss(config)(denoise, drawn(4, config.model.size), torch.Generator().manual_seed(0))
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_conditional_training_knows_the_condition_clean_or_drops_it():
    model = PRESETS["uvit-t2i-coco256"].model
    config = Config(model, DiffusionConfig(times="conditional", conditioning="clean"))
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
        ({"time": "adaln"}, {}, "time"),
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
    with pytest.raises(ConfigError, match=key):
        ModelConfig(**{**MODEL, "time": "token", **model}, uvit=replace(UVIT, **uvit))


@pytest.mark.parametrize(
    "uvit, times, conditioning",
    [
        (UVIT, "masked", "clean"),
        (UVIT, "conditional", "clean"),
        (replace(UVIT, predicted=("image",)), "shared", "renoise"),
        (replace(UVIT, timed=("image",)), "independent", "clean"),
    ],
)
def test_training_times_that_do_not_fit_the_model_are_refused(uvit, times, conditioning):
    with pytest.raises(ConfigError, match="times"):
        Config(ModelConfig(**MODEL, time="token", uvit=uvit), DiffusionConfig(times=times, conditioning=conditioning))


def stacks(depths, shared_depth, time="adaln"):
    """A PS-U-Net and a U-ViT of as many blocks as the longest path through it."""
    torch.manual_seed(1)
    modalities = [Modality("image", 16, 8, depths[0]), Modality("text", 5, 3, depths[1])]
    bare = tuple(replace(m, depth=0) for m in modalities)
    model = PSUNet(ModelConfig(tuple(modalities), shared_depth, 64, time=time))
    return model, UViT(ModelConfig(bare, shared_depth + 2 * max(depths), 64, time="token", uvit=UVIT))


@pytest.mark.parametrize("time", ["adaln", "token"])
def test_a_ps_u_net_without_branch_blocks_starts_as_the_u_vit_does(time):
    """What is left of the difference is the GELU, ε and, with adaLN, that the time does not enter yet."""
    model, source = stacks((0, 0), 3, time)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.05 * torch.randn_like(p))
        source.norm.reset_parameters()  # PS-U-Net's last norms are its own
        source.position[:2] = 0
    copied = initialise_from(model, source)
    assert {"shared_in.0", "shared_middle.0", "shared_out.0", "branches.image.head", "branches.text.position"} <= {
        *copied
    }
    parts = {"image": drawn(2, 16, 8), "text": drawn(2, 5, 3)}
    times = {"image": torch.tensor([400, 400]), "text": torch.tensor([400, 400])}
    got, wanted = predict(model.eval(), parts, times), predict(source.eval(), parts, times)
    tolerance = 0.01 if time == "token" else 0.3
    for name in parts:
        assert (got[name] - wanted[name]).norm() < tolerance * wanted[name].norm()


def test_blocks_are_matched_from_the_outside_and_out_blocks_mirrored():
    model, source = stacks((2, 1), 3)
    for i, block in enumerate(source.blocks()):
        torch.nn.init.constant_(block.proj.bias, i)  # in 0, 1, 2; middle 3; out 4, 5, 6
    initialise_from(model, source)
    numbers = {name: p[0].item() for name, p in model.named_parameters() if name.endswith("proj.bias")}
    assert numbers == {
        "branches.image.in_blocks.0.proj.bias": 0, "branches.image.in_blocks.1.proj.bias": 1,
        "branches.image.out_blocks.0.proj.bias": 5, "branches.image.out_blocks.1.proj.bias": 6,
        "branches.text.in_blocks.0.proj.bias": 0, "branches.text.out_blocks.0.proj.bias": 6,
        "shared_in.0.proj.bias": 2, "shared_middle.0.proj.bias": 3, "shared_out.0.proj.bias": 4,
    }  # fmt: skip


def test_a_u_vit_of_another_width_or_norm_is_no_start():
    model, source = stacks((1, 1), 1)
    for other in (replace(source.config, dim=128), replace(source.config, uvit=replace(UVIT, norm="post"))):
        with pytest.raises(ValueError, match="init: "):
            initialise_from(model, UViT(other))


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
        requests = [Request(steps=2, seed=5), Request(prompt="red _", steps=3), Request(prompt="big dog", steps=2)]
        with pytest.raises(RequestError, match="^step_cache: 2 needs a PS-U-Net"):
            engine.generate(Request(steps=1, step_cache=2))
        together = engine.generate(requests)
        alone = engine.generate(requests[1])
    assert [r.task for r in together] == ["joint", "infill", "text-to-image"]
    assert together[1].text == alone.text
    assert np.abs(np.asarray(together[1].image, int) - np.asarray(alone.image, int)).max() <= 1


def test_a_text_to_image_model_refuses_to_write_texts(u_vit_checkpoint):
    tiny = PRESETS["uvit-tiny"]
    model = replace(tiny.model, uvit=UViTConfig(("image",), ("image",), patch=1))
    config = replace(tiny, model=model, diffusion=replace(tiny.diffusion, times="conditional"))
    with Engine.from_pretrained(u_vit_checkpoint(config), device="cpu", dtype="float32") as engine:
        assert engine.generate(Request(prompt="red dog", steps=2)).text == "red dog"
        for request in (Request(), Request(prompt="red _")):
            with pytest.raises(RequestError, match="prompt: this model takes text as given"):
                engine.generate(request)
        engine.warmup(batch=2)
