"""Training: one optimiser step of the denoiser, PS-U-Net against the U-ViT-multi of as many parameters."""

import pytest
import torch

from benchmarks.race import Contender
from benchmarks.workloads import equal_parameters, measured_preset, parameters, presets, u_vit_config
from engine.diffusion.loss import DenoisingLoss, distinct_times
from engine.model.cost import forward_flops
from engine.model.denoiser import build as build_network
from engine.sampling.graphs import compile_blocks
from engine.training.recipes import RECIPES
from engine.training.stage import Stage


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("model", ["PS-U-Net", "U-ViT-multi"])
def test_training_step(compete, tmp_path, device, dtype, full, model, mode):
    if mode == "compiled" and not full:
        pytest.skip("compiling the backward takes minutes on a CPU: --full does")
    preset = presets(full)
    batch = RECIPES[preset].denoiser.batch

    def step_of(config, name, compiled):
        torch.manual_seed(0)
        network = build_network(config.model).to(device)
        stage = Stage(tmp_path / name, network, RECIPES[preset].denoiser, batch, dtype)
        if compiled:
            compile_blocks(network.blocks())
        loss = DenoisingLoss(config, RECIPES[preset].gamma, device=device)
        x0 = torch.randn(batch, config.model.size, generator=torch.Generator().manual_seed(0)).to(device)

        def denoise(inputs, times):
            distinct, index = distinct_times(times, 2 * batch + 2)
            return network(inputs, network.time_table(distinct), index)

        def draw(generator, indices):
            return loss.draw(batch, generator), torch.randn(x0.shape, generator=generator)

        def losses(drawn, part):
            draws, noise = drawn
            return loss(denoise, x0[part], noise[part], draws, part=part)

        return lambda: torch.tensor(list(stage.train_step(draw, losses).values()))

    def build():
        config, contenders = measured_preset(full), {}
        other = u_vit_config(config, equal_parameters(config.model))
        for name, c in (("PS-U-Net", config), ("U-ViT-multi", other)):
            for compiled in (False, True) if full else (False,):
                key = f"{name}, {'compiled' if compiled else 'eager'}"
                step = step_of(c, key.replace(", ", "-"), compiled)
                losses = step()
                assert losses.isfinite().all() and (losses > 0).all(), losses
                contenders[key] = Contender(
                    step, flops=3 * forward_flops(c.model, batch), images=batch,
                    facts={"batch": batch, "parameters": parameters(c.model)},
                )  # fmt: skip
        return contenders

    compete(f"training, batch {batch}", f"{model}, {mode}", build)
