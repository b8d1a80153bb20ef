"""What `cfg_step` works on: the constants of a batch of samples, and how far these have come.

Shapes: B samples, N elements of packed state, L tokens, M modalities, P passes, S steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.step_table import NOOP_STEP, Coefficient, PassKind, StepColumn


class BatchConstants(NamedTuple):
    """What a batch's samples are: constant while they are made."""

    seeds: Tensor  # [B] int64, the 64 bits of each seed
    generate: Tensor  # [B, N] bool, True where the engine must produce the value
    known: Tensor  # [B, N] float32, read where generate is False
    null: Tensor  # [B, N] float32, what passes with NULLS_KNOWN know instead
    modality: Tensor  # [N] int32, each element's
    token_generate: Tensor  # [B, L] bool, True where any element of the token is generated
    token_modality: Tensor  # [L] int32
    coefficients: Tensor  # [B, S + 1, M, len(Coefficient)] float32, ending in a line of `NOOP_STEP`
    indices: Tensor  # [B, S + 1, M, StepColumn.PASS + P − 1] int32, ending in a line whose passes are OFF


class SamplerState(NamedTuple):
    """How far the samples have come: buffers that `init_state` and `cfg_step` write in place."""

    step: Tensor  # [B] int64
    state: Tensor  # [B, N] float32; known elements always hold their known values
    x0_prev: Tensor  # [B, N] float32, the previous step's x̂0
    x0_prev2: Tensor  # [B, N] float32, that of the step before, where the present line's E is not 0; else anything
    inputs: Tensor  # [P·B, N] float32, pass-major: rows [0:B] conditional, [B:2B] the first extra pass, …
    times: Tensor  # [P·B, L] int32
    arrived: Tensor  # [B] int32, programs of the sample that are done with the present step; 0 between launches


def new_state(constants: BatchConstants) -> SamplerState:
    """The buffers in which these samples are made, not yet filled; `init_state` fills them."""
    batch, size = constants.known.shape
    passes, tokens = constants.indices.shape[3] - StepColumn.PASS + 1, constants.token_modality.shape[0]
    return SamplerState(
        step=torch.zeros_like(constants.seeds),
        state=torch.empty_like(constants.known),
        x0_prev=torch.empty_like(constants.known),
        x0_prev2=torch.empty_like(constants.known),
        inputs=constants.known.new_empty(passes * batch, size),
        times=constants.indices.new_empty(passes * batch, tokens),
        arrived=constants.indices.new_zeros(batch),
    )


def at_step(constants: BatchConstants, state: SamplerState) -> tuple[Tensor, Tensor]:
    """Each sample's present line of its table: [B, M, len(Coefficient)] and [B, M, StepColumn.PASS + P − 1]."""
    lines = constants.coefficients.shape[1]
    line = state.step.clamp(max=lines - 1)[:, None, None, None]  # the last line is NOOP_STEP
    coefficients = constants.coefficients.gather(1, line.expand(-1, 1, *constants.coefficients.shape[2:]))
    indices = constants.indices.gather(1, line.expand(-1, 1, *constants.indices.shape[2:]))
    return coefficients[:, 0], indices[:, 0]


def example_constants(
    batch: int,
    modalities: Sequence[tuple[int, int]],  # (tokens, channels) of each
    passes: int,  # P
    live: int,  # passes that are on at any step
    steps: int,  # S
    generator: torch.Generator | None = None,
) -> BatchConstants:
    """Samples with random seeds, masks, values, step tables and kinds of pass, on the CPU.

    Tables have different lengths, and modalities that do not move at some steps. Updates contract, so that states stay
    finite however many steps are made.
    """
    tokens = torch.tensor([count for count, _ in modalities])
    channels = torch.tensor([width for _, width in modalities]).repeat_interleave(tokens)  # [L]
    size, number = int(channels.sum()), torch.arange(len(modalities), dtype=torch.int32)
    token_modality = number.repeat_interleave(tokens)
    generate = torch.rand(batch, size, generator=generator) < 0.5
    generated = torch.zeros(batch, len(channels), dtype=torch.int32)  # elements of each token
    generated.index_add_(1, torch.arange(len(channels)).repeat_interleave(channels), generate.int())
    return BatchConstants(
        seeds=torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator),
        generate=generate,
        known=torch.randn(batch, size, generator=generator),
        null=torch.randn(batch, size, generator=generator),
        modality=token_modality.repeat_interleave(channels),
        token_generate=generated > 0,
        token_modality=token_modality,
        coefficients=_example_coefficients(batch, steps, len(modalities), generator),
        indices=_example_indices(batch, steps, len(modalities), passes, live, generator),
    )


def _example_coefficients(batch: int, steps: int, modalities: int, generator: torch.Generator | None) -> Tensor:
    """[B, S + 1, M, len(Coefficient)] float32."""
    shape = batch, steps + 1, modalities
    coefficients = 0.3 * torch.randn(*shape, len(Coefficient), generator=generator)
    coefficients[..., Coefficient.W] = 1 + 3 * torch.rand(shape, generator=generator)
    coefficients[torch.rand(shape, generator=generator) < 0.25] = torch.tensor(NOOP_STEP)
    for sample in range(batch):
        coefficients[sample, steps - sample % max(1, steps // 2) :] = torch.tensor(NOOP_STEP)
    return coefficients


def _example_indices(
    batch: int, steps: int, modalities: int, passes: int, live: int, generator: torch.Generator | None
) -> Tensor:
    """[B, S + 1, M, StepColumn.PASS + P − 1] int32."""
    shape = batch, steps + 1, modalities, StepColumn.PASS + passes - 1
    indices = torch.randint(1001, shape, dtype=torch.int32, generator=generator)
    indices[..., StepColumn.DROP_DRAW] = indices[:, :, :1, StepColumn.DROP_DRAW]
    indices[..., StepColumn.REFRESH] = 1
    indices[..., StepColumn.PASS :] %= 2 * max(PassKind)  # every combination of flags
    indices[..., StepColumn.PASS + live - 1 :] = PassKind.OFF
    indices[:, -1, :, StepColumn.PASS :] = PassKind.OFF
    return indices
