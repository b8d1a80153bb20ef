"""The folder that `python -m engine.sample` writes: what a run replaces, and what it never touches."""

import fcntl
import json
import os
import shutil

import pytest
from sample_cases import input_files, sample_runner

run = pytest.fixture(sample_runner)
inputs = pytest.fixture(scope="module")(input_files)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def symbolic(file):
    (file.parents[1] / "link.png").symlink_to(file)
    return "link.png"


def hard(file):
    (file.parents[1] / "hard.png").hardlink_to(file)
    return "hard.png"


def of_a_linked_folder(file):
    (file.parents[1] / "linked").symlink_to(file.parent)
    return f"linked/{file.name}"


@pytest.mark.parametrize(
    ("option", "spelled", "name"),
    [
        *(("--image", spelled, "0000.png") for spelled in (str, symbolic, hard, of_a_linked_folder, os.path.relpath)),
        *((option, str, "0000.png") for option in ("--mask", "--input", "--input-mask")),
        *(("--image", str, name) for name in ("0002.png", "grid.png")),  # the first would be removed
    ],
)
def test_a_file_that_is_read_is_never_replaced(run, inputs, option, spelled, name):
    done = run("--num", 3)
    before, file = contents(done.folder), spelled(done.folder / name)
    whole = {"--mask": ["--image", inputs / "noise.png"], "--input-mask": ["--input", f"image={inputs / 'noise.png'}"]}
    value = f"image={file}" if "input" in option else file
    refused = run("--num", 1, option, value, *whole.get(option, []))
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert f"{option}: {file} is a file that this run would replace; give another folder with --out" in refused.err
    assert contents(done.folder) == before


def test_files_of_a_checkpoint_are_never_replaced(run, tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "grid.png").symlink_to(copy / "text" / "vocabulary.json")
    refused = run("--num", 1, checkpoint=copy)
    assert refused.code == 2 and f"--checkpoint: {copy / 'text' / 'vocabulary.json'} is a file that" in refused.err


def test_images_may_be_read_from_the_folder_that_is_written(run, inputs, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(inputs / "noise.png", tmp_path / "out" / "0007.png")  # of no run: it is not listed
    before = contents(tmp_path / "out")
    assert run("--image", "out/0007.png").code == 0
    assert contents(tmp_path / "out").items() > before.items()


def test_a_folder_holds_the_last_run_and_what_no_run_has_written(run):
    folder = run("--num", 3).folder
    for name in ("0003.png", "0000.jpg", "notes.txt"):
        (folder / name).write_text("mine")
    assert run("--num", 2).code == 0
    names = {"0000.png", "0001.png", "grid.png", "samples.json"}
    assert set(contents(folder)) == names | {"0003.png", "0000.jpg", "notes.txt"}


@pytest.mark.parametrize(
    "record",
    [
        [{"image": "notes.txt"}, {"outputs": {"../outside": "0001-../outside.png"}}],
        [{"image": "../outside.png", "outputs": {"image": "../outside.png"}}],
        [{"image": "0001.png", "outputs": {}}],  # not the name of the first sample's image
        {"image": "0000.png"},
        [["image", "0001.png"]],
        [{"outputs": ["0000.png"]}],
        None,
    ],
)
def test_nothing_else_is_removed_whatever_the_record_says(run, tmp_path, record):
    folder = tmp_path / "out"
    (folder / "0001-..").mkdir(parents=True)
    others = [tmp_path / "outside.png", folder / "notes.txt", folder / "0001.png", folder / "0001-.." / "outside.png"]
    for file in others:
        file.write_text("mine")
    (folder / "samples.json").write_text(json.dumps(record))
    assert run("--num", 1).code == 0
    assert all(file.read_text() == "mine" for file in others)


@pytest.mark.parametrize("at", ["samples.json", "0000.png", "0003.png", "grid.png"])
def test_what_a_run_leaves_that_is_killed_at_the_end_is_replaced_by_the_next(run, monkeypatch, at):
    folder, replace = run("--num", 3).folder, os.replace

    def killed(source, target):
        if target.name == at:
            raise SystemExit(9)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        assert run("--num", 5).code == 9
    assert run("--num", 1).code == 0
    assert set(contents(folder)) == {"0000.png", "grid.png", "samples.json"}


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_run_has_left_is_removed_once_no_run_can_be_writing_it(run, tmp_path, monkeypatch, locks):
    left = tmp_path / "out" / ".writing-abc"
    left.mkdir(parents=True)
    (left / "0000.png").touch()
    waited = []

    def flock(descriptor, how):
        waited.append((os.path.samestat(os.fstat(descriptor), os.stat("out")), how, left.exists()))
        if not locks:
            raise OSError(9, "Bad file descriptor")  # as on NFS

    monkeypatch.setattr("fcntl.flock", flock)
    assert run("--num", 1).code == 0
    assert waited == [(True, fcntl.LOCK_EX, True)] and left.exists() is not locks
