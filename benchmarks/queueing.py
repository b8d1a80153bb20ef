"""What batching between steps can gain over batching whole requests, as the time of a step decides it.

Simulated: requests of one sample arrive at random, and a step of n samples takes a + b·n seconds. Where a step costs
what its samples cost (b ≫ a), a request that enters slows all others, and waiting for the batch before costs hardly
more; where a larger batch is nearly free (a ≫ b), it enters at once at no one's cost.

`python -m benchmarks.queueing` prints the ratios of the 95th percentiles of the latency, for a few ratios a/b.
"""

import random
from collections import deque
from collections.abc import Sequence

import numpy as np

STEPS = (5, 10, 20)  # of a request, equally often


def arrivals(rate: float, seconds: float, draw: random.Random) -> list[float]:
    """Times at which requests arrive, `rate` per second on average (Poisson)."""
    times, now = [], 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        times.append(now)
    return times


def latencies(
    arrived: Sequence[float], steps: Sequence[int], a: float, b: float, most: int, by_step: bool
) -> np.ndarray:
    """Seconds from the arrival of each request to its end, with `most` samples at a time.

    arrived  in seconds, ascending
    steps    of each request
    a, b     a step of n samples takes a + b·n seconds
    by_step  requests enter and leave between steps; else a batch takes what waits and ends with its longest request,
             though samples that are done cost nothing more
    """
    left, ended, now, coming = list(steps), np.zeros(len(arrived)), 0.0, deque(range(len(arrived)))
    running, batch = [], []
    while coming or running:
        if not running:
            now = max(now, arrived[coming[0]])
        if by_step or not running:
            while coming and arrived[coming[0]] <= now and len(running) < most:
                running.append(coming.popleft())
            batch = batch or list(running)
        now += a + b * len(running)
        for i in running:
            left[i] -= 1
        done = [i for i in running if left[i] == 0]
        running = [i for i in running if left[i] > 0]
        if by_step:
            ended[done] = now
        elif not running:
            ended[batch], batch = now, []
    return ended - np.asarray(arrived)


def p95_ratio(plays: Sequence[tuple[Sequence[float], Sequence[int]]], a: float, b: float, most: int) -> float:
    """The p95 of batching between steps, divided by that of batching whole requests.

    plays  times of arrival and numbers of steps; all latencies are taken together
    """
    p95 = []
    for by_step in (True, False):
        seconds = [latencies(arrived, steps, a, b, most, by_step) for arrived, steps in plays]
        p95.append(np.percentile(np.concatenate(seconds), 95))
    return float(p95[0] / p95[1])


def main(most: int = 8, requests: int = 20_000) -> None:
    print("| a/b | 50 % | 80 % | 95 % |\n| ---: | ---: | ---: | ---: |")
    for a in (0.1, 0.4, 1, 2, 5, 20):
        cells = []
        for share in (0.5, 0.8, 0.95):
            draw = random.Random(0)
            capacity = most / (a + most) / np.mean(STEPS)  # requests per second in full batches, with b = 1
            arrived = arrivals(share * capacity, requests / (share * capacity), draw)
            steps = [draw.choice(STEPS) for _ in arrived]
            cells.append(f"{p95_ratio([(arrived, steps)], a, 1.0, most):.2f}")
        print(f"| {a} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
