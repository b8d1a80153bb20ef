"""Conversion: published weights predict what their own networks do, and a PS-U-Net starts from a U-ViT's blocks."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from denoisers import drawn, predict

from engine.config import Modality, ModelConfig, UViTConfig
from engine.errors import InputError
from engine.model.convert import convert_uvit, initialise_from, load_uvit
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT

DIM, LATENTS, SIDE, PATCH, WORDS = 128, 3, 8, 2, 5
TOKENS = (SIDE // PATCH) ** 2


class Published:
    """The networks as their papers and weights describe them: latents [B, c, H, W], weights in a dictionary."""

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

    def patches(self, latents):
        w = self.w["patch_embed.proj.weight"]
        return F.conv2d(latents, w, self.w["patch_embed.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)

    def latents(self, x):
        return latents_of(self.linear(x, "decoder_pred"))

    def text_to_image(self, latents, t, text):
        x = torch.cat([self.time(t), self.linear(text, "context_embed"), self.patches(latents)], 1)
        y = self.latents(self.stack(x + self.w["pos_embed"])[:, 1 + WORDS :])
        if "final_layer.weight" in self.w:
            y = F.conv2d(y, self.w["final_layer.weight"], self.w["final_layer.bias"], padding=1)
        return y

    def joint(self, latents, clip, text, t_image, t_text):
        data_type = self.w["token_embedding.weight"][1].expand(len(text), 1, -1)
        given = [self.linear(text, "text_embed"), self.linear(clip, "clip_img_embed"), self.patches(latents)]
        x = torch.cat([self.time(t_image), self.time(t_text), data_type, *given], 1)
        position = self.w["pos_embed"]
        x = self.stack(x + torch.cat([position[:, :2], self.w["pos_embed_token"], position[:, 2:]], 1))
        text, clip, latents = x[:, 3:].split([WORDS, 1, TOKENS], 1)
        return self.latents(latents), self.linear(clip, "clip_img_out"), self.linear(text, "text_out")


def latents_of(tokens):
    """[B, L, p·p·c] → [B, c, H, W], pixel by pixel."""
    side = SIDE // PATCH
    latents = torch.empty(len(tokens), LATENTS, SIDE, SIDE)
    for y in range(SIDE):
        for x in range(SIDE):
            first = (y % PATCH * PATCH + x % PATCH) * LATENTS
            latents[:, :, y, x] = tokens[:, y // PATCH * side + x // PATCH, first : first + LATENTS]
    return latents


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


IMAGE, TEXT, CLIP = drawn(2, TOKENS, PATCH**2 * LATENTS), drawn(2, WORDS, 7), drawn(2, 1, 9)
T_IMAGE, T_TEXT = torch.tensor([1, 1000]), torch.tensor([700, 250])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("conv", [True, False], ids=["conv", "no conv"])
@pytest.mark.parametrize("depth", [2, 4])
def test_a_text_to_image_u_vit_predicts_what_the_published_network_does(depth, conv):
    weights = published_weights(depth=depth, conv=conv)
    expected = Published(weights, depth).text_to_image(latents_of(IMAGE), T_IMAGE, TEXT)
    model = convert_uvit(weights, text_tokens=WORDS)
    got = predict(model, {"image": IMAGE, "text": TEXT}, {"image": T_IMAGE, "text": torch.zeros(2).int()})
    torch.testing.assert_close(latents_of(got["image"]), expected, **CLOSE)
    assert expected.std() > 0.1 and not got["text"].any()


def test_unidiffuser_predicts_what_the_published_network_does():
    weights = published_weights(joint=True)
    expected = Published(weights, 4).joint(latents_of(IMAGE), CLIP, TEXT, T_IMAGE, T_TEXT)
    model = convert_uvit(weights, text_tokens=WORDS)
    times = {"image": T_IMAGE, "text": T_TEXT, "clip_image": T_IMAGE}
    got = predict(model, {"image": IMAGE, "text": TEXT, "clip_image": CLIP}, times)
    predictions = latents_of(got["image"]), got["clip_image"], got["text"]
    for prediction, wanted in zip(predictions, expected, strict=True):
        torch.testing.assert_close(prediction, wanted, **CLOSE)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_are_read_from_files_of_either_kind(tmp_path, suffix):
    from safetensors.torch import save_file

    weights, path = published_weights(), tmp_path / f"nnet.{suffix}"
    (torch.save if suffix == "pth" else save_file)(weights, path)
    torch.testing.assert_close(load_uvit(path, WORDS).state_dict(), convert_uvit(weights, WORDS).state_dict())


class Unsafe:
    def __reduce__(self):
        return Path.touch, (Path("ran-code"),)


def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"pos_embed": Unsafe()}, "nnet.pth")
    with pytest.raises(InputError, match="^init: nnet.pth is damaged or holds more than weights; give a file of U-ViT"):
        load_uvit("nnet.pth")
    assert not Path("ran-code").exists()


def test_what_is_not_weights_is_refused_without_advice_to_unpickle_it(tmp_path):
    torch.save({"weights": torch.nn.Linear(1, 1)}, tmp_path / "more.pth")
    (tmp_path / "a.png").write_bytes(bytes(range(255)))
    (tmp_path / "cut.safetensors").write_bytes(b"\x40" + bytes(7) + b"{")
    for name in ("more.pth", "a.png", "cut.safetensors"):
        with pytest.raises(InputError) as error:
            load_uvit(tmp_path / name)
        assert (error.value.argument, error.value.value) == ("init", tmp_path / name)
        assert "weights_only" not in str(error.value) and "; give " in str(error.value)


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
    with pytest.raises(InputError, match=re.escape(named)) as error:
        load_uvit(tmp_path / "nnet.pth", WORDS)
    assert (error.value.argument, error.value.value) == ("init", tmp_path / "nnet.pth")
    assert str(error.value).count("\n") == 0
    with pytest.raises(InputError, match=re.escape(named)) as error:
        convert_uvit(weights, WORDS)
    assert error.value.argument == "weights"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^init: .*nowhere.pth does not exist; give "):
        load_uvit(tmp_path / "nowhere.pth")


UVIT = UViTConfig(("image", "text"), ("image", "text"))


def networks(depths, shared_depth, time="adaln"):
    """A PS-U-Net and a U-ViT of as many blocks as the longest path through it."""
    torch.manual_seed(1)
    modalities = [Modality("image", 16, 8, depths[0]), Modality("text", 5, 3, depths[1])]
    bare = tuple(replace(m, depth=0) for m in modalities)
    model = PSUNet(ModelConfig(tuple(modalities), shared_depth, 64, time_conditioning=time))
    return model, UViT(ModelConfig(bare, shared_depth + 2 * max(depths), 64, time_conditioning="token", uvit=UVIT))


@pytest.mark.parametrize("time", ["adaln", "token"])
def test_a_ps_u_net_without_branch_blocks_starts_as_the_u_vit_does(time):
    """The rest of the difference is the GELU's form, ε and, with adaLN, that time does not enter yet."""
    model, source = networks((0, 0), 3, time)
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
    model, source = networks((2, 1), 3)
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 128}, "^init: 128 is the U-ViT's width, but the PS-U-Net needs 64; "),
        ({"head_dim": 32}, "^init: 32 is the U-ViT's head width, but the PS-U-Net needs 64; "),
        ({"mlp_ratio": 2}, "^init: 2 is the U-ViT's MLP ratio, but the PS-U-Net needs 4; "),
        ({"uvit": replace(UVIT, norm="post")}, "^init: 'post' is the U-ViT's norm, but the PS-U-Net needs 'pre'; "),
    ],
)
def test_a_ps_u_net_cannot_start_from_a_u_vit_of_other_sizes_or_norm(change, message):
    model, source = networks((1, 1), 1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError, match=message):
        initialise_from(model, UViT(replace(source.config, **change)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
