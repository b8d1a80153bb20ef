"""The folder that a run of `engine.sample` writes: images, `grid.png` and `samples.json` of one run only.

A run replaces the files of an earlier one only after all of its own are written, so that a run that fails or is killed
before leaves the earlier one whole.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.command import check_writable
from engine.errors import InputError
from engine.request import Sample

GRID, RECORD = "grid.png", "samples.json"
UNFINISHED = ".writing-"  # start of the name of the folder that files are in until they are whole


def image_file(i: int, modality: str) -> str:
    """The name of the i-th sample's image of a modality."""
    return f"{i:04d}.png" if modality == "image" else f"{i:04d}-{modality}.png"


def is_image(value) -> bool:
    return hasattr(value, "save")  # without importing Pillow


def check_files(out: Path, files: Iterable[str], inputs: Iterable[tuple[str, Path]]) -> None:
    """Raises InputError if `files` cannot be written to the folder, or if the run would replace an input.

    inputs  (argument, file) of all files to be read; they are compared by inode, so links count too
    """
    written = [*files, GRID, RECORD]
    check_writable(out, written)
    replaced = set().union(*(_identity(out / name) for name in (*written, *_earlier_files(out))))
    for argument, file in inputs:
        if _identity(file) & replaced:
            remedy = "give another folder with --out, or copy the file elsewhere"
            raise InputError(argument, file, remedy, "is a file that this run would replace")


def write(out: Path, samples: Sequence[Sample], report: list[dict]) -> list[str]:
    """Replaces what an earlier run has written; returns which of `grid.png` and `samples.json` were written.

    Raises InputError about "out" where the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out) as locked:
            if locked:  # then the runs that wrote these have ended
                for unfinished in out.glob(f"{UNFINISHED}*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=out, prefix=UNFINISHED) as folder:
                names = _write_files(Path(folder), samples, report)
                # samples.json first: it lists every image in the folder even if the process is killed here.
                for name in _earlier_files(out) - {*names}:
                    (out / name).unlink(missing_ok=True)
                for name in names:
                    os.replace(Path(folder, name), out / name)
    except OSError as error:
        raise InputError("out", out, "give another folder", f"cannot be written ({error.strerror})") from None
    return [name for name in (GRID, RECORD) if name in names]


def to_json(report: list[dict], ascii: bool = False) -> str:
    return json.dumps(report, indent=2, ensure_ascii=ascii, default=str)


def _write_files(folder: Path, samples: Sequence[Sample], report: list[dict]) -> list[str]:
    """Writes all files and returns their names, samples.json first."""
    names = [RECORD]
    (folder / RECORD).write_text(to_json(report) + "\n", "utf-8")
    for i, sample in enumerate(samples):
        for modality, value in sample.outputs.items():
            if is_image(value):
                names.append(image_file(i, modality))
                value.save(folder / names[-1])
    if names[1:]:
        _write_grid(samples, folder / GRID)
        names.append(GRID)
    return names


def _write_grid(samples: Sequence[Sample], file: Path) -> None:
    """All images with their texts, those of one sample side by side."""
    from engine.images import grid

    images, captions = [], []
    for sample in samples:
        texts = [str(value) for value in sample.outputs.values() if not is_image(value)]
        of_sample = [value for value in sample.outputs.values() if is_image(value)]
        images += of_sample
        captions += [" · ".join(texts), *[""] * len(of_sample)][: len(of_sample)]  # under the sample's first image
    per_sample = len(images) // len(samples)
    grid(images, captions, columns=per_sample * max(1, round(len(images) ** 0.5 / per_sample))).save(file)


def _earlier_files(out: Path) -> set[str]:
    """Images and grid that samples.json lists; names that `image_file` does not give are skipped."""
    try:
        files = set()
        for i, entry in enumerate(json.loads((out / RECORD).read_text("utf-8"))):
            outputs = {"image": entry.get("image"), **entry.get("outputs", {})}
            files |= {file for name, file in outputs.items() if file == image_file(i, name) and "/" not in file}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):  # not written by a run
        return set()
    return {file for file in (files | {GRID} if files else files) if not (out / file).is_dir()}


def _identity(file: Path) -> set[tuple[int, int]]:
    """Device and inode, the same under all names of a file; empty if there is none."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return set()
    return {(status.st_dev, status.st_ino)}


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Waits until no other run writes there; yields False on a file system that has no such locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)  # also after a kill, which ends the lock
