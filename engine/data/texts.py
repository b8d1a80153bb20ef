"""Data sets of texts alone: `write_texts` makes one, `Texts` reads it.

    folder/captions.json         the texts to train on, in MS-COCO captions layout
    folder/captions_test.json    those held out

Texts made of MS-COCO's captions keep the file names of their images: with these in folder/images, the same folder is a
data set of images with long texts.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.codecs.words import caption_words
from engine.data.captions import parse_captions, with_lists
from engine.errors import InputError, errors_named
from engine.files import is_file, read_json, unreadable, write_atomically

REMEDY = "give a text file in UTF-8 with one text a line, or a captions_….json of MS-COCO"
RESTORE = "write it again with `python -m engine.data text`"
MAX_WORDS = 1024  # of a text


@dataclass(frozen=True)
class Texts:
    """The texts of a folder: every caption of a captions file, whatever images it lists."""

    texts: tuple[str, ...]  # at least one

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> "Texts":
        """Reads `captions_SPLIT.json`, for "train" also `captions.json`; InputError about `folder` without a text."""
        names = [f"captions_{split}.json"] + (["captions.json"] if split == "train" else [])
        files = [file for name in names if is_file(file := Path(folder) / name, "folder")]
        if not files:
            remedy = "give a folder that `python -m engine.data text` has written"
            raise InputError("folder", folder, remedy, f"has no {' or '.join(names)}")
        content = read_json(files[0], "folder", absent=RESTORE, damaged=RESTORE)
        annotations = with_lists(content, ("annotations",), "folder", files[0], RESTORE)["annotations"]
        captions = [entry.get("caption") for entry in annotations if isinstance(entry, dict)]
        texts = tuple(text for text in captions if isinstance(text, str) and caption_words(text))
        if not texts:
            raise InputError("folder", files[0], RESTORE, "holds no text with a word")
        return cls(texts)

    def summary(self) -> str:
        """One line for a log."""
        return f"{len(self.texts)} texts"

    def record(self) -> dict[str, list]:
        """What a run is made from, in the form of `engine.data.record.record_of`."""
        return {"texts": [len(self.texts), 0, hashlib.sha256(json.dumps(self.texts).encode()).hexdigest(), ""]}


def write_texts(source: Path, out: Path, words: int = 64, captions: int = 5, held_out: float = 0.05) -> dict[str, int]:
    """Writes the data set of a text file, one text a line, or of a .json file of MS-COCO captions.

    Texts are lower-case words separated by spaces, as the text codec reads them. Those without a word are left out,
    and longer ones are cut.

    source    the first `captions` captions of each image of a .json file make one text
    words     of a text at most
    held_out  fraction of the texts, chosen by a hash of the image's id, of a line by one of its words: equal lines stay
              together
    Returns the numbers of texts by what became of them: training, test; cut, empty. Raises InputError about "from",
    "words", "captions", "held_out"; OSError if `out` cannot be written.
    """
    for name, value, highest in (("words", words, MAX_WORDS), ("captions", captions, MAX_WORDS)):
        if not 1 <= value <= highest:
            raise InputError(name, value, f"use 1 to {highest}", "is out of range")
    if not 0 <= held_out < 1:  # also NaN
        raise InputError("held_out", held_out, "use a fraction from 0 up to, but not, 1", "is out of range")
    counts = dict.fromkeys(("training", "test", "cut", "empty"), 0)
    splits: dict[str, tuple[list, list]] = {"training": ([], []), "test": ([], [])}  # images and annotations
    is_json = source.suffix.lower() == ".json"
    for image, text in _of_coco(source, captions) if is_json else _of_lines(source):
        found = caption_words(text)
        counts["cut"] += len(found) > words
        if not found:
            counts["empty"] += 1
            continue
        text = " ".join(found[:words])
        split = "test" if _fraction(image["id"] if is_json else text) < held_out else "training"
        counts[split] += 1
        images, annotations = splits[split]
        images.append(image)
        annotations.append({"image_id": image["id"], "caption": text})
    if not counts["training"]:
        raise InputError("from", source, REMEDY, "holds no text to train on")
    out.mkdir(parents=True, exist_ok=True)
    for split, name in (("test", "captions_test.json"), ("training", "captions.json")):
        content = json.dumps(dict(zip(("images", "annotations"), splits[split], strict=True)), ensure_ascii=False)
        if counts[split]:
            write_atomically(out / name, lambda path, c=content: path.write_text(c + "\n", encoding="utf-8"))
        else:
            (out / name).unlink(missing_ok=True)  # of an earlier call
    return counts


def _of_lines(file: Path) -> Iterator[tuple[dict, str]]:
    """Lines with their numbers, from 1, as ids. Read one by one: files may be large."""
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield {"id": number}, line.decode()
                except UnicodeDecodeError as error:
                    problem = f"is not text in UTF-8 (line {number}: {error.reason})"
                    raise InputError("from", file, REMEDY, problem) from None
    except OSError as error:
        raise unreadable("from", file, error, REMEDY) from None


def _of_coco(file: Path, count: int) -> Iterator[tuple[dict, str]]:
    """The images of a captions file, and the first `count` captions of each, joined."""
    with errors_named("from"):
        names, captions, _ = parse_captions(file)
    for image_id, of_image in captions.items():
        if of_image:
            yield {"id": image_id, "file_name": names[image_id][0]}, " ".join(of_image[:count])


def _fraction(key: object) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(str(key).encode()).digest()[:4], "big") / 2**32
