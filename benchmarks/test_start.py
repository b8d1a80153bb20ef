"""Start: a new process until its first image, with the built-in model and without a warm-up, as `engine.sample` has it.

Seconds are counted from the program's first line. Runs stored earlier warmed up between loading and the first image.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.race import CLOCK

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, sys, time
started = time.perf_counter()
done = {}
def stage(name):
    done[name] = time.perf_counter() - started
import engine
stage("import engine")
from engine import Engine, Request
stage("import torch and the engine")
engine = Engine.from_pretrained(device=sys.argv[1], dtype=sys.argv[2], compile=sys.argv[3] == "compiled")
stage("load")
engine.generate(Request(prompt="red heart"))
stage("first image")
print(json.dumps(done))
"""
STARTS = {"eager": 3, "compiled": 1, "with packages": 3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where nothing is compiled before the compiled start."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("mode", STARTS)
def test_start(benchmark, progress, cache, tmp_path, device, dtype, mode):
    """On a CPU the compiled start leaves packages, which the last one loads."""
    if mode == "with packages" and (device.type == "cuda" or not (cache / "psunet-engine" / "packages").exists()):
        pytest.skip("no packages: a compiled start on a CPU makes them")
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-c", PROGRAM, str(device), name, mode]
    packages = tmp_path if mode == "eager" else cache
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "XDG_CACHE_HOME": str(packages)}
    runs = []
    for i in range(STARTS[mode]):
        progress(f"start, {mode} ({i + 1} of {STARTS[mode]})")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    runs.sort(key=lambda run: run["first image"])
    benchmark.group = "start, built-in model"
    benchmark.extra_info |= {"contender": mode, "dtype": name, "stages": runs[len(runs) // 2]}
    benchmark.pedantic(CLOCK.play([run["first image"] for run in runs]), rounds=len(runs))
