"""Reads data sets in tar files, the layout of WebDataset; `engine.sample --shards` writes such files too.

    00000.tar    000000.jpg 000000.txt 000001.png 000001.json …

The files of a sample have one name up to its first dot. Captions are the lines of its .txt or, without that, "caption"
or "captions" of its .json. Here tar files are listed and captions read; an image is read from its place in the tar file
when it is needed. Nothing is unpacked, and files of other kinds are not read, so nothing is unpickled.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engine.data.captioned import CaptionedImage, CaptionedImages, Member, leaves_folder
from engine.errors import InputError
from engine.files import is_file, is_folder, unreadable

IMAGES, CAPTIONS = ("jpg", "jpeg", "png", "webp"), ("txt", "json")
LONGEST = 1 << 20  # bytes of a file of captions
SPECIAL = "*?[{"  # characters of patterns
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
REMEDY = "give a folder of tar files, or a pattern such as 'data/{000..099}.tar'"
Sample = dict[str, Member]  # by extension


def shard_files(source: Path, split: str = "train") -> list[Path]:
    """The tar files of SOURCE/SPLIT, or of SOURCE for "train"; those that a pattern matches; or one tar file.

    A pattern has `*`, `?`, `[…]`, or `{000..099}` as in WebDataset. Raises InputError about `folder` if a folder cannot
    be listed.
    """
    if is_folder(source, "folder"):
        for folder in [source / split] + [source] * (split == "train"):
            if is_folder(folder, "folder"):
                try:
                    names = sorted(name for name in os.listdir(folder) if name.endswith(".tar") and name[0] != ".")
                except OSError as error:
                    raise unreadable("folder", folder, error, REMEDY) from None
                if names:
                    return [folder / name for name in names]
        return []
    if is_file(source, "folder"):
        return [source] if source.suffix == ".tar" else []
    patterns = _without_ranges(str(source))
    return sorted({Path(name) for pattern in patterns for name in glob.glob(pattern) if os.path.isfile(name)})


def open_shards(files: list[Path]) -> CaptionedImages:
    """The samples of tar files that have an image and a caption.

    Damaged tar files, of which the samples before the damage are used, names that leave the folder, links, and samples
    without an image or captions are counted in `skipped`. Raises InputError about `folder` if no sample is usable.
    """
    items: list[CaptionedImage] = []
    skipped: dict[Path, str] = {}
    above = os.path.commonpath([file.absolute().parent for file in files])
    for path in files:
        prefix = os.path.relpath(path.absolute(), above).removesuffix(".tar")
        samples: dict[str, Sample] = {}
        try:
            with open(path, "rb") as file:
                for name, member in _members(path, file, skipped):
                    folder, _, base = name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    if extension.lower() not in IMAGES + CAPTIONS:
                        continue
                    if sample.setdefault(extension.lower(), member) is not member:
                        skipped[Path(f"{path}/{name} at byte {member.offset}")] = "name that several files have"
        except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
            skipped[path] = f"damaged tar files: {error}"
        for key, sample in samples.items():
            item, reason = _item(prefix, path, key, sample)
            if item is None:
                skipped[Path(f"{path}/{key}")] = reason
            else:
                items.append(item)
    data = CaptionedImages(tuple(items), skipped)
    if not items:
        problem = f"has no sample with an image and a caption ({data.summary()})"
        raise InputError("folder", files[0] if len(files) == 1 else Path(above), REMEDY, problem)
    return data


def _without_ranges(pattern: str) -> list[str]:
    """What a pattern with `{000..099}` stands for."""
    match = RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    return [p for i in numbers for p in _without_ranges(pattern[: match.start()] + i + pattern[match.end() :])]


def _members(path: Path, file: BinaryIO, skipped: dict[Path, str]) -> Iterator[tuple[str, Member]]:
    """Names and places of the whole files in a tar file; others go to `skipped`.

    Raises tarfile.TarError, ValueError or OverflowError where the tar file is damaged, after those before the damage.
    """
    size, end = os.fstat(file.fileno()).st_size, 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (entry := tar.next()) is not None:
            tar.members.clear()  # it would keep all
            if entry.size < 0 or entry.offset_data <= end:
                raise tarfile.ReadError(f"a header at byte {entry.offset} is damaged")
            end = entry.offset_data
            reason = _refusal(entry)
            if reason:
                skipped[Path(f"{path}/{entry.name}")] = reason
            elif not entry.isdir():
                if entry.offset_data + entry.size > size:
                    raise tarfile.ReadError(f"cut off in {entry.name}")
                yield os.path.normpath(entry.name), Member(path, entry.offset_data, entry.size)
        # tarfile takes damaged headers, and the end of the file, for the end of the archive, which is a block of zeros.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"cut off or damaged at byte {tar.offset}")


def _refusal(entry: tarfile.TarInfo) -> str | None:
    if leaves_folder(entry.name):
        return "outside of the folder"
    if entry.issym() or entry.islnk():
        return "links"
    return None if entry.isdir() or (entry.isreg() and not entry.issparse()) else "not a file"


def _item(prefix: str, path: Path, key: str, sample: Sample) -> tuple[CaptionedImage | None, str]:
    """The captioned image of a sample, or None and the reason why there is none."""
    extension = next((extension for extension in IMAGES if extension in sample), None)
    if extension is None:
        return None, "no image"
    try:
        captions = _captions(sample)
    except (OSError, ValueError, RecursionError) as error:
        return None, f"captions that cannot be read: {error}"
    if not captions:
        return None, "no captions"
    return CaptionedImage(f"{prefix}/{key}", Path(f"{path}/{key}.{extension}"), captions, sample[extension]), ""


def _captions(sample: Sample) -> tuple[str, ...]:
    """Raises OSError, or ValueError for a file that is too long, or not UTF-8, or not JSON."""
    kind = next((kind for kind in CAPTIONS if kind in sample), None)
    if kind is None:
        return ()
    if sample[kind].size > LONGEST:
        raise ValueError(f"longer than {LONGEST} bytes")
    text = sample[kind].read_bytes().decode("utf-8-sig")
    lines = text.splitlines()
    if kind == "json":
        content = json.loads(text)
        content = content if isinstance(content, dict) else {}
        captions = content.get("captions", content.get("caption"))
        lines = captions if isinstance(captions, list) else [captions]
    return tuple(line.strip() for line in lines if isinstance(line, str) and line.strip())
