"""Noise schedules and solver tables: all the float64 arithmetic of sampling, done on the host before it starts.

Time t runs from 0 (clean data, ᾱ_0 = 1) to N (noisiest); diffusers' timestep k is our t − 1. A solver table holds one
line per call of the model. This file knows nothing of models, states or devices.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from engine.config import CONDITIONINGS, PREDICTIONS, SCHEDULES
from engine.kernels.cfg_step import Coefficient, Guided, Index
from engine.request import SOLVERS

GUIDANCES = ("masked", "alternate", "unidiffuser", "empty")


@dataclass(frozen=True)
class NoiseSchedule:
    """ᾱ_t of a discrete variance-preserving diffusion, x_t = α_t·x0 + σ_t·ε with α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t).

    "scaled_linear" is Stable Diffusion's, "cosine" that of Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 17).
    """

    name: str
    timesteps: int  # N

    def __post_init__(self):
        if self.name not in SCHEDULES:
            raise ValueError(f"schedule: {self.name!r} is not known; use one of {SCHEDULES}")
        if self.timesteps < 2:
            raise ValueError(f"timesteps: {self.timesteps} is too few; use 2 or more")

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        """ᾱ_0 … ᾱ_N, float64 [N + 1], from 1 downwards."""
        if self.name == "scaled_linear":
            beta = np.linspace(0.00085**0.5, 0.0120**0.5, self.timesteps) ** 2
        else:
            f = np.cos((np.arange(self.timesteps + 1) / self.timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
            beta = np.minimum(1 - f[1:] / f[:-1], 0.999)  # clipped, or the last step would destroy everything
        return np.concatenate([[1.0], np.cumprod(1 - beta)])

    def alpha(self, t):
        """α_t for a time or an array of times."""
        return np.sqrt(self.alpha_bar[t])

    def sigma(self, t):
        """σ_t for a time or an array of times."""
        return np.sqrt(1 - self.alpha_bar[t])

    def half_log_snr(self, t):
        """λ_t = log(α_t / σ_t), +∞ at t = 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t)) - np.log(self.sigma(t))


def timesteps(N: int, steps: int) -> list[int]:
    """`steps` evenly spaced times from N down, without the target 0 (diffusers' "trailing" spacing)."""
    if not 1 <= steps <= N:
        raise ValueError(f"steps: {steps} does not work; use 1 to {N}")
    return [round(N - i * N / steps) for i in range(steps)]


@dataclass(frozen=True, eq=False)
class SolverTable:
    """One line per call of the model, columns as in `engine.kernels.cfg_step`."""

    coefficients: np.ndarray  # [S, len(Coefficient)] float32
    indices: np.ndarray  # [S, Index.GUIDED + P − 1] int32

    @property
    def steps(self) -> int:
        """S, how often the model is called."""
        return len(self.coefficients)

    @property
    def guided(self) -> np.ndarray:
        """The codes of the P − 1 extra passes at each step, [S, P − 1]."""
        return self.indices[:, Index.GUIDED :]

    @property
    def refresh(self) -> np.ndarray:
        """Whether the model's inner blocks run at each step, [S] bool."""
        return self.indices[:, Index.REFRESH] != 0

    @cached_property
    def first_guided(self) -> np.ndarray:
        """The first line of `indices` as it would be were every pass on that is ever, [1, Index.GUIDED + P − 1]."""
        line = self.indices[:1].copy()
        first = (self.guided != Guided.OFF).argmax(axis=0)  # 0 for a pass that never is
        line[0, Index.GUIDED :] = self.guided[first, range(len(first))]
        return line

    @cached_property
    def constant_known(self) -> bool:
        """Whether a fully known modality enters all steps alike, in every pass whenever it is on."""
        known = self.coefficients[:, [Coefficient.KNOWN_ALPHA, Coefficient.KNOWN_SIGMA]]
        times = self.indices[:, Index.TIME + 1 : Index.REFRESH]  # of the known, of the dropped, and the dropped's draw
        empty = self.guided == Guided.EMPTY
        off = self.guided == Guided.OFF
        return bool(
            (known == [1, 0]).all()
            and (times == times[0]).all()
            and ((empty | off).all(axis=0) | ~empty.any(axis=0)).all()  # a pass drops always, or nulls always
        )


def solver_table(
    schedule: NoiseSchedule,
    times: list[int],  # strictly descending, in 1 … N; the last step goes to 0
    *,
    prediction: str,
    conditioning: str,
    solver: str = "dpm++",
    eta: float = 0.0,  # DDIM's: 0 deterministic, 1 as noisy as DDPM
    resample: int = 1,  # RePaint's r: how often each stretch of `jump` steps is done
    jump: int = 1,  # RePaint's j
    guidance: str = "masked",
    guidance_scale: float = 1.0,  # w = 1: no guidance
    guidance_interval: tuple[int, int] | None = None,  # times (lowest, highest) with guidance; None: all
    guided_modalities: tuple[int, ...] = (),  # for "alternate" and "unidiffuser": which to guide, by position
    step_cache: int = 1,  # run the model's inner blocks at every step_cache-th step only; 1: at every step
) -> SolverTable:
    """Everything about one row that changes from step to step.

    `prediction` and `conditioning` are what the model was trained with (`engine.config.DiffusionConfig`). Guidance
    "masked" drops the known part, "empty" replaces it by null values, "unidiffuser" has one extra pass per guided
    modality, "alternate" one extra pass that takes the guided modalities in turn. With `step_cache` the inner blocks
    also run where they could not know better: at the first step, after a jump back, and when the passes change (which
    "alternate" does at every step). Raises ValueError on anything out of range.
    """
    _require(prediction in PREDICTIONS, "prediction", prediction, f"use one of {PREDICTIONS}")
    _require(conditioning in CONDITIONINGS, "conditioning", conditioning, f"use one of {CONDITIONINGS}")
    _require(solver in SOLVERS, "solver", solver, f"use one of {SOLVERS}")
    _require(guidance in GUIDANCES, "guidance kind", guidance, f"use one of {GUIDANCES}")
    _require(np.isfinite(guidance_scale), "guidance", guidance_scale, "use a finite number; 1 is no guidance")
    _require(0 <= eta <= 1, "eta", eta, "use 0 to 1")
    _require(eta == 0 or solver == "ddim", "eta", eta, f"only solver 'ddim' has it, not {solver!r}")
    _require(step_cache >= 1, "step_cache", step_cache, "use 1 or more; 1 runs every block at every step")
    _require(resample >= 1, "resample", resample, "use 1 or more; 1 is no resampling")
    _require(jump >= 1, "jump", jump, "use 1 or more")
    _require(resample == 1 or jump < len(times), "jump", jump, f"use fewer than the {len(times)} steps")
    together = guidance in ("masked", "empty")
    _require(together or len(guided_modalities) >= 1, "guided_modalities", (), f"guidance {guidance!r} needs some")
    levels = [0, *reversed(times)]
    _require(
        len(times) >= 1 and all(isinstance(t, int | np.integer) for t in times)
        and levels[-1] <= schedule.timesteps and all(s < t for s, t in zip(levels, levels[1:], strict=False)),
        "times", times, f"use whole numbers descending from at most {schedule.timesteps} to at least 1",
    )  # fmt: skip

    lowest, highest = guidance_interval or (0, schedule.timesteps)
    coefficients, indices = [], []
    ran, ran_codes = 0, ()  # the step at which the model's inner blocks last ran, and its passes
    t_prev = None  # time of the previous step, as long as its x̂0 is of use
    for step, (level, target, jump_to) in enumerate(_repaint_walk(len(times), resample, jump)):
        t, s = levels[level], levels[target]
        w = guidance_scale if lowest <= t <= highest else 1.0
        codes = _guided_codes(guidance, guided_modalities, step, off=w == 1)
        refresh = t_prev is None or step - ran >= step_cache or codes != ran_codes
        if refresh:
            ran, ran_codes = step, codes
        a, b, c, d = _update(schedule, solver, eta, t_prev, t, s)
        t_prev = t
        if jump_to is not None:  # RePaint (arXiv 2201.09865): x_u = k·x_s + m·z′ is linear, so it joins the update
            ratio = schedule.alpha_bar[levels[jump_to]] / schedule.alpha_bar[s]
            k, m = np.sqrt(ratio), np.sqrt(1 - ratio)
            a, b, c, d = k * a, k * b, k * c, np.hypot(k * d, m)
            t_prev = None
        known = (schedule.alpha(t), schedule.sigma(t)) if conditioning == "renoise" else (1.0, 0.0)
        coefficients.append((*known, *_clean_estimate(schedule, prediction, t), a, b, c, d, w))
        # renoise: as noisy as the state, fresh each step. clean: known at time 0, dropped at N, drawn once for all.
        known_time, drop_time, draw = (t, t, step) if conditioning == "renoise" else (0, schedule.timesteps, 0)
        indices.append((t, known_time, drop_time, draw, refresh, *codes))
    return SolverTable(np.array(coefficients, np.float32), np.array(indices, np.int32))


@lru_cache(maxsize=256)
def spaced_table(schedule: NoiseSchedule, steps: int, **options) -> SolverTable:
    """`solver_table` of evenly spaced times, with its options; made once for the same settings."""
    return solver_table(schedule, timesteps(schedule.timesteps, steps), **options)


def _repaint_walk(steps: int, resample: int, jump: int):
    """Yields (level, next level, level to jump back to or None) from level `steps` to 0.

    RePaint's algorithm 1 with its released schedule: at every multiple of `jump` reached, up to the one before the
    noisiest stretch, jump back and repeat, `resample` − 1 times.
    """
    left = {level: resample - 1 for level in range(0, steps - jump, jump)}
    level = steps
    while level > 0:
        target = level - 1
        back = left.get(target, 0) > 0
        yield level, target, target + jump if back else None
        if back:
            left[target] -= 1
        level = target + jump if back else target


def _clean_estimate(schedule: NoiseSchedule, prediction: str, t: int) -> tuple[float, float]:
    """(p, q) of x̂0 = p·x + q·f. v-prediction: v = α·ε − σ·x0 (Salimans & Ho 2022, arXiv 2202.00512)."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return (1 / alpha, -sigma / alpha) if prediction == "epsilon" else (alpha, -sigma)


def _update(schedule: NoiseSchedule, solver: str, eta: float, t_prev: int | None, t: int, s: int) -> tuple:
    """(a, b, c, d) of the step from t to s < t: x ← a·x + b·x̂0 + c·x̂0_prev + d·z; t_prev None: no x̂0_prev."""
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    ratio = schedule.alpha_bar[t] / schedule.alpha_bar[s]
    posterior = sigma_s / sigma_t * np.sqrt(1 - ratio)  # standard deviation of q(x_s | x_t, x0); 0 for s = 0

    if solver == "ddim":  # Song et al. 2021 (arXiv 2010.02502), eq. 12, with ε = (x − α_t·x̂0) / σ_t
        d = eta * posterior
        a = np.sqrt(sigma_s**2 - d**2) / sigma_t
        return a, alpha_s - a * alpha_t, 0.0, d
    if solver == "ddpm":  # Ho et al. 2020 (arXiv 2006.11239), eq. 7, fixed small variance
        return np.sqrt(ratio) * sigma_s**2 / sigma_t**2, alpha_s * (1 - ratio) / sigma_t**2, 0.0, posterior

    # DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2; λ is infinite at s = 0: first order there
    h = schedule.half_log_snr(s) - schedule.half_log_snr(t)
    a, b = sigma_s / sigma_t, -alpha_s * np.expm1(-h)
    if t_prev is None or s == 0:
        return a, b, 0.0, 0.0
    r = (schedule.half_log_snr(t) - schedule.half_log_snr(t_prev)) / h
    return a, b * (1 + 1 / (2 * r)), -b / (2 * r), 0.0


def _guided_codes(guidance: str, modalities: tuple[int, ...], step: int, off: bool) -> tuple[int, ...]:
    if guidance == "unidiffuser":
        codes = tuple(modalities)
    elif guidance == "alternate":
        codes = (modalities[step % len(modalities)],)
    else:
        codes = (Guided.MASKED if guidance == "masked" else Guided.EMPTY,)
    return (Guided.OFF,) * len(codes) if off else codes


def _require(holds: bool, argument: str, value, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{argument}: {value!r} does not work; {remedy}")
