"""The Triton kernels of adaln.py.

A program takes a few tokens with all of their channels, so the forward reads x once and writes h and x' once. The
gradients of the modulations are sums over all tokens of a time: a program adds up one table row over one slice of the
tokens, and the slices are added in order, so results repeat bit for bit.

Shapes: B rows, L tokens, D channels, T times, K chunks of a modulation.
"""

from engine.kernels.backend import jit, tl

NONE = -1  # a chunk number that is not used


@jit
def modulation(
    TABLE,  # [T, K·D] any float dtype
    VECTOR,  # [K·D] any float dtype
    row,  # [TOKENS] int32, rows of TABLE
    channel,  # [BLOCK] int32
    real,  # [TOKENS, BLOCK] bool, which of these exist
    k: tl.constexpr,  # chunk
    stride,  # int, between rows of TABLE
    D: tl.constexpr,  # channels
):
    """m_k of some tokens, float32 [TOKENS, BLOCK]."""
    a = tl.load(TABLE + row[:, None] * stride + k * D + channel[None, :], mask=real, other=0.0).to(tl.float32)
    b = tl.load(VECTOR + k * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    return a + b[None, :]


@jit
def adaln_forward(
    X,  # [B, L, D] any float dtype
    Y,  # [B, L, D] or None without a gate
    TABLE,  # [T, K·D] any float dtype
    INDEX,  # [B, L] int32
    VECTOR,  # [K·D] any float dtype
    STREAM,  # [B, L, D] like X, contiguous, written with a gate
    H,  # [B, L, D] like X, contiguous, written with a shift
    MEAN,  # [B, L] float32, written with a shift
    RSTD,  # [B, L] float32, written with a shift
    n,  # int, B·L
    stride_xb,  # int, between rows of X
    stride_xl,  # int, between tokens of X
    stride_yb,  # int, between rows of Y
    stride_yl,  # int, between tokens of Y
    stride_ib,  # int, between rows of INDEX
    stride_table,  # int, between rows of TABLE
    eps,  # float
    GATE: tl.constexpr,  # chunk, or NONE: no gated residual
    SHIFT: tl.constexpr,  # chunk, or NONE: no norm
    SCALE: tl.constexpr,  # chunk, or NONE: no norm
    L: tl.constexpr,  # tokens of a row
    D: tl.constexpr,  # channels
    TOKENS: tl.constexpr,  # tokens of a program
    BLOCK: tl.constexpr,  # channels of a program, D or more
):
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
        x += modulation(TABLE, VECTOR, row, channel, real, GATE, stride_table, D) * y
        x = x.to(STREAM.dtype.element_ty)
        tl.store(STREAM + at, x, mask=real)
        x = x.to(tl.float32)  # h follows from what was stored, as in the reference
    if SHIFT >= 0:
        mean = tl.sum(x, 1) / D
        centred = tl.where(real, x - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
        scale = modulation(TABLE, VECTOR, row, channel, real, SCALE, stride_table, D)
        shift = modulation(TABLE, VECTOR, row, channel, real, SHIFT, stride_table, D)
        h = centred * rstd[:, None] * (1 + scale) + shift
        tl.store(H + at, h.to(H.dtype.element_ty), mask=real)
        tl.store(MEAN + token, mean, mask=token < n)
        tl.store(RSTD + token, rstd, mask=token < n)


@jit
def adaln_backward_tokens(
    DSTREAM,  # [B, L, D] any float dtype, contiguous, read with a gate
    DH,  # [B, L, D] any float dtype, contiguous, read with a scale
    STREAM,  # [B, L, D] any float dtype
    MEAN,  # [B, L] float32
    RSTD,  # [B, L] float32
    TABLE,  # [T, K·D] any float dtype
    INDEX,  # [B, L] int32
    VECTOR,  # [K·D] any float dtype
    DX,  # [B, L, D] like STREAM, contiguous, written
    DY,  # [B, L, D] like STREAM, contiguous, written with a gate
    n,  # int, B·L
    stride_xb,  # int, between rows of STREAM
    stride_xl,  # int, between tokens of STREAM
    stride_ib,  # int, between rows of INDEX
    stride_table,  # int, between rows of TABLE
    GATE: tl.constexpr,  # chunk, or NONE: no gated residual
    SCALE: tl.constexpr,  # chunk, or NONE: no norm
    L: tl.constexpr,  # tokens of a row
    D: tl.constexpr,  # channels
    TOKENS: tl.constexpr,  # tokens of a program
    BLOCK: tl.constexpr,  # channels of a program, D or more
):
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
        dnormed *= 1 + modulation(TABLE, VECTOR, row, channel, real, SCALE, stride_table, D)
        along = tl.sum(dnormed * normed, 1) / D
        dx += rstd[:, None] * (dnormed - tl.sum(dnormed, 1)[:, None] / D - normed * along[:, None])
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=real)
    if GATE >= 0:
        dy = dx * modulation(TABLE, VECTOR, row, channel, real, GATE, stride_table, D)
        tl.store(DY + at, dy.to(DY.dtype.element_ty), mask=real)


@jit
def adaln_backward_table(
    DX,  # [B, L, D] any float dtype, contiguous, read with a gate
    DH,  # [B, L, D] any float dtype, contiguous, read with a norm
    STREAM,  # [B, L, D] any float dtype
    Y,  # [B, L, D] or None without a gate
    MEAN,  # [B, L] float32
    RSTD,  # [B, L] float32
    INDEX,  # [B, L] int32
    PARTIAL,  # [slices, T, 3, D] float32, written: d gate, d shift, d scale
    n,  # int, B·L
    stride_xb,  # int, between rows of STREAM
    stride_xl,  # int, between tokens of STREAM
    stride_yb,  # int, between rows of Y
    stride_yl,  # int, between tokens of Y
    stride_ib,  # int, between rows of INDEX
    slice_tokens,  # int, tokens of a slice
    D,  # int, channels; no constant, so that one kernel serves all widths
    GATED: tl.constexpr,  # whether there is a gate
    NORMED: tl.constexpr,  # whether there is a norm
    L: tl.constexpr,  # tokens of a row
    TOKENS: tl.constexpr,  # tokens of an iteration
    BLOCK: tl.constexpr,  # channels of a program
):
    """Sums over one slice of the tokens of one time: d gate = dx·y, d shift = dh, d scale = dh·normed."""
    row, piece = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    dgate = tl.zeros([BLOCK], tl.float32)
    dshift, dscale = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    end = min((piece + 1) * slice_tokens, n)
    for first in range(piece * slice_tokens, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        b, position = (token // L).to(tl.int64), token % L
        selected = tl.load(INDEX + b * stride_ib + position, mask=token < end, other=-1) == row
        if tl.max(selected.to(tl.int32), 0) > 0:
            real = selected[:, None] & (channel[None, :] < D)
            at = token[:, None].to(tl.int64) * D + channel[None, :]
            if GATED:
                y = Y + (b * stride_yb + position * stride_yl)[:, None] + channel[None, :]
                dx = tl.load(DX + at, mask=real, other=0.0).to(tl.float32)
                dgate += tl.sum(dx * tl.load(y, mask=real, other=0.0).to(tl.float32), 0)
            if NORMED:
                x = STREAM + (b * stride_xb + position * stride_xl)[:, None] + channel[None, :]
                x = tl.load(x, mask=real, other=0.0).to(tl.float32)
                mean = tl.load(MEAN + token, mask=selected, other=0.0)
                rstd = tl.load(RSTD + token, mask=selected, other=0.0)
                dh = tl.load(DH + at, mask=real, other=0.0).to(tl.float32)
                dshift += tl.sum(dh, 0)
                dscale += tl.sum(dh * (x - mean[:, None]) * rstd[:, None], 0)
    out = PARTIAL + (piece * tl.num_programs(0) + row) * 3 * D + channel
    tl.store(out, dgate, mask=channel < D)
    tl.store(out + D, dshift, mask=channel < D)
    tl.store(out + 2 * D, dscale, mask=channel < D)
