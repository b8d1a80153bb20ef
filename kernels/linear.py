"""Linear layers with what follows them in the same launch, of one or two inputs; in 8 bits, if quantised.

    linear            x·Wᵀ + b
    linear_gelu       GELU(x·Wᵀ + b)
    linear_residual   stream + m_gate·(x·Wᵀ + b)           m_gate as in adaln.py
    linear_pair       [x, y]·Wᵀ + b, without concatenating x and y

The Triton kernel (linear_kernels.py) is one for all four. It has no backward, so training uses PyTorch's.

8 bits: W is kept as float8_e4m3fn with a scale for each of its rows, and each token of the input is divided by its own
largest value, so both use the whole range of the format (maximum 448):

    x ≈ s_x·x₈,  s_x = max|x| / 448        W_n ≈ s_n·W₈ₙ        x·Wᵀ ≈ s_x·s_n·(x₈·W₈ᵀ), accumulated in float32

Shapes: x, y [B, L, K]; weight [N, K] (linear_pair: [N, 2·K]); bias [N]; stream and results [B, L, N]; table [T, C·N],
index [B, L] int32, vector [C·N] as in adaln.py.
Dtypes: float32, bfloat16 or float16 in and out, accumulated in float32; GELU and gates in float32.
Source of the format: Micikevicius et al. 2022 (arXiv 2209.05433).
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.adaln import as_rows, gated_residual, strides
from engine.kernels.adaln_kernels import NONE
from engine.kernels.backend import COMPILER_OPTIONS, choose, triton
from engine.kernels.linear_kernels import linear_forward

E4M3_MAX = 448.0  # the largest float8_e4m3fn
PACKED_FOR = 64  # tokens for which oneDNN chooses its layout; other numbers hardly change it
PROGRAMS = 264  # as many keep an H100's 132 multiprocessors busy: two each


class Weight8(NamedTuple):
    """A weight [N, K] in 8 bits: values·scales[:, None] approximates it."""

    values: Tensor  # [N, K] float8_e4m3fn
    scales: Tensor  # [N] float32


def quantize(weight: Tensor) -> Weight8:
    """The nearest 8-bit weight, each row scaled so that its largest value is the format's."""
    scales = (weight.float().abs().amax(1) / E4M3_MAX).clamp_min(1e-12)
    return Weight8((weight.float() / scales[:, None]).to(torch.float8_e4m3fn), scales)


# ---------------------------------------------------------------------------------------------- reference


def _torch_linear(x: Tensor, weight: Tensor | Weight8, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Weight8):
        scale = (x.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(1e-12)
        x8, values = (x.float() / scale).to(torch.float8_e4m3fn).float(), weight.values.float()
        product = (x8 @ values.t()) * (scale * weight.scales)
        return (product if bias is None else product + bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def _torch_gelu(x: Tensor, weight: Tensor | Weight8, bias: Tensor, approximate: str) -> Tensor:
    inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if inference and x.is_cpu and isinstance(weight, Tensor) and x.dtype == weight.dtype and onednn_computes(x.dtype):
        # oneDNN applies the GELU to each tile of the product; PyTorch's is a pass of its own. `engine.packages`
        # does the same in what it compiles.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
    return F.gelu(_torch_linear(x, weight, bias), approximate=approximate)


@cache
def onednn_computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and computes in this dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [N, K] in oneDNN's own layout, into which oneDNN else brings it at every call."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR)


def packed_product(
    weight: Tensor, bias: Tensor | None, then: str = "none", approximate: str = ""
) -> Callable[[Tensor], Tensor]:
    """x ↦ x·Wᵀ + b, or with `then` "gelu" the GELU of it, by a copy of W in oneDNN's layout. For inference."""
    packed = pack(weight)

    def product(x: Tensor) -> Tensor:  # [B, L, K] → [B, L, N]
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, then, [], approximate)

    return product


# ------------------------------------------------------------------------------------------------ launchers


def _blocks(tokens: int, columns: int, dtype: torch.dtype, gated: bool) -> dict:
    """Tokens, output and input channels of a program, and the pipeline.

    64 tokens fill one warpgroup of tensor cores. Wide programs reread less, but few rows need narrow ones to occupy
    all multiprocessors; beside the gate and the stream, 128 channels would spill registers. float32 products run
    without tensor cores and want small blocks.
    """
    if dtype == torch.float32:
        return {"BM": 32, "BN": 32, "BK": 32, "PRECISION": "ieee", "num_warps": 4, "num_stages": 2}
    block_m = 128 if triton.cdiv(tokens, 128) * triton.cdiv(columns, 128) >= PROGRAMS else 64
    programs_m, wide = triton.cdiv(tokens, block_m), (64,) if gated else (128, 64)
    block_n = next((n for n in wide if programs_m * triton.cdiv(columns, n) >= PROGRAMS), 32)
    warps = 8 if block_m == block_n == 128 else 4
    return {"BM": block_m, "BN": block_n, "BK": 64, "PRECISION": "tf32", "num_warps": warps, "num_stages": 3}


@torch.library.custom_op("psunet::linear", mutates_args=())
def _linear(
    x: Tensor,
    second: Tensor | None,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    gelu: str,
    stream: Tensor | None,
    table: Tensor | None,
    index: Tensor | None,
    vector: Tensor | None,
    gate: int,
) -> Tensor:
    """[B, L, N]; the arguments after `gelu` are those of the gated residual, or None with the gate NONE."""
    tensors = x, second, weight, stream, table, index
    x, second, weight, stream, table, index = (None if t is None else as_rows(t) for t in tensors)
    b, n, k = x.shape
    columns = weight.shape[0]
    out = x.new_empty(b, n, columns)
    blocks = _blocks(b * n, columns, x.dtype, gate != NONE)
    grid = triton.cdiv(b * n, blocks["BM"]) * triton.cdiv(columns, blocks["BN"])
    linear_forward[(grid,)](
        x, second, weight, scales, bias, stream, table, index, vector, out, b * n, *strides(x),
        *strides(second), weight.stride(0), *strides(stream), 0 if index is None else index.stride(0),
        0 if table is None else table.stride(0), L=n, K=k, K2=weight.shape[1] - k, N=columns, GELU=gelu, GATE=gate,
        FP8=scales is not None, GROUP=8, **blocks, **COMPILER_OPTIONS,
    )  # fmt: skip
    return out


@_linear.register_fake
def _(x, second, weight, scales, bias, gelu, stream, table, index, vector, gate):
    return x.new_empty(*x.shape[:2], weight.shape[0])


def _launch(
    x: Tensor, weight: Tensor | Weight8, bias: Tensor | None, second: Tensor | None = None, gelu: str = "none",
    residual: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, gate: int = NONE,
) -> Tensor:  # fmt: skip
    values, scales = weight if isinstance(weight, Weight8) else (weight, None)
    return _linear(x, second, values, scales, bias, gelu, *(residual or (None,) * 4), gate)


# --------------------------------------------------------------------------------------------------- public


def _choose(operation: str, x: Tensor, weight: Tensor | Weight8, backend: str) -> str:
    values = weight
    if isinstance(weight, Weight8):
        values, operation = weight.values, "linear_8bit"
    unsupported = "has no backward" if torch.is_grad_enabled() and (x.requires_grad or values.requires_grad) else ""
    return choose(operation, x, (x.shape[0] * x.shape[1], *values.shape), backend, unsupported)


def linear(x: Tensor, weight: Tensor | Weight8, bias: Tensor | None, backend: str = "auto") -> Tensor:
    """[B, L, N]. A weight in 16 or 32 bits is left to PyTorch: there is nothing to join with the product."""
    if isinstance(weight, Weight8) and _choose("linear", x, weight, backend) == "triton":
        return _launch(x, weight, bias)
    return _torch_linear(x, weight, bias)


def linear_gelu(
    x: Tensor, weight: Tensor | Weight8, bias: Tensor, approximate: str = "tanh", backend: str = "auto"
) -> Tensor:
    """GELU of a linear layer, [B, L, N]; approximate: "tanh", or "none" for the GELU with the error function."""
    if _choose("linear_gelu", x, weight, backend) == "triton":
        return _launch(x, weight, bias, gelu="erf" if approximate == "none" else approximate)
    return _torch_gelu(x, weight, bias, approximate)


def linear_residual(
    stream: Tensor,
    x: Tensor,
    weight: Tensor | Weight8,
    bias: Tensor,
    table: Tensor,
    index: Tensor | None,
    vector: Tensor | None,
    gate: int,
    backend: str = "auto",
) -> Tensor:
    """The residual stream plus the gated linear layer of a sublayer's last activations, [B, L, N].

    Gathered modulations (`engine.kernels.adaln.gathered`) are left to PyTorch.
    """
    if index is not None and _choose("linear_residual", x, weight, backend) == "triton":
        return _launch(x, weight, bias, residual=(stream, table, index, vector), gate=gate)
    return gated_residual(stream, _torch_linear(x, weight, bias), table, index, vector, gate)


def linear_pair(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    """A linear layer of [x, y], side by side in the channels, [B, L, N]."""
    if _choose("linear_pair", x, weight, backend) == "triton":
        return _launch(x, weight, bias, second=y)
    return _torch_linear(torch.cat([x, y], dim=-1), weight, bias)


def cost(tokens: int, k: int, n: int, itemsize: int, residual: bool = False) -> tuple[int, int]:
    """(FLOPs, bytes moved at least) of `tokens` tokens in all rows; k counts the channels of both inputs."""
    return 2 * tokens * k * n, itemsize * (tokens * (k + n * (2 if residual else 1)) + k * n)


def example_inputs(
    rows: int = 2,
    tokens: int = 320,
    k: int = 512,
    n: int = 2048,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, bias): random values, scaled so that results are of order 1."""
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, tokens, k), (n, k), (n,)))
    return x.to(device, dtype), (weight / k**0.5).to(device, dtype), bias.to(device, dtype)
