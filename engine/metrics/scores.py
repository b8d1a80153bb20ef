"""`Score`: a number with its bootstrap interval and the count it was computed from."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NORMAL_95 = 1.959964  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class Score:
    value: float
    low: float  # of the 95 % interval; the value itself where it was not bootstrapped
    high: float
    count: int  # samples


@dataclass(frozen=True)
class Bootstrap:
    """Resamples with replacement (Efron 1979); 0 replicates: no intervals."""

    replicates: int = 200
    seed: int = 0

    def score(
        self, count: int, statistic: Callable[[np.ndarray], float], replicates: int | None = None, biased: bool = False
    ) -> Score:
        """The statistic of all samples, and between which percentiles, 2.5 and 97.5, that of resamples lies.

        statistic   of samples given by their indices [n] int64 in 0 … count − 1, repeated ones counted as often
        replicates  at most so many
        biased      of a statistic that depends on how many distinct samples there are, such as a Fréchet distance or
                    distinct n-grams: a resample has fewer, so that all replicates may lie on one side of the value.
                    The interval is then the value ± 1.96 standard errors
        """
        value = float(statistic(np.arange(count)))
        generator = np.random.default_rng(self.seed)
        replicates = self.replicates if replicates is None else min(replicates, self.replicates)
        if replicates < 2:
            return Score(value, value, value, count)
        found = [statistic(generator.integers(count, size=count)) for _ in range(replicates)]
        if biased:
            half = NORMAL_95 * float(np.std(found, ddof=1))
            return Score(value, value - half, value + half, count)
        low, high = np.percentile(found, [2.5, 97.5])
        return Score(value, float(low), float(high), count)

    def mean(self, values: np.ndarray) -> Score:
        """The mean of one value of each sample [n]."""
        values = np.asarray(values, np.float64)
        return self.score(len(values), lambda indices: values[indices].mean())
