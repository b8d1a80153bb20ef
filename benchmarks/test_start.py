"""Start: `python -m engine.sample` until it has written an image of the built-in model.

Seconds are those from starting the command to its end. Runs stored earlier timed a program of their own from its first
line, in stages.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.race import CLOCK

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ("-m", "engine.sample", "--prompt", "red heart", "--num", "1")
STARTS = {"first": 3, "second": 3, "compiled": 1, "with packages": 3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What is compiled; nothing at first."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("mode", STARTS)
def test_start(benchmark, progress, cache, tmp_path, device, dtype, mode):
    """A first start finds nothing that is compiled, the second what the first has left, the last what all have."""
    if mode == "with packages" and (device.type == "cuda" or not [*cache.glob("psunet-engine/packages/decoder*")]):
        pytest.skip("no packages: a compiled start on a CPU makes them")
    name = str(dtype).removeprefix("torch.")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, *COMMAND, "--device", str(device), "--dtype", name, "--out", str(tmp_path / "samples")]
    if mode == "compiled":
        command.append("--compile")
    seconds = []
    for i in range(STARTS[mode]):
        progress(f"start, {mode} ({i + 1} of {STARTS[mode]})")
        if mode == "first":
            shutil.rmtree(cache, ignore_errors=True)
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    benchmark.group = "start, built-in model"
    stages = {"first image on disk": statistics.median(seconds)}
    benchmark.extra_info |= {"contender": mode, "dtype": name, "stages": stages}
    benchmark.pedantic(CLOCK.play(seconds), rounds=len(seconds))
