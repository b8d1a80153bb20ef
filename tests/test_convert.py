"""Conversion: published weights predict what their own networks do, and a PS-U-Net starts from a U-ViT's blocks."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from denoisers import drawn, predict
from uvit_cases import DIM, LATENTS, PATCH, SIDE, TOKENS, WORDS, published_weights

from engine.config import Modality, ModelConfig, UViTConfig
from engine.errors import InputError
from engine.model.convert import convert_uvit, initialise_from, not_copied
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT


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
        source.position[:2] = 0
    assert not_copied(model, source, initialise_from(model, source)) == []
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


def test_what_does_not_fit_a_ps_u_net_is_named_by_its_kind():
    model, source = networks((2, 1), 5)
    weights = published_weights(dim=64, tokens=16, latents=2, words=77, depth=4)  # image 16 × 8 as in the model
    source = convert_uvit(weights)
    before = model.branches["text"].embed.weight.clone()
    assert not_copied(model, source, initialise_from(model, source)) == [
        "blocks shared_in.0, shared_in.1, shared_out.0, shared_out.1: the U-ViT has 5 blocks",
        "embedding of text (5 × 3): the U-ViT has 77 × 7",
        "positions of text (5 × 3): the U-ViT has 77 × 7",
        "head of text (5 × 3): the U-ViT has 77 × 7 and predicts image",
        "the U-ViT's last convolution: a PS-U-Net has none",
    ]
    assert torch.equal(model.branches["text"].embed.weight, before)
    assert torch.equal(model.branches["image"].head.weight, source.head["image"].weight)


def test_blocks_of_a_u_vit_that_a_ps_u_net_has_no_place_for_are_counted():
    (model, _), (_, source) = networks((1, 1), 1), networks((2, 2), 1)
    assert not_copied(model, source, initialise_from(model, source)) == [
        "2 blocks of the U-ViT: the PS-U-Net has fewer"
    ]


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
