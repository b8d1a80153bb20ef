"""`python -m engine.sample`: what it says to bad options, damaged images, checkpoints and output folders."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_cases import assert_refused, input_files, sample_runner

run = pytest.fixture(sample_runner)
inputs = pytest.fixture(scope="module")(input_files)


def bad(option: str, *others: str, said: str | None = None):
    """A command line that must be refused for its first option; `said` is in the message, by default its value."""
    return pytest.param(option, others, others[0] if said is None else said, id=" ".join((option, *others)))


NUMBERS = [
    *(bad("--num", value) for value in ("0", "-1", "1025", "1.5", "x", "", "nan", "9" * 40)),
    *(bad("--steps", value) for value in ("0", "-3", "1001", "inf", "two")),
    *(bad("--guidance", value) for value in ("nan", "inf", "100.5", "x", "")),
    bad("--guidance", "1e30", said="1e+30"),
    bad("--guidance-interval", "0.7", said="expected 2"),
    bad("--guidance-interval", "0.7", "0.2", said="0 <= start < end <= 1"),
    bad("--guidance=-inf", said="-inf"),
    *(bad("--eta", value, "--solver", "ddim") for value in ("1.5", "nan", "x", "")),
    bad("--eta", "0.5", said="use solver ddim"),
    *(bad("--seed", value) for value in ("-1", "1e3", "x", "nan", str(2**64))),
    bad("--seed", str(2**64 - 1), "--num", "2"),
    bad("--seed", str(2**64 - 15), said=str(2**64 - 16)),  # a joint grid has 16
    *(bad("--resample", value) for value in ("0", "-1", "101", "x")),
    *(bad("--step-cache", value) for value in ("0", "-1", "1001", "0.5")),
    *(bad("--jump", value) for value in ("0", "-1", "1001", "0.5")),
    *(bad("--inner-steps", value) for value in ("0", "101", "x")),
    *(bad("--step-size", value) for value in ("0", "-1", "nan", "x")),
    bad("--infill", "langevin", said="leave it out"),
    bad("--resample", "2", "--infill", "langevin"),
    bad("--jump", "2", "--resample", "2"),
    bad("--jump", "1", "--resample", "2", "--steps", "1"),
]
CHOICES = [
    *(bad("--task", value) for value in ("x", "")),
    bad("--solver", "euler"),
    bad("--spacing", "karras"),
    bad("--infill", "lanpaint"),
    bad("--unknown-words", "drop"),
    *(bad("--attention", value) for value in ("flash", "xformers")),
    *(bad("--device", value) for value in ("x", "", "cuda:99", "meta")),
    *(bad("--dtype", value) for value in ("float64", "")),
    *(bad("--guidance-kind", value) for value in ("x", "")),
    bad("--guidance-kind", "empty", "--order", "text,image"),
    bad("--order", "text,sound", said="'sound'"),
    bad("--bogus", said=""),
    bad("--sol", "ddim"),  # no abbreviations: they would break with every new option
    bad("--compile=yes", said="yes"),
    bad("--prompt", said="expected one argument"),
    bad("stray", said="unrecognized"),
]
PROMPTS = [
    *(bad("--prompt", value) for value in ("", " ", "...", "red " * 7)),
    bad("--prompt", "red\npurple", said="'purple'"),
    bad("--prompt", "red", "--prompt", "catt", said="'catt' (near: cat"),
    bad("--prompt", "red", "--prompt", "", said="''"),
]
IMAGES = [
    *(bad("--image", name) for name in ("none.png", "zero.png", "text.png", "cut-noise.png", "cut-noise.jpg")),
    *(bad("--image", name) for name in ("", ".", "text.png/x")),
    bad("--image", "two\nlines.png", said="two lines.png"),
    *(bad("--mask", name, "--image", "noise.png") for name in ("none.png", "zero.png", "text.png", "cut-left.png")),
    *(bad("--mask", name, "--image", "noise.png") for name in ("", ".")),
    bad("--mask", "wide.png", "--image", "noise.png", said="32x16"),
    bad("--mask", "left.png", said="needs the image that it belongs to"),
    bad("--mask", "left.png", "--prompt", "red", said="needs the image that it belongs to"),
    bad("--image", "noise.png", "--prompt", "red", said="nothing is left to generate"),
    bad("--mask", "black.png", "--image", "noise.png", "--prompt", "red", said="black.png marks nothing in the middle"),
]
TASKS = [
    bad("--task", "joint", "--prompt", "red"),
    bad("--task", "joint", "--image", "noise.png"),
    bad("--task", "text-to-image"),
    bad("--task", "text-to-image", "--prompt", "red _"),
    bad("--task", "text-to-image", "--image", "noise.png"),
    bad("--task", "image-to-text"),
    bad("--task", "image-to-text", "--image", "noise.png", "--mask", "left.png"),
    bad("--task", "infill"),
    bad("--task", "infill", "--prompt", "red"),
    bad("--task", "infill", "--image", "noise.png"),
]


@pytest.mark.parametrize(("option", "others", "said"), NUMBERS + CHOICES + PROMPTS + IMAGES + TASKS)
def test_bad_options_are_refused_in_one_line(run, inputs, monkeypatch, option, others, said):
    monkeypatch.chdir(inputs)
    assert_refused(run(option, *others), option.split("=")[0], said)


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300, "loop", "loop/x"], ids=lambda out: out[:10])
def test_an_impossible_out_folder_is_refused_before_the_work(run, tmp_path, monkeypatch, out):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr("engine.runtime.Engine.generate", lambda *_: pytest.fail("worked in vain"))
    done = run(out=out)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("python -m engine.sample: --out: ") and "; give " in done.err
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unwritable_out_folder_is_refused_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root, every folder is writable
    done = run()
    assert_refused(done, "--out", str(tmp_path))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that even root cannot write to")
def test_an_out_folder_that_turns_out_unwritable_is_named(run):
    assert_refused(run(out="/proc/samples"), "--out", "/proc/samples")


@pytest.mark.parametrize("name", ["0001.png", "grid.png", "samples.json"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_the_work(run, tmp_path, monkeypatch, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    monkeypatch.setattr("engine.runtime.Engine.generate", lambda *_: pytest.fail("worked in vain"))
    done = run("--prompt", "red", "--num", "2")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert f"--out: out/{name} is a folder" in done.err and "; give " in done.err
    assert [path.name for path in done.folder.iterdir()] == [name]


FILES = [
    "config.json",
    "model.safetensors",
    "text/vocabulary.json",
    "text/vectors.safetensors",
    "image/config.json",
    "image/diffusion_pytorch_model.safetensors",
]


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(3000))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other(path: Path) -> None:
    """Well-formed, but not what it should be."""
    if path.suffix == ".json":
        path.write_text("[1, 2]")
    else:
        save_file({"strange": torch.zeros(3)}, path)


def nan(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text("NaN")
    else:
        save_file({name: torch.full_like(w, torch.nan) for name, w in load_file(path).items()}, path)


def extreme(path: Path) -> None:
    """Nested deeper than Python reads, or in a dtype for storage only."""
    if path.suffix == ".json":
        path.write_text("[" * 100_000)
    else:
        save_file({name: w.to(torch.float8_e4m3fn) for name, w in load_file(path).items()}, path)


def reshaped(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text("{}")
    else:
        save_file({name: torch.zeros(*w.shape, 2) for name, w in load_file(path).items()}, path)


@pytest.mark.parametrize("damage", [missing, empty, truncated, garbage, folder, other, nan, extreme, reshaped])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_by_file(run, tiny_checkpoint, tmp_path, file, damage):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    damage(broken / file)
    done = run(checkpoint=broken)
    # Weights that fit no autoencoder's config are named by their folder.
    named = broken / file if damage not in (other, reshaped) else (broken / file).parent
    assert_refused(done, "--checkpoint", str(named))


@pytest.mark.parametrize("name", ["text", "image"])
def test_a_checkpoint_without_a_codec_is_refused(run, tiny_checkpoint, tmp_path, name):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    shutil.rmtree(broken / name)
    assert_refused(run(checkpoint=broken), "--checkpoint", str(broken / name))


def settings(*keys: str | int, value):
    def change(config: dict) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (settings("colour", value=1), "colour"),
        (settings("model", "depth", value=1), "depth"),
        (settings("model", "modalities", 1, "name", value="sound"), "sound"),
        (settings("model", "modalities", 0, "name", value="picture"), "picture"),
        (settings("model", "modalities", value=[]), "modalities"),
        (settings("model", "dim", value=128), "model.safetensors"),
        (settings("model", "dim", value="wide"), "wide"),
        (settings("model", "shared_depth", value=2), "shared_depth"),
        (settings("diffusion", "schedule", value="linear"), "linear"),
        (settings("diffusion", "timesteps", value=0), "timesteps"),
        (settings("codecs", value={}), "names no codecs"),
        (settings("codecs", value={"image": {"kind": "image", "size": 32, "patch": 1}}), "codecs"),
        (settings("codecs", "image", "kind", value="sound"), "'sound'"),
        (settings("codecs", "image", "folder", value="../image"), "'../image'"),
        (settings("codecs", "image", "size", value=64), "tokens"),
        (settings("codecs", "image", "colours", value=3), "colours"),
        (settings("codecs", "text", "size", value=3), "size"),
        (settings("diffusion", "timesteps", value=10**13), "10000000000000"),
        (settings("codecs", "image", "patch", value=2), "image"),
        (settings("sampling", "order", value=["text", "sound"]), "sound"),
        (settings("sampling", "guidance", value={"joint": "much"}), "'much'"),
        (settings("sampling", "feather", value=-1), "feather"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_checkpoint_with_a_wrong_config_is_refused(run, tiny_checkpoint, tmp_path, change, named):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    change(config)
    (broken / "config.json").write_text(json.dumps(config))
    assert_refused(run(checkpoint=broken), "--checkpoint", named)


@pytest.mark.parametrize("option", ["--checkpoint", "--out", "--image"])
@pytest.mark.parametrize("name", ["", " ", "a\0b"])
def test_what_names_no_file_is_refused(run, tiny_checkpoint, monkeypatch, option, name):
    monkeypatch.chdir(tiny_checkpoint)  # where an empty name would be a checkpoint
    assert_refused(run(option, name), option, repr(name))


@pytest.mark.parametrize("checkpoint", ["none", "file", "x" * 5000], ids=lambda name: name[:10])
def test_a_checkpoint_other_than_a_folder_is_refused(run, tmp_path, checkpoint):
    (tmp_path / "file").touch()
    assert_refused(run(checkpoint=checkpoint), "--checkpoint", checkpoint[:50])


def test_a_checkpoint_of_fewer_times_than_steps_is_told_apart(run, tiny_checkpoint, tmp_path):
    short = shutil.copytree(tiny_checkpoint, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    config["diffusion"]["timesteps"] = 10
    (short / "config.json").write_text(json.dumps(config))
    assert_refused(run("--steps", "11", checkpoint=short), "--steps", "11")
    assert run("--steps", "10", checkpoint=short).code == 0


@pytest.mark.parametrize("name", ["image", "mask", "sketch", "sketch-mask", "adapter", "prompts", "images"])
def test_an_option_of_one_file_that_is_given_twice_is_refused(run, name):
    assert_refused(run(f"--{name}", "a.png", f"--{name}=b.png"), f"--{name}:", "b.png is a second one; give one")


def test_an_input_that_is_given_twice_is_refused(run):
    done = run("--input", "text=red cat", "--input", "text=blue dog")
    assert done.code == 2 and "--input: 'text=red cat' is given twice; give each modality once" in done.err
