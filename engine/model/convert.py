"""Weights from elsewhere: published U-ViTs into the engine's U-ViT, and a U-ViT's into a PS-U-Net.

    published weights ── load_uvit, convert_uvit ──> UViT ── initialise_from ──> PSUNet

A PyTorch pickle is read with `weights_only=True`, which makes tensors and runs no code.
Sources: github.com/baofff/U-ViT (arXiv 2209.12152), github.com/thu-ml/unidiffuser (arXiv 2303.06555).
"""

import re
from collections.abc import Iterator
from math import isqrt
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from engine.config import Modality, ModelConfig, UViTConfig
from engine.errors import InputError
from engine.files import load_tensors, unreadable
from engine.model.blocks import (
    GATE_ATTENTION,
    GATE_MLP,
    SCALE_ATTENTION,
    SCALE_MLP,
    SHIFT_ATTENTION,
    SHIFT_MLP,
    Block,
)
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT

REMEDY = "give the nnet weights of U-ViT or UniDiffuser"

# Published names of layers and ours.
BLOCK = re.compile(r"(in_blocks\.\d+|mid_block|out_blocks\.\d+)\.(.*)")
LAYERS = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2", "skip_linear": "skip"}
NORMS = {
    "pre": {"norm1": "norm1", "norm2": "norm2"},
    "post": {"norm1": "skip_norm", "norm2": "norm1", "norm3": "norm2"},
}
ENDS = {
    "patch_embed.proj": "embed.image",
    "context_embed": "embed.text",
    "text_embed": "embed.text",
    "clip_img_embed": "embed.clip_image",
    "decoder_pred": "head.image",
    "text_out": "head.text",
    "clip_img_out": "head.clip_image",
    "final_layer": "conv",
}


def load_uvit(path: str | PathLike, text_tokens: int = 77) -> UViT:
    """Reads weights that the U-ViT (text-to-image) or UniDiffuser project published: safetensors, or a PyTorch pickle.

    text_tokens  words or sub-words of the text the model was trained with
    Returns a network in evaluation mode, in the dtype of the file. Raises InputError("init"), naming the file.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            weights, _ = load_tensors(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise unreadable("init", path, error, "give a file of U-ViT or UniDiffuser weights") from None
    except Exception:  # a file from elsewhere can be wrong in any way; PyTorch's advice would be to run what it holds
        problem = "is damaged or holds more than weights"
        raise InputError("init", path, "give a file of U-ViT or UniDiffuser weights", problem) from None
    try:
        return convert_uvit(weights, text_tokens)
    except InputError as error:
        raise InputError("init", path, error.remedy, f"does not fit: {error.value} {error.problem}") from None


def convert_uvit(weights: dict[str, Tensor], text_tokens: int = 77) -> UViT:
    """The engine's U-ViT with the weights of a published one, given under that project's names.

    U-ViT's text-to-image models become one of modalities image and text, the latter a condition; UniDiffuser v1 one of
    image, text and clip_image (the CLIP embedding of the image, which shares the image's time), data type 1. Image
    tokens are ordered as the engine's: row in patch, column in patch, channel.
    Raises InputError("weights") if names or shapes are not those of such a model.
    """
    try:
        config, converted = _converted(dict(weights), text_tokens)
        with torch.device("meta"):
            network = UViT(config)
        network.load_state_dict(converted, assign=True)
    except KeyError as error:
        raise InputError("weights", error.args[0], REMEDY, "is missing") from None
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        problem = f"are not a U-ViT or UniDiffuser of {text_tokens} text tokens ({reason})"
        raise InputError("weights", f"{len(weights)} entries", REMEDY, problem) from None
    return network.eval().requires_grad_(False)


def _converted(weights: dict[str, Tensor], text_tokens: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config that the shapes imply, and the weights under the engine's names; empties `weights` in part."""
    patches = weights.pop("patch_embed.proj.weight")  # [D, c, p, p]
    dim, channels, patch, _ = patches.shape
    joint = "clip_img_embed.weight" in weights
    position = weights.pop("pos_embed")[0]  # [tokens, D], time tokens first
    sizes = {"text": (text_tokens, weights["text_embed.weight" if joint else "context_embed.weight"].shape[1])}
    if joint:
        sizes["clip_image"] = (1, weights["clip_img_embed.weight"].shape[1])
    times = 2 if joint else 1
    tokens = len(position) - times - sum(count for count, _ in sizes.values())
    if isqrt(max(tokens, 0)) ** 2 != tokens:
        raise ValueError(f"{tokens} image tokens do not form a square")
    # The published order is times, (data type,) text, (CLIP,) image; ours has the modalities in the config's.
    counts = [count for count, _ in sizes.values()]
    parts = dict(zip((*sizes, "image"), position[times:].split([*counts, tokens]), strict=True))
    sizes = {"image": (tokens, patch * patch * channels), **sizes}
    first = [position[:times]]
    if joint:
        first.append(weights.pop("pos_embed_token")[0] + weights.pop("token_embedding.weight")[1:])  # [1, D]
    uvit = UViTConfig(
        timed=("image", "text") if joint else ("image",),
        predicted=tuple(sizes) if joint else ("image",),
        norm="post" if joint else "pre",
        patch=patch if "final_layer.weight" in weights else 0,
        extra_tokens=1 if joint else 0,
    )
    depth = 1 + len({m[1] for name in weights if (m := BLOCK.match(name)) and m[1] != "mid_block"})
    modalities = tuple(Modality(name, *size, depth=0) for name, size in sizes.items())
    ratio = weights["mid_block.mlp.fc1.weight"].shape[0] // dim
    config = ModelConfig(modalities, depth, dim, mlp_ratio=ratio, time_conditioning="token", uvit=uvit)

    converted = {
        "position": torch.cat([*first, *(parts[name] for name in sizes)]),
        "embed.image.weight": patches.permute(0, 2, 3, 1).flatten(1),  # [D, p·p·c]
    }
    in_block = LAYERS | NORMS[uvit.norm]
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if block := BLOCK.match(layer):
            layer = f"{block[1].replace('mid_block', 'middle')}.{in_block.get(block[2], block[2])}"
        converted[f"{ENDS.get(layer, layer)}.{kind}"] = weight
    return config, converted


@torch.no_grad()
def initialise_from(model: PSUNet, source: UViT) -> list[str]:
    """Starts a PS-U-Net from a pre-norm U-ViT of the same width; returns the names of what was copied.

    Blocks are matched from the outside: the first in-blocks of the stack become each branch's in-blocks, those that
    follow the longest branch the shared ones, out-blocks mirrored; blocks left over stay as initialised. The U-ViT's
    affine norms become the blocks' own modulations, β the shift and γ − 1 the scale, and gates open fully. Embeddings,
    positions and heads are copied where a modality has the same tokens and channels.
    Raises InputError("init") if the blocks are not of one size or the U-ViT is not pre-norm.
    """
    a, b = model.config, source.config
    for key, found, needed in (
        ("width", b.dim, a.dim),
        ("head width", b.head_dim, a.head_dim),
        ("MLP ratio", b.mlp_ratio, a.mlp_ratio),
        ("norm", b.uvit.norm, "pre"),
    ):
        if found != needed:
            problem = f"is the U-ViT's {key}, but the PS-U-Net needs {needed!r}"
            raise InputError("init", found, "give a U-ViT that fits, or change the PS-U-Net's config", problem)
    copied = []
    for name, target, block in _matched_blocks(model, source):
        _copy_block(target, block)
        copied.append(name)
    positions = source.position[source.prefix :]  # [ΣL, D]
    for name, branch in model.branches.items():
        if name not in source.embed or source.embed[name].weight.shape != branch.embed.weight.shape:
            continue
        branch.embed.load_state_dict(source.embed[name].state_dict())
        copied.append(f"branches.{name}.embed")
        if b.modality(name).tokens == a.modality(name).tokens:
            branch.position[-a.modality(name).tokens :] = positions[b.token_slices[name]]
            copied.append(f"branches.{name}.position")
        if name in source.head:
            branch.head.load_state_dict(source.head[name].state_dict())
            copied.append(f"branches.{name}.head")
    return copied


def _copy_block(target: Block, block: Block) -> None:
    """Copies a pre-norm U-ViT's block into a PS-U-Net's."""
    for layer in ("qkv", "proj", "fc1", "fc2"):
        getattr(target, layer).load_state_dict(getattr(block, layer).state_dict())
    if block.skip is not None:
        target.skip.load_state_dict(block.skip.state_dict())
    if target.norm == "pre":
        target.norm1.load_state_dict(block.norm1.state_dict())
        target.norm2.load_state_dict(block.norm2.state_dict())
        return
    m = target.modulation.unflatten(0, (6, -1))  # [6, D], a view
    m[SHIFT_ATTENTION], m[SCALE_ATTENTION], m[GATE_ATTENTION] = block.norm1.bias, block.norm1.weight - 1, 1.0
    m[SHIFT_MLP], m[SCALE_MLP], m[GATE_MLP] = block.norm2.bias, block.norm2.weight - 1, 1.0


def _matched_blocks(model: PSUNet, source: UViT) -> Iterator[tuple[str, Block, Block]]:
    """(name in the PS-U-Net, its block, the U-ViT's block) of every pair that `initialise_from` copies."""
    stacks = []  # (names of in- and out-blocks, the blocks, how many of the U-ViT's to pass over)
    for name, branch in model.branches.items():
        prefix = f"branches.{name}"
        stacks.append((f"{prefix}.in_blocks", f"{prefix}.out_blocks", branch.in_blocks, branch.out_blocks, 0))
    longest = max(m.depth for m in model.config.modalities)
    stacks.append(("shared_in", "shared_out", model.shared_in, model.shared_out, longest))

    source_ins, source_outs = list(source.in_blocks), list(reversed(source.out_blocks))  # from the outside inwards
    for in_name, out_name, ins, outs, first in stacks:
        for i, (target, block) in enumerate(zip(ins, source_ins[first:], strict=False)):
            yield f"{in_name}.{i}", target, block
        for i, (target, block) in enumerate(zip(reversed(outs), source_outs[first:], strict=False)):
            yield f"{out_name}.{len(outs) - 1 - i}", target, block
    for target in model.shared_middle:
        yield "shared_middle.0", target, source.middle
