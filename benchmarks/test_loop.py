"""The loop: text-to-image steps of one batch as the engine does them, against a plain loop and against their products.

"matrix products and attention alone" calls every linear layer and every attention of one step on the inputs it gets
there, and nothing else: what a step cannot take less than with these libraries.
"""

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.race import Contender
from benchmarks.workloads import constant_modalities, presets, random_model, sampling_flops
from engine import model as psunet
from engine.config import PRESETS
from engine.graphs import StepGraphs, compile_blocks
from engine.kernels.attention import attention
from engine.sampler import Row, Sampler
from engine.schedule import NoiseSchedule, solver_table, timesteps

STEPS = 10
PRODUCTS = "matrix products and attention alone"
LOOPS = ("plain, float32", "plain", "eager", "compiled", "captured", PRODUCTS)


@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("loop", LOOPS)
def test_loop(compete, monkeypatch, device, dtype, full, loop, batch):
    """A plain loop runs the two passes one after the other, each block at every step and eagerly."""
    if batch > 16 and not full:
        pytest.skip("more rows only on a GPU or with --full")
    config = PRESETS[presets(full)]

    def build():
        def network_of(dtype=dtype, compiled=False):
            network = random_model(config.model, device, dtype)
            if compiled:
                compile_blocks(network.blocks())
            return network, network.time_table(torch.arange(schedule.timesteps + 1, device=device))

        def loop_of(network, table, passes=1, graphs=None):
            def plain(inputs, times, outputs):
                parts = zip(inputs.chunk(passes), times.chunk(passes), strict=True)
                return torch.cat([network(i, table, t, outputs) for i, t in parts])

            def denoise(inputs, times, outputs, **encoded):
                return network(inputs, table, times, outputs, **encoded)

            def encode(name, inputs, times):
                return network.encode(name, inputs, table, times)

            ours = {"denoiser": denoise, "encode": encode, "graphs": graphs}
            how = {"denoiser": plain} if passes > 1 else ours
            return partial(Sampler(model=config.model, device=device, buckets=[batch], **how).run, rows)

        schedule = NoiseSchedule(config.diffusion.schedule, config.diffusion.timesteps)
        table = solver_table(schedule, timesteps(schedule.timesteps, STEPS), prediction=config.diffusion.prediction,
                             conditioning=config.diffusion.conditioning, guidance_scale=3.0)  # fmt: skip
        generate = torch.zeros(config.model.size, dtype=torch.bool)
        generate[config.model.state_slices["image"]] = True
        rows = [Row(seed, table, generate, torch.zeros(config.model.size)) for seed in range(batch)]

        facts = {"flops": sampling_flops(config, 2 * batch, STEPS, ("image",)), "pictures": batch}
        facts["facts"] = {"batch": batch, "steps": STEPS}
        one = facts | {"facts": facts["facts"] | {"dtype": "float32"}}
        eager = network_of()
        reference = loop_of(*eager)
        # What rounding does to one step's prediction, ten steps and guidance enlarge.
        checked = {"expected": reference, "tolerance": 1e-3 if dtype == torch.float32 else 0.5, **facts}
        compiled = network_of(compiled=True)
        contenders = {
            LOOPS[0]: Contender(loop_of(*network_of(torch.float32), passes=2), **one),
            LOOPS[1]: Contender(loop_of(*eager, passes=2), **checked),
            LOOPS[2]: Contender(reference, **facts),
            LOOPS[3]: Contender(loop_of(*compiled), **checked),
            LOOPS[4]: "CUDA graphs need a CUDA device",
            PRODUCTS: Contender(products_of(monkeypatch, *eager, config, batch), **facts),
        }
        if device.type == "cuda":
            contenders[LOOPS[4]] = Contender(loop_of(*compiled, graphs=StepGraphs(device)), **checked)
        return contenders

    compete(f"loop, text-to-image, batch {batch}, {STEPS} steps", loop, build)


def products_of(monkeypatch, network, table, config, batch):
    """A function that does `STEPS` times the linear layers and attentions of one step of two passes."""
    model, device, calls = config.model, table.device, []
    inputs = torch.randn(2 * batch, model.size, generator=torch.Generator().manual_seed(0)).to(device)
    times = torch.full((2 * batch, model.tokens), 500, dtype=torch.int32, device=device)
    constant = constant_modalities(config, ("image",))
    encoded = {name: network.encode(name, inputs, table, times) for name in constant}

    def attended(qkv, backend="auto"):
        calls.append(partial(attention, qkv, backend))
        return attention(qkv, backend)

    hooks = [
        layer.register_forward_hook(lambda layer, inputs, _: calls.append(partial(layer.forward, *inputs)))
        for layer in network.modules()
        if isinstance(layer, nn.Linear)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(psunet, "attention", attended)
        network(inputs, table, times, ("image",), encoded)
    for hook in hooks:
        hook.remove()

    def run():
        for _ in range(STEPS):
            for call in calls:
                call()

    return run
