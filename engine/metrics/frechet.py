"""The Fréchet distance of two sets of features, and how far the features of one set are from each other."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import InputError


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, in float64 on the CPU."""

    count: int
    mean: Tensor  # [d]
    covariance: Tensor  # [d, d]

    @classmethod
    def of(cls, parts: Tensor | Iterable[Tensor]) -> "Statistics":
        """Of features [n, d], or of parts of them one after the other (Chan et al. 1983).

        Raises InputError about "count" for fewer than 2.
        """
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for part in parts.split(4096) if isinstance(parts, Tensor) else parts:
            x = part.double().cpu()
            n, of_part = len(x), x.mean(0)
            shift = of_part - mean  # [d]
            x = x - of_part
            squares = squares + x.T @ x + shift[:, None] * shift * (count * n / (count + n))  # [d, d]
            mean = mean + shift * (n / (count + n))
            count += n
        if count < 2:
            raise InputError("count", count, "use 2 or more", "is too few images for a covariance")
        return cls(count, mean, squares / (count - 1))

    def root(self) -> Tensor:
        """The square root of the covariance [d, d]."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T


def frechet_distance(x: Statistics, y: Statistics, root: Tensor | None = None) -> float:
    """‖μ_x − μ_y‖² + tr(Σ_x + Σ_y − 2·(Σ_x·Σ_y)^½) (Heusel et al. 2017, 1706.08500).

    root  `x.root()`, where it is known. The trace of (Σ_x·Σ_y)^½ is that of the square roots of the eigenvalues of the
          symmetric Σ_x^½·Σ_y·Σ_x^½
    Falls with the count: compare equal counts only.
    """
    root = x.root() if root is None else root
    common = torch.linalg.eigvalsh(root @ y.covariance @ root).clamp_min(0).sqrt().sum()
    distance = (x.mean - y.mean).square().sum() + x.covariance.trace() + y.covariance.trace() - 2 * common
    return max(0.0, distance.item())


def pair_distances(features: Tensor, pairs: int, generator: torch.Generator) -> Tensor:
    """L2 distances of features [n, d], n ≥ 2, to `pairs` partners drawn at random, never themselves: [n, pairs]."""
    n = len(features)
    partners = (torch.arange(n)[:, None] + torch.randint(1, n, (n, pairs), generator=generator)) % n  # [n, pairs]
    return torch.stack([(features - features[p]).norm(dim=1) for p in partners.T], dim=1)
