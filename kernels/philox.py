"""The sampler's random numbers: counter-based, so that a number depends on its sample, element, step and purpose only.

    bits  = Philox-4x32-10(counter = (element, draw, stream, 0), key = seed)
    u_i   = (⌊bits_i / 2⁸⌋ + ½)·2⁻²⁴ ∈ (0, 1]                                i = 0, 1
    value = √(−2·ln u_0)·cos(2π·u_1) and √(−2·ln u_0)·sin(2π·u_1)

The PyTorch reference and the Triton kernels draw the same bits. |value| ≤ 5.9, and the logarithm is finite.
Sources: Salmon et al. 2011, figure 4 (Philox); Box and Muller 1958.
"""

import math

import torch
from torch import Tensor

from engine.kernels.backend import jit, tl

# Third word of the counter. Extra pass k draws from DROP_STREAM + k, so adding passes changes no other draw.
STATE_STREAM = 0  # draw 0: initial state and ξ of step 0; draw n + 1: z of step n and ξ of step n + 1
DROP_STREAM = 1

_WORD = 0xFFFFFFFF


def philox_4x32(counter: tuple, key: tuple, rounds: int = 10) -> tuple:
    """4 counter words and 2 key words to 4 random words.

    Words are int64 tensors (of any shapes that broadcast) or ints, holding uint32 values.
    A 32×32-bit product may wrap around in int64; its 64 bits are right all the same.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        # c1 and c3 keep their high words: they only go into exclusive ors, whose results are cut to 32 bits.
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0) & _WORD, product1
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & _WORD, product0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def normals(seeds: Tensor, draw: Tensor, stream: int, size: int) -> tuple[Tensor, Tensor]:
    """Two independent N(0, 1) values for each (seed, element, draw, stream): float32 [B, size] each.

    `seeds` and `draw` are [B] int64.
    """
    element = torch.arange(size, device=seeds.device)  # [N]
    key = (seeds & _WORD)[:, None], ((seeds >> 32) & _WORD)[:, None]  # [B, 1]
    bits0, bits1, _, _ = philox_4x32((element, draw[:, None], stream, 0), key)  # [B, N]
    radius = torch.sqrt(-2.0 * torch.log(_uniform(bits0)))
    angle = 2.0 * math.pi * _uniform(bits1)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _uniform(bits: Tensor) -> Tensor:
    return ((bits >> 8).float() + 0.5) * 2.0**-24


@jit
def sample_normals(
    seed,  # int64
    element,  # [BLOCK] int32
    draw,  # int32
    stream,  # int
):
    """`normals` of one sample in a Triton kernel: two float32 values for each element."""
    bits0, bits1, _, _ = tl.philox(seed, element, draw, stream, 0)
    u0 = ((bits0 >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2⁻²⁴
    u1 = ((bits1 >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    radius, angle = tl.sqrt(-2.0 * tl.log(u0)), 6.283185307179586 * u1
    return radius * tl.cos(angle), radius * tl.sin(angle)
