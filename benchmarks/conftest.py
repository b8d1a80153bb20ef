"""Fixtures of the benchmarks, and what every stored run records of its machine."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from benchmarks import machine
from benchmarks.progress import Progress
from benchmarks.race import CLOCK, Contender, Refusal, Timing, record, time_in_turns
from benchmarks.roofline import IN_GRAPH, Ceilings, Operation, launch_seconds, predicted
from benchmarks.workloads import measured_preset
from engine.device import ceilings, resolve_device, resolve_dtype

CEILING_DTYPES = (torch.float32, torch.bfloat16)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("psunet benchmarks")
    group.addoption("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.addoption("--dtype", default="auto", help="auto, float32 or bfloat16")
    group.addoption("--full", action="store_true", help="on a CPU too: the paper's sizes, all rows, compiled training")
    group.addoption("--seconds", type=float, default=1.0, help="for each comparison (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    # Before the first benchmark, which puts load on the machine and heats it up.
    device = resolve_device(config.getoption("device"))
    config.engine_full = device.type == "cuda" or config.getoption("full")
    model = measured_preset(config.engine_full).model
    config.engine_device, config.engine_dtype = device, resolve_dtype(config.getoption("dtype"), device, model)
    config.engine_facts, config.ceilings = machine.facts(device), ceilings(device, CEILING_DTYPES)
    config.progress = Progress(config)


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.progress.number += 1


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.progress.total = len(session.items)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        # Deprecations in other packages and warnings of compilers are not what a benchmark looks for.
        item.add_marker(pytest.mark.filterwarnings("ignore"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    after = ceilings(config.engine_device, CEILING_DTYPES)  # the better of two measurements, some minutes apart
    best = {name: max(rate, after[name]) for name, rate in config.ceilings.items()}
    command = shlex.join(["python", "-m", "pytest", *config.invocation_params.args])
    machine_info["engine"] = config.engine_facts | {"command": command, "ceilings": best}


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return request.config.engine_device


@pytest.fixture(scope="session")
def dtype(request) -> torch.dtype:
    return request.config.engine_dtype


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether to run the paper's sizes, or small ones that suit a CPU."""
    return request.config.engine_full


@pytest.fixture(scope="session")
def progress(request) -> Progress:
    return request.config.progress


@pytest.fixture(scope="session")
def predict(request, device, dtype) -> Callable[..., dict]:
    """`predict(operations, captured)`: facts of a contender, what a static model says about its time on this machine.

    captured  whether they are replayed in a CUDA graph, which launches them faster than the host does
    """
    measured, one_by_one = request.config.ceilings, launch_seconds(device)

    def facts(operations: Sequence[Operation], captured: bool = False) -> dict:
        matmul = measured[str(dtype).removeprefix("torch.")]
        at = Ceilings(measured["copy"], matmul, IN_GRAPH if captured else one_by_one)
        return {"launches": len(operations), "predicted": predicted(operations, at)}

    return facts


@pytest.fixture(scope="session")
def timed_groups() -> dict[str, tuple[dict[str, Contender | str], dict[str, Timing]]]:
    """Groups that were timed already: the contenders and their times, by group."""
    return {}


@pytest.fixture
def compete(request, benchmark, device, dtype, progress, timed_groups) -> Callable:
    """`compete(group, name, build)` reports contender `name` of the contenders of `build()`, timed at most once.

    `build` returns {name: Contender, or the reason why it cannot take part}. One whose result is not the expected one
    is not timed, and its test fails; so does that of a contender whose reason is a Refusal.
    """

    def report(group: str, name: str, build: Callable[[], dict[str, Contender | str]]) -> None:
        if group not in timed_groups:
            with torch.set_grad_enabled(group.startswith("training")):
                timed_groups[group] = measured(group, build)
        contenders, timings = timed_groups[group]
        contender = contenders[name]
        if isinstance(contender, Refusal):
            pytest.fail(f"{name} {contender}")
        if isinstance(contender, str):
            pytest.skip(contender)
        benchmark.group = group
        name_of_dtype = str(dtype).removeprefix("torch.")
        benchmark.extra_info |= {"contender": name, **record(contender, timings[name], name_of_dtype)}
        benchmark.pedantic(CLOCK.play(timings[name].seconds), rounds=len(timings[name].seconds))

    def measured(group: str, build: Callable) -> tuple[dict[str, Contender | str], dict[str, Timing]]:
        progress(f"{group}: building the contenders")
        contenders = build()
        running = {n: c for n, c in contenders.items() if isinstance(c, Contender)}
        errors = {}
        for i, (name, contender) in enumerate(running.items(), 1):
            progress(f"{group}: checking {name} ({i} of {len(running)})")
            if error := contender.mismatch():
                errors[name] = error
        right = {n: c for n, c in running.items() if n not in errors}
        progress(f"{group}: timing {len(right)} contenders in turns, about {seconds:g} s or five rounds")
        timings = time_in_turns(right, device, seconds)
        progress.measured(group, timings, {n: c.facts.get("predicted") for n, c in right.items()})
        # Models and inputs are dropped: the next group does not need them.
        kept = {n: replace(c, run=lambda: None, expected=None) for n, c in running.items()}
        return contenders | kept | errors, timings

    seconds = request.config.getoption("seconds")
    return report
