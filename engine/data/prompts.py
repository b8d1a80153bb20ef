"""Prompts of a bulk run: the lines of a text file, or the captions of a MS-COCO annotation file. Imports no torch."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from engine.codecs.words import caption_words, tokenize
from engine.data.captions import with_lists
from engine.errors import InputError
from engine.files import unreadable

REMEDY = "give a text file of one prompt a line, or a captions_….json of MS-COCO"


@dataclass(frozen=True)
class Prompt:
    """A prompt and where it is from."""

    text: str
    image_id: str | None  # of a MS-COCO caption
    line: int  # of a text file, or number of the annotation, from 1


@dataclass(frozen=True)
class Prompts:
    items: tuple[Prompt, ...]  # at least one
    skipped: int  # captions of an annotation file that have no word
    drawn: bool  # whether a run draws them at random, as MS-COCO's captions, or takes them in order
    digest: str  # SHA-256 of the file

    def of_run(self, count: int, seed: int) -> list[Prompt]:
        """The prompts of samples 0 … count − 1: each once before any is taken again.

        Drawn at random without replacement, as for the FID of 30,000 captions: the order depends on the seed alone.
        """
        order = list(range(len(self.items)))
        if self.drawn:
            random.Random(seed).shuffle(order)
        return [self.items[order[i % len(order)]] for i in range(count)]


def read_prompts(file: Path) -> Prompts:
    """Reads a file, in UTF-8 or, for JSON, UTF-16: JSON if it starts with `{`, else lines; blank ones are left out.

    A lone `_` in a line is a word to be filled in; in a caption it is left out. Raises InputError about "prompts" for a
    file that cannot be read, holds no prompt, or has a line without a word.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise unreadable("prompts", file, error, REMEDY) from None
    if content.lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith((b"{", b"[")):
        return _captions(file, content)
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError("prompts", file, "save it as UTF-8", f"is not text in UTF-8 ({error.reason})") from None
    items = []
    for i, line in enumerate(lines, start=1):
        if line.strip() and not tokenize(line):
            raise InputError("prompts", line.strip(), "give words, or leave the line empty", f"(line {i}) has no word")
        if line.strip():
            items.append(Prompt(line.strip(), None, i))
    if not items:
        raise InputError("prompts", file, REMEDY, "holds no prompt")
    return Prompts(tuple(items), 0, drawn=False, digest=_digest(content))


def _captions(file: Path, content: bytes) -> Prompts:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError("prompts", file, REMEDY, f"is not readable JSON ({error})") from None
    annotations = with_lists(found, ("annotations",), "prompts", file, REMEDY)["annotations"]
    items = []
    for i, annotation in enumerate(annotations, start=1):
        entry = annotation if isinstance(annotation, dict) else {}
        caption, image_id = entry.get("caption"), entry.get("image_id")
        text = " ".join(caption.split()) if isinstance(caption, str) else ""
        if caption_words(text):
            items.append(Prompt(text, None if image_id is None else str(image_id), i))
    if not items:
        raise InputError("prompts", file, REMEDY, "holds no caption with a word")
    return Prompts(tuple(items), len(annotations) - len(items), drawn=True, digest=_digest(content))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
