"""From packed states to a caller's samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.codecs.codec import Codec, Decoded, Given
from engine.config import Modality
from engine.preparation import PreparedRequest
from engine.request import NotFiniteSamplesError, Result, Sample


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
    """For modalities that are generated before others: a function from final tokens to those its codec would encode."""
    return {name: partial(codecs[name].project, given=p.given[name]) for name in p.order}


def sample_of(seed: int, outputs: Mapping[str, Decoded]) -> Sample:
    """What was decoded of one sample, by modality, as a caller gets it."""
    words = [decoded for decoded in outputs.values() if isinstance(decoded.value, str)]
    confidence = sum(decoded.confidence for decoded in words) / len(words) if words else 1.0
    by_word = outputs["text"].part_confidence if "text" in outputs else ()
    return Sample({name: decoded.value for name, decoded in outputs.items()}, seed, confidence, by_word)


def results_of(
    prepared: Sequence[PreparedRequest], outputs: Sequence[Mapping[str, Decoded]], failed: Mapping[int, str]
) -> list[Result]:
    """One result of each request, from what was decoded of all samples in order.

    failed  reasons by a sample's position; raises NotFiniteSamplesError if there are any
    """
    owners = [(i, seed) for i, p in enumerate(prepared) for seed in p.seeds]
    samples: list[list[Sample]] = [[] for _ in prepared]
    for k, ((i, seed), output) in enumerate(zip(owners, outputs, strict=True)):
        if k not in failed:
            samples[i].append(sample_of(seed, output))
    results = [p.result(tuple(made)) for p, made in zip(prepared, samples, strict=True)]
    if failed:
        (i, seed), others = owners[min(failed)], len(failed) - 1
        more = f" ({others} other sample{'s' * (others > 1)} failed too)" if others else ""
        raise NotFiniteSamplesError(f"requests[{i}], seed {seed}: {failed[min(failed)]}{more}", results)
    return results
