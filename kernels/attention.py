"""Non-causal attention from packed QKV.

    out = softmax(Q·Kᵀ / √d)·V        for each row and head

Shapes: qkv [B, L, 3, H, d] (any strides), out [B, L, H·d]. B rows, L tokens, H heads of d channels.
Dtypes: float32, bfloat16 or float16 in and out; the softmax is accumulated in float32.
Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(qkv: Tensor) -> Tensor:
    """Attention over the tokens of each row, qkv [B, L, 3, H, d] → [B, L, H·d] in qkv's dtype."""
    b, n, three, h, d = qkv.shape
    assert three == 3, f"qkv is [B, L, 3, H, d], not {tuple(qkv.shape)}"
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 × [B, H, L, d]
    if qkv.is_cpu and torch.is_grad_enabled() and qkv.requires_grad:
        # On CPUs the backward of the fused attention takes 3-5 times as long as that of its two products.
        weights = torch.softmax((q @ k.transpose(-1, -2)).float() * d**-0.5, dim=-1)  # [B, H, L, L]
        out = weights.to(v.dtype) @ v  # [B, H, L, d]
    else:
        out = F.scaled_dot_product_attention(q, k, v)  # [B, H, L, d]
    return out.transpose(1, 2).reshape(b, n, h * d)  # [B, L, H·d]


def cost(rows: int, tokens: int, heads: int, head_dim: int, itemsize: int) -> tuple[int, int]:
    """(FLOPs, bytes moved at least) of one forward: two products per pair of tokens; QKV read, output written."""
    flops = 4 * rows * heads * tokens * tokens * head_dim
    return flops, 4 * rows * tokens * heads * head_dim * itemsize
