"""Training in several processes: the same losses whatever their number, kills, shared work, refusals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_data_shards import write_tar
from train_cases import save_beside_a_full_disk, started, train_shared, trained

from engine import train
from engine.data.sources import open_captioned
from engine.training import denoiser
from engine.training.files import CURVE, StageFiles

pytest.importorskip("accelerate")
SHORT = ["--preset", "tiny", "--steps", "6", "--autoencoder-steps", "2", "--save-every", "2", "--dtype", "float32"]


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """A run in one process, without a launcher."""
    run = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "PROMPTS", 1)
        patch.setattr(denoiser, "JOINT_SAMPLES", 1)
        assert train.main(command(images, run)) == 0
    return run


def command(images, run, *options):
    return [*SHORT, "--data", str(images), "--out", str(run), *options]


def size_of_state(run):
    return sum(part.stat().st_size for part in (run / "denoiser").glob("state-*/*.safetensors"))


def curve_of(run):
    return [json.loads(line) for line in (run / "denoiser" / CURVE).read_text().splitlines()]


def assert_same_curve(run, expected):
    rows = curve_of(run)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=2e-5)


def test_tar_files_train_as_a_folder_of_the_same_images_does(images, alone, tmp_path):
    for shard in range(3):
        files = {}
        for item in open_captioned(images).items[4 * shard : 4 * shard + 4]:
            key = f"{int(item.image_id):04d}"
            files |= {f"{key}.png": item.read_bytes(), f"{key}.json": json.dumps({"captions": item.captions}).encode()}
        write_tar(tmp_path / f"{shard}.tar", files)
    options = ["--data", f"{tmp_path}/{{0..2}}.tar"]
    assert trained(2, command(images, tmp_path / "run", *options), tmp_path / "log") == [0, 0]
    assert_same_curve(tmp_path / "run", curve_of(alone))


def assert_same_weights(run, other):
    """Of the checkpoint; Adam's first steps take small differences of a gradient for large ones."""
    found, expected = (load_file(r / "checkpoint" / "model.safetensors") for r in (run, other))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)


@pytest.mark.parametrize(
    "count, options",
    [(2, []), (4, []), (3, ["--accumulate", "2"]), (2, ["--fsdp"]),
     (3, ["--fsdp", "--accumulate", "2", "--grad-checkpointing"])],
    ids=str,
)  # fmt: skip
def test_any_number_of_processes_has_the_same_losses(images, alone, tmp_path, count, options):
    """Also where it does not divide the batch, of 8."""
    assert trained(count, command(images, tmp_path / "run", *options), tmp_path / "log") == [0] * count
    assert_same_curve(tmp_path / "run", curve_of(alone))
    assert_same_weights(tmp_path / "run", alone)
    parts = list((tmp_path / "run" / "denoiser").glob("state-*/*.safetensors"))
    assert len(parts) == count and max(part.stat().st_size for part in parts) < size_of_state(alone) * 1.2 / count
    printed = (tmp_path / "log").read_text()
    assert printed.count("usable images") == printed.count("checkpoint: ") == 1 and f"in {count} processes" in printed


def test_any_number_of_processes_reports_the_same_to_tensorboard(images, alone, tmp_path):
    """The gradient's norm too, which clipping and Adam hide from the losses."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reported = []
    for count in (1, 2):
        run = tmp_path / str(count)
        assert trained(count, command(images, run, "--log", "tensorboard"), tmp_path / "log") == [0] * count
        (file,) = (run / "log").iterdir()
        events = EventAccumulator(str(file)).Reload()
        reported.append({tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]})
        assert [image.step for image in events.Images("samples")] == [2, 4, 6]
        assert [text.step for text in events.Tensors("captions/text_summary")] == [2, 4, 6]
    one, two = reported
    assert one.keys() == two.keys() and len(one) == 2 + 2 * 4 + 2 + 3
    for tag, values in one.items():
        assert values.keys() == {3, 6}
        if not tag.startswith("speed/"):
            assert two[tag] == pytest.approx(values, rel=1e-3), tag
    for name in ("image", "text"):
        means = {end: sum(row[name] for row in curve_of(alone)[end - 3 : end]) / 3 for end in (3, 6)}
        assert two[f"loss/{name}"] == pytest.approx(means, rel=1e-4)
        quartiles = [values[6] for tag, values in two.items() if tag.startswith(f"loss/{name} in quartile")]
        assert min(quartiles) < means[6] < max(quartiles)
    assert two["learning rate"][3] == pytest.approx(1e-3 * (1 + 2 + 3) / 5 / 3)
    assert 0 < two["speed/share of the measured ceiling"][6] < 1 and two["speed/samples per second"][6] > 0


def test_a_killed_run_resumes_with_another_number_of_processes(images, alone, tmp_path):
    run = tmp_path / "run"
    victims = started(2, command(images, run, "--save-every", "1"), tmp_path / "log")
    while not any((run / "denoiser").glob("state-*")) and all(victim.is_alive() for victim in victims):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.2))
    for victim in victims:
        victim.kill()
    for victim in victims:
        victim.join()
    assert all(victim.exitcode == -signal.SIGKILL for victim in victims)
    assert trained(3, command(images, run), tmp_path / "log") == [0, 0, 0]
    assert_same_curve(run, curve_of(alone))


def test_processes_share_weights_average_and_moments_and_skip_an_overflow_in_the_part_of_one(tmp_path):
    assert trained(2, tmp_path, tmp_path / "log", target=train_shared) == [0, 0], (tmp_path / "log").read_text()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["values"] for one in found] == [[13] * 3, [8] * 3]  # of 4×3 + 4 and 1×4 + 1, by rows
    assert all(one["changed"] == [True, True, False, True] and one["scale"] == 32768 for one in found)
    assert found[0]["norm"] == found[1]["norm"]


def test_a_state_that_one_process_cannot_write_fails_in_all_and_leaves_the_last_intact(tmp_path):
    assert trained(3, tmp_path, tmp_path / "log", target=save_beside_a_full_disk) == [0] * 3
    ends = [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)]
    assert ends == ["OSError(28, 'No space left on device')", "SystemExit(2)", "SystemExit(2)"]
    assert [state.name for state in StageFiles(tmp_path).states] == ["state-0000000001"]


@pytest.mark.parametrize("first, then", [((2, "--fsdp"), (3, "--fsdp")), ((2,), (2, "--fsdp")), ((3, "--fsdp"), (1,))])
def test_a_run_resumes_whether_its_processes_share_weights_or_not(images, alone, tmp_path, first, then):
    for (count, *options), steps in ((first, "2"), (then, "6")):
        part = command(images, tmp_path / "run", "--steps", steps, *options)
        assert trained(count, part, tmp_path / "log") == [0] * count
    assert_same_curve(tmp_path / "run", curve_of(alone))
    assert_same_weights(tmp_path / "run", alone)


@pytest.mark.parametrize(
    "options, named",
    [
        (["--batch", "2"], "--batch: 2 is too small for 3 processes; use 3 or more"),
        (["--device", "cuda:0"], "--device: 'cuda:0' is one device for 3 processes"),
        (["--data", "nowhere"], "--data: nowhere is not a folder"),
        (["--seed", "-1"], "--seed: -1 is out of range"),
        (["--autoencoder", "."], "--autoencoder: "),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_bad_options_are_refused_once(images, tmp_path, options, named):
    assert trained(3, command(images, tmp_path / "run", *options), tmp_path / "log") == [2, 2, 2]
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if "usable images" not in line]
    assert [named in line for line in lines] == [True], lines
    assert not (tmp_path / "run").exists()


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]  # also of CPUs


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_launchers_start_the_processes(images, alone, tmp_path, launcher):
    """Behind "--", or torchrun takes --log for an option of its own."""
    options = command(images, tmp_path / "run", "--steps", "2", "--log", "tensorboard")
    launched = [sys.executable, "-m", *launcher, "-m", "engine.train", "--", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(launched, cwd=Path(__file__).parents[1], check=True, timeout=300, env=environment)
    assert_same_curve(tmp_path / "run", curve_of(alone)[:2])
    assert any((tmp_path / "run" / "log").iterdir())
