"""`Denoiser`: a network and its times as one function, features and caches in place of work, branches run by others."""

from dataclasses import replace

import pytest
import torch

from engine.config import Modality, ModelConfig
from engine.errors import InputError
from engine.model.denoiser import Denoiser, build
from engine.presets import PRESETS

TINY, UVIT = PRESETS["tiny"].model, PRESETS["uvit-tiny"].model
CONFIGS = {
    "adaln": replace(TINY, modalities=(*TINY.modalities, Modality("sound", 2, 7, depth=2)), shared_depth=5),
    "time token": replace(TINY, time_conditioning="token", shared_depth=5),
    "uvit": replace(UVIT, shared_depth=5),
}
BRANCHED = ["adaln", "time token"]
ROWS, N = 3, 50


def denoiser_of(config, **options):
    """A denoiser of times 0 to N none of whose parameters is zero, as after training."""
    generator = torch.Generator().manual_seed(0)
    network = build(config).eval().requires_grad_(False)
    for p in network.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return Denoiser(network, N, **options)


def inputs_of(config, seed=1):
    """Inputs [R, N] and times [R, L]: each modality of each row at its own."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, config.size, generator=generator)
    times = torch.randint(0, N + 1, (ROWS, len(config.modalities)), generator=generator, dtype=torch.int32)
    return inputs, times.repeat_interleave(torch.tensor([m.tokens for m in config.modalities]), dim=1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_call_is_the_network_at_the_times_themselves(config):
    denoiser = denoiser_of(config)
    inputs, times = inputs_of(config)
    distinct, index = times.unique(return_inverse=True)
    expected = denoiser.network(inputs, denoiser.network.time_table(distinct), index.int())
    torch.testing.assert_close(denoiser(inputs, times), expected)
    one = denoiser(inputs, times, ("text",))
    text = config.state_slices["text"]
    torch.testing.assert_close(one[:, text], expected[:, text])
    one[:, text] = 0
    assert not one.any()


def test_times_from_clean_to_pure_noise_have_a_row_and_the_table_is_made_once(monkeypatch):
    denoiser = Denoiser(build(TINY).eval(), N)
    assert len(denoiser.table) == N + 1 and not denoiser.table.requires_grad
    monkeypatch.setattr(denoiser.network, "time_table", None)
    for time in (0, N):
        assert denoiser(torch.zeros(1, TINY.size), torch.full((1, TINY.tokens), time).int()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_networks_dtype_computes_and_the_inputs_dtype_returns(config, dtype):
    denoiser = Denoiser(denoiser_of(config).network.to(dtype), N)
    inputs, times = inputs_of(config)
    assert denoiser(inputs, times).dtype == torch.float32
    assert denoiser.new_cache(2).dtype == dtype
    if config.uvit is None:
        assert denoiser.branch_features("text", inputs, times).dtype == dtype


@pytest.mark.parametrize("kind", BRANCHED)
@pytest.mark.parametrize("names", [("image",), ("text",), ("image", "text")], ids=str)
def test_features_stand_in_for_the_branches_that_gave_them(kind, names):
    config = CONFIGS[kind]
    denoiser = denoiser_of(config)
    inputs, times = inputs_of(config)
    expected = denoiser(inputs, times)
    features = {name: denoiser.branch_features(name, inputs, times) for name in names}
    for name, values in features.items():
        m, time_token = config.modality(name), kind == "time token"
        assert values.shape == (m.depth, ROWS, m.tokens + time_token, config.dim)
    other = inputs.clone()
    called = []
    for name in names:
        other[:, config.state_slices[name]] = torch.nan  # a branch that is left out does not read its inputs
        for block in denoiser.network.branches[name].in_blocks:
            block.register_forward_hook(lambda *_, n=name: called.append(n))
    assert torch.equal(denoiser(other, times, features=features), expected)
    assert called == []


@pytest.mark.parametrize("kind", BRANCHED)
def test_features_depend_on_their_modality_alone(kind):
    config = CONFIGS[kind]
    denoiser = denoiser_of(config)
    (inputs, times), (others, later) = inputs_of(config), inputs_of(config, seed=2)
    elements, tokens = config.state_slices["text"], config.token_slices["text"]
    before = denoiser.branch_features("text", inputs, times)
    others[:, elements], later[:, tokens] = inputs[:, elements], times[:, tokens]
    assert torch.equal(denoiser.branch_features("text", others, later), before)
    later[:, tokens] = (later[:, tokens] + 25) % (N + 1)
    assert not torch.allclose(denoiser.branch_features("text", others, later), before)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_cache_is_refreshed_for_the_rows_that_ask_and_used_by_the_others(config):
    denoiser = denoiser_of(config)
    assert denoiser.can_cache
    (inputs, times), (others, later) = inputs_of(config), inputs_of(config, seed=2)
    expected, changed = denoiser(inputs, times), denoiser(others, later)
    cache = denoiser.new_cache(ROWS).fill_(torch.nan)  # shows in whatever reads it before it is written

    everywhere = torch.ones(ROWS, dtype=torch.bool)
    torch.testing.assert_close(denoiser(inputs, times, cache=cache, refresh=everywhere), expected)
    filled = cache.clone()
    assert filled.isfinite().all()
    torch.testing.assert_close(denoiser(inputs, times, cache=cache), expected)
    assert torch.equal(cache, filled)  # without refresh it is only read

    stale = denoiser(others, later, cache=cache)
    assert not torch.allclose(stale, changed, atol=1e-3)
    some = denoiser(others, later, cache=cache, refresh=torch.tensor([False, True, False]))
    torch.testing.assert_close(some[1], changed[1])
    torch.testing.assert_close(some[[0, 2]], stale[[0, 2]])
    assert torch.equal(cache[[0, 2]], filled[[0, 2]]) and not torch.allclose(cache[1], filled[1])


@pytest.mark.parametrize("kind", BRANCHED)
def test_features_and_a_cache_work_together_on_part_of_their_memory(kind):
    config = CONFIGS[kind]
    denoiser = denoiser_of(config)
    inputs, times = inputs_of(config)
    expected, live = denoiser(inputs, times)[:2], slice(0, 2)
    features = {"text": denoiser.branch_features("text", inputs, times)[:, live]}
    cache = denoiser.new_cache(ROWS).fill_(7)
    for refresh in (torch.ones(2, dtype=torch.bool), None):
        found = denoiser(inputs[live], times[live], None, features, cache[live], refresh)
        torch.testing.assert_close(found, expected)
    assert (cache[2] == 7).all() and not (cache[:2] == 7).all()


@pytest.mark.parametrize("shared_depth, can", [(1, False), (3, True), (5, True)])
@pytest.mark.parametrize("model", [TINY, UVIT], ids=["psunet", "uvit"])
def test_what_can_be_cached_are_the_blocks_within_an_outer_pair(model, shared_depth, can):
    assert denoiser_of(replace(model, shared_depth=shared_depth)).can_cache == can


@pytest.mark.parametrize("kind", BRANCHED)
def test_every_branch_is_run_by_the_function_that_is_given(kind):
    """In any order, each on tensors that no other has touched: branches need nothing of each other."""
    config, groups = CONFIGS[kind], []

    def backwards(calls):
        groups.append(len(calls))
        return [call() for call in reversed(calls)][::-1]

    inputs, times = inputs_of(config)
    expected = denoiser_of(config)(inputs, times)
    denoiser = denoiser_of(config, run_branches=backwards)
    assert torch.equal(denoiser(inputs, times), expected)
    number = len(config.modalities)
    assert groups == [number, number]  # before and after the shared stack


def test_gradients_flow_through_a_call_to_the_networks_weights():
    denoiser = denoiser_of(TINY)
    denoiser.network.requires_grad_(True)
    inputs, times = inputs_of(TINY)
    denoiser(inputs, times).square().sum().backward()
    without = [n for n, p in denoiser.network.named_parameters() if p.grad is None]
    assert all(name.startswith("time.") for name in without)


LAYERS = {"qkv.weight", *(f"{layer}.{kind}" for layer in ("proj", "fc1", "fc2") for kind in ("weight", "bias"))}
AFFINE = {f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
SKIP = {"skip.weight", "skip.bias"}
LINEAR = {"weight", "bias"}


def under(prefix, names):
    return {f"{prefix}.{name}" for name in names}


def names_of_weights(config):
    """The names under which checkpoints hold a network's weights."""
    half, uvit = config.shared_depth // 2, config.uvit
    block = LAYERS | ({"modulation"} if config.time_conditioning == "adaln" else AFFINE)
    skip_norm = under("skip_norm", LINEAR) if uvit and uvit.norm == "post" else set()
    stacks = [("shared_in.", "shared_out.", half)]
    names = set()
    if uvit is None:
        names |= under("shared_middle.0", block)
        for m in config.modalities:
            own = 0 if m.blocks_of else m.depth
            stacks.append((f"branches.{m.name}.in_blocks.", f"branches.{m.name}.out_blocks.", own))
            last = {"modulation"} if config.time_conditioning == "adaln" else under("norm", LINEAR)
            ends = {"position"} | under("embed", LINEAR) | under("head", LINEAR) | last
            ends |= {"values"} if m.categories else set()
            names |= under(f"branches.{m.name}", ends)
        if config.time_conditioning == "adaln":
            for layer in ("hidden", "embed", "project"):
                names |= under(f"time.{layer}", LINEAR)
    else:
        stacks = [("in_blocks.", "out_blocks.", half)]
        names |= {"position"} | under("norm", LINEAR) | under("middle", block)
        names |= {name for m in config.modalities for name in under(f"embed.{m.name}", LINEAR)}
        names |= {name for m in uvit.predicted for name in under(f"head.{m}", LINEAR)}
        names |= under("conv", LINEAR) if uvit.patch else set()
    for ins, outs, depth in stacks:
        for i in range(depth):
            names |= under(f"{ins}{i}", block) | under(f"{outs}{i}", block | SKIP | skip_norm)
    return names


POST = replace(UVIT, shared_depth=5, uvit=replace(UVIT.uvit, norm="post", patch=1, extra_tokens=2))
NAMED = {name: preset.model for name, preset in PRESETS.items()} | CONFIGS | {"post-norm uvit": POST}


@pytest.mark.parametrize("config", NAMED.values(), ids=NAMED)
def test_names_of_weights_stay_so_that_saved_checkpoints_load(config):
    with torch.device("meta"):
        network = build(config)
    assert set(network.state_dict()) == names_of_weights(config)


@pytest.mark.parametrize("name", ["forward", "keys", "type"])
def test_modalities_with_names_that_pytorch_needs_are_refused(name):
    with pytest.raises(InputError, match="^modalities.name: .* is reserved; give the modality another name"):
        build(ModelConfig((Modality(name, 4, 4, depth=1),), shared_depth=1, dim=64))


def test_the_network_is_given_the_times_that_occur():
    eager, (inputs, times) = denoiser_of(TINY), inputs_of(TINY)
    tables = []
    eager.network.register_forward_pre_hook(lambda _, arguments: tables.append(arguments[1]))
    eager(inputs, times)
    assert torch.equal(tables[0], eager.table[times.unique()])
