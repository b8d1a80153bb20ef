"""Checkpoint folders: `config.json`, `model.safetensors` (averaged weights), `text/`, `image/` (of diffusers).

Only JSON and safetensors are read: nothing is unpickled, but for published U-ViT weights on request, and these with
`weights_only=True`, which makes tensors and runs no code.
"""

import json
import os
import re
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.codecs.text import CodecFileError, TextCodec
from engine.config import Config, ConfigError, Modality, ModelConfig, UViTConfig
from engine.device import all_finite
from engine.model import PSUNet
from engine.uvit import UViT

BUILT_IN = Path(__file__).parent / "assets" / "emoji"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another shape; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; the autoencoder stays in its folder until pictures are needed."""

    config: Config
    model: PSUNet | UViT  # in evaluation mode
    text: TextCodec
    image_folder: Path


def build(config: ModelConfig) -> PSUNet | UViT:
    """A denoiser of this config, initialised for training."""
    return PSUNet(config) if config.uvit is None else UViT(config)


def load(folder: str | Path) -> Checkpoint:
    """Reads a checkpoint folder into memory, in the dtype it was saved in.

    Raises CheckpointError or ConfigError, naming the file.
    """
    if not os.path.isdir(folder):  # not Path's, which takes "" for the current folder and raises for a name too long
        raise CheckpointError(f"checkpoint: {str(folder)!r} is no folder; give one that engine.train has written")
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    if not (folder / "image").is_dir():
        raise CheckpointError(f"checkpoint: {folder / 'image'} is no folder; copy the checkpoint again")
    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint: {path} does not exist; give a folder that engine.train has written"
        ) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint: {path} is damaged or truncated ({error}); copy it again") from None
    with torch.device("meta"):  # no time is spent on weights that are about to be replaced
        model = build(config.model)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if expected != found:
        name = min(expected.items() ^ found.items())[0]
        raise CheckpointError(
            f"checkpoint: {path} does not fit config.json: {name} is {found.get(name, 'missing')}, "
            f"should be {expected.get(name, 'absent')}; copy the folder again"
        )
    if not all_finite(weights):
        raise CheckpointError(
            f"checkpoint: {path} holds values that are no finite floats of 16 bits or more; copy it again"
        )
    model.load_state_dict(weights, assign=True)
    try:
        text = TextCodec.load(folder / "text")
    except CodecFileError as error:
        raise CheckpointError(f"checkpoint: {error}") from None
    channels = config.model.modality("text").channels
    if text.vectors.shape[1] != channels:
        raise CheckpointError(
            f"checkpoint: {folder / 'text'} has vectors of {text.vectors.shape[1]}, config.json says {channels}; "
            "copy the folder again"
        )
    return Checkpoint(config, model.eval().requires_grad_(False), text, folder / "image")


def save(folder: str | Path, config: Config, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Writes `config.json` and `model.safetensors` (in `dtype`); the codecs save themselves beside them.

    Each is written under a temporary name and renamed, so a kill never leaves half a file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / ".unfinished"
    unfinished.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    unfinished.replace(folder / "config.json")
    save_file({name: w.to(dtype).contiguous() for name, w in weights.items()}, unfinished)
    unfinished.replace(folder / "model.safetensors")


def load_uvit(path: str | Path, text_tokens: int = 77) -> UViT:
    """Reads weights that the U-ViT (text-to-image) or UniDiffuser project published: safetensors, or a PyTorch pickle.

    text_tokens  words or sub-words of the text the model was trained with
    Returns a model in evaluation mode, in the dtype of the file. Raises CheckpointError, naming the file.
    """
    try:
        if Path(path).suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint: {path} does not exist; give a file of U-ViT or UniDiffuser weights"
        ) from None
    except Exception:  # a file from elsewhere can be wrong in any way; PyTorch's advice would be to run what it holds
        raise CheckpointError(
            f"checkpoint: {path} is damaged or holds more than weights; give a file of U-ViT or UniDiffuser weights"
        ) from None
    try:
        return convert_uvit(weights, text_tokens)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint: {path}: {error}") from None


def convert_uvit(weights: dict[str, Tensor], text_tokens: int = 77) -> UViT:
    """The engine's U-ViT with the weights of a published one, given under that project's names.

    U-ViT's text-to-image models become one of modalities image and text, the latter a condition; UniDiffuser v1 one of
    image, text and clip_image (the CLIP embedding of the picture, which shares the image's time), data type 1. Image
    tokens are ordered as the engine's: row in patch, column in patch, channel.
    Raises CheckpointError if names or shapes are not those of such a model.
    """
    try:
        config, converted = _converted(dict(weights), text_tokens)
        with torch.device("meta"):
            model = UViT(config)
        model.load_state_dict(converted, assign=True)
    except KeyError as error:
        raise CheckpointError(f"{error.args[0]} is missing; give the nnet weights of U-ViT or UniDiffuser") from None
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"no U-ViT or UniDiffuser of {text_tokens} text tokens: {reason}") from None
    return model.eval().requires_grad_(False)


BLOCK = re.compile(r"(in_blocks\.\d+|mid_block|out_blocks\.\d+)\.(.*)")
LAYERS = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2", "skip_linear": "skip"}
NORMS = {
    "pre": {"norm1": "norm1", "norm2": "norm2"},
    "post": {"norm1": "skip_norm", "norm2": "norm1", "norm3": "norm2"},
}


def _converted(weights: dict[str, Tensor], text_tokens: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config that the shapes tell, and the weights under the engine's names."""
    patches = weights.pop("patch_embed.proj.weight")  # [D, c, p, p]
    dim, channels, patch, _ = patches.shape
    joint = "clip_img_embed.weight" in weights
    position = weights.pop("pos_embed")[0]  # [tokens, D], time tokens first
    text = "text_embed" if joint else "context_embed"
    sizes = {"text": (text_tokens, weights[f"{text}.weight"].shape[1])}
    if joint:
        sizes["clip_image"] = (1, weights["clip_img_embed.weight"].shape[1])
    times = 2 if joint else 1
    tokens = len(position) - times - sum(count for count, _ in sizes.values())
    if isqrt(max(tokens, 0)) ** 2 != tokens:
        raise ValueError(f"{tokens} image tokens make no square")
    # The published order is times, (data type,) text, (CLIP,) image; ours has the modalities in the config's.
    parts = dict(zip((*sizes, "image"), position[times:].split([c for c, _ in sizes.values()] + [tokens]), strict=True))
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
    config = ModelConfig(modalities, depth, dim, mlp_ratio=ratio, time="token", uvit=uvit)

    converted = {
        "position": torch.cat([*first, *(parts[name] for name in sizes)]),
        "embed.image.weight": patches.permute(0, 2, 3, 1).flatten(1),  # [D, p·p·c]
    }
    renamed = {
        "patch_embed.proj": "embed.image", text: "embed.text", "clip_img_embed": "embed.clip_image", "norm": "norm",
        "decoder_pred": "head.image", "text_out": "head.text", "clip_img_out": "head.clip_image", "final_layer": "conv",
    }  # fmt: skip
    in_block = LAYERS | NORMS[uvit.norm]
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if block := BLOCK.match(layer):
            layer = f"{block[1].replace('mid_block', 'middle')}.{in_block.get(block[2], block[2])}"
        converted[f"{renamed.get(layer, layer)}.{kind}"] = weight
    return config, converted


def _read_config(path: Path) -> Config:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint: {path} does not exist; give a folder that engine.train has written"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint: {path} is no readable JSON ({error}); copy it again") from None
    try:
        config = Config.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"checkpoint: {path}: {error}") from None
    names = sorted(config.model.token_slices)
    if names != ["image", "text"] or config.image is None:
        raise CheckpointError(
            f"checkpoint: {path} has modalities {', '.join(names)} and image settings {config.image}; "
            "give a checkpoint with modalities image and text, and with image settings"
        )
    return config
