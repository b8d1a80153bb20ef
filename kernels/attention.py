"""Non-causal attention from packed QKV.

    out = softmax(Q·Kᵀ / √d)·V        for each row and head

The Triton kernels never hold the L×L weights (FlashAttention-2, Dao 2023, arXiv 2307.08691). A program owns a block of
queries and walks over the keys with a running maximum m and sum l; the backward recomputes the weights
P = exp(S − lse) and, with δ = Σ_d dO·O, takes dV = Pᵀ·dO, dS = P·(dO·Vᵀ − δ), dQ = dS·K/√d, dK = dSᵀ·Q/√d. Keys and
queries each have a program that adds up its own gradient, so there are no atomics and results repeat bit for bit.

Shapes: qkv [B, L, 3, H, d] (any strides), out [B, L, H·d]. B rows, L tokens, H heads of d channels.
Dtypes: float32, bfloat16 or float16 in and out; products and softmax are accumulated in float32.
Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.kernels.backend import COMPILER_OPTIONS, choose, jit, tl, triton

HEAD_DIMS = (32, 64, 128)  # that the Triton kernels take
MAX_TOKENS = 1024
UNSUPPORTED = f"takes at most {MAX_TOKENS} tokens, and heads of {', '.join(map(str, HEAD_DIMS))} channels"
LOG2_E = 1.4426950408889634  # exp(x) = exp2(x·log2 e): the hardware has exp2
PINNED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


# ---------------------------------------------------------------------------------------------- reference


def sdpa(qkv: Tensor, backend: str = "sdpa") -> Tensor:
    """PyTorch's attention, of its own choice or pinned to cuDNN's or Flash's."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 × [B, H, L, d]
    if backend in PINNED:
        with sdpa_kernel(PINNED[backend]):
            out = F.scaled_dot_product_attention(q, k, v)  # [B, H, L, d]
    elif qkv.is_cpu and torch.is_grad_enabled() and qkv.requires_grad:
        # On CPUs the backward of the fused attention takes 3-5 times as long as that of its two products.
        weights = torch.softmax((q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5, dim=-1)  # [B, H, L, L]
        out = weights.to(v.dtype) @ v  # [B, H, L, d]
    else:
        out = F.scaled_dot_product_attention(q, k, v)  # [B, H, L, d]
    return out.transpose(1, 2).flatten(2)  # [B, L, H·d]


def xformers(qkv: Tensor) -> Tensor:
    """xformers' memory-efficient attention; imported here because that takes seconds."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*qkv.unbind(2)).flatten(2)  # [B, L, H·d]


# ------------------------------------------------------------------------------------------------- kernels


@jit
def _keys(
    q,  # [OWN, D] any float dtype
    K,  # [L, D] any float dtype
    V,  # [L, D] any float dtype
    m,  # [OWN] float32
    total,  # [OWN] float32
    acc,  # [OWN, D] float32
    n,  # int, the block's first key
    stride_l,  # int, between tokens of K and V
    scale,  # float, log2 e / √D
    L: tl.constexpr,  # tokens
    D: tl.constexpr,  # channels of a head
    WALK: tl.constexpr,  # keys of a block
    TAIL: tl.constexpr,  # whether some of its keys may be past the end
    PRECISION: tl.constexpr,  # of float32 products
):
    """One block of WALK keys: updates the maximum m and sum `total` [OWN] and the output acc [OWN, D] of queries q."""
    key, d = n + tl.arange(0, WALK), tl.arange(0, D)
    at = key[:, None] * stride_l + d[None, :]  # [WALK, D]
    if TAIL:
        k = tl.load(K + at, mask=key[:, None] < L, other=0.0)
        v = tl.load(V + at, mask=key[:, None] < L, other=0.0)
    else:
        k, v = tl.load(K + at), tl.load(V + at)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [OWN, WALK], in units of log 2
    if TAIL:
        s = tl.where(key[None, :] < L, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    p, decay = tl.exp2(s - m_new[:, None]), tl.exp2(m - m_new)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return m_new, total * decay + tl.sum(p, 1), acc


@jit
def _attention_forward(
    QKV,  # [B, L, 3, H, D] any float dtype, channels contiguous
    OUT,  # [B, L, H·D] like QKV, contiguous, written
    LSE,  # [B, H, L] float32, written
    scale,  # float, log2 e / √D
    stride_b,  # int, between rows of QKV
    stride_l,  # int, between tokens
    stride_i,  # int, between Q, K and V
    stride_h,  # int, between heads
    H: tl.constexpr,  # heads
    L: tl.constexpr,  # tokens
    D: tl.constexpr,  # channels of a head
    OWN: tl.constexpr,  # queries of a program
    WALK: tl.constexpr,  # keys of an iteration
    PRECISION: tl.constexpr,  # of float32 products
):
    """out and lse = log2 Σ exp2(s) of OWN queries of one row and head."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    query, d = tl.program_id(0) * OWN + tl.arange(0, OWN), tl.arange(0, D)
    real = query < L
    Q = QKV + b.to(tl.int64) * stride_b + h * stride_h
    K, V = Q + stride_i, Q + 2 * stride_i
    q = tl.load(Q + query[:, None] * stride_l + d[None, :], mask=real[:, None], other=0.0)  # [OWN, D]

    m = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    acc = tl.zeros([OWN, D], tl.float32)
    # The tail is a block of its own, except where a second copy of the block would spill registers.
    ROOM: tl.constexpr = PRECISION != "ieee" and D < 128
    WHOLE: tl.constexpr = L // WALK * WALK if ROOM or L % WALK == 0 else 0
    for n in range(0, WHOLE, WALK):
        m, total, acc = _keys(q, K, V, m, total, acc, n, stride_l, scale, L, D, WALK, False, PRECISION)
    for n in range(WHOLE, L, WALK):
        m, total, acc = _keys(q, K, V, m, total, acc, n, stride_l, scale, L, D, WALK, True, PRECISION)

    out = OUT + ((b.to(tl.int64) * L + query[:, None]) * H + h) * D + d[None, :]
    tl.store(out, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=real[:, None])
    tl.store(LSE + tl.program_id(1) * L + query, m + tl.log2(total), mask=real)


@jit
def _attention_backward_kv(
    QKV,  # [B, L, 3, H, D] any float dtype, channels contiguous
    DOUT,  # [B, L, H·D] like QKV, contiguous
    LSE,  # [B, H, L] float32
    DELTA,  # [B, H, L] float32
    DQKV,  # [B, L, 3, H, D] like QKV, contiguous, K and V written
    scale,  # float, 1 / √D
    scale_log2,  # float, log2 e / √D
    stride_b,  # int, between rows of QKV
    stride_l,  # int, between tokens
    stride_i,  # int, between Q, K and V
    stride_h,  # int, between heads
    H: tl.constexpr,  # heads
    L: tl.constexpr,  # tokens
    D: tl.constexpr,  # channels of a head
    OWN: tl.constexpr,  # keys of a program
    WALK: tl.constexpr,  # queries of an iteration
    PRECISION: tl.constexpr,  # of float32 products
):
    """dK and dV of OWN keys of one row and head: walks over the queries in blocks of WALK."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    key, d = tl.program_id(0) * OWN + tl.arange(0, OWN), tl.arange(0, D)
    real = key[:, None] < L
    Q = QKV + b.to(tl.int64) * stride_b + h * stride_h
    at = key[:, None] * stride_l + d[None, :]  # [OWN, D]
    k = tl.load(Q + stride_i + at, mask=real, other=0.0)
    v = tl.load(Q + 2 * stride_i + at, mask=real, other=0.0)
    lse, delta = LSE + tl.program_id(1) * L, DELTA + tl.program_id(1) * L
    DO = DOUT + b.to(tl.int64) * L * H * D + h * D

    dk, dv = tl.zeros([OWN, D], tl.float32), tl.zeros([OWN, D], tl.float32)
    for m in range(0, L, WALK):
        query = m + tl.arange(0, WALK)
        if L % WALK:
            q = tl.load(Q + query[:, None] * stride_l + d[None, :], mask=query[:, None] < L, other=0.0)  # [WALK, D]
            do = tl.load(DO + query[:, None] * (H * D) + d[None, :], mask=query[:, None] < L, other=0.0)
            # A query past the end has weight exp2(−∞) = 0 everywhere.
            lse_m = tl.load(lse + query, mask=query < L, other=float("inf"))
            delta_m = tl.load(delta + query, mask=query < L, other=0.0)
        else:
            q = tl.load(Q + query[:, None] * stride_l + d[None, :])
            do = tl.load(DO + query[:, None] * (H * D) + d[None, :])
            lse_m, delta_m = tl.load(lse + query), tl.load(delta + query)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [OWN, WALK]
        p = tl.exp2(s - lse_m[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta_m[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    grad = DQKV + ((b.to(tl.int64) * L + key[:, None]) * (3 * H) + h) * D + d[None, :]
    tl.store(grad + H * D, (dk * scale).to(DQKV.dtype.element_ty), mask=real)
    tl.store(grad + 2 * H * D, dv.to(DQKV.dtype.element_ty), mask=real)


@jit
def _attention_backward_q(
    QKV,  # [B, L, 3, H, D] any float dtype, channels contiguous
    DOUT,  # [B, L, H·D] like QKV, contiguous
    LSE,  # [B, H, L] float32
    DELTA,  # [B, H, L] float32
    DQKV,  # [B, L, 3, H, D] like QKV, contiguous, Q written
    scale,  # float, 1 / √D
    scale_log2,  # float, log2 e / √D
    stride_b,  # int, between rows of QKV
    stride_l,  # int, between tokens
    stride_i,  # int, between Q, K and V
    stride_h,  # int, between heads
    H: tl.constexpr,  # heads
    L: tl.constexpr,  # tokens
    D: tl.constexpr,  # channels of a head
    OWN: tl.constexpr,  # queries of a program
    WALK: tl.constexpr,  # keys of an iteration
    PRECISION: tl.constexpr,  # of float32 products
):
    """dQ of OWN queries of one row and head: walks over the keys in blocks of WALK."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    query, d = tl.program_id(0) * OWN + tl.arange(0, OWN), tl.arange(0, D)
    real = query[:, None] < L
    Q = QKV + b.to(tl.int64) * stride_b + h * stride_h
    q = tl.load(Q + query[:, None] * stride_l + d[None, :], mask=real, other=0.0)  # [OWN, D]
    do = DOUT + ((b.to(tl.int64) * L + query[:, None]) * H + h) * D + d[None, :]
    do = tl.load(do, mask=real, other=0.0)
    lse = tl.load(LSE + tl.program_id(1) * L + query, mask=query < L, other=0.0)
    delta = tl.load(DELTA + tl.program_id(1) * L + query, mask=query < L, other=0.0)

    dq = tl.zeros([OWN, D], tl.float32)
    for n in range(0, L, WALK):
        key = n + tl.arange(0, WALK)
        at = key[:, None] * stride_l + d[None, :]  # [WALK, D]
        if L % WALK:
            k = tl.load(Q + stride_i + at, mask=key[:, None] < L, other=0.0)
            v = tl.load(Q + 2 * stride_i + at, mask=key[:, None] < L, other=0.0)
        else:
            k, v = tl.load(Q + stride_i + at), tl.load(Q + 2 * stride_i + at)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [OWN, WALK]
        if L % WALK:
            s = tl.where(key[None, :] < L, s, float("-inf"))
        p = tl.exp2(s - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    grad = DQKV + ((b.to(tl.int64) * L + query[:, None]) * (3 * H) + h) * D + d[None, :]
    tl.store(grad, (dq * scale).to(DQKV.dtype.element_ty), mask=real)


# ------------------------------------------------------------------------------------------------ launchers


def _blocks(tokens: int, head_dim: int, dtype: torch.dtype, backward: bool) -> dict:
    """Queries (or keys) that a program owns, keys (or queries) it walks over at once, and the pipeline.

    64 owned rows fill one warpgroup of tensor cores and divide L = 320 and 256. The backward holds two more tiles, so
    it walks in shorter blocks, and spreads 128 channels over twice the threads; float32 products run without tensor
    cores and want small blocks throughout.
    """
    fits = max(16, triton.next_power_of_2(tokens))
    if dtype == torch.float32:
        own, walk, stages, precision = 16, 16, 1, "ieee"
    else:
        own, walk, stages, precision = 64, 32 if backward else 64, 2, "tf32"  # 16-bit products ignore the precision
    sizes = {"OWN": min(own, fits), "WALK": min(walk, fits)}
    warps = 8 if backward and head_dim == 128 and dtype != torch.float32 else 4
    return {**sizes, "PRECISION": precision, "num_warps": warps, "num_stages": stages, **COMPILER_OPTIONS}


def _shape(qkv: Tensor) -> tuple[tuple[int, ...], dict]:
    """(strides of rows, tokens, Q/K/V, heads; constants) of a packed QKV whose channels are contiguous."""
    _, tokens, _, heads, head_dim = qkv.shape
    return qkv.stride()[:4], {"H": heads, "L": tokens, "D": head_dim}


@torch.library.custom_op("psunet::attention", mutates_args=())
def _attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, L, H·d], lse [B, H, L] float32 in units of log 2)."""
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    b, n, _, h, d = qkv.shape
    out, lse = qkv.new_empty(b, n, h * d), qkv.new_empty(b, h, n, dtype=torch.float32)
    strides, constants = _shape(qkv)
    blocks = _blocks(n, d, qkv.dtype, backward=False)
    grid = triton.cdiv(n, blocks["OWN"]), b * h
    _attention_forward[grid](qkv, out, lse, d**-0.5 * LOG2_E, *strides, **constants, **blocks)
    return out, lse


@_attention.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    b, n, _, h, d = qkv.shape
    return qkv.new_empty(b, n, h * d), qkv.new_empty(b, h, n, dtype=torch.float32)


@torch.library.custom_op("psunet::attention_backward", mutates_args=())
def _attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """dqkv [B, L, 3, H, d]."""
    qkv, dout = qkv if qkv.stride(-1) == 1 else qkv.contiguous(), dout.contiguous()
    b, n, _, h, d = qkv.shape
    delta = (dout.float() * out.float()).unflatten(-1, (h, d)).sum(-1).transpose(1, 2).contiguous()  # [B, H, L]
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    strides, constants = _shape(qkv)
    blocks = _blocks(n, d, qkv.dtype, backward=True)
    arguments = qkv, dout, lse, delta, dqkv, d**-0.5, d**-0.5 * LOG2_E, *strides
    grid = triton.cdiv(n, blocks["OWN"]), b * h
    _attention_backward_kv[grid](*arguments, **constants, **blocks)
    _attention_backward_q[grid](*arguments, **constants, **blocks)
    return dqkv


@_attention_backward.register_fake
def _(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], *output)


def _differentiate(ctx, dout: Tensor, _) -> Tensor:
    return _attention_backward(dout, *ctx.saved_tensors)


_attention.register_autograd(_differentiate, setup_context=_save)


# --------------------------------------------------------------------------------------------------- public


def attention(qkv: Tensor, backend: str = "auto") -> Tensor:
    """Attention over the tokens of each row, qkv [B, L, 3, H, d] → [B, L, H·d] in qkv's dtype.

    backend  "auto", or one of `engine.kernels.backend.BACKENDS`; BackendError if it cannot run here
    """
    rows, tokens, three, _, head_dim = qkv.shape
    assert three == 3, f"qkv is [B, L, 3, H, d], not {tuple(qkv.shape)}"
    fits = torch.compiler.is_exporting() or tokens <= MAX_TOKENS  # a package, for CPUs, takes any number
    unsupported = "" if head_dim in HEAD_DIMS and fits else UNSUPPORTED
    chosen = choose("attention", qkv, (rows, tokens, head_dim), backend, unsupported)
    if chosen == "triton":
        return _attention(qkv)[0]
    return xformers(qkv) if chosen == "xformers" else sdpa(qkv, chosen)


def cost(rows: int, tokens: int, heads: int, head_dim: int, itemsize: int) -> tuple[int, int]:
    """(FLOPs, bytes moved at least) of one forward: two products per pair of tokens; QKV read, output written."""
    flops = 4 * rows * heads * tokens * tokens * head_dim
    return flops, 4 * rows * tokens * heads * head_dim * itemsize


def example_inputs(
    rows: int = 2,
    tokens: int = 320,
    heads: int = 8,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random packed QKV [B, L, 3, H, d]."""
    return torch.randn(rows, tokens, 3, heads, head_dim, generator=generator).to(device, dtype)
