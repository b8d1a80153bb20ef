"""The sampling loop: rows of any tasks through a denoiser, one forward of all passes per step.

A denoiser is a function

    denoiser(inputs [R, N] float32, times [R, L] int32, outputs: tuple[str, ...]) -> prediction [R, N]

of packed states and the time of every token; `outputs` names the modalities whose prediction is needed, the rest of
the result may hold anything. The loop knows nothing else of the model, and nothing of pictures or words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.cfg_step import IDENTITY, Guided, Index, Progress, Rows, begin, cfg_step
from engine.masks import token_mask, whole_tokens
from engine.schedule import SolverTable

Denoiser = Callable[[Tensor, Tensor, tuple[str, ...]], Tensor]


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


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    rows: Sequence[Row],
    model: ModelConfig,
    device: torch.device | str = "cpu",
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Samples of all rows, packed, [B, N] float32 on `device`; known values come back bit for bit.

    Each row depends on its own seed, table and masks only, so it comes out the same whatever shares the batch (as far
    as the denoiser's own arithmetic does). The batch runs as many steps as its longest table; finished rows wait.
    `callback(steps done, steps in all)` is called after every step; to cancel, raise from it.
    """
    constants = batch_rows(rows, model, device)
    passes = _passes([row.table for row in rows])
    outputs = tuple(name for name, part in model.state_slices.items() if any(row.generate[part].any() for row in rows))
    if not outputs:
        return constants.known.clone()

    progress = new_progress(constants)
    begin(constants, progress)
    for step, live in enumerate(n * len(rows) for n in passes):
        prediction = denoiser(progress.inputs[:live], progress.times[:live], outputs)  # [live, N]
        cfg_step(prediction, constants, progress)
        if callback is not None:
            callback(step + 1, len(passes))
    return progress.state


def batch_rows(rows: Sequence[Row], model: ModelConfig, device: torch.device | str) -> Rows:
    """Stacks rows into the constants of `cfg_step`, shorter tables padded with lines that change nothing."""
    assert len(rows) > 0
    for row in rows:
        _check(row, model)
    generate = torch.stack([row.generate for row in rows])  # [B, N]
    steps = max(row.table.steps for row in rows) + 1  # every table ends in a line that changes nothing
    extra = max(row.table.guided.shape[1] for row in rows)
    coefficients = np.tile(np.array(IDENTITY, np.float32), (len(rows), steps, 1))
    indices = np.zeros((len(rows), steps, Index.GUIDED + extra), np.int32)
    indices[..., Index.GUIDED :] = Guided.OFF
    for i, row in enumerate(rows):
        coefficients[i, : row.table.steps] = row.table.coefficients
        indices[i, : row.table.steps, : row.table.indices.shape[1]] = row.table.indices
    sizes, tokens = [m.size for m in model.modalities], [m.tokens for m in model.modalities]
    number = torch.arange(len(sizes), dtype=torch.int32)
    constants = Rows(
        seeds=torch.from_numpy(np.array([row.seed for row in rows], np.uint64).view(np.int64)),
        generate=generate,
        known=torch.stack([row.known.float() for row in rows]),
        null=torch.stack([(row.known if row.null is None else row.null).float() for row in rows]),
        modality=number.repeat_interleave(torch.tensor(sizes)),
        token_generate=token_mask(generate, model),
        token_modality=number.repeat_interleave(torch.tensor(tokens)),
        coefficients=torch.from_numpy(coefficients),
        indices=torch.from_numpy(indices),
    )
    return Rows(*(tensor.to(device) for tensor in constants))


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


def _passes(tables: Sequence[SolverTable]) -> list[int]:
    """How many passes each step of the batch needs: up to the last one that guides any row."""
    passes = np.ones(max(table.steps for table in tables), int)
    for table in tables:
        number = np.arange(1, table.guided.shape[1] + 1)
        needed = 1 + (number * (table.guided != Guided.OFF)).max(axis=1, initial=0)  # [S]
        passes[: table.steps] = np.maximum(passes[: table.steps], needed)
    return passes.tolist()


def _check(row: Row, model: ModelConfig) -> None:
    values = {"generate": row.generate, "known": row.known} | ({} if row.null is None else {"null": row.null})
    for name, tensor in values.items():
        if tensor.shape != (model.size,):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} does not fit; the model's state is [{model.size}]")
    if (row.table.guided >= len(model.modalities)).any():
        raise ValueError(f"guided_modalities: the model has only {len(model.modalities)}; number them from 0")
    clean = (row.table.indices[:, Index.KNOWN_TIME] != row.table.indices[:, Index.TIME]).any()
    if clean and not torch.equal(whole_tokens(row.generate, model), row.generate):
        raise ValueError("generate: a token is partly known, which clean conditioning cannot do; use whole_tokens")
