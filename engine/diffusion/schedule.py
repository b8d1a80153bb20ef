"""Noise schedules: ᾱ_t, and the times of a sampling run, in float64 on the host.

Time t runs from 0 (clean data, ᾱ_0 = 1) to N (noisiest); diffusers' timestep k is our t − 1.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engine.config import SCHEDULES
from engine.errors import InputError

EXPONENTS = {"even": 1.0, "power": 1.5}  # by spacing


@dataclass(frozen=True)
class NoiseSchedule:
    """ᾱ_t of a discrete variance-preserving diffusion, x_t = α_t·x0 + σ_t·ε with α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t).

    "scaled_linear" is Stable Diffusion's, "cosine" that of Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 17).
    """

    name: str
    timesteps: int  # N

    def __post_init__(self):
        if self.name not in SCHEDULES:
            raise InputError("schedule", self.name, f"use one of {', '.join(SCHEDULES)}", "is not known")
        if self.timesteps < 2:
            raise InputError("timesteps", self.timesteps, "use 2 or more", "is too few")

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


def default_spacing(schedule: str) -> str:
    """The spacing of times with which the solvers are nearer to the exact samples (benchmarks/NOTES.md)."""
    return "even" if schedule == "cosine" else "power"


def way_to_time(N: int, way: float, spacing: str) -> int:
    """The time after this fraction of the steps: N at 0, 0 at 1."""
    return round(N * (1 - way) ** EXPONENTS[spacing])


def timesteps(N: int, steps: int, spacing: str = "even") -> list[int]:
    """`steps` different times from N down, without the target 0.

    "even" is diffusers' "trailing" spacing; with "power", N·(1 − i/S)^1.5, steps become shorter towards 0.
    """
    if not 1 <= steps <= N:
        raise InputError("steps", steps, f"use 1 to {N}", "is out of range")
    left = range(steps, 0, -1)  # steps from each time on, which is at least so many
    return [max(n, round(N * n / steps * (n / steps) ** (EXPONENTS[spacing] - 1))) for n in left]
