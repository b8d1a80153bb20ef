"""The steps of samples: their batch in device memory, and one step of all that are in slots. Starts no threads."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.cfg_step import write_inputs
from engine.kernels.sampler_state import BatchConstants
from engine.kernels.step_table import StepColumn
from engine.model.cost import forward_bytes, forward_flops
from engine.model.denoiser import Denoiser
from engine.model.lora import AdapterRows
from engine.sampling.batch import Batch, SampleSpec, batch_constants, upload
from engine.sampling.graphs import StepGraphs
from engine.sampling.scheduler import Arrangement, CacheMode, Job, Scheduler, StepPlan
from engine.sampling.step import denoise_step


class Stepper:
    """Does steps of the samples in its scheduler's slots, on the thread that calls it.

    A sample's result depends only on its own seed, table and masks, up to rounding in the denoiser, not on its slot,
    the batch or the other samples.

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
        by_rows = graphs is None and self.device.type == "cpu"  # on a GPU small launches cost what large ones do
        self.scheduler = Scheduler(model, buckets, keep=graphs is not None, by_rows=by_rows)
        self.plans: Counter[StepPlan] = Counter()  # steps done so far
        self.feature_rows: Counter[str] = Counter()  # rows of `Denoiser.branch_features` so far, by modality
        self.unwanted_rows: Counter[str] = Counter()  # of the steps' rows, those without a modality's prediction
        self.finished = 0  # samples
        self._batches: dict[int, Batch] = {}  # by slots; only the one in use, unless graphs use their memory
        self.batch: Batch | None = None  # the one in use: its slots are the scheduler's
        self._shape = (0, 0)  # lines and passes of the batches' tables
        self._adapted = False  # whether the denoiser holds adapters

    @property
    def forwards(self) -> int:
        """Calls of the denoiser so far."""
        return self.plans.total()

    def work(self, itemsize: int) -> tuple[int, int]:
        """(FLOPs, bytes) of all steps so far, see `engine.model.cost`; itemsize: bytes of a value of the network.

        Bytes are those of whole batches, and without those of branch features.
        """
        model, flops, moved = self.scheduler.model, 0, 0
        for plan, steps in list(self.plans.items()):
            what = plan.outputs, plan.cached, plan.cache_mode is CacheMode.REUSE
            flops += steps * forward_flops(model, plan.passes * plan.slots, *what)
            moved += steps * forward_bytes(model, plan.passes * plan.slots, itemsize, *what)
        for name, rows in list(self.feature_rows.items()):
            flops += forward_flops(model, rows, ()) - forward_flops(model, rows, (), (name,))
        for name, rows in list(self.unwanted_rows.items()):
            flops -= forward_flops(model, rows, (name,)) - forward_flops(model, rows, ())
        return flops, moved

    def compute(self) -> bool:
        """Lets samples leave and enter, then does one step of all that are in slots; False if there are none.

        The step counts as done with `advance` only: until then `scheduler` says which step it was.
        """
        # Triton launches on the current device, whatever device its tensors are on; -1 leaves it as it is.
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            self._rearrange(self.scheduler.arrange())
            if self.batch is None:
                return False
            plan, batch = self.scheduler.plan(), self.batch
            if plan.adapted:
                self._place_adapters(batch)
            self._compute_features(batch, plan)
            if plan.cache_mode is not CacheMode.OFF and batch.cache is None:
                batch.cache = self.denoiser.new_cache(batch.passes * batch.slots)
            if self.graphs is None:
                denoise_step(self.denoiser, batch, plan, self._output_rows(batch, plan))
            else:
                self.graphs(plan, lambda: denoise_step(self.denoiser, batch, plan))
            self.plans[plan] += 1
            self._arrive(batch)
            return True

    def advance(self) -> dict[Job, Tensor]:
        """Counts the step as done; the final states [N] float32, on the device, of the samples that it has finished."""
        # Before the step counts as done, since memory may not suffice for it.
        states = {job: self.batch.state.state[i].clone() for i, job in self.scheduler.finishing()}
        self.scheduler.advance()
        self.finished += len(states)
        return states

    def free(self) -> None:
        """Frees the memory of the batches and of adapters."""
        self._drop_batches()
        if self._adapted:
            self.denoiser.free_adapters()
            self._adapted = False
        self.batch = None
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # on a failed device; the callers' futures report that
                torch.cuda.empty_cache()

    def _rearrange(self, change: Arrangement) -> None:
        """Brings the samples to the slots where the scheduler has put them."""
        source, shape = self.batch, (change.lines, change.passes)
        if shape != self._shape:
            self._drop_batches()
            self._shape = shape
        elif self.graphs is None and (source is None or source.slots != change.slots):
            self._batches.clear()
        self.batch = None
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
        self.batch = batch

    def _constants(self, specs: Sequence[SampleSpec], slots: int) -> BatchConstants:
        return batch_constants(specs, self.scheduler.model, self.device, slots, *self._shape)

    def _compute_features(self, batch: Batch, plan: StepPlan) -> None:
        """Runs the in-blocks of modalities whose inputs stay the same for some steps, in the slots that need it."""
        for name, slots in self.scheduler.missing_features(plan).items():
            size = next(size for size in self.scheduler.buckets if size >= len(slots))  # shapes that were compiled
            moving = all(self.scheduler.slots[i].moves(name) for i in slots)  # this step's passes are enough for them
            padded = upload(torch.tensor(slots + slots[:1] * (size - len(slots))), self.device)
            rows = batch.rows(padded, plan.passes if moving else batch.passes)
            adapted = AdapterRows(*(x[rows % batch.slots] for x in batch.adapted)) if plan.adapted else None
            inputs = batch.state.inputs[rows], batch.state.times[rows]
            features = self.denoiser.branch_features(name, *inputs, adapted)
            self.feature_rows[name] += len(rows)
            batch.new_features(name, features)
            batch.features[name].index_copy_(1, rows, features)  # [depth, P·B, L, D]

    def _output_rows(self, batch: Batch, plan: StepPlan) -> dict[str, Tensor]:
        """The rows of modalities whose prediction not all of them need."""
        wanting = self.scheduler.wanting(plan)
        for name, slots in wanting.items():
            self.unwanted_rows[name] += plan.passes * (batch.slots - len(slots))
        return {name: batch.rows(torch.tensor(slots), plan.passes) for name, slots in wanting.items()}

    def _place_adapters(self, batch: Batch) -> None:
        """Makes the adapters of the samples in slots, and what the batch knows of them, ready for the step."""
        self._adapted = True
        specs = [None if job is None else job.spec for job in self.scheduler.slots]
        places, moved = self.denoiser.adapters.place([spec and spec.adapter for spec in specs])
        if moved and self.graphs is not None:
            self.graphs.clear()
        batch.adapted.place.copy_(upload(torch.tensor(places), self.device))
        scales = [1.0 if spec is None else spec.adapter_scale for spec in specs]
        batch.adapted.scale.copy_(upload(torch.tensor(scales), self.device))

    def _arrive(self, batch: Batch) -> None:
        """Applies the samples' `on_arrival` to the modalities that this step completes."""
        arrived = self.scheduler.arriving()
        for (name, function), slots in arrived.items():
            m, part = self.scheduler.model.modality(name), self.scheduler.model.state_slices[name]
            at = upload(torch.tensor(slots), self.device)
            state, generate = batch.state.state[at, part], batch.constants.generate[at, part]  # [n, L·C] each
            tokens = function(state.unflatten(1, (m.tokens, m.channels)))  # [n, L, C]
            # Values that are not finite stay, to be reported at the end.
            batch.state.state[at, part] = torch.where(generate & state.isfinite(), tokens.flatten(1), state)
        if arrived:
            write_inputs(batch.constants, batch.state)

    def _drop_batches(self) -> None:
        self._batches.clear()
        if self.graphs is not None:
            self.graphs.clear()  # they write into that memory


class SampleSteps:
    """The steps of some samples together, for a caller that sees and may change their states between them.

    They may take different numbers of steps. All fit into the stepper's slots, and nothing else uses these.
    """

    def __init__(self, stepper: Stepper, specs: Sequence[SampleSpec]):
        self.stepper = stepper
        self.jobs = [stepper.scheduler.job(spec) for spec in specs]
        self.count = max(job.steps for job in self.jobs)
        self._finished: dict[Job, Tensor] = {}
        stepper.scheduler.add(self.jobs)

    def compute(self) -> int:
        """Does a step, which counts with `advance` only; returns the time that it started from, the latest of all."""
        self.stepper.compute()
        times = []
        for job in self.stepper.scheduler.live:
            table = job.spec.table
            times.append(table.indices[job.step, table.moving[job.step], StepColumn.TIME].max())
        return int(max(times))

    def advance(self) -> None:
        self._finished |= self.stepper.advance()

    def states(self) -> Tensor:
        """A copy of the states, [B, N] float32 on the device; final ones of samples that are finished."""
        slots = {job: i for i, job in enumerate(self.stepper.scheduler.slots)}
        states = self.stepper.batch.state.state
        return torch.stack([self._finished[job] if job in self._finished else states[slots[job]] for job in self.jobs])

    def change(self, states: Tensor) -> None:
        """Replaces the states, [B, N], after `compute`."""
        batch = self.stepper.batch
        for i, job in enumerate(self.stepper.scheduler.slots):
            if job is not None:
                batch.state.state[i].copy_(states[self.jobs.index(job)])
        for job in self._finished:
            self._finished[job] = states[self.jobs.index(job)].to(batch.state.state)
        write_inputs(batch.constants, batch.state)
