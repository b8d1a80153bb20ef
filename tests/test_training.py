"""`Stage`: exact resume after a kill at any moment; what is saved, damaged, refused and locked."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from engine.errors import InputError
from engine.training import files
from engine.training.files import CURVE, DELETING, PROGRESS, SETTINGS, WRITING, StageFiles
from engine.training.recipes import StageConfig
from engine.training.stage import Stage, run_lock

CONFIG = StageConfig(steps=8, batch=4, learning_rate=0.05, warmup=3, seed=5)
LONG = replace(CONFIG, steps=150)
SAMPLES = 10


class Killed(BaseException):
    """Ends the process: nothing catches it."""


def module():
    generator = torch.Generator().manual_seed(3)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    for p in layers.parameters():
        p.data.normal_(generator=generator)
    return layers


X = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(4))


def draw(generator, indices):
    """Fixed samples with noise from the step's generator, and what their sums are."""
    return X[indices] + 0.1 * torch.randn(len(indices), 3, generator=generator), X[indices].sum(1)


def losses_of(model):
    """Of a regression."""

    def losses(batch, part):
        inputs, sums = batch
        error = model(inputs[part])[:, 0] - sums[part]
        return {"squared": error.square().sum() / len(sums), "absolute": 0.1 * error.abs().sum() / len(sums)}

    return losses


def stage_in(folder, config=CONFIG, keep=1):
    return Stage(folder, module(), config, SAMPLES, torch.float32, keep=keep)


def train_in(folder, config=CONFIG, save_every=2, preview=None):
    """Starts or resumes a stage, and finishes it."""
    stage = stage_in(folder, config)
    stage.run(draw, losses_of(stage.module), save_every, preview)
    return stage


def outcome(stage):
    """What must not depend on whether training was interrupted."""
    weights = {f"{kind}.{k}": v for kind in ("module", "average") for k, v in getattr(stage, kind).state_dict().items()}
    moments = stage.optimizer.state_dict()["state"]
    weights |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for i, state in moments.items() for k, v in state.items()}
    return stage.step, stage.curve, {name: tensor.tolist() for name, tensor in weights.items()}


def state_in(folder):
    """The folder of the last state."""
    return StageFiles(folder).states[-1]


def part_of(state):
    """The file of the only process."""
    (file,) = state.glob("*.safetensors")
    return file


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return outcome(train_in(tmp_path_factory.mktemp("uninterrupted")))


def test_the_curve_has_every_step_once(uninterrupted):
    step, curve, _ = uninterrupted
    assert step == 8 and [row["step"] for row in curve] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(set(row) == {"step", "squared", "absolute"} for row in curve)


@pytest.mark.parametrize("killed_after", range(8))
def test_a_stage_stopped_after_any_step_resumes_exactly(tmp_path, uninterrupted, killed_after):
    stage, count = stage_in(tmp_path), 0
    losses = losses_of(stage.module)

    def dying(batch, part):
        nonlocal count
        if count == killed_after:
            raise Killed
        count += 1
        return losses(batch, part)

    with pytest.raises(Killed):
        stage.run(draw, dying, save_every=3)
    resumed = stage_in(tmp_path)
    assert resumed.step == killed_after // 3 * 3 and len(resumed.curve) == resumed.step
    assert outcome(train_in(tmp_path, save_every=3)) == uninterrupted


@pytest.mark.parametrize("moment", ["half written", "written", "renamed"])
@pytest.mark.parametrize("write", range(9))  # the curve once, settings and progress of four saves
def test_a_stage_killed_at_any_write_resumes_exactly(tmp_path, uninterrupted, monkeypatch, write, moment):
    replace_file, count = os.replace, 0

    def dying(temporary, path):
        nonlocal count
        if count < write or moment == "renamed":
            replace_file(temporary, path)
        elif moment == "half written":
            os.truncate(temporary, temporary.stat().st_size // 2)
        if count == write:
            raise Killed
        count += 1

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("engine.files.os.replace", dying)
        train_in(tmp_path)
    assert outcome(train_in(tmp_path)) == uninterrupted
    assert [path.name for path in tmp_path.glob("*state*")] == ["state-0000000008"]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("call", range(7))  # a state gets its name in four saves, an earlier one is removed in three
def test_a_stage_killed_while_states_change_places_resumes_exactly(tmp_path, uninterrupted, monkeypatch, call, moment):
    rename, count = Path.rename, 0

    def dying(path, target):
        nonlocal count
        count += 1
        if count == call + 1 and moment == "before":
            raise Killed
        rename(path, target)
        if count == call + 1:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", dying)
        train_in(tmp_path)
    assert outcome(train_in(tmp_path)) == uninterrupted
    assert state_in(tmp_path).name == "state-0000000008"


@pytest.mark.parametrize("save", range(4))
def test_a_stage_killed_while_it_writes_tensors_resumes_exactly(tmp_path, uninterrupted, monkeypatch, save):
    """What is left of them, here also of a second process, has no part in a later state."""
    count = 0

    def dying(tensors, metadata):
        nonlocal count
        count += 1
        if count == save + 1:
            for process in (1, 2):
                file = tmp_path / WRITING / f"shard-0000{process}-model-00001-of-00001.safetensors"
                file.write_bytes(safetensors.torch.save(tensors, metadata))
            raise Killed
        return write(tensors, metadata)

    write = safetensors.torch.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("safetensors.torch.save", dying)
        train_in(tmp_path)
    assert outcome(train_in(tmp_path)) == uninterrupted
    assert part_of(state_in(tmp_path))


def test_a_killed_process_resumes_exactly(tmp_path):
    """SIGKILL at a random moment: while it is computing, writing or renaming."""
    program = "import pathlib, sys, test_training as t; t.train_in(pathlib.Path(sys.argv[1]), t.LONG, save_every=1)"
    here = Path(__file__).parent
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "killed")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
        stderr=subprocess.DEVNULL,
    ) as victim:
        while not any((tmp_path / "killed").glob("state-*")) and victim.poll() is None:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    assert outcome(train_in(tmp_path / "killed", LONG, 50)) == outcome(train_in(tmp_path / "whole", LONG, 50))


def test_a_finished_stage_does_not_train_again(tmp_path, uninterrupted):
    train_in(tmp_path)
    written = state_in(tmp_path).stat().st_mtime_ns
    stage = stage_in(tmp_path)

    def never(*_):
        raise AssertionError("trained again")

    stage.run(never, never, 1)
    assert stage.done and outcome(stage) == uninterrupted and state_in(tmp_path).stat().st_mtime_ns == written


def test_a_stage_killed_while_it_appends_to_the_curve_resumes_exactly(tmp_path, uninterrupted):
    train_in(tmp_path, replace(CONFIG, steps=4))
    with open(tmp_path / CURVE, "a") as file:
        file.write('{"step": 5, "squared": 1.0}\n{"step": 6, "squ')
    assert outcome(train_in(tmp_path)) == uninterrupted
    assert len((tmp_path / CURVE).read_text().splitlines()) == 8


def test_training_goes_on_while_the_state_is_written(tmp_path, uninterrupted, monkeypatch):
    later, stage = threading.Event(), stage_in(tmp_path)

    def waiting(tensors, metadata):
        assert later.wait(60)
        return write(tensors, metadata)

    def drawing(generator, indices):
        if stage.step == 6:
            assert not any(tmp_path.glob("state-*"))
            later.set()
            raise Killed
        return draw(generator, indices)

    write = safetensors.torch.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("safetensors.torch.save", waiting)
        stage.run(drawing, losses_of(stage.module), 5)
    assert stage_in(tmp_path).step == 5
    assert outcome(train_in(tmp_path)) == uninterrupted


@pytest.mark.parametrize("failure", [Killed, FloatingPointError])
def test_what_fails_after_a_save_does_not_lose_it(tmp_path, failure):
    def failing(step, weights):
        if step == 6:
            raise failure

    with pytest.raises(failure):
        train_in(tmp_path, save_every=3, preview=failing)
    assert stage_in(tmp_path).step == 6


def test_a_full_disk_stops_the_stage_and_leaves_the_last_state_intact(tmp_path, uninterrupted, monkeypatch):
    train_in(tmp_path, replace(CONFIG, steps=4))

    def full(tensors, metadata):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("safetensors.torch.save", full)
        train_in(tmp_path, save_every=1)
    assert not (tmp_path / WRITING).exists()
    assert stage_in(tmp_path).step == 4
    assert outcome(train_in(tmp_path)) == uninterrupted


def test_the_last_states_are_kept_and_can_be_resumed_from(tmp_path, uninterrupted):
    stage = stage_in(tmp_path, keep=3)
    stage.run(draw, losses_of(stage.module), 1)
    assert [path.name for path in StageFiles(tmp_path).states] == [f"state-000000000{step}" for step in (6, 7, 8)]
    part_of(state_in(tmp_path)).write_bytes(b"damaged")
    with pytest.raises(InputError, match="is damaged .*; delete it to resume from state-0000000007"):
        stage_in(tmp_path)
    shutil.rmtree(state_in(tmp_path))
    assert stage_in(tmp_path).step == 7
    assert outcome(train_in(tmp_path)) == uninterrupted


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_state_is_named(tmp_path, keep):
    train_in(tmp_path)
    file = part_of(state_in(tmp_path))
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=f"^folder: .*damaged .{file.name} has .* bytes.*delete it") as error:
        stage_in(tmp_path)
    assert error.value.value == state_in(tmp_path)


def test_a_state_without_the_part_of_a_process_is_named(tmp_path):
    train_in(tmp_path)
    (file := part_of(state_in(tmp_path))).unlink()
    with pytest.raises(InputError, match=f"^folder: .* is damaged .{file.name} is missing.; delete it to") as error:
        stage_in(tmp_path)
    assert error.value.value == state_in(tmp_path)


@pytest.mark.parametrize("where", ["length", "header"])
def test_a_state_whose_bytes_have_changed_is_named(tmp_path, where):
    train_in(tmp_path)
    file = part_of(state_in(tmp_path))
    data = bytearray(file.read_bytes())
    place = 7 if where == "length" else data.index(b"saved_offsets") + 20  # within the list of numbers there
    data[place] = 0xFF if where == "length" else ord("x")
    file.write_bytes(data)
    with pytest.raises(InputError, match="^folder: .*is damaged.*delete it"):
        stage_in(tmp_path)


@pytest.mark.parametrize(
    "change",
    ["", "5", "[]", "{}", "[" * 100_000, {"step": "8"}, {"step": 8.5}, {"step": 7}, {"step": True}, {"config": 1},
     {"files": 5}, None],
    ids=str,
)  # fmt: skip
def test_damaged_progress_is_named(tmp_path, change):
    train_in(tmp_path)
    file = state_in(tmp_path) / PROGRESS
    if isinstance(change, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    elif change is None:
        file.unlink()
    else:
        file.write_text(change)
    with pytest.raises(InputError, match="^folder: .*is damaged.*delete it to restart"):
        stage_in(tmp_path)


def test_what_else_is_in_the_folder_is_neither_taken_for_a_state_nor_removed(tmp_path, uninterrupted):
    others = ["state-backup", "state-0000000004.bak", "state-0.tar", "state-abc", "state-9999999999"]
    train_in(tmp_path, replace(CONFIG, steps=4))
    for name in others[:2]:
        shutil.copytree(state_in(tmp_path), tmp_path / name)
    for name in others[2:]:
        (tmp_path / name).touch()
    for name in (WRITING, DELETING):  # as no run of this version leaves them
        (tmp_path / name).touch()
    assert outcome(train_in(tmp_path)) == uninterrupted
    assert {path.name for path in tmp_path.glob("*state*")} == {*others, "state-0000000008"}


def test_a_state_may_be_a_link(tmp_path, uninterrupted):
    train_in(tmp_path / "run", replace(CONFIG, steps=4))
    state = state_in(tmp_path / "run")
    state.rename(tmp_path / "elsewhere")
    state.symlink_to(tmp_path / "elsewhere")
    assert stage_in(tmp_path / "run").step == 4
    assert outcome(train_in(tmp_path / "run")) == uninterrupted
    assert not state.is_symlink() and part_of(tmp_path / "elsewhere")


def test_large_states_are_written_in_several_files(tmp_path, uninterrupted, monkeypatch):
    """While safetensors puts a file together no other thread runs."""
    monkeypatch.setattr(files, "PART", 64)
    train_in(tmp_path, replace(CONFIG, steps=4))
    assert len(list(state_in(tmp_path).glob("*.safetensors"))) > 4
    assert outcome(train_in(tmp_path)) == uninterrupted


def test_a_state_of_version_0_1_is_not_passed_over(tmp_path):
    (tmp_path / "state.safetensors").touch()
    with pytest.raises(InputError, match="written by version 0.1; use another folder, and --init"):
        stage_in(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "", "5\n", "[1]\n", '{"step": "1"}\n', "[" * 100_000])
@pytest.mark.parametrize("name", [CURVE, SETTINGS])
def test_damaged_rows_are_named(tmp_path, name, damage):
    train_in(tmp_path)
    curve = tmp_path / name
    if damage == "missing":
        curve.unlink()
    else:
        curve.write_text(curve.read_text()[:-20] if damage == "truncated" else damage)
    with pytest.raises(InputError, match=f"(does not exist|is damaged).*; delete {state_in(tmp_path)}") as error:
        stage_in(tmp_path)
    assert error.value.value == curve


def test_a_state_of_another_model_is_refused_by_name(tmp_path):
    train_in(tmp_path)
    with pytest.raises(InputError, match="another shape") as error:
        Stage(tmp_path, nn.Linear(3, 1), CONFIG, SAMPLES, torch.float32)
    assert error.value.value == state_in(tmp_path)


def test_a_stage_of_other_settings_is_refused(tmp_path):
    train_in(tmp_path)
    with pytest.raises(InputError, match="with batch 4, clip 1.0, not batch 5, clip 2.0; use the same settings"):
        stage_in(tmp_path, replace(CONFIG, batch=5, clip=2.0, steps=20))


def settings_in(folder):
    rows = [json.loads(line) for line in (folder / SETTINGS).read_text().splitlines()]
    return [(row["step"], row["learning_rate"], row["steps"]) for row in rows]


def test_after_a_divergence_a_stage_resumes_with_a_lower_learning_rate(tmp_path, uninterrupted):
    stage = stage_in(tmp_path)
    losses = losses_of(stage.module)

    def diverging(batch, part):
        return {name: loss * (math.inf if stage.step == 5 else 1) for name, loss in losses(batch, part).items()}

    def dying(step, weights):
        raise Killed

    with pytest.raises(FloatingPointError, match="use a lower learning rate and resume"):
        stage.run(draw, diverging, 1)
    assert settings_in(tmp_path) == [(0, 0.05, 8)]
    lower = replace(CONFIG, learning_rate=0.01, steps=10)
    shutil.copytree(tmp_path, tmp_path / "killed")
    resumed = train_in(tmp_path, lower)
    assert resumed.curve[:5] == uninterrupted[1][:5] and len(resumed.curve) == 10
    assert resumed.optimizer.param_groups[0]["lr"] == lower.learning_rate_at(9)
    assert settings_in(tmp_path) == [(0, 0.05, 8), (5, 0.01, 10)]

    stage_in(tmp_path / "killed", replace(CONFIG, learning_rate=1.0))  # ends before it has saved anything
    with pytest.raises(Killed):
        train_in(tmp_path / "killed", lower, preview=dying)
    assert outcome(train_in(tmp_path / "killed", lower)) == outcome(resumed)
    assert settings_in(tmp_path / "killed") == settings_in(tmp_path)


@pytest.mark.parametrize("moment", [SETTINGS, PROGRESS])
def test_settings_of_steps_that_were_not_saved_are_not_recorded(tmp_path, monkeypatch, moment):
    train_in(tmp_path, replace(CONFIG, steps=4))
    replace_file = os.replace

    def dying(temporary, path):
        if path.name == moment:
            raise Killed
        replace_file(temporary, path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("engine.files.os.replace", dying)
        train_in(tmp_path, replace(CONFIG, learning_rate=1.0))
    train_in(tmp_path, CONFIG)
    assert settings_in(tmp_path) == [(0, 0.05, 4), (4, 0.05, 8)]


def test_one_process_trains_in_a_folder_until_it_ends(tmp_path):
    program = (
        "import pathlib, sys, engine.training.stage as t\n"
        "with t.run_lock(pathlib.Path(sys.argv[1])): print(flush=1); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match=f"^out: {tmp_path} is in use by another.*; wait"), run_lock(tmp_path):
            pass
        other.kill()
    for _ in range(2):
        with run_lock(tmp_path):
            pass
