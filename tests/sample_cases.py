"""Runs of `python -m engine.sample` in this process, for the tests of what it writes and of what it refuses."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.sample import main

REMEDIES = ("use ", "give ", "put ", "leave ", "copy ", "restore ", "name ", "see --help", "the modalities are ")


class Run(NamedTuple):
    code: int
    out: str
    err: str
    folder: Path

    @property
    def report(self) -> list[dict]:
        return json.loads((self.folder / "samples.json").read_text(encoding="utf-8"))

    def images(self) -> list[np.ndarray]:
        return [np.asarray(Image.open(self.folder / sample["image"])) for sample in self.report[:-1]]


def sample_runner(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    """Runs the command line in this process, in an empty folder, with two steps unless told otherwise."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, checkpoint=tiny_checkpoint, out="out") -> Run:
        command = ["--checkpoint", checkpoint, "--dtype", "float32", "--steps", 2, "--out", out, *arguments]
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in command])
        except SystemExit as stop:
            code = stop.code
        return Run(code, *capsys.readouterr(), tmp_path / out)

    return run


def input_files(tmp_path_factory) -> Path:
    """Images and masks, whole and broken."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "noise.png")
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "noise.jpg")
    left = np.zeros((32, 32), np.uint8)
    left[:, :16] = 255
    Image.fromarray(left).save(folder / "left.png")
    Image.fromarray(left[:16]).save(folder / "wide.png")
    Image.new("L", (32, 32)).save(folder / "black.png")
    for name in ("noise.png", "noise.jpg", "left.png"):
        whole = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.png").touch()
    (folder / "text.png").write_text("not an image")
    (folder / "two\nlines.png").touch()
    return folder


def assert_refused(done: Run, option: str, value: str):
    """One line that names the option, the value and what to do instead, and nothing else anywhere."""
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("\n") and done.err.count("\n") == 1, done.err
    assert option in done.err and value in done.err, done.err
    assert any(f"; {remedy}" in done.err for remedy in REMEDIES), done.err
    assert not done.folder.exists()
