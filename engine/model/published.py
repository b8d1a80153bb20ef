"""Files of weights that the U-ViT and UniDiffuser projects publish: reading them, and telling what they hold.

A PyTorch pickle is read with `weights_only=True`, which makes tensors and runs no code.
Sources: github.com/baofff/U-ViT (arXiv 2209.12152), github.com/thu-ml/unidiffuser (arXiv 2303.06555).
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import InputError
from engine.files import all_finite, load_tensors, unreadable

REMEDY = "give the nnet weights of a text-to-image U-ViT or of UniDiffuser v1"
FIRST = "patch_embed.proj.weight"  # a name that all networks of both projects have


def read_weights(path: str | PathLike):
    """What a safetensors file or a PyTorch pickle holds, of any type; raises InputError("init"), naming the file."""
    path, remedy = Path(path), "give a file of U-ViT or UniDiffuser weights"
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)[0]
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise unreadable("init", path, error, remedy) from None
    except Exception:  # a file from elsewhere can be wrong in any way; PyTorch's advice would be to run what it holds
        raise InputError("init", path, remedy, "is damaged or holds more than weights") from None


def network_weights(weights: Mapping) -> dict[str, Tensor]:
    """One network's tensors under their published names, out of what training programs wrap them in.

    Mappings in mappings and prefixes are taken off; see `engine.model.convert.load_uvit`. Raises InputError("weights")
    if that leaves none or several, or one that the engine does not have.
    """
    if not isinstance(weights, Mapping):
        raise InputError("weights", type(weights).__name__, REMEDY, "is not a mapping from names to tensors")
    tensors, nested, seen = {}, [("", weights)], set()
    for prefix, part in nested:  # which grows
        if id(part) in seen:  # a pickle can hold a mapping that contains itself
            continue
        seen.add(id(part))
        for name, value in part.items():
            if isinstance(value, Mapping):
                nested.append((f"{prefix}{name}.", value))
            elif isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
    prefixes = [name.removesuffix(FIRST) for name in tensors if f".{name}".endswith(f".{FIRST}")]
    averaged = [prefix for prefix in prefixes if "ema" in prefix.lower()]
    if len(prefixes) > 1 and len(averaged) == 1:
        prefixes = averaged
    if not prefixes:
        names = ", ".join(map(str, list(weights)[:5])) or "nothing"
        raise InputError("weights", FIRST, REMEDY, f"is missing (there is {names}{', …' * (len(weights) > 5)})")
    if len(prefixes) > 1:
        names = ", ".join(prefix.rstrip(".") or "unnamed" for prefix in prefixes)
        raise InputError("weights", names, "save one of them as a file of its own", "are several networks")
    (prefix,) = prefixes
    weights = {name.removeprefix(prefix): weight for name, weight in tensors.items() if name.startswith(prefix)}
    _refuse_other_kinds(weights)
    if not all_finite(weights):
        raise InputError("weights", f"{len(weights)} entries", REMEDY, "hold values that are not finite floats")
    return weights


def _refuse_other_kinds(weights: dict[str, Tensor]) -> None:
    """Raises InputError about "weights" for the networks of both projects that the engine does not have."""
    joint = "clip_img_embed.weight" in weights
    for unlike, kind in (
        ("label_emb.weight" in weights, "a class-conditional U-ViT (label_emb)"),
        (not joint and "context_embed.weight" not in weights, "an unconditional U-ViT (no context_embed)"),
        (joint and "token_embedding.weight" not in weights, "UniDiffuser v0 (no token_embedding for the data type)"),
    ):
        if unlike:
            raise InputError("weights", f"{len(weights)} entries", REMEDY, f"are those of {kind}, which does not load")
    for name in weights:
        for part, option in (("time_", "mlp_time_embed"), ("qkv.bias", "qkv_bias")):
            if name.startswith(part) or name.endswith(part):
                raise InputError("weights", name, REMEDY, f"is there: models with {option} do not load")
