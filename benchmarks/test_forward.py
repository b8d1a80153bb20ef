"""Forward: PS-U-Net against U-ViT-multi at equal depth and at equal parameters, one call of the denoiser."""

import pytest
import torch

from benchmarks.race import Contender, captured
from benchmarks.workloads import (
    equal_depth,
    equal_parameters,
    forward_flops,
    forward_inputs,
    parameters,
    presets,
    random_model,
)
from engine.config import PRESETS
from engine.graphs import compile_blocks

MODELS = {
    "PS-U-Net": lambda model: model,
    "U-ViT-multi, equal depth": equal_depth,
    "U-ViT-multi, equal parameters": equal_parameters,
}
MODES = ("eager", "compiled", "captured")
# What one model computes in two ways may differ by the rounding of its dtype through all blocks.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("rows", [2, 8, 32, 128])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_forward(compete, device, dtype, full, model, mode, rows):
    if rows > 32 and not full:
        pytest.skip("more rows only on a GPU or with --full")

    def build():
        contenders = {}
        for name, variant in MODELS.items():
            config = variant(PRESETS[presets(full)].model)
            network = random_model(config, device, dtype)
            inputs, times, index = forward_inputs(config, rows, device)
            table = network.time_table(times)
            reference = network(inputs, table, index)
            facts = {"flops": forward_flops(config, rows), "facts": {"rows": rows, "parameters": parameters(config)}}

            def run(network=network, inputs=inputs, table=table, index=index):
                return network(inputs, table, index)

            contenders[f"{name}, eager"] = Contender(run, **facts)
            # Blocks are compiled in place, so the compiled one is a network of its own.
            fast = random_model(config, device, dtype)
            compile_blocks(fast.blocks())
            checked = {"expected": lambda r=reference: r, "tolerance": TOLERANCE[dtype], **facts}
            compiled = Contender(lambda f=fast, i=inputs, t=table, x=index: f(i, t, x), **checked)
            contenders[f"{name}, compiled"] = compiled
            if device.type == "cuda":
                contenders[f"{name}, captured"] = Contender(captured(compiled.run), **checked)
            else:
                contenders[f"{name}, captured"] = "CUDA graphs need a CUDA device"
        return contenders

    compete(f"forward, {rows} rows", f"{model}, {mode}", build)
