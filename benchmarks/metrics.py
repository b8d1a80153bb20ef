"""What the experiments measure on pictures and captions, beside `engine.evaluate`'s retrieval and word F1."""

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.codecs.text import tokenize


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """‖μ_x − μ_y‖² + tr(Σ_x + Σ_y − 2·(Σ_x·Σ_y)^½) of features [n, d] and [m, d] (Heusel et al. 2017, 1706.08500).

    Depends on n: compare equal counts only. In float64; the trace of the root is that of the square roots of the
    eigenvalues of the symmetric Σ_x^½·Σ_y·Σ_x^½.
    """
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"count: {min(len(x), len(y))} pictures have no covariance; use 2 or more")
    x, y = x.double().cpu(), y.double().cpu()
    values, vectors = torch.linalg.eigh(x.T.cov())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # [d, d]
    common = torch.linalg.eigvalsh(root @ y.T.cov() @ root).clamp_min(0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * common
    return max(0.0, distance.item())


def features_of(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The network of a Python file with `load()`, as a function from pictures [B, 3, H, W] in −1..1 to [B, d].

    `load()` returns a module of pictures in 0..1; of several outputs the first counts. Raises ValueError if there is no
    such file or function.
    """
    spec = importlib.util.spec_from_file_location("given_features", path)
    if spec is None or not path.is_file():
        raise ValueError(f"--features: {path} is no Python file; give one with a function load()")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "load"):
        raise ValueError(f"--features: {path} has no function load(); give a file whose load() returns a network")
    network = module.load().to(device).eval()

    @torch.inference_mode()
    def features(pictures: Tensor) -> Tensor:
        parts = []
        for part in pictures.split(64):
            out = network((part.to(device) + 1) / 2)
            parts.append((out[0] if isinstance(out, tuple) else out).float().cpu())
        return torch.cat(parts)

    return features


def bleu4(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of up to 4 words, 0…1 (Papineni et al. 2002), without smoothing; several references a text."""
    found, possible, length, wanted = [0] * 4, [0] * 4, 0, 0
    for text, several in zip(texts, references, strict=True):
        words, others = tokenize(text), [tokenize(r) for r in several]
        length += len(words)
        wanted += min((len(o) for o in others), key=lambda n: (abs(n - len(words)), n))
        for n in range(1, 5):
            grams, most = _grams(words, n), Counter()
            for other in others:
                most |= _grams(other, n)
            found[n - 1] += (grams & most).total()
            possible[n - 1] += grams.total()
    if not all(found):
        return 0.0
    precision = sum(math.log(f / p) for f, p in zip(found, possible, strict=True)) / 4
    return math.exp(precision + min(0.0, 1 - wanted / length))


def _grams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def diversity(pictures: Tensor) -> float:
    """Mean root mean square difference of all pairs of pictures [k, 3, H, W] in −1..1, in levels 0…255."""
    flat = pictures.flatten(1).double()  # [k, 3·H·W]
    return torch.pdist(flat).mean().item() / flat.shape[1] ** 0.5 * 127.5
