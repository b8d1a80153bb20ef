"""Forward: PS-U-Net against U-ViT-multi at equal depth and at equal parameters, one call of the denoiser."""

from functools import partial

import pytest
import torch

from benchmarks.race import Contender, captured
from benchmarks.roofline import forward_operations
from benchmarks.workloads import (
    equal_depth,
    equal_parameters,
    forward_inputs,
    measured_preset,
    parameters,
    random_denoiser,
    u_vit_config,
)
from engine.model.cost import forward_flops

MODELS = {
    "PS-U-Net": lambda config: config,
    "U-ViT-multi, equal depth": lambda config: u_vit_config(config, equal_depth(config.model)),
    "U-ViT-multi, equal parameters": lambda config: u_vit_config(config, equal_parameters(config.model)),
}
MODES = ("eager", "compiled", "captured")
# Two ways to compute one model may differ by the rounding of its dtype through all blocks.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("rows", [2, 8, 32, 128])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_forward(compete, predict, device, dtype, full, model, mode, rows):
    if rows > 32 and not full:
        pytest.skip("more rows only on a GPU or with --full")

    def build():
        contenders = {}
        for name, variant in MODELS.items():
            config = variant(measured_preset(full))
            inputs = forward_inputs(config.model, rows, device)
            operations = forward_operations(config.model, rows, dtype, device.type)
            counts = {"rows": rows, "parameters": parameters(config.model)}
            facts = {"flops": forward_flops(config.model, rows), "facts": counts | predict(operations)}
            eager = partial(random_denoiser(config, device, dtype), *inputs)
            compiled = partial(random_denoiser(config, device, dtype, compiled=True), *inputs)
            checked = {"expected": eager, "tolerance": TOLERANCE[dtype], **facts}
            contenders[f"{name}, eager"] = Contender(eager, **facts)
            contenders[f"{name}, compiled"] = Contender(compiled, **checked)
            if device.type == "cuda":
                checked["facts"] = counts | predict(operations, captured=True)
                contenders[f"{name}, captured"] = Contender(captured(compiled), **checked)
            else:
                contenders[f"{name}, captured"] = "CUDA graphs need a CUDA device"
        return contenders

    compete(f"forward, {rows} rows", f"{model}, {mode}", build)
