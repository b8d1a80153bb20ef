"""Compiled and captured sampling: the same samples as eager, and on CUDA no waiting for the device."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image

from engine import Engine, Request
from engine.graphs import StepGraphs

REQUESTS = [
    Request(num=2, steps=4, seed=7),
    Request(prompt="red cat", steps=6, solver="ddim", guidance=3.0),
    Request(image=Image.new("RGB", (32, 32), (200, 30, 90)), num=3, steps=5, solver="ddpm"),
    Request(prompt="red tree", steps=5, step_cache=2),
    Request(prompt="big _ dog", steps=3, guidance=2.0, guidance_interval=(0.3, 1)),
]


def final_states(engine: Engine) -> torch.Tensor:
    """The packed samples of all requests, [B, N], before anything is decoded."""
    with torch.inference_mode():
        rows = [row for request in REQUESTS for row in engine._rows(engine._prepare(request))]
        return engine._sampler.run(rows).cpu()


@pytest.fixture(scope="module")
def eager(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32") as engine:
        return final_states(engine)


@pytest.mark.slow
def test_compiled_samples_are_the_eager_ones(tiny_checkpoint, eager):
    with Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", compile=True) as engine:
        torch.testing.assert_close(final_states(engine), eager, atol=1e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_captured_samples_are_the_eager_ones(tiny_checkpoint, eager, compile):
    with Engine.from_pretrained(tiny_checkpoint, device="cuda", dtype="float32", compile=compile) as engine:
        for _ in range(2):  # captured, then replayed alone
            before = engine.stats()
            torch.testing.assert_close(final_states(engine), eager, atol=1e-3, rtol=0)
        after = engine.stats()
        assert after.replays - before.replays == after.forwards - before.forwards > 0
        assert after.memory > 0
    with Engine.from_pretrained(tiny_checkpoint, device="cuda", dtype="float32", graphs=False) as engine:
        torch.testing.assert_close(final_states(engine), eager, atol=1e-3, rtol=0)
        assert engine.stats().replays == 0


@pytest.mark.gpu
def test_a_captured_loop_never_waits_for_the_device(tiny_checkpoint):
    """Not even where rows enter and leave: they are more than the slots."""
    with Engine.from_pretrained(tiny_checkpoint, device="cuda", max_rows=4) as engine, torch.inference_mode():
        final_states(engine)
        rows = [row for request in REQUESTS for row in engine._rows(engine._prepare(request))]
        torch.cuda.set_sync_debug_mode("error")
        try:
            states = engine._sampler.run(rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert states.isfinite().all()


@pytest.mark.gpu
def test_a_step_is_captured_once_and_cleared_away():
    device = torch.device("cuda", torch.cuda.current_device())
    counter, calls, graphs = torch.zeros(3, device=device), [], StepGraphs(device)

    def step():
        calls.append(1)
        counter.add_(1)

    for _ in range(5):
        graphs("add", step)
    assert (len(calls), graphs.replays, counter.tolist()) == (2, 4, [5.0] * 3)
    graphs.clear()
    graphs("add", step)
    graphs("add", step)
    assert (len(calls), counter.tolist()) == (4, [7.0] * 3)


@pytest.mark.gpu
def test_calls_side_by_side_see_what_came_before_and_are_seen_after():
    device = torch.device("cuda", torch.cuda.current_device())
    graphs, x, out = StepGraphs(device), torch.zeros(1 << 20, device=device), torch.zeros(4, device=device)

    def step():
        y = x + 1
        for _ in range(20):  # long enough for a call that does not wait to be early
            y = y * 1.5 - y * 0.5
        found = graphs.side_by_side([lambda i=i: (y * i).mean() for i in range(4)])
        out.copy_(torch.stack(found))
        x.add_(1)

    for i in range(1, 6):
        graphs("step", step)
        torch.testing.assert_close(out.cpu(), torch.arange(4.0) * i)
    assert graphs.replays == 4


@pytest.mark.gpu
def test_a_capture_that_is_broken_off_leaves_the_next_one_possible():
    device = torch.device("cuda", torch.cuda.current_device())
    graphs, x = StepGraphs(device), torch.ones(4, device=device)

    def broken():
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * 2

    with pytest.raises(torch.OutOfMemoryError):
        graphs("broken", lambda: graphs.side_by_side([lambda: x + 1, broken]))
    for _ in range(3):
        graphs("add", lambda: x.add_(1))
    assert x.tolist() == [4.0] * 4


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "least"), [("float32", 60), ("bfloat16", 30)])
def test_the_same_seed_gives_the_same_picture_on_cpu_and_gpu(tiny_checkpoint, monkeypatch, dtype, least):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = []
    for device in ("cpu", "cuda"):
        with Engine.from_pretrained(tiny_checkpoint, device=device, dtype=dtype) as engine:
            results.append(engine.generate(Request(num=4, prompt="red _", steps=10)).samples)
    first, second = (np.stack([np.asarray(s.image, float) for s in samples]) for samples in results)
    assert 10 * np.log10(255**2 / max(((first - second) ** 2).mean(), 1e-9)) >= least
    assert [s.text for s in results[0]] == [s.text for s in results[1]]


@pytest.mark.gpu
def test_a_closed_engine_gives_its_memory_back(tiny_checkpoint):
    gc.collect()
    before = torch.cuda.memory_allocated()
    with Engine.from_pretrained(tiny_checkpoint, device="cuda") as engine:
        engine.warmup(batch=4)
        assert torch.cuda.memory_allocated() > before
    gc.collect()
    assert torch.cuda.memory_allocated() <= before
