"""`engine.train` from end to end: three stages on twelve random pictures, killed, resumed and refused."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine import checkpoint, train
from engine.config import PRESETS
from engine.recipes import TINY
from engine.training import CURVE, STATE, taken


class Killed(BaseException):
    """What a process does not survive."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    generator, captions = torch.Generator().manual_seed(0), ["red car", "blue car", "red dog at night"]
    for i in range(12):
        pixels = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((40, 36)).save(folder / "images" / f"{i}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(12)],
        "annotations": [{"image_id": i, "caption": captions[(i + k) % 3]} for i in range(12) for k in range(2)],
    }
    (folder / "captions.json").write_text(json.dumps(content))
    return folder


SHORT = ["--preset", "tiny", "--steps", "4", "--autoencoder-steps", "3", "--save-every", "2", "--dtype", "float32"]


def train_main(pictures, run, *options):
    return train.main([*SHORT, "--data", str(pictures), "--out", str(run), *options])


def weights_of(run):
    return (run / "checkpoint" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train_main(pictures, folder) == 0
    return folder


def test_a_run_leaves_a_checkpoint_curves_and_pictures(run):
    loaded = checkpoint.load(run / "checkpoint")
    assert loaded.config == PRESETS["tiny"] and {"red", "car", "night"} <= set(loaded.text.vocabulary)
    for stage, steps in (("autoencoder", 3), ("denoiser", 4)):
        rows = [json.loads(line) for line in (run / stage / CURVE).read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        with Image.open(run / stage / "curve.png") as picture:
            picture.verify()
    assert {p.name for p in (run / "denoiser").glob("samples-*.png")} == {"samples-0000002.png", "samples-0000004.png"}
    assert (run / "autoencoder" / "samples.png").exists()


def test_pictures_of_rare_words_are_shown_more_often_but_none_is_left_out():
    captions = ["ghost", *["person, tall"] * 3, *["person, short"] * 30, "", "Ghost house"]
    shown = Counter(train.with_repeats(captions, 4))
    assert set(shown) == set(range(len(captions)))
    assert shown[0] == 3 and shown[35] == 4  # two captions have "ghost", one has "house": 4/√2, 4/√1
    assert [shown[i] for i in (1, 4, 34)] == [2, 1, 1]  # 4/√3, 4/√30
    assert train.with_repeats(captions, 1) == list(range(len(captions)))


def test_how_captions_and_rare_words_count_is_the_recipes(pictures, tmp_path, monkeypatch):
    seen = {}
    for name, recipe in {"plain": {}, "alike": {"captions_alike": True}, "repeated": {"repeats": 4}}.items():
        monkeypatch.setitem(train.RECIPES, "tiny", replace(TINY, **recipe))
        assert train_main(pictures, tmp_path / name) == 0
        seen[name] = [json.loads(row) for row in (tmp_path / name / "denoiser" / CURVE).read_text().splitlines()]
    assert seen["alike"][0]["text"] != seen["plain"][0]["text"]
    assert seen["alike"][0]["image"] == seen["plain"][0]["image"]
    assert seen["repeated"][0] != seen["plain"][0]


def test_a_finished_run_started_again_changes_nothing(pictures, run):
    before, state = weights_of(run), (run / "denoiser" / STATE).read_bytes()
    assert train_main(pictures, run) == 0
    assert weights_of(run) == before and (run / "denoiser" / STATE).read_bytes() == state


KILLED_AT = {  # a function of a run, and the call of it during which the run dies
    "autoencoder": ("autoencoder_losses", 2),
    "words": ("TextCodec.save", 1),
    "latents": ("cache_latents", 1),
    "denoiser": ("DenoisingLoss.__call__", 4),
    "export": ("checkpoint.save", 1),
}


def test_a_run_killed_in_every_stage_ends_in_the_same_model(pictures, run, tmp_path, monkeypatch):
    for name, call in KILLED_AT.values():
        with monkeypatch.context() as patch:
            owner, _, attribute = f"engine.train.{name}".rpartition(".")
            target = train if owner == "engine.train" else getattr(train, owner.rpartition(".")[2])
            original, calls = getattr(target, attribute), [0]

            def dying(*args, original=original, calls=calls, call=call, **options):
                calls[0] += 1
                if calls[0] == call:
                    raise Killed
                return original(*args, **options)

            patch.setattr(target, attribute, dying)
            with pytest.raises(Killed):
                train_main(pictures, tmp_path / "run")
    assert train_main(pictures, tmp_path / "run") == 0
    assert weights_of(tmp_path / "run") == weights_of(run)
    for stage in ("autoencoder", "denoiser"):
        assert (tmp_path / "run" / stage / CURVE).read_text() == (run / stage / CURVE).read_text()


def test_word_vectors_cut_off_by_a_kill_are_made_again(pictures, run, tmp_path, monkeypatch):
    def half(codec, folder):
        folder.mkdir(parents=True)
        (folder / "vocabulary.json").write_text("[")
        (folder / "vectors.safetensors").write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.TextCodec, "save", half)
        train_main(pictures, tmp_path)
    assert train_main(pictures, tmp_path) == 0
    assert weights_of(tmp_path) == weights_of(run)


def test_a_u_vit_is_trained_and_a_ps_u_net_goes_on_from_it(pictures, tmp_path):
    options = [*SHORT, "--data", str(pictures), "--out"]
    assert train.main([*options, str(tmp_path / "u-vit"), "--preset", "uvit-tiny"]) == 0
    source = checkpoint.load(tmp_path / "u-vit" / "checkpoint")
    assert source.config == PRESETS["uvit-tiny"]
    init = ["--init", str(tmp_path / "u-vit" / "checkpoint"), "--steps", "1", "--learning-rate", "1e-9"]
    assert train.main([*options, str(tmp_path / "run"), *init]) == 0
    loaded = checkpoint.load(tmp_path / "run" / "checkpoint")
    assert loaded.config == PRESETS["tiny"]
    # tiny has one block before the shared ones, of which one is left unmatched
    torch.testing.assert_close(loaded.model.shared_middle[0].fc1.weight, source.model.middle.fc1.weight)


def refusal(capsys, *arguments):
    """The one line on stderr of a refused command."""
    capsys.readouterr()
    try:
        status = train.main(list(arguments))
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("python -m engine.train: "), lines
    return lines[0]


@pytest.mark.parametrize("other", [["--seed", "1"], ["--preset", "emoji"]], ids=str)
def test_a_run_of_other_settings_is_not_overwritten(pictures, run, capsys, other):
    before = weights_of(run)
    line = refusal(capsys, *SHORT, "--data", str(pictures), "--out", str(run), *other)
    assert "--out" in line and str(run) in line and "another folder" in line
    assert weights_of(run) == before


def test_a_run_of_another_recipe_is_not_mixed_with_its_own(pictures, run, monkeypatch, capsys):
    before = weights_of(run)
    monkeypatch.setitem(train.RECIPES, "tiny", replace(TINY, repeats=4))
    assert train_main(pictures, run) == 2
    assert "'repeats': '1'" in capsys.readouterr().err and weights_of(run) == before


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--preset", "huge"], ["--preset", "huge", "tiny"]),
        (["--preset", "coco256"], ["--autoencoder", "coco256"]),
        (["--steps", "0"], ["--steps", "'0'"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--batch", "-4"], ["--batch", "'-4'"]),
        (["--accumulate", "3"], ["--accumulate", "3", "8"]),
        (["--autoencoder-steps", "1.5"], ["--autoencoder-steps", "'1.5'"]),
        (["--save-every", "0"], ["--save-every", "'0'"]),
        (["--learning-rate", "fast"], ["--learning-rate", "'fast'"]),
        (["--learning-rate", "-0.1"], ["--learning-rate", "'-0.1'"]),
        (["--learning-rate", "nan"], ["--learning-rate", "'nan'"]),
        (["--seed", "-1"], ["--seed", "'-1'"]),
        (["--seed", "4294967296"], ["--seed", "'4294967296'"]),
        (["--steps", "²"], ["--steps", "'²'", "whole number"]),
        (["--steps", "9" * 5000], ["--steps", "9" * 5000, "whole number"]),
        (["--seed", "²"], ["--seed", "'²'", "whole number"]),
        (["--batch", "99999999999"], ["--batch", "'99999999999'", "65536"]),
        (["--device", "tpu"], ["--device", "'tpu'"]),
        (["--device", "cuda:99"], ["--device", "'cuda:99'"]),
        (["--dtype", "int8"], ["--dtype", "'int8'"]),
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
def test_bad_options_are_refused_before_anything_is_written(pictures, tmp_path, capsys, options, parts):
    line = refusal(capsys, *SHORT, "--data", str(pictures), "--out", str(tmp_path / "run"), *options)
    assert all(part in line for part in parts) and "; " in line, line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["", "file", "file/below", "x" * 300], ids=lambda out: out[:10])
def test_an_impossible_out_folder_is_refused_before_the_work(pictures, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(train.CocoCaptions, "open", lambda *_: pytest.fail("worked in vain"))
    line = refusal(capsys, *SHORT, "--data", str(pictures), "--out", out)
    assert "--out: " in line and out[:4] in line and "; give " in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", ["", '{"preset"', "[" * 100_000], ids=["empty", "truncated", "deep"])
def test_damaged_settings_of_a_run_are_named(pictures, tmp_path, capsys, content):
    (tmp_path / "run.json").write_text(content)
    line = refusal(capsys, *SHORT, "--data", str(pictures), "--out", str(tmp_path))
    assert f"--out: {tmp_path / 'run.json'} cannot be read" in line and "; delete it" in line


def test_a_second_process_is_kept_out_of_a_run(pictures, tmp_path, capsys):
    with taken(tmp_path):
        line = refusal(capsys, *SHORT, "--data", str(pictures), "--out", str(tmp_path))
    assert f"--out: another process trains in {tmp_path}; wait" in line
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_full_disk_is_named_in_one_line(pictures, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "run.json")

    monkeypatch.setattr(train, "write_atomically", full)
    line = refusal(capsys, *SHORT, "--data", str(pictures), "--out", str(tmp_path))
    assert "No space left on device: 'run.json'; once" in line


def test_words_that_a_start_does_not_know_are_named(pictures, run, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "pictures")
    captions = tmp_path / "pictures" / "captions.json"
    captions.write_text(captions.read_text().replace("night", "noon"))
    options = ["--out", str(tmp_path / "new"), "--init", str(run / "checkpoint")]
    line = refusal(capsys, *SHORT, "--data", str(tmp_path / "pictures"), *options)
    assert "--data: 'noon' is not in the vocabulary; give" in line


def test_an_autoencoder_that_does_not_fit_is_refused(pictures, run, tmp_path, capsys):
    options = ["--preset", "emoji", "--autoencoder", str(run / "checkpoint" / "image")]
    line = refusal(capsys, *SHORT, "--data", str(pictures), "--out", str(tmp_path), *options)
    assert "--autoencoder" in line and "tokens" in line


def test_a_given_autoencoder_is_taken_over(pictures, run, tmp_path):
    given = run / "checkpoint" / "image"
    assert train_main(pictures, tmp_path, "--autoencoder", str(given)) == 0
    name = Path("checkpoint", "image", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    assert not (tmp_path / "autoencoder").exists() and weights_of(tmp_path) == weights_of(run)


def test_a_run_starts_from_a_checkpoint(pictures, run, tmp_path):
    source, new = run / "checkpoint", tmp_path / "new"
    assert train_main(pictures, new, "--init", str(source), "--learning-rate", "1e-9") == 0
    for part in ("image", "text"):
        for file in (source / part).iterdir():
            assert (new / "checkpoint" / part / file.name).read_bytes() == file.read_bytes()
    before, after = (checkpoint.load(folder).model.state_dict() for folder in (source, new / "checkpoint"))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-5, rtol=0)


def test_a_checkpoint_of_another_shape_is_no_start(pictures, run, tmp_path, capsys):
    options = ["--preset", "emoji", "--data", str(pictures), "--out", str(tmp_path / "new")]
    assert train.main([*options, "--init", str(run / "checkpoint")]) == 2
    assert "--init" in capsys.readouterr().err and not (tmp_path / "new").exists()
