"""Weights from elsewhere: published U-ViTs into the engine's U-ViT, and a U-ViT's into a PS-U-Net.

    file ── read_weights ──> tensors ── convert_uvit ──> UViT ── initialise_from ──> PSUNet

Sources: github.com/baofff/U-ViT (arXiv 2209.12152), github.com/thu-ml/unidiffuser (arXiv 2303.06555).
"""

import re
from collections.abc import Iterator, Mapping
from math import isqrt
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from engine.config import Modality, ModelConfig, UViTConfig
from engine.errors import InputError
from engine.files import shape_difference
from engine.model.blocks import (
    GATE_ATTENTION,
    GATE_MLP,
    SCALE_ATTENTION,
    SCALE_MLP,
    SHIFT_ATTENTION,
    SHIFT_MLP,
    Block,
)
from engine.model.psunet import Branch, PSUNet
from engine.model.published import FIRST, REMEDY, network_weights, read_weights
from engine.model.uvit import UViT

CLIP_TOKENS = 77  # of CLIP's text encoder, whatever the text: those of all published models with text

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


def load_uvit(
    path: str | PathLike, text_tokens: int | None = None, heads: int | None = None, image_tokens: int | None = None
) -> UViT:
    """Reads weights that the U-ViT (text-to-image) or UniDiffuser (v1) project published, or saved in their training.

    path  safetensors, or a PyTorch pickle of tensors by name; they may be nested as in {"state_dict": …} and prefixed
          as in "module.…", and of several networks the averaged one, whose name has "ema", is taken
    Other arguments as in `convert_uvit`. Returns a network in evaluation mode, in the dtype of the file.
    Raises InputError: about "init", naming the file, or about an argument.
    """
    weights = read_weights(path)
    try:
        return convert_uvit(weights, text_tokens, heads, image_tokens)
    except InputError as error:
        if error.argument != "weights":
            raise
        raise InputError("init", Path(path), error.remedy, f"cannot be used: {error.value} {error.problem}") from None


def convert_uvit(
    weights: Mapping, text_tokens: int | None = None, heads: int | None = None, image_tokens: int | None = None
) -> UViT:
    """The engine's U-ViT with the weights of a published one, given under that project's names.

    U-ViT's text-to-image models become one of modalities image and text, the latter a condition; UniDiffuser v1 one of
    image, text and clip_image (the CLIP embedding of the image, which shares the image's time), data type 1. Image
    tokens are ordered as the engine's: row in patch, column in patch, channel.

    text_tokens   words or sub-words of the text. The weights have the sum of text and image tokens only. None: 77, as
                  CLIP has, if the others then form a square, else as many as leave `image_tokens`
    heads         of the attention, which the weights do not imply either. None: of 64 channels, as in both projects
    image_tokens  those that are expected, see text_tokens
    Raises InputError: about "weights" if names, shapes or values are not those of such a model, about "text_tokens" or
    "heads" if they do not fit.
    """
    weights = network_weights(weights)
    try:
        config, converted = _converted(dict(weights), text_tokens, heads, image_tokens)
        with torch.device("meta"):
            network = UViT(config)
        difference = shape_difference(network.state_dict(), converted)
        if difference:
            raise ValueError(difference)
        network.load_state_dict(converted, assign=True)
    except KeyError as error:
        raise InputError("weights", error.args[0], REMEDY, "is missing") from None
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, InputError) and error.argument in ("text_tokens", "heads"):
            raise
        problem = f"are not those of a U-ViT or UniDiffuser ({' '.join(str(error).split())})"
        raise InputError("weights", f"{len(weights)} entries", REMEDY, problem) from None
    return network.eval().requires_grad_(False)


def _text_tokens(count: int, text_tokens: int | None, image_tokens: int | None) -> int:
    """How many of `count` tokens of text and image are the text's; see `convert_uvit`."""
    if _is_square(count - CLIP_TOKENS):
        if text_tokens not in (None, CLIP_TOKENS):
            problem = f"leaves {count - text_tokens} image tokens where {CLIP_TOKENS} leave {count - CLIP_TOKENS}"
            raise InputError("text_tokens", text_tokens, f"use {CLIP_TOKENS}, CLIP's number", problem)
        return CLIP_TOKENS
    if text_tokens is None:
        if image_tokens is None:
            problem = f"does not tell how many of {count} tokens are text and how many image"
            raise InputError("text_tokens", None, "give the number of words", problem)
        text_tokens = count - image_tokens
    if text_tokens < 1 or not _is_square(count - text_tokens):
        raise ValueError(f"of {count} tokens {text_tokens} of text and {count - text_tokens} image tokens cannot be")
    return text_tokens


def _is_square(tokens: int) -> bool:
    return tokens >= 1 and isqrt(tokens) ** 2 == tokens


def _head_dim(dim: int, heads: int | None) -> int:
    """Channels of a head."""
    if heads is None:
        if dim % 64:
            problem = f"means heads of 64 channels, which do not divide the width of {dim}"
            raise InputError("heads", None, "give the number of heads", problem)
        return 64
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise InputError("heads", heads, f"use a divisor of {dim}", f"does not divide the width of {dim}")
    return dim // heads


def _converted(
    weights: dict[str, Tensor], text_tokens: int | None, heads: int | None, image_tokens: int | None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config that the shapes imply, and the weights under the engine's names; empties `weights` in part."""
    patches = weights.pop(FIRST)  # [D, c, p, p]
    dim, channels, patch, _ = patches.shape
    joint = "clip_img_embed.weight" in weights
    position = weights.pop("pos_embed")[0]  # [tokens, D], time tokens first
    times, others = (2, 1) if joint else (1, 0)  # tokens of time, and beside text and image
    words = _text_tokens(len(position) - times - others, text_tokens, image_tokens)
    tokens = len(position) - times - others - words
    sizes = {"text": (words, weights["text_embed.weight" if joint else "context_embed.weight"].shape[1])}
    if joint:
        sizes["clip_image"] = (1, weights["clip_img_embed.weight"].shape[1])
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
    config = ModelConfig(modalities, depth, dim, _head_dim(dim, heads), ratio, "token", uvit)

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


def require_same_blocks(model: ModelConfig, source: ModelConfig) -> None:
    """Raises InputError("init") if a PS-U-Net cannot start from a U-ViT because their blocks differ in size or norm."""
    for key, found, needed in (
        ("norm", source.uvit.norm, "pre"),
        ("width", source.dim, model.dim),
        ("head width", source.head_dim, model.head_dim),
        ("MLP ratio", source.mlp_ratio, model.mlp_ratio),
    ):
        if found != needed:
            problem = f"is the U-ViT's {key}, but the PS-U-Net needs {needed!r}"
            raise InputError("init", found, "give a U-ViT that fits, or change the PS-U-Net's config", problem)


@torch.no_grad()
def initialise_from(model: PSUNet, source: UViT) -> list[str]:
    """Starts a PS-U-Net from a pre-norm U-ViT of the same width; returns the names of what was copied.

    Blocks are matched from the outside: the first in-blocks of the stack become each branch's in-blocks, those that
    follow the longest branch the shared ones, out-blocks mirrored; blocks left over stay as initialised. The U-ViT's
    affine norms become the blocks' own modulations, β the shift and γ − 1 the scale, and gates open fully. Embeddings,
    positions, and heads with the norm before them are copied where a modality has the same tokens and channels.
    Raises InputError("init") if the blocks are not of one size or the U-ViT is not pre-norm. See `not_copied`.
    """
    require_same_blocks(model.config, source.config)
    a, b, copied = model.config, source.config, []
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
        if name in source.head and not a.modality(name).categories:
            branch.head.load_state_dict(source.head[name].state_dict())
            _copy_last_norm(branch, source)
            copied.append(f"branches.{name}.head")
    return copied


def not_copied(model: PSUNet, source: UViT, copied: list[str]) -> list[str]:
    """What `initialise_from`, which returned `copied`, left as it was or left out: one line for each kind."""
    a, b, lines = model.config, source.config, []
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block) and name not in copied]
    if blocks:
        lines.append(f"blocks {', '.join(blocks)}: the U-ViT has {b.shared_depth} blocks")
    sizes = {m.name: f"{m.tokens} × {m.channels}" for m in b.modalities}
    for part, kind in (("embed", "embedding"), ("position", "positions"), ("head", "head")):
        names = [m for m in a.modalities if f"branches.{m.name}.{part}" not in copied]
        if names:
            ours = ", ".join(f"{m.name} ({m.tokens} × {m.channels})" for m in names)
            theirs = ", ".join(sizes.get(m.name, "nothing") for m in names)
            if part == "head":
                theirs += f" and predicts {', '.join(b.predicted)}"
            lines.append(f"{kind} of {ours}: the U-ViT has {theirs}")
    used = {id(block) for _, _, block in _matched_blocks(model, source)}
    unused = sum(id(block) not in used for block in source.blocks())
    if unused:
        lines.append(f"{unused} blocks of the U-ViT: the PS-U-Net has fewer")
    if source.conv is not None:
        lines.append("the U-ViT's last convolution: a PS-U-Net has none")
    return lines


def _copy_last_norm(branch: Branch, source: UViT) -> None:
    """Copies the affine norm before a U-ViT's heads into that before a branch's head."""
    if branch.token_time:
        branch.norm.load_state_dict(source.norm.state_dict())
        return
    m = branch.modulation.unflatten(0, (6, -1))  # [6, D], a view
    m[SHIFT_ATTENTION], m[SCALE_ATTENTION] = source.norm.bias, source.norm.weight - 1


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
        if not model.config.modality(name).blocks_of:
            stacks.append((f"{prefix}.in_blocks", f"{prefix}.out_blocks", *branch.stacks(), 0))
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
