"""What the experiments use beside `engine.evaluate` and `engine.metrics`: features of a Python file, diversity."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import InputError


def features_of(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The network of a Python file with `load()`, as a function from images [B, 3, H, W] in −1..1 to [B, d].

    `load()` returns a module that takes images in 0..1; of several outputs the first is used. Raises InputError about
    "features" if the file or the function is missing.
    """
    spec = importlib.util.spec_from_file_location("given_features", path)
    if spec is None or not path.is_file():
        raise InputError("features", path, "give one with a function load()", "is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "load"):
        raise InputError("features", path, "give a file whose load() returns a network", "has no function load()")
    network = module.load().to(device).eval()

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        parts = []
        for part in images.split(64):
            out = network((part.to(device) + 1) / 2)
            parts.append((out[0] if isinstance(out, tuple) else out).float().cpu())
        return torch.cat(parts)

    return features


def diversity(images: Tensor) -> float:
    """Mean root mean square difference of all pairs of images [k, 3, H, W] in −1..1, in levels 0…255."""
    flat = images.flatten(1).double()  # [k, 3·H·W]
    return torch.pdist(flat).mean().item() / flat.shape[1] ** 0.5 * 127.5
