"""`python -m engine.sample` in bulk: what it makes, of what, and that it resumes."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image
from sample_cases import assert_refused, sample_runner

from engine import Request
from engine.data.sample_files import read_samples
from engine.sample import _parser
from engine.sample_bulk import SETTINGS, SINGLE

run = pytest.fixture(sample_runner)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("red heart\n\ngreen tree\n")
    return file


def facts(folder: Path) -> list[dict]:
    return [json.loads(files["json"]) for _, files in read_samples(folder)]


def test_each_sample_is_that_of_its_prompt_and_seed_alone(run, prompts):
    done = run("--prompts", prompts, "--num", 5, "--seed", 7, "--batch", 2)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == "5 samples of 2 prompts, 0 cut to 6 words"
    assert "5 samples made and 0 found" in done.out
    made = list(read_samples(done.folder))
    assert [sorted(files) for _, files in made] == [["json", "png", "txt"]] * 5
    assert [files["txt"] for _, files in made] == [b"red heart", b"green tree"] * 2 + [b"red heart"]
    entries = facts(done.folder)
    assert [(e["index"], e["seed"], e["generated"]) for e in entries] == [(i, 7 + i, ["image"]) for i in range(5)]
    alone = run("--prompt", "green tree", "--seed", 10, out="alone")
    difference = alone.images()[0].astype(int) - Image.open(done.folder / "000003.png")
    assert abs(difference).max() <= 1


def test_a_run_of_two_processes_is_resumed_by_one(run, prompts, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = run("--prompts", prompts, "--num", 5)
    assert "process 1 of 2: 2 samples made" in done.out and len(facts(done.folder)) == 2
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    assert "3 samples made and 2 found" in run("--prompts", prompts, "--num", 5).out
    assert [e["index"] for e in facts(done.folder)] == [*range(5)]
    assert "0 samples made and 5 found" in run("--prompts", prompts, "--num", 5).out
    refused = run("--prompts", prompts, "--num", 5, "--steps", 3)
    assert refused.code == 2 and "holds a run with steps 2, this one has 3; give another folder" in refused.err


def test_joint_samples_and_shards(run):
    done = run("--joint", 3, "--shards", 2, "--quiet")
    assert (done.code, done.out, sorted(os.listdir(done.folder))) == (0, "", ["00000.tar", "00001.tar", "run.json"])
    made = list(read_samples(done.folder))
    assert [key for key, _ in made] == ["000000", "000001", "000002"]
    for entry, (_, files) in zip(facts(done.folder), made, strict=True):
        assert entry["generated"] == ["image", "text"] and files["txt"].decode() == entry["text"] and files["png"]


def test_images_are_described_and_damaged_ones_are_named(run, tmp_path):
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(3)],
        "annotations": [{"image_id": 10 + i, "caption": "a square"} for i in range(3)],
    }
    (tmp_path / "data" / "captions_val.json").write_text(json.dumps(content))
    done = run("--images", "data")
    assert done.code == 2 and "out is written, but 1 samples could not be made" in done.err
    assert [sorted(files) for _, files in read_samples(done.folder)] == [["json", "txt"], ["json"], ["json", "txt"]]
    entries = facts(done.folder)
    assert [e["image_id"] for e in entries] == ["10", "11", "12"] and "1.png" in entries[1]["error"]
    assert entries[0]["generated"] == ["text"]


def test_words_that_the_model_does_not_know_are_an_error_or_filled(run, tmp_path):
    content = {"annotations": [{"image_id": 5, "caption": "Red zebra, in the _ old tree of green cats"}]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    refused = run("--prompts", "captions.json")
    assert_refused(refused, "--prompts", "'zebra' (prompt 1 of captions.json) is not in the vocabulary")
    done = run("--prompts", "captions.json", "--unknown-words", "fill")
    assert done.out.splitlines()[0] == "1 samples of 1 prompts, 1 cut to 6 words"
    (entry,) = facts(done.folder)
    assert entry["prompt"] == "red zebra in the old tree" and entry["image_id"] == "5"
    assert (done.folder / "000000.txt").read_text() == entry["caption"] == content["annotations"][0]["caption"]


def test_holes_of_a_line_are_filled_in_and_its_text_is_the_sample_s(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("red _ tree")
    done = run("--prompts", "prompts.txt")
    (entry,) = facts(done.folder)
    assert entry["generated"] == ["image", "text"] and (done.folder / "000000.txt").read_text() == entry["text"]


@pytest.mark.parametrize(
    ("options", "option", "value"),
    [
        (["--num", 0], "--num", "0"),
        (["--shards", 5], "--shards", "5"),
        (["--shards", -1], "--shards", "-1"),
        (["--batch", 0], "--batch", "0"),
        (["--infill", "langevin", "--resample", 2], "--resample", "2"),
        (["--quantize", "fp8"], "--quantize", "fp8"),
        (["--seed", 2**64 - 1, "--num", 2], "--seed", str(2**64 - 1)),
        (["--prompt", "red"], "--prompt", "red"),
        (["--json"], "--json", "True"),
        (["--steps", 0], "--steps", "0"),
        (["--joint", 2], "--joint", "--prompts"),
    ],
)
def test_bad_options_of_a_bulk_run_are_refused(run, prompts, options, option, value):
    assert_refused(run("--prompts", prompts, *options), option, value)


def assert_out_refused(done, *parts):
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert all(part in done.err for part in ("--out: ", "give another folder", *parts)), done.err


def test_options_of_a_sample_are_all_used_or_refused_and_fixed_for_a_run(run, prompts, tiny_checkpoint, tmp_path):
    options = {action.dest for action in _parser()._actions} - {"help"}
    names = {field.name for field in fields(Request)} | {"quantize"}
    assert options & names <= {*SINGLE, *SETTINGS, "num", "seed", "adapter", "adapter_scale", "quantize"}
    assert run("--prompts", prompts).code == 0
    for option, value in (("--spacing", "power"), ("--inner-steps", 3), ("--step-size", 3.0)):
        assert_out_refused(run("--prompts", prompts, option, value), f"this one has {value!r}")
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert_out_refused(run("--prompts", prompts, checkpoint=other), "holds a run with checkpoint")


@pytest.mark.parametrize("shards", [0, 1])
def test_a_full_disk_is_named_and_the_run_is_resumed_once_there_is_room(run, prompts, monkeypatch, shards):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ["--prompts", prompts, "--shards", shards]
    for name in ("link", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(f"engine.data.sample_files.os.{name}", full)
            assert_out_refused(run(*arguments), "No space left on device")
    assert run(*arguments).code == 0
    folder = prompts.parent / "out"
    assert [e["index"] for e in facts(folder)] == [0, 1]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_prompts_may_come_from_a_pipe_and_have_lone_surrogates(run, tmp_path):
    def of(content: bytes):
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        try:
            return run("--prompts", f"/dev/fd/{reading}")
        finally:
            os.close(reading)

    done = of(b'{"annotations": [{"image_id": "\\ud800", "caption": "red \\ud800 heart"}]}')
    assert done.code == 0 and facts(done.folder)[0]["image_id"] == "\ud800"
    assert (done.folder / "000000.txt").read_text() == "red ? heart"
    assert_out_refused(of(b"red heart"), "holds a run with prompts")


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("0", "-1")])
def test_numbers_of_processes_that_cannot_be_are_refused(run, prompts, monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    done = run("--prompts", prompts)
    assert (done.code, done.err.count("\n"), done.folder.exists()) == (2, 1, False) and "use " in done.err


@pytest.mark.slow
def test_torchrun_starts_the_processes_of_a_run(tiny_checkpoint, prompts, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "engine.sample"]
    options = ["--checkpoint", tiny_checkpoint, "--prompts", prompts, "--count", 5, "--steps", 1, "--dtype", "float32"]
    command = [*command, *options, "--out", tmp_path / "out", "--shards", 3]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2: 3 samples made" in done.stdout and "process 1 of 2: 2 samples made" in done.stdout
    assert [e["index"] for e in facts(tmp_path / "out")] == [*range(5)]


def processes(folder: Path, *arguments) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "engine.sample", "--dtype", "float32", "--quiet", *map(str, arguments)]
    ranks = ({"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"} for rank in range(2))
    return [subprocess.Popen([*command, "--out", folder], cwd=ROOT, env=os.environ | rank) for rank in ranks]


@pytest.mark.slow
def test_of_two_processes_one_is_killed_and_started_again(tiny_checkpoint, prompts, tmp_path):
    out = tmp_path / "out"
    arguments = ("--checkpoint", tiny_checkpoint, "--prompts", prompts, "--num", 60, "--steps", 5, "--batch", 2)
    first, second = processes(out, *arguments)
    while not (out / "000005.json").exists():
        assert second.poll() is None
        time.sleep(0.05)
    time.sleep(random.Random(0).uniform(0, 0.1))
    second.send_signal(signal.SIGKILL)
    second.wait()
    assert first.wait() == 0
    assert [process.wait() for process in processes(out, *arguments)] == [0, 0]
    assert [e["index"] for e in facts(out)] == [*range(60)]
    assert not [name for name in os.listdir(out) if name.startswith(".")]


@pytest.mark.endurance
def test_thirty_thousand_samples_of_the_built_in_model(tmp_path):
    (tmp_path / "prompts.txt").write_text("red heart\nblue heart\ndog\nflag: japan\n")
    arguments = ("--prompts", tmp_path / "prompts.txt", "--num", 30_000, "--steps", 10, "--shards", 30)
    assert [process.wait() for process in processes(tmp_path / "out", *arguments)] == [0, 0]
    assert [key for key, _ in read_samples(tmp_path / "out")] == [f"{i:06d}" for i in range(30_000)]
