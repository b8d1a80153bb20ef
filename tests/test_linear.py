"""Linear layers with their epilogue in one launch: against float64, in Triton's interpreter where there is no GPU."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    DEVICE,
    DTYPES,
    assert_as_exact_as_torch,
    check_registration,
    example,
    normal,
    poisoned,  # noqa: F401
    rms,
)

from engine.kernels import adaln, linear
from engine.kernels.backend import BackendError

# (rows, tokens, input channels, output channels): whole blocks, part of one in every direction, more than one in each
SHAPES = [(1, 64, 64, 32), (2, 13, 24, 40), (3, 23, 72, 33)]
GATE = 2


def residual_of(stream, x, weight, bias, table, vector, index, backend):
    if backend:
        return linear.linear_residual(stream, x, weight, bias, table, index, vector, GATE, backend)
    chunk = slice(GATE * weight.shape[0], (GATE + 1) * weight.shape[0])
    return stream + (table[index.long(), chunk] + vector[chunk]) * F.linear(x, weight, bias)


def operations(rows, tokens, k, n):
    """(name, function of float inputs and a backend, of which None is the textbook's; inputs)"""
    x, weight, bias = example(linear, rows, tokens, k, n)
    for approximate in ("tanh", "none"):

        def gelu(x, weight, bias, backend, approximate=approximate):
            if backend:
                return linear.linear_gelu(x, weight, bias, approximate, backend)
            return F.gelu(F.linear(x, weight, bias), approximate=approximate)

        yield f"GELU {approximate}", gelu, (x, weight, bias)
    stream, _, table, index, vector = example(adaln, rows, tokens, n, times=5)

    def residual(*inputs, backend):
        return residual_of(*inputs, index, backend)

    yield "residual", residual, (stream, x, weight, bias, table, vector)

    def pair(x, y, weight, bias, backend):
        if backend:
            return linear.linear_pair(x, y, weight, bias, backend)
        return F.linear(torch.cat([x, y], -1), weight, bias)

    yield "pair", pair, (x, normal(*x.shape), normal(n, 2 * k) / k**0.5, bias)


def assert_all_as_exact_as_torch(shape, dtype):
    for name, operation, inputs in operations(*shape):
        rounded = [x.to(dtype) for x in inputs]
        with torch.inference_mode():
            exact = operation(*(x.double() for x in rounded), backend=None)
            ours, torchs = (operation(*rounded, backend=backend) for backend in ("triton", "torch"))
        assert_as_exact_as_torch(ours, torchs, exact, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_their_epilogues(shape, dtype):
    assert_all_as_exact_as_torch(shape, dtype)


@torch.inference_mode()
def test_inputs_of_any_strides_are_taken():
    x, weight, bias = example(linear, 2, 9, 16, 24)
    stream, y, table, index, vector = example(adaln, 2, 9, 24, times=3)
    longer = normal(2, 20, 16)
    x, second = longer[:, 4:13], longer.transpose(0, 1)[3:12].transpose(0, 1)
    pair = torch.cat([weight, weight], 1)
    for strided, contiguous in (
        (linear.linear_pair(x, second, pair, bias, "triton"), (x.contiguous(), second.contiguous(), pair)),
        (linear.linear_pair(x.mT.contiguous().mT, second, pair, bias, "triton"), (x, second, pair)),
        (linear.linear_pair(x, second, pair.t().contiguous().t(), bias, "triton"), (x, second, pair)),
    ):
        assert torch.equal(strided, linear.linear_pair(*contiguous, bias, "triton"))
    wide = torch.cat([y, stream], -1)[..., 24:]  # the stream in the middle of something larger
    gated = [linear.linear_residual(s, x, weight, bias, table, index, vector, GATE, "triton") for s in (stream, wide)]
    assert torch.equal(*gated)


@torch.inference_mode()
def test_products_of_numbers_that_8_bits_represent_are_exact():
    """Small whole numbers; 448, the largest, in every token and every row of the weight, makes their scales 1."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-8, 9, shape, generator=draw).float().to(DEVICE) for shape in ((2, 9, 40), (24, 40)))
    x[..., 3], weight[:, 5], bias = 448.0, -448.0, normal(24)
    exact, weight8 = F.linear(x, weight, bias), linear.quantize(weight)
    for backend in ("torch", "triton"):
        result = linear.linear(x, weight8, bias, backend)
        torch.testing.assert_close(result, exact, rtol=0, atol=1e-3)  # of values up to 448²
    gelu = linear.linear_gelu(x, weight8, bias, backend="triton")
    torch.testing.assert_close(gelu, F.gelu(exact, approximate="tanh"), rtol=0, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_8_bit_products_are_as_exact_as_their_format(factor):
    """A rounding to 3 bits of mantissa errs by 1/16 at most, by 2 % on average: about 2.6 % for products of both."""
    x, weight, bias = example(linear, 2, 64, 128, 48)
    x[0, 0] = 0.0
    exact = F.linear(factor * x, weight)
    error = linear.linear(factor * x, linear.quantize(weight), None, "torch") - exact
    assert rms(error) / rms(exact) < 0.04
    assert not error[0, 0].any()


@torch.inference_mode()
def test_rows_of_weights_and_tokens_have_scales_of_their_own():
    x, weight, _ = example(linear, 1, 16, 64, 32)
    plain = linear.linear(x, linear.quantize(weight), None, "torch")
    large = torch.ones(32)
    large[3] = 2.0**20
    of_rows = linear.linear(x, linear.quantize(weight * large[:, None].to(DEVICE)), None, "torch")
    torch.testing.assert_close(of_rows, plain * large.to(DEVICE), rtol=1e-6, atol=0)
    of_tokens = linear.linear(x * large[:16, None].to(DEVICE), linear.quantize(weight), None, "torch")
    torch.testing.assert_close(of_tokens, plain * large[:16, None].to(DEVICE), rtol=1e-6, atol=0)


def test_gradients_are_left_to_torch_or_refused():
    x, weight, bias = example(linear, 1, 8, 16, 8)
    x.requires_grad_()
    with pytest.raises(BackendError, match="has no backward"):
        linear.linear_gelu(x, weight, bias, backend="triton")
    linear.linear_gelu(x, weight, bias, backend="torch").sum().backward()
    assert x.grad.any()


def test_linear_is_registered_for_compilation():
    x, weight, bias = example(linear, 2, 5, 8, 12)
    stream, _, table, index, vector = example(adaln, 2, 5, 12, times=2)
    nothing = (None,) * 4
    check_registration(torch.ops.psunet.linear, x, None, weight, None, bias, "tanh", *nothing, linear.NONE)
    gated = stream, table, index, vector
    check_registration(torch.ops.psunet.linear, x, None, weight, None, bias, "none", *gated, GATE)
    pair = torch.cat([weight, weight], 1)
    check_registration(torch.ops.psunet.linear, x, x + 1, pair, None, bias, "none", *nothing, linear.NONE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, tokens", [(2, 320), (2, 64), (32, 333), (128, 320)])
def test_products_at_the_models_shapes(rows, tokens, dtype):
    assert_all_as_exact_as_torch((rows, tokens, 512, 512), dtype)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() < (8, 9), reason="the device has no products in 8 bits"
)
@pytest.mark.parametrize("rows", [2, 128])
def test_8_bit_products_at_the_models_shapes(rows):
    x, weight, bias = example(linear, rows, 320, 512, 2048, dtype=torch.bfloat16)
    weight8 = linear.quantize(weight)
    ours, torchs = (linear.linear(x, weight8, bias, backend) for backend in ("triton", "torch"))
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert rms(ours - exact) <= 1.05 * rms(torchs - exact)
