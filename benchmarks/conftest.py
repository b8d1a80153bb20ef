"""Fixtures of the benchmarks, and what every stored run says of its machine."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks import machine
from benchmarks.race import CLOCK, Contender, Timing, heat, record
from engine.device import resolve


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("psunet benchmarks")
    group.addoption("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.addoption("--dtype", default="auto", help="auto, float32 or bfloat16")
    group.addoption("--full", action="store_true", help="on a CPU too: the paper's sizes, all rows, compiled training")
    group.addoption("--seconds", type=float, default=1.0, help="for each comparison (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    # Found out before the first benchmark loads and heats the machine.
    config.engine_device, config.engine_dtype = resolve(config.getoption("device"), config.getoption("dtype"))
    config.engine_facts, config.ceilings = machine.facts(config.engine_device), machine.ceilings(config.engine_device)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        # Third parties deprecate and compilers warn; a benchmark measures them as they are.
        item.add_marker(pytest.mark.filterwarnings("ignore"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    after = machine.ceilings(config.engine_device)  # of two tries some minutes apart the better one
    ceilings = {name: max(rate, after[name]) for name, rate in config.ceilings.items()}
    machine_info["engine"] = config.engine_facts | {"ceilings": ceilings}


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return request.config.engine_device


@pytest.fixture(scope="session")
def dtype(request) -> torch.dtype:
    return request.config.engine_dtype


@pytest.fixture(scope="session")
def full(request, device) -> bool:
    """Whether to run the paper's sizes, or small ones that suit a CPU."""
    return device.type == "cuda" or request.config.getoption("full")


@pytest.fixture(scope="session")
def heats() -> dict[str, tuple[dict[str, Contender | str], dict[str, Timing]]]:
    """Heats that were run already: the contenders and their times, by group."""
    return {}


@pytest.fixture
def compete(request, benchmark, device, dtype, heats) -> Callable:
    """`compete(group, name, build)` reports contender `name` of the heat of `build()`, which is run at most once.

    `build` returns {name: Contender, or the reason why it cannot take part}. One that computes something else than it
    should is not timed, and its test fails.
    """

    def report(group: str, name: str, build: Callable[[], dict[str, Contender | str]]) -> None:
        if group not in heats:
            with torch.set_grad_enabled(group.startswith("training")):
                contenders = build()
                running = {n: c for n, c in contenders.items() if isinstance(c, Contender)}
                errors = {n: error for n, c in running.items() if (error := c.wrong())}
                timings = heat({n: c for n, c in running.items() if n not in errors}, device, seconds)
            # Models and inputs of this heat are of no use to the next one.
            kept = {n: replace(c, run=lambda: None, expected=None) for n, c in running.items()}
            heats[group] = contenders | kept | errors, timings
        contenders, timings = heats[group]
        contender = contenders[name]
        if isinstance(contender, str) and contender.startswith("computes"):
            pytest.fail(f"{name} {contender}")
        if isinstance(contender, str):
            pytest.skip(contender)
        benchmark.group = group
        name_of_dtype = str(dtype).removeprefix("torch.")
        benchmark.extra_info |= {"contender": name, **record(contender, timings[name], name_of_dtype)}
        benchmark.pedantic(CLOCK.play(timings[name].seconds), rounds=len(timings[name].seconds))

    seconds = request.config.getoption("seconds")
    return report
