"""Data to train on, and runs in several processes as torchrun starts them, by a server that has imported everything."""

import json
import multiprocessing
import os
import socket
import sys
from contextlib import contextmanager

import torch
from PIL import Image

from engine import train

# The last imports the classes of autoencoders.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["accelerate", "matplotlib.figure", "gensim.models", "engine.training.stages",
                               "torch.nn.parallel", "engine.pipeline_components"])  # fmt: skip


def captioned_images(folder):
    """A data set of twelve random images with two captions each, in an empty folder."""
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


def train_main(images, run, *options) -> int:
    """A short run by the command; its exit status."""
    return train.main([*SHORT, "--data", str(images), "--out", str(run), *options])


def refusal(capsys, *arguments):
    """The single line on stderr of a refused command."""
    capsys.readouterr()
    try:
        status = train.main(list(arguments))
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("python -m engine.train: "), lines
    return lines[0]


class Killed(BaseException):
    """Ends the process: nothing catches it."""


@contextmanager
def small_sample_sheets(number: int):
    """Most of a tiny run's time would be that of its sample sheets; yields a monkeypatch for more of the kind."""
    import pytest  # late: the server that processes are forked from needs neither

    from engine.training import denoiser

    with pytest.MonkeyPatch.context() as patch:
        for samples in ("PROMPTS", "JOINT_SAMPLES", "SKETCHES"):
            patch.setattr(denoiser, samples, number)
        yield patch


def started(count: int, arguments, log, target=None) -> list[multiprocessing.Process]:
    """Starts `count` processes of one run, or of another function of `arguments`; they write to the file `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    calls = [(target or _train, rank, count, port, arguments, log) for rank in range(count)]
    processes = [SERVER.Process(target=_run, args=call) for call in calls]
    for process in processes:
        process.start()
    return processes


def trained(count: int, arguments, log, timeout: float = 300, target=None) -> list[int]:
    """The exit statuses of the processes of a run; None of one that does not end."""
    processes = started(count, arguments, log, target)
    for process in processes:
        process.join(timeout)
        process.kill()
    return [process.exitcode for process in processes]


def _run(target, rank: int, count: int, port: int, arguments, log) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.exit(target(arguments))


def _train(arguments: list[str]) -> int:
    from engine.training import denoiser, tracking

    tracking.EVERY = 3
    denoiser.PROMPTS, denoiser.JOINT_SAMPLES = 1, 1  # most of a tiny run's time would be that of its sample sheets
    return train.main(arguments)


def train_shared(folder) -> int:
    """Four steps of a stage of which processes share the weights; the third overflows in the first row of a matrix.

    Writes what each process has of them, and what the third step changed, to FOLDER/RANK.json.
    """
    from test_training import CONFIG, SAMPLES, draw, losses_of, module

    from engine.processes import Processes
    from engine.training.stage import Stage

    processes = Processes.started("cpu", fsdp=True)
    stage, changed = Stage(folder, module(), CONFIG, SAMPLES, torch.float16, processes), []
    losses = losses_of(stage.module)
    for factor in (0, 0, 1e36, 0):

        def overflowing(*of, factor=factor):
            return {n: 1e-3 * x for n, x in losses(*of).items()} | {"row": factor * stage.module[0].weight[0].sum()}

        before = [processes.own(p).clone() for p in stage.module.parameters()]
        stage.train_step(draw, overflowing)
        after = [processes.own(p) for p in stage.module.parameters()]
        changed.append(any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)))
    moments = [state["exp_avg"] for state in stage.optimizer.state.values()]
    held = (stage.module.parameters(), stage.average.parameters(), moments)
    found = {"values": [sum(processes.own(p).numel() for p in values) for values in held], "changed": changed}
    found |= {"scale": stage.scaler.get_scale(), "norm": stage.norm}
    (folder / f"{processes.rank}.json").write_text(json.dumps(found))
    processes.end()
    return 0


def save_beside_a_full_disk(folder) -> int:
    """Trains two steps of a stage, of which the second's state cannot be written by the last process.

    Writes what each process ends with to FOLDER/RANK.txt.
    """
    import safetensors.torch
    from test_training import CONFIG, SAMPLES, draw, losses_of, module

    from engine.processes import Processes
    from engine.training.stage import Stage

    def full(tensors, metadata):
        raise OSError(28, "No space left on device")

    processes = Processes.started("cpu")
    stage = Stage(folder, module(), CONFIG, SAMPLES, torch.float32, processes)
    try:
        for _ in range(2):
            stage.train_step(draw, losses_of(stage.module))
            stage.curve.append({"step": stage.step})
            stage.save()
            if processes.rank == processes.count - 1:
                stage.files.finish()
                safetensors.torch.save = full
        stage.save()
    except (OSError, SystemExit) as error:
        (folder / f"{processes.rank}.txt").write_text(repr(error))
    return 0
