"""`engine.train` from end to end: three stages on twelve random images, killed, resumed and refused."""

import json
import os
import shutil
import stat
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image
from train_cases import SHORT, Killed, captioned_images, refusal, train_main

from engine import checkpoint
from engine.config import Config, UViTConfig
from engine.model.blocks import Block
from engine.presets import PRESETS
from engine.training import autoencoder, denoiser, stages, tracking
from engine.training.files import CURVE, SETTINGS, StageFiles
from engine.training.options import TrainOptions
from engine.training.recipes import RECIPES, TINY
from engine.training.stage import StageOptions, run_lock

pytestmark = pytest.mark.usefixtures("short_sheets")


def weights_of(run):
    return (run / "checkpoint" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train_main(images, folder) == 0
    return folder


def test_a_run_writes_a_checkpoint_curves_and_sample_images(run):
    loaded = checkpoint.load(run / "checkpoint")
    assert loaded.config == PRESETS["tiny"] and {"red", "car", "night"} <= set(loaded.codec("text").vocabulary)
    for stage, steps in (("autoencoder", 3), ("denoiser", 4)):
        rows = [json.loads(line) for line in (run / stage / CURVE).read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        with Image.open(run / stage / "curve.png") as image:
            image.verify()
    assert {p.name for p in (run / "denoiser").glob("samples-*.png")} == {"samples-0000002.png", "samples-0000004.png"}
    assert (run / "autoencoder" / "samples.png").exists()


def test_damaged_images_are_counted_and_named_once_they_are_opened(tmp_path, run, capsys):
    images = captioned_images(tmp_path)
    for name in ("3.png", "7.png"):
        (images / "images" / name).write_bytes(b"damaged")
    options = ("--init", str(run / "checkpoint"), "--steps", "1")
    assert train_main(images, tmp_path / "run", *options) == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if "usable images" in line)
    assert first.startswith(f"{images}: 12 usable images")
    assert second == f"{images}: 10 usable images; skipped 2 damaged (3.png first)"


def test_a_run_records_what_repeats_it(images, run):
    rows = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    for row in rows:
        assert Config.from_dict(row["config"]) == PRESETS["tiny"] and row["recipe"]["denoiser"]["steps"] == 4
        assert row["versions"]["torch"] == version("torch") and row["dtype"] == "float32" and row["processes"] == 1
        assert row["command"] and row["folder"] == os.getcwd()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if commit.returncode == 0:
        assert rows[0]["commit"].removesuffix("-dirty") == commit.stdout.strip()


def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(run):
    os.umask(umask := os.umask(0))
    assert {stat.S_IMODE(path.stat().st_mode) for path in run.rglob("*") if path.is_file()} == {0o666 & ~umask}


def test_the_recipe_decides_how_captions_are_weighted_and_images_repeated(images, run, tmp_path, monkeypatch):
    curves = {"plain": run / "denoiser" / CURVE}
    for name, recipe in {"alike": {"captions_alike": True}, "repeated": {"repeats": 4}}.items():
        monkeypatch.setitem(RECIPES, "tiny", replace(TINY, **recipe))
        assert train_main(images, tmp_path / name, "--autoencoder", str(run / "checkpoint" / "image")) == 0
        curves[name] = tmp_path / name / "denoiser" / CURVE
    first = {name: json.loads(curve.read_text().splitlines()[0]) for name, curve in curves.items()}
    assert first["alike"]["text"] != first["plain"]["text"] and first["alike"]["image"] == first["plain"]["image"]
    assert first["repeated"]["text"] != first["plain"]["text"]


@pytest.fixture
def other(tmp_path):
    """The same images with a word that the others' captions lack."""
    (tmp_path / "other").mkdir()
    folder = captioned_images(tmp_path / "other")
    captions = folder / "captions.json"
    captions.write_text(captions.read_text().replace("red", "green"))
    return folder


def test_images_that_are_only_known_have_their_words_and_belong_to_the_run(images, other, run, tmp_path, capsys):
    trained = ("--autoencoder", str(run / "checkpoint" / "image"), "--steps", "1")
    assert train_main(images, tmp_path / "run", "--known-images", str(other), *trained) == 0
    assert f"{images}, {other}: 24 usable images" in capsys.readouterr().out
    vocabulary = checkpoint.load(tmp_path / "run" / "checkpoint").codec("text").vocabulary
    assert {"red", "green"} <= set(vocabulary)
    assert train_main(images, tmp_path / "run", *trained) == 2  # resumed without it
    assert "--known-images: 'none' is not what this run began with: removed images: 12" in capsys.readouterr().err
    nowhere, plain = tmp_path / "nowhere", tmp_path / "plain"
    assert train_main(images, plain, "--known-images", str(nowhere)) == 2
    assert f"--known-images: {nowhere} " in capsys.readouterr().err and not plain.exists()


def test_faults_of_images_that_are_only_known_are_not_blamed_on_the_others(images, other, run, tmp_path, capsys):
    init = ("--init", str(run / "checkpoint"))
    assert train_main(images, tmp_path / "words", "--known-images", str(other), *init) == 2
    assert "--known-images: 'green' is not in the vocabulary" in capsys.readouterr().err
    for file in (other / "images").iterdir():
        file.write_bytes(b"damaged")
    captions = other / "captions.json"
    captions.write_text(captions.read_text().replace("green", "red"))
    assert train_main(images, tmp_path / "damaged", "--known-images", str(other), *init) == 2
    assert f"--known-images: {other} has no readable image" in capsys.readouterr().err
    assert train_main(other, tmp_path / "only", "--known-images", str(images), *init) == 2
    assert f"--data: {other / 'images'} has no readable image" in capsys.readouterr().err


def test_repeating_a_finished_run_changes_nothing(images, run):
    before, states = weights_of(run), StageFiles(run / "denoiser").states
    written = states[-1].stat().st_mtime_ns
    assert train_main(images, run) == 0
    assert weights_of(run) == before and StageFiles(run / "denoiser").states == states
    assert states[-1].stat().st_mtime_ns == written


def another_image(data):
    file = data / "images" / "3.png"
    status = file.stat()
    Image.new("RGB", (40, 36), "red").save(file)
    file.write_bytes(file.read_bytes().ljust(status.st_size, b"\0"))  # of equal size
    assert file.stat().st_size == status.st_size


def other_caption(data):
    content = json.loads((data / "captions.json").read_text())
    content["annotations"][8]["caption"] = "blue dog"
    (data / "captions.json").write_text(json.dumps(content))


def fewer_images(data):
    content = json.loads((data / "captions.json").read_text())
    content["images"] = content["images"][1:]
    (data / "captions.json").write_text(json.dumps(content))


def another_order(data):
    content = json.loads((data / "captions.json").read_text())
    content["images"].reverse()
    (data / "captions.json").write_text(json.dumps(content))


def touched(data):
    os.utime(data / "images" / "3.png")


@pytest.mark.parametrize(
    "change, named",
    [
        (another_image, "changed images: 1 (id 3 first)"),
        (other_caption, "images with other captions: 1 (id 4 first)"),
        (fewer_images, "removed images: 1 (id 0 first)"),
        (another_order, "images are listed in another order"),
        (touched, None),
    ],
)
def test_a_run_is_not_resumed_on_other_data(images, run, tmp_path, capsys, change, named):
    shutil.copytree(images, tmp_path / "data")
    shutil.copytree(run, tmp_path / "run")
    change(tmp_path / "data")
    before = weights_of(tmp_path / "run")
    assert train_main(tmp_path / "data", tmp_path / "run", "--steps", "6") == (2 if named else 0)
    if named:
        assert f"--data: {tmp_path / 'data'} is not what this run began with: {named}" in capsys.readouterr().err
    assert (weights_of(tmp_path / "run") == before) == bool(named)


def test_a_diverged_run_resumes_with_a_lower_learning_rate(images, tmp_path, capsys):
    for rates in (["--autoencoder-learning-rate", "1e30"], ["--steps", "2"], ["--learning-rate", "1e30"]):
        capsys.readouterr()
        assert train_main(images, tmp_path, *rates) == (0 if "--steps" in rates else 2)
        assert "--steps" in rates or "use a lower learning rate and resume" in capsys.readouterr().err
    assert train_main(images, tmp_path, "--learning-rate", "1e-4") == 0
    rows = [json.loads(line) for line in (tmp_path / "denoiser" / SETTINGS).read_text().splitlines()]
    assert [(row["step"], row["learning_rate"], row["steps"]) for row in rows] == [(0, 1e-3, 2), (2, 1e-4, 4)]
    assert checkpoint.load(tmp_path / "checkpoint").config == PRESETS["tiny"]


KILLED_AT = {  # by stage, a function and the number of the call during which the run is killed
    "autoencoder": (autoencoder, "autoencoder_losses", 2),
    "words": (stages.TextCodec, "save", 1),
    "latents": (stages, "cache_latents", 1),
    "denoiser": (denoiser.DenoisingLoss, "__call__", 4),
    "export": (checkpoint, "save", 1),
}


def test_a_run_killed_in_every_stage_ends_in_the_same_model(images, run, tmp_path, monkeypatch):
    for target, attribute, call in KILLED_AT.values():
        with monkeypatch.context() as patch:
            original, calls = getattr(target, attribute), [0]

            def dying(*args, original=original, calls=calls, call=call, **options):
                calls[0] += 1
                if calls[0] == call:
                    raise Killed
                return original(*args, **options)

            patch.setattr(target, attribute, dying)
            with pytest.raises(Killed):
                train_main(images, tmp_path / "run")
    assert train_main(images, tmp_path / "run") == 0
    assert weights_of(tmp_path / "run") == weights_of(run)
    for stage in ("autoencoder", "denoiser"):
        assert (tmp_path / "run" / stage / CURVE).read_text() == (run / stage / CURVE).read_text()


def test_gradient_checkpointing_computes_blocks_twice_and_changes_no_weight(images, run, tmp_path, monkeypatch):
    forward, counts, calls = Block._compute, [], []
    monkeypatch.setattr(Block, "_compute", lambda block, *x: calls.append(block.training) or forward(block, *x))
    for options in ([], ["--grad-checkpointing"]):
        calls.clear()
        given = ["--autoencoder", str(run / "checkpoint" / "image"), *options]
        assert train_main(images, tmp_path / str(len(options)), *given) == 0
        assert weights_of(tmp_path / str(len(options))) == weights_of(run)
        counts.append(sum(calls))
    assert counts[1] == 2 * counts[0] > 0


def test_a_failure_to_compile_is_told_in_one_line(images, tmp_path, monkeypatch, capsys):
    kind = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    for error in (kind("no compiler\nand more"), RuntimeError("of another kind")):

        def failing(options, error=error):
            raise error

        monkeypatch.setattr(stages, "train", failing)
        with nullcontext() if type(error) is kind else pytest.raises(RuntimeError, match="of another kind"):
            assert train_main(images, tmp_path, "--compile") == 2
    assert capsys.readouterr().err.startswith("python -m engine.train: --compile: True failed (no compiler);")


def test_word_vectors_truncated_by_a_kill_are_trained_again(images, run, tmp_path, monkeypatch):
    def truncated(codec, folder, dtype):
        folder.mkdir(parents=True)
        (folder / "vocabulary.json").write_text("[")
        (folder / "vectors.safetensors").write_bytes(b"truncated")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stages.TextCodec, "save", truncated)
        train_main(images, tmp_path)
    assert train_main(images, tmp_path) == 0
    assert weights_of(tmp_path) == weights_of(run)


@pytest.mark.parametrize("other", [["--seed", "1"], ["--preset", "emoji"]], ids=str)
def test_a_run_of_other_settings_is_not_overwritten(images, run, capsys, other):
    before = weights_of(run)
    line = refusal(capsys, *SHORT, "--data", str(images), "--out", str(run), *other)
    assert "--out" in line and str(run) in line and "another folder" in line
    assert weights_of(run) == before


def test_a_run_of_another_recipe_is_not_resumed(images, run, monkeypatch, capsys):
    before = weights_of(run)
    monkeypatch.setitem(RECIPES, "tiny", replace(TINY, repeats=4))
    assert train_main(images, run) == 2
    assert "'repeats': '1'" in capsys.readouterr().err and weights_of(run) == before


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--preset", "huge"], ["--preset", "huge", "tiny"]),
        (["--preset", "coco256"], ["--preset", "coco256", "autoencoder"]),
        (["--steps", "0"], ["--steps", "0 is out of range", "from 1 to"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--batch", "-4"], ["--batch", "-4 is"]),
        (["--accumulate", "3"], ["--accumulate", "3", "8"]),
        (["--autoencoder-steps", "1.5"], ["--autoencoder-steps", "'1.5'"]),
        (["--save-every", "0"], ["--save-every", "0 is"]),
        (["--learning-rate", "fast"], ["--learning-rate", "'fast'"]),
        (["--learning-rate", "-0.1"], ["--learning-rate", "-0.1 is"]),
        (["--learning-rate", "nan"], ["--learning-rate", "nan is"]),
        (["--seed", "-1"], ["--seed", "-1 is"]),
        (["--seed", "4294967296"], ["--seed", "4294967296 is", "4294967295"]),
        (["--steps", "²"], ["--steps", "'²'"]),
        (["--steps", "9" * 5000], ["--steps", "9" * 5000]),
        (["--seed", "²"], ["--seed", "'²'"]),
        (["--batch", "99999999999"], ["--batch", "99999999999 is", "65536"]),
        (["--device", "tpu"], ["--device", "'tpu'"]),
        (["--device", "cuda:99"], ["--device", "'cuda:99'"]),
        (["--dtype", "int8"], ["--dtype", "'int8'"]),
        (["--device", "cpu", "--dtype", "float16"], ["--dtype", "'float16' is not computed on a CPU"]),
        (["--data", "nowhere"], ["--data", "nowhere"]),
        (["--data", ""], ["--data", "''"]),
        (["--data", "x" * 5000], ["--data", "x" * 5000]),
        (["--autoencoder", ""], ["--autoencoder", "''"]),
        (["--autoencoder", "."], ["--autoencoder", "config.json"]),
        (["--init", ""], ["--init", "''"]),
        (["--init", "a\0b"], ["--init", "'a\\x00b'"]),
        (["--init", "x" * 5000], ["--init", "x" * 5000]),
        (["--init", __file__], ["--init", __file__, "; give "]),
        (["--sed", "1"], ["--sed"]),
    ],
    ids=lambda part: " ".join(part)[:30],
)
def test_bad_options_are_refused_before_anything_is_written(images, tmp_path, capsys, options, parts):
    line = refusal(capsys, *SHORT, "--data", str(images), "--out", str(tmp_path / "run"), *options)
    assert all(part[:50] in line for part in parts) and "; " in line, line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["", "file", "file/below", "x" * 300], ids=lambda out: out[:10])
def test_an_impossible_out_folder_is_refused_before_the_work(images, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(stages, "open_captioned", lambda *_: pytest.fail("started to work"))
    line = refusal(capsys, *SHORT, "--data", str(images), "--out", out)
    assert "--out: " in line and out[:4] in line and "; give " in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "content", ["", '{"preset"', "[" * 100_000, "[1]", '{"0": 5}', '{"0": []}'], ids=lambda c: c[:9]
)
@pytest.mark.parametrize("name", ["run.json", "data.json"])
def test_damaged_settings_of_a_run_are_named(images, tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content)
    line = refusal(capsys, *SHORT, "--data", str(images), "--out", str(tmp_path))
    assert f"--out: {tmp_path / name} cannot be read" in line and "; delete it" in line


def test_a_second_process_is_kept_out_of_a_run(images, tmp_path, capsys):
    with run_lock(tmp_path):
        line = refusal(capsys, *SHORT, "--data", str(images), "--out", str(tmp_path))
    assert f"--out: {tmp_path} is in use by another training process; wait" in line
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_full_disk_is_named_in_one_line(images, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "run.json")

    monkeypatch.setattr(stages, "write_atomically", full)
    line = refusal(capsys, *SHORT, "--data", str(images), "--out", str(tmp_path))
    assert "No space left on device: 'run.json'; fix this" in line


@pytest.mark.parametrize(
    ("predicted", "given"),
    [
        (("image", "text", "sketch"), [["text"], [], ["sketch"]]),
        (("image", "sketch"), [["text"]]),
        (("image", "text"), [["sketch"]]),
        (("text", "sketch"), []),
    ],
)
def test_sample_sheets_have_what_the_model_can_do(tmp_path, monkeypatch, predicted, given):
    class Asked(Exception):
        pass

    class FakeEngine(nullcontext):
        from_pretrained = classmethod(lambda cls, *_, **__: cls(cls()))

        def generate(self, requests):
            raise Asked([sorted(request.inputs) for request in requests])

    monkeypatch.setattr(denoiser, "Engine", FakeEngine)
    monkeypatch.setattr(denoiser, "_drawings", lambda *_: ["drawing.png"])
    drawn = PRESETS["tiny-sketch"]
    modalities = tuple(replace(m, depth=0, blocks_of="") for m in drawn.model.modalities)
    uvit = UViTConfig(tuple(m.name for m in modalities), predicted)
    model = replace(drawn.model, modalities=modalities, time_conditioning="token", uvit=uvit)
    times = "independent" if len(predicted) == 3 else "conditional"
    config = replace(drawn, model=model, diffusion=replace(drawn.diffusion, time_sampling=times))
    options = StageOptions(torch.device("cpu"), torch.float32)
    with pytest.raises(Asked) if given else nullcontext() as asked:
        denoiser._sample(tmp_path, 1, ["red cat"], None, config, 0, options)
    assert not given or asked.value.args == (given,)


def test_the_autoencoder_is_trained_on_sketches_too(images, tmp_path, monkeypatch):
    calls, drawn = [], autoencoder.sketch_levels
    monkeypatch.setattr(autoencoder, "sketch_levels", lambda *a: calls.append(a) or drawn(*a))
    monkeypatch.setattr(denoiser, "SKETCHES", 1)
    assert train_main(images, tmp_path, "--preset", "tiny-sketch", "--steps", "1") == 0
    assert 0 < len(calls) < 3 * 8


def test_modalities_of_other_names_are_trained_by_their_codecs(images, tmp_path, capsys):
    tiny, names = PRESETS["tiny"], {"image": "photo", "text": "words"}
    config = replace(
        tiny,
        model=replace(tiny.model, modalities=tuple(replace(m, name=names[m.name]) for m in tiny.model.modalities)),
        codecs={names[name]: codec for name, codec in tiny.codecs.items()},
        sampling=replace(tiny.sampling, order=("words", "photo")),
    )
    options = TrainOptions(images, tmp_path, "tiny", steps=1, autoencoder_steps=1, dtype="float32", config=config)
    stages.train(options)
    loaded = checkpoint.load(tmp_path / "checkpoint")
    assert loaded.config == config and "car" in loaded.codec("words").vocabulary
    assert (tmp_path / "denoiser" / "samples-0000001.png").exists()
    capsys.readouterr()
    assert train_main(images, tmp_path) == 2  # the same run with the preset's own config
    assert f"--out: {tmp_path} holds a run with" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["accelerate", "wandb"])
def test_a_tracker_without_its_package_is_refused_in_one_line(images, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setattr(tracking, "find_spec", lambda name: name != package or None)
    line = refusal(capsys, *SHORT, "--data", str(images), "--out", str(tmp_path / "run"), "--log", "wandb")
    assert f"--log: 'wandb' needs the package {package}, which is not installed; use pip install" in line
    assert not (tmp_path / "run").exists()


def test_plotting_without_matplotlib_is_refused_in_one_line(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages, "find_spec", lambda _: None)
    line = refusal(capsys, *SHORT, "--data", str(images), "--out", str(tmp_path / "run"))
    assert "matplotlib" in line and "pip install" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["matplotlib.figure", "gensim.models"])
def test_a_broken_package_is_found_before_any_work(images, tmp_path, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    line = refusal(capsys, *SHORT, "--data", str(images), "--out", str(tmp_path / "run"))
    assert f"the package {module.partition('.')[0]} cannot be imported" in line and not (tmp_path / "run").exists()
