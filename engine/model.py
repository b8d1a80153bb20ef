"""PS-U-Net (arXiv 2311.16488): a branch of transformer blocks per modality around a shared U-ViT stack.

    image tokens ── in-blocks ─┐                        ┌─ out-blocks ── image prediction
                               ├─ shared U-ViT, skips ──┤
    text tokens  ── in-blocks ─┘                        └─ out-blocks ── text prediction

Every in-block's output skips to the mirrored out-block of its own branch. The model knows tokens and times
only: nothing of pictures, words, masks, noise or solvers.

Shapes: R rows, L tokens, C channels, D width, N packed elements, T times.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import Modality, ModelConfig
from engine.kernels.adaln import gated_residual, gated_residual_modulate, layer_norm_modulate
from engine.kernels.attention import attention
from engine.kernels.timestep import sinusoid, timestep_table

FREQUENCIES = 256  # channels of the sinusoidal time embedding
SHIFT_ATTENTION, SCALE_ATTENTION, GATE_ATTENTION, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)


class InnerCache(NamedTuple):
    """What the inner shared blocks gave when they last ran (step caching: DeepCache, Ma et al. 2023, arXiv 2312.00858).

    Inner are all but the outermost pair of the shared stack. That pair, the modalities' own blocks and every long skip
    between them always run, so what changes fast from step to step is always computed.
    """

    output: Tensor  # [R, L, D] in the model's dtype, L with time tokens; read, and written where the blocks run
    refresh: Tensor | None  # [R] bool, the rows for which they run; None: for none, and they do not run at all

    def through(self, blocks: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """blocks(x), or for the other rows what is kept: [R, L, D]."""
        if self.refresh is None:
            return self.output
        self.output.copy_(torch.where(self.refresh[:, None, None], blocks(x), self.output))
        return self.output


class TimeTable(nn.Module):
    """Times [T] → one row per time: adaLN modulations [T, 6·D], or time tokens [T, D] (`time="token"`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.adaln = config.time == "adaln"
        if self.adaln:
            self.hidden = nn.Linear(FREQUENCIES, config.dim)
            self.embed = nn.Linear(config.dim, config.dim)
            self.project = nn.Linear(config.dim, 6 * config.dim)
        else:
            self.dim = config.dim

    def forward(self, times: Tensor) -> Tensor:
        if not self.adaln:
            return sinusoid(times, self.dim)  # [T, D]; U-ViT's time token has no weights of its own
        layers = ((layer.weight, layer.bias) for layer in (self.hidden, self.embed, self.project))
        return timestep_table(times, *layers)  # [T, 6·D]


class AdaLNBlock(nn.Module):
    """Pre-norm attention and MLP whose shift, scale and gate follow each token's time; `skip` joins a long skip."""

    attention = "auto"  # backend, see `engine.kernels.backend`

    def __init__(self, config: ModelConfig, skip: bool):
        super().__init__()
        dim = config.dim
        self.heads = dim // config.head_dim
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.modulation = nn.Parameter(torch.zeros(6 * dim))  # added to the time's row; gates start at 0
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, config.mlp_ratio * dim)
        self.fc2 = nn.Linear(config.mlp_ratio * dim, dim)

    def forward(self, x: Tensor, skip: Tensor | None, table: Tensor, index: Tensor) -> Tensor:
        if self.skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))  # [R, L, D]
        time = (table, index, self.modulation)
        h = layer_norm_modulate(x, *time, SHIFT_ATTENTION, SCALE_ATTENTION)  # [R, L, D]
        h = self.proj(attention(self.qkv(h).unflatten(-1, (3, self.heads, -1)), self.attention))  # [R, L, D]
        x, h = gated_residual_modulate(x, h, *time, GATE_ATTENTION, SHIFT_MLP, SCALE_MLP)  # 2 × [R, L, D]
        h = self.fc2(F.gelu(self.fc1(h), approximate="tanh"))  # [R, L, D]
        return gated_residual(x, h, *time, GATE_MLP)  # [R, L, D]


class TokenBlock(nn.Module):
    """U-ViT's block: pre-norm attention and MLP with affine norms; the time is a token among the others."""

    attention = "auto"  # backend, see `engine.kernels.backend`

    def __init__(self, config: ModelConfig, skip: bool):
        super().__init__()
        dim = config.dim
        self.heads = dim // config.head_dim
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, config.mlp_ratio * dim)
        self.fc2 = nn.Linear(config.mlp_ratio * dim, dim)

    def forward(self, x: Tensor, skip: Tensor | None, table: Tensor, index: Tensor) -> Tensor:
        if self.skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))  # [R, L, D]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [R, L, 3, H, d]
        x = x + self.proj(attention(qkv, self.attention))  # [R, L, D]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))  # [R, L, D]


class Branch(nn.Module):
    """One modality's own part: embedding and in-blocks before the shared stack, out-blocks and head after it."""

    def __init__(self, config: ModelConfig, modality: Modality):
        super().__init__()
        dim, self.token_time = config.dim, config.time == "token"
        block = TokenBlock if self.token_time else AdaLNBlock
        self.embed = nn.Linear(modality.channels, dim)
        self.position = nn.Parameter(torch.zeros(modality.tokens + self.token_time, dim))
        self.in_blocks = nn.ModuleList(block(config, skip=False) for _ in range(modality.depth))
        self.out_blocks = nn.ModuleList(block(config, skip=True) for _ in range(modality.depth))
        if self.token_time:
            self.norm = nn.LayerNorm(dim)
        else:
            self.modulation = nn.Parameter(torch.zeros(6 * dim))
        self.head = nn.Linear(dim, modality.channels)

    def enter(self, x: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[R, L, C] → (tokens for the shared stack [R, L, D], the skips for `leave`)."""
        x = self.embed(x)  # [R, L, D]
        if self.token_time:
            x = torch.cat([table[index[:, :1].long()].to(x.dtype), x], dim=1)  # [R, 1+L, D]
        x = x + self.position  # [R, L, D]
        skips = []
        for block in self.in_blocks:
            x = block(x, None, table, index)  # [R, L, D]
            skips.append(x)
        return x, skips

    def leave(self, x: Tensor, skips: list[Tensor], table: Tensor, index: Tensor) -> Tensor:
        """[R, L, D] → prediction [R, L, C]."""
        for block, skip in zip(self.out_blocks, reversed(skips), strict=True):
            x = block(x, skip, table, index)  # [R, L, D]
        if self.token_time:
            return self.head(self.norm(x)[:, 1:])  # [R, L, C]
        return self.head(layer_norm_modulate(x, table, index, self.modulation, SHIFT_ATTENTION, SCALE_ATTENTION))


def one_by_one(calls: Sequence[Callable]) -> list:
    return [call() for call in calls]


class PSUNet(nn.Module):
    """The denoiser. `forward` takes packed inputs; `time_table` gives the rows that its time indices point into."""

    side_by_side = staticmethod(one_by_one)  # how the modalities' branches run; `engine.graphs` can do better

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        block = TokenBlock if config.time == "token" else AdaLNBlock
        half = config.shared_depth // 2
        self.time = TimeTable(config)
        self.branches = nn.ModuleDict({m.name: Branch(config, m) for m in config.modalities})
        self.shared_in = nn.ModuleList(block(config, skip=False) for _ in range(half))
        self.shared_middle = nn.ModuleList(block(config, skip=False) for _ in range(config.shared_depth % 2))
        self.shared_out = nn.ModuleList(block(config, skip=True) for _ in range(half))
        self.initialise()

    def initialise(self) -> None:
        """U-ViT's truncated normals; with adaLN zero modulations and heads, so that training starts from the identity.

        Blocks without gates are no identity, and behind them heads of zero do not get off the ground.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for branch in self.branches.values():
            nn.init.trunc_normal_(branch.position, std=0.02)
            if self.time.adaln:
                nn.init.zeros_(branch.head.weight)
        if self.time.adaln:
            nn.init.zeros_(self.time.project.weight)

    def blocks(self) -> Iterator[nn.Module]:
        """All transformer blocks, the repeated part that is worth compiling."""
        return (module for module in self.modules() if isinstance(module, AdaLNBlock | TokenBlock))

    def time_table(self, times: Tensor) -> Tensor:
        """Times [T] → table [T, 6·D] (adaln) or [T, D] (token) for `forward`; made once, outside the loop."""
        return self.time(times)

    def encode(self, name: str, inputs: Tensor, table: Tensor, index: Tensor) -> Tensor:
        """The outputs of one modality's in-blocks, [depth, R, L, D]: `forward` takes them in place of running these.

        Arguments as in `forward`; the modality has at least one in-block. They depend on its own part of the inputs
        and times alone, so while these stay as they are one call serves every step.
        """
        return torch.stack(self._enter(self.config.modality(name), inputs, table, index)[1])

    def keep(self, rows: int) -> Tensor:
        """Memory for `InnerCache.output`, [R, L, D]; it holds nothing yet."""
        config = self.config
        tokens = config.tokens + (0 if self.time.adaln else len(config.modalities))
        return next(self.parameters()).new_zeros(rows, tokens, config.dim)

    def forward(
        self,
        inputs: Tensor,
        table: Tensor,
        index: Tensor,
        outputs: Iterable[str] | None = None,
        encoded: Mapping[str, Tensor] | None = None,
        inner: InnerCache | None = None,
    ) -> Tensor:
        """Predicts the noise (or v) of every element.

        inputs   [R, N] packed state of all modalities
        table    [T, ·] from `time_table`
        index    [R, L] int32, each token's row of the table
        outputs  the modalities whose prediction is wanted, default all; nothing of the others' out-blocks runs and
                 their part of the result is zero
        encoded  what `encode` gave for some of the modalities, whose in-blocks then do not run
        inner    where the inner shared blocks' results are kept and used again; None: they run for all rows
        returns  [R, N] in inputs' dtype
        """
        config = self.config
        wanted = set(config.token_slices if outputs is None else outputs)

        def enter(m: Modality) -> tuple[Tensor, list[Tensor]]:
            if encoded is not None and m.name in encoded:
                s = list(encoded[m.name].unbind())  # depth × [R, L, D]
                return s[-1], s
            return self._enter(m, inputs, table, index)  # [R, L, D]

        def leave(m: Modality, x: Tensor, s: list[Tensor]) -> Tensor:
            if m.name not in wanted:
                return inputs.new_zeros(inputs.shape[0], m.size)
            y = self.branches[m.name].leave(x, s, table, self._index(m, index))  # [R, L, C]
            return y.flatten(1).to(inputs.dtype)  # [R, L·C]

        tokens, skips = zip(*self.side_by_side([partial(enter, m) for m in config.modalities]), strict=True)
        x = self._shared(torch.cat(tokens, dim=1), table, index, inner)  # [R, ΣL, D]
        parts = x.split([t.shape[1] for t in tokens], dim=1)  # [R, L, D] each
        branches = zip(config.modalities, parts, skips, strict=True)
        return torch.cat(self.side_by_side([partial(leave, *branch) for branch in branches]), dim=1)  # [R, N]

    def _enter(self, m: Modality, inputs: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = inputs.narrow(1, self.config.state_slices[m.name].start, m.size)  # [R, L·C]
        x = x.unflatten(1, (m.tokens, m.channels)).to(next(self.parameters()).dtype)  # [R, L, C]
        return self.branches[m.name].enter(x, table, self._index(m, index))

    def _index(self, m: Modality, index: Tensor) -> Tensor:
        return index.narrow(1, self.config.token_slices[m.name].start, m.tokens)  # [R, L]

    def _shared(self, x: Tensor, table: Tensor, index: Tensor, inner: InnerCache | None, pair: int = 0) -> Tensor:
        """The shared stack from one of its pairs inwards: an in-block, all that is within, the mirrored out-block."""
        if pair == len(self.shared_in):
            for block in self.shared_middle:
                x = block(x, None, table, index)  # [R, ΣL, D]
            return x
        skip = self.shared_in[pair](x, None, table, index)  # [R, ΣL, D]

        def within(x: Tensor) -> Tensor:
            return self._shared(x, table, index, None, pair + 1)

        x = within(skip) if inner is None else inner.through(within, skip)  # [R, ΣL, D]
        return self.shared_out[-1 - pair](x, skip, table, index)
