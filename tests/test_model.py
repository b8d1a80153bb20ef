"""PS-U-Net: which tokens depend on which, where skips go, what times do, what need not run."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from engine.config import Modality, ModelConfig
from engine.kernels.linear import linear_gelu
from engine.model.blocks import Block, InnerCache, quantize_blocks
from engine.model.psunet import PSUNet
from engine.presets import PRESETS

SIZES = {"image": (6, 4), "text": (5, 3), "sound": (2, 7)}  # tokens, channels


def config(depths=(2, 1), shared_depth=3, time="adaln"):
    """A narrow model whose modalities, in this order, are image, text and sound."""
    modalities = tuple(Modality(n, *SIZES[n], depth=d) for n, d in zip(SIZES, depths, strict=False))
    return ModelConfig(modalities, shared_depth, dim=16, head_dim=8, mlp_ratio=2, time_conditioning=time)


def model_of(config, seed=0):
    """A model none of whose parameters is zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    model = PSUNet(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def inputs_of(config, rows=3):
    return torch.randn(rows, config.size, generator=torch.Generator().manual_seed(1))


def predict(model, inputs, times=None, outputs=None, inner=None):
    """The prediction at times [R, L], by default a different one for each token; the table has a row for each time."""
    if times is None:
        times = torch.arange(model.config.tokens).mul(7).remainder(10).repeat(len(inputs), 1)
        if model.config.time_conditioning == "token":  # one time per modality
            times = torch.cat([times[:, s][:, :1].expand(-1, s.stop - s.start) for s in slices(model)], dim=1)
    table = model.time_table(torch.arange(1001))
    return model(inputs, table, times.int(), outputs, inner=inner)


def slices(model):
    return model.config.token_slices.values()


def part(config, packed, name):
    return packed[:, config.state_slices[name]]


@pytest.mark.parametrize("time", ["adaln", "token"])
@pytest.mark.parametrize("shared_depth", [0, 1, 3])
@pytest.mark.parametrize("depths", [(0,), (1,), (0, 0), (2, 1), (0, 2), (1, 0, 2)], ids=str)
def test_any_modalities_and_depths_predict_every_element_and_train_every_parameter(depths, shared_depth, time):
    c = config(depths, shared_depth, time)
    model, inputs = model_of(c), inputs_of(c)
    prediction = predict(model, inputs)
    assert prediction.shape == inputs.shape and prediction.isfinite().all()
    prediction.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def lending(time="adaln"):
    """Image and sound pass through the same blocks."""
    c = config((2, 1, 2), time=time)
    image, text, sound = c.modalities
    return replace(c, modalities=(replace(sound, blocks_of="image"), image, text))


@pytest.mark.parametrize("time", ["adaln", "token"])
def test_modalities_with_the_same_blocks_predict_as_with_copies_of_them(time):
    c = lending(time)
    model, inputs = model_of(c), inputs_of(c)
    own = PSUNet(replace(c, modalities=tuple(replace(m, blocks_of="") for m in c.modalities)))
    weights = model.state_dict()
    lent = {
        n.replace("image", "sound", 1): w
        for n, w in weights.items()
        if n.startswith("branches.image.") and "_blocks." in n
    }
    assert not weights.keys() & lent.keys()  # stored once
    own.load_state_dict(weights | lent)
    torch.testing.assert_close(predict(model, inputs), predict(own, inputs))

    copied = deepcopy(model)  # with blocks of its own, which its branches have in common too
    with torch.no_grad():
        for p in copied.branches["image"].in_blocks.parameters():
            p.zero_()
    assert not torch.equal(part(c, predict(copied, inputs), "sound"), part(c, predict(model, inputs), "sound"))
    torch.testing.assert_close(predict(model, inputs), predict(own, inputs))


def test_depth_is_counted_per_side_and_in_all():
    model = PSUNet(config((3, 2), shared_depth=5))
    sides = {name: (len(b.in_blocks), len(b.out_blocks)) for name, b in model.branches.items()}
    assert sides == {"image": (3, 3), "text": (2, 2)}
    assert (len(model.shared_in), len(model.shared_middle), len(model.shared_out)) == (2, 1, 2)


def test_without_branches_it_is_a_joint_u_vit():
    model = PSUNet(config((0, 0), shared_depth=5))
    blocks = [name for name, module in model.named_modules() if hasattr(module, "qkv")]
    assert blocks == ["shared_in.0", "shared_in.1", "shared_middle.0", "shared_out.0", "shared_out.1"]


@pytest.mark.parametrize("shared_depth", [0, 1])
@pytest.mark.parametrize("time", ["adaln", "token"])
def test_modalities_see_each_other_through_the_shared_stack_only(shared_depth, time):
    c = config((2, 1, 0), shared_depth, time)
    model, inputs = model_of(c), inputs_of(c)
    before = predict(model, inputs)
    for changed in SIZES:
        other = inputs.clone()
        part(c, other, changed).add_(1)
        after = predict(model, other)
        for name in SIZES:
            same = torch.equal(part(c, before, name), part(c, after, name))
            assert same == (shared_depth == 0 and name != changed), (changed, name)


@pytest.mark.parametrize("time", ["adaln", "token"])
def test_rows_do_not_see_each_other(time):
    c = config(time=time)
    model, inputs = model_of(c), inputs_of(c)
    torch.testing.assert_close(predict(model, inputs)[1:2], predict(model, inputs[1:2]))


def test_every_skip_joins_mirrored_blocks_of_its_own_stack():
    c = config((3, 2), shared_depth=5)
    model, made, taken = model_of(c), {}, {}
    stacks = {name: (b.in_blocks, b.out_blocks) for name, b in model.branches.items()}
    stacks["shared"] = (model.shared_in, model.shared_out)
    for name, (into, out) in stacks.items():
        for i, block in enumerate(into):
            block.register_forward_hook(lambda _, args, output, k=(name, i): made.update({k: output}))
        for i, block in enumerate(out):
            block.register_forward_pre_hook(lambda _, args, k=(name, i): taken.update({k: args[1]}))
    predict(model, inputs_of(c))
    depths = {name: len(into) for name, (into, _) in stacks.items()}
    assert depths == {"image": 3, "text": 2, "shared": 2} and len(taken) == 7
    for (name, i), skip in taken.items():
        assert skip is made[name, depths[name] - 1 - i], (name, i)


def calls_of(model):
    """The names of the modules that forwards call from now on, added as they are called."""
    called = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, n=name: called.add(n))
    return called


@pytest.mark.parametrize("time", ["adaln", "token"])
@pytest.mark.parametrize("outputs", [("image",), frozenset({"text"}), ("text", "image"), ()], ids=str)
def test_only_wanted_outputs_are_computed_and_they_are_the_same(outputs, time):
    c = config((2, 2, 1), time=time)
    model, inputs = model_of(c), inputs_of(c)
    everything = predict(model, inputs)
    called = calls_of(model)
    prediction = predict(model, inputs, outputs=outputs)
    for name in SIZES:
        out = {n for n in called if n.startswith((f"branches.{name}.out_blocks", f"branches.{name}.head"))}
        assert bool(out) == (name in outputs)
        wanted = part(c, everything, name) if name in outputs else torch.zeros(3, c.modality(name).size)
        assert torch.equal(part(c, prediction, name), wanted)


def test_the_time_of_one_token_is_its_own():
    c = config((1, 1), shared_depth=0)
    model, inputs = model_of(c), inputs_of(c)
    times = torch.full((3, c.tokens), 500)
    before = predict(model, inputs, times)
    times[1, 2] = 0  # row 1, third image token
    changed = (predict(model, inputs, times) != before).nonzero()
    assert set(changed[:, 0].tolist()) == {1}
    assert set(changed[:, 1].tolist()) == set(range(24))  # the image's tokens see each other, the text none of them

    model = model_of(config((0, 0), shared_depth=0))  # nothing but embedding and head
    times[:] = 500
    before = predict(model, inputs, times)
    times[1, 2] = 0
    changed = (predict(model, inputs, times) != before).nonzero()
    assert changed.tolist() == [[1, column] for column in (8, 9, 10, 11)]


def test_a_time_token_is_one_per_modality():
    c = config((1, 1), shared_depth=0, time="token")
    model, inputs = model_of(c), inputs_of(c)
    times = torch.full((3, c.tokens), 500)
    before = predict(model, inputs, times)
    times[1, c.token_slices["text"]] = 20
    changed = (predict(model, inputs, times) != before).nonzero()
    assert set(changed[:, 0].tolist()) == {1}
    assert set(changed[:, 1].tolist()) == set(range(24, 39))  # all of the text, nothing of the image


@pytest.mark.parametrize("time", ["adaln", "token"])
def test_a_row_of_a_table_is_the_time_alone(time):
    c = config(time=time)
    model, inputs = model_of(c), inputs_of(c)
    for t in (0, 1, 333, 1000):
        alone = model(inputs, model.time_table(torch.tensor([t])), torch.zeros(3, c.tokens, dtype=torch.int32))
        torch.testing.assert_close(predict(model, inputs, torch.full((3, c.tokens), t)), alone)


@pytest.mark.parametrize("time", ["adaln", "token"])
def test_positions_tell_equal_tokens_apart(time):
    c = config(time=time)
    model = model_of(c)
    prediction = predict(model, torch.ones(1, c.size), torch.full((1, c.tokens), 5)).unflatten(1, (c.size, 1))
    image = part(c, prediction, "image").reshape(6, 4)
    assert len({tuple(token) for token in image.tolist()}) == 6


@pytest.mark.parametrize("preset", ["tiny", "emoji"])
def test_an_untrained_model_predicts_nothing_and_its_heads_can_learn(preset):
    c = PRESETS[preset].model
    model = PSUNet(c)
    if c.categorical:  # all are equally likely; these have the mean 0
        values = model.branches["text"].values
        values[::2] = torch.randn(len(values) // 2, values.shape[1])
        values[1::2] = -values[::2]
    prediction = predict(model, inputs_of(c))
    torch.testing.assert_close(prediction, torch.zeros_like(prediction), atol=1e-6, rtol=0)
    (prediction - 1).square().sum().backward()
    assert all(branch.head.weight.grad.any() for branch in model.branches.values())


def test_without_gates_every_weight_learns_from_the_first_step():
    """Heads of zero would keep it from all but themselves, and such a model never got off the ground."""
    torch.manual_seed(0)
    c = config(time="token")
    model = PSUNet(c)
    inputs, times = torch.randn(3, c.size), torch.tensor([10, 500, 900])
    index = torch.arange(3, dtype=torch.int32)[:, None].expand(3, c.tokens)
    model(inputs, model.time_table(times), index).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters())


def parameters_by_hand(c):
    """Parameters of an adaLN model, from the widths alone."""
    d, r = c.dim, c.mlp_ratio
    block = 6 * d + 3 * d * d + (d * d + d) + (r * d * d + r * d) + (r * d * d + d)
    skip = 2 * d * d + d
    time = (256 * d + d) + (d * d + d) + (6 * d * d + 6 * d)
    own = sum((m.channels * d + d) + m.tokens * d + 6 * d + (d * m.channels + m.channels) for m in c.modalities)
    ins = sum(m.depth for m in c.modalities) + c.shared_depth // 2
    return block * (2 * ins + c.shared_depth % 2) + skip * ins + time + own


def test_a_sketch_adds_as_few_parameters_as_its_page_says():
    with torch.device("meta"):
        two, three = (sum(p.numel() for p in PSUNet(PRESETS[n].model).parameters()) for n in ("emoji", "emoji-sketch"))
    assert (round(two / 1e6, 1), three - two) == (8.1, 29_056)  # docs/how-to/sketch.md


def test_coco256_is_the_papers_9_8_4_design():
    c = PRESETS["coco256"].model
    with torch.device("meta"):
        model = PSUNet(c)
    blocks = [name for name, module in model.named_modules() if hasattr(module, "qkv")]
    count = {k: sum(name.startswith(k) for name in blocks) for k in ("shared", "branches.image", "branches.text")}
    assert count == {"shared": 9, "branches.image": 8, "branches.text": 4}
    assert sum(p.numel() for p in model.parameters()) == parameters_by_hand(c) == 73_660_496
    assert (c.tokens, c.size) == (320, 8192)


@pytest.mark.parametrize("time", ["adaln", "token"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_the_weights_dtype_computes_and_the_inputs_dtype_returns(dtype, tolerance, time):
    c = config(time=time)
    model, inputs = model_of(c), inputs_of(c)
    exact = predict(model, inputs)
    qkv = []
    model.shared_middle[0].qkv.register_forward_hook(lambda _, args, output: qkv.append(output.dtype))
    prediction = predict(model.to(dtype), inputs)
    assert qkv == [dtype] and prediction.dtype == torch.float32
    assert (prediction - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("time", ["adaln", "token"])
@torch.no_grad()
def test_inner_blocks_results_are_cached_and_used_again_row_by_row(time):
    c = config(shared_depth=5, time=time)
    model, inputs = model_of(c), inputs_of(c)
    rows = len(inputs)
    cache = model.new_cache(rows).fill_(torch.nan)  # shows in whatever reads it before it is written
    expected = predict(model, inputs)
    everywhere = InnerCache(cache, torch.ones(rows, dtype=torch.bool))
    torch.testing.assert_close(predict(model, inputs, inner=everywhere), expected)
    called = calls_of(model)
    torch.testing.assert_close(predict(model, inputs, inner=InnerCache(cache, None)), expected)
    assert {n for n in called if n.startswith("shared") and n.count(".") == 1} == {"shared_in.0", "shared_out.1"}

    others = inputs + 1
    stale = predict(model, others, inner=InnerCache(cache, None))
    some = predict(model, others, inner=InnerCache(cache, torch.arange(rows) == 1))
    torch.testing.assert_close(some[1], predict(model, others)[1])
    torch.testing.assert_close(some[[0, 2]], stale[[0, 2]])
    assert not torch.allclose(stale, predict(model, others), atol=1e-3)


@pytest.mark.parametrize("time", ["adaln", "token"])
@torch.inference_mode()
def test_the_whole_forward_is_one_graph(time):
    c = config((1, 0), shared_depth=1, time=time)
    model, inputs = model_of(c), inputs_of(c)
    expected = predict(model, inputs, outputs=("image",))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    table, index = model.time_table(torch.arange(1001)), torch.arange(c.tokens).mul(7).remainder(10).repeat(3, 1).int()
    if time == "token":
        index = index[:, [0] * 6 + [6] * 5]
    torch.testing.assert_close(compiled(inputs, table, index, ("image",)), expected)


def test_training_and_inference_predict_the_same():
    c = config()
    model, inputs = model_of(c), inputs_of(c)
    with torch.inference_mode():
        inference = predict(model, inputs)
    torch.testing.assert_close(predict(model, inputs).detach(), inference)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_with_gelu_is_the_same_with_and_without_gradients(exact, dtype):
    layer, x = torch.nn.Linear(24, 40), torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    layer, x = layer.to(dtype), x.to(dtype)
    approximate = "none" if exact else "tanh"
    trained = linear_gelu(x, layer.weight, layer.bias, approximate)
    trained.sum().backward()
    with torch.inference_mode():
        found = linear_gelu(x, layer.weight, layer.bias, approximate)
    assert found.dtype == dtype and layer.weight.grad.isfinite().all()
    torch.testing.assert_close(found, trained)
    expected = torch.nn.functional.gelu(layer.double()(x.double()), approximate=approximate)
    assert (found - expected).abs().max() <= 2 * (trained - expected).abs().max()


class Adapted(torch.nn.Module):
    """An adapter as peft makes them: adds to what a layer gives."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.added = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.added(x)


@pytest.mark.parametrize("name", ["skip", "fc1", "fc2"])
def test_adapters_around_a_layer_act_before_what_follows_it(name):
    """Merged into the layer's weight, they give the same."""
    torch.manual_seed(0)
    block = Block(32, 16, 4, skip=True, norm="adaln")
    torch.nn.init.normal_(block.modulation)
    x, skip, table, index = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.randn(3, 192), torch.zeros(2, 5).int()
    layer = getattr(block, name)
    setattr(block, name, Adapted(layer))
    with torch.inference_mode():
        adapted = block(x, skip, table, index)
        layer.weight += getattr(block, name).added.weight
        setattr(block, name, layer)
        torch.testing.assert_close(adapted, block(x, skip, table, index), rtol=1e-4, atol=1e-4)


def test_blocks_in_8_bits_predict_nearly_the_same():
    c = config()
    model, inputs = model_of(c), inputs_of(c)
    with torch.inference_mode():
        exact = predict(model, inputs)
        quantize_blocks(model.blocks())
        rounded = predict(model, inputs)
    error = (rounded - exact).square().mean() / exact.square().mean()
    assert 0 < error < 0.1**2
