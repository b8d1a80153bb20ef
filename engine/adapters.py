"""Folders of LoRA adapters, as peft writes them: `adapter_config.json` and `adapter_model.safetensors`.

They are read without peft. What engine.train writes also has, among the tensors' metadata, the fingerprint of the
weights that it was trained on.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine import checkpoint
from engine.codecs.codec import codec_folder
from engine.config import ModelConfig
from engine.errors import InputError, errors_named
from engine.files import all_finite, is_folder, load_tensors, read_json, save_tensors, unreadable
from engine.model.denoiser import build
from engine.model.lora import Adapter, layer_shapes, merged
from engine.request import ADAPTER, MAX_ALPHA, Request, is_number, is_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the layers' names, as peft has them; with PIPELINE_PREFIX after it for a pipeline's
BASE = "psunet-engine base"  # the metadata's key of the fingerprint
REMEDY = "give a folder that engine.train --lora or peft has written"
PLAIN = {  # settings of peft that change what the tensors mean, and what they have to be
    "bias": "none", "use_dora": False, "use_rslora": False, "lora_bias": False, "fan_in_fan_out": False,
    "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layer_replication": None,
}  # fmt: skip
# Values of init_lora_weights that leave the weights as they are; PiSSA, OLoRA, CorDA and LoftQ change them, and what
# is saved is for the changed ones.
INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Of a network's weights; the same for those that were saved in float32 and in float16."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_adapter(folder: str | PathLike, model: ModelConfig, base: str | None = None) -> Adapter:
    """An adapter of a model's blocks, its tensors on the CPU in float32.

    base  the fingerprint of the weights that it has to have been trained on, if it says on which; None: any
    Raises InputError about "adapter", naming the file.
    """
    if not isinstance(folder, str | PathLike) or not is_folder(folder, "adapter"):
        raise InputError("adapter", folder, REMEDY, "is not a folder")
    path, config = Path(folder) / WEIGHTS, read_json(Path(folder) / CONFIG, "adapter", REMEDY, "copy it again")
    rank, scaling = _rank_and_scaling(Path(folder) / CONFIG, config)
    try:
        tensors, metadata = load_tensors(path)
    except OSError as error:
        raise unreadable("adapter", path, error, REMEDY) from None
    except SafetensorError as error:
        raise InputError("adapter", path, "copy it again", f"is damaged or truncated ({error})") from None
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.removeprefix(PREFIX).removeprefix(checkpoint.PIPELINE_PREFIX).rpartition(".lora_")
        if pairs.setdefault(layer, {}).setdefault(part, tensor) is not tensor:
            raise InputError("adapter", path, REMEDY, f"holds lora_{part} of {layer} under two names")
    if problem := _difference(pairs, model, rank):
        raise InputError("adapter", path, "give one that was trained on this model", problem)
    if not all_finite(tensors):
        raise InputError("adapter", path, "copy it again", "holds values that are not finite floats of 16 bits or more")
    layers = {name: (p["A.weight"].float(), scaling * p["B.weight"].float()) for name, p in pairs.items()}
    if not all((b.abs().amax() * a.abs().amax()).isfinite() for a, b in layers.values()):
        raise InputError("adapter", path, "copy it again", "holds values that are too large, times alpha / r")
    if base is not None and metadata.get(BASE, base) != base:
        remedy = "give the checkpoint that it was trained on"
        raise InputError("adapter", path, remedy, "was trained on other weights than the checkpoint's")
    return Adapter(layers)


def save_tensors_of(folder: Path, tensors: Mapping[str, Tensor], base: str) -> None:
    """Writes the tensors A and B of layers, by their names in the network, such as "shared_in.0.qkv.lora_A.weight"."""
    named = {PREFIX + name: tensor.detach() for name, tensor in tensors.items()}
    save_tensors(folder / WEIGHTS, named, {"format": "pt", BASE: base})


def merge_adapter(source: str | PathLike, adapter: str | PathLike, out: str | PathLike, scale: float = 1.0) -> None:
    """Writes a checkpoint folder `out`: that of `source` with `scale` times an adapter added to its weights.

    The weights keep their dtype. Raises InputError about "checkpoint", "adapter", "scale" (as `Request.adapter_scale`)
    or "out", which may not exist yet.
    """
    loaded = checkpoint.load(source)
    base = fingerprint(loaded.network.state_dict())
    _write_merged(loaded, read_adapter(adapter, loaded.config.model, base), out, scale, 1)


def unmerge_adapter(source: str | PathLike, adapter: str | PathLike, out: str | PathLike, scale: float = 1.0) -> None:
    """Undoes `merge_adapter`, to the rounding of the weights' dtype; arguments and errors as there."""
    loaded = checkpoint.load(source)
    _write_merged(loaded, read_adapter(adapter, loaded.config.model), out, scale, -1)


def _write_merged(
    loaded: checkpoint.Checkpoint, adapter: Adapter, folder: str | PathLike, scale: float, sign: int
) -> None:
    with errors_named("scale"):
        scale = Request(adapter=ADAPTER, adapter_scale=scale).adapter_scale
    remedy = "give the name of a new folder"
    if not isinstance(folder, str | PathLike) or not Path(folder).name:
        raise InputError("out", folder, remedy, "is not a name")
    if os.path.lexists(folder):
        raise InputError("out", folder, remedy, "exists already")
    weights, config, out = loaded.network.state_dict(), loaded.config, Path(folder)
    unfinished = out.with_name(f"{out.name}.unfinished")
    dtype = next(iter(weights.values())).dtype
    changed = merged(weights, adapter, sign * scale)
    if not all_finite(changed):
        raise InputError("scale", scale, "use a smaller one", "makes weights that are not finite")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        checkpoint.save(unfinished, config, changed, dtype)
        for name, codec in config.codecs.items():
            source, copy = (codec_folder(root, codec, name) for root in (loaded.folder, unfinished))
            shutil.copytree(source, copy, dirs_exist_ok=True)  # modalities may share a folder
        unfinished.rename(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError("out", out, "give another folder", f"cannot be written ({error})") from None


def _rank_and_scaling(path: Path, config) -> tuple[int, float]:
    """r and alpha / r of an adapter's config."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError("adapter", path, REMEDY, "is not the config of a LoRA adapter")
    for key, plain in PLAIN.items():
        if (value := config.get(key) or plain) != plain:
            raise InputError("adapter", path, f"train with {key} {plain}", f"sets {key} to {value}, which is not used")
    if (initial := config.get("init_lora_weights")) not in INITIAL:
        remedy = "save it with path_initial_model_for_weight_conversion of peft"
        raise InputError("adapter", path, remedy, f"sets init_lora_weights to {initial}, which changes the weights")
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    usable = is_whole(rank) and 1 <= rank <= MAX_ALPHA and is_number(alpha) and abs(alpha) <= MAX_ALPHA
    if not usable:  # also NaN
        raise InputError("adapter", path, REMEDY, "does not say rank and alpha (r, lora_alpha)")
    return rank, alpha / rank


def _difference(pairs: Mapping[str, Mapping[str, Tensor]], model: ModelConfig, rank: int) -> str | None:
    """Where an adapter's tensors do not fit a model or its own rank, in words; None: nowhere."""
    with torch.device("meta"):
        shapes = layer_shapes(build(model))
    if not pairs:
        return "holds no layers"
    for layer, parts in sorted(pairs.items()):
        if parts.keys() != {"A.weight", "B.weight"}:
            return f"does not hold lora_A and lora_B of {layer or next(iter(parts))} alone"
        if layer not in shapes:
            return f"changes {layer}, which is not a linear layer of this model's blocks"
        (out, width), a, b = shapes[layer], *(tuple(parts[key].shape) for key in ("A.weight", "B.weight"))
        if a != (rank, width) or b != (out, rank):
            wanted = f"{(rank, width)} and {(out, rank)}"
            return f"has {a} and {b} for {layer}, where rank {rank} and this model need {wanted}"
    return None
