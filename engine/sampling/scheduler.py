"""Which samples are computed together: admission to slots, retirement, and what the next step has to compute.

Host only: no threads and no device memory. Samples of any tasks, steps, solvers and guidance share a step; they enter
and leave between steps.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from engine.config import ModelConfig
from engine.diffusion.masks import whole_tokens
from engine.diffusion.solver_table import StepTable, constant_since
from engine.errors import InputError
from engine.kernels.step_table import StepColumn
from engine.sampling.batch import SampleSpec

LINES = 64  # of the step tables in a batch's memory, at least; longer ones double it
PATIENCE = 64  # steps without running out of memory before a reduced number of slots is doubled again


class CacheMode(Enum):
    """What a step does with the inner blocks' last result (step caching)."""

    OFF = "off"  # computes everything, keeps nothing
    REFRESH = "refresh"  # computes everything, keeps it for the samples whose tables say so, reuses it for the others
    REUSE = "reuse"  # reuses the last result for all samples: the inner blocks do not run


@dataclass(frozen=True)
class StepPlan:
    """What a step computes; steps with equal plans differ in values only, so a plan is the key of its CUDA graph."""

    slots: int  # B
    passes: int  # P′ ≤ P, the passes that are computed
    outputs: tuple[str, ...]  # modalities whose prediction is used
    cached: tuple[str, ...]  # modalities whose branch features are read instead of running their in-blocks
    cache_mode: CacheMode
    adapted: bool = False  # whether a sample has an adapter
    tempered: bool = False  # whether a categorical modality is predicted


@dataclass(eq=False)
class Job:
    """A sample in progress."""

    spec: SampleSpec
    needs: "_Steps"
    arrivals: dict[int, list[str]]  # by steps done: modalities that have arrived then, while others are to come
    priority: int = 0
    turn: int = 0  # in the queue, among those of the same priority
    step: int = 0  # done so far
    features: dict[str, int] = field(default_factory=dict)  # the step from which on the slot's features are valid
    alone: bool = False  # shares no step with other samples, because a step that it was part of has failed
    cancelled: bool = False

    @property
    def steps(self) -> int:
        return self.spec.table.steps

    def constant_since(self, name: str) -> int:
        """The step from which on a modality enters the model as it does now; −1: only at this step, or no in-blocks."""
        return self.needs.constant[name][self.step] if name in self.needs.constant else -1

    def moves(self, name: str) -> bool:
        """Whether a modality with in-blocks enters the model at this step otherwise than before or after."""
        return self.constant_since(name) < 0

    @property
    def done(self) -> bool:
        return self.step == self.steps

    def restart(self, alone: bool) -> None:
        self.turn, self.step, self.features, self.alone = 0, 0, {}, self.alone or alone


@dataclass(frozen=True)
class Arrangement:
    """How the slots change before a step."""

    slots: int  # of the batch that follows; 0: there is nothing to compute
    lines: int  # of its tables
    passes: int  # P that it has memory for
    stay: list[tuple[int, int]]  # (slot before, slot after) of samples that have to be copied
    enter: list[tuple[int, Job]]  # (slot, sample)


class Scheduler:
    """Waiting samples and those in slots.

    model    the modalities of the state
    buckets  numbers of slots that a batch may have, ascending; the smallest that holds the samples is used
    keep     batches stay in memory (CUDA graphs use it), so tables' memory only ever grows
    by_rows  of a branch only those rows are computed that need it, also where samples of a step differ in that: for
             devices where that costs less than all rows, and steps are not captured
    """

    def __init__(self, model: ModelConfig, buckets: Sequence[int], keep: bool = False, by_rows: bool = False):
        self.model, self.buckets, self.keep, self.by_rows = model, list(buckets), keep, by_rows
        self.waiting: deque[Job] = deque()
        self._calls = 0  # of `add`
        self.slots: list[Job | None] = []
        self.lines, self.passes = LINES, 2
        self.capacity = self.buckets[-1]  # slots in use at most; fewer than the largest bucket once memory ran out
        self._patience, self._calm = PATIENCE, 0

    def job(self, spec: SampleSpec, priority: int = 0) -> Job:
        """A sample as a job; raises InputError if it does not fit the model."""
        _check(spec, self.model)
        parts = [spec.generate[part] for part in self.model.state_slices.values()]
        generated, known = tuple(bool(part.any()) for part in parts), tuple(not bool(part.all()) for part in parts)
        needs = _steps(spec.table, self.model, generated, known)
        if needs.clean and not bool((whole_tokens(spec.generate, self.model) == spec.generate).all()):
            raise InputError("generate", "a token", "use whole_tokens for clean conditioning", "is partly known")
        arrivals: dict[int, list[str]] = {}
        for name in spec.on_arrival:
            done = needs.arrival.get(name, spec.table.steps)
            if done < spec.table.steps:
                arrivals.setdefault(done, []).append(name)
        return Job(spec, needs, arrivals, priority)

    def add(self, jobs: Iterable[Job]) -> None:
        """Has them wait: the first behind all calls of the same priority, the second behind the next call, and so on.

        So a call of many samples does not keep the others out until it is done, nor they it. Of jobs added together the
        longest comes first: short ones fill the slots that are free at the end.
        """
        self._calls += 1
        added = sorted(jobs, key=lambda job: -job.steps)
        for turn, job in enumerate(added, self._calls):
            job.turn = turn
        self.waiting = deque(sorted([*self.waiting, *added], key=lambda job: (-job.priority, job.turn)))

    @property
    def idle(self) -> bool:
        return not self.waiting and not any(self.slots)

    @property
    def live(self) -> list[Job]:
        return [job for job in self.slots if job is not None]

    def arrange(self) -> Arrangement:
        """Empties the slots of cancelled samples and fills free ones with waiting samples."""
        staying = [i for i, job in enumerate(self.slots) if job is not None and not job.cancelled]
        entering = self._admit([self.slots[i] for i in staying])
        number = len(staying) + len(entering)
        size = next(size for size in self.buckets if size >= number) if number else 0
        lines, passes = self._memory(entering, shrink=not staying and not self.keep)

        before = self.slots
        if (size, lines, passes) == (len(before), self.lines, self.passes):
            stay = []
            kept = set(staying)
            self.slots = [job if i in kept else None for i, job in enumerate(before)]
        else:
            stay = [(slot, i) for i, slot in enumerate(staying)]
            self.slots = [before[slot] for slot in staying] + [None] * (size - len(staying))
        self.lines, self.passes = lines, passes
        free = [i for i, job in enumerate(self.slots) if job is None]
        enter = list(zip(free, entering, strict=False))
        for i, job in enter:
            self.slots[i] = job
        return Arrangement(size, lines, passes, stay, enter)

    def plan(self) -> StepPlan:
        """What the next step of the samples in slots computes."""
        live = self.live
        used = frozenset().union(*(job.needs.outputs[job.step] for job in live))
        names = [m.name for m in self.model.modalities]
        enough = any if self.by_rows else all
        cached = tuple(name for name in names if enough(not job.moves(name) for job in live))
        mode = CacheMode.OFF
        if any(job.needs.uses_cache for job in live):
            mode = CacheMode.REFRESH if any(job.needs.refresh[job.step] for job in live) else CacheMode.REUSE
        passes = max(job.needs.passes[job.step] for job in live)
        adapted = any(job.spec.adapter is not None for job in live)
        tempered = any(names[i] in used for i in self.model.categorical)
        return StepPlan(len(self.slots), passes, tuple(n for n in names if n in used), cached, mode, adapted, tempered)

    def missing_features(self, plan: StepPlan) -> dict[str, list[int]]:
        """Slots whose branch features have to be computed before a step of this plan; they count as computed then."""
        missing: dict[str, list[int]] = {}
        for name in plan.cached:
            for i, job in enumerate(self.slots):
                if job is not None and (job.moves(name) or job.features.get(name) != job.constant_since(name)):
                    job.features[name] = job.constant_since(name)
                    missing.setdefault(name, []).append(i)
        return missing

    def wanting(self, plan: StepPlan) -> dict[str, list[int]]:
        """Slots whose prediction of a modality is used, where the out-blocks need not run for all of them.

        Adapters are bound to all rows of a step.
        """
        if not self.by_rows or plan.adapted:
            return {}
        outputs = [(i, job.needs.outputs[job.step]) for i, job in enumerate(self.slots) if job is not None]
        deep = [m.name for m in self.model.modalities if m.depth > 0 and m.name in plan.outputs]
        slots = {name: [i for i, used in outputs if name in used] for name in deep}
        return {name: wanting for name, wanting in slots.items() if len(wanting) < len(self.slots)}

    def finishing(self) -> list[tuple[int, Job]]:
        """The (slot, sample) that the present step finishes."""
        return [(i, job) for i, job in enumerate(self.slots) if job is not None and job.step + 1 == job.steps]

    def advance(self) -> None:
        """Counts a step that was done, and empties the slots of the samples that it has finished."""
        for i, job in enumerate(self.slots):
            if job is not None:
                job.step += 1
                if job.done:
                    self.slots[i] = None
        self._calm += 1
        if self.capacity < self.buckets[-1] and self._calm >= self._patience:
            self.capacity = next(size for size in self.buckets if size >= min(2 * self.capacity, self.buckets[-1]))
            self._calm = 0

    def arriving(self) -> dict[tuple[str, Callable], list[int]]:
        """Slots in which a modality arrives with the present step, by its name and its sample's `on_arrival`."""
        slots: dict[tuple[str, Callable], list[int]] = {}
        for i, job in enumerate(self.slots):
            for name in job.arrivals.get(job.step + 1, ()) if job is not None else ():
                slots.setdefault((name, job.spec.on_arrival[name]), []).append(i)
        return slots

    def restart(self, alone: bool = False) -> None:
        """Sends all samples in slots back to wait for their first step, from now on each alone if `alone`."""
        live = self.live
        for job in live:
            job.restart(alone)
        self.waiting.extendleft(reversed(live))
        self.slots = []

    def shrink(self, slots: int) -> bool:
        """Halves the slots after that many ran out of memory; False if no bucket is that small."""
        smaller = [size for size in self.buckets if 2 * size <= slots]
        if smaller:
            self.capacity, self._calm = smaller[-1], 0
            self._patience *= 2  # so that trying again costs less and less
        return bool(smaller)

    def _admit(self, staying: list[Job]) -> list[Job]:
        """Takes samples that enter from the front of the queue; one that has to be alone enters empty slots only."""
        entering: list[Job] = []
        if any(job.alone for job in staying):
            return entering
        while self.waiting and len(staying) + len(entering) < self.capacity:
            if self.waiting[0].cancelled:
                self.waiting.popleft()
            elif not self.waiting[0].alone:
                entering.append(self.waiting.popleft())
            elif staying or entering:
                break
            else:
                return [self.waiting.popleft()]
        return entering

    def _memory(self, entering: list[Job], shrink: bool) -> tuple[int, int]:
        """(lines, passes) of the tables' memory; `shrink`: it may become smaller, nothing that is there is needed."""
        lines, passes = (LINES, 2) if shrink else (self.lines, self.passes)
        for job in entering:
            while lines <= job.steps:  # one more line than steps: the last changes nothing
                lines *= 2
            passes = max(passes, 1 + job.spec.table.kinds.shape[2])
        return lines, passes


class _Steps(NamedTuple):
    """What each step of a sample needs; samples with the same table that know the same modalities share it."""

    passes: list[int]
    refresh: list[bool]  # whether the inner blocks have to run
    outputs: list[frozenset[str]]  # modalities whose prediction is used
    constant: dict[str, tuple[int, ...]]  # of modalities with in-blocks, `constant_since`
    uses_cache: bool  # whether there is a step at which the inner blocks need not run
    arrival: dict[str, int]  # steps after which each generated modality is done
    clean: bool  # whether known tokens have a time other than that of generated ones


@lru_cache(maxsize=64)
def _steps(table: StepTable, model: ModelConfig, generated: tuple[bool, ...], known: tuple[bool, ...]) -> _Steps:
    """generated, known: whether each modality has elements of either kind."""
    modalities = list(zip(model.modalities, generated, known, strict=True))
    outputs = [
        frozenset(m.name for (m, some, _), moves in zip(modalities, line, strict=True) if moves and some)
        for line in table.moving.tolist()
    ]
    constant = {m.name: constant_since(table, i, *kinds) for i, (m, *kinds) in enumerate(modalities) if m.depth > 0}
    refresh = table.refresh.tolist()
    arrival = {name: step for step, names in enumerate(outputs, 1) for name in names}
    clean = bool((table.indices[..., StepColumn.KNOWN_TIME] != table.indices[..., StepColumn.TIME]).any())
    return _Steps(table.passes.tolist(), refresh, outputs, constant, not all(refresh), arrival, clean)


def _check(spec: SampleSpec, model: ModelConfig) -> None:
    values = {"generate": spec.generate, "known": spec.known} | ({} if spec.null is None else {"null": spec.null})
    for name, tensor in values.items():
        if tensor.shape != (model.size,):
            raise InputError(name, tuple(tensor.shape), f"the model's state is [{model.size}]", "is the wrong shape")
    found, wanted = spec.table.indices.shape[1], len(model.modalities)
    if found != wanted:
        raise InputError("table", found, f"make it for the model's {wanted}", "is the wrong number of modalities")
