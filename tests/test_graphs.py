"""Compiled and captured sampling: the same samples as eager, and on CUDA no waiting for the device between steps."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from engine import Engine, Request
from engine.checkpoint import load
from engine.diffusion.solver_table import GuidanceOptions, SolverOptions, spaced_table
from engine.model.denoiser import Denoiser
from engine.sampling.batch import SampleSpec
from engine.sampling.graphs import StepGraphs
from engine.sampling.sampler import Sampler

REQUESTS = [
    Request(num=2, steps=4, seed=7),
    Request(prompt="red cat", steps=6, solver="ddim", guidance=3.0),
    Request(image=Image.new("RGB", (32, 32), (200, 30, 90)), num=3, steps=5, solver="ddpm"),
    Request(prompt="red tree", steps=5, step_cache=2),
    Request(prompt="big _ dog", steps=3, guidance=2.0, guidance_interval=(0.3, 1)),
    Request(steps=3, order=("text", "image"), guidance=2.0),
]


def results(engine: Engine) -> tuple[torch.Tensor, list[str]]:
    """The images [B, S, S, 3] and texts of all requests, sampled together."""
    samples = [sample for result in engine.generate(REQUESTS) for sample in result.samples]
    return torch.stack([torch.from_numpy(np.array(s.image, float)) for s in samples]), [s.text for s in samples]


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=2, rtol=0)  # levels of 256
    assert found[1] == expected[1]


@pytest.fixture(scope="module")
def eager(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32") as engine:
        return results(engine)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_captured_samples_are_the_eager_ones(tiny_checkpoint, eager, compile):
    with Engine.from_pretrained(tiny_checkpoint, device="cuda", dtype="float32", compile=compile) as engine:
        for _ in range(2):  # captured, then replayed alone
            before = engine.stats()
            assert_same(results(engine), eager)
        after = engine.stats()
        assert after.replays - before.replays == after.forwards - before.forwards > 0
        assert after.memory > 0
    with Engine.from_pretrained(tiny_checkpoint, device="cuda", dtype="float32", graphs=False) as engine:
        assert_same(results(engine), eager)
        assert engine.stats().replays == 0


def specs_of(config) -> list[SampleSpec]:
    """Samples of several tasks, solvers and lengths, more than four."""
    model, guided = config.model, GuidanceOptions("masked", 2.0)
    everything, known = torch.ones(model.size, dtype=torch.bool), torch.zeros(model.size)
    to_image = everything.clone()
    to_image[model.state_slices["text"]] = False
    options = [
        (everything, SolverOptions(), GuidanceOptions()),
        (to_image, SolverOptions("ddim"), guided),
        (to_image, SolverOptions(step_cache=2), guided),
        (everything, SolverOptions("ddpm", order=((1,), (0,))), replace(guided, first_stage=1)),
    ] * 2
    tables = [
        (generate, spaced_table(config.diffusion, 4 + i % 3, 2, solver, guidance))
        for i, (generate, solver, guidance) in enumerate(options)
    ]
    return [SampleSpec(i, table, generate, known) for i, (generate, table) in enumerate(tables)]


@pytest.mark.gpu
def test_a_captured_loop_waits_for_the_device_only_when_a_run_is_done(tiny_checkpoint):
    """Not even where samples enter and leave: they are more than the slots."""
    loaded, device = load(tiny_checkpoint), torch.device("cuda", torch.cuda.current_device())
    config, graphs = loaded.config, StepGraphs(device)
    denoiser = Denoiser(loaded.network.to(device, torch.float32), config.diffusion.timesteps, graphs.run_branches)
    sampler, specs = Sampler(denoiser, config.model, device, buckets=(1, 2, 4), graphs=graphs), specs_of(config)

    def watch(done, total):  # on the worker's thread, after every step
        torch.cuda.set_sync_debug_mode("error" if done < total else "default")

    try:
        for progress in (None, watch):
            states = sampler.run(specs, progress)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        sampler.close()
    assert states.isfinite().all() and graphs.replays >= sampler.forwards / 2


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
def test_branches_see_what_came_before_and_are_seen_after():
    device = torch.device("cuda", torch.cuda.current_device())
    graphs, x, out = StepGraphs(device), torch.zeros(1 << 20, device=device), torch.zeros(4, device=device)

    def step():
        y = x + 1
        for _ in range(20):  # long enough for a call that does not wait to be early
            y = y * 1.5 - y * 0.5
        found = graphs.run_branches([lambda i=i: (y * i).mean() for i in range(4)])
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
        graphs("broken", lambda: graphs.run_branches([lambda: x + 1, broken]))
    for _ in range(3):
        graphs("add", lambda: x.add_(1))
    assert x.tolist() == [4.0] * 4


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "least"), [("float32", 60), ("bfloat16", 30)])
def test_the_same_seed_gives_the_same_image_on_cpu_and_gpu(tiny_checkpoint, monkeypatch, dtype, least):
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
