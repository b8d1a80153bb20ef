"""Metrics of images and captions that the experiments use beside `engine.evaluate`'s retrieval and word F1."""

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.codecs.words import tokenize
from engine.errors import InputError


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """‖μ_x − μ_y‖² + tr(Σ_x + Σ_y − 2·(Σ_x·Σ_y)^½) of features [n, d] and [m, d] (Heusel et al. 2017, 1706.08500).

    Depends on n: compare equal counts only. In float64; the trace of the root is that of the square roots of the
    eigenvalues of the symmetric Σ_x^½·Σ_y·Σ_x^½. Raises InputError about "count" for fewer than 2 images.
    """
    if len(x) < 2 or len(y) < 2:
        raise InputError("count", min(len(x), len(y)), "use 2 or more", "is too few images for a covariance")
    x, y = x.double().cpu(), y.double().cpu()
    values, vectors = torch.linalg.eigh(x.T.cov())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # [d, d]
    common = torch.linalg.eigvalsh(root @ y.T.cov() @ root).clamp_min(0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * common
    return max(0.0, distance.item())


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


def bleu4(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 without smoothing, 0…1, each text with one or more references (Papineni et al. 2002)."""
    matches, totals = [0] * 4, [0] * 4  # n-grams, by n − 1
    length = reference_length = 0
    for text, references_of_text in zip(texts, references, strict=True):
        words, others = tokenize(text), [tokenize(r) for r in references_of_text]
        length += len(words)
        reference_length += min((len(o) for o in others), key=lambda n: (abs(n - len(words)), n))
        for n in range(1, 5):
            grams, allowed = _grams(words, n), Counter()
            for other in others:
                allowed |= _grams(other, n)
            matches[n - 1] += (grams & allowed).total()
            totals[n - 1] += grams.total()
    if not all(matches):
        return 0.0
    precision = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4
    return math.exp(precision + min(0.0, 1 - reference_length / length))  # with the brevity penalty


def _grams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def diversity(images: Tensor) -> float:
    """Mean root mean square difference of all pairs of images [k, 3, H, W] in −1..1, in levels 0…255."""
    flat = images.flatten(1).double()  # [k, 3·H·W]
    return torch.pdist(flat).mean().item() / flat.shape[1] ** 0.5 * 127.5
