"""From packed states to a caller's samples. Host only: the functions that the worker runs, and what becomes of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.codecs.codec import Codec, Decoded, Given
from engine.config import Modality
from engine.preparation import PreparedRequest
from engine.request import Sample


@dataclass(frozen=True)
class Decoder:
    """A modality's part of packed states [N], decoded; a function of one list, so that calls of several callers join.

    Takes pairs of a state and of what was given of its modality.
    """

    codec: Codec
    modality: Modality
    part: tuple[int, int]  # of the state

    def __call__(self, pairs: Sequence[tuple[Tensor, Given]]) -> list[Decoded]:
        states = torch.stack([state[slice(*self.part)] for state, _ in pairs])  # [B, L·C]
        tokens = states.unflatten(1, (self.modality.tokens, self.modality.channels))  # [B, L, C]
        return self.codec.decode(tokens, [given for _, given in pairs])


def on_arrival(p: PreparedRequest, codecs: Mapping[str, Codec]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Turns a modality that is generated before others into what its codec would encode, once it is done."""
    return {name: partial(codecs[name].project, given=p.given[name]) for name in p.order}


def sample_of(seed: int, outputs: Mapping[str, Decoded]) -> Sample:
    """What was decoded of one sample, by modality, as a caller gets it."""
    words = [decoded for decoded in outputs.values() if isinstance(decoded.value, str)]
    confidence = sum(decoded.confidence for decoded in words) / len(words) if words else 1.0
    by_word = outputs["text"].part_confidence if "text" in outputs else ()
    return Sample({name: decoded.value for name, decoded in outputs.items()}, seed, confidence, by_word)
