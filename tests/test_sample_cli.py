"""`python -m engine.sample`: what it writes and prints, and what it says to bad input."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from engine_cases import one_block_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

from engine import Engine, Request
from engine.images import fit_image
from engine.sample import main

REMEDIES = ("use ", "give ", "put ", "leave ", "copy ", "restore ", "name ", "see --help", "the modalities are ")
KEYS = ["task", "prompt", "image", "text", "outputs", "seed", "steps", "solver", "order", "guidance"]


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


@pytest.fixture
def run(tiny_checkpoint, tmp_path, capsys, monkeypatch):
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


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
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


@pytest.mark.parametrize(
    ("given", "task"),
    [
        (["--num", "3"], "joint"),
        (["--prompt", "red cat", "--prompt", "big dog", "--num", "2"], "text-to-image"),
        (["--image", "noise.png"], "image-to-text"),
        (["--prompt", "red _ cat"], "infill"),
        (["--image", "noise.png", "--mask", "left.png"], "infill"),
        (["--image", "noise.png", "--mask", "left.png", "--prompt", "red _", "--seed", "9"], "infill"),
    ],
    ids=["joint", "text-to-image", "image-to-text", "infill words", "infill image", "infill both"],
)
def test_every_task_writes_its_images_a_grid_and_a_report(run, inputs, given, task):
    done = run(*(inputs / a if a.endswith(".png") else a for a in given), "--task", task)
    assert (done.code, done.err) == (0, "")
    samples, timing = done.report[:-1], done.report[-1]
    assert all(list(sample) == KEYS for sample in samples) and list(timing) == ["timing"]
    assert {sample["task"] for sample in samples} == {task}
    names = [f"{i:04d}.png" for i in range(len(samples))]
    assert [sample["image"] for sample in samples] == names, "relative to the folder"
    assert sorted(p.name for p in done.folder.iterdir()) == [*names, "grid.png", "samples.json"]
    assert all(image.shape == (32, 32, 3) for image in done.images())
    with Image.open(done.folder / "grid.png") as grid:
        assert grid.width > 96, "small images are enlarged, for their captions"
    num = int(given[given.index("--num") + 1]) if "--num" in given else 1
    prompts = [given[i + 1] for i, a in enumerate(given) if a == "--prompt"] or [None]
    first = 9 if "--seed" in given else 0
    assert [(s["prompt"], s["seed"]) for s in samples] == [(p, first + i) for p in prompts for i in range(num)]
    assert f"{len(samples)} samples in out" in done.out and "s per image" in done.out


def test_the_report_says_what_was_used(run):
    done = run("--prompt", "red", "--steps", "3", "--solver", "ddim", "--guidance", "2.5", "--seed", "4")
    sample = done.report[0]
    expected = {"image": "0000.png", "text": "red", "seed": 4, "steps": 3, "solver": "ddim", "guidance": 2.5}
    assert {key: sample[key] for key in expected} == expected and sample["order"] == "together"
    assert set(done.report[-1]["timing"]) == {"load", "generate", "total", "seconds_per_image"}


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--order", "together"], {"order": "together"}),
        (["--order", "image,text"], {"order": ("image", "text")}),
        (["--solver", "ddim", "--eta", "0.5"], {"solver": "ddim", "eta": 0.5}),
        (["--guidance-kind", "alternate", "--guidance", "2"], {"guidance_kind": "alternate", "guidance": 2}),
        (["--guidance-kind", "unidiffuser", "--guidance", "2"], {"guidance_kind": "unidiffuser", "guidance": 2}),
        (["--guidance-kind", "empty", "--prompt", "red"], {"guidance_kind": "empty", "prompt": "red"}),
        (["--guidance-interval", "0", "0.5", "--prompt", "red"], {"guidance_interval": (0, 0.5), "prompt": "red"}),
        (["--step-cache", "2", "--prompt", "red"], {"step_cache": 2, "prompt": "red"}),
        (["--resample", "3", "--jump", "1", "--prompt", "red"], {"resample": 3, "jump": 1, "prompt": "red"}),
        (["--image", "noise.png", "--mask", "left.png"], {"image": "noise.png", "mask": "left.png"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_are_those_of_a_request(run, inputs, monkeypatch, tiny_checkpoint, options, settings):
    monkeypatch.chdir(inputs)
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32") as engine:
        default, expected = (engine.generate(Request(steps=4, seed=1, **more)) for more in ({}, settings))
    done = run("--steps", "4", "--seed", "1", "--num", "1", "--out", inputs.parent / "options", *options)
    with Image.open(inputs.parent / "options" / "0000.png") as image:
        assert np.array_equal(image, expected.image) and not np.array_equal(image, default.image)
    report = json.loads((inputs.parent / "options" / "samples.json").read_text())
    assert (done.code, report[0]["text"], report[0]["guidance"]) == (0, expected.text, expected.guidance)


def test_a_checkpoint_of_version_0_1_is_sampled_as_one_of_today(run, tiny_checkpoint, tmp_path):
    old = shutil.copytree(tiny_checkpoint, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    config["model"]["time"] = config["model"].pop("time_conditioning")
    config["diffusion"]["times"] = config["diffusion"].pop("time_sampling")
    config["image"] = {key: config["codecs"]["image"][key] for key in ("size", "patch")}
    del config["codecs"], config["sampling"]
    (old / "config.json").write_text(json.dumps(config))
    done, expected = run("--num", "2", checkpoint=old, out="old"), run("--num", "2", out="new")
    assert (done.code, done.err) == (0, "") and done.report[:-1] == expected.report[:-1]
    assert all(np.array_equal(a, b) for a, b in zip(done.images(), expected.images(), strict=True))


def test_a_result_that_is_not_finite_is_told_in_one_line(run, monkeypatch):
    def fail(*_):
        raise FloatingPointError("requests[0], seed 3: the result is NaN or infinite; use less guidance")

    monkeypatch.setattr("engine.runtime.Engine.generate", fail)
    assert_refused(run("--prompt", "red"), "requests[0], seed 3", "NaN")


def test_without_arguments_a_grid_of_joint_samples_is_made(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("engine.runtime.BUILT_IN", tiny_checkpoint)
    assert main([]) == 0
    report = json.loads(Path("samples/samples.json").read_text())
    assert [s["seed"] for s in report[:-1]] == list(range(16))
    assert (report[0]["task"], report[0]["order"], report[0]["guidance"]) == ("joint", ["text", "image"], 3.0)


def test_known_pixels_and_words_come_back(run, inputs):
    done = run("--image", inputs / "noise.png", "--mask", inputs / "left.png", "--prompt", "red _ cat", "--num", "2")
    before = np.asarray(Image.open(inputs / "noise.png"))
    for sample, after in zip(done.report, done.images(), strict=False):
        assert np.array_equal(after[:, 16:], before[:, 16:]) and not np.array_equal(after[:, :16], before[:, :16])
        words = sample["text"].split()
        assert (len(words), words[0], words[2]) == (3, "red", "cat")


def test_the_same_command_makes_the_same_images(run):
    first, second = (run("--prompt", "red _", "--num", "2", out=out) for out in ("a", "b"))
    assert first.report[:-1] == second.report[:-1]
    assert all(np.array_equal(a, b) for a, b in zip(first.images(), second.images(), strict=True))


def test_options_without_effect_here_are_accepted(run):
    plain = run("--prompt", "red", out="plain")
    other = run("--prompt", "red", "--no-graphs", "--attention", "sdpa", "--device", "cpu", "--resample", "1")
    assert other.code == 0 and np.array_equal(plain.images()[0], other.images()[0])


def test_unknown_words_are_filled_in_on_demand(run):
    done = run("--prompt", "purple cat", "--unknown-words", "fill")
    assert (done.code, done.report[0]["task"]) == (0, "infill")
    words = done.report[0]["text"].split()
    assert len(words) == 2 and words[1] == "cat" and words[0] != "purple"


def test_json_prints_the_report_and_nothing_else(run):
    done = run("--prompt", "red", "--json")
    assert json.loads(done.out) == done.report and done.err == ""


def test_quiet_prints_nothing(run):
    done = run("--prompt", "red", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "") and len(done.report) == 2


@pytest.mark.parametrize(("options", "shown"), [([], True), (["--quiet"], False), (["--json"], False)])
def test_progress_is_shown_on_a_terminal_only(run, capsys, monkeypatch, options, shown):
    assert run(*options, "--num", "1").err == "", "capsys is no terminal"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert ("4/4" in run(*options, "--num", "1").err) is shown, "two steps for the text, two for the image"


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def palette(image: Image.Image) -> Image.Image:
    return image.quantize(16)


def rgba(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(128)
    return image


def cmyk(image: Image.Image) -> Image.Image:
    return image.convert("CMYK")


def grey16(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def bilevel(image: Image.Image) -> Image.Image:
    return image.convert("1")


def odd(image: Image.Image) -> Image.Image:
    return image.resize((7, 131))


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [(grey, "png"), (palette, "gif"), (rgba, "png"), (cmyk, "jpg"), (grey16, "png"), (bilevel, "png"), (odd, "webp")],
)
def test_images_of_any_kind_are_taken(run, inputs, tmp_path, kind, suffix):
    given = tmp_path / f"given.{suffix}"
    with Image.open(inputs / "noise.png") as noise:
        kind(noise).save(given)
    done = run("--image", given)
    assert done.code == 0, done.err
    with Image.open(given) as image:
        assert np.array_equal(done.images()[0], fit_image(image, 32).permute(1, 2, 0).numpy())


def test_a_mask_belongs_to_the_image_as_it_is_shown(run, inputs, tmp_path):
    """A photo that its EXIF data turn by 90°, and a mask drawn on the upright image."""
    with Image.open(inputs / "noise.png") as noise:
        upright = noise.resize((64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    after = run("--image", tmp_path / "turned.png", "--mask", tmp_path / "mask.png").images()[0]
    seen = fit_image(upright, 32).permute(1, 2, 0).numpy()
    assert np.array_equal(after[:, 16:], seen[:, 16:]) and not np.array_equal(after[:, :16], seen[:, :16])


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
    bad("--jump", "2", "--resample", "2"),
    bad("--jump", "1", "--resample", "2", "--steps", "1"),
]
CHOICES = [
    *(bad("--task", value) for value in ("x", "")),
    bad("--solver", "euler"),
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
    bad("--image", "noise.png", "--prompt", "red", "--mask", "black.png", said="nothing is left to generate"),
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


def assert_refused(done: Run, option: str, value: str):
    """One line that names the option, the value and what to do instead, and nothing else anywhere."""
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("\n") and done.err.count("\n") == 1, done.err
    assert option in done.err and value in done.err, done.err
    assert any(f"; {remedy}" in done.err for remedy in REMEDIES), done.err
    assert not done.folder.exists()


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


def test_large_images_are_taken_without_a_warning(run, inputs, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns above it; the image has 1024
    done = run("--image", inputs / "noise.png")
    assert (done.code, done.err) == (0, "")


def test_a_failed_run_leaves_an_earlier_one_as_it_was(run, monkeypatch):
    done = run("--prompt", "red", "--num", "2")
    before = {path.name: path.read_bytes() for path in done.folder.iterdir()}
    save = Image.Image.save

    def full_disk(image, path, *arguments, **options):
        if Path(path).name == "0001.png":
            raise OSError(28, "No space left on device")
        save(image, path, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    failed = run("--prompt", "big dog", "--num", "2")
    assert (failed.code, failed.out) == (2, "") and "--out: out cannot be written (No space left" in failed.err
    assert {path.name: path.read_bytes() for path in done.folder.iterdir()} == before


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
def test_a_checkpoint_that_is_no_folder_is_refused(run, tmp_path, checkpoint):
    (tmp_path / "file").touch()
    assert_refused(run(checkpoint=checkpoint), "--checkpoint", checkpoint)


def test_a_checkpoint_of_fewer_times_than_steps_is_told_apart(run, tiny_checkpoint, tmp_path):
    short = shutil.copytree(tiny_checkpoint, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    config["diffusion"]["timesteps"] = 10
    (short / "config.json").write_text(json.dumps(config))
    assert_refused(run("--steps", "11", checkpoint=short), "--steps", "11")
    assert run("--steps", "10", checkpoint=short).code == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside Inductor
def test_compiled_it_makes_the_same_images(run, tiny_checkpoint, tmp_path):
    folder = one_block_checkpoint(tiny_checkpoint, tmp_path / "one-block")
    given = ("--prompt", "red _", "--guidance", "1")
    plain = run(*given, checkpoint=folder, out="plain")
    compiled = run(*given, "--compile", checkpoint=folder, out="compiled")
    assert compiled.code == 0, compiled.err
    assert compiled.report[0] == plain.report[0]
    difference = plain.images()[0].astype(int) - compiled.images()[0]
    assert abs(difference).max() <= 2


def test_an_input_that_is_given_twice_is_refused(run):
    done = run("--input", "text=red cat", "--input", "text=blue dog")
    assert done.code == 2 and "--input: 'text=red cat' is given twice; give each modality once" in done.err
