"""PS-U-Net (arXiv 2311.16488): a branch of transformer blocks per modality around a shared U-ViT stack.

    image tokens ── in-blocks ─┐                        ┌─ out-blocks ── image prediction
                               ├─ shared U-ViT, skips ──┤
    text tokens  ── in-blocks ─┘                        └─ out-blocks ── text prediction

Every in-block's output skips to the mirrored out-block of its own branch. The model's inputs are tokens and times only:
images, words, masks, noise and solvers are handled elsewhere.

Shapes: R rows, L tokens, C channels, D width, N packed elements, T times.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from engine.config import Modality, ModelConfig
from engine.kernels.adaln import layer_norm_modulate
from engine.model.blocks import (
    SCALE_ATTENTION,
    SHIFT_ATTENTION,
    Block,
    InnerCache,
    TimeTable,
    initialise_linear,
    one_by_one,
    run_stack,
)


class Branch(nn.Module):
    """One modality's own part: embedding and in-blocks before the shared stack, out-blocks and head after it.

    lender  the branch of the modality that it has the blocks of; None: it has its own
    """

    def __init__(self, config: ModelConfig, modality: Modality, lender: "Branch | None" = None):
        super().__init__()
        dim, self.token_time = config.dim, config.time_conditioning == "token"
        self.shape = modality.tokens, modality.channels
        # (start, length) in the packed state and in the token sequence, for `narrow`: Dynamo cannot trace slices of
        # fake CUDA tensors in builds without CUDA.
        self.elements = config.state_slices[modality.name].start, modality.size
        self.tokens = config.token_slices[modality.name].start, modality.tokens
        self.embed = nn.Linear(modality.channels, dim)
        self.position = nn.Parameter(torch.zeros(modality.tokens + self.token_time, dim))
        self._lender = (lender,) if lender is not None else ()  # in a tuple: its modules are not this one's
        if lender is None:
            self.in_blocks = nn.ModuleList(Block.from_config(config, skip=False) for _ in range(modality.depth))
            self.out_blocks = nn.ModuleList(Block.from_config(config, skip=True) for _ in range(modality.depth))
        if self.token_time:
            self.norm = nn.LayerNorm(dim)
        else:
            self.modulation = nn.Parameter(torch.zeros(6 * dim))  # the last norm's; of its chunks two are used
        self.head = nn.Linear(dim, modality.head)
        # Of a categorical modality the vectors that its tokens may be, set before training.
        values = torch.zeros(modality.categories, modality.channels) if modality.categories else None
        self.register_buffer("values", values)

    def stacks(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """In-blocks and out-blocks, its own or the lender's."""
        owner = self._lender[0] if self._lender else self
        return owner.in_blocks, owner.out_blocks

    def enter(
        self, inputs: Tensor, table: Tensor, index: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Packed inputs [R, N] of all modalities → (tokens for the shared stack [R, L, D], the skips for `leave`).

        features [depth, R, L, D]: the in-blocks' outputs, in place of running them. L is one more with a time token.
        """
        if features is not None:
            skips = list(features.unbind())  # depth × [R, L, D]
            return skips[-1], skips
        x = inputs.narrow(1, *self.elements).unflatten(1, self.shape).to(self.embed.weight.dtype)  # [R, L, C]
        index = index.narrow(1, *self.tokens)  # [R, L]
        x = self.embed(x)  # [R, L, D]
        if self.token_time:
            x = torch.cat([table[index[:, :1].long()].to(x.dtype), x], dim=1)  # [R, 1+L, D]
        x = x + self.position  # [R, L, D]
        skips = []
        for block in self.stacks()[0]:
            x = block(x, None, table, index)  # [R, L, D]
            skips.append(x)
        return x, skips

    def leave(
        self,
        x: Tensor,
        skips: list[Tensor],
        table: Tensor,
        index: Tensor,
        temperature: Tensor | None = None,
        logits: bool = False,
    ) -> Tensor:
        """Tokens from the shared stack [R, L, D] → prediction [R, L·C].

        That of categories is x̂0, the mean of their vectors by the probabilities softmax(logits / temperature): CDCD's
        score interpolation (arXiv 2211.15089, section 3.1).
        temperature  [R]; None: 1
        logits       gives the logits [R, L·K] of categories instead
        """
        index = index.narrow(1, *self.tokens)  # [R, L]
        for block, skip in zip(self.stacks()[1], reversed(skips), strict=True):
            x = block(x, skip, table, index)  # [R, L, D]
        if self.token_time:
            x = self.norm(x)[:, 1:]  # [R, L, D]
        else:
            x = layer_norm_modulate(x, table, index, self.modulation, SHIFT_ATTENTION, SCALE_ATTENTION)  # [R, L, D]
        x = self.head(x)  # [R, L, C or K]
        if self.values is not None and not logits:
            x = x.float() if temperature is None else x.float() / temperature[:, None, None]  # [R, L, K]
            x = x.softmax(dim=-1).to(self.values.dtype) @ self.values  # [R, L, C]
        return x.flatten(1)


def _leave_rows(
    leave: Callable[..., Tensor],
    rows: Tensor,
    x: Tensor,
    skips: list[Tensor],
    table: Tensor,
    index: Tensor,
    temperature: Tensor | None,
    logits: bool,
) -> Tensor:
    """`Branch.leave` of some rows [k]; the others are zero."""
    scale = None if temperature is None else temperature[rows]
    found = leave(x[rows], [skip[rows] for skip in skips], table, index[rows], scale, logits)  # [k, L·C]
    return found.new_zeros(len(x), found.shape[1]).index_copy_(0, rows, found)  # [R, L·C]


class PSUNet(nn.Module):
    """The network. `forward` takes packed inputs; `time_table` gives the rows that its time indices point into."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        half, middle = config.shared_depth // 2, config.shared_depth % 2
        self.time = TimeTable(config)
        own = {m.name: Branch(config, m) for m in config.modalities if not m.blocks_of}
        branches = {m.name: own.get(m.name) or Branch(config, m, own[m.blocks_of]) for m in config.modalities}
        self.branches = nn.ModuleDict(branches)
        self.shared_in = nn.ModuleList(Block.from_config(config, skip=False) for _ in range(half))
        self.shared_middle = nn.ModuleList(Block.from_config(config, skip=False) for _ in range(middle))
        self.shared_out = nn.ModuleList(Block.from_config(config, skip=True) for _ in range(half))
        self.initialise()

    def initialise(self) -> None:
        """U-ViT's truncated normals; with adaLN zero modulations and heads, so that training starts from the identity.

        Without gates, blocks are not the identity at the start, and heads of zero would keep them from learning.
        """
        initialise_linear(self)
        for branch in self.branches.values():
            nn.init.trunc_normal_(branch.position, std=0.02)
            if self.time.adaln:
                nn.init.zeros_(branch.head.weight)
        if self.time.adaln:
            nn.init.zeros_(self.time.project.weight)

    def blocks(self) -> Iterator[Block]:
        """All transformer blocks, the repeated part that is worth compiling."""
        return (module for module in self.modules() if isinstance(module, Block))

    def time_table(self, times: Tensor) -> Tensor:
        """Times [T] → table [T, 6·D] (adaln) or [T, D] (token) for `forward`; made once, outside the sampling loop."""
        return self.time(times)

    def branch_features(self, name: str, inputs: Tensor, table: Tensor, index: Tensor) -> Tensor:
        """The outputs of one modality's in-blocks, [depth, R, L, D]: `forward` takes them in place of running these.

        Arguments as in `forward`; the modality has at least one in-block. They depend on its own part of the inputs
        and times alone, so while these do not change one call serves every step.
        """
        _, skips = self.branches[name].enter(inputs, table, index)
        return torch.stack(skips)

    def new_cache(self, rows: int) -> Tensor:
        """Memory for `InnerCache.output`, [R, L, D], with the time tokens; it holds no results yet."""
        tokens = sum(len(branch.position) for branch in self.branches.values())
        return next(self.parameters()).new_zeros(rows, tokens, self.config.dim)

    def forward(
        self,
        inputs: Tensor,
        table: Tensor,
        index: Tensor,
        outputs: Iterable[str] | None = None,
        features: Mapping[str, Tensor] | None = None,
        inner: InnerCache | None = None,
        run_branches: Callable[[list[Callable]], list] = one_by_one,
        temperature: Tensor | None = None,
        logits: bool = False,
        output_rows: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Predicts the noise (or v) of every element, of categorical modalities x̂0.

        inputs        [R, N] packed state of all modalities
        table         [T, ·] from `time_table`
        index         [R, L] int32, each token's row of the table
        outputs       the modalities whose prediction is wanted, default all; the others' out-blocks do not run and
                      their part of the result is zero
        features      by modality what `branch_features` gave, for those whose in-blocks need not run
        inner         step caching; needs 3 or more shared blocks
        run_branches  runs calls that need nothing of each other, one per modality, and returns their results in order
        temperature   [R, M] of the categories' probabilities, by modality; default 1
        logits        give those of categorical modalities in place of x̂0, for training
        output_rows   by modality, of those wanted, the rows [k] int64 for which it is, default all; other rows are zero
        returns       [R, N] in inputs' dtype; with `logits` packed as `ModelConfig.head_slices` says
        """
        wanted, features = set(self.branches if outputs is None else outputs), features or {}
        output_rows = output_rows or {}
        calls = []
        for name, branch in self.branches.items():
            calls.append(partial(branch.enter, inputs, table, index, features.get(name)))
        tokens, skips = zip(*run_branches(calls), strict=True)  # [R, L, D] each, and depth × [R, L, D] each

        x = torch.cat(tokens, dim=1)  # [R, ΣL, D]
        x = run_stack(x, self.shared_in, self.shared_middle, self.shared_out, table, index, inner)  # [R, ΣL, D]
        parts = x.split([part.shape[1] for part in tokens], dim=1)  # [R, L, D] each

        calls = []
        for i, m in enumerate(self.config.modalities):
            if m.name in wanted:
                scale = None if temperature is None else temperature[:, i]  # [R]
                leave = self.branches[m.name].leave
                if (rows := output_rows.get(m.name)) is not None:
                    leave = partial(_leave_rows, leave, rows)
                calls.append(partial(leave, parts[i], skips[i], table, index, scale, logits))
            else:
                calls.append(partial(inputs.new_zeros, len(inputs), m.tokens * m.head if logits else m.size))
        predictions = run_branches(calls)  # [R, L·C] each
        return torch.cat(predictions, dim=1).to(inputs.dtype)  # [R, N]
