"""The worker: one thread that owns the device and does the steps of all samples that were submitted.

Between two steps it takes in what was submitted meanwhile, runs pending calls of codecs (one for all requests that
wait for the same function), drops what was cancelled, and lets samples enter and leave the slots of its batch. A
caller gets a `concurrent.futures.Future`, which stays cancellable until its result is there.
"""

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compiled import compile_failure
from engine.config import ModelConfig
from engine.errors import InputError
from engine.model.denoiser import Denoiser
from engine.sampling.batch import Batch, SampleSpec
from engine.sampling.calls import Call, Calls
from engine.sampling.graphs import StepGraphs
from engine.sampling.preview import Preview, preview
from engine.sampling.scheduler import Job
from engine.sampling.stepper import Stepper
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


class Sampler(Stepper):
    """Makes samples of many callers, all of them on one thread, which starts with the first of them.

    When memory runs out the slots are halved, with a warning, samples in progress start again, and the slots grow back
    later. When a step fails for another reason its samples start again, one at a time, and only those that fail again
    raise.
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
        super().__init__(denoiser, model, device, buckets=buckets, graphs=graphs)
        self._runs: list[_Run] = []
        self._run_of: dict[Job, tuple[_Run, int]] = {}
        self._inbox: deque[_Run | Call] = deque()
        self._calls = Calls()
        self.worker = Worker(self)

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
        self.free()

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
        if not self.compute():
            return
        live, previews = self.scheduler.live, self._previews(self.batch)
        for job, state in self.advance().items():
            run, position = self._run_of[job]
            run.states[position] = state
        for run in dict.fromkeys(self._run_of[job][0] for job in live):
            self._report(run, previews.get(run))
            self._finish(run)

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
        self.free()
        if out_of_memory and self.scheduler.shrink(slots):
            smaller = self.scheduler.capacity
            warnings.warn(f"out of memory with {slots} samples at a time; continuing with {smaller}", stacklevel=2)
        elif out_of_memory or len(live) == 1:
            for run in runs:
                self._reject(run, error)
