"""`Stage`: trains one module, keeps an average of its weights, saves its state and resumes exactly.

Independent of images and diffusion: a stage is a module, a `StageConfig`, and three functions:

    draw    what the batch of step s consists of, from a generator seeded by (seed, s), in every process
    read    the data of a part of it, with the noise of each sample from a generator of its own, `noise_of`
    losses  named losses of these data

So the losses depend neither on the number of processes and micro-batches, but for rounding, nor on when the run was
killed. While a GPU computes a step, a thread draws and reads the next one.
"""

import fcntl
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.errors import InputError
from engine.processes import Processes
from engine.training.files import StageFiles
from engine.training.recipes import StageConfig
from engine.training.tracking import Tracker

MAY_CHANGE = {"steps", "learning_rate"}  # of a `StageConfig` when a stage is resumed

Batch = TypeVar("Batch")
Draw = Callable[[torch.Generator, list[int]], Batch]  # (generator on the CPU, indices of samples) -> a batch
Read = Callable[[Batch, slice], tuple]  # (a batch, a part of it) -> the arguments of `Losses`
Losses = Callable[..., dict[str, Tensor]]  # scalars, those of the parts of a batch add up to the batch's


@dataclass(frozen=True)
class StageOptions:
    """How a stage computes. Its hyperparameters are in the `Recipe`."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # or bfloat16 or float16, under autocast
    save_every: int = 250  # steps
    keep: int = 1  # saved states
    compile: bool = False  # torch.compile the denoiser's blocks
    grad_checkpointing: bool = False  # of the denoiser's blocks
    tracker: Tracker | None = None  # that the denoiser's training is reported to
    processes: Processes = field(default_factory=Processes)


def whole_batch(batch: Batch, part: slice) -> tuple[Batch, slice]:
    """A `Read` for losses that choose their part of a batch themselves."""
    return batch, part


class _Call(nn.Module):
    """Makes a call that trains `module` a forward, as DDP and FSDP need; the losses compute more than its forward."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, call: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return call()


class Stage:
    """A module in training: its weights, their average, the optimiser and the loss curve, saved in one folder.

    folder     of its `StageFiles`; if they are there already, the stage resumes from them
    module     the module to train, float32, equal in all processes; its averaged copy is `stage.average`
    config     the `StageConfig`
    samples    size of the training set
    dtype      torch.bfloat16 or float16 computes the losses under autocast; the weights stay float32. With float16
               losses are scaled, and a step whose gradient overflows leaves the weights as they are
    processes  that train it together; the first one writes
    blocks     modules in it that FSDP gathers and frees one at a time
    keep       how many saved states there are at most
    ahead      draw and read in a thread, a step ahead; None: where a GPU computes. On a CPU the two would compete
    Raises InputError about `folder` if the state there is damaged or is that of another module or config. Another
    number of steps and another learning rate are allowed: they hold from the saved step on.
    """

    def __init__(
        self,
        folder: Path,
        module: nn.Module,
        config: StageConfig,
        samples: int,
        dtype: torch.dtype,
        processes: Processes | None = None,
        keep: int = 1,
        blocks: Iterable[nn.Module] = (),
        ahead: bool | None = None,
    ):
        self.processes = processes or Processes()
        self.files = StageFiles(folder, keep, self.processes)
        self.folder, self.module, self.config, self.samples = folder, module, config, samples
        self.average = deepcopy(module).eval().requires_grad_(False)
        self.step, self.norm = 0, 0.0  # the gradient's norm in the last step, before it is clipped
        self.curve: list[dict] = []
        self.settings: list[dict] = [{"step": 0} | asdict(config)]
        self._epoch, self._epoch_order = -1, torch.empty(0)
        progress = self._restore_progress()
        if self.processes.from_main(self.step) != self.step:
            problem = "is not the same folder in all processes"
            raise InputError("folder", folder, "give one that all machines share", problem)
        self._call = self.processes.parallel(_Call(module), blocks)
        self.processes.share(self.average)
        matrices = [p for p in module.parameters() if p.ndim >= 2]
        vectors = [p for p in module.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        device = next(module.parameters()).device.type
        self.autocast = torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        self._begin_optimizer()
        if progress is not None:
            self.files.fill(self._tensors())
            if self.scaler.is_enabled() and "scaler" in progress:
                try:
                    self.scaler.load_state_dict(progress["scaler"])
                except (LookupError, RuntimeError, TypeError) as error:
                    raise self.files.damaged(error) from None
        self._ahead = device != "cpu" if ahead is None else ahead
        self._reader: ThreadPoolExecutor | None = None  # in `run`
        self._next: Future | None = None  # the data of the next step

    @property
    def done(self) -> bool:
        return self.step >= self.config.steps

    def run(
        self,
        draw: Draw,
        losses: Losses,
        save_every: int,
        preview: Callable[[int, dict[str, Tensor]], None] | None = None,
        report: Callable[[int, dict[str, float], float], None] | None = None,
        read: Read = whole_batch,
    ) -> None:
        """Trains to the last step. Every `save_every` steps and at the end, saves the state and calls `preview`.

        The sum of the losses is minimised. States are written in the background. The first process calls
        `preview` with the step's number and the averaged weights, while the others wait. After every step, all call
        `report` with its number, its values and its seconds.
        Raises FloatingPointError if a loss or a gradient is not finite.
        """
        steps, quiet = self.config.steps, not self.processes.is_main
        self._reader, self._next = ThreadPoolExecutor(1, "reader") if self._ahead else None, None
        bar = tqdm(total=steps, initial=self.step, unit="step", desc=self.folder.name, mininterval=1.0, disable=quiet)
        try:
            while not self.done:
                started = time.perf_counter()
                parts = self.train_step(draw, losses, read)
                seconds = time.perf_counter() - started
                self.curve.append({"step": self.step, **parts})
                bar.set_postfix_str(f"{self.config.batch / seconds:.0f} samples/s, loss {sum(parts.values()):.4f}")
                bar.update()
                if report is not None:
                    values = {f"loss/{name}": value for name, value in parts.items()}
                    values |= {"gradient norm": self.norm, "learning rate": self.optimizer.param_groups[0]["lr"]}
                    report(self.step, values, seconds)
                if self.step % save_every == 0 or self.done:
                    self.save()
                    if preview is not None:
                        self.processes.on_main(partial(preview, self.step, self.averaged()))
        finally:
            bar.close()
            if self._reader is not None:
                self._reader.shutdown(cancel_futures=True)
                self._reader = None
            self.files.finish()

    def train_step(self, draw: Draw, losses: Losses, read: Read = whole_batch) -> dict[str, float]:
        """One optimiser step; returns the named losses of the whole batch."""
        config, processes = self.config, self.processes
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        self.module.train()
        sums = []
        for micro, data in enumerate(self._data(draw, read)):
            last = micro == config.accumulate - 1
            with nullcontext() if last else processes.without_averaging(self._call):
                with self.autocast:
                    parts = self._call(partial(losses, *data))
                # The losses of all processes add up, while their gradients are averaged.
                self.scaler.scale(sum(parts.values()) * processes.count).backward()
            sums.append(torch.stack(list(parts.values())).detach().double())
        total = dict(zip(parts, processes.sum(sum(sums)).tolist(), strict=True))
        self.scaler.unscale_(self.optimizer)
        norm = processes.whole(nn.utils.clip_grad_norm_(self.module.parameters(), config.clip)).item()
        self.norm, overflow = norm, not math.isfinite(norm)
        if not math.isfinite(sum(total.values())) or (overflow and self.scaler.get_scale() <= 1):
            raise FloatingPointError(
                f"{self.folder.name}: the loss or its gradient is not finite at step {self.step} ({total}); "
                "use a lower learning rate and resume from the last saved state, which is intact"
            )
        self.scaler.step(self.optimizer)  # not after an overflow
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not overflow:
            self._update_average()
        self.step += 1
        return total

    def _data(self, draw: Draw, read: Read) -> list[tuple]:
        """The arguments of the losses of this process's part of each of the step's micro-batches."""
        if self._reader is None:
            return self._data_of(self.step, draw, read)
        data = (self._next or self._reader.submit(self._data_of, self.step, draw, read)).result()
        following = self.step + 1
        more = following < self.config.steps
        self._next = self._reader.submit(self._data_of, following, draw, read) if more else None
        return data

    def _data_of(self, step: int, draw: Draw, read: Read) -> list[tuple]:
        config, part = self.config, self.processes.part
        batch = draw(torch.Generator().manual_seed(_seed(config.seed, step, 0)), self._batch_indices(step))
        return [read(batch, part(config.batch, i, config.accumulate)) for i in range(config.accumulate)]

    def save(self) -> None:
        """Begins to write a copy of the state, once the write before has ended. All processes call this.

        Raises, in the first one, what that write failed with.
        """
        self.processes.on_main(self.files.finish)  # first, so that there are not two copies in memory
        progress = {"step": self.step, "config": asdict(self.config)}
        if self.scaler.is_enabled():
            progress["scaler"] = self.scaler.state_dict()
        self.files.save(self._tensors(), progress, self.curve, self.settings)

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights in the first process, none in others; all call this."""
        return self.processes.gathered(self.average.state_dict())

    def _tensors(self) -> dict[str, Tensor]:
        """What a saved state has: weights, their average and the optimiser's moments, by name."""
        tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            for key, tensor in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = tensor
        return tensors

    def _begin_optimizer(self) -> None:
        """Makes AdamW's state as it does in its first step, so that a saved one can be read into it."""
        for parameter in self.module.parameters():
            step = torch.zeros((), device=parameter.device)
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": step, **moments}

    def _restore_progress(self) -> dict | None:
        """Restores step, curve and settings of the saved state, if there is one; returns its progress."""
        loaded = self.files.load()
        if loaded is None:
            return None
        progress, self.curve, settings = loaded
        step, config = progress["step"], self._same_config(progress["config"])
        self.step = step
        self.settings = [row for row in settings if row["step"] < step] or [{"step": 0} | config]
        if config != (now := _as_json(self.config)):
            self.settings.append({"step": step} | now)
        return progress

    def _same_config(self, config: dict) -> dict:
        """The config that the saved state was trained with, which may differ in what may change."""
        now = _as_json(self.config)
        if refused := sorted(key for key in now if now[key] != config.get(key) and key not in MAY_CHANGE):
            before, after = (", ".join(f"{key} {c.get(key)}" for key in refused) for c in (config, now))
            path, remedy = self.files.states[-1], "use the same settings or another folder"
            raise InputError("folder", path, remedy, f"was trained with {before}, not {after}")
        return config

    def _batch_indices(self, step: int) -> list[int]:
        """The samples of a step: the training set in epochs, each shuffled by its own seed."""
        first = step * self.config.batch
        return [int(self._order(i // self.samples)[i % self.samples]) for i in range(first, first + self.config.batch)]

    def _order(self, epoch: int) -> Tensor:
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(_seed(self.config.seed, epoch, 1 << 20))
            self._epoch, self._epoch_order = epoch, torch.randperm(self.samples, generator=generator)
        return self._epoch_order

    @torch.no_grad()
    def _update_average(self) -> None:
        # A lower decay in the first steps, (1 + s)/(10 + s), as in TensorFlow's ExponentialMovingAverage.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        average, weights = ([self.processes.own(p) for p in m.parameters()] for m in (self.average, self.module))
        torch._foreach_lerp_(average, weights, 1 - decay)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Locks `folder` against other training processes; the lock also ends with the process, however that ends.

    Raises InputError about `out` if another process holds the lock.
    """
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait for it, or give another folder"
            raise InputError("out", folder, remedy, "is in use by another training process") from None
        yield


def noise_of(seed: int, samples: slice, size: int) -> Tensor:
    """Standard normal noise [n, size] float32 of these samples of a batch, each from a generator of its own."""
    generators = (torch.Generator().manual_seed(_seed(seed, i, 2)) for i in range(samples.start, samples.stop))
    return torch.stack([torch.randn(size, generator=generator) for generator in generators])


def _as_json(config: StageConfig) -> dict:
    """Its settings as JSON keeps them."""
    return json.loads(json.dumps(asdict(config)))


def _seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; mixed (splitmix64's finaliser) so that neighbours give unrelated seeds."""
    z = 0
    for part in parts:
        z = (z + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        z ^= z >> 31
    return z >> 1
