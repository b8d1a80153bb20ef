"""The model's kernels against their formulas in float64, on odd shapes, strides and dtypes.

Tolerance: at most twice the error of the plain PyTorch expression computed in the same dtype.
"""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.kernels import adaln, attention, timestep
from engine.kernels.adaln import gated_residual, gated_residual_modulate, gathered, layer_norm_modulate
from engine.kernels.linear import linear_residual

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIM = 24


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(module, *sizes, dtype=torch.float32):
    """A kernel's example inputs, the same in every run."""
    return module.example_inputs(*sizes, dtype=dtype, generator=torch.Generator().manual_seed(0))


def rms(x):
    return x.double().square().mean().sqrt().item()


def assert_as_exact_as_torch(ours, torchs, exact):
    assert ours.dtype == torchs.dtype
    allowed = 2 * rms(torchs - exact) + torch.finfo(ours.dtype).eps * 1e-3 * rms(exact)
    assert rms(ours - exact) <= allowed


def softmax_attention(qkv):
    """The textbook expression in qkv's own dtype, head by head."""
    heads = []
    for h in range(qkv.shape[3]):
        q, k, v = (qkv[:, :, i, h] for i in range(3))  # [B, L, d]
        heads.append(torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v)
    return torch.cat(heads, dim=-1)  # [B, L, H·d]


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, tokens, heads, head_dim", [(1, 1, 1, 64), (2, 37, 3, 64), (3, 8, 2, 16), (1, 320, 1, 64)]
)
def test_attention_is_softmax_attention(rows, tokens, heads, head_dim, dtype, trained):
    qkv = (1.5 * example(attention, rows, tokens, heads, head_dim)).to(dtype)
    out = attention.attention(qkv.clone().requires_grad_(trained)).detach()
    assert out.shape == (rows, tokens, heads * head_dim)
    assert_as_exact_as_torch(out, softmax_attention(qkv), softmax_attention(qkv.double()))


def test_attention_of_large_logits_stays_finite():
    qkv = 100 * example(attention, 1, 9, 1, 64)
    for trained in (False, True):
        out = attention.attention(qkv.clone().requires_grad_(trained))
        torch.testing.assert_close(out.double(), softmax_attention(qkv.double()), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_attention_takes_any_strides(trained):
    storage = normal(2, 3, 5, 2, 13, 2 * 16)  # [H, 3, …]: every axis in another place than in [B, L, 3, H, d]
    qkv = storage[:, :, 0, :, :, ::2].permute(2, 3, 1, 0, 4)  # [2, 13, 3, 2, 16]
    assert not qkv.is_contiguous()
    out = attention.attention(qkv.detach().requires_grad_(trained))
    torch.testing.assert_close(out.detach(), attention.attention(qkv.contiguous()))


def test_attention_gradient_is_that_of_the_formula():
    qkv, weights = example(attention, 2, 11, 2, 16), normal(2, 11, 32, seed=1)
    ours, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    (attention.attention(ours) * weights).sum().backward()
    (softmax_attention(exact) * weights).sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_attention_refuses_what_is_not_packed_qkv():
    with pytest.raises(AssertionError, match="B, L, 3, H, d"):
        attention.attention(torch.zeros(2, 3, 7, 2, 16))


def modulated(x, m_shift, m_scale):
    """LayerNorm and modulation spelled out in x's dtype."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + m_scale) + m_shift


def modulations(table, index, vector):
    """The six chunks of every token, each [B, L, D]."""
    return (table[index.long()] + vector).chunk(6, dim=-1)


def adaln_inputs(dtype=torch.float32, offset=0.0, times=5):
    """x, y, table, index and vector of three rows of seven tokens; x is `offset` away from zero."""
    x, *rest = example(adaln, 3, 7, DIM, times, dtype=dtype)
    return (x.float() + offset).to(dtype), *rest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("times", [5, 101])  # fewer and more than tokens
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_layer_norm_modulate_follows_each_tokens_time(dtype, offset, times):
    x, _, table, index, vector = adaln_inputs(dtype, offset=offset, times=times)
    ours = layer_norm_modulate(x, table, index, vector, 3, 1)
    m = modulations(table.double(), index, vector.double())
    low = modulations(table, index, vector)
    assert_as_exact_as_torch(ours, modulated(x, low[3], low[1]), modulated(x.double(), m[3], m[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_residual_adds_what_the_gate_lets_through(dtype):
    x, y, table, index, vector = adaln_inputs(dtype)
    ours = gated_residual(x, y, table, index, vector, 5)
    gate, exact_gate = modulations(table, index, vector)[5], modulations(table.double(), index, vector.double())[5]
    assert_as_exact_as_torch(ours, x + gate * y, x.double() + exact_gate * y.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_residual_modulate_is_the_one_after_the_other(dtype):
    x, y, *time = adaln_inputs(dtype)
    stream, h = gated_residual_modulate(x, y, *time, 2, 3, 4)
    assert torch.equal(stream, gated_residual(x, y, *time, 2))
    assert torch.equal(h, layer_norm_modulate(stream, *time, 3, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulations_that_were_gathered_before_give_the_same(dtype):
    x, y, *time = adaln_inputs(dtype)
    assert gathered(x, *time, slice(1, None, 3)) == tuple(time), "there is a backward only for these"
    with torch.no_grad():
        before = gathered(x, *time, slice(1, None, 3))
        assert before[1:] == (None, None) if x.is_cpu else before == tuple(time)
        for operation, arguments, chunks in (
            (layer_norm_modulate, (x,), (0, 1)),
            (gated_residual, (x, y), (5,)),
            (gated_residual_modulate, (x, y), (2, 3, 4)),
        ):
            expected, found = operation(*arguments, *time, *chunks), operation(*arguments, *before, *chunks)
            assert torch.equal(torch.stack(tuple(expected)), torch.stack(tuple(found))), operation


def test_a_product_leaves_gathered_modulations_to_pytorch():
    x, y, *time = adaln_inputs()
    weight, bias = normal(DIM, DIM, seed=5), normal(DIM, seed=6)
    with torch.no_grad():
        expected = linear_residual(x, y, weight, bias, *time, 2, backend="torch")
        before = gathered(x, *time, slice(1, None, 3))
        found = linear_residual(x, y, weight, bias, *before, 2, backend="triton" if x.is_cpu else "torch")
    torch.testing.assert_close(found, expected)


def test_modulations_are_not_rounded_to_the_residual_streams_dtype():
    x, y, table, index, vector = adaln_inputs()
    ours = layer_norm_modulate(x.bfloat16(), table, index, vector, 0, 1)
    m = modulations(table.double(), index, vector.double())
    exact = modulated(x.bfloat16().double(), m[0], m[1])
    assert rms(ours - exact) < 1.05 * rms(exact.bfloat16() - exact)


@pytest.mark.parametrize("times", [5, 101])
def test_adaln_gradients_are_those_of_the_formula(times):
    x, y, table, index, vector = adaln_inputs(times=times)
    weights = normal(2, *x.shape, seed=4)

    ours = [v.clone().requires_grad_() for v in (x, y, table, vector)]
    stream, h = gated_residual_modulate(ours[0], ours[1], ours[2], index, ours[3], 2, 3, 4)
    (stream * weights[0] + h * weights[1]).sum().backward()

    exact = [v.double().requires_grad_() for v in (x, y, table, vector)]
    m = modulations(exact[2], index, exact[3])
    stream = exact[0] + m[2] * exact[1]
    (stream * weights[0] + modulated(stream, m[3], m[4]) * weights[1]).sum().backward()
    for name, a, b in zip(("x", "y", "table", "vector"), ours, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4, msg=lambda s, n=name: f"{n}: {s}")


def test_sinusoid_is_the_transformers_with_cosines_first():
    times = torch.tensor([0, 1, 17, 999, 1000])
    expected = [
        [f(t * 10000 ** (-i / 8)) for f in (math.cos, math.sin) for i in range(8)] for t in (0, 1, 17, 999, 1000)
    ]
    ours = timestep.sinusoid(times, 16)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-4)


def dense_table(times, layers):
    """The formula in the layers' dtype, from the sinusoid in float64."""
    angles = times.double()[:, None] * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    h = torch.cat([angles.cos(), angles.sin()], dim=1).to(layers[0][0].dtype)
    for i, (weight, bias) in enumerate(layers):
        h = h @ weight.T + bias
        h = h if i == 2 else h / (1 + torch.exp(-h))
    return h


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_timestep_table_is_the_time_mlp_of_every_time(dtype):
    times, (_, *layers) = torch.tensor([1000, 0, 3, 3]), example(timestep, 4, 16, 12, 8, dtype=dtype)
    ours = timestep.timestep_table(times, *layers)
    exact = dense_table(times, [(w.double(), b.double()) for w, b in layers])
    assert ours.shape == (4, 48)
    torch.testing.assert_close(ours[2], ours[3])
    # float32 holds an angle of 1000 to 6e-5 only.
    assert rms(ours - exact) <= 2 * rms(dense_table(times, layers) - exact) + 1e-4 * rms(exact)


def test_neighbouring_late_times_differ_in_bfloat16():
    times = torch.tensor([998, 999, 1000])  # bfloat16 itself holds multiples of 4 there
    _, *layers = example(timestep, 3, 16, 12, 8, dtype=torch.bfloat16)
    table = timestep.timestep_table(times, *layers)
    assert not torch.equal(table[0], table[1]) and not torch.equal(table[1], table[2])


def test_costs_count_the_matrix_products():
    qkv = example(attention, 2, 5, 4, 16).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = attention.attention(qkv)
    assert attention.cost(2, 5, 4, 16, qkv.itemsize) == (counter.get_total_flops(), qkv.nbytes + out.nbytes)
    times, *layers = example(timestep, 7, 16, 12, 8)
    with FlopCounterMode(display=False) as counter:
        table = timestep.timestep_table(times, *layers)
    flops, moved = timestep.cost(7, 16, 12, 8, chunks=6, itemsize=4)
    assert flops == counter.get_total_flops()
    assert moved == sum(weight.nbytes for weight, _ in layers) + table.nbytes


@pytest.mark.parametrize("residual", [False, True])
def test_adaln_cost_is_bound_by_memory(residual):
    flops, moved = adaln.cost(2, 320, 512, itemsize=2, residual=residual)
    tensors = 4 if residual else 2  # x and y in, x' and h out; x in, h out
    assert moved == 2 * tensors * 2 * 320 * 512 and flops < 4 * moved
