"""Checkpoint folders: `config.json`, `model.safetensors` (averaged weights), and a folder for each codec.

Only JSON and safetensors are read: nothing is unpickled.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.codecs.codec import Codec, load_codec
from engine.config import Config, ModelConfig
from engine.errors import InputError, shown
from engine.files import (
    all_finite,
    is_folder,
    load_tensors,
    read_json,
    save_tensors,
    shape_difference,
    unreadable,
    write_atomically,
)
from engine.model.denoiser import build
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT

BUILT_IN = Path(__file__).parent / "assets" / "emoji"
REMEDY = "give a folder that engine.train has written"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint: its network in memory, its codecs in its folder until they are asked for."""

    config: Config
    network: PSUNet | UViT  # in evaluation mode, as `build` makes them
    folder: Path
    _codecs: dict = field(default_factory=dict, init=False, repr=False)  # those that are loaded

    def codec(self, name: str, device: torch.device | str = "cpu") -> Codec:
        """The codec of a modality, loaded but not built. Modalities with the same files and settings share one.

        Raises InputError about "checkpoint", naming the file.
        """
        config, modality = self.config.codecs[name], self.config.model.modality(name)
        settings = tuple(sorted(config.settings.items()))
        key = (config.kind, config.folder or name, settings, modality.tokens, modality.channels, str(device))
        if key not in self._codecs:
            try:
                self._codecs[key] = load_codec(self.folder, config, modality, device)
            except InputError as error:
                if error.argument == "checkpoint":
                    raise
                raise _in_file(self.folder / "config.json", error) from None
        return self._codecs[key]


def load(folder: str | os.PathLike) -> Checkpoint:
    """Reads a checkpoint folder, weights in the dtype they were saved in.

    Autoencoders stay in their folders until they are built. Raises InputError about "checkpoint", naming the file.
    """
    if not isinstance(folder, str | os.PathLike):
        raise InputError("checkpoint", folder, REMEDY, "is not the name of a folder")
    if not is_folder(folder, "checkpoint"):  # not Path's, which takes "" for the current folder
        raise InputError("checkpoint", Path(folder) if folder else folder, REMEDY, "is not a folder")
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    network = _read_network(folder / "model.safetensors", config.model)
    checkpoint = Checkpoint(config, network, folder)
    for modality in config.model.modalities:
        checkpoint.codec(modality.name)  # now, so that damage is reported before minutes of work
    return checkpoint


def save(folder: str | os.PathLike, config: Config, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Writes `config.json` and `model.safetensors` (in `dtype`); the codecs save themselves beside them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    write_atomically(folder / "config.json", lambda path: path.write_text(text))
    save_tensors(folder / "model.safetensors", {name: w.to(dtype) for name, w in weights.items()})


def _read_config(path: Path) -> Config:
    values = read_json(path, "checkpoint", REMEDY, "copy it again")
    try:
        config = Config.from_dict(values)
    except InputError as error:
        raise _in_file(path, error) from None
    if not config.codecs:
        raise InputError("checkpoint", path, "give a checkpoint with a codec for each modality", "names no codecs")
    return config


def _read_network(path: Path, config: ModelConfig) -> PSUNet | UViT:
    try:
        weights, _ = load_tensors(path)
    except OSError as error:
        raise unreadable("checkpoint", path, error, REMEDY) from None
    except SafetensorError as error:
        raise InputError("checkpoint", path, "copy it again", f"is damaged or truncated ({error})") from None
    with torch.device("meta"):  # no time is spent on weights that are about to be replaced
        network = build(config)
    difference = shape_difference(network.state_dict(), weights)
    if difference:
        raise InputError("checkpoint", path, "copy the folder again", f"does not fit config.json: {difference}")
    if not all_finite(weights):
        problem = "holds values that are not finite floats of 16 bits or more"
        raise InputError("checkpoint", path, "copy it again", problem)
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def _in_file(path: Path, error: InputError) -> InputError:
    """An error of a setting as one of the file that holds it."""
    problem = f"sets {error.argument} to {shown(error.value)}, which {error.problem}"
    return InputError("checkpoint", path, error.remedy, problem)
