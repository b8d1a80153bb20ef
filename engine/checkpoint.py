"""Checkpoint folders: `config.json`, `model.safetensors` (averaged weights), and a folder for each codec.

Weights of 8 bits are for storage alone: a matrix W [out, in] is stored as whole numbers of -127…127, and beside it
`NAME.scale` [out] float32; W = scale · numbers, row by row. Smaller matrices and other tensors stay float16.

A folder that `engine.pipeline` has saved holds the weights in `transformer/` instead, as diffusers does, perhaps in
parts. Only JSON and safetensors are read: nothing is unpickled.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.codecs.codec import Codec, load_codec
from engine.config import Config, ModelConfig
from engine.errors import InputError, shown
from engine.files import (
    all_finite,
    files_within,
    is_file,
    is_folder,
    load_tensors,
    read_json,
    save_tensors,
    shape_difference,
    unreadable,
    write_atomically,
)
from engine.hub import MODELS, REMEDY, local_folder, patterns, upload
from engine.model.denoiser import build
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT
from engine.model_card import model_card

BUILT_IN = MODELS["emoji"]
PIPELINE_WEIGHTS = "diffusion_pytorch_model.safetensors"  # in transformer/, under names that start with PIPELINE_PREFIX
PIPELINE_PREFIX = "network."
SCALE = ".scale"  # behind the name of a matrix of 8 bits
MIN_QUANTIZED = 64  # rows, and columns, of matrices that are stored with 8 bits
VALUES = ".values"  # vectors of categories, which are those of the codec


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


def load(folder: str | os.PathLike, revision: str | None = None) -> Checkpoint:
    """Reads a checkpoint folder, or a checkpoint on the hub, weights in the dtype they were saved in.

    folder  a path, the name of a model that comes with the engine, or "owner/name" or "owner/name@revision" on the
            hub, see `engine.hub.local_folder`
    Autoencoders stay in their folders until they are built. Raises InputError about "checkpoint", naming the file.
    """
    if not isinstance(folder, str | os.PathLike) or folder == "":  # Path takes "" as the current folder
        raise InputError("checkpoint", folder, REMEDY, "is not a folder")
    path = local_folder(folder, revision=revision)
    if not is_folder(path, "checkpoint"):
        raise InputError("checkpoint", path, REMEDY, "is not a folder")
    config = read_config(path / "config.json")
    network = read_network(path, config.model)
    checkpoint = Checkpoint(config, network, path)
    for modality in config.model.modalities:
        checkpoint.codec(modality.name)  # now, so that damage is reported before minutes of work
    return checkpoint


def save(folder: str | os.PathLike, config: Config, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Writes `config.json` and `model.safetensors` (in `dtype`); the codecs save themselves beside them.

    dtype  of the weights: a floating one, or torch.int8, with which `load` gives float16
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    write_atomically(folder / "config.json", lambda path: path.write_text(text))
    stored = _quantized(weights) if dtype == torch.int8 else {name: w.to(dtype) for name, w in weights.items()}
    save_tensors(folder / "model.safetensors", stored)


def push_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    evaluation: Mapping | str | os.PathLike | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload checkpoint",
) -> str:
    """Uploads a checkpoint folder to the Hugging Face hub in one commit, and a model card as its README.md.

    evaluation  what `python -m engine.evaluate --json` prints, or the file of it: the card is written from it and from
                the config. None: the folder's own README.md, or a card without scores if it has none
    revision    branch, made if there is none; default the default branch
    private     of a repository that is made; None: the account's default
    token       None: that of `hf auth login`, or HF_TOKEN
    Returns the address of the commit. Raises InputError: about "checkpoint" if the folder cannot be loaded, about
    "evaluation", or about "repo_id" if the hub refuses.
    """
    loaded = load(folder)
    config, folder = loaded.config, loaded.folder
    remedy = "give what engine.evaluate --json prints"
    if isinstance(evaluation, str | os.PathLike):
        scores = read_json(Path(evaluation), "evaluation", remedy, remedy)
    else:
        scores = evaluation
    paths = sorted(path.relative_to(folder).as_posix() for path in files_within(folder))
    wanted = patterns(config)
    files = {name: folder / name for name in paths if any(fnmatchcase(name, pattern) for pattern in wanted)}
    readme: Path | bytes = folder / "README.md"
    if scores is not None or not (folder / "README.md").exists():
        readme = model_card(config, repo_id, scores).encode()
    return upload(repo_id, {**files, "README.md": readme}, message, revision, private, token)


def read_config(path: Path) -> Config:
    """The config.json of a checkpoint; raises InputError about "checkpoint"."""
    values = read_json(path, "checkpoint", REMEDY, "copy it again")
    try:
        config = Config.from_dict(values)
    except InputError as error:
        raise _in_file(path, error) from None
    if not config.codecs:
        raise InputError("checkpoint", path, "give a checkpoint with a codec for each modality", "names no codecs")
    return config


def read_network(folder: Path, config: ModelConfig) -> PSUNet | UViT:
    weights: dict[str, Tensor] = {}
    files = _weights_files(folder)
    for path in files:
        try:
            weights |= load_tensors(path)[0]
        except OSError as error:
            raise unreadable("checkpoint", path, error, REMEDY) from None
        except SafetensorError as error:
            raise InputError("checkpoint", path, "copy it again", f"is damaged or truncated ({error})") from None
    weights = _dequantized({name.removeprefix(PIPELINE_PREFIX): w for name, w in weights.items()})
    with torch.device("meta"):  # no time is spent on weights that are about to be replaced
        network = build(config)
    difference = shape_difference(network.state_dict(), weights)
    if difference:
        problem = f"does not fit config.json: {difference}"
        raise InputError("checkpoint", files[0], "copy the folder again", problem)
    if not all_finite(weights):
        problem = "holds values that are not finite floats of 16 bits or more"
        raise InputError("checkpoint", files[0], "copy it again", problem)
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def _quantized(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Large matrices as int8, with a scale for each row; all else as float16."""
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and min(weight.shape) >= MIN_QUANTIZED and not name.endswith(VALUES):
            scale = weight.float().abs().amax(1) / 127  # [out]
            divisor = scale.masked_fill(scale == 0, 1)[:, None]
            stored[name], stored[name + SCALE] = (weight.float() / divisor).round().to(torch.int8), scale
        else:
            stored[name] = weight.half()
    return stored


def _dequantized(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, those of 8 bits as float16. Int8 without a valid scale stays int8, which `load` refuses."""
    weights = dict(stored)
    for name, matrix in stored.items():
        scale = stored.get(name + SCALE)
        if matrix.dtype != torch.int8 or matrix.ndim != 2 or scale is None:
            continue
        if scale.dtype == torch.float32 and scale.shape == matrix.shape[:1]:
            weights[name] = (matrix.float() * weights.pop(name + SCALE)[:, None]).half()
    return weights


def _weights_files(folder: Path) -> list[Path]:
    """The files of the network's weights: one, or the parts that a pipeline's index names."""
    if not is_file(folder / "model_index.json", "checkpoint"):
        return [folder / "model.safetensors"]
    whole = folder / "transformer" / PIPELINE_WEIGHTS
    index = whole.with_name(f"{PIPELINE_WEIGHTS}.index.json")
    if not is_file(index, "checkpoint"):
        return [whole]
    parts = read_json(index, "checkpoint", REMEDY, "copy it again")
    try:
        names = sorted(set(parts["weight_map"].values()))
        inside = bool(names) and all(Path(name).name == name for name in names)
    except (AttributeError, KeyError, TypeError):
        inside = False
    if not inside:
        raise InputError("checkpoint", index, "copy it again", "does not name the files of the weights")
    return [whole.with_name(name) for name in names]


def _in_file(path: Path, error: InputError) -> InputError:
    """An error of a setting as one of the file that holds it."""
    problem = f"sets {error.argument} to {shown(error.value)}, which {error.problem}"
    return InputError("checkpoint", path, error.remedy, problem)
