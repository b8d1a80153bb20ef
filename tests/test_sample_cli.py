"""`python -m engine.sample`: what it writes and prints."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_cases import assert_refused, input_files, sample_runner

from engine import Engine, Request
from engine.hub import MODELS
from engine.images import fit_image
from engine.sample import main

KEYS = ["task", "prompt", "image", "text", "outputs", "seed", "steps", "solver", "spacing", "order", "guidance"]

run = pytest.fixture(sample_runner)
inputs = pytest.fixture(scope="module")(input_files)


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
        (["--solver", "unipc"], {"solver": "unipc"}),
        (["--solver", "sde-dpm++"], {"solver": "sde-dpm++"}),
        (["--spacing", "power"], {"spacing": "power"}),
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


def test_a_sketch_is_for_the_model_that_has_sketches(three_modality_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(MODELS, "emoji-sketch", three_modality_checkpoint)
    Image.new("RGB", (32, 32), "white").save("drawing.png")
    assert main(["--sketch", "drawing.png", "--steps", "1", "--quiet"]) == 0
    report = json.loads(Path("samples/samples.json").read_text())
    assert report[0]["task"] == "sketch-to-image+text" and Path("samples/0000-sketch.png").exists()
    assert main(["--input", "sketch=drawing.png", "--steps", "1", "--quiet"]) == 0
    assert main(["--checkpoint", "emoji", "--sketch", "drawing.png"]) == 2
    assert capsys.readouterr().err.endswith("use one of image, text, or the checkpoint emoji-sketch\n")


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


def test_json_is_json_in_every_encoding(run, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr("sys.stdout", stdout)
    done = run("--prompt", "côte 日 😀", "--unknown-words", "fill", "--json")
    stdout.flush()
    assert json.loads(stdout.buffer.getvalue().decode("latin-1")) == done.report


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


def test_compiled_it_makes_the_same_images(run, cached):
    given = ("--prompt", "red _", "--guidance", "1", "--dtype", "float32")
    compiled = run(*given, "--compile", out="compiled")
    assert compiled.code == 0, compiled.err
    shutil.rmtree(cached)
    plain = run(*given, out="plain")
    assert compiled.report[0] == plain.report[0]
    difference = plain.images()[0].astype(int) - compiled.images()[0]
    assert abs(difference).max() <= 2
