"""What a run reports while it trains (`--log`), and what it records so that it can be repeated."""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.device import ceilings, processor
from engine.diffusion.loss import DenoisingLoss
from engine.errors import InputError
from engine.model.cost import forward_flops
from engine.processes import INSTALL, Processes
from engine.training.options import TrainOptions

EVERY = 10  # steps between reports, which are means over these steps
PACKAGES = ("accelerate", "diffusers", "gensim", "numpy", "pillow", "psunet-engine", "safetensors", "torch", "triton",
            "xformers")  # fmt: skip


class Tracker:
    """TensorBoard, Weights & Biases or Trackio, through accelerate. Only the first process calls its methods.

    name  "tensorboard", which writes to RUN/log, "wandb" or "trackio", whose project is named after the run's folder
    Raises InputError about `log` if a package is missing.
    """

    def __init__(self, name: str, run: Path):
        for package in ("accelerate", name):
            if find_spec(package) is None:
                install = INSTALL if package in ("accelerate", "tensorboard") else f"pip install {package}"
                raise InputError("log", name, f"use {install}", f"needs the package {package}, which is not installed")
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        self.name = name
        self._tracker = kind("log", run) if kind.requires_logging_directory else kind(run.absolute().name)

    def start(self) -> None:
        """Raises InputError about `log` for whatever keeps the tracker from starting, such as a missing login."""
        from accelerate import PartialState

        PartialState()  # the trackers need it
        try:
            self._tracker.start()
        except Exception as error:  # of three packages and their services
            raise InputError("log", self.name, "set it up, or leave it out", f"does not start ({error})") from error

    def log(self, step: int, values: dict[str, float | str]) -> None:
        self._tracker.log(values, step=step)

    def log_samples(self, step: int, sheet: Image.Image | None, captions: list[str]) -> None:
        """A grid of generated images, if there are any, and the generated captions, one a line."""
        self.log(step, {"captions": "  \n".join(captions)})
        if sheet is None:
            return
        pixels = np.asarray(sheet.convert("RGB"))
        if self.name == "tensorboard":
            self._tracker.log_images({"samples": pixels[None]}, step, dataformats="NHWC")
        elif self.name == "wandb":
            self._tracker.log_images({"samples": [pixels]}, step)
        else:
            import trackio

            self.log(step, {"samples": trackio.Image(pixels)})

    def end(self) -> None:
        self._tracker.finish()


class Report:
    """Sends a tracker the means of the last steps: losses, also by quartile of time, gradient, speed.

    batch  samples of a step in all processes together
    dtype  of the matrix products; the most FLOP/s of these are measured now
    """

    def __init__(
        self,
        tracker: Tracker,
        loss: DenoisingLoss,
        batch: int,
        processes: Processes,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.tracker, self.loss, self.processes, self.batch = tracker, loss, processes, batch
        self.flops = 3 * forward_flops(loss.config.model, batch)  # the backward pass is two forwards
        self._rows: list[dict[str, float]] = []
        most = processes.on_main(lambda: ceilings(device, (dtype,), tries=3)) or {}
        self.ceiling = most.get(str(dtype).removeprefix("torch."), 0.0) * processes.count
        loss.record_times()

    def step(self, step: int, values: dict[str, float], seconds: float) -> None:
        """After every step of every process; `values` are its losses and other numbers."""
        self._rows.append(values | {"seconds": seconds})
        if step % EVERY:
            return
        means = {name: sum(row[name] for row in self._rows) / len(self._rows) for name in self._rows[0]}
        self._rows.clear()
        seconds = means.pop("seconds")
        by_time = self.processes.sum(self.loss.taken_by_time())  # [M, 2, 4]
        if not self.processes.is_main:
            return
        for m, (sums, weights) in zip(self.loss.config.model.modalities, by_time.tolist(), strict=True):
            parts = zip(sums, weights, strict=True)
            means |= {f"loss/{m.name} in quartile {k} of time": a / b for k, (a, b) in enumerate(parts, 1) if b}
        means |= {"speed/samples per second": self.batch / seconds, "speed/FLOP per second": self.flops / seconds}
        means["speed/share of the measured ceiling"] = self.flops / seconds / self.ceiling
        self.tracker.log(step, means)


def record_start(options: TrainOptions, device: torch.device, dtype: torch.dtype, processes: int) -> None:
    """Appends to RUN/starts.jsonl all that is needed to repeat this start of the run."""
    cuda = device.type == "cuda"
    row = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | _versions(),
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "config": options.config.to_dict(),
        "recipe": asdict(options.recipe),
    }
    with open(options.out / "starts.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Of the checkout that this package is in, with "-dirty" if it has changes; None: it is in none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
