"""Adaptive layer norm: normalisation, modulation and gated residuals, with the time a property of each token.

    μ, r = mean and 1/√(variance + ε) of x over its D channels
    m_k(token) = table[index(token)]_k + vector_k            k-th of the D-wide chunks (shift, scale, gate, …)

    layer_norm_modulate        h  = (x − μ)·r·(1 + m_scale) + m_shift
    gated_residual             x' = x + m_gate·y
    gated_residual_modulate    x' as above, h from x' as above; returns both

One pair of Triton kernels does all three: a program takes a few tokens with all of their channels, so x is read once
and h and x' are written once. The gradients of the modulations are sums over all tokens of a time; a program adds up
one table row over one slice of the tokens, and the slices are added in order, so results repeat bit for bit.

Shapes: x, y, h [B, L, D]; table [T, K·D], one row per distinct time; index [B, L] int32 rows of the table; vector
[K·D], the block's own addition. shift, scale and gate are chunk numbers in 0…K−1.
Dtypes: x's dtype in and out; statistics and modulations in float32.
Source: adaLN-Zero, Peebles and Xie 2022 (arXiv 2212.09748); adaLN-single, Chen et al. 2023 (arXiv 2310.00426,
section 2.3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.backend import choose, jit, tl, triton

EPS = 1e-6
MAX_CHANNELS = 2048  # that the Triton kernels take: a token's channels are held in registers
NONE = -1  # a chunk number that is not used


# ---------------------------------------------------------------------------------------------- reference


def _chunk(table: Tensor, index: Tensor, vector: Tensor, k: int, dim: int) -> Tensor:
    """m_k of every token, float32 [B, L, D]."""
    columns = slice(k * dim, (k + 1) * dim)
    rows, addition = table[:, columns], vector[columns].float()
    # The sum is made where there is less of it: training has few times and many tokens, sampling a row for every time.
    if rows.shape[0] < index.numel():
        return F.embedding(index, rows.float() + addition)
    return F.embedding(index, rows).float() + addition


def _torch_modulate(x: Tensor, table: Tensor, index: Tensor, vector: Tensor, shift: int, scale: int) -> Tensor:
    dim = x.shape[-1]
    normed = F.layer_norm(x.float(), (dim,), eps=EPS)
    m_shift, m_scale = _chunk(table, index, vector, shift, dim), _chunk(table, index, vector, scale, dim)
    return (normed * (1 + m_scale) + m_shift).to(x.dtype)


def _torch_residual(x: Tensor, y: Tensor, table: Tensor, index: Tensor, vector: Tensor, gate: int) -> Tensor:
    return (x.float() + _chunk(table, index, vector, gate, x.shape[-1]) * y.float()).to(x.dtype)


# ------------------------------------------------------------------------------------------------- kernels


@jit
def _modulation(TABLE, VECTOR, row, channel, real, k: tl.constexpr, stride, D: tl.constexpr):
    """m_k of some tokens, float32 [TOKENS, BLOCK]."""
    a = tl.load(TABLE + row[:, None] * stride + k * D + channel[None, :], mask=real, other=0.0).to(tl.float32)
    b = tl.load(VECTOR + k * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    return a + b[None, :]


@jit
def _adaln_forward(X, Y, TABLE, INDEX, VECTOR, STREAM, H, MEAN, RSTD, n, stride_xb, stride_xl, stride_yb, stride_yl,
                   stride_ib, stride_table, eps, GATE: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
                   L: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """x' (with a gate) and h (with a shift and scale) of TOKENS of the n = B·L tokens."""
    token, channel = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    b, position = (token // L).to(tl.int64), token % L
    real = (token[:, None] < n) & (channel[None, :] < D)
    row = tl.load(INDEX + b * stride_ib + position, mask=token < n, other=0)
    at = token[:, None].to(tl.int64) * D + channel[None, :]  # in contiguous tensors

    x = X + (b * stride_xb + position * stride_xl)[:, None] + channel[None, :]
    x = tl.load(x, mask=real, other=0.0).to(tl.float32)  # [TOKENS, BLOCK]
    if GATE >= 0:
        y = Y + (b * stride_yb + position * stride_yl)[:, None] + channel[None, :]
        y = tl.load(y, mask=real, other=0.0).to(tl.float32)
        x += _modulation(TABLE, VECTOR, row, channel, real, GATE, stride_table, D) * y
        x = x.to(STREAM.dtype.element_ty)
        tl.store(STREAM + at, x, mask=real)
        x = x.to(tl.float32)  # h follows from what was stored, as in the reference
    if SHIFT >= 0:
        mean = tl.sum(x, 1) / D
        centred = tl.where(real, x - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
        scale = _modulation(TABLE, VECTOR, row, channel, real, SCALE, stride_table, D)
        shift = _modulation(TABLE, VECTOR, row, channel, real, SHIFT, stride_table, D)
        h = centred * rstd[:, None] * (1 + scale) + shift
        tl.store(H + at, h.to(H.dtype.element_ty), mask=real)
        tl.store(MEAN + token, mean, mask=token < n)
        tl.store(RSTD + token, rstd, mask=token < n)


@jit
def _adaln_backward_tokens(DSTREAM, DH, STREAM, MEAN, RSTD, TABLE, INDEX, VECTOR, DX, DY, n, stride_xb, stride_xl,
                           stride_ib, stride_table, GATE: tl.constexpr, SCALE: tl.constexpr, L: tl.constexpr,
                           D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dx and dy of TOKENS tokens; STREAM is what was normalised: x' with a gate, x without."""
    token, channel = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    b, position = (token // L).to(tl.int64), token % L
    real = (token[:, None] < n) & (channel[None, :] < D)
    row = tl.load(INDEX + b * stride_ib + position, mask=token < n, other=0)
    at = token[:, None].to(tl.int64) * D + channel[None, :]

    dx = tl.zeros([TOKENS, BLOCK], tl.float32)
    if GATE >= 0:
        dx += tl.load(DSTREAM + at, mask=real, other=0.0).to(tl.float32)
    if SCALE >= 0:
        x = STREAM + (b * stride_xb + position * stride_xl)[:, None] + channel[None, :]
        x = tl.load(x, mask=real, other=0.0).to(tl.float32)
        mean, rstd = tl.load(MEAN + token, mask=token < n, other=0.0), tl.load(RSTD + token, mask=token < n, other=0.0)
        normed = tl.where(real, (x - mean[:, None]) * rstd[:, None], 0.0)
        dnormed = tl.load(DH + at, mask=real, other=0.0).to(tl.float32)
        dnormed *= 1 + _modulation(TABLE, VECTOR, row, channel, real, SCALE, stride_table, D)
        along = tl.sum(dnormed * normed, 1) / D
        dx += rstd[:, None] * (dnormed - tl.sum(dnormed, 1)[:, None] / D - normed * along[:, None])
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=real)
    if GATE >= 0:
        dy = dx * _modulation(TABLE, VECTOR, row, channel, real, GATE, stride_table, D)
        tl.store(DY + at, dy.to(DY.dtype.element_ty), mask=real)


@jit
def _adaln_backward_table(DX, DH, STREAM, Y, MEAN, RSTD, INDEX, PARTIAL, n, stride_xb, stride_xl, stride_yb, stride_yl,
                          stride_ib, slice_tokens, GATE: tl.constexpr, SCALE: tl.constexpr, L: tl.constexpr,
                          D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums over one slice of the tokens of one time: d gate = dx·y, d shift = dh, d scale = dh·normed."""
    row, piece = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    dgate = tl.zeros([BLOCK], tl.float32)
    dshift, dscale = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    end = min((piece + 1) * slice_tokens, n)
    for first in range(piece * slice_tokens, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        b, position = (token // L).to(tl.int64), token % L
        mine = tl.load(INDEX + b * stride_ib + position, mask=token < end, other=-1) == row
        if tl.max(mine.to(tl.int32), 0) > 0:
            real = mine[:, None] & (channel[None, :] < D)
            at = token[:, None].to(tl.int64) * D + channel[None, :]
            if GATE >= 0:
                y = Y + (b * stride_yb + position * stride_yl)[:, None] + channel[None, :]
                dx = tl.load(DX + at, mask=real, other=0.0).to(tl.float32)
                dgate += tl.sum(dx * tl.load(y, mask=real, other=0.0).to(tl.float32), 0)
            if SCALE >= 0:
                x = STREAM + (b * stride_xb + position * stride_xl)[:, None] + channel[None, :]
                x = tl.load(x, mask=real, other=0.0).to(tl.float32)
                mean, rstd = tl.load(MEAN + token, mask=mine, other=0.0), tl.load(RSTD + token, mask=mine, other=0.0)
                dh = tl.load(DH + at, mask=real, other=0.0).to(tl.float32)
                dshift += tl.sum(dh, 0)
                dscale += tl.sum(dh * (x - mean[:, None]) * rstd[:, None], 0)
    out = PARTIAL + (piece * tl.num_programs(0) + row) * 3 * D + channel
    tl.store(out, dgate, mask=channel < D)
    tl.store(out + D, dshift, mask=channel < D)
    tl.store(out + 2 * D, dscale, mask=channel < D)


# ------------------------------------------------------------------------------------------------ launchers


def _tiles(dim: int) -> dict:
    """A program's tokens and channels: 4,096 values, 32 a thread."""
    block = triton.next_power_of_2(dim)
    return {"TOKENS": max(1, 4096 // block), "BLOCK": block, "num_warps": 4}


def _rows(x: Tensor) -> Tensor:
    """x itself if its channels are contiguous (as in slices of a longer sequence), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("psunet::adaln", mutates_args=())
def _adaln(
    x: Tensor, y: Tensor | None, table: Tensor, index: Tensor, vector: Tensor, gate: int, shift: int, scale: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x', h, mean, rstd): x' is empty without y, the others without a shift."""
    x, index = _rows(x), _rows(index)
    y = None if y is None else _rows(y)
    table, vector = _rows(table), vector.contiguous()
    stream, h, mean, rstd = _outputs(x, y, shift)
    b, n, dim = x.shape
    tiles = _tiles(dim)
    _adaln_forward[(triton.cdiv(b * n, tiles["TOKENS"]),)](
        x, y, table, index, vector, stream, h, mean, rstd, b * n, *x.stride()[:2],
        *((0, 0) if y is None else y.stride()[:2]), index.stride(0), table.stride(0), EPS,
        GATE=gate, SHIFT=shift, SCALE=scale, L=n, D=dim, **tiles,
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
    dstream: Tensor, dh: Tensor, stream: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, table: Tensor,
    index: Tensor, vector: Tensor, gate: int, shift: int, scale: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dy, dtable, dvector); dy is empty without y."""
    dstream, dh, stream, index, table = dstream.contiguous(), dh.contiguous(), _rows(stream), _rows(index), _rows(table)
    y, vector = None if y is None else _rows(y), vector.contiguous()
    b, n, dim = stream.shape
    dx, dy, dtable, dvector = _gradients(stream, y, table, vector)
    tiles, constants = _tiles(dim), {"GATE": gate, "SCALE": scale, "L": n, "D": dim}
    x_strides, y_strides = stream.stride()[:2], (0, 0) if y is None else y.stride()[:2]
    _adaln_backward_tokens[(triton.cdiv(b * n, tiles["TOKENS"]),)](
        dstream, dh, stream, mean, rstd, table, index, vector, dx, dy, b * n, *x_strides, index.stride(0),
        table.stride(0), **constants, **tiles,
    )  # fmt: skip

    pieces, block = 16, min(128, triton.next_power_of_2(dim))  # enough programs even where few times have most tokens
    partial = torch.empty(pieces, table.shape[0], 3, dim, dtype=torch.float32, device=stream.device)
    _adaln_backward_table[table.shape[0], pieces, triton.cdiv(dim, block)](
        dx, dh, stream, y, mean, rstd, index, partial, b * n, *x_strides, *y_strides, index.stride(0),
        triton.cdiv(b * n, pieces), **constants, TOKENS=32, BLOCK=block, num_warps=4,
    )  # fmt: skip
    sums = partial.sum(0)  # [T, 3, D]
    total = sums.sum(0)  # [3, D]
    for k, chunk in enumerate((gate, shift, scale)):
        if chunk >= 0:
            dtable[:, chunk * dim : (chunk + 1) * dim] += sums[:, k]
            dvector[chunk * dim : (chunk + 1) * dim] += total[k]
    return dx, dy, dtable, dvector


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
    dx, dy, dtable, dvector = _adaln_backward(
        dstream, dh, stream, y, mean, rstd, table, index, vector, *ctx.chunks
    )  # fmt: skip
    return dx, None if y is None else dy, dtable, None, dvector, None, None, None


_adaln.register_autograd(_differentiate, setup_context=_save)


# --------------------------------------------------------------------------------------------------- public


def _choose(x: Tensor, backend: str) -> str:
    rows, tokens, dim = x.shape
    return choose("adaln", x, (rows, tokens, dim), dim <= MAX_CHANNELS, backend)


def layer_norm_modulate(
    x: Tensor, table: Tensor, index: Tensor, vector: Tensor, shift: int, scale: int, backend: str = "auto"
) -> Tensor:  # [B, L, D]
    """LayerNorm without affine parameters, then scale and shift by each token's time."""
    if _choose(x, backend) == "triton":
        return _adaln(x, None, table, index, vector, NONE, shift, scale)[1]
    return _torch_modulate(x, table, index, vector, shift, scale)


def gated_residual(
    x: Tensor, y: Tensor, table: Tensor, index: Tensor, vector: Tensor, gate: int, backend: str = "auto"
) -> Tensor:
    """The residual stream x plus the gated output y of a sublayer, [B, L, D] in x's dtype."""
    if _choose(x, backend) == "triton":
        return _adaln(x, y, table, index, vector, gate, NONE, NONE)[0]
    return _torch_residual(x, y, table, index, vector, gate)


def gated_residual_modulate(
    x: Tensor,
    y: Tensor,
    table: Tensor,
    index: Tensor,
    vector: Tensor,
    gate: int,
    shift: int,
    scale: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # 2 × [B, L, D]
    """(new residual stream, its normalised and modulated copy for the next sublayer)."""
    if _choose(x, backend) == "triton":
        return _adaln(x, y, table, index, vector, gate, shift, scale)[:2]
    x = _torch_residual(x, y, table, index, vector, gate)
    return x, _torch_modulate(x, table, index, vector, shift, scale)


def cost(rows: int, tokens: int, dim: int, itemsize: int, residual: bool) -> tuple[int, int]:
    """(FLOPs, bytes moved at least): about 8 a channel for LN + modulate, 2 more for the gated residual."""
    elements = rows * tokens * dim
    return elements * (10 if residual else 8), elements * itemsize * (4 if residual else 2)
