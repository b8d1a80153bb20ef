"""What all networks are made of: the transformer block, the table of times, the U-ViT stack with step caching.

Shapes: R rows, L tokens, D width, H heads, d channels of a head, T times.
Dtypes: a block computes in its weights' dtype, adaLN's norms and modulations in float32.
Sources: U-ViT, Bao et al. 2022 (arXiv 2209.12152); adaLN-single, Chen et al. 2023 (arXiv 2310.00426, section 2.3);
step caching: DeepCache, Ma et al. 2023 (arXiv 2312.00858).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.config import ModelConfig
from engine.kernels.adaln import gated_residual, gated_residual_modulate, gathered, layer_norm_modulate
from engine.kernels.attention import attention
from engine.kernels.linear import Weight8, linear, linear_gelu, linear_pair, linear_residual, quantize
from engine.kernels.timestep import sinusoid, timestep_table

FREQUENCIES = 256  # channels of the sinusoidal time embedding
# The chunks of a modulation [6·D].
SHIFT_ATTENTION, SCALE_ATTENTION, GATE_ATTENTION, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)
SCALES = slice(SCALE_ATTENTION, None, SCALE_MLP - SCALE_ATTENTION)


class Block(nn.Module):
    """Attention and MLP around residuals; with `skip`, Linear(2D → D) first joins a long skip.

    norm
        "adaln"  before each sublayer, with shift, scale and gate from each token's row of the table of times
        "pre"    before each sublayer, affine (U-ViT); time is a token among the others, table and index are not read
        "post"   after each sublayer and after the skip, affine (UniDiffuser's released model); otherwise as "pre"
    exact_gelu   the GELU with the error function, as in published U-ViTs, in place of its tanh approximation
    """

    attention = "auto"  # backend, see `engine.kernels.backend`; may be set on each block
    # Computes the forward again in the backward pass, which saves memory. diffusers' models set both as well.
    gradient_checkpointing = False
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))

    def __init__(self, dim: int, head_dim: int, mlp_ratio: int, skip: bool, norm: str, exact_gelu: bool = False):
        super().__init__()
        adaln = norm == "adaln"
        self.heads, self.norm, self.gelu = dim // head_dim, norm, "none" if exact_gelu else "tanh"
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.skip_norm = nn.LayerNorm(dim) if skip and norm == "post" else None
        self.modulation = nn.Parameter(torch.zeros(6 * dim)) if adaln else None  # added to the row of the table
        self.norm1 = None if adaln else nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = None if adaln else nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, mlp_ratio * dim)
        self.fc2 = nn.Linear(mlp_ratio * dim, dim)

    @classmethod
    def from_config(cls, config: ModelConfig, skip: bool) -> "Block":
        """The block that a network of this config repeats."""
        uvit = config.uvit is not None
        norm = "adaln" if config.time_conditioning == "adaln" else config.uvit.norm if uvit else "pre"
        return cls(config.dim, config.head_dim, config.mlp_ratio, skip, norm, exact_gelu=uvit)

    def forward(self, x: Tensor, skip: Tensor | None, table: Tensor, index: Tensor) -> Tensor:
        """x [R, L, D], skip [R, L, D] or None, table [T, 6·D] or [T, D], index [R, L] int32 → [R, L, D]."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._compute, x, skip, table, index)  # [R, L, D]
        return self._compute(x, skip, table, index)  # [R, L, D]

    def _compute(self, x: Tensor, skip: Tensor | None, table: Tensor, index: Tensor) -> Tensor:
        if self.skip is not None:
            x = self._join(x, skip)  # [R, L, D]
        if self.norm == "adaln":
            time = gathered(x, table, index, self.modulation, SCALES)
            h = layer_norm_modulate(x, *time, SHIFT_ATTENTION, SCALE_ATTENTION)  # [R, L, D]
            h = self._attend(h)  # [R, L, D]
            x, h = gated_residual_modulate(x, h, *time, GATE_ATTENTION, SHIFT_MLP, SCALE_MLP)  # 2 × [R, L, D]
            h = self._hidden(h)  # [R, L, 4·D]
            if may_fuse(self.fc2):
                return linear_residual(x, h, self.fc2.weight, self.fc2.bias, *time, GATE_MLP)  # [R, L, D]
            return gated_residual(x, self.fc2(h), *time, GATE_MLP)  # [R, L, D]
        if self.norm == "pre":
            x = x + self._attend(self.norm1(x))  # [R, L, D]
            return x + self.fc2(self._hidden(self.norm2(x)))  # [R, L, D]
        if self.skip_norm is not None:
            x = self.skip_norm(x)  # [R, L, D]
        x = self.norm1(x + self._attend(x))  # [R, L, D]
        return self.norm2(x + self.fc2(self._hidden(x)))  # [R, L, D]

    def _join(self, x: Tensor, skip: Tensor) -> Tensor:
        if may_fuse(self.skip):
            return linear_pair(x, skip, self.skip.weight, self.skip.bias)  # [R, L, D]
        return self.skip(torch.cat([x, skip], dim=-1))  # [R, L, D]

    def _attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [R, L, 3, H, d]
        return self.proj(attention(qkv, self.attention))  # [R, L, D]

    def _hidden(self, x: Tensor) -> Tensor:
        if may_fuse(self.fc1):
            return linear_gelu(x, self.fc1.weight, self.fc1.bias, self.gelu)  # [R, L, 4·D]
        return F.gelu(self.fc1(x), approximate=self.gelu)  # [R, L, 4·D]


class Linear8(nn.Module):
    """A linear layer whose weight is kept in 8 bits, for inference: see `engine.kernels.linear`."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = quantize(layer.weight.detach())
        self.register_buffer("values", weight.values)  # [out, in] float8_e4m3fn
        self.register_buffer("scales", weight.scales)  # [out] float32
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    @property
    def weight(self) -> Weight8:
        return Weight8(self.values, self.scales)

    def forward(self, x: Tensor) -> Tensor:  # [R, L, in] → [R, L, out]
        return linear(x, self.weight, self.bias)


def quantize_blocks(blocks: Iterable[Block]) -> None:
    """Keeps the weights of the four large products of each block in 8 bits, in place. For inference only."""
    for block in blocks:
        for name in ("qkv", "proj", "fc1", "fc2"):
            setattr(block, name, Linear8(getattr(block, name)))


def may_fuse(layer: nn.Module) -> bool:
    """Whether a layer's product can be joined with what follows it.

    Not with gradients, since that has no backward, nor where calling the layer does more than the product: an adapter
    (LoRA) around it, or a hook, such as those with which diffusers moves or casts its weights at each call.
    """
    hooked = layer._forward_pre_hooks or layer._forward_hooks or "forward" in layer.__dict__
    return not torch.is_grad_enabled() and type(layer) in (nn.Linear, Linear8) and not hooked


class TimeTable(nn.Module):
    """Times [T] → one row per time: adaLN modulations [T, 6·D], or time tokens [T, D] (`time_conditioning="token"`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dim, self.adaln = config.dim, config.time_conditioning == "adaln"
        if self.adaln:
            self.hidden = nn.Linear(FREQUENCIES, config.dim)
            self.embed = nn.Linear(config.dim, config.dim)
            self.project = nn.Linear(config.dim, 6 * config.dim)

    def forward(self, times: Tensor) -> Tensor:
        if not self.adaln:
            return sinusoid(times, self.dim)  # [T, D] float32; U-ViT's time token has no weights of its own
        layers = ((layer.weight, layer.bias) for layer in (self.hidden, self.embed, self.project))
        return timestep_table(times, *layers)  # [T, 6·D] in the weights' dtype


class InnerCache(NamedTuple):
    """The last result of a stack's inner blocks, all but its outermost pair (step caching).

    The outermost pair, the modalities' own blocks and the long skips between them run at every step, so what changes
    fast from step to step is always computed.
    """

    output: Tensor  # [R, L, D] in the model's dtype, L with time tokens; updated in place where the inner blocks run
    refresh: Tensor | None  # [R] bool, the rows that are updated; None: none, and the inner blocks do not run


def run_blocks(
    x: Tensor, ins: Iterable[Block], middle: Iterable[Block], outs: Iterable[Block], table: Tensor, index: Tensor
) -> Tensor:
    """U-ViT's stack: in-blocks, middle blocks, out-blocks, with a long skip between mirrored ones; [R, L, D] → same."""
    skips = []
    for block in ins:
        x = block(x, None, table, index)  # [R, L, D]
        skips.append(x)
    for block in middle:
        x = block(x, None, table, index)  # [R, L, D]
    for block in outs:
        x = block(x, skips.pop(), table, index)  # [R, L, D]
    return x


def run_stack(
    x: Tensor,  # [R, L, D]
    ins: Iterable[Block],
    middle: Iterable[Block],
    outs: Iterable[Block],
    table: Tensor,
    index: Tensor,
    inner: InnerCache | None = None,
) -> Tensor:  # [R, L, D]
    """`run_blocks` with step caching: given `inner`, the inner blocks run for its rows to refresh only.

    With `inner` there is at least one in-block, and the outermost pair always runs.
    """
    if inner is None:
        return run_blocks(x, ins, middle, outs, table, index)  # [R, L, D]
    (first, *ins), (*outs, last) = ins, outs
    skip = first(x, None, table, index)  # [R, L, D]
    if inner.refresh is not None:
        x = run_blocks(skip, ins, middle, outs, table, index)  # [R, L, D]
        inner.output.copy_(torch.where(inner.refresh[:, None, None], x, inner.output))
    return last(inner.output, skip, table, index)  # [R, L, D]


def one_by_one(branches: Sequence[Callable]) -> list:
    """Results of calls that need nothing of each other; a network's `run_branches` may also run them at once."""
    return [branch() for branch in branches]


def initialise_linear(network: nn.Module) -> None:
    """U-ViT's initialisation of all linear layers: weights from a truncated normal, σ = 0.02, biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
