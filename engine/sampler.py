"""The sampling loop: rows of any tasks through a denoiser, one forward of all passes per step.

A batch is a number of slots over device memory that stays where it is. Between two steps rows leave it when their
tables end, and others enter, whatever their tasks, masks, steps, solvers and guidance: to enter is to have one row of
that memory written. A denoiser is a function

    denoiser(inputs [R, N] float32, times [R, L] int32, outputs: tuple[str, ...]) -> prediction [R, N]

of packed states and the time of every token; `outputs` names the modalities whose prediction is needed, the rest of
the result may hold anything. One whose modalities have parts of their own before they meet may offer these as

    encode(name: str, inputs [R, N], times [R, L]) -> encoded [depth, R, ...]

and then takes `encoded`, what that gave by name: under clean conditioning a fully known modality enters every step
alike, and is encoded once per row. One that can use a part of its work again in later steps may offer memory for it,

    keep(rows: int) -> kept [rows, ...]

and then takes `kept` and `refresh` [R] bool, the rows for which that part has to be done anew at this step, or None
where it is for none: with step caching (`SolverTable.refresh`) that is so at most steps. The loop knows nothing else of
the model, and nothing of pictures or words.
"""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch, Row, batch_rows
from engine.config import ModelConfig
from engine.graphs import StepGraphs
from engine.kernels.cfg_step import Guided, Index, Rows, at_step, cfg_step
from engine.masks import whole_tokens
from engine.schedule import SolverTable

Denoiser = Callable[..., Tensor]
Encoder = Callable[[str, Tensor, Tensor], Tensor]
Keeper = Callable[[int], Tensor]

LINES = 64  # of the solver tables in a batch's memory, at least; longer ones double it


@dataclass(eq=False)
class Job:
    """A row on its way through the loop."""

    row: Row
    passes: list[int]  # that each of its steps needs
    refresh: list[bool]  # whether each of its steps uses nothing that is kept
    generated: frozenset[str]  # modalities of which anything is generated
    constant: frozenset[str]  # modalities that enter the model alike at every step
    step: int = 0  # done so far
    state: Tensor | None = None  # [N] float32, the sample; None until it is done
    cancelled: bool = False  # set by whoever wants it no longer


class Sampler:
    """The loop: rows wait for a slot, and every step is one forward of all that have one.

    Several threads may `run` rows, which then share the slots. What a row becomes depends on its own seed, table and
    masks only (as far as the denoiser's arithmetic does), not on its slot, the batch or its neighbours. An exception
    in a step sends the rows that it was for back to wait: those that are still wanted begin again and come out the
    same. So does running out of memory, once, with half the slots and a warning.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        model: ModelConfig,
        device: torch.device | str = "cpu",
        *,
        buckets: Sequence[int],  # numbers of slots that a batch may have, ascending; the smallest that does is taken
        passes: int = 2,  # P, the most that a row may need
        encode: Encoder | None = None,
        keep: Keeper | None = None,
        graphs: StepGraphs | None = None,  # captures and replays the steps; None: they run as they are
    ):
        self.denoiser, self.model, self.device = denoiser, model, torch.device(device)
        self.encode, self.keep = encode, keep
        self.buckets, self.passes, self.graphs = list(buckets), passes, graphs
        self.forwards = self.finished = 0  # calls of the denoiser, and rows, to this day
        self._turn = threading.Condition()
        self._pausing = 0  # threads that want no step to begin
        self._closed = False
        self._stepping = False  # whether a thread is in a step; only that one touches what follows
        self._waiting: deque[Job] = deque()  # but this, which any thread extends
        self._slots: list[Job | None] = []
        self._batches: dict[int, Batch] = {}  # by number of slots; only the one in use, unless graphs hold their memory
        self._lines = LINES
        self._halved = False

    def run(self, rows: Sequence[Row], callback: Callable[[int, int], None] | None = None) -> Tensor:
        """Samples of these rows, packed, [B, N] float32; known values come back bit for bit.

        Whichever thread finds nobody stepping does the next step, for the rows of all threads. As these rows get on,
        `callback(steps done, steps in all)` is called in their own thread, the steps of all rows counted (and not again
        while they catch up with a step that failed); to cancel, raise from it.
        Raises ValueError before the first step if a row does not fit the model, torch.OutOfMemoryError when memory runs
        out a second time, or for a single row, and RuntimeError when the sampler is closed meanwhile.
        """
        jobs = [self._job(row) for row in rows]
        # The longest first: short ones fill the slots that are free at the end.
        self._waiting.extend(sorted((job for job in jobs if job.state is None), key=lambda job: -job.row.table.steps))
        total, seen, told = sum(row.table.steps for row in rows), 0, 0
        try:
            while any(job.state is None for job in jobs):
                mine = False
                try:
                    with self._turn:
                        while self._pausing or (self._stepping and sum(job.step for job in jobs) == seen):
                            self._turn.wait()
                        if self._closed:
                            raise RuntimeError("this engine is closed; make another with Engine.from_pretrained")
                        mine, self._stepping = not self._stepping, True
                    if mine:
                        self._step()
                finally:
                    if mine:
                        with self._turn:
                            self._stepping = False
                            self._turn.notify_all()
                seen = sum(job.step for job in jobs)
                if callback is not None and seen > told:
                    told = seen
                    callback(seen, total)
        finally:
            for job in jobs:
                job.cancelled = True  # means nothing to those that are done
                with suppress(ValueError):
                    self._waiting.remove(job)
        return torch.stack([job.state for job in jobs])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No step is under way within, in no thread."""
        with self._turn:
            self._pausing += 1
            try:
                while self._stepping:
                    self._turn.wait()
                yield
            finally:
                self._pausing -= 1
                self._turn.notify_all()

    def close(self) -> None:
        """Frees all memory; who still runs rows, or begins to, is told so. Call it while `paused`."""
        self._closed = True
        self.clear()
        self._waiting.clear()

    def clear(self) -> None:
        """Frees the memory of the batches; rows under way begin again."""
        self._restart()
        self._drop_batches()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _step(self) -> None:
        """Lets rows leave and enter, then does one step of all that are there; nothing if there are none."""
        try:
            # Triton launches on the current device, whatever device its tensors are on; -1 leaves it as it is.
            with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
                self._arrange()
                if self._slots:
                    self._advance()
            return
        except torch.OutOfMemoryError:
            slots = len(self._slots)
        except BaseException:
            self._restart()
            raise
        # Not among the exceptions: their tracebacks hold the tensors of the failed step.
        self.clear()
        smaller = [size for size in self.buckets if 2 * size <= slots]
        if self._halved or not smaller:
            raise torch.OutOfMemoryError(f"max_rows: memory does not suffice for {slots} rows; use fewer")
        self._halved, self.buckets = True, smaller
        warnings.warn(f"out of memory with {slots} rows at a time; going on with {smaller[-1]}", stacklevel=2)

    def _job(self, row: Row) -> Job:
        _check(row, self.model, self.passes)
        refresh = row.table.refresh.tolist()
        if self.keep is None and not all(refresh):
            raise ValueError("step_cache: this model keeps nothing from step to step; use 1")
        generated, constant = [], []
        for m in self.model.modalities:
            if row.generate[self.model.state_slices[m.name]].any():
                generated.append(m.name)
            elif self.encode is not None and m.depth > 0 and row.table.constant_known:
                constant.append(m.name)
        state = None if generated else row.known.float().to(self.device)
        return Job(row, _passes(row.table), refresh, frozenset(generated), frozenset(constant), state=state)

    def _arrange(self) -> None:
        """Empties the slots of rows that are done or cancelled, and fills the smallest bucket that holds the others."""
        staying = [i for i, job in enumerate(self._slots) if job and job.state is None and not job.cancelled]
        entering: list[Job] = []
        while self._waiting and len(staying) + len(entering) < self.buckets[-1]:
            job = self._waiting.popleft()
            if not job.cancelled:
                entering.append(job)
        number = len(staying) + len(entering)
        size = next(size for size in self.buckets if size >= number) if number else 0
        # Captured steps would be lost with the memory they use, however much of it one long table has taken.
        lines = self._lines if staying or self.graphs is not None else LINES
        while entering and lines <= max(job.row.table.steps for job in entering):
            lines *= 2

        before, source = self._slots, self._batches.get(len(self._slots))
        if (size, lines) == (len(before), self._lines):
            pairs = []
            self._slots = [job if i in staying else None for i, job in enumerate(before)]
        else:
            pairs = [(slot, i) for i, slot in enumerate(staying)]
            self._slots = [before[slot] for slot in staying] + [None] * (size - len(staying))
        free = [i for i, job in enumerate(self._slots) if job is None][: len(entering)]
        for i, job in zip(free, entering, strict=True):
            self._slots[i] = job

        # From here on every job has its place, where an exception finds it.
        if self._lines != lines:
            self._lines = lines
            self._drop_batches()
        elif self.graphs is None and size != len(before):
            self._batches.clear()
        if size and size not in self._batches:
            self._batches[size] = Batch(self._rows([], size))
        if pairs:
            self._batches[size].copy(source, pairs)
        if entering:
            self._batches[size].copy(self._begun(entering), list(enumerate(free)))

    def _begun(self, jobs: Sequence[Job]) -> Batch:
        """A batch of these rows, before their first step."""
        size = next(size for size in self.buckets if size >= len(jobs))  # shapes that the denoiser knows
        rows = [job.row for job in jobs]
        encoded = {}
        if names := frozenset().union(*(job.constant for job in jobs)):
            # A pass that is off at first has its dropped values later: encoded is what it is given when it is on.
            lines = [SolverTable(r.table.coefficients[:1], r.table.first_guided) for r in rows]
            first = Batch(self._rows([replace(r, table=line) for r, line in zip(rows, lines, strict=True)], size))
            encoded = {name: self.encode(name, first.progress.inputs, first.progress.times) for name in sorted(names)}
        batch = Batch(self._rows(rows, size))
        batch.encoded = encoded
        return batch

    def _rows(self, rows: Sequence[Row], slots: int) -> Rows:
        return batch_rows(rows, self.model, self.device, slots, self._lines, self.passes)

    def _advance(self) -> None:
        batch, live = self._batches[len(self._slots)], [job for job in self._slots if job]
        passes = max(job.passes[job.step] for job in live)
        generated = frozenset().union(*(job.generated for job in live))
        outputs = tuple(name for name in self.model.state_slices if name in generated)
        constant = frozenset.intersection(*(job.constant for job in live))
        reuse = None  # whether everything is computed because nothing is kept, or something is, or something is used
        if self.keep is not None and not all(all(job.refresh) for job in live):
            reuse = not any(job.refresh[job.step] for job in live)
            if batch.kept is None:
                batch.kept = self.keep(len(batch.progress.inputs))
        step = partial(self._compute, batch, passes, outputs, constant, reuse)
        if self.graphs is None:
            step()
        else:
            self.graphs((len(self._slots), passes, outputs, constant, reuse), step)
        self.forwards += 1
        for i, job in enumerate(self._slots):
            if job:
                job.step += 1
                if job.step == job.row.table.steps:
                    job.state = batch.progress.state[i].clone()
                    self.finished += 1

    def _compute(
        self, batch: Batch, passes: int, outputs: tuple[str, ...], constant: frozenset[str], reuse: bool | None
    ) -> None:
        """One step of a batch; reads and writes its memory only, so that it can be captured."""
        live, more = passes * len(batch.progress.state), {}
        if self.encode is not None:
            more["encoded"] = {name: batch.encoded[name][:, :live] for name in constant}
        if reuse is not None:
            more |= {"kept": batch.kept[:live], "refresh": None}
        if reuse is False:
            more["refresh"] = (at_step(batch.rows, batch.progress)[1][:, Index.REFRESH] != 0).repeat(passes)  # [R]
        prediction = self.denoiser(batch.progress.inputs[:live], batch.progress.times[:live], outputs, **more)
        cfg_step(prediction, batch.rows, batch.progress)  # prediction [live, N]

    def _restart(self) -> None:
        """Sends all rows in slots back to wait for their first step."""
        unfinished = [job for job in self._slots if job and job.state is None]
        for job in unfinished:
            job.step = 0
        self._waiting.extendleft(reversed(unfinished))
        self._slots = []

    def _drop_batches(self) -> None:
        self._batches.clear()
        if self.graphs is not None:
            self.graphs.clear()  # they write into that memory


def sample(
    denoiser: Denoiser,
    rows: Sequence[Row],
    model: ModelConfig,
    device: torch.device | str = "cpu",
    callback: Callable[[int, int], None] | None = None,
    encode: Encoder | None = None,
    keep: Keeper | None = None,
) -> Tensor:
    """Samples of all rows in one batch, [B, N] float32 on `device`, as `Sampler.run` has it."""
    assert len(rows) > 0
    passes = max(row.table.guided.shape[1] for row in rows) + 1
    sampler = Sampler(denoiser, model, device, buckets=range(1, len(rows) + 1), passes=passes, encode=encode, keep=keep)
    return sampler.run(rows, callback)


def _passes(table: SolverTable) -> list[int]:
    """How many passes each step needs: up to the last one that guides."""
    number = np.arange(1, table.guided.shape[1] + 1)
    return (1 + (number * (table.guided != Guided.OFF)).max(axis=1, initial=0)).tolist()  # [S]


def _check(row: Row, model: ModelConfig, passes: int) -> None:
    values = {"generate": row.generate, "known": row.known} | ({} if row.null is None else {"null": row.null})
    for name, tensor in values.items():
        if tensor.shape != (model.size,):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not fit; the model's state is [{model.size}]")
    if row.table.guided.shape[1] >= passes:
        raise ValueError(f"passes: a row needs {row.table.guided.shape[1] + 1}, the sampler does {passes}; use more")
    if (row.table.guided >= len(model.modalities)).any():
        raise ValueError(f"guided_modalities: the model has only {len(model.modalities)}; number them from 0")
    clean = (row.table.indices[:, Index.KNOWN_TIME] != row.table.indices[:, Index.TIME]).any()
    if clean and not torch.equal(whole_tokens(row.generate, model), row.generate):
        raise ValueError("generate: a token is partly known, which clean conditioning cannot do; use whole_tokens")
