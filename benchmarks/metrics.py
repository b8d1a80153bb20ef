"""What the experiments use beside `engine.evaluate` and `engine.metrics`: features of images in −1..1, diversity."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.metrics.features import BATCH, feature_network


def features_of(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """`engine.evaluate --features PATH` as a function from images [B, 3, H, W] in −1..1 to [B, d].

    Raises InputError about "features".
    """
    network = feature_network(path, device)

    def features(images: Tensor) -> Tensor:
        levels = ((images + 1) * 127.5).round().to(torch.uint8)
        return torch.cat([network(part) for part in levels.split(BATCH)])

    return features


def diversity(images: Tensor) -> float:
    """Mean root mean square difference of all pairs of images [k, 3, H, W] in −1..1, in levels 0…255."""
    flat = images.flatten(1).double()  # [k, 3·H·W]
    return torch.pdist(flat).mean().item() / flat.shape[1] ** 0.5 * 127.5
