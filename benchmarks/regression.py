"""Measures a few ratios again and compares them with a stored run: a check of speed that CI can afford.

python -m benchmarks.regression        exit status 1 if a ratio has become much larger

The contenders are those of `pytest benchmarks/`, timed in turns in this process, in one thread, by the CPU time that
they take, so that other processes hardly enter. A ratio is that of the smallest times; it is a regression if it is
more than 1.5 times the stored one, on another processor than the stored run's more than 3 times.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import test_kernels, test_loop, test_sampling
from benchmarks.machine import facts
from benchmarks.questions import PRODUCTS
from benchmarks.race import Contender, time_in_turns
from benchmarks.stored import read
from engine.command import Parser, path, refuse
from engine.command import run as run_command
from engine.errors import InputError

COMMAND = "python -m benchmarks.regression"
RESULTS = Path(__file__).parent / "results"
LOOP = "loop, text-to-image, batch 1, 10 steps"
GUIDANCE = "sampling, guided joint of the U-ViT-multi, batch 1, 10 steps"
NORM = "LayerNorm + modulate, 2 × 32 tokens of 192"
RESIDUAL = f"gated residual + {NORM}"
STEP = "cfg_step, 1 rows of 1024"
GATHERED = "PyTorch, times gathered before (less work)"

ON_ANOTHER_PROCESSOR = 2.0  # times the tolerance: what products cost beside the rest depends on their instructions

Place = tuple[str, str]  # (group, contender)


@dataclass(frozen=True)
class Baseline:
    """A stored run's part that is measured again."""

    name: str
    device: str
    dtype: torch.dtype
    seconds: dict[Place, float]  # the smallest of each contender


@dataclass(frozen=True)
class Ratio:
    """The time of one contender over that of another, which need not be in the same group."""

    text: str
    ours: Place
    theirs: Place

    def of(self, seconds: dict[Place, float]) -> float:
        return seconds[self.ours] / seconds[self.theirs]


RATIOS = (
    Ratio("eager loop / its matrix products", (LOOP, "eager"), (LOOP, PRODUCTS)),
    Ratio("two passes / three", (GUIDANCE, "alternate, 2 passes"), (GUIDANCE, "UniDiffuser, 3 passes in a batch")),
    Ratio("norm, modulate / PyTorch's", (NORM, "engine"), (NORM, GATHERED)),
    Ratio("residual, norm, modulate / PyTorch's", (RESIDUAL, "engine"), (RESIDUAL, GATHERED)),
    Ratio("cfg_step / ten steps' matrix products", (STEP, "engine"), (LOOP, PRODUCTS)),
)
PLACES = [place for ratio in RATIOS for place in (ratio.ours, ratio.theirs)]


def baseline(results: Path) -> Baseline:
    """The latest stored run on a CPU that has all of RATIOS; raises InputError about "results" if there is none."""
    runs = {file: read(file) for file in sorted(results.glob("*.json"))}
    timed = [(file, run) for file, run in runs.items() if "experiment" not in run]
    for file, run in sorted(timed, key=lambda item: item[1]["datetime"], reverse=True):
        rows = {(b["group"], b["extra_info"].get("contender")): b for b in run["benchmarks"]}
        machine = run["machine_info"]["engine"]
        if "cuda" not in machine and rows.keys() >= set(PLACES):
            dtype = getattr(torch, rows[LOOP, "eager"]["extra_info"]["dtype"])
            seconds = {place: rows[place]["stats"]["min"] for place in PLACES}
            return Baseline(file.name, machine["device"], dtype, seconds)
    remedy = f"store one with `pytest benchmarks/ --benchmark-json {results}/NAME.json`"
    raise InputError("results", results, remedy, "has no run on a CPU with all ratios")


def contenders(dtype: torch.dtype) -> dict[Place, Contender]:
    """Those that RATIOS need, as `pytest benchmarks/` builds them on a CPU."""
    groups: dict[str, dict] = {}

    def collect(group: str, name: str, build: Callable[[], dict]) -> None:
        groups[group] = build()

    device, full = torch.device("cpu"), False
    test_loop.test_loop(collect, lambda *_, **__: {}, device, dtype, full, "eager", batch=1)
    test_sampling.test_joint_guidance(collect, device, dtype, full, steps=10, contender=None, batch=1)
    for residual in (False, True):
        test_kernels.test_adaln(collect, device, dtype, full, "engine", rows=2, residual=residual)
    test_kernels.test_cfg_step(collect, device, full, "engine", batch=1)
    return {(group, name): groups[group][name] for group, name in PLACES}


@torch.no_grad()
def measured(dtype: torch.dtype, seconds: float) -> dict[Place, float]:
    """The smallest CPU seconds of each contender, over rounds that take about `seconds` in all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take CPU time too
    try:
        timings = time_in_turns(contenders(dtype), torch.device("cpu"), seconds, clock=time.process_time)
    finally:
        torch.set_num_threads(before)
    return {place: min(timing.seconds) for place, timing in timings.items()}


def compared(now: dict[Place, float], stored: dict[Place, float], tolerance: float) -> tuple[list[str], bool]:
    """(a table of all ratios, whether none is a regression)."""
    lines, good = [f"{'':>38} {'stored':>8} {'now':>8}  now/stored"], True
    for ratio in RATIOS:
        a, b = ratio.of(now), ratio.of(stored)
        slower = a > tolerance * b
        good &= not slower
        lines.append(f"{ratio.text:>38} {b:8.3f} {a:8.3f} {a / b:8.2f}  {'REGRESSION' if slower else ''}".rstrip())
    return lines, good


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(COMMAND, description=__doc__)
    add = parser.add_argument
    add("--results", type=path, default=RESULTS, help="folder of stored runs (default: %(default)s)")
    add(
        "--tolerance",
        type=float,
        default=1.5,
        help="now/stored above it is a regression; twice that on another processor (default: %(default)s)",
    )
    add("--seconds", type=float, default=10.0, help="of CPU time to measure for (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        stored = baseline(options.results)
    except InputError as error:
        return refuse(COMMAND, error, vars(options))
    here = facts(torch.device("cpu"))["device"]
    tolerance = options.tolerance * (1.0 if here == stored.device else ON_ANOTHER_PROCESSOR)
    lines, good = compared(measured(stored.dtype, options.seconds), stored.seconds, tolerance)
    dtype = str(stored.dtype).removeprefix("torch.")
    print(f"CPU time in one thread, {dtype}, on {here}; stored: {stored.name}, {stored.device}", *lines, sep="\n")
    print(f"{'no ratio is' if good else 'some ratios are'} above {tolerance:g} times the stored one")
    return 0 if good else 1


if __name__ == "__main__":
    run_command(COMMAND, main)
