"""Rows of samples, and the device memory in which they are sampled side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.cfg_step import IDENTITY, Guided, Index, Progress, Rows, begin
from engine.masks import token_mask
from engine.schedule import SolverTable


@dataclass(frozen=True, eq=False)
class Row:
    """One sample to make. Raises ValueError on values that cannot be sampled."""

    seed: int  # 0 … 2⁶⁴ − 1
    table: SolverTable
    generate: Tensor  # [N] bool
    known: Tensor  # [N] float32, read where generate is False
    null: Tensor | None = None  # [N] float32, the known part's stand-in for "empty" guidance

    def __post_init__(self):
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: {self.seed} does not fit; use 0 to 2^64 - 1")
        if self.generate.dtype != torch.bool or self.generate.shape != self.known.shape:
            found = f"{self.generate.dtype} {tuple(self.generate.shape)}"
            raise ValueError(f"generate: {found} does not fit; give bool {tuple(self.known.shape)}, the shape of known")
        if not torch.isfinite(self.known[~self.generate]).all():
            raise ValueError("known: the given values contain NaN or infinity; give finite ones")
        if self.null is None and (self.table.guided == Guided.EMPTY).any():
            raise ValueError("null: None does not work with guidance 'empty'; give the values of an empty condition")


class Batch:
    """The memory of some slots: rows side by side, and how far they have come.

    An idle slot stands at a table line that changes nothing, or goes on with a row that has left; nobody looks at it.
    """

    def __init__(self, rows: Rows):
        self.rows, self.progress = rows, new_progress(rows)
        self.encoded: dict[str, Tensor] = {}  # by modality [depth, P·B, ...], pass-major like the inputs
        self.kept: Tensor | None = None  # [P·B, ...], what the denoiser keeps from step to step; made when first needed
        begin(rows, self.progress)

    def copy(self, source: "Batch", pairs: Sequence[tuple[int, int]]) -> None:
        """Copies rows of another batch, `pairs` of (its slot, slot here); its tables may be shorter."""
        if not pairs:
            return
        device = self.progress.state.device
        theirs, mine = (_upload(torch.tensor(slots), device) for slots in zip(*pairs, strict=True))
        for name, values in source.encoded.items():
            if name not in self.encoded:
                depth, rows, *shape = values.shape
                slots = rows // len(source.progress.state) * len(self.progress.state)
                self.encoded[name] = values.new_zeros(depth, slots, *shape)
        if source.kept is not None and self.kept is None:
            _, *shape = source.kept.shape
            self.kept = source.kept.new_zeros(len(self.progress.inputs), *shape)
        values = source._by_slot()
        for name, (tensor, dim) in self._by_slot().items():
            if name in values:
                value = values[name][0].index_select(dim, theirs)
                if name in ("coefficients", "indices"):
                    tensor = tensor[:, : value.shape[1]]
                tensor.index_copy_(dim, mine, value)

    def _by_slot(self) -> dict[str, tuple[Tensor, int]]:
        """Everything that belongs to a slot, by name, and which dimension counts the slots."""
        slots = len(self.progress.state)
        found = {name: (tensor, 0) for name, tensor in self.rows._asdict().items() if not name.endswith("modality")}
        for name, tensor in self.progress._asdict().items():
            passes = name in ("inputs", "times")
            found[name] = (tensor.unflatten(0, (-1, slots)), 1) if passes else (tensor, 0)
        for name, tensor in self.encoded.items():
            found[f"encoded {name}"] = tensor.unflatten(1, (-1, slots)), 2
        if self.kept is not None:
            found["kept"] = self.kept.unflatten(0, (-1, slots)), 1
        return found


def batch_rows(
    rows: Sequence[Row],
    model: ModelConfig,
    device: torch.device | str,
    slots: int | None = None,  # B, default one for each row
    lines: int | None = None,  # S + 1, default what the longest table needs
    passes: int | None = None,  # P, default what the rows' tables have
) -> Rows:
    """Stacks rows into the constants of `cfg_step`; shorter tables, and slots without a row, change nothing."""
    slots = len(rows) if slots is None else slots
    steps = lines or max(row.table.steps for row in rows) + 1  # every table ends in a line that changes nothing
    extra = max(row.table.guided.shape[1] for row in rows) if passes is None else passes - 1
    coefficients = np.tile(np.array(IDENTITY, np.float32), (slots, steps, 1))
    indices = np.zeros((slots, steps, Index.GUIDED + extra), np.int32)
    indices[..., Index.GUIDED :] = Guided.OFF
    seeds = np.zeros(slots, np.uint64)
    generate, known, null = torch.zeros(slots, model.size, dtype=torch.bool), *torch.zeros(2, slots, model.size)
    for i, row in enumerate(rows):
        coefficients[i, : row.table.steps] = row.table.coefficients
        indices[i, : row.table.steps, : row.table.indices.shape[1]] = row.table.indices
        seeds[i], generate[i], known[i] = row.seed, row.generate, row.known
        null[i] = row.known if row.null is None else row.null
    sizes, tokens = [m.size for m in model.modalities], [m.tokens for m in model.modalities]
    number = torch.arange(len(sizes), dtype=torch.int32)
    constants = Rows(
        seeds=torch.from_numpy(seeds.view(np.int64)),
        generate=generate,
        known=known,
        null=null,
        modality=number.repeat_interleave(torch.tensor(sizes)),
        token_generate=token_mask(generate, model),
        token_modality=number.repeat_interleave(torch.tensor(tokens)),
        coefficients=torch.from_numpy(coefficients),
        indices=torch.from_numpy(indices),
    )
    return Rows(*(_upload(tensor, device) for tensor in constants))


def new_progress(rows: Rows) -> Progress:
    """The buffers in which these rows are sampled; `begin` fills them."""
    batch, size = rows.known.shape
    passes, tokens = rows.indices.shape[2] - Index.GUIDED + 1, rows.token_modality.shape[0]
    return Progress(
        step=torch.zeros_like(rows.seeds),
        state=torch.empty_like(rows.known),
        x0_prev=torch.empty_like(rows.known),
        inputs=rows.known.new_empty(passes * batch, size),
        times=rows.indices.new_empty(passes * batch, tokens),
        arrived=rows.indices.new_zeros(batch),
    )


def _upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Host to device; from pinned memory, since the host would wait for the steps before it otherwise."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
