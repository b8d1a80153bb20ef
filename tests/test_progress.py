"""Lines about a long run of the benchmarks."""

from types import SimpleNamespace

import pytest

from benchmarks.progress import Progress
from benchmarks.race import Timing


class Reporter:
    verbosity = 0

    def __init__(self):
        self.lines = []
        self.ensure_newline = self.flush = lambda: None
        self.write_line = self.lines.append


@pytest.fixture
def progress_and_lines():
    reporter = Reporter()
    plugins = SimpleNamespace(get_plugin={"terminalreporter": reporter, "capturemanager": None}.get)
    progress = Progress(SimpleNamespace(pluginmanager=plugins))
    progress.number, progress.total = 3, 12
    return progress, reporter


def test_a_line_says_which_test_of_how_many_and_how_long_it_has_taken(progress_and_lines):
    progress, reporter = progress_and_lines
    progress("forward, 2 rows: checking eager (1 of 9)")
    assert reporter.lines == ["[3 of 12, 0:00] forward, 2 rows: checking eager (1 of 9)"]
    reporter.verbosity = -1  # pytest -q
    progress("more")
    assert len(reporter.lines) == 1


def test_measured_times_stand_beside_predicted_ones(progress_and_lines):
    progress, reporter = progress_and_lines
    progress.measured("loop", {"eager": Timing([4e-3], None), "plain": Timing([5e-3], None)}, {"eager": 1e-3})
    assert [line.partition("] ")[2] for line in reporter.lines] == [
        "loop: eager 4 ms, predicted 1 ms, 25% of it", "loop: plain 5 ms",
    ]  # fmt: skip
