"""`engine.train --evaluate-every`: scores on held-out images that change nothing of the training."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from train_cases import Killed, captioned_images, small_sample_sheets

from engine import train
from engine.data.sources import open_captioned
from engine.training import evaluations
from engine.training.evaluations import Evaluations
from engine.training.files import CURVE
from engine.training.options import TrainOptions

SHORT = ["--preset", "tiny", "--steps", "4", "--autoencoder-steps", "1", "--save-every", "1", "--dtype", "float32"]


EVALUATED = ["--evaluate-every", "2", "--evaluate-samples", "3"]


@pytest.fixture(scope="module", autouse=True)
def short_samples():
    with small_sample_sheets(1) as patch:
        patch.setattr(evaluations, "JOINT_SAMPLES", 2)
        patch.setattr(evaluations, "HOW", replace(evaluations.HOW, steps=2))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images, of which four are held out, one with captions of more words than the model takes."""
    folder = captioned_images(tmp_path_factory.mktemp("images"))
    content = json.loads((folder / "captions.json").read_text())
    for caption in content["annotations"]:
        if caption["image_id"] == 9:
            caption["caption"] = "red car at night " * 3
    for name, part in {"captions.json": content["images"][:8], "captions_test.json": content["images"][8:]}.items():
        ids = {image["id"] for image in part}
        captions = [caption for caption in content["annotations"] if caption["image_id"] in ids]
        (folder / name).write_text(json.dumps({"images": part, "annotations": captions}))
    return folder


def train_main(images, run, *options):
    return train.main([*SHORT, "--data", str(images), "--out", str(run), *options])


def rows_of(run):
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train_main(images, folder, *EVALUATED) == 0
    return folder


def test_scores_of_held_out_images_come_every_so_many_steps_and_change_no_loss(images, run, tmp_path):
    assert [row["step"] for row in rows_of(run)] == [2, 4]
    for row in rows_of(run):
        assert row["test"]["count"] == 4 and row["joint"]["count"] == 2
        assert row["test"]["infill_rmse"] > 0 and 0 <= row["test"]["word_f1"] <= 1
        scores = row["samples"]
        assert {"FD(built-in autoencoder)", "BLEU-4", "CIDEr", "perplexity of 3-grams", "distinct-1"} <= set(scores)
        for score in scores.values():
            assert score["low"] <= score["value"] <= score["high"] and score["count"] in (3, 2, 1), scores
    assert train_main(images, tmp_path / "plain") == 0
    curves = [(folder / "denoiser" / CURVE).read_text() for folder in (run, tmp_path / "plain")]
    assert curves[0] == curves[1] and not (tmp_path / "plain" / "evaluation.jsonl").exists()


def test_a_step_is_evaluated_once_also_when_the_run_is_killed_meanwhile(images, run, tmp_path, monkeypatch):
    evaluate, steps = evaluations.evaluate, []

    def dying(*arguments):
        steps.append(len(steps))
        if len(steps) == 1:
            raise Killed
        return evaluate(*arguments)

    monkeypatch.setattr(evaluations, "evaluate", dying)
    with pytest.raises(Killed):
        train_main(images, tmp_path / "run", *EVALUATED)
    for _ in range(2):  # to the end, and again, which finds it done
        assert train_main(images, tmp_path / "run", *EVALUATED) == 0
    assert len(steps) == 3 and rows_of(tmp_path / "run") == rows_of(run)


def test_rows_of_lost_steps_are_dropped_and_numbers_are_reported(images, run, tmp_path):
    reported = []
    copy = shutil.copytree(run, tmp_path / "run")
    options = TrainOptions(data=images, out=copy, preset="tiny", save_every=2, evaluate_every=2, evaluate_samples=3)
    found = Evaluations(options, open_captioned(images))
    found.begin(3)
    assert [row["step"] for row in rows_of(copy)] == [2]
    assert [step for step in range(5) if found.is_due(step, last=step == 3)] == [3, 4]

    class Recorder:
        def log(self, step, values):
            reported.append((step, values))

    found.run(4, copy / "checkpoint", torch.device("cpu"), torch.float32, Recorder())
    assert rows_of(copy) == rows_of(run)
    ((step, values),) = reported
    assert step == 4 and values["evaluation/test word_f1"] == rows_of(run)[1]["test"]["word_f1"]
    assert values["evaluation/samples CIDEr"] == rows_of(run)[1]["samples"]["CIDEr"]["value"]
    assert "evaluation/joint nearest_rmse" in values and all(isinstance(value, float) for value in values.values())


@pytest.mark.parametrize("content", ["{", "[]\n", '{"test": {}}\n'], ids=["cut", "list", "no step"])
def test_a_damaged_file_of_scores_is_named(images, run, tmp_path, capsys, content):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "evaluation.jsonl").write_text(content)
    assert train_main(images, copy, "--evaluate-every", "2") == 2
    line = capsys.readouterr().err
    assert f"--out: {copy / 'evaluation.jsonl'} cannot be read" in line


def test_held_out_images_that_are_all_damaged_are_refused_before_any_work(images, tmp_path, capsys):
    """Those that are drawn from: the first and the third of four."""
    data = shutil.copytree(images, tmp_path / "data")
    for name in ("8.png", "10.png"):
        (data / "images" / name).write_bytes(b"damaged")
    options = ("--evaluate-every", "2", "--evaluate-samples", "2")
    assert train_main(data, tmp_path / "run", *options) == 2
    assert "has no readable test image" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_data_without_held_out_images_is_refused_before_any_work(images, tmp_path, capsys):
    data = shutil.copytree(images, tmp_path / "data")
    (data / "captions_test.json").unlink()
    assert train_main(data, tmp_path / "run", "--evaluate-every", "2") == 2
    line = capsys.readouterr().err
    assert (
        line.startswith(f"python -m engine.train: --data: {data} has no captions_test.json") and line.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()
