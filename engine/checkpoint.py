"""Checkpoint folders: `config.json`, `model.safetensors` (averaged weights), `text/`, `image/` (of diffusers).

Only JSON and safetensors are read: nothing is unpickled.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.codecs.text import CodecFileError, TextCodec
from engine.config import Config, ConfigError
from engine.model import PSUNet

BUILT_IN = Path(__file__).parent / "assets" / "emoji"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another shape; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; the autoencoder stays in its folder until pictures are needed."""

    config: Config
    model: PSUNet  # in evaluation mode
    text: TextCodec
    image_folder: Path


def load(folder: str | Path) -> Checkpoint:
    """Reads a checkpoint folder into memory, in the dtype it was saved in.

    Raises CheckpointError or ConfigError, naming the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint: {folder} is no folder; give one that engine.train has written")
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
        model = PSUNet(config.model)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if expected != found:
        name = min(expected.items() ^ found.items())[0]
        raise CheckpointError(
            f"checkpoint: {path} does not fit config.json: {name} is {found.get(name, 'missing')}, "
            f"should be {expected.get(name, 'absent')}; copy the folder again"
        )
    if not all(w.is_floating_point() and w.isfinite().all() for w in weights.values()):
        raise CheckpointError(f"checkpoint: {path} holds values that are no finite floats; copy it again")
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


def _read_config(path: Path) -> Config:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint: {path} does not exist; give a folder that engine.train has written"
        ) from None
    except (OSError, ValueError) as error:
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
