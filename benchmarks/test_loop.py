"""The loop: text-to-image steps of one batch by `Sampler`, against a plain loop and against their matrix products.

"matrix products and attention alone" calls every linear layer and every attention of one step on the inputs that they
get there, and nothing else: with these libraries a step cannot take less.
"""

from functools import partial

import pytest
import torch

from benchmarks.questions import PRODUCTS
from benchmarks.race import Contender
from benchmarks.roofline import step_operations
from benchmarks.workloads import (
    constant_modalities,
    measured_preset,
    plain_loop,
    products,
    random_denoiser,
    sampling_flops,
    specs_of,
    table_of,
)
from engine.diffusion.solver_table import GuidanceOptions
from engine.sampling.graphs import StepGraphs, pack_products
from engine.sampling.sampler import Sampler

STEPS = 10
PASSES = 2
LOOPS = ("plain, float32", "plain", "eager", "compiled", "captured", PRODUCTS)


@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("loop", LOOPS)
def test_loop(compete, predict, device, dtype, full, loop, batch):
    """A plain loop runs the two passes one after the other, every block at every step and eagerly."""
    if batch > 16 and not full:
        pytest.skip("more rows only on a GPU or with --full")
    config = measured_preset(full)

    def build():
        specs = specs_of(config, table_of(config, STEPS, GuidanceOptions(scale=3.0)), ("image",), batch)

        def plain(denoiser):
            return partial(plain_loop, denoiser, specs, device, ("image",), PASSES)

        def ours(denoiser, graphs=None):
            return partial(Sampler(denoiser, config.model, device, buckets=[batch], graphs=graphs).run, specs)

        facts = {"flops": sampling_flops(config, PASSES * batch, STEPS, ("image",)), "images": batch}
        facts["facts"] = {"batch": batch, "steps": STEPS}
        operations = STEPS * step_operations(config, batch, dtype, device.type, ("image",))
        one_by_one, in_a_graph = predict(operations), predict(operations, captured=True)
        in_float32 = facts | {"facts": facts["facts"] | {"dtype": "float32"}}
        simple, eager = (random_denoiser(config, device, dtype) for _ in range(2))
        if device.type == "cpu":
            pack_products(eager.network.blocks())  # as an engine without packages does
        compiled = random_denoiser(config, device, dtype, compiled=True)
        reference = ours(eager)
        # Ten steps and guidance amplify the rounding of one step's prediction.
        checked = {"expected": reference, "tolerance": 1e-3 if dtype == torch.float32 else 0.5, **facts}
        contenders = {
            LOOPS[0]: Contender(plain(random_denoiser(config, device, torch.float32)), **in_float32),
            LOOPS[1]: Contender(plain(simple), **checked),
            LOOPS[2]: Contender(reference, **with_facts(facts, one_by_one)),
            LOOPS[3]: Contender(ours(compiled), **with_facts(checked, one_by_one)),
            LOOPS[4]: "CUDA graphs need a CUDA device",
            PRODUCTS: Contender(products_of(simple, config, batch), **facts),
        }
        if device.type == "cuda":
            contenders[LOOPS[4]] = Contender(ours(compiled, StepGraphs(device)), **with_facts(checked, in_a_graph))
        return contenders

    compete(f"loop, text-to-image, batch {batch}, {STEPS} steps", loop, build)


def with_facts(options, facts):
    return options | {"facts": options["facts"] | facts}


def products_of(denoiser, config, batch):
    """A function that does `STEPS` times the linear layers and attentions of one step of two passes."""
    model, device = config.model, denoiser.table.device
    inputs = torch.randn(PASSES * batch, model.size, generator=torch.Generator().manual_seed(0)).to(device)
    times = torch.full((PASSES * batch, model.tokens), 500, dtype=torch.int32, device=device)
    constant = constant_modalities(config, ("image",))
    features = {name: denoiser.branch_features(name, inputs, times) for name in constant}
    step = products(denoiser, inputs, times, ("image",), features)

    def run():
        for _ in range(STEPS):
            step()

    return run
