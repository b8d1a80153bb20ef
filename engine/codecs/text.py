"""Text codec: words to Word2Vec vectors [L, C] and back by nearest vector, as in arXiv 2311.16488.

A text is its words, then the end token "</s>" up to the last of the L tokens, so its length is part of what is
diffused. Independent of images, tasks and diffusion. gensim is imported when vectors are trained, never to encode or
decode.
"""

import difflib
import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.codecs.codec import Decoded, Given
from engine.codecs.word_vectors import spread, word2vec
from engine.codecs.words import END, HOLE, caption_words, tokenize
from engine.config import Modality
from engine.errors import InputError, shown
from engine.files import load_tensors, read_json, save_tensors, unreadable, write_atomically
from engine.request import NO_WORD

HOLE_INDEX = -1  # of a word to be filled in
NOISE = 0.5  # standard deviation per channel that confidences assume of a decoded vector
SUGGESTED_FOR = 5  # unknown words whose nearest known ones an error names: each takes a pass over the vocabulary


@dataclass(frozen=True, eq=False)
class TextCodec:
    """A vocabulary and its word vectors; see `engine.codecs.codec.Codec`."""

    vocabulary: tuple[str, ...]  # V distinct words; the first is "</s>"
    vectors: Tensor  # [V, C] float32, on the CPU
    tokens: int = 64  # L; longer texts are refused

    @property
    def channels(self) -> int:
        """C, channels of a token."""
        return self.vectors.shape[1]

    @classmethod
    def train(cls, captions: Iterable[str], channels: int, seed: int = 0) -> "TextCodec":
        """Word vectors of `channels` from captions: skip-gram (Mikolov et al., arXiv 1301.3781), then `spread`.

        One worker and a fixed hash (Python's differs between processes) make it the same bit for bit wherever the
        same versions of gensim, numpy and torch run. Raises InputError if the captions hold no word.
        """
        sentences = [[*caption_words(caption), END] for caption in captions]
        if all(sentence == [END] for sentence in sentences):
            problem = "captions without a single word"
            raise InputError("captions", len(sentences), "give captions with words", problem)
        vocabulary, vectors = word2vec(sentences, channels, seed)
        return cls(vocabulary, spread(vectors))

    @classmethod
    def load(cls, folder: str | Path, settings: Mapping, modality: Modality, device="cpu") -> "TextCodec":
        """The inverse of `save`; takes no settings, and stays on the CPU for any device.

        Raises InputError about "checkpoint", naming the file that is missing, corrupt or does not fit.
        """
        if settings:
            names = ", ".join(sorted(settings))
            raise InputError(f"codecs.{modality.name}", names, "leave it out", "is not a setting of the text codec")
        vocabulary, vectors = read_vocabulary(Path(folder))
        if vectors.shape[1] != modality.channels:
            problem = f"has word vectors of {vectors.shape[1]} channels, the model takes {modality.channels}"
            raise InputError("checkpoint", Path(folder), "copy the folder again", problem)
        if modality.categories not in (0, len(vectors)):
            problem = f"has {len(vectors)} word vectors, the model gives probabilities of {modality.categories}"
            raise InputError("checkpoint", Path(folder), "copy the folder again", problem)
        return cls(vocabulary, vectors, modality.tokens)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes `vocabulary.json` and `vectors.safetensors` into `folder`; vectors are float32 whatever the dtype."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        words = json.dumps(self.vocabulary, ensure_ascii=False, indent=0) + "\n"
        write_atomically(folder / "vocabulary.json", lambda path: path.write_text(words, encoding="utf-8"))
        save_tensors(folder / "vectors.safetensors", {"vectors": self.vectors})

    def build(self, compile: bool = False) -> None:
        """Does nothing: `load` has read everything."""

    def read(
        self,
        value: object,
        argument: str,
        mask=None,
        unknown_words: str = "error",
        feather: int = 0,
        mask_argument: str = "mask",
    ) -> Given:
        """The words of a text and its holes ("red _ car"); "" is known to be empty; see `Codec.read`."""
        assert unknown_words in ("error", "fill"), unknown_words
        if mask is not None:
            remedy = "put _ in the text where a word is to be filled in"
            raise InputError(mask_argument, mask, remedy, "cannot be the mask of a text")
        if value is None:
            return Given(torch.ones(self.tokens, self.channels, dtype=torch.bool), None)
        if not isinstance(value, str):
            raise InputError(argument, value, "give a string", "is not a string")
        words = _words(value, self.tokens, argument)
        if value and words[:1] == [END]:
            raise InputError(argument, value, NO_WORD, "has no word")
        unknown = [word for word in dict.fromkeys(words) if word != HOLE and word not in self.index]
        if unknown and unknown_words == "error":
            problem = f"{'is' if len(unknown) == 1 else 'are'} not in the vocabulary"
            raise InputError(argument, ", ".join(unknown), self._nearest_known(unknown), problem)
        indices = torch.tensor([self.index.get(word, HOLE_INDEX) for word in words])  # [L]
        return Given((indices == HOLE_INDEX)[:, None].repeat(1, self.channels), indices)

    def null(self) -> Given:
        """The empty text, all of it known."""
        return self.read("", "text")

    def encode(self, given: Sequence[Given]) -> Tensor:
        """Word vectors [B, L, C] float32, zeros in holes and where the whole text is to be generated."""
        whole = torch.full((self.tokens,), HOLE_INDEX)
        indices = torch.stack([whole if one.content is None else one.content for one in given])  # [B, L]
        return self.vectors[indices.clamp_min(0)].masked_fill((indices == HOLE_INDEX)[..., None], 0)  # [B, L, C]

    def decode(self, tokens: Tensor, given: Sequence[Given]) -> list[Decoded]:
        """Texts nearest to tokens [B, L, C] of any dtype and device; each ends at its first "</s>".

        "</s>" is not read in a hole, else the known words behind it could be lost. A word's confidence is its
        posterior, were every word equally likely beforehand and the token a word vector plus N(0, 0.5²) noise: softmax
        over words of −‖x − v‖² / (2·0.5²). A text's is the mean over its words, 1 without any.
        """
        none = torch.zeros(self.tokens, dtype=torch.bool)
        holes = torch.stack([none if one.content is None else one.content.eq(HOLE_INDEX) for one in given])  # [B, L]
        confidence, index = self._nearest(tokens.detach().float().cpu(), holes)  # [B, L], [B, L]
        return [self._text(*row) for row in zip(index.tolist(), confidence.tolist(), strict=True)]

    def project(self, tokens: Tensor, given: Given) -> Tensor:
        """The vectors of the words that tokens [n, L, C] are decoded as, and "</s>" behind a text's end; same shape."""
        none = torch.zeros(self.tokens, dtype=torch.bool)
        holes = none if given.content is None else given.content.eq(HOLE_INDEX)
        _, index = self._nearest(tokens.float().cpu(), holes.expand(len(tokens), -1))  # [n, L]
        if given.content is None:
            index = index.masked_fill((index == 0).cumsum(1) > 0, 0)
        return self.vectors[index].to(tokens)

    def indices(self, captions: Iterable[str], tokens: int) -> Tensor:
        """Rows of `vectors`, int32 [n, L], that captions (at least one) without holes are encoded as.

        Raises InputError about "captions" for a word outside the vocabulary and beyond L words.
        """
        rows = array("i")
        for caption in captions:
            try:
                rows.fromlist([self.index[word] for word in _words(caption, tokens, "captions")])
            except KeyError as error:
                word, remedy = error.args[0], "give captions of its words"
                raise InputError("captions", word, remedy, "is not in the vocabulary") from None
        return torch.frombuffer(rows, dtype=torch.int32).reshape(-1, tokens)  # [n, L]

    @cached_property
    def index(self) -> dict[str, int]:
        """The row of each word's vector."""
        return {word: i for i, word in enumerate(self.vocabulary)}

    def _nearest(self, tokens: Tensor, holes: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence and index [B, L] of each token's nearest word, which in holes [B, L] is not "</s>"."""
        nearest = []
        parts = zip(tokens.flatten(0, 1).split(1024), holes.flatten().split(1024), strict=True)
        for x, hole in parts:  # [n, C], [n]; bounds memory to n·V
            # ‖x‖² is the same for all words and drops out of the softmax.
            logits = (x @ self.vectors.T - self.vectors.square().sum(1) / 2) / NOISE**2  # [n, V]
            logits[hole, 0] = -torch.inf
            nearest.append(torch.stack(logits.softmax(1).max(1)))
        confidence, index = torch.cat(nearest, dim=1).unflatten(1, tokens.shape[:2])
        return confidence, index.long()

    def _text(self, indices: list[int], confidence: list[float]) -> Decoded:
        length = indices.index(0) if 0 in indices else len(indices)
        words = [self.vocabulary[i] for i in indices[:length]]
        if not all(map(math.isfinite, confidence)):  # the softmax of tokens that are not, or that overflow
            return Decoded(None)
        mean = sum(confidence[:length]) / length if length else 1.0
        return Decoded(" ".join(words), mean, tuple(confidence[:length]))

    def _nearest_known(self, unknown: list[str]) -> str:
        """What to do about words outside the vocabulary, with the nearest known ones."""
        near = {word: difflib.get_close_matches(word, self.vocabulary[1:], n=3) for word in unknown[:SUGGESTED_FOR]}
        named = "; ".join(f"{shown(word)} (near: {', '.join(words)})" for word, words in near.items() if words)
        known = f"use known words in place of {named}" if named else "use known words"
        return f"{known}, or have unknown ones filled in (unknown_words=fill, --unknown-words fill)"


def _words(text: str, tokens: int, argument: str) -> list[str]:
    """Words and holes of a text, then "</s>" up to L."""
    words = tokenize(text)
    if len(words) > tokens:
        raise InputError(argument, text, f"use at most {tokens}", f"has {len(words)} words")
    return words + [END] * (tokens - len(words))


def read_vocabulary(folder: Path) -> tuple[tuple[str, ...], Tensor]:
    """The two files of a codec, checked: words and their vectors [V, C]."""
    words_file, vectors_file = folder / "vocabulary.json", folder / "vectors.safetensors"
    remedy = "restore the checkpoint"
    vocabulary = read_json(words_file, "checkpoint", absent=remedy, damaged=remedy)
    is_list = isinstance(vocabulary, list) and all(isinstance(word, str) for word in vocabulary)
    if not is_list or vocabulary[:1] != [END] or len(set(vocabulary)) != len(vocabulary):
        problem = f"is not a list of distinct words that starts with {END!r}"
        raise InputError("checkpoint", words_file, remedy, problem)
    try:
        vectors = load_tensors(vectors_file)[0].get("vectors", torch.empty(0))
    except OSError as error:
        raise unreadable("checkpoint", vectors_file, error, remedy) from None
    except SafetensorError as error:
        raise InputError("checkpoint", vectors_file, remedy, f"is damaged or truncated ({error})") from None
    fits = vectors.dtype == torch.float32 and vectors.ndim == 2
    if not fits or len(vectors) != len(vocabulary) or not vectors.isfinite().all():
        words = f"each of the {len(vocabulary)} words of {words_file.name}"
        problem = f"does not hold one finite float32 vector for {words}"
        raise InputError("checkpoint", vectors_file, remedy, problem)
    return tuple(vocabulary), vectors


def token_weights(indices: Tensor) -> Tensor:
    """How much each token of captions [n, L] (rows of `vectors`) counts in training so that all captions count alike.

    A plain mean over the tokens is dominated by the "</s>" that pad a short caption: of the 16 tokens of "ghost" only
    one is a word. So a caption's words and its first "</s>" count alike, and the further ones, which `decode` never
    reads, as one of them together. Each row of the result [n, L] float32 sums to L.
    """
    words = (indices != 0).sum(1, keepdim=True)  # [n, 1]
    tokens = indices.shape[1]
    further = tokens - words - 1  # [n, 1], negative where the caption fills all tokens
    weights = torch.where(torch.arange(tokens) <= words, 1.0, 1 / further.clamp_min(1))  # [n, L]
    return weights * (tokens / weights.sum(1, keepdim=True))
