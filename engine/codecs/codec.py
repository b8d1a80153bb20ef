"""Codecs: a modality's values to tokens and back. The methods that every codec has, and their registry.

A new kind of modality is a class with the methods of `Codec` and a line in `CODECS`. Codecs are independent of
diffusion and tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.config import CodecConfig, Modality
from engine.errors import InputError
from engine.files import is_folder


@dataclass(frozen=True, eq=False)
class Given:
    """What a request says of one modality: read and checked, not yet encoded."""

    generate: Tensor  # [L, C] bool, True where the engine must produce a value
    content: Any  # the codec's own; None where all is to be generated


@dataclass(frozen=True)
class Decoded:
    """One sample's value of a modality."""

    value: Any  # a PIL image, a string, …; None where it is NaN or infinite
    confidence: float = 1.0  # how sure the decoding is
    part_confidence: tuple[float, ...] = ()  # of each part, such as a word


class Codec(Protocol):
    """Reads, encodes and decodes the values of one modality.

    `read` runs in the caller's thread and must not call PyTorch operations that run in parallel: two teams of OpenMP
    threads on the same cores slow each other many times over. `encode` and `decode` run on the engine's worker thread.
    """

    @property
    def tokens(self) -> int:
        """L."""
        ...

    @property
    def channels(self) -> int:
        """C."""
        ...

    @classmethod
    def load(cls, folder: Path, settings: Mapping, modality: Modality, device: torch.device | str) -> "Codec":
        """A codec of a checkpoint. Cheap: what is slow to load waits for `build`.

        settings  of the modality's `CodecConfig`
        modality  whose tokens and channels the codec must have
        Raises InputError: about "checkpoint" with a file's path, or about a setting.
        """

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes what `load` reads; weights of networks, if any, in `dtype`."""

    def build(self, compile: bool = False) -> None:
        """Loads what `load` left out. Further calls do nothing; several threads may call it.

        compile  on a CPU, first compiles what can be and is not compiled yet, for later processes too
        Raises InputError about "checkpoint" with the path of a damaged file.
        """

    def read(
        self,
        value: object,
        argument: str,
        mask: object = None,
        unknown_words: str = "error",
        feather: int = 0,
        mask_argument: str = "mask",
    ) -> Given:
        """Checks and reads a user's value.

        value          None: all of it is to be generated
        argument       name of the value in errors, `mask_argument` that of the mask
        mask           which part of the value is to be generated; None: none
        unknown_words  of text: "error", or "fill" to generate words outside the vocabulary
        feather        of images: pixels over which the generated region blends into the known one
        Raises InputError about one of the two arguments.
        """

    def encode(self, given: Sequence[Given]) -> Tensor:
        """The known tokens [B, L, C] float32 on the CPU; zeros where they are to be generated."""

    def decode(self, tokens: Tensor, given: Sequence[Given]) -> list[Decoded]:
        """Values of samples' tokens [B, L, C], any dtype and device; `given` is what was known of each.

        All are decoded at once: callers bound B by the memory there is.
        """

    def project(self, tokens: Tensor, given: Given) -> Tensor:
        """Generated tokens [n, L, C] replaced by the encoding of what they decode to; same shape and device.

        Modalities that are generated later are conditioned on these. A codec of discrete values, such as words, returns
        the tokens of the nearest values, since the model was trained on no others.
        """

    def null(self) -> Given:
        """What "empty" guidance uses in place of the value: the empty text, a mid-grey image."""


CODECS: dict[str, str] = {  # imported when first used
    "image": "engine.codecs.image:ImageCodec",
    "text": "engine.codecs.text:TextCodec",
}


def codec_class(kind: str) -> type[Codec]:
    """The class registered for a kind; raises InputError for a kind that is not."""
    if kind not in CODECS:
        raise InputError("kind", kind, f"use one of {', '.join(CODECS)}", "is not a known codec")
    module, _, name = CODECS[kind].partition(":")
    return getattr(import_module(module), name)


def codec_folder(checkpoint: Path, config: CodecConfig, name: str) -> Path:
    """Where the codec of the modality `name` has its files in a checkpoint folder."""
    return checkpoint / (config.folder or name)


def load_codec(checkpoint: Path, config: CodecConfig, modality: Modality, device: torch.device | str = "cpu") -> Codec:
    """The codec of one modality of a checkpoint folder; raises InputError, naming the file or the setting."""
    folder = codec_folder(checkpoint, config, modality.name)
    kind = codec_class(config.kind)
    if not is_folder(folder, "checkpoint"):
        raise InputError("checkpoint", folder, "copy the checkpoint again", "is not a folder")
    return kind.load(folder, config.settings, modality, device)
