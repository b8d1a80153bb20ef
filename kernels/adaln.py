"""Adaptive layer norm: normalisation, modulation and gated residuals, with the time a property of each token.

    μ, r = mean and 1/√(variance + ε) of x over its D channels
    m_k(token) = table[index(token)]_k + vector_k            k-th of the D-wide chunks (shift, scale, gate, …)

    layer_norm_modulate        h  = (x − μ)·r·(1 + m_scale) + m_shift
    gated_residual             x' = x + m_gate·y
    gated_residual_modulate    x' as above, h from x' as above; returns both

Shapes: x, y, h [B, L, D]; table [T, K·D], one row per distinct time; index [B, L] int32 rows of the table; vector
[K·D], the block's own addition. shift, scale and gate are chunk numbers in 0…K−1.
Dtypes: x's dtype in and out; statistics and modulations in float32.
Source: adaLN-Zero, Peebles and Xie 2022 (arXiv 2212.09748); adaLN-single, Chen et al. 2023 (arXiv 2310.00426,
section 2.3).
"""

import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def _chunk(table: Tensor, index: Tensor, vector: Tensor, k: int, dim: int) -> Tensor:
    """m_k of every token, float32 [B, L, D]."""
    columns = slice(k * dim, (k + 1) * dim)
    rows, addition = table[:, columns], vector[columns].float()
    # The sum is made where there is less of it: training has few times and many tokens, sampling a row for every time.
    if rows.shape[0] < index.numel():
        return F.embedding(index, rows.float() + addition)
    return F.embedding(index, rows).float() + addition


def layer_norm_modulate(
    x: Tensor, table: Tensor, index: Tensor, vector: Tensor, shift: int, scale: int
) -> Tensor:  # [B, L, D]
    """LayerNorm without affine parameters, then scale and shift by each token's time."""
    dim = x.shape[-1]
    normed = F.layer_norm(x.float(), (dim,), eps=EPS)
    m_shift, m_scale = _chunk(table, index, vector, shift, dim), _chunk(table, index, vector, scale, dim)
    return (normed * (1 + m_scale) + m_shift).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, table: Tensor, index: Tensor, vector: Tensor, gate: int) -> Tensor:
    """The residual stream x plus the gated output y of a sublayer, [B, L, D] in x's dtype."""
    return (x.float() + _chunk(table, index, vector, gate, x.shape[-1]) * y.float()).to(x.dtype)


def gated_residual_modulate(
    x: Tensor, y: Tensor, table: Tensor, index: Tensor, vector: Tensor, gate: int, shift: int, scale: int
) -> tuple[Tensor, Tensor]:  # 2 × [B, L, D]
    """(new residual stream, its normalised and modulated copy for the next sublayer)."""
    x = gated_residual(x, y, table, index, vector, gate)
    return x, layer_norm_modulate(x, table, index, vector, shift, scale)


def cost(rows: int, tokens: int, dim: int, itemsize: int, residual: bool) -> tuple[int, int]:
    """(FLOPs, bytes moved at least): about 8 a channel for LN + modulate, 2 more for the gated residual."""
    elements = rows * tokens * dim
    return elements * (10 if residual else 8), elements * itemsize * (4 if residual else 2)
