"""Vectors of words that diffusion can work with: Word2Vec's, spread over the space and separated from each other."""

import math
import zlib

import torch
from torch import Tensor
from tqdm import tqdm

from engine.codecs.words import END

PRODUCTS = 1 << 23  # of word vectors that are in memory at a time


def word2vec(sentences: list[list[str]], channels: int, seed: int) -> tuple[tuple[str, ...], Tensor]:
    """The words of sentences that end with "</s>", that first, and Word2Vec's vectors [V, C]."""
    from gensim.models import Word2Vec
    from gensim.models.callbacks import CallbackAny2Vec

    class Progress(CallbackAny2Vec):
        def on_epoch_end(self, model: Word2Vec) -> None:
            bar.update()

    # Small sets need more passes to settle.
    epochs = min(100, max(5, math.ceil(3_000_000 / sum(len(sentence) for sentence in sentences))))
    with tqdm(total=epochs, desc="word vectors", unit="epoch", disable=None) as bar:
        model = Word2Vec(
            sentences,
            vector_size=channels,
            sg=1,
            min_count=1,
            epochs=epochs,
            seed=seed,
            workers=1,
            hashfxn=lambda word: zlib.crc32(word.encode()),
            callbacks=[Progress()],
        )
    vocabulary = (END, *(word for word in model.wv.index_to_key if word != END))
    return vocabulary, torch.from_numpy(model.wv[vocabulary])


def spread(vectors: Tensor, ridge: float = 1e-3) -> Tensor:
    """Word vectors [V, C] made fit for diffusion: near unit variance per channel, and no two words too close.

    Word2Vec's vectors share a large common part and few strong directions, which carry frequency, not meaning. Their
    mean is removed (Mu & Viswanath 2018, "All-but-the-Top"), and the rest is whitened (ZCA: the whitening that turns
    vectors least), with a ridge relative to the mean eigenvalue. Words of like use ("girl", "boy") then still lie too
    close for nearest-vector decoding, so `separate` moves them apart. Returns float32 [V, C].
    """
    x = vectors.double()
    x = x - x.mean(0)  # [V, C]
    eigenvalues, u = torch.linalg.eigh(x.T @ x / len(x))  # [C], [C, C]
    x = x @ (u / (eigenvalues + ridge * eigenvalues.mean()).sqrt()) @ u.T  # [V, C]
    return separate(x)


def separate(x: Tensor, least: float = 0.5, steps: int = 100) -> Tensor:
    """Scale vectors [V, C] to norm √C, that of unit Gaussian noise, and push them to least·√C from their nearest.

    Stops after `steps` rounds: many vectors do not fit into few channels. Returns float32 [V, C].
    """
    radius = math.sqrt(x.shape[1])
    aim = 1.05 * least * radius  # 5 % further than needed, so that fewer rounds are needed
    reach = 1.001 * aim  # with a margin for rounding
    x = torch.nn.functional.normalize(x.float()) * radius  # [V, C]
    room = torch.zeros(len(x))  # [V], at most the distance to the nearest vector
    with tqdm(desc="separating words", unit="word", disable=None) as bar:
        for step in range(steps):
            # Most are far from all others: their distances are measured again only once vectors have moved that far.
            rows = (room < reach).nonzero()[:, 0]  # [n]
            bar.reset(len(rows))
            bar.set_postfix_str(f"round {step + 1}")
            room[rows], nearest = _nearest_others(x, rows, reach, bar)
            rows, nearest = rows[room[rows] < reach], nearest[room[rows] < reach]  # [m]
            apart = x[rows] - x[nearest]  # [m, C]
            distance = apart.norm(dim=1, keepdim=True).clamp_min(1e-6)  # [m, 1]
            if (distance >= least * radius).all():
                break
            # Both of a mutual pair move, each the half way.
            moved = x.clone()
            moved[rows] += (aim / distance - 1).clamp_min(0) / 2 * apart
            moved = torch.nn.functional.normalize(moved) * radius
            path = (moved - x).norm(dim=1)  # [V]
            room -= path + path.max()
            x = moved
    return x


def _nearest_others(x: Tensor, rows: Tensor, reach: float, bar: tqdm) -> tuple[Tensor, Tensor]:
    """Distance and index [n] of the vector nearest to each of x[rows], all of one norm; the index is 0 beyond reach."""
    radius_squared = x.shape[1]
    distances, indices = [], []
    for part in rows.split(max(1, PRODUCTS // len(x))):
        products = x[part] @ x.T  # [n, V]
        products[torch.arange(len(part)), part] = -torch.inf
        distance = (2 * (radius_squared - products.amax(1))).clamp_min(0).sqrt()  # [n]
        close = distance < reach  # for the others, no index is needed: amax is much faster than argmax
        index = torch.zeros_like(part)
        index[close] = products[close].argmax(1)
        distances.append(distance)
        indices.append(index)
        bar.update(len(part))
    return torch.cat(distances), torch.cat(indices)
