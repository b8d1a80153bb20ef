"""Step tables: the coefficients and times of every step of one sample, computed in float64 before sampling starts.

At a step from time t to s < t every modality that moves is updated as (columns: `engine.kernels.step_table`)

    x̂0 = p·x + q·f                          f: the model's prediction, of categorical modalities x̂0 itself
    x  ← a·x + b·x̂0 + c·x̂0_prev + d·z + e·x̂0_prev2

and those that do not move keep their state: they wait at time N, as pure noise, or have arrived at time 0. Tables
are independent of models, states and devices.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from engine.config import DiffusionConfig
from engine.diffusion.schedule import NoiseSchedule, timesteps
from engine.diffusion.solvers import clean_estimate, langevin, update
from engine.errors import InputError
from engine.kernels.step_table import NOOP_STEP, Coefficient, PassKind, StepColumn
from engine.request import GUIDANCE_KINDS, SOLVERS


@dataclass(frozen=True)
class SolverOptions:
    """How a sample gets from noise to data."""

    solver: str = "dpm++"
    eta: float = 0.0  # of DDIM: 0 deterministic, 1 as noisy as DDPM
    resample: int = 1  # RePaint's r: how often each stretch of `jump` steps is done
    jump: int = 1  # RePaint's j
    inner_steps: int = 0  # Langevin steps at each time but the first, before the step to the next one
    step_size: float = 1.0  # of those, in units of σ_t²
    step_cache: int = 1  # run the model's inner blocks at every step_cache-th step only; 1: at every step
    # Modalities, by position, in the order in which they are generated: those of one entry move together while later
    # ones wait and earlier ones have arrived. (): all together. More than one entry needs conditioning "clean".
    order: tuple[tuple[int, ...], ...] = ()
    # Modalities, by position, of which the model predicts x̂0, and the temperature of the probabilities it comes from.
    categorical: tuple[int, ...] = ()
    temperature: float = 1.0


@dataclass(frozen=True)
class GuidanceOptions:
    """Which extra passes a step has, and how far they push."""

    # "masked" drops the known part; "empty" replaces it by null values; "unidiffuser" has one extra pass for each of
    # `modalities` that drops everything else; "alternate" has one such pass, for each of them in turn.
    kind: str = "masked"
    scale: float = 1.0  # w; 1: no guidance
    interval: tuple[int, int] | None = None  # times (lowest, highest) with guidance; None: all
    modalities: tuple[int, ...] = ()  # for "alternate" and "unidiffuser": which to guide, by position
    first_stage: int = 0  # the entry of `SolverOptions.order` from which on there is something known to drop


@dataclass(frozen=True, eq=False)
class StepTable:
    """One line per call of the model and, in it, one entry per modality."""

    coefficients: np.ndarray  # [S, M, len(Coefficient)] float32
    indices: np.ndarray  # [S, M, StepColumn.PASS + P − 1] int32

    @property
    def steps(self) -> int:
        """S, how often the model is called."""
        return len(self.coefficients)

    @property
    def kinds(self) -> np.ndarray:
        """`PassKind` of the P − 1 extra passes, [S, M, P − 1]."""
        return self.indices[:, :, StepColumn.PASS :]

    @property
    def passes(self) -> np.ndarray:
        """How many passes each step needs, up to the last one that is on, [S]."""
        on = (self.kinds != PassKind.OFF).any(axis=1)  # [S, P − 1]
        return 1 + (on * np.arange(1, on.shape[1] + 1)).max(axis=1, initial=0)

    @property
    def moving(self) -> np.ndarray:
        """Which modalities each step updates, [S, M] bool: only their predictions are used."""
        return self.coefficients[:, :, Coefficient.Q] != 0

    @property
    def refresh(self) -> np.ndarray:
        """Whether the model's inner blocks have to run at each step, [S] bool."""
        return self.indices[:, 0, StepColumn.REFRESH] != 0


def solver_table(
    diffusion: DiffusionConfig,
    times: list[int],  # strictly descending, in 1 … N; the last step goes to 0
    modalities: int,  # M
    solver: SolverOptions = SolverOptions(),  # noqa: B008 - frozen
    guidance: GuidanceOptions = GuidanceOptions(),  # noqa: B008 - frozen
) -> StepTable:
    """The table of one sample; each entry of `solver.order` takes all the times.

    With `step_cache` the inner blocks also run where their last result would be of another kind: at the first step of
    an entry, after a jump back, and when the passes change (which "alternate" does at every step).
    Raises InputError on anything out of range.
    """
    schedule = NoiseSchedule(diffusion.schedule, diffusion.timesteps)
    _check_solver(solver, diffusion, len(times), modalities)
    _check_guidance(guidance, solver, modalities)
    levels = _levels(times, schedule.timesteps)
    walk = list(_walk(len(times), solver))
    stages = solver.order or (tuple(range(modalities)),)

    lines = _Lines(diffusion, solver, guidance, modalities)
    for stage, moving in enumerate(stages):
        arrived = {m for before in stages[:stage] for m in before}
        first = True
        earlier: tuple[int, ...] = ()  # times of the steps before, latest first, as long as their x̂0 is of use
        for level, target, jump_to in walk:
            t, s = levels[level], levels[target]
            if s == t:
                a, b, c, d, e = langevin(schedule, solver.step_size, t)
            else:
                a, b, c, d, e = update(schedule, solver.solver, solver.eta, earlier, t, s)
            if jump_to is not None:  # RePaint (arXiv 2201.09865): x_u = k·x_s + m·z′ is linear: it joins the update
                ratio = schedule.alpha_bar[levels[jump_to]] / schedule.alpha_bar[s]
                k, m = np.sqrt(ratio), np.sqrt(1 - ratio)
                a, b, c, d, e = k * a, k * b, k * c, np.hypot(k * d, m), k * e
            lines.add(schedule, stage, moving, arrived, t, first, (a, b, c, d, e))
            first = jump_to is not None
            earlier = (t, *earlier[:1]) if s < t and not first else ()
    return StepTable(np.array(lines.coefficients, np.float32), np.array(lines.indices, np.int32))


@lru_cache(maxsize=256)
def spaced_table(
    diffusion: DiffusionConfig,
    steps: int,
    modalities: int,
    solver: SolverOptions,
    guidance: GuidanceOptions,
    spacing: str = "even",
) -> StepTable:
    """`solver_table` of as many times as steps; made once for the same settings."""
    return solver_table(diffusion, timesteps(diffusion.timesteps, steps, spacing), modalities, solver, guidance)


def constant_since(table: StepTable, modality: int, generated: bool, known: bool) -> tuple[int, ...]:
    """For each step, the first step of the unbroken run of steps at which a modality has the same inputs and times.

    The same in every pass: then the features of its in-blocks are the same too and can be reused. −1 for a step that
    shares them with neither neighbour.
    generated, known  whether the modality has elements of either kind
    """
    values, indices = table.coefficients[:, modality], table.indices[:, modality]
    solver = values[:, Coefficient.A : Coefficient.E + 1]
    noise = values[:, [Coefficient.KNOWN_ALPHA, Coefficient.KNOWN_SIGMA]]
    matters = (PassKind.DROPS_KNOWN | PassKind.NULLS_KNOWN) * known | PassKind.DROPS_STATE * generated
    kinds = indices[:, StepColumn.PASS :] & matters
    changed = (kinds[1:] != kinds[:-1]).any(axis=1)  # [S − 1]: step n + 1 against step n
    drops = (kinds[1:] != PassKind.OFF).any(axis=1)
    dropped = indices[:, [StepColumn.DROP_TIME, StepColumn.DROP_DRAW]]
    changed |= drops & (dropped[1:] != dropped[:-1]).any(axis=1)
    if known:
        changed |= (noise[1:] != noise[:-1]).any(axis=1) | (noise[1:, 1] != 0)  # renoised: other noise at every step
        changed |= indices[1:, StepColumn.KNOWN_TIME] != indices[:-1, StepColumn.KNOWN_TIME]
    if generated:
        changed |= (solver[:-1] != [1, 0, 0, 0, 0]).any(axis=1)
        changed |= indices[1:, StepColumn.TIME] != indices[:-1, StepColumn.TIME]
    first = np.concatenate([[True], changed])
    alone = first & np.concatenate([changed, [True]])
    since = np.maximum.accumulate(np.where(first, np.arange(table.steps), 0))
    return tuple(np.where(alone, -1, since).tolist())


@dataclass
class _Lines:
    """The lines of a table so far."""

    diffusion: DiffusionConfig
    solver: SolverOptions
    guidance: GuidanceOptions
    modalities: int
    coefficients: list = field(default_factory=list)  # [S][M][len(Coefficient)]
    indices: list = field(default_factory=list)  # [S][M][StepColumn.PASS + P − 1]
    refreshed: int = 0  # the step at which the model's inner blocks last ran, and its passes:
    refreshed_kinds: tuple = ()

    def add(
        self,
        schedule: NoiseSchedule,
        stage: int,
        moving: tuple[int, ...],
        arrived: set[int],
        t: int,
        first: bool,  # of its stage or after a jump back
        update: tuple[float, float, float, float, float],
    ) -> None:
        N, step, renoise = schedule.timesteps, len(self.indices), self.diffusion.conditioning == "renoise"
        lowest, highest = self.guidance.interval or (0, N)
        w = self.guidance.scale if lowest <= t <= highest and stage >= self.guidance.first_stage else 1.0
        kinds = _pass_kinds(self.guidance, moving, arrived, self.modalities, step, off=w == 1)  # [M][P − 1]
        refresh = first or step - self.refreshed >= self.solver.step_cache or kinds != self.refreshed_kinds
        if refresh:
            self.refreshed, self.refreshed_kinds = step, kinds
        # renoise: known values as noisy as the state, fresh each step; clean: at time 0, dropped at N, drawn once
        noise = (schedule.alpha(t), schedule.sigma(t)) if renoise else (1.0, 0.0)
        known_time, drop_time, draw = (t, t, step) if renoise else (0, N, 0)
        of_prediction = clean_estimate(schedule, self.diffusion.prediction, t)
        estimates = ((0.0, 1.0) if m in self.solver.categorical else of_prediction for m in range(self.modalities))
        lines = [(*noise, *estimate, *update, w, self.solver.temperature) for estimate in estimates]
        times = {m: t if m in moving else 0 if m in arrived else N for m in range(self.modalities)}
        self.coefficients.append([lines[m] if m in moving else NOOP_STEP for m in times])
        self.indices.append([(times[m], known_time, drop_time, draw, refresh, *kinds[m]) for m in times])


def _pass_kinds(
    guidance: GuidanceOptions, moving: tuple[int, ...], arrived: set[int], modalities: int, step: int, off: bool
) -> tuple[tuple[PassKind, ...], ...]:
    """The kinds of a step's extra passes, for each modality: [M][P − 1]."""
    guides, drops = PassKind.GUIDES, PassKind.DROPS_KNOWN
    dropped = drops | PassKind.DROPS_STATE
    if guidance.kind in ("alternate", "unidiffuser"):
        guided = guidance.modalities
        if guidance.kind == "alternate":
            guided = (guided[step % len(guided)],)
        kinds = [[guides | drops if m == own else dropped for own in guided] for m in range(modalities)]
    elif guidance.kind == "empty":
        kinds = [[guides | PassKind.NULLS_KNOWN]] * modalities
    else:
        kinds = [[guides | drops if m in moving else dropped if m in arrived else drops] for m in range(modalities)]
    return tuple(tuple(PassKind.OFF if off else kind for kind in several) for several in kinds)


def _walk(steps: int, solver: SolverOptions):
    """Yields (level, next level, level to jump back to or None) from level `steps` to 0.

    RePaint's algorithm 1 (arXiv 2201.09865): at the levels 0, jump, 2·jump, … up to the one before the noisiest
    stretch, jump back and repeat, `resample` − 1 times. (The released code does so at levels 1, jump + 1, … instead,
    and so does not repeat the last step.) Langevin steps stay at their level; the
    noisiest has none, since its state is pure noise.
    """
    left = {level: solver.resample - 1 for level in range(0, steps - solver.jump, solver.jump)}
    level = steps
    while level > 0:
        for _ in range(solver.inner_steps if level < steps else 0):
            yield level, level, None
        target = level - 1
        back = left.get(target, 0) > 0
        yield level, target, target + solver.jump if back else None
        if back:
            left[target] -= 1
        level = target + solver.jump if back else target


def _levels(times: list[int], N: int) -> list[int]:
    """Times from 0 upwards, checked."""
    levels = [0, *reversed(times)]
    whole = all(isinstance(t, int | np.integer) for t in times)
    if not (times and whole and levels[-1] <= N and all(s < t for s, t in zip(levels, levels[1:], strict=False))):
        raise InputError("times", times, f"use whole numbers descending from at most {N} to at least 1")
    return levels


def _check_solver(solver: SolverOptions, diffusion: DiffusionConfig, steps: int, modalities: int) -> None:
    if solver.solver not in SOLVERS:
        raise InputError("solver", solver.solver, f"use one of {', '.join(SOLVERS)}", "is not known")
    if not 0 <= solver.eta <= 1:
        raise InputError("eta", solver.eta, "use 0 to 1", "is out of range")
    if solver.eta != 0 and solver.solver != "ddim":
        raise InputError("eta", solver.eta, f"use 0, or solver ddim; {solver.solver} has no η")
    for key, lowest in (("resample", 1), ("jump", 1), ("step_cache", 1), ("inner_steps", 0)):
        if getattr(solver, key) < lowest:
            raise InputError(key, getattr(solver, key), f"use {lowest} or more", "is out of range")
    if not solver.temperature > 0:
        raise InputError("temperature", solver.temperature, "use more than 0", "is out of range")
    if not solver.step_size > 0:
        raise InputError("step_size", solver.step_size, "use more than 0", "is out of range")
    if solver.inner_steps and solver.resample > 1:
        raise InputError("resample", solver.resample, "use 1 with Langevin steps, which take its place")
    if solver.resample > 1 and solver.jump >= steps:
        raise InputError("jump", solver.jump, f"use fewer than the {steps} steps", "is out of range")
    named = [m for entry in solver.order for m in entry]
    if len(set(named)) != len(named) or not set(named) <= set(range(modalities)) or () in solver.order:
        raise InputError("order", solver.order, f"name each of the {modalities} modalities once at most, from 0")
    if len(solver.order) > 1 and diffusion.conditioning != "clean":
        raise InputError("order", solver.order, "a model with renoise conditioning generates all modalities together")


def _check_guidance(guidance: GuidanceOptions, solver: SolverOptions, modalities: int) -> None:
    if guidance.kind not in GUIDANCE_KINDS:
        raise InputError("guidance_kind", guidance.kind, f"use one of {', '.join(GUIDANCE_KINDS)}", "is not known")
    if not np.isfinite(guidance.scale):
        raise InputError("guidance", guidance.scale, "use a finite number; 1 means no guidance")
    if guidance.kind in ("alternate", "unidiffuser") and not guidance.modalities:
        raise InputError("guided_modalities", (), f"guidance {guidance.kind!r} needs some", "is empty")
    if not set(guidance.modalities) <= set(range(modalities)):
        raise InputError("guided_modalities", guidance.modalities, f"number the {modalities} modalities from 0")
    if guidance.kind != "masked" and len(solver.order) > 1:
        raise InputError("guidance_kind", guidance.kind, "use masked, or order together")
