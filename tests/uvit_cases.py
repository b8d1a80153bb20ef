"""Weights of small networks as U-ViT and UniDiffuser publish them, under their names."""

import torch

DIM, LATENTS, SIDE, PATCH, WORDS = 128, 3, 8, 2, 5
TOKENS = (SIDE // PATCH) ** 2


def published_weights(
    joint=False, depth=4, conv=True, zero=False,
    dim=DIM, latents=LATENTS, patch=PATCH, tokens=TOKENS, words=WORDS, context=7,
):  # fmt: skip
    """By name; `zero` makes tensors that take no memory."""
    generator = torch.Generator().manual_seed(depth)

    def random(*shape):
        if zero:
            return torch.zeros(1).expand(shape)
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = {"patch_embed.proj.weight": random(dim, latents, patch, patch), "patch_embed.proj.bias": random(dim)}

    def linear(name, out, into, bias=True):
        weights[f"{name}.weight"] = random(out, into)
        if bias:
            weights[f"{name}.bias"] = random(out)

    def norm(name):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + random(dim), random(dim)

    sides = [f"{side}_blocks.{i}" for side in ("in", "out") for i in range(depth // 2)]
    for block in ("mid_block", *sides):
        linear(f"{block}.attn.qkv", 3 * dim, dim, bias=False)
        linear(f"{block}.attn.proj", dim, dim)
        linear(f"{block}.mlp.fc1", 4 * dim, dim)
        linear(f"{block}.mlp.fc2", dim, 4 * dim)
        skip = block.startswith("out")
        if skip:
            linear(f"{block}.skip_linear", dim, 2 * dim)
        for name in ("norm1",) * (skip or not joint) + ("norm2",) + ("norm3",) * joint:
            norm(f"{block}.{name}")
    norm("norm")
    linear("decoder_pred", patch * patch * latents, dim)
    if joint:
        linear("text_embed", dim, 7), linear("text_out", 7, dim)
        linear("clip_img_embed", dim, 9), linear("clip_img_out", 9, dim)
        weights |= {"token_embedding.weight": random(2, dim), "pos_embed_token": random(1, 1, dim)}
        weights["pos_embed"] = random(1, 2 + words + 1 + tokens, dim)
    else:
        linear("context_embed", dim, context)
        weights["pos_embed"] = random(1, 1 + words + tokens, dim)
        if conv:
            weights["final_layer.weight"], weights["final_layer.bias"] = random(latents, latents, 3, 3), random(latents)
    return weights
