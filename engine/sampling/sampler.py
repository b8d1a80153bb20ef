"""The worker: one thread that owns the device and does the steps of all samples that were submitted.

Between two steps it takes in what was submitted meanwhile, runs pending calls of codecs (one for all requests that
wait for the same function), drops what was cancelled, and lets samples enter and leave the slots of its batch. A
caller gets a `concurrent.futures.Future`, which stays cancellable until its result is there.
"""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import InputError
from engine.kernels.cfg_step import write_inputs
from engine.kernels.sampler_state import BatchConstants
from engine.model.denoiser import Denoiser
from engine.sampling.batch import Batch, SampleSpec, batch_constants, upload
from engine.sampling.calls import Call, Calls
from engine.sampling.graphs import StepGraphs, compile_failure
from engine.sampling.preview import Preview, preview
from engine.sampling.scheduler import Arrangement, CacheMode, Job, Scheduler, StepPlan
from engine.sampling.step import denoise_step
from engine.sampling.worker import Worker, finish_future


class NotFiniteError(FloatingPointError):
    """Samples that came out as NaN or infinity.

    positions  of them among those that were submitted
    states     of all that were submitted, [B, N]
    """

    def __init__(self, positions: list[int], states: Tensor):
        super().__init__("the result is NaN or infinite; use less guidance, or dtype float32")
        self.positions, self.states = positions, states


@dataclass(eq=False)
class _Run:
    """The samples of one `submit`."""

    jobs: list[Job]
    future: Future
    progress: Callable[[int, int], None] | None
    preview: Callable[[list[Preview]], None] | None
    preview_every: int  # steps
    states: dict[int, Tensor]  # by position among the jobs, [N] float32 on the device; of those that are done
    reported: int = 0  # steps at the last call of `progress`


class Sampler:
    """Makes samples with a denoiser, all of them on one thread, which starts with the first of them.

    What a sample becomes depends on its own seed, table and masks only (as far as the denoiser's arithmetic does), not
    on its slot, the batch or its neighbours. When memory runs out the slots are halved, with a warning, samples in
    progress start again, and the slots grow back later. When a step fails for another reason its samples start again,
    one at a time, and only those that fail again raise.

    buckets  numbers of slots that a batch may have, ascending; the smallest that holds the samples is used
    graphs   captures and replays the steps; None: they run eagerly
    """

    def __init__(
        self,
        denoiser: Denoiser,
        model: ModelConfig,
        device: torch.device | str = "cpu",
        *,
        buckets: Sequence[int],
        graphs: StepGraphs | None = None,
    ):
        self.denoiser: Denoiser | None = denoiser  # None: closed
        self.device, self.graphs = torch.device(device), graphs
        self.scheduler = Scheduler(model, buckets, keep=graphs is not None)
        self.plans: Counter[StepPlan] = Counter()  # steps done so far
        self.feature_rows: Counter[str] = Counter()  # rows of `Denoiser.branch_features` so far, by modality
        self.finished = 0  # samples
        self._batches: dict[int, Batch] = {}  # by slots; only the one in use, unless graphs use their memory
        self._current: Batch | None = None
        self._shape = (0, 0)  # lines and passes of the batches' tables
        self._runs: list[_Run] = []
        self._run_of: dict[Job, tuple[_Run, int]] = {}
        self._inbox: deque[_Run | Call] = deque()
        self._calls = Calls()
        self.worker = Worker(self)

    @property
    def forwards(self) -> int:
        """Calls of the denoiser so far."""
        return self.plans.total()

    # ------------------------------------------------------------------------------------------ for callers

    def submit(
        self,
        specs: Sequence[SampleSpec],
        progress: Callable[[int, int], None] | None = None,
        *,
        priority: int = 0,
        preview: Callable[[list[Preview]], object] | None = None,
        preview_every: int = 1,
    ) -> Future:
        """A future of these samples' final states, packed, [B, N] float32 on the CPU; known values are unaltered.

        progress  called on the worker's thread as `progress(steps done, steps in all)` after each step that some of the
                  samples took part in; it should return at once. What it raises, the future raises
        priority  waiting samples of a higher one enter first; those that are in slots stay there
        preview   called like `progress`, and after it, with the samples of which `preview_every`, twice as many, …
                  steps are done, but not all. Results are the same with it and without

        Cancelling the future frees the slots before the next step. Raises InputError if a sample does not fit the
        model, EngineClosed if the sampler is closed, and RuntimeError if it was made before a fork. The future raises
        NotFiniteError if a result is not finite, torch.OutOfMemoryError if memory does not suffice for a single sample,
        and EngineClosed if the sampler is closed meanwhile.
        """
        denoiser = self.denoiser
        self.worker.check()
        jobs = [self.scheduler.job(spec, priority) for spec in specs]
        if not denoiser.can_cache and any(job.needs.uses_cache for job in jobs):
            raise InputError("step_cache", "a value above 1", "use 1", "needs inner blocks, which this model has not")
        return self.worker.post(_Run(jobs, Future(), progress, preview, preview_every, {}), self._inbox)

    def call(self, function: Callable[[Sequence], Sequence | Tensor], items: Sequence) -> Future:
        """A future of the list `function(items)`, run on the worker, which owns the device.

        `function` maps a list to one of equal length, item by item: items that several callers wait for are handed to
        it together, as many as there are slots. Raises as `submit`.
        """
        return self.worker.post(Call(function, list(items), Future()), self._inbox)

    def run(self, specs: Sequence[SampleSpec], progress: Callable[[int, int], None] | None = None) -> Tensor:
        """`submit`, and wait: the final states [B, N] float32. Interrupted, it cancels."""
        self.worker.check_waiting()
        future = self.submit(specs, progress)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Ends the worker after the step that it is in and frees all memory; open futures raise EngineClosed."""
        self.worker.close()

    # ------------------------------------------------------------------------------------------ on the worker

    def turn(self) -> bool:
        """Everything from one step to the next; False if nothing is left to do."""
        self._receive()
        while self._calls and not self.worker.closed:
            self._calls.run(self.scheduler.capacity)
            self._receive()  # what followed from them
        for run in [run for run in self._runs if run.future.cancelled()]:
            self._drop(run)
            finish_future(run.future)  # `concurrent.futures.wait` waits for this
        if self.scheduler.idle:
            return False
        try:
            # Triton launches on the current device, whatever device its tensors are on; -1 leaves it as it is.
            with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
                self._step()
        except Exception as error:  # whatever a model raises belongs to the samples that it was computing
            self._failed(error)
        return True

    def abort(self, error: BaseException) -> None:
        """Ends everything that was submitted with this error and frees all memory."""
        self._receive()
        self.scheduler.restart()
        self._calls.abort(error)
        for run in list(self._runs):
            self._reject(run, error)
        self.scheduler.waiting.clear()
        self._free()

    def _receive(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Call):
                self._calls.add(item)
                continue
            self._runs.append(item)
            self._run_of |= {job: (item, i) for i, job in enumerate(item.jobs)}
            for i, job in enumerate(item.jobs):
                if not any(job.needs.outputs):  # all of it is known
                    job.step, item.states[i] = job.steps, job.spec.known.float()
            self.scheduler.add(job for job in item.jobs if not job.done)
            self._finish(item)

    def _step(self) -> None:
        """Lets samples leave and enter, then does one step of all that are in slots."""
        self._rearrange(self.scheduler.arrange())
        if self._current is None:
            return
        plan, batch = self.scheduler.plan(), self._current
        self._compute_features(batch, plan)
        if plan.cache_mode is not CacheMode.OFF and batch.cache is None:
            batch.cache = self.denoiser.new_cache(batch.passes * batch.slots)
        if self.graphs is None:
            denoise_step(self.denoiser, batch, plan)
        else:
            self.graphs(plan, lambda: denoise_step(self.denoiser, batch, plan))
        self.plans[plan] += 1
        live = self.scheduler.live
        # Before the step counts as done, since memory may not suffice for it.
        self._arrive(batch)
        states = {job: batch.state.state[i].clone() for i, job in self.scheduler.finishing()}
        previews = self._previews(batch)
        self.scheduler.advance()
        for job, state in states.items():
            run, position = self._run_of[job]
            run.states[position] = state
        self.finished += len(states)
        for run in dict.fromkeys(self._run_of[job][0] for job in live):
            self._report(run, previews.get(run))
            self._finish(run)

    def _rearrange(self, change: Arrangement) -> None:
        """Brings the samples to the slots where the scheduler has put them."""
        source, shape = self._current, (change.lines, change.passes)
        if shape != self._shape:
            self._drop_batches()
            self._shape = shape
        elif self.graphs is None and (source is None or source.slots != change.slots):
            self._batches.clear()
        self._current = None
        if change.slots == 0:
            return
        if change.slots not in self._batches:
            self._batches[change.slots] = Batch(self._constants([], change.slots))
        batch = self._batches[change.slots]
        if change.stay:
            batch.copy(source, change.stay)
        if change.enter:
            entering = Batch(self._constants([job.spec for _, job in change.enter], len(change.enter)))
            batch.copy(entering, [(i, slot) for i, (slot, _) in enumerate(change.enter)])
        self._current = batch

    def _constants(self, specs: Sequence[SampleSpec], slots: int) -> BatchConstants:
        return batch_constants(specs, self.scheduler.model, self.device, slots, *self._shape)

    def _compute_features(self, batch: Batch, plan: StepPlan) -> None:
        """Runs the in-blocks of modalities whose inputs stay the same for some steps, in the slots that need it."""
        for name, slots in self.scheduler.missing_features(plan).items():
            size = next(size for size in self.scheduler.buckets if size >= len(slots))  # shapes that were compiled
            rows = batch.rows(upload(torch.tensor(slots + slots[:1] * (size - len(slots))), self.device))
            features = self.denoiser.branch_features(name, batch.state.inputs[rows], batch.state.times[rows])
            self.feature_rows[name] += len(rows)
            batch.new_features(name, features)
            batch.features[name].index_copy_(1, rows, features)  # [depth, P·B, L, D]

    def _arrive(self, batch: Batch) -> None:
        """Replaces modalities that arrive with this step by what their samples make of them for the later ones."""
        arrived = self.scheduler.arriving()
        for (name, function), slots in arrived.items():
            m, part = self.scheduler.model.modality(name), self.scheduler.model.state_slices[name]
            at = upload(torch.tensor(slots), self.device)
            state, generate = batch.state.state[at, part], batch.constants.generate[at, part]  # [n, L·C] each
            tokens = function(state.unflatten(1, (m.tokens, m.channels)))  # [n, L, C]
            # What is not finite stays, to be reported as such at the end.
            batch.state.state[at, part] = torch.where(generate & state.isfinite(), tokens.flatten(1), state)
        if arrived:
            write_inputs(batch.constants, batch.state)

    def _previews(self, batch: Batch) -> dict[_Run, list[Preview]]:
        """Previews of the step that was just done, for the runs that asked for them."""
        previews: dict[_Run, list[Preview]] = {}
        for i, job in enumerate(self.scheduler.slots):
            if job is None:
                continue
            (run, position), step = self._run_of[job], job.step + 1
            if run.preview is not None and step % run.preview_every == 0 and step < job.steps:
                previews.setdefault(run, []).append(preview(batch, i, job, position, self.scheduler.model))
        return previews

    def _report(self, run: _Run, previews: list[Preview] | None) -> None:
        """Calls the run's progress and preview; not again for steps that are repeated after a restart."""
        steps = sum(job.step for job in run.jobs)
        if steps <= run.reported:
            return
        run.reported = steps
        try:
            if run.progress is not None:
                run.progress(steps, sum(job.steps for job in run.jobs))
            if previews:
                run.preview(previews)
        except BaseException as error:
            self._reject(run, error)

    def _finish(self, run: _Run) -> None:
        if len(run.states) < len(run.jobs) or run not in self._runs:
            return
        states = torch.empty(len(run.jobs), self.scheduler.model.size)  # [B, N]
        try:
            for i, state in run.states.items():
                states[i] = state
        except Exception as error:  # a device that has failed says so here
            self._reject(run, error)
            return
        self._drop(run)
        broken = [i for i, finite in enumerate(states.isfinite().all(dim=1).tolist()) if not finite]
        if broken:
            finish_future(run.future, error=NotFiniteError(broken, states))
        else:
            finish_future(run.future, states)

    def _reject(self, run: _Run, error: BaseException) -> None:
        if run in self._runs:
            self._drop(run)
            finish_future(run.future, error=error)

    def _drop(self, run: _Run) -> None:
        """Forgets a run; its samples leave their slots before the next step."""
        self._runs.remove(run)
        for job in run.jobs:
            job.cancelled = True  # without effect on those that are done
            del self._run_of[job]

    def _failed(self, error: Exception) -> None:
        """Sends the samples of a failed step back to their start, or ends them if nothing else can be tried."""
        live, slots, error = self.scheduler.live, len(self.scheduler.slots), compile_failure(error)
        runs = dict.fromkeys(self._run_of[job][0] for job in live)
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        self.scheduler.restart(alone=not out_of_memory)
        if out_of_memory:
            error.__traceback__ = error.__context__ = None  # it holds the tensors of the failed step
            error = torch.OutOfMemoryError(
                f"max_rows: memory does not suffice for {slots} samples at a time; use fewer"
            )
        self._free()
        if out_of_memory and self.scheduler.shrink(slots):
            smaller = self.scheduler.capacity
            warnings.warn(f"out of memory with {slots} samples at a time; continuing with {smaller}", stacklevel=2)
        elif out_of_memory or len(live) == 1:
            for run in runs:
                self._reject(run, error)

    def _free(self) -> None:
        """Frees the memory of the batches."""
        self._drop_batches()
        self._current = None
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # on a failed device; the futures report that
                torch.cuda.empty_cache()

    def _drop_batches(self) -> None:
        self._batches.clear()
        if self.graphs is not None:
            self.graphs.clear()  # they write into that memory
