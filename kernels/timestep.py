"""The timestep table: the modulations of every block for many times at once, out of the sampling loop.

    e(t)     = [cos(t·ω), sin(t·ω)],   ω_i = 10000^(−i / (F/2)),  i = 0 … F/2 − 1
    table(t) = W2·SiLU( W_e·SiLU(W1·e(t) + b1) + b_e ) + b2

that is a sinusoid of F channels, the two linear layers of the time MLP and the projection to 6·D of adaLN-single. The
Triton kernel takes a few times through all three layers in one launch; it has no backward, training uses PyTorch's.

Shapes: times [T] (any real dtype), sinusoid [T, F], table [T, 6·D].
Dtypes: computed and returned in the weights' dtype, the sinusoid in float32 (bfloat16 cannot hold t·ω).
Source: Vaswani et al. 2017 (arXiv 1706.03762, section 3.5); Chen et al. 2023 (arXiv 2310.00426, section 2.3).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.backend import COMPILER_OPTIONS, choose, jit, tl, triton


def sinusoid(times: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding of times [T] → float32 [T, channels], cosines first; channels is even."""
    half = channels // 2
    omega = torch.exp(torch.arange(half, device=times.device, dtype=torch.float32) * (-math.log(10000.0) / half))
    angles = times.float()[:, None] * omega  # [T, F/2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [T, F]


def timestep_table(
    times: Tensor,  # [T]
    hidden: tuple[Tensor, Tensor],  # (W1 [E, F], b1 [E])
    embed: tuple[Tensor, Tensor],  # (W_e [D, E], b_e [D])
    project: tuple[Tensor, Tensor],  # (W2 [6·D, D], b2 [6·D])
    backend: str = "auto",
) -> Tensor:  # [T, 6·D]
    """The modulation table of adaLN-single for the given times."""
    layers = hidden, embed, project
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for layer in layers for tensor in layer)
    sizes = len(times), hidden[0].shape[1], embed[0].shape[0]
    if choose("timestep", hidden[0], sizes, backend, "has no backward" if trained else "") == "triton":
        return _table(times.float(), [tensor for layer in layers for tensor in layer])
    h = sinusoid(times, hidden[0].shape[1]).to(hidden[0].dtype)  # [T, F]
    h = F.silu(F.linear(h, *hidden))  # [T, E]
    h = F.silu(F.linear(h, *embed))  # [T, D]
    return F.linear(h, *project)  # [T, 6·D]


# ------------------------------------------------------------------------------------------------- kernel


@jit
def _layer(
    IN,  # [T, K] any float dtype
    W,  # [N, K] like IN
    B,  # [N] like IN
    OUT,  # [T, N] like IN, written
    row,  # [TIMES] int32
    real,  # [TIMES] bool, which of these rows exist
    SILU_IN: tl.constexpr,  # whether SiLU is applied to the input
    K: tl.constexpr,  # channels in
    N: tl.constexpr,  # channels out
    TIMES: tl.constexpr,  # rows of a program
    BLOCK: tl.constexpr,  # channels of an iteration
    PRECISION: tl.constexpr,  # of float32 products
):
    """OUT = (SiLU of) IN·Wᵀ + B for TIMES rows."""
    k, n = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    for first in range(0, N, BLOCK):
        column = first + n
        acc = tl.zeros([TIMES, BLOCK], tl.float32)
        for at in range(0, K, BLOCK):
            inside = real[:, None] & (at + k < K)[None, :]
            x = tl.load(IN + row[:, None] * K + (at + k)[None, :], mask=inside, other=0.0)
            if SILU_IN:
                x32 = x.to(tl.float32)
                x = (x32 * tl.sigmoid(x32)).to(x.dtype)
            inside = (column < N)[None, :] & (at + k < K)[:, None]
            w = tl.load(W + column[None, :] * K + (at + k)[:, None], mask=inside, other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        acc += tl.load(B + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        inside = real[:, None] & (column < N)[None, :]
        tl.store(OUT + row[:, None] * N + column[None, :], acc.to(OUT.dtype.element_ty), mask=inside)
    # The block's other threads read what this one wrote.
    tl.debug_barrier()


@jit
def _timestep_table(
    TIMES_IN,  # [T] float32
    W1,  # [E, F] any float dtype, like all that follow
    B1,  # [E]
    WE,  # [D, E]
    BE,  # [D]
    W2,  # [OUT, D]
    B2,  # [OUT]
    WAVES,  # [T, F] room for the sinusoid
    HIDDEN,  # [T, E] room for the first layer's output
    EMBEDDED,  # [T, D] room for the second layer's output
    TABLE,  # [T, OUT] written
    n,  # int, T
    F: tl.constexpr,  # channels of the sinusoid
    E: tl.constexpr,  # channels of the first layer
    D: tl.constexpr,  # channels of the second layer
    OUT: tl.constexpr,  # channels of the table, 6·D
    TIMES: tl.constexpr,  # rows of a program
    BLOCK: tl.constexpr,  # channels of an iteration
    PRECISION: tl.constexpr,  # of float32 products
):
    """TIMES rows of the table."""
    row = tl.program_id(0) * TIMES + tl.arange(0, TIMES)
    real = row < n
    time = tl.load(TIMES_IN + row, mask=real, other=0.0)
    for first in range(0, F // 2, TIMES):  # small blocks: each copy of cos and sin has its slow path
        i = first + tl.arange(0, TIMES)
        angle = time[:, None] * tl.exp(i.to(tl.float32) * (-9.210340371976184 / (F // 2)))[None, :]  # ln 10000
        inside, at = real[:, None] & (i < F // 2)[None, :], WAVES + row[:, None] * F + i[None, :]
        tl.store(at, tl.cos(angle).to(WAVES.dtype.element_ty), mask=inside)
        tl.store(at + F // 2, tl.sin(angle).to(WAVES.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    _layer(WAVES, W1, B1, HIDDEN, row, real, False, F, E, TIMES, BLOCK, PRECISION)
    _layer(HIDDEN, WE, BE, EMBEDDED, row, real, True, E, D, TIMES, BLOCK, PRECISION)
    _layer(EMBEDDED, W2, B2, TABLE, row, real, True, D, OUT, TIMES, BLOCK, PRECISION)


@torch.library.custom_op("psunet::timestep_table", mutates_args=())
def _table(times: Tensor, layers: list[Tensor]) -> Tensor:
    w1, b1, we, be, w2, b2 = layers = [tensor.contiguous() for tensor in layers]
    n, (e, f), d, out = len(times), w1.shape, we.shape[0], w2.shape[0]
    between = (w1.new_empty(n, width) for width in (f, e, d))
    table = w1.new_empty(n, out)
    precision = "ieee" if w1.dtype == torch.float32 else "tf32"
    _timestep_table[(triton.cdiv(n, 16),)](
        times, *layers, *between, table, n, F=f, E=e, D=d, OUT=out, TIMES=16, BLOCK=64, PRECISION=precision,
        num_warps=4, num_stages=2, **COMPILER_OPTIONS,
    )  # fmt: skip
    return table


@_table.register_fake
def _(times: Tensor, layers: list[Tensor]) -> Tensor:
    return layers[0].new_empty(len(times), layers[4].shape[0])


def cost(times: int, frequencies: int, hidden: int, dim: int, chunks: int, itemsize: int) -> tuple[int, int]:
    """(FLOPs, bytes moved at least): three linear layers; weights read once, the table written once."""
    weights = frequencies * hidden + hidden * dim + dim * chunks * dim
    return 2 * times * weights, (weights + times * chunks * dim) * itemsize


def example_inputs(
    times: int = 51,
    frequencies: int = 256,
    hidden: int = 512,
    dim: int = 512,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(times, then the three layers' weights and biases): random layers that keep the size of what they are given."""
    layers = []
    for width_in, width_out in ((frequencies, hidden), (hidden, dim), (dim, 6 * dim)):
        weight = torch.randn(width_out, width_in, generator=generator) / width_in**0.5
        layers.append((weight.to(device, dtype), torch.randn(width_out, generator=generator).to(device, dtype)))
    return torch.arange(times, device=device), *layers
