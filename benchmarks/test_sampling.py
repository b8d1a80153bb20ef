"""Sampling: whole requests through `Engine`, and the passes that joint guidance needs."""

import time
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from benchmarks.machine import PowerMeter
from benchmarks.race import CLOCK, Contender
from benchmarks.workloads import (
    engine_of,
    equal_parameters,
    forward_flops,
    presets,
    random_model,
    sampling_flops,
    u_vit_config,
)
from engine import Request
from engine.config import PRESETS
from engine.pictures import to_image
from engine.sampler import Row, sample
from engine.schedule import NoiseSchedule, solver_table, timesteps

MODELS = ("PS-U-Net", "U-ViT-multi, equal parameters")
# Passes at the engine's default guidance, and what is generated.
TASKS = {
    "joint": (1, ("image", "text")),
    "text-to-image": (2, ("image",)),
    "image-to-text": (2, ("text",)),
    "infill": (2, ("image", "text")),
}


@pytest.fixture(scope="module")
def steps(full) -> int:
    return 25 if full else 10


def config_of(name: str, full: bool):
    config = PRESETS[presets(full)]
    return config if name == "PS-U-Net" else u_vit_config(config, equal_parameters(config.model))


@pytest.fixture(scope="module")
def engines(tmp_path_factory, device, dtype, full) -> dict:
    folder = tmp_path_factory.mktemp("engines")
    names = str(device), str(dtype).removeprefix("torch.")
    options = {"compile": device.type == "cuda"}  # on a CPU the loop's benchmark has it: every shape takes a minute
    engines = {n: engine_of(config_of(n, full), folder / str(i), *names, **options) for i, n in enumerate(MODELS)}
    yield engines
    for engine in engines.values():
        engine.close()


def requests_of(task: str, size: int, batch: int, steps: int) -> list[Request]:
    picture = to_image(torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    left = to_image(torch.where(torch.arange(size) < size // 2, 1.0, -1.0).expand(3, size, size))
    given = {
        "joint": {},
        "text-to-image": {"prompt": "word1 word2 word3"},
        "image-to-text": {"image": picture},
        "infill": {"prompt": "word1 _ word3", "image": picture, "mask": left},
    }[task]
    return [Request(seed=seed, steps=steps, **given) for seed in range(batch)]


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_tasks(compete, engines, full, steps, model, task, batch):
    if batch > 4 and not full:
        pytest.skip("larger batches only on a GPU or with --full")

    def build():
        contenders = {}
        for name, engine in engines.items():
            requests = requests_of(task, engine.config.image.size, batch, steps)
            passes, outputs = TASKS[task]
            flops = sampling_flops(engine.config, batch * passes, steps, outputs)
            facts = {"batch": batch, "steps": steps, "task": task}

            def run(engine=engine, requests=requests):
                return engine.generate(requests)

            together, alone = run(), engine.generate(requests[0])
            assert all(result.task == task for result in together) and together[0].text == alone.text
            contenders[name] = Contender(run, flops=flops, pictures=batch, facts=facts)
        return contenders

    compete(f"sampling, {task}, batch {batch}, {steps} steps", model, build)


@pytest.mark.parametrize("steps", [5, 10, 25, 50])
@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("model", MODELS)
def test_steps(compete, engines, full, model, batch, steps):
    if not full and (steps > 25 or batch > 4):
        pytest.skip("more steps and rows only on a GPU or with --full")

    def build():
        contenders = {}
        for name, engine in engines.items():
            requests = requests_of("text-to-image", engine.config.image.size, batch, steps)
            flops = sampling_flops(engine.config, 2 * batch, steps, ("image",))
            facts = {"batch": batch, "steps": steps, "task": f"text-to-image, batch {batch}"}
            contenders[name] = Contender(lambda e=engine, r=requests: e.generate(r), flops=flops, pictures=batch,
                                         facts=facts)  # fmt: skip
        return contenders

    compete(f"sampling, steps, text-to-image, batch {batch}, {steps} steps", model, build)


GUIDANCE = ("alternate, 2 passes", "UniDiffuser, 3 passes in a batch", "UniDiffuser, 3 passes one by one")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("contender", GUIDANCE)
def test_joint_guidance(compete, device, dtype, full, steps, contender, batch):
    """Guided joint generation with the U-ViT-multi: two passes that take turns against UniDiffuser's 1 + 2."""
    config = config_of(MODELS[1], full)
    model = config.model

    def build():
        network = random_model(model, device, dtype)
        schedule = NoiseSchedule(config.diffusion.schedule, config.diffusion.timesteps)
        times = network.time_table(torch.arange(schedule.timesteps + 1, device=device))

        def rows(guidance):
            table = solver_table(schedule, timesteps(schedule.timesteps, steps), guidance=guidance, guidance_scale=3.0,
                                 guided_modalities=(0, 1), prediction=config.diffusion.prediction,
                                 conditioning="clean")  # fmt: skip
            everything = torch.ones(model.size, dtype=torch.bool)
            return [Row(seed, table, everything, torch.zeros(model.size)) for seed in range(batch)]

        def at_once(inputs, index, outputs):
            return network(inputs, times, index, outputs)

        def one_by_one(inputs, index, outputs):
            parts = zip(inputs.split(batch), index.split(batch), strict=True)
            return torch.cat([network(i, times, x, outputs) for i, x in parts])

        two, three = rows("alternate"), rows("unidiffuser")
        facts = {"pictures": batch, "facts": {"batch": batch, "steps": steps}}
        cost = {passes: steps * forward_flops(model, passes * batch) for passes in (2, 3)}
        reference = sample(at_once, three, model, device)
        return {
            GUIDANCE[0]: Contender(lambda: sample(at_once, two, model, device), flops=cost[2], **facts),
            GUIDANCE[1]: Contender(lambda: sample(at_once, three, model, device), flops=cost[3], **facts),
            GUIDANCE[2]: Contender(lambda: sample(one_by_one, three, model, device), lambda: reference,
                                   1e-4 if dtype == torch.float32 else 0.5, flops=cost[3], **facts),
        }  # fmt: skip

    compete(f"sampling, guided joint of the U-ViT-multi, batch {batch}, {steps} steps", contender, build)


def unidiffuser_class():
    for folder in ("deprecated.unidiffuser", "unidiffuser"):  # diffusers has moved it
        try:
            return import_module(f"diffusers.pipelines.{folder}.modeling_uvit").UniDiffuserModel
        except ImportError as error:
            reason = error
    raise reason


@pytest.mark.parametrize("contender", ["U-ViT-multi", "diffusers UniDiffuserModel"])
def test_diffusers_unidiffuser(compete, device, dtype, full, contender):
    """One denoiser call of diffusers' UniDiffuser at the same width, blocks, tokens and latents, all weights random."""
    config = config_of(MODELS[1], full)
    image, text = config.model.modality("image"), config.model.modality("text")
    rows, patch, blocks = 8, config.image.patch, config.model.shared_depth
    side = round(image.tokens**0.5) * patch

    def build():
        network = random_model(config.model, device, dtype)
        facts = {"facts": {"rows": rows}, "flops": forward_flops(config.model, rows)}
        times = network.time_table(torch.arange(1001, device=device))
        index = torch.full((rows, config.model.tokens), 500, dtype=torch.int32, device=device)
        inputs = torch.randn(rows, config.model.size, generator=torch.Generator().manual_seed(0)).to(device)
        contenders = {"U-ViT-multi": Contender(lambda: network(inputs, times, index), **facts)}
        channels = image.channels // patch**2
        try:  # not through the package: that wants transformers, for pipelines that are not used here
            peer = unidiffuser_class()(
                text_dim=text.channels, clip_img_dim=text.channels, num_text_tokens=text.tokens, patch_size=patch,
                num_attention_heads=config.model.dim // config.model.head_dim, num_layers=blocks - 1, sample_size=side,
                attention_head_dim=config.model.head_dim, in_channels=channels, out_channels=channels,
                activation_fn="gelu", norm_num_groups=1, pre_layer_norm=True, use_data_type_embedding=True,
                num_embeds_ada_norm=1000,
            )  # fmt: skip
        except (ImportError, TypeError, ValueError) as error:
            return contenders | {"diffusers UniDiffuserModel": f"not in this diffusers, or not so: {error}"}
        peer = peer.to(device, dtype).eval()
        latents = torch.randn(rows, channels, side, side).to(device, dtype)
        words, clip = (torch.randn(rows, n, text.channels).to(device, dtype) for n in (text.tokens, 1))
        shapes = [out.shape for out in peer(latents, clip, words, timestep_img=500, timestep_text=500)]
        assert shapes == [latents.shape, clip.shape, words.shape]
        count = sum(p.numel() for p in peer.parameters())

        def run():
            return peer(latents, clip, words, timestep_img=500, timestep_text=500)

        contenders["diffusers UniDiffuserModel"] = Contender(run, facts={"rows": rows, "parameters": count})
        return contenders

    compete(
        f"sampling, one call against diffusers, which has 2 more tokens and embeds the times, {rows} rows",
        contender,
        build,
    )


@pytest.mark.parametrize("model", MODELS)
def test_energy(benchmark, device, dtype, engines, steps, model):
    """Joules per picture and mean power of joint sampling; "n/a" where NVML counts none."""
    engine, meter, batch = engines[model], PowerMeter.open(device), 64 if device.type == "cuda" else 1
    request = replace(Request(steps=steps), num=batch)
    engine.generate(request)
    pictures, seconds = 0, 0.0
    before = meter.joules() if meter else 0.0
    started = time.perf_counter()
    while pictures == 0 or (meter and seconds < 10):  # the counter is updated some ten times a second
        engine.generate(request)
        pictures, seconds = pictures + batch, time.perf_counter() - started
    joules = meter.joules() - before if meter else None
    benchmark.group = f"energy, joint, batch {batch}, {steps} steps"
    benchmark.extra_info |= {
        "contender": model,
        "dtype": str(dtype).removeprefix("torch."),
        "joules_per_picture": joules / pictures if meter else "n/a",
        "watts": joules / seconds if meter else "n/a",
        "power": meter.facts() if meter else "n/a",
    }
    benchmark.pedantic(CLOCK.play([seconds / pictures * batch]), rounds=1)
