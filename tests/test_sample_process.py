"""`python -m engine.sample` as a process of its own: what it prints, what it imports, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def process(folder: Path, *arguments) -> subprocess.CompletedProcess:
    """Python with these arguments, in the repository; what it caches goes into a folder."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
    )


# Runs the command line, then prints the modules of the engine that imported one of the packages named.
RECORDING = """
import builtins, sys
named, importers = ("gensim", "xformers", "pynvml"), set()
importing = builtins.__import__

def record(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if name.partition(".")[0] in named and importer.partition(".")[0] == "engine":
        importers.add(importer)
    return importing(name, globals, locals, fromlist, level)

builtins.__import__ = record
from engine.sample import main
assert main(sys.argv[1:]) == 0
print(sorted(importers), [name for name in ("gensim", "xformers") if sys.modules.get(name) is not None])
"""


@pytest.fixture(scope="module")
def verbose(tiny_checkpoint, tmp_path_factory) -> subprocess.CompletedProcess:
    """A run with --verbose, which measures what "auto" takes."""
    folder = tmp_path_factory.mktemp("verbose")
    options = ["--checkpoint", tiny_checkpoint, "--prompt", "red", "--steps", "3", "--verbose", "--out", folder / "out"]
    return process(folder, "-c", RECORDING, *options)


def test_verbose_says_which_dtype_was_measured_and_how_near_the_run_was_to_the_machine_s_limits(verbose):
    assert verbose.returncode == 0, verbose.stderr
    number = r"\d+\.\d+"
    dtype = rf"dtype: (float32|bfloat16) .measured: {number} ms in float32, {number} ms in bfloat16."
    chosen = re.search(dtype, verbose.stderr).group(1)
    for said in (
        rf"3 forwards in {number} s: {number} GFLOP/s of matrix products in {chosen}, ",
        rf"\d+ % of the {number} measured here; {number} GB/s at least, \d+ % of a copy's {number}",
    ):
        assert re.search(said, verbose.stderr), verbose.stderr
    assert "cfg_step: torch" in verbose.stderr
    assert "attention: sdpa" in verbose.stderr or "compiled: blocks" in verbose.stderr


def test_sampling_on_a_cpu_imports_nothing_that_is_for_cuda_or_for_training(verbose):
    """Neither gensim nor xformers, nor pynvml, which PyTorch imports by itself."""
    assert verbose.stdout.splitlines()[-1] == "[] []"


def test_bad_input_is_answered_in_one_line_without_a_traceback(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    done = process(tmp_path, "-m", "engine.sample", "--checkpoint", tiny_checkpoint, "--prompt", "purple", "--out", out)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("python -m engine.sample: --prompt: 'purple' is not in the vocabulary; use ")
    assert not out.exists()


def test_json_is_all_that_is_printed(tiny_checkpoint, tmp_path):
    out, options = tmp_path / "out", ["--prompt", "red", "--steps", "1", "--json"]
    done = process(tmp_path, "-m", "engine.sample", "--checkpoint", tiny_checkpoint, "--out", out, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads((out / "samples.json").read_text())


INTERRUPTED = """
import sys, threading, time
from engine import Engine, Request

with Engine.from_pretrained(sys.argv[1], dtype="float32") as engine:
    expected = engine.generate(Request(num=2, steps=2))
    endless = Request(num=2, steps=1000, resample=5)
    for callback in (None, lambda done, total: None):
        try:
            threading.Timer(0.3, print, ("sampling",), {"flush": True}).start()
            engine.generate(endless, callback)
        except KeyboardInterrupt:
            interrupted = time.perf_counter()
        assert engine.generate(Request(num=2, steps=2)).text == expected.text
        assert time.perf_counter() - interrupted < 10, "usable at once"
        before = engine.stats().forwards
        time.sleep(0.1)
        assert engine.stats().forwards == before, "nothing goes on behind the caller's back"
        print("usable", flush=True)
    threading.Timer(0.3, print, ("sampling",), {"flush": True}).start()
    engine.generate(endless)
"""


def test_ctrl_c_cancels_promptly_and_the_engine_can_be_used(tiny_checkpoint):
    command = [sys.executable, "-c", INTERRUPTED, tiny_checkpoint]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(120, process.kill)  # a process that hangs fails the test, and does not hang it
        killer.start()
        for _ in range(2):
            assert process.stdout.readline() == "sampling\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "usable\n", process.stderr.read()
        assert process.stdout.readline() == "sampling\n"
        process.send_signal(signal.SIGINT)
        began = time.perf_counter()
        _, error = process.communicate(timeout=30)
        killer.cancel()
    assert process.returncode not in (0, None) and error.strip().endswith("KeyboardInterrupt")
    assert time.perf_counter() - began < 10, "nor does a worker thread keep the process"
