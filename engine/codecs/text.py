"""Text codec: words to Word2Vec vectors [L, C] and back by nearest vector, as in arXiv 2311.16488.

A text is its words, then the end token "</s>" up to the last of the L tokens, so its length is part of what is
diffused. Knows nothing of pictures, masks of tasks or diffusion. gensim is imported when vectors are trained, never to
encode or decode.
"""

import difflib
import json
import math
import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

END = "</s>"  # index 0 of every vocabulary; `tokenize` never yields it
HOLE = "_"  # a word to be filled in
NOISE = 0.5  # standard deviation per channel that confidences assume of a decoded vector

# Letters and digits with inner hyphens and apostrophes, or underscores that touch no word.
TOKEN = re.compile(r"[^\W_]+(?:['-][^\W_]+)*|(?<!\w)_+(?!\w)")


class UnknownWordError(ValueError):
    """Words outside the vocabulary; the message names them and the nearest known words."""


class CodecFileError(ValueError):
    """A codec file that is missing, corrupt or does not fit the others; the message names it."""


def tokenize(caption: str) -> list[str]:
    """Lower-case words of `caption`; punctuation is dropped, and a lone "_" (or "__" …) is a hole, given as "_"."""
    text = unicodedata.normalize("NFC", caption).lower().replace("’", "'")
    return [HOLE if token[0] == HOLE else token for token in TOKEN.findall(text)]


@dataclass(frozen=True)
class Decoded:
    """A decoded text: its words joined by blanks, and how sure the decoding is."""

    text: str
    confidence: float  # mean of word_confidence; 1.0 for the empty text, which has no word to be wrong about
    word_confidence: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class TextCodec:
    """A vocabulary and its word vectors."""

    vocabulary: tuple[str, ...]  # V distinct words; the first is "</s>"
    vectors: torch.Tensor  # [V, C] float32, on the CPU

    @classmethod
    def train(cls, captions: Iterable[str], channels: int, seed: int = 0) -> "TextCodec":
        """Word vectors of `channels` from captions: skip-gram (Mikolov et al., arXiv 1301.3781), then `spread`.

        One worker and a hash of our own (Python's differs between processes) make it the same bit for bit wherever the
        same versions of gensim, numpy and torch run. Raises ValueError if the captions hold no word.
        """
        from gensim.models import Word2Vec

        sentences = [[word for word in tokenize(caption) if word != HOLE] + [END] for caption in captions]
        words = sum(len(sentence) for sentence in sentences)
        if words == len(sentences):
            raise ValueError(f"captions: {len(sentences)} captions without a single word; give captions with words")
        model = Word2Vec(
            sentences,
            vector_size=channels,
            sg=1,
            min_count=1,
            epochs=min(100, max(5, math.ceil(3_000_000 / words))),  # small sets need more passes to settle
            seed=seed,
            workers=1,
            hashfxn=lambda word: zlib.crc32(word.encode()),
        )
        vocabulary = (END, *(word for word in model.wv.index_to_key if word != END))
        vectors = torch.from_numpy(model.wv[vocabulary])  # [V, C]
        return cls(vocabulary, spread(vectors))

    def encode(self, caption: str | None, tokens: int, unknown: str = "error") -> tuple[torch.Tensor, torch.Tensor]:
        """Diffusion state of a caption, and which of it is to be generated.

        caption   words and holes ("red _ car"); "" is known to be empty; None is wholly unknown
        tokens    L, length of the state
        unknown   "error": words outside the vocabulary raise UnknownWordError; "fill": they become holes
        Returns values [L, C] float32 (zero in holes) and generate [L] bool. Raises ValueError beyond L words.
        """
        assert unknown in ("error", "fill"), unknown
        if caption is None:
            return torch.zeros(tokens, self.vectors.shape[1]), torch.ones(tokens, dtype=torch.bool)
        words = _words(caption, tokens)
        strange = [word for word in dict.fromkeys(words) if word != HOLE and word not in self.index]
        if strange and unknown == "error":
            raise UnknownWordError(self._describe(strange))

        generate = torch.tensor([word not in self.index for word in words])  # [L]
        indices = torch.tensor([self.index.get(word, 0) for word in words])  # [L]
        values = self.vectors[indices]  # [L, C]
        return values.masked_fill(generate[:, None], 0), generate

    def indices(self, captions: Iterable[str], tokens: int) -> torch.Tensor:
        """Rows of `vectors`, int32 [n, L], that captions (at least one) without holes are encoded as.

        Raises UnknownWordError for a word outside the vocabulary, ValueError beyond L words.
        """
        rows = array("i")
        for caption in captions:
            try:
                rows.fromlist([self.index[word] for word in _words(caption, tokens)])
            except KeyError as error:
                raise UnknownWordError(
                    f"captions: {error} is not in the vocabulary; give captions of its words"
                ) from None
        return torch.frombuffer(rows, dtype=torch.int32).reshape(-1, tokens)  # [n, L]

    def decode(self, values: torch.Tensor, holes: torch.Tensor | None = None) -> list[Decoded]:
        """Texts nearest to diffusion states [B, L, C] of any dtype and device; each ends at its first "</s>".

        holes     [L] bool, where a word was asked for: "</s>" is not read there, else the known words behind a hole
                  could be lost; None: nowhere
        A word's confidence is its posterior, were every word equally likely beforehand and the state a word vector plus
        N(0, 0.5²) noise: softmax over words of −‖x − v‖² / (2·0.5²).
        """
        if holes is None:
            holes = torch.zeros(values.shape[1], dtype=torch.bool)
        confidence, index = self._nearest(values.detach().float().cpu(), holes)  # [B, L], [B, L]
        return [self._read(*row) for row in zip(index.tolist(), confidence.tolist(), strict=True)]

    def save(self, folder: str | Path) -> None:
        """Write `vocabulary.json` and `vectors.safetensors` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocabulary.json").write_text(
            json.dumps(self.vocabulary, ensure_ascii=False, indent=0) + "\n", encoding="utf-8"
        )
        save_file({"vectors": self.vectors.contiguous()}, folder / "vectors.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> "TextCodec":
        """The inverse of `save`; raises CodecFileError naming the file that is missing, corrupt or does not fit."""
        words_file, vectors_file = Path(folder) / "vocabulary.json", Path(folder) / "vectors.safetensors"
        try:
            vocabulary = json.loads(words_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CodecFileError(f"{words_file}: cannot be read ({error}); restore the checkpoint") from None
        is_list = isinstance(vocabulary, list) and all(isinstance(word, str) for word in vocabulary)
        if not is_list or vocabulary[:1] != [END] or len(set(vocabulary)) != len(vocabulary):
            raise CodecFileError(
                f"{words_file}: is not a list of distinct words that starts with {END!r}; restore the checkpoint"
            )
        try:
            vectors = load_file(vectors_file).get("vectors")
        except (OSError, SafetensorError) as error:
            raise CodecFileError(f"{vectors_file}: cannot be read ({error}); restore the checkpoint") from None
        fits = vectors is not None and vectors.dtype == torch.float32 and vectors.ndim == 2
        if not fits or len(vectors) != len(vocabulary) or not vectors.isfinite().all():
            raise CodecFileError(
                f"{vectors_file}: does not hold one finite float32 vector for each of the {len(vocabulary)} words of "
                f"{words_file.name}; restore the checkpoint"
            )
        return cls(tuple(vocabulary), vectors)

    @cached_property
    def index(self) -> dict[str, int]:
        """The row of each word's vector."""
        return {word: i for i, word in enumerate(self.vocabulary)}

    def _nearest(self, values: torch.Tensor, holes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Confidence and index [B, L] of each token's nearest word, which in holes [L] is not "</s>"."""
        nearest = []
        parts = zip(values.flatten(0, 1).split(1024), holes.repeat(len(values)).split(1024), strict=True)
        for x, hole in parts:  # [n, C], [n]; bounds memory to n·V
            # ‖x‖² is the same for all words and drops out of the softmax.
            logits = (x @ self.vectors.T - self.vectors.square().sum(1) / 2) / NOISE**2  # [n, V]
            logits[hole, 0] = -torch.inf
            nearest.append(torch.stack(logits.softmax(1).max(1)))
        confidence, index = torch.cat(nearest, dim=1).unflatten(1, values.shape[:2])
        return confidence, index.long()

    def _read(self, indices: list[int], confidence: list[float]) -> Decoded:
        length = indices.index(0) if 0 in indices else len(indices)
        words = [self.vocabulary[i] for i in indices[:length]]
        mean = sum(confidence[:length]) / length if length else 1.0
        return Decoded(" ".join(words), mean, tuple(confidence[:length]))

    def _describe(self, strange: list[str]) -> str:
        known = self.vocabulary[1:]
        near = {word: difflib.get_close_matches(word, known, n=3) for word in strange}
        named = [f"{word!r}" + (f" (near: {', '.join(near[word])})" if near[word] else "") for word in strange]
        return f"prompt: unknown words {', '.join(named)}; use known ones, or let them be filled (--unknown-words fill)"


def _words(caption: str, tokens: int) -> list[str]:
    """Words and holes of a caption, then "</s>" up to L."""
    words = tokenize(caption)
    if len(words) > tokens:
        raise ValueError(f"prompt: {caption!r} has {len(words)} words; use at most {tokens}")
    return words + [END] * (tokens - len(words))


def token_weights(indices: torch.Tensor) -> torch.Tensor:
    """How much each token of captions [n, L] (rows of `vectors`) counts in training so that all captions count alike.

    A plain mean over the tokens is one over the "</s>" that fill a short caption up: of the 16 tokens of "ghost" only
    one is the ghost. So a caption's words and its first "</s>" count alike, and the further ones, which `decode` never
    reads, as one of them together. Each row of the result [n, L] float32 sums to L.
    """
    words = (indices != 0).sum(1, keepdim=True)  # [n, 1]
    tokens = indices.shape[1]
    further = tokens - words - 1  # [n, 1], negative where the caption fills all tokens
    weights = torch.where(torch.arange(tokens) <= words, 1.0, 1 / further.clamp_min(1))  # [n, L]
    return weights * (tokens / weights.sum(1, keepdim=True))


def spread(vectors: torch.Tensor, ridge: float = 1e-3) -> torch.Tensor:
    """Word vectors [V, C] made fit for diffusion: near unit variance per channel, and no two words too close.

    Word2Vec's vectors share a large common part and few strong directions, which carry frequency, not meaning. Their
    mean is removed (Mu & Viswanath 2018, "All-but-the-Top"), and the rest is whitened (ZCA: the whitening that turns
    vectors least), with a ridge relative to the mean eigenvalue. Words of like use ("girl", "boy") then still lie too
    close for nearest-vector decoding, so `separate` parts them. Returns float32 [V, C].
    """
    x = vectors.double()
    x = x - x.mean(0)  # [V, C]
    eigenvalues, u = torch.linalg.eigh(x.T @ x / len(x))  # [C], [C, C]
    x = x @ (u / (eigenvalues + ridge * eigenvalues.mean()).sqrt()) @ u.T  # [V, C]
    return separate(x)


def separate(x: torch.Tensor, least: float = 0.5, steps: int = 100) -> torch.Tensor:
    """Scale vectors [V, C] to norm √C, that of unit Gaussian noise, and push them to least·√C from their nearest.

    Stops after `steps` rounds where so many vectors do not fit into so few channels. Returns float32 [V, C].
    """
    radius = math.sqrt(x.shape[1])
    x = torch.nn.functional.normalize(x.float()) * radius  # [V, C]
    for _ in range(steps):
        nearest = [(part @ x.T).topk(2).indices[:, 1] for part in x.split(1024)]  # beside itself; bounds memory
        apart = x - x[torch.cat(nearest)]  # [V, C]
        distance = apart.norm(dim=1, keepdim=True).clamp_min(1e-6)  # [V, 1]
        if (distance >= least * radius).all():
            break
        # Both of a mutual pair move, each the half way, and 5 % further so that the rounds end.
        push = (1.05 * least * radius / distance - 1).clamp_min(0) / 2
        x = torch.nn.functional.normalize(x + push * apart) * radius
    return x
