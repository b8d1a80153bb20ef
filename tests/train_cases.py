"""Data to train on, and runs in several processes as torchrun starts them, by a server that has imported everything."""

import json
import multiprocessing
import os
import socket
import sys

import torch
from PIL import Image

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train_cases", "accelerate", "diffusers", "matplotlib.figure", "gensim.models",
                               "engine.training.stages", "torch.nn.parallel"])  # fmt: skip


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


def started(count: int, arguments: list[str], log) -> list[multiprocessing.Process]:
    """Starts `count` processes of one run; they write to the file `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [SERVER.Process(target=_train, args=(rank, count, port, arguments, log)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def trained(count: int, arguments: list[str], log, timeout: float = 300) -> list[int]:
    """The exit statuses of the processes of a run; None of one that does not end."""
    processes = started(count, arguments, log)
    for process in processes:
        process.join(timeout)
        process.kill()
    return [process.exitcode for process in processes]


def _train(rank: int, count: int, port: int, arguments: list[str], log) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from engine import train
    from engine.training import denoiser, tracking

    torch.set_num_threads(1)
    tracking.EVERY = 3
    denoiser.PROMPTS, denoiser.JOINT_SAMPLES = 1, 1  # most of a tiny run's time would be that of its sample sheets
    sys.exit(train.main(arguments))
