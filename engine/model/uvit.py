"""U-ViT (arXiv 2209.12152): one stack of transformer blocks over the tokens of all modalities, with long skips.

    time tokens ─┐
    image tokens ├─ in-blocks ── middle ── out-blocks ── norm ── a head per modality
    text tokens ─┘       └──────── skips ──────┘

U-ViT-multi has a time token per modality, so that their times are independent (UniDiffuser, arXiv 2303.06555); the
text-to-image U-ViT has one time token, and its text is a condition. `engine.model.convert` reads published weights.
The interface is that of `engine.model.psunet.PSUNet`.

Shapes: R rows, L tokens, C channels, D width, N packed elements, T times, M time tokens, E extra tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from engine.codecs.image import patchify, unpatchify
from engine.config import ModelConfig
from engine.model.blocks import Block, InnerCache, TimeTable, initialise_linear, one_by_one, run_stack


class UViT(nn.Module):
    """The network. A modality that is only partly known is labelled with the latest time of its tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.uvit is not None, "a PS-U-Net's config"
        self.config, uvit, dim, half = config, config.uvit, config.dim, config.shared_depth // 2
        self.prefix = len(uvit.timed) + uvit.extra_tokens  # M + E
        self.time = TimeTable(config)
        self.embed = nn.ModuleDict({m.name: nn.Linear(m.channels, dim) for m in config.modalities})
        self.position = nn.Parameter(torch.zeros(self.prefix + config.tokens, dim))  # those of E are the tokens too
        self.in_blocks = nn.ModuleList(Block.from_config(config, skip=False) for _ in range(half))
        self.middle = Block.from_config(config, skip=False)
        self.out_blocks = nn.ModuleList(Block.from_config(config, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.ModuleDict({name: nn.Linear(dim, config.modality(name).channels) for name in uvit.predicted})
        self.conv = None
        if uvit.patch:
            channels = config.modality("image").channels // uvit.patch**2
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        initialise_linear(self)
        nn.init.trunc_normal_(self.position, std=0.02)

    def blocks(self) -> Iterator[Block]:
        """All transformer blocks, the repeated part that is worth compiling."""
        yield from (*self.in_blocks, self.middle, *self.out_blocks)

    def time_table(self, times: Tensor) -> Tensor:
        """Times [T] → time tokens float32 [T, D]; they have no weights of their own."""
        return self.time(times)

    def branch_features(self, name: str, inputs: Tensor, table: Tensor, index: Tensor) -> Tensor:
        """Not for U-ViTs: their modalities have depth 0. Callers ask for those with in-blocks only (AssertionError)."""
        raise AssertionError(f"{name} has no in-blocks: all blocks of a U-ViT are shared")

    def new_cache(self, rows: int) -> Tensor:
        """Memory for `InnerCache.output`, [R, M + E + ΣL, D]; it holds no results yet."""
        return self.position.new_zeros(rows, *self.position.shape)

    def forward(
        self,
        inputs: Tensor,
        table: Tensor,
        index: Tensor,
        outputs: Iterable[str] | None = None,
        features: Mapping[str, Tensor] | None = None,
        inner: InnerCache | None = None,
        run_branches: Callable[[list[Callable]], list] = one_by_one,
    ) -> Tensor:
        """Predicts the noise (or v) of every element of the predicted modalities; the rest of the result is zero.

        inputs        [R, N] packed state of all modalities
        table         [T, D] from `time_table` for ascending times
        index         [R, L] int32, each token's row of the table
        outputs       the modalities whose prediction is wanted, default all that the model predicts
        features      none: see `branch_features`
        inner         step caching; needs 3 or more blocks
        run_branches  not called: there are no branches
        returns       [R, N] in inputs' dtype
        """
        assert not features, "all blocks of a U-ViT are shared"
        config, dtype = self.config, self.position.dtype
        elements, columns = config.state_slices, config.token_slices
        wanted = set(config.predicted if outputs is None else outputs)
        latest = [index[:, columns[name]].amax(1).long() for name in config.uvit.timed]  # M × [R]
        tokens = [table[torch.stack(latest, dim=1)].to(dtype)]  # [R, M, D]
        tokens.append(tokens[0].new_zeros(len(inputs), config.uvit.extra_tokens, config.dim))  # [R, E, D]
        for m in config.modalities:
            x = inputs[:, elements[m.name]].unflatten(1, (m.tokens, m.channels)).to(dtype)  # [R, L, C]
            tokens.append(self.embed[m.name](x))  # [R, L, D]

        x = torch.cat(tokens, dim=1) + self.position  # [R, M + E + ΣL, D]
        x = run_stack(x, self.in_blocks, [self.middle], self.out_blocks, table, index, inner)  # [R, M + E + ΣL, D]
        x = self.norm(x)[:, self.prefix :]  # [R, ΣL, D]

        predictions = []
        for m in config.modalities:
            if m.name not in wanted or m.name not in self.head:
                predictions.append(inputs.new_zeros(len(inputs), m.size))  # [R, L·C]
                continue
            y = self.head[m.name](x[:, columns[m.name]])  # [R, L, C]
            if m.name == "image" and self.conv is not None:
                y = patchify(self.conv(unpatchify(y, config.uvit.patch)), config.uvit.patch)  # [R, L, C]
            predictions.append(y.flatten(1))  # [R, L·C]
        return torch.cat(predictions, dim=1).to(inputs.dtype)  # [R, N]
