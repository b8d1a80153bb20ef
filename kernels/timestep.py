"""The timestep table: the modulations of every block for many times at once, out of the sampling loop.

    e(t)     = [cos(t·ω), sin(t·ω)],   ω_i = 10000^(−i / (F/2)),  i = 0 … F/2 − 1
    table(t) = W2·SiLU( W_e·SiLU(W1·e(t) + b1) + b_e ) + b2

that is a sinusoid of F channels, the two linear layers of the time MLP and the projection to 6·D of adaLN-single.

Shapes: times [T] (any real dtype), sinusoid [T, F], table [T, 6·D].
Dtypes: computed and returned in the weights' dtype, the sinusoid in float32 (bfloat16 cannot hold t·ω).
Source: Vaswani et al. 2017 (arXiv 1706.03762, section 3.5); Chen et al. 2023 (arXiv 2310.00426, section 2.3).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> Tensor:  # [T, 6·D]
    """The modulation table of adaLN-single for the given times."""
    h = sinusoid(times, hidden[0].shape[1]).to(hidden[0].dtype)  # [T, F]
    h = F.silu(F.linear(h, *hidden))  # [T, E]
    h = F.silu(F.linear(h, *embed))  # [T, D]
    return F.linear(h, *project)  # [T, 6·D]


def cost(times: int, frequencies: int, hidden: int, dim: int, chunks: int, itemsize: int) -> tuple[int, int]:
    """(FLOPs, bytes moved at least): three linear layers; weights read once, the table written once."""
    weights = frequencies * hidden + hidden * dim + dim * chunks * dim
    return 2 * times * weights, (weights + times * chunks * dim) * itemsize
