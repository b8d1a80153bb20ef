"""U-ViT (arXiv 2209.12152): one stack of transformer blocks over the tokens of all modalities, with long skips.

    time tokens ─┐
    image tokens ├─ in-blocks ── middle ── out-blocks ── norm ── a head per modality
    text tokens ─┘       └──────── skips ──────┘

U-ViT-multi has a time token per modality, so that their times are independent (UniDiffuser, arXiv 2303.06555); the
text-to-image U-ViT has one time token, and its text is a condition. `engine.checkpoint` reads published weights.
The interface is that of `engine.model.PSUNet`.

Shapes: R rows, L tokens, C channels, D width, N packed elements, T times, M time tokens, E extra tokens.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.codecs.image import patchify, unpatchify
from engine.config import ModelConfig
from engine.kernels.attention import attention
from engine.kernels.timestep import sinusoid
from engine.model import GATE_ATTENTION, GATE_MLP, SCALE_ATTENTION, SCALE_MLP, SHIFT_ATTENTION, SHIFT_MLP, PSUNet


class UViTBlock(nn.Module):
    """Attention and MLP (exact GELU), normalised before each (norm="pre") or after each and after the skip ("post")."""

    attention = "auto"  # backend, see `engine.kernels.backend`

    def __init__(self, config: ModelConfig, skip: bool):
        super().__init__()
        dim = config.dim
        self.heads = dim // config.head_dim
        self.post = config.uvit.norm == "post"
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.skip_norm = nn.LayerNorm(dim) if skip and self.post else None
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, config.mlp_ratio * dim)
        self.fc2 = nn.Linear(config.mlp_ratio * dim, dim)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))  # [R, L, D]
        if self.post:
            if self.skip_norm is not None:
                x = self.skip_norm(x)
            x = self.norm1(x + self._attend(x))  # [R, L, D]
            return self.norm2(x + self._mlp(x))  # [R, L, D]
        x = x + self._attend(self.norm1(x))  # [R, L, D]
        return x + self._mlp(self.norm2(x))  # [R, L, D]

    def _attend(self, x: Tensor) -> Tensor:
        return self.proj(attention(self.qkv(x).unflatten(-1, (3, self.heads, -1)), self.attention))  # [R, L, D]

    def _mlp(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # [R, L, D]


class UViT(nn.Module):
    """The denoiser. A modality that is only partly known is labelled with the latest time of its tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.uvit is not None, "a PS-U-Net's config"
        self.config, uvit, dim, half = config, config.uvit, config.dim, config.shared_depth // 2
        self.prefix = len(uvit.timed) + uvit.extra_tokens  # M + E
        self.embed = nn.ModuleDict({m.name: nn.Linear(m.channels, dim) for m in config.modalities})
        self.position = nn.Parameter(torch.zeros(self.prefix + config.tokens, dim))  # those of E are the tokens too
        self.in_blocks = nn.ModuleList(UViTBlock(config, skip=False) for _ in range(half))
        self.middle = UViTBlock(config, skip=False)
        self.out_blocks = nn.ModuleList(UViTBlock(config, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.ModuleDict({name: nn.Linear(dim, config.modality(name).channels) for name in uvit.predicted})
        self.conv = None
        if uvit.patch:
            channels = config.modality("image").channels // uvit.patch**2
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.initialise()

    def initialise(self) -> None:
        """U-ViT's truncated normals."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position, std=0.02)

    def blocks(self) -> Iterator[nn.Module]:
        """All transformer blocks, the repeated part that is worth compiling."""
        yield from (*self.in_blocks, self.middle, *self.out_blocks)

    def time_table(self, times: Tensor) -> Tensor:
        """Times [T] → time tokens float32 [T, D]; they have no weights of their own."""
        return sinusoid(times, self.config.dim)

    def forward(self, inputs: Tensor, table: Tensor, index: Tensor, outputs: Iterable[str] | None = None) -> Tensor:
        """Predicts the noise (or v) of every element of the predicted modalities; the rest of the result is zero.

        inputs   [R, N] packed state of all modalities
        table    [T, D] from `time_table` for ascending times
        index    [R, L] int32, each token's row of the table
        outputs  the modalities whose prediction is wanted, default all that the model predicts
        returns  [R, N] in inputs' dtype
        """
        config, dtype = self.config, self.position.dtype
        wanted = set(config.predicted if outputs is None else outputs)
        latest = [index[:, config.token_slices[name]].amax(1).long() for name in config.uvit.timed]  # M × [R]
        tokens = [table[torch.stack(latest, dim=1)].to(dtype)]  # [R, M, D]
        tokens.append(tokens[0].new_zeros(len(inputs), config.uvit.extra_tokens, config.dim))  # [R, E, D]
        for m in config.modalities:
            x = inputs[:, config.state_slices[m.name]].unflatten(1, (m.tokens, m.channels)).to(dtype)  # [R, L, C]
            tokens.append(self.embed[m.name](x))  # [R, L, D]

        x = torch.cat(tokens, dim=1) + self.position  # [R, M + E + ΣL, D]
        skips = []
        for block in self.in_blocks:
            x = block(x)  # [R, M + E + ΣL, D]
            skips.append(x)
        x = self.middle(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.norm(x)[:, self.prefix :]  # [R, ΣL, D]

        predictions = []
        for m in config.modalities:
            if m.name in wanted and m.name in self.head:
                y = self.head[m.name](x[:, config.token_slices[m.name]])  # [R, L, C]
                if m.name == "image" and self.conv is not None:
                    y = patchify(self.conv(unpatchify(y, config.uvit.patch)), config.uvit.patch)  # [R, L, C]
                predictions.append(y.flatten(1).to(inputs.dtype))  # [R, L·C]
            else:
                predictions.append(inputs.new_zeros(len(inputs), m.size))
        return torch.cat(predictions, dim=1)  # [R, N]


@torch.no_grad()
def initialise_from(model: PSUNet, source: UViT) -> list[str]:
    """Starts a PS-U-Net from a pre-norm U-ViT of the same width; returns the names of what was copied.

    Blocks are matched from the outside: the first in-blocks of the stack become each branch's in-blocks, those that
    follow the longest branch the shared ones, out-blocks mirrored; blocks left over stay as initialised. The U-ViT's
    affine norms become the blocks' own modulations, β the shift and γ − 1 the scale, and gates open fully. Embeddings,
    positions and heads are copied where a modality has the same tokens and channels.
    Raises ValueError if no block fits.
    """
    a, b = model.config, source.config
    if (a.dim, a.head_dim, a.mlp_ratio) != (b.dim, b.head_dim, b.mlp_ratio) or b.uvit.norm != "pre":
        raise ValueError(
            f"init: a {b.uvit.norm}-norm U-ViT of width {b.dim}, heads of {b.head_dim} and MLP ratio {b.mlp_ratio} "
            f"does not fit a PS-U-Net of {a.dim}, {a.head_dim} and {a.mlp_ratio}; use a pre-norm one of the same sizes"
        )
    copied = []
    for name, target, block in _matched_blocks(model, source):
        for layer in ("qkv", "proj", "fc1", "fc2", *(["skip"] if block.skip is not None else [])):
            getattr(target, layer).load_state_dict(getattr(block, layer).state_dict())
        if a.time == "token":
            target.norm1.load_state_dict(block.norm1.state_dict())
            target.norm2.load_state_dict(block.norm2.state_dict())
        else:
            m = target.modulation.unflatten(0, (6, a.dim))  # [6, D]
            m[SHIFT_ATTENTION], m[SCALE_ATTENTION], m[GATE_ATTENTION] = block.norm1.bias, block.norm1.weight - 1, 1.0
            m[SHIFT_MLP], m[SCALE_MLP], m[GATE_MLP] = block.norm2.bias, block.norm2.weight - 1, 1.0
        copied.append(name)
    positions = source.position[source.prefix :]  # [ΣL, D]
    for name, branch in model.branches.items():
        if name not in source.embed or source.embed[name].weight.shape != branch.embed.weight.shape:
            continue
        branch.embed.load_state_dict(source.embed[name].state_dict())
        copied.append(f"branches.{name}.embed")
        if b.modality(name).tokens == a.modality(name).tokens:
            branch.position[-a.modality(name).tokens :] = positions[b.token_slices[name]]
            copied.append(f"branches.{name}.position")
        if name in source.head:
            branch.head.load_state_dict(source.head[name].state_dict())
            copied.append(f"branches.{name}.head")
    return copied


def _matched_blocks(model: PSUNet, source: UViT) -> Iterator[tuple[str, nn.Module, UViTBlock]]:
    """(name in the PS-U-Net, its block, the U-ViT's block) of every pair that `initialise_from` copies."""
    into, out = list(source.in_blocks), list(reversed(source.out_blocks))  # both from the outside inwards
    longest = max(m.depth for m in model.config.modalities)
    sides = [(f"branches.{name}.", branch.in_blocks, branch.out_blocks, 0) for name, branch in model.branches.items()]
    for prefix, ins, outs, first in [*sides, ("shared_", model.shared_in, model.shared_out, longest)]:
        names = ("in", "out") if prefix == "shared_" else ("in_blocks", "out_blocks")
        for kind, targets, blocks in ((names[0], ins, into), (names[1], list(reversed(outs)), out)):
            for i, (target, block) in enumerate(zip(targets, blocks[first:], strict=False)):
                yield f"{prefix}{kind}.{i if targets is ins else len(outs) - 1 - i}", target, block
    for target in model.shared_middle:
        yield "shared_middle.0", target, source.middle
