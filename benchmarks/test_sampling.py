"""Sampling: whole requests through `Engine`, the passes that joint guidance needs, and energy."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.machine import PowerMeter
from benchmarks.race import CLOCK, Contender
from benchmarks.workloads import (
    equal_parameters,
    measured_preset,
    plain_loop,
    random_checkpoint,
    random_denoiser,
    specs_of,
    table_of,
    u_vit_config,
)
from engine import Engine, Request
from engine.config import Config
from engine.diffusion.solver_table import GuidanceOptions
from engine.images import to_image
from engine.model.cost import forward_flops

MODELS = ("PS-U-Net", "U-ViT-multi, equal parameters")
TASKS = ("joint", "text-to-image", "image-to-text", "infill")  # joint and infill: both modalities together


@pytest.fixture(scope="module")
def steps(full) -> int:
    return 25 if full else 10


def config_of(name: str, full: bool) -> Config:
    config = measured_preset(full)
    return config if name == "PS-U-Net" else u_vit_config(config, equal_parameters(config.model))


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory, device, dtype) -> Callable[[Config], Engine]:
    """Engines with random weights for a config; they are closed after the last test."""
    made: list[Engine] = []
    options = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    options["compile"] = device.type == "cuda"  # on a CPU a shape takes a minute: only the loop's benchmark compiles

    def make(config: Config) -> Engine:
        folder = random_checkpoint(config, tmp_path_factory.mktemp("engines") / str(len(made)))
        made.append(Engine.from_pretrained(folder, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def engines(engine_of, full) -> dict[str, Engine]:
    return {name: engine_of(config_of(name, full)) for name in MODELS}


def contender_of(engine: Engine, requests: list[Request], **facts) -> Contender:
    """`Engine.generate` of these requests; the cost is what the engine counts while it serves them once."""
    before = engine.stats()
    engine.generate(requests)
    after = engine.stats()
    facts |= {"batch": len(requests), "calls": after.forwards - before.forwards}
    run = partial(engine.generate, requests)
    return Contender(run, flops=after.flops - before.flops, images=len(requests), facts=facts)


def requests_of(task: str, engine: Engine, batch: int, steps: int) -> list[Request]:
    size = engine.config.codecs["image"].settings["size"]
    image = to_image(torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    left = to_image(torch.where(torch.arange(size) < size // 2, 1.0, -1.0).expand(3, size, size))
    given = {
        "joint": {},
        "text-to-image": {"prompt": "word1 word2 word3"},
        "image-to-text": {"image": image},
        "infill": {"prompt": "word1 _ word3", "image": image, "mask": left},
    }[task]
    return [Request(seed=seed, steps=steps, order="together", **given) for seed in range(batch)]


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_tasks(compete, engines, full, steps, model, task, batch):
    if batch > 4 and not full:
        pytest.skip("larger batches only on a GPU or with --full")

    def build():
        contenders = {}
        for name, engine in engines.items():
            requests = requests_of(task, engine, batch, steps)
            together, alone = engine.generate(requests), engine.generate(requests[0])
            assert all(result.task == task for result in together) and together[0].text == alone.text
            contenders[name] = contender_of(engine, requests, steps=steps, task=task)
        return contenders

    compete(f"sampling, {task}, batch {batch}, {steps} steps", model, build)


@pytest.mark.parametrize("steps", [5, 10, 25, 50])
@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("model", MODELS)
def test_steps(compete, engines, full, model, batch, steps):
    if not full and (steps > 25 or batch > 4):
        pytest.skip("more steps and rows only on a GPU or with --full")

    def build():
        facts = {"steps": steps, "task": f"text-to-image, batch {batch}"}
        return {
            name: contender_of(engine, requests_of("text-to-image", engine, batch, steps), **facts)
            for name, engine in engines.items()
        }

    compete(f"sampling, steps, text-to-image, batch {batch}, {steps} steps", model, build)


ORDERS = {
    "together": {"order": "together"},
    "together, guided": {"order": "together", "guidance": 3.0},  # alternately: two passes at every step
    "text first": {"order": ("text", "image"), "guidance": 3.0},  # the text, one pass; then the image, two passes
}


@pytest.fixture(scope="module")
def clean_engines(engine_of, full) -> dict[str, Engine]:
    """As `engines`, all with clean conditioning, which an order needs; the presets' weights are random anyway."""
    engines = {}
    for name in MODELS:
        config = config_of(name, full)
        if config.diffusion.conditioning != "clean":
            diffusion = replace(config.diffusion, conditioning="clean", time_sampling="masked")
            config = replace(config, diffusion=diffusion)
        engines[name] = engine_of(config)
    return engines


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("model", MODELS)
def test_joint_order(compete, clean_engines, full, steps, model, order, batch):
    """Joint samples with text first against both modalities together; every modality takes `steps` steps."""
    if batch > 4 and not full:
        pytest.skip("larger batches only on a GPU or with --full")

    def build():
        contenders = {}
        for name, engine in clean_engines.items():
            for key, options in ORDERS.items():
                requests = [Request(seed=seed, steps=steps, **options) for seed in range(batch)]
                contenders[f"{name}, {key}"] = contender_of(engine, requests, steps=steps)
        return contenders

    compete(f"joint order, batch {batch}, {steps} steps", f"{model}, {order}", build)


GUIDANCE = ("alternate, 2 passes", "UniDiffuser, 3 passes in a batch", "UniDiffuser, 3 passes one by one")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("contender", GUIDANCE)
def test_joint_guidance(compete, device, dtype, full, steps, contender, batch):
    """Guided joint generation with the U-ViT-multi: two passes that take turns against UniDiffuser's 1 + 2."""
    config = config_of(MODELS[1], full)

    def build():
        denoiser, outputs = random_denoiser(config, device, dtype), ("image", "text")

        def loop(kind, calls):
            table = table_of(config, steps, GuidanceOptions(kind, scale=3.0, modalities=(0, 1)))
            return partial(plain_loop, denoiser, specs_of(config, table, outputs, batch), device, outputs, calls)

        facts = {"images": batch, "facts": {"batch": batch, "steps": steps}}
        cost = {passes: steps * forward_flops(config.model, passes * batch) for passes in (2, 3)}
        reference = loop("unidiffuser", 1)
        tolerance = 1e-4 if dtype == torch.float32 else 0.5
        return {
            GUIDANCE[0]: Contender(loop("alternate", 1), flops=cost[2], **facts),
            GUIDANCE[1]: Contender(reference, flops=cost[3], **facts),
            GUIDANCE[2]: Contender(loop("unidiffuser", 3), reference, tolerance, flops=cost[3], **facts),
        }

    compete(f"sampling, guided joint of the U-ViT-multi, batch {batch}, {steps} steps", contender, build)


@pytest.mark.parametrize("model", MODELS)
def test_energy(benchmark, progress, device, dtype, engines, steps, model):
    """Joules per image and mean power of joint sampling; "n/a" where NVML has no energy counter."""
    engine, meter, batch = engines[model], PowerMeter.open(device), 64 if device.type == "cuda" else 1
    request = Request(steps=steps, num=batch, order="together")
    progress(f"energy: {model}")
    engine.generate(request)
    images, seconds = 0, 0.0
    before = meter.joules() if meter else 0.0
    started = time.perf_counter()
    while images == 0 or (meter and seconds < 10):  # the counter is updated about ten times a second
        engine.generate(request)
        images, seconds = images + batch, time.perf_counter() - started
    joules = meter.joules() - before if meter else None
    benchmark.group = f"energy, joint, batch {batch}, {steps} steps"
    benchmark.extra_info |= {
        "contender": model,
        "dtype": str(dtype).removeprefix("torch."),
        "joules_per_image": joules / images if meter else "n/a",
        "watts": joules / seconds if meter else "n/a",
        "power": meter.facts() if meter else "n/a",
    }
    benchmark.pedantic(CLOCK.play([seconds / images * batch]), rounds=1)
