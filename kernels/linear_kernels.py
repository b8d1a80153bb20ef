"""The Triton kernel of linear.py: a product with an epilogue, from one or two inputs, in 16, 32 or 8 bits.

Shapes: M tokens of all rows (B rows of L), K and K2 input channels, N output channels.
"""

from engine.kernels.adaln_kernels import modulation
from engine.kernels.backend import jit, tl

E4M3_MAX = tl.constexpr(448.0)  # the largest float8_e4m3fn
SQRT_2_OVER_PI, GELU_CUBIC, SQRT_HALF = (tl.constexpr(x) for x in (0.7978845608028654, 0.044715, 0.7071067811865476))


@jit
def _block(
    m,  # int, tokens
    N: tl.constexpr,  # output channels
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program's (block of tokens, block of channels): programs that run together share GROUP blocks of tokens."""
    blocks_n = tl.cdiv(N, BN)
    group, within = tl.program_id(0) // (GROUP * blocks_n), tl.program_id(0) % (GROUP * blocks_n)
    size = min(tl.cdiv(m, BM) - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@jit
def _gelu(x, EXACT: tl.constexpr):
    """x·Φ(x), float32, or its tanh approximation."""
    if EXACT:
        return 0.5 * x * (1 + tl.erf(x * SQRT_HALF))
    u = SQRT_2_OVER_PI * (x + GELU_CUBIC * x * x * x)
    return x / (1 + tl.exp(tl.minimum(-2 * u, 80.0)))  # 0.5·(1 + tanh u) = 1/(1 + exp(−2u)), without overflow


@jit
def _scale(
    x,  # [BM] pointers, to each token's first channel
    real,  # [BM] bool
    K: tl.constexpr,
    BK: tl.constexpr,
):
    """max |x| / 448 of each token, float32 [BM]: what it is divided by before rounding to 8 bits."""
    largest = tl.full(x.shape, 1e-12, tl.float32)
    for k in range(0, K, BK):
        channel = k + tl.arange(0, BK)
        part = tl.load(x[:, None] + channel[None, :], mask=real[:, None] & (channel < K)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(part.to(tl.float32)), 1))
    return largest / E4M3_MAX


@jit
def _accumulate(
    acc,  # [BM, BN] float32
    x,  # [BM] pointers, to each token's first channel
    W,  # [N, K + K2], this input's first column
    scale,  # [BM] float32, read with FP8
    real,  # [BM] bool
    column,  # [BN] int32
    stride_w,  # int, between rows of W
    K: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
    FP8: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products
):
    """acc + x·Wᵀ"""
    for k in range(0, K, BK):
        channel = k + tl.arange(0, BK)
        if K % BK:
            inside = channel < K
            a = tl.load(x[:, None] + channel[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            w = W + column[None, :] * stride_w + channel[:, None]
            w = tl.load(w, mask=(column < N)[None, :] & inside[:, None], other=0.0)  # [BK, BN]
        else:
            a = tl.load(x[:, None] + channel[None, :], mask=real[:, None], other=0.0)  # [BM, BK]
            w = tl.load(W + column[None, :] * stride_w + channel[:, None], mask=(column < N)[None, :], other=0.0)
        if FP8:
            a = (a.to(tl.float32) / scale[:, None]).to(tl.float8e4nv, fp_downcast_rounding="rtne")
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    return acc


@jit
def linear_forward(
    X,  # [B, L, K] any float dtype, channels contiguous
    SECOND,  # [B, L, K2] like X, or None
    W,  # [N, K + K2] like X, or float8_e4m3fn, channels contiguous
    SCALES,  # [N] float32 of an 8-bit W, or None
    BIAS,  # [N] any float dtype, or None
    STREAM,  # [B, L, N] like X, read with a gate
    TABLE,  # [T, K·D] any float dtype, read with a gate
    INDEX,  # [B, L] int32, read with a gate
    VECTOR,  # [K·D] any float dtype, read with a gate
    OUT,  # [B, L, N] like X, contiguous, written
    m,  # int, M = B·L
    stride_xb,  # int, between rows of X
    stride_xl,  # int, between tokens of X
    stride_sb,  # int, between rows of SECOND
    stride_sl,  # int, between tokens of SECOND
    stride_w,  # int, between rows of W
    stride_rb,  # int, between rows of STREAM
    stride_rl,  # int, between tokens of STREAM
    stride_ib,  # int, between rows of INDEX
    stride_table,  # int, between rows of TABLE
    L: tl.constexpr,  # tokens of a row
    K: tl.constexpr,
    K2: tl.constexpr,  # 0 without a second input, and in 8 bits
    N: tl.constexpr,
    GELU: tl.constexpr,  # "none", "tanh" or "erf"
    GATE: tl.constexpr,  # chunk, or NONE: no gated residual
    FP8: tl.constexpr,
    BM: tl.constexpr,  # tokens of a program
    BN: tl.constexpr,  # output channels of a program
    BK: tl.constexpr,  # input channels of an iteration
    GROUP: tl.constexpr,  # see `_block`
    PRECISION: tl.constexpr,  # of float32 products
):
    """OUT = epilogue([X, SECOND]·Wᵀ + BIAS) of BM tokens and BN channels; the epilogue: GELU or gated residual."""
    block_m, block_n = _block(m, N, BM, BN, GROUP)
    token, column = block_m * BM + tl.arange(0, BM), block_n * BN + tl.arange(0, BN)
    real = token < m
    b, position = (token // L).to(tl.int64), token % L

    x = X + b * stride_xb + position * stride_xl  # [BM]
    scale = tl.full([BM], 1.0, tl.float32)
    if FP8:
        scale = _scale(x, real, K, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    acc = _accumulate(acc, x, W, scale, real, column, stride_w, K, N, BK, FP8, PRECISION)
    if K2 > 0:
        second = SECOND + b * stride_sb + position * stride_sl
        acc = _accumulate(acc, second, W + K, scale, real, column, stride_w, K2, N, BK, FP8, PRECISION)

    if FP8:
        acc *= scale[:, None] * tl.load(SCALES + column, mask=column < N, other=0.0)[None, :]
    if BIAS is not None:
        acc += tl.load(BIAS + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    written = real[:, None] & (column < N)[None, :]
    if GELU != "none":
        acc = _gelu(acc, GELU == "erf")
    if GATE >= 0:
        row = tl.load(INDEX + b * stride_ib + position, mask=real, other=0)
        gate = modulation(TABLE, VECTOR, row, column, written, GATE, stride_table, N)
        stream = STREAM + (b * stride_rb + position * stride_rl)[:, None] + column[None, :]
        acc = tl.load(stream, mask=written, other=0.0).to(tl.float32) + gate * acc
    out = OUT + token[:, None].to(tl.int64) * N + column[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=written)
