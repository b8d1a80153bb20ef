"""Adaptive layer norm: normalisation, modulation and gated residuals, with the time a property of each token.

    μ, r = mean and 1/√(variance + ε) of x over its D channels
    m_k(token) = table[index(token)]_k + vector_k            k-th of the D-wide chunks (shift, scale, gate, …)

    layer_norm_modulate        h  = (x − μ)·r·(1 + m_scale) + m_shift
    gated_residual             x' = x + m_gate·y
    gated_residual_modulate    x' as above, h from x' as above; returns both

The same Triton kernels (adaln_kernels.py) do all three, forward and backward.

Shapes: x, y, h [B, L, D]; table [T, K·D], one row per distinct time; index [B, L] int32 rows of the table; vector
[K·D], the block's own addition. shift, scale and gate are chunk numbers in 0…K−1. In place of (table, index, vector)
the operations also take what `gathered` gives for them.
Dtypes: x's dtype in and out; statistics and modulations in float32.
Source: adaLN-Zero, Peebles and Xie 2022 (arXiv 2212.09748); adaLN-single, Chen et al. 2023 (arXiv 2310.00426,
section 2.3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.adaln_kernels import NONE, adaln_backward_table, adaln_backward_tokens, adaln_forward
from engine.kernels.backend import COMPILER_OPTIONS, choose, triton

EPS = 1e-6
MAX_CHANNELS = 2048  # that the Triton kernels take: a token's channels are held in registers
GATHERED = 1 << 20  # elements of x; of larger ones the gathered chunks, six times x in float32, would take much memory
CHUNKS = 6  # of a block's modulation: shift, scale and gate for attention and for the MLP


# ---------------------------------------------------------------------------------------------- reference


def _torch_adaln(
    x: Tensor,
    y: Tensor | None,
    table: Tensor,
    index: Tensor | None,
    vector: Tensor | None,
    gate: int,
    shift: int,
    scale: int,
) -> tuple[Tensor, Tensor]:
    """(x', h): x' is x without y, h is x' without a shift."""
    dim = x.shape[-1]
    modulations = table.float() + vector.float() if index is not None else table  # [T, K·D], or [K, B, L, D]

    def of_tokens(k: int, plus: float = 0.0) -> Tensor:
        if index is None:  # `_gather` has added it
            return modulations[k]  # [B, L, D]
        rows = modulations.narrow(1, k * dim, dim)  # [T, D]
        return F.embedding(index, rows + plus if plus else rows)  # [B, L, D]

    stream = x
    if y is not None:
        stream = torch.addcmul(x.float(), of_tokens(gate), y.float()).to(x.dtype)  # [B, L, D]
    if shift == NONE:
        return stream, stream
    # With a weight, though of ones, this takes half as long on a CPU as without.
    normed = F.layer_norm(stream.float(), (dim,), stream.new_ones(dim, dtype=torch.float32), eps=EPS)
    return stream, torch.addcmul(of_tokens(shift), normed, of_tokens(scale, plus=1)).to(x.dtype)


def _gather(table: Tensor, index: Tensor, vector: Tensor, scales: slice) -> Tensor:
    """Each token's modulations [K, B, L, D] float32, with 1 + m_scale in the chunks of scales."""
    modulations = (table.float() + vector.float()).unflatten(1, (CHUNKS, -1)).transpose(0, 1).contiguous()  # [K, T, D]
    modulations[scales].add_(1)
    return modulations.index_select(1, index.flatten()).unflatten(1, index.shape)


# ------------------------------------------------------------------------------------------------ launchers


def _tiles(dim: int) -> dict:
    """A program's tokens and channels: 4,096 values, 32 a thread."""
    block = triton.next_power_of_2(dim)
    return {"TOKENS": max(1, 4096 // block), "BLOCK": block, "num_warps": 4, **COMPILER_OPTIONS}


def as_rows(x: Tensor) -> Tensor:
    """x itself if its channels are contiguous (as in slices of a longer sequence), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int]:
    """(between rows, between tokens)"""
    return (0, 0) if x is None else x.stride()[:2]


@torch.library.custom_op("psunet::adaln", mutates_args=())
def _adaln(
    x: Tensor, y: Tensor | None, table: Tensor, index: Tensor, vector: Tensor, gate: int, shift: int, scale: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x', h, mean, rstd): x' is empty without y, the others without a shift."""
    x, index = as_rows(x), as_rows(index)
    y = None if y is None else as_rows(y)
    table, vector = as_rows(table), vector.contiguous()
    stream, h, mean, rstd = _outputs(x, y, shift)
    b, n, dim = x.shape
    tiles = _tiles(dim)
    adaln_forward[(triton.cdiv(b * n, tiles["TOKENS"]),)](
        x, y, table, index, vector, stream, h, mean, rstd, b * n, *strides(x), *strides(y), index.stride(0),
        table.stride(0), EPS, GATE=gate, SHIFT=shift, SCALE=scale, L=n, D=dim, **tiles,
    )  # fmt: skip
    return stream, h, mean, rstd


def _outputs(x: Tensor, y: Tensor | None, shift: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed = x.shape if shift >= 0 else (0, 0, 0)
    stream, h = x.new_empty(x.shape if y is not None else (0, 0, 0)), x.new_empty(normed)
    return stream, h, x.new_empty(normed[:2], dtype=torch.float32), x.new_empty(normed[:2], dtype=torch.float32)


@_adaln.register_fake
def _(x, y, table, index, vector, gate, shift, scale):
    return _outputs(x, y, shift)


@torch.library.custom_op("psunet::adaln_backward", mutates_args=())
def _adaln_backward(
    dstream: Tensor,  # [B, L, D]
    dh: Tensor,  # [B, L, D]
    stream: Tensor,  # [B, L, D]
    y: Tensor | None,  # [B, L, D]
    mean: Tensor,  # [B, L] float32
    rstd: Tensor,  # [B, L] float32
    table: Tensor,  # [T, K·D]
    index: Tensor,  # [B, L] int32
    vector: Tensor,  # [K·D]
    gate: int,
    shift: int,
    scale: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dtable, dvector); dy is empty without y."""
    dstream, dh, vector = dstream.contiguous(), dh.contiguous(), vector.contiguous()
    stream, index, table = as_rows(stream), as_rows(index), as_rows(table)
    y = None if y is None else as_rows(y)
    b, n, dim = stream.shape
    dx, dy, dtable, dvector = _gradients(stream, y, table, vector)
    tiles = _tiles(dim)
    adaln_backward_tokens[(triton.cdiv(b * n, tiles["TOKENS"]),)](
        dstream, dh, stream, mean, rstd, table, index, vector, dx, dy, b * n, *strides(stream), index.stride(0),
        table.stride(0), GATE=gate, SCALE=scale, L=n, D=dim, **tiles,
    )  # fmt: skip
    sums = _table_sums(dx, dh, stream, y, mean, rstd, index, table.shape[0], gate != NONE, scale != NONE)  # [T, 3, D]
    total = sums.sum(0)  # [3, D]
    for k, chunk in enumerate((gate, shift, scale)):
        if chunk != NONE:
            dtable[:, chunk * dim : (chunk + 1) * dim] += sums[:, k]
            dvector[chunk * dim : (chunk + 1) * dim] += total[k]
    return dx, dy, dtable, dvector


def _table_sums(
    dx: Tensor, dh: Tensor, stream: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, index: Tensor, times: int,
    gated: bool, normed: bool,
) -> Tensor:  # fmt: skip
    """[T, 3, D] float32: d gate, d shift and d scale, summed over the tokens of each of the T times."""
    b, n, dim = stream.shape
    slices, block = 16, min(128, triton.next_power_of_2(dim))  # enough programs even where few times have most tokens
    partial = torch.empty(slices, times, 3, dim, dtype=torch.float32, device=stream.device)
    adaln_backward_table[times, slices, triton.cdiv(dim, block)](
        dx, dh, stream, y, mean, rstd, index, partial, b * n, *strides(stream), *strides(y), index.stride(0),
        triton.cdiv(b * n, slices), dim, GATED=gated, NORMED=normed, L=n, TOKENS=32, BLOCK=block, num_warps=4,
        **COMPILER_OPTIONS,
    )  # fmt: skip
    return partial.sum(0)


def _gradients(stream: Tensor, y: Tensor | None, table: Tensor, vector: Tensor):
    dx = stream.new_empty(stream.shape)
    dy = stream.new_empty((0, 0, 0)) if y is None else y.new_empty(y.shape)
    return dx, dy, table.new_zeros(table.shape), vector.new_zeros(vector.shape)


@_adaln_backward.register_fake
def _(dstream, dh, stream, y, mean, rstd, table, index, vector, gate, shift, scale):
    return _gradients(stream, y, table, vector)


def _save(ctx, inputs, output) -> None:
    x, y, table, index, vector, *ctx.chunks = inputs
    stream, _, mean, rstd = output
    ctx.save_for_backward(x if y is None else stream, y, mean, rstd, table, index, vector)


def _differentiate(ctx, dstream: Tensor, dh: Tensor, *_):
    stream, y, mean, rstd, table, index, vector = ctx.saved_tensors
    dx, dy, dtable, dvector = _adaln_backward(dstream, dh, stream, y, mean, rstd, table, index, vector, *ctx.chunks)
    return dx, None if y is None else dy, dtable, None, dvector, None, None, None


_adaln.register_autograd(_differentiate, setup_context=_save)


# --------------------------------------------------------------------------------------------------- public


def _choose(x: Tensor, backend: str) -> str:
    rows, tokens, dim = x.shape
    unsupported = "" if dim <= MAX_CHANNELS else f"takes at most {MAX_CHANNELS} channels"
    return choose("adaln", x, (rows, tokens, dim), backend, unsupported)


def gathered(
    x: Tensor, table: Tensor, index: Tensor, vector: Tensor, scales: slice
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What to pass for (table, index, vector) to several operations on x [B, L, D] with K = 6.

    In eager inference on a CPU, of small inputs, these are the tokens' modulations, gathered once for all chunks; else
    they are the same three.
    scales  the chunks that are scales
    """
    eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if eager and x.is_cpu and x.numel() <= GATHERED and _choose(x, "auto") == "torch":
        return _gather(table, index, vector, scales), None, None
    return table, index, vector


def layer_norm_modulate(
    x: Tensor, table: Tensor, index: Tensor | None, vector: Tensor | None, shift: int, scale: int, backend: str = "auto"
) -> Tensor:  # [B, L, D]
    """LayerNorm without affine parameters, then scale and shift by each token's time."""
    if _choose(x, backend) == "triton":
        return _adaln(x, None, table, index, vector, NONE, shift, scale)[1]
    return _torch_adaln(x, None, table, index, vector, NONE, shift, scale)[1]


def gated_residual(
    x: Tensor, y: Tensor, table: Tensor, index: Tensor | None, vector: Tensor | None, gate: int, backend: str = "auto"
) -> Tensor:
    """The residual stream x plus the gated output y of a sublayer, [B, L, D] in x's dtype."""
    if _choose(x, backend) == "triton":
        return _adaln(x, y, table, index, vector, gate, NONE, NONE)[0]
    return _torch_adaln(x, y, table, index, vector, gate, NONE, NONE)[0]


def gated_residual_modulate(
    x: Tensor,
    y: Tensor,
    table: Tensor,
    index: Tensor | None,
    vector: Tensor | None,
    gate: int,
    shift: int,
    scale: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # 2 × [B, L, D]
    """(new residual stream, its normalised and modulated copy for the next sublayer)."""
    if _choose(x, backend) == "triton":
        return _adaln(x, y, table, index, vector, gate, shift, scale)[:2]
    return _torch_adaln(x, y, table, index, vector, gate, shift, scale)


def cost(rows: int, tokens: int, dim: int, itemsize: int, residual: bool) -> tuple[int, int]:
    """(FLOPs, bytes moved at least): about 8 a channel for LN + modulate, 2 more for the gated residual."""
    elements = rows * tokens * dim
    return elements * (10 if residual else 8), elements * itemsize * (4 if residual else 2)


def example_inputs(
    rows: int = 2,
    tokens: int = 320,
    dim: int = 512,
    times: int = 66,  # T
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x, y, table, index, vector): random values, and a random time for every token."""
    shapes = (rows, tokens, dim), (rows, tokens, dim), (times, CHUNKS * dim), (CHUNKS * dim,)
    x, y, table, vector = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    index = torch.randint(times, (rows, tokens), dtype=torch.int32, generator=generator).to(device)
    return x, y, table, index, vector
