"""What ends a request or an `Engine`: results that are not finite, models that fail, closing, forking, neglect."""

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engine_cases import ENDLESS, assert_same, noise

from engine import Engine, Request
from engine.checkpoint import load

CPU = torch.device("cpu")


def test_a_result_that_is_not_finite_names_its_request_and_seed_and_no_other_fails(own, mixed, alone):
    """The image's weights are NaN: what generates no image is none the worse, whatever shares its steps."""
    engine, network = own
    with torch.inference_mode():
        network.branches["image"].head.weight.fill_(torch.nan)
    caption = mixed[2]
    failing = engine.submit([caption, Request(prompt="red cat", num=2, seed=8, steps=5)])
    other = engine.submit(caption)
    with pytest.raises(FloatingPointError, match=r"^requests\[1\], seed 8: .* NaN .*; use less guidance, or dtype"):
        failing.result(60)
    assert_same(other.result(60), alone[2])
    with pytest.raises(FloatingPointError, match=r"^requests\[0\], seed 3: "):
        engine.generate(Request(prompt="red", seed=3, steps=1))


@pytest.mark.parametrize("order", ["together", ("text", "image"), ("image", "text")], ids=str)
@pytest.mark.parametrize("name", ["image", "text"])
def test_no_order_hides_a_modality_that_is_not_finite(own, order, name):
    """Not even where words are made of it for the image that follows."""
    engine, network = own
    with torch.inference_mode():
        network.branches[name].head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"^requests\[0\], seed 7: "):
        engine.generate(Request(num=2, seed=7, steps=2, order=order))


def test_a_model_that_fails_for_one_request_fails_for_that_one_only(own, mixed, alone):
    engine, network = own
    codec = engine.codecs["text"]
    moon = codec.vectors[codec.index["moon"]]

    def fail_at_the_moon(_, arguments) -> None:
        words = arguments[0].unflatten(1, (-1, moon.numel()))  # the text's part among them
        if torch.isclose(words, moon, atol=1e-6).all(-1).any():
            raise ArithmeticError("no moon")

    network.register_forward_pre_hook(fail_at_the_moon)
    requests = [mixed[0], Request(prompt="moon", num=2, steps=4), mixed[2]]
    futures = [engine.submit(request) for request in requests]
    with pytest.raises(ArithmeticError, match="no moon"):
        futures[1].result(60)
    assert_same(futures[0].result(60), alone[0])
    assert_same(futures[2].result(60), alone[2])


def test_a_codec_that_fails_for_one_request_fails_for_that_one_only(own, mixed, alone, monkeypatch):
    engine, _ = own
    codec = engine.codecs["text"]
    decode = type(codec).decode

    def fail_at_four(self, tokens, given):
        if any(one.content is not None and (one.content == self.index["sun"]).any() for one in given):
            raise ArithmeticError("no sun")
        return decode(self, tokens, given)

    monkeypatch.setattr(type(codec), "decode", fail_at_four)
    futures = [engine.submit(mixed[i]) for i in (0, 5, 1)]
    with pytest.raises(ArithmeticError, match="no sun"):
        futures[1].result(60)
    assert_same(futures[0].result(60), alone[0])
    assert_same(futures[2].result(60), alone[1])


# ------------------------------------------------------------------------------------------------- closing


def test_closing_ends_what_other_threads_are_generating(tiny_checkpoint):
    checkpoint = load(tiny_checkpoint)
    engine, network = Engine(checkpoint, CPU, torch.float32), weakref.ref(checkpoint.network)
    del checkpoint
    under_way = threading.Event()

    def endless():
        with pytest.raises(RuntimeError, match="this engine is closed"):
            engine.generate(ENDLESS, lambda *_: under_way.set())

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(endless) for _ in range(2)]
        under_way.wait()
        future = engine.submit(ENDLESS)
        engine.close()
        for thread in running:
            thread.result(60)
    with pytest.raises(RuntimeError, match="this engine is closed"):
        future.result(60)
    gc.collect()
    assert network() is None, "its memory is free, though the engine is still referred to"
    with pytest.raises(RuntimeError, match="closed; make another"):
        engine.submit(Request())


def test_a_closed_engine_says_so(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32") as engine:
        engine.warmup()
    for requests in (Request(), [Request()], []):
        with pytest.raises(RuntimeError, match="closed; make another"):
            engine.generate(requests)
    with pytest.raises(RuntimeError, match="closed; make another"):
        engine.warmup()
    with pytest.raises(RuntimeError, match="closed; make another"):
        engine.load_adapter("a", "adapter")
    engine.close()


@pytest.mark.parametrize("moment", range(8))
def test_closing_at_any_moment_raises_that_and_nothing_else(tiny_checkpoint, moment):
    engine, begun = Engine.from_pretrained(tiny_checkpoint, dtype="float32"), threading.Event()

    def generate() -> None:
        with pytest.raises(RuntimeError, match="this engine is closed"):
            for i in range(1000):
                engine.generate(Request("red _", noise(), steps=1 + i % 2))
                begun.set()

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(generate) for _ in range(3)]
        begun.wait()
        time.sleep(0.003 * moment)
        engine.close()
        for thread in running:
            thread.result(60)


@pytest.mark.parametrize("given", [{}, {"image": noise()}], ids=["joint", "image-to-text"])
def test_closing_while_a_request_is_read_raises_that_and_nothing_else(tiny_checkpoint, monkeypatch, given):
    engine = Engine.from_pretrained(tiny_checkpoint, dtype="float32")
    codec = engine.codecs["image"]
    read = codec.read
    monkeypatch.setattr(codec, "read", lambda *arguments, **options: engine.close() or read(*arguments, **options))
    with pytest.raises(RuntimeError, match="this engine is closed"):
        engine.generate(Request(**given))


def test_closing_from_the_engine_s_own_thread_works(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, dtype="float32")
    future = engine.submit(ENDLESS, lambda *_: engine.close())
    with pytest.raises(RuntimeError, match="closed"):
        future.result(60)


def test_an_engine_that_nobody_refers_to_is_freed_with_its_thread(tiny_checkpoint):
    before = {*threading.enumerate()}
    checkpoint = load(tiny_checkpoint)
    engine, network = Engine(checkpoint, CPU, torch.float32), weakref.ref(checkpoint.network)
    engine.generate(Request(steps=1))
    (worker,) = {*threading.enumerate()} - before
    del engine, checkpoint
    deadline = time.monotonic() + 30
    while (network() is not None or worker.is_alive()) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert network() is None and not worker.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # from Python 3.12 on
def test_a_fork_after_use_is_refused_clearly(engine, mixed, alone):
    engine.generate(mixed[1])
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        status = 1
        try:
            for call in (engine.submit, engine.generate, lambda _: Engine.from_pretrained()):
                try:
                    call(mixed[1])
                except RuntimeError as error:
                    status = 0 if "before this process was forked" in str(error) else 2
            engine.close()
        finally:
            os._exit(status)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended != (0, 0), "the child hangs"
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert_same(engine.generate(mixed[1]), alone[1], rounding=0)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells no resident memory")
def test_memory_does_not_grow_with_generations_finished_or_cancelled(tiny_checkpoint):
    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    requests = [Request(num=2, steps=1), Request(prompt="red _", steps=2), Request(image=noise(), steps=1)]

    def several(number: int) -> None:
        for i in range(number):
            engine.generate(requests[i % 3])
            engine.submit(requests[(i + 1) % 3]).cancel()

    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=4) as engine:
        several(100)
        before = resident()
        several(160)
        assert resident() - before < 1 << 20, "6.5 kB a time, less than what one generation makes"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("imported", ["before the fork", "in the child"])
def test_an_engine_works_in_a_process_that_was_forked_after_other_parallel_work(tiny_checkpoint, imported):
    """The parent's OpenMP threads do not exist in the child, where waiting for them would never end."""
    program = f"""
import os, torch
if {imported!r} == "before the fork":
    from engine import Engine, Request

torch.set_num_threads(3)
torch.ones(1 << 20).add(1).sum()
if os.fork() == 0:
    from engine import Engine, Request
    with Engine.from_pretrained({str(tiny_checkpoint)!r}, device="cpu", dtype="float32") as engine:
        print(len(engine.generate(Request(num=2, steps=2)).samples), flush=True)
    os._exit(0)
os.wait()
"""
    quiet = ["-W", "ignore::DeprecationWarning"]  # of a fork beside threads, from Python 3.12 on
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *quiet, "-c", program], cwd=root, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["2"], done.stderr
