"""What a forward costs: FLOPs and bytes from a config are those of the modules that run."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.model.blocks import InnerCache
from engine.model.cost import forward_bytes, forward_flops
from engine.model.denoiser import build
from engine.presets import PRESETS

TINY, UVIT = PRESETS["tiny"].model, PRESETS["uvit-tiny"].model
POST = replace(UVIT.uvit, norm="post", patch=1, extra_tokens=2)
NETWORKS = {
    "adaln": replace(TINY, shared_depth=5),
    "categorical": replace(TINY, modalities=(TINY.modalities[0], replace(TINY.modalities[1], categories=40))),
    "blocks of another": PRESETS["tiny-sketch"].model,
    "time token": replace(TINY, time_conditioning="token"),
    "uvit": UVIT,
    "post-norm uvit": replace(UVIT, shared_depth=5, uvit=POST),
    "text-to-image uvit": replace(UVIT, uvit=replace(POST, timed=("image",), predicted=("image",), norm="pre")),
}
BRANCHED = [NETWORKS["adaln"], NETWORKS["time token"]]


def counted(config, rows=2, **options):
    """FLOPs of the matrix products of a forward, as PyTorch counts them."""
    network = build(config)
    table, index = network.time_table(torch.arange(10)), torch.full((rows, config.tokens), 3, dtype=torch.int32)
    inputs = torch.zeros(rows, config.size)
    if "features" in options:
        options["features"] = {n: network.branch_features(n, inputs, table, index) for n in options["features"]}
    if options.pop("reuse_inner", False):
        options["inner"] = InnerCache(network.new_cache(rows), None)
    with FlopCounterMode(display=False) as counter:
        network(inputs, table, index, **options)
    return counter.get_total_flops() - counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_flops_are_those_of_the_matrix_products_that_run(config):
    assert forward_flops(config, 2) == counted(config)
    assert forward_flops(config, 2, ("image",)) == counted(config, outputs=("image",))
    assert forward_flops(config, 2, reuse_inner=True) == counted(config, reuse_inner=True)
    assert forward_flops(config, 6) == 3 * forward_flops(config, 2)


@pytest.mark.parametrize("config", BRANCHED, ids=["adaln", "time token"])
def test_flops_leave_out_the_branches_whose_features_are_cached(config):
    for cached in (("text",), ("image", "text")):
        assert forward_flops(config, 2, ("image",), cached) == counted(config, outputs=("image",), features=cached)


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_bytes_of_weights_are_those_of_the_parameters_that_run(config):
    with torch.device("meta"):
        network = build(config)
    weights = [*network.named_parameters(), *network.named_buffers()]
    sizes = {name: p.numel() for name, p in weights if not name.startswith("time.")}
    assert forward_bytes(config, 0, 2) == 2 * sum(sizes.values())
    if config.uvit is None:
        entry = (f"branches.text.{part}" for part in ("embed", "position", "in_blocks"))
        idle = (
            *entry,
            "branches.image.out_blocks",
            "branches.image.head",
            "branches.image.norm",
            "branches.sketch.head",
        )
        if config.time_conditioning == "adaln":
            idle = (*idle, "branches.image.modulation", "branches.sketch.modulation")
        run = sum(size for name, size in sizes.items() if not name.startswith(idle))
        assert forward_bytes(config, 0, 1, ("text",), ("text",)) == run


def test_blocks_of_three_modalities_are_read_once_by_those_that_run():
    image, text, sketch = PRESETS["tiny-sketch"].model.modalities
    config = replace(TINY, modalities=(image, sketch, replace(sketch, name="map"), text))
    block, skip = (sum(p.numel() for p in build(config).branches["image"].stacks()[i].parameters()) for i in (0, 1))

    def weights(**of):
        return forward_bytes(config, 0, 1, **of)

    own = weights(outputs=("text",))
    entry = image.channels * config.dim + config.dim + image.tokens * config.dim
    assert own - weights(outputs=("text",), cached=("image", "sketch", "map")) == block + 3 * entry
    assert own - weights(outputs=("text",), cached=("image",)) == entry
    head = config.dim * image.channels + image.channels + 6 * config.dim
    assert weights(outputs=("text", "map")) - own == skip + head
    assert weights(outputs=("text", "map", "sketch")) - own == skip + 2 * head


def test_bytes_of_activations_are_what_the_operations_read_and_write():
    c, rows, read_and_written = NETWORKS["adaln"], 3, []
    network = build(c)
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear) and not name.startswith("time."):
            layer.register_forward_hook(lambda _, x, y: read_and_written.append(x[0].numel() + y.numel()))
    for block in network.blocks():  # a norm; QKV to attention's result; residual and norm; the last layer's stream
        block.register_forward_hook(lambda _, x, y: read_and_written.append((2 + 4 + 4 + 1) * y.numel()))
    table, index = network.time_table(torch.arange(10)), torch.zeros(rows, c.tokens, dtype=torch.int32)
    network(torch.zeros(rows, c.size), table, index)
    last_norms = 2 * rows * c.tokens * c.dim
    expected = sum(read_and_written) + last_norms
    assert forward_bytes(c, rows, 4) - forward_bytes(c, 0, 4) == 4 * expected
