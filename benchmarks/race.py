"""Times contenders against each other: on the same inputs, checked first, warmed up, then timed in turns.

A machine's speed drifts, so contenders that are timed one after the other run under different conditions. Here all
contenders of a group run once per round, in an order that rotates. pytest-benchmark, which times one function at a
time, then gets the times already measured, through a clock that advances by them.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.device import synchronize

ROUND_SECONDS = 0.005  # short calls are repeated until a round takes this long, far above the clock's resolution


class Refusal(str):
    """Why a contender does not take part, where that is an error; any other reason is a plain string."""


@dataclass(frozen=True)
class Contender:
    """One way to compute something."""

    run: Callable[[], object]  # one call on inputs that are ready
    expected: Callable[[], Tensor] | None = None  # what `run` must return; None: it is the reference itself
    tolerance: float = 1e-5  # largest relative error, in the 2-norm
    flops: float = 0  # of one call
    moved: float = 0  # bytes of one call, at least
    images: float = 0  # that one call generates or trains on
    facts: dict = field(default_factory=dict)  # more to record
    within: Callable[[], AbstractContextManager] = nullcontext  # entered before the clock starts

    def mismatch(self) -> Refusal | None:
        """How its result differs from the expected one, if by more than the tolerance."""
        if self.expected is None:
            return None
        with self.within():
            result, expected = self.run().double(), self.expected().double()
        error = ((result - expected).norm() / expected.norm()).item()
        if error <= self.tolerance:
            return None
        return Refusal(f"computes something else: relative error {error:.2g}, above {self.tolerance:g}")


@dataclass(frozen=True)
class Timing:
    """The times of one contender."""

    seconds: list[float]  # of one call, by round
    peak_bytes: int | None  # of device memory beyond what the call found, without a graph's own pool; None on a CPU

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time_in_turns(
    contenders: dict[str, Contender],
    device: torch.device,
    seconds: float,
    least: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times all contenders in turns for about `seconds` in all, at least `least` rounds each, after a warm-up."""
    repeats, peaks, round_seconds = {}, {}, 0.0
    for name, contender in contenders.items():
        with contender.within():
            contender.run()
        once = min(_timed(contender, 1, device, clock) for _ in range(2))
        repeats[name] = max(1, round(ROUND_SECONDS / once))
        round_seconds += once * repeats[name]
        peaks[name] = _peak_bytes(contender, device)
    names, times = list(contenders), {name: [] for name in contenders}
    for number in range(max(least, min(200, round(seconds / round_seconds)))):
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            times[name].append(_timed(contenders[name], repeats[name], device, clock))
    return {name: Timing(times[name], peaks[name]) for name in names}


def _timed(contender: Contender, repeats: int, device: torch.device, clock: Callable[[], float]) -> float:
    with contender.within():
        synchronize(device)
        started = clock()
        for _ in range(repeats):
            contender.run()
        synchronize(device)
        return (clock() - started) / repeats


def _peak_bytes(contender: Contender, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with contender.within():
        contender.run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def record(contender: Contender, timing: Timing, dtype: str) -> dict:
    """What is stored beside the times: the cost, and the rates at the median."""
    median = timing.median
    stored = {"dtype": dtype, "peak_bytes": timing.peak_bytes, **contender.facts}
    stored["p50"], stored["p95"] = median, sorted(timing.seconds)[int(0.95 * (len(timing.seconds) - 1) + 0.5)]
    if contender.flops:
        stored |= {"flops": contender.flops, "flops_per_second": contender.flops / median}
    if contender.moved:
        stored |= {"bytes": contender.moved, "bytes_per_second": contender.moved / median}
    if contender.images:
        stored["images_per_second"] = contender.images / median
    return stored


class Replay:
    """A clock for pytest-benchmark that advances only when a time already measured is played back."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, seconds: list[float]) -> Callable[[], None]:
        """A function whose n-th call takes the n-th time by this clock."""
        times = iter(seconds)

        def call() -> None:
            self.now += next(times)

        return call


CLOCK = Replay()


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function of no arguments on static CUDA tensors, as a replayed CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
