"""Lines on the terminal during a run of `pytest benchmarks/`: how far it is, what it works on, what it has measured."""

import time
from contextlib import nullcontext

import pytest

from benchmarks.race import Timing


class Progress:
    """Writes past pytest's capture; silent with `-q` and without a terminal reporter."""

    def __init__(self, config: pytest.Config):
        self._plugins = config.pluginmanager  # of which the reporter may be registered later
        self.number, self.total, self._started = 0, 0, time.perf_counter()  # of the present test, of all tests

    def __call__(self, text: str) -> None:
        reporter, capture = (self._plugins.get_plugin(name) for name in ("terminalreporter", "capturemanager"))
        if reporter is None or reporter.verbosity < 0:
            return
        minutes, seconds = divmod(int(time.perf_counter() - self._started), 60)
        line = f"[{self.number} of {self.total}, {minutes}:{seconds:02}] {text}"
        with nullcontext() if capture is None else capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)
            reporter.flush()  # a file or a pipe would show it minutes later

    def measured(self, group: str, timings: dict[str, Timing], predicted: dict[str, float | None]) -> None:
        """One line for each contender of a group: its median, and beside it what a static model predicts."""
        for name, timing in timings.items():
            seconds, static = timing.median, predicted.get(name)
            beside = f", predicted {1e3 * static:.3g} ms, {static / seconds:.0%} of it" if static else ""
            self(f"{group}: {name} {1e3 * seconds:.3g} ms{beside}")
