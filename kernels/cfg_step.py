"""cfg_step: everything a sampling step does between two forwards of the model, on the packed state, in one operation.

Each sample of a batch has its own seed, step counter, masks and step table. Samples of different tasks, solvers and
lengths share a batch, each at its own step, and a result does not depend on its neighbours. At a sample's step n, let
f_0 be the prediction of the conditional pass and f_k that of extra pass k, u_k ∈ {0, 1} whether pass k guides the
element, g the generate mask, and p, q, a, b, c, d, e, w the coefficients of the element's modality:

    f    = f_0 + Σ_k (w − 1)·u_k·(f_0 − f_k)        classifier-free guidance; P = 2: f_u + w·(f_c − f_u)
    x̂0   = p·x + q·f                                p·x where q = 0, whatever the prediction holds
    x    ← a·x + b·x̂0 + c·x̂0_prev + d·z + e·x̂0_prev2    any solver of engine/diffusion/solver_table.py
    in_0 = g·x + (1 − g)·(known_alpha·x0 + known_sigma·ξ)
    in_k = in_0 with the elements that pass k drops replaced by pure noise η_k, or the known ones by null values

The inputs in_0, in_k and the tokens' times are those of step n + 1. A sample past the end of its table keeps its state,
and so does a modality whose line is `NOOP_STEP`. The Triton kernel (cfg_step_kernels.py) does all of it in one launch.
Sources: joint infilling and masked guidance, arXiv 2311.16488 §3; guidance, Ho & Salimans 2022 (arXiv 2207.12598);
one pass per modality, UniDiffuser (arXiv 2303.06555) eq. 7; the generator, Salmon et al. 2011 (Philox-4x32-10).

Shapes: B samples, N elements of packed state, L tokens, M modalities, P passes, S steps. Everything is float32,
whatever the model computes in: one step's rounding in bfloat16 is larger than the update of a late step.
On a GPU nothing reads a tensor on the host or branches on its values, so a step can be captured in a CUDA graph. On a
CPU noise is drawn only where a sample uses it, and kept where it stays the same.
"""

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from engine.kernels.backend import COMPILER_OPTIONS, choose, triton
from engine.kernels.cfg_step_kernels import cfg_step_kernel
from engine.kernels.philox import DROP_STREAM, STATE_STREAM, normals
from engine.kernels.sampler_state import BatchConstants, SamplerState, at_step, example_constants, new_state
from engine.kernels.step_table import Coefficient, PassKind, StepColumn

# ---------------------------------------------------------------------------------------------- reference


def init_state(constants: BatchConstants, state: SamplerState) -> None:
    """Sets every sample to its step 0: initial noise, and the inputs and times of the first forward. In place."""
    state.step.zero_()
    noise, _ = normals(constants.seeds, state.step, STATE_STREAM, constants.known.shape[1])  # [B, N]
    state.state.copy_(torch.where(constants.generate, noise, constants.known))
    state.x0_prev.zero_()
    state.x0_prev2.zero_()
    write_inputs(constants, state)


def write_inputs(constants: BatchConstants, state: SamplerState) -> None:
    """The inputs and times of every sample's present step, after its state was changed from outside. In place."""
    coefficients, indices = at_step(constants, state)
    _, xi = _step_noise(constants, state, coefficients[..., Coefficient.KNOWN_SIGMA])
    _write_inputs(constants, state, coefficients, indices, xi)


def _torch_step(prediction: Tensor, constants: BatchConstants, state: SamplerState) -> None:
    f_0, *f_extra = prediction.detach().float().reshape(-1, *state.state.shape)  # [B, N] each
    coefficients, indices = at_step(constants, state)
    guides = (indices[..., StepColumn.PASS : StepColumn.PASS + len(f_extra)] & PassKind.GUIDES) != 0  # [B, M, P' − 1]
    guidance = torch.where(guides, coefficients[..., Coefficient.W, None] - 1, 0.0)  # u_k·(w − 1)
    columns = torch.cat([coefficients[..., Coefficient.P : Coefficient.E + 1], guidance], dim=-1)
    p, q, a, b, c, d, e, *guidance = _of_each(constants.modality, columns)  # [B, N] each

    f = f_0
    for guidance_k, f_k in zip(guidance, f_extra, strict=True):
        f = torch.addcmul(f, guidance_k, f_0 - torch.where(guidance_k != 0, f_k, f_0))
    x0 = torch.addcmul(p * state.state, q, torch.where(q != 0, f, 0.0))

    state.step.add_(1)
    noise_scale, before = coefficients[..., Coefficient.D], indices
    coefficients, indices = at_step(constants, state)
    z, xi = _step_noise(constants, state, noise_scale, coefficients[..., Coefficient.KNOWN_SIGMA])
    x = torch.addcmul(a * state.state, b, x0).addcmul_(c, state.x0_prev).addcmul_(e, state.x0_prev2)
    if z is not None:
        x.addcmul_(d, z)
    torch.where(constants.generate, x, constants.known, out=state.state)
    state.x0_prev2.copy_(state.x0_prev)
    state.x0_prev.copy_(x0)
    _write_inputs(constants, state, coefficients, indices, xi, before)


def _step_noise(
    constants: BatchConstants, state: SamplerState, *scales: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """z of the step before and ξ of the present one, [B, N] each; None if all the scales of both are 0."""
    if not any(map(_any, scales)):
        return None, None
    return normals(constants.seeds, state.step, STATE_STREAM, constants.known.shape[1])


def _drop_noise(
    constants: BatchConstants, state: SamplerState, indices: Tensor, before: Tensor | None, k: int, drops: bool
) -> Tensor:
    """η of extra pass k, [B, N] or [], where it drops something; elsewhere anything.

    before  the indices of the step whose inputs the state still holds: what stays dropped keeps its noise
    drops   whether the pass drops anything
    """
    if before is not None and indices.is_cpu:
        columns = StepColumn.DROP_DRAW, StepColumn.PASS + k
        if all(torch.equal(indices[..., column], before[..., column]) for column in columns):
            return state.inputs.view(-1, *state.state.shape)[k + 1]
    if not drops:
        return constants.known.new_zeros(())
    draw = indices[:, 0, StepColumn.DROP_DRAW].long()  # all modalities have the same
    return normals(constants.seeds, draw, DROP_STREAM + k, constants.known.shape[1])[0]


def _any(values: Tensor) -> bool:
    """Whether any value may be other than 0. Only a CPU's are known to the host, which does not wait for others."""
    return not values.is_cpu or any(values.flatten().tolist())


def _kinds_of(values: Tensor) -> int:
    """The flags of `PassKind` that some value may have."""
    return reduce(or_, values.flatten().tolist(), 0) if values.is_cpu else ~0


def _of_each(modality: Tensor, values: Tensor) -> Tensor:
    """Columns of a line [B, M, C] for each element (or token) of these modalities [N]: [C, B, N]."""
    batch, _, columns = values.shape
    return values.permute(2, 0, 1).gather(2, modality.long().expand(columns, batch, -1))


def _write_inputs(
    constants: BatchConstants,
    state: SamplerState,
    coefficients: Tensor,  # of the samples' present steps, [B, M, len(Coefficient)]
    indices: Tensor,  # of the samples' present steps, [B, M, StepColumn.PASS + P − 1]
    xi: Tensor | None,  # [B, N], noise of the known part; None: there is none
    before: Tensor | None = None,  # as indices, of the step whose inputs the state holds
) -> None:
    """The inputs and times of all passes."""
    generate, token_generate = constants.generate, constants.token_generate
    inputs = state.inputs.view(-1, *state.state.shape)  # [P, B, N]
    times = state.times.view(inputs.shape[0], inputs.shape[1], -1)  # [P, B, L]
    known_columns = coefficients[..., Coefficient.KNOWN_ALPHA : Coefficient.KNOWN_SIGMA + 1]
    known_alpha, known_sigma = _of_each(constants.modality, known_columns)
    token_indices = _of_each(constants.token_modality, indices)  # [StepColumn.PASS + P − 1, B, L]
    kinds = _of_each(constants.modality, indices[..., StepColumn.PASS :])  # [P − 1, B, N]

    torch.where(generate, state.state, _noised(known_alpha, constants.known, known_sigma, xi), out=inputs[0])
    time, known_time = token_indices[StepColumn.TIME], token_indices[StepColumn.KNOWN_TIME]
    torch.where(token_generate, time, known_time, out=times[0])
    for k, kind in enumerate(kinds):
        occurring = _kinds_of(indices[..., StepColumn.PASS + k])
        drops = bool(occurring & (PassKind.DROPS_KNOWN | PassKind.DROPS_STATE))
        eta = _drop_noise(constants, state, indices, before, k, drops)
        kept = inputs[0]
        if occurring & PassKind.NULLS_KNOWN:
            nulled = ((kind & PassKind.NULLS_KNOWN) != 0) & ~generate
            kept = torch.where(nulled, _noised(known_alpha, constants.null, known_sigma, xi), kept)
        torch.where(_dropped(kind, generate), eta, kept, out=inputs[k + 1])
        dropped = _dropped(token_indices[StepColumn.PASS + k], token_generate)
        torch.where(dropped, token_indices[StepColumn.DROP_TIME], times[0], out=times[k + 1])


def _noised(alpha: Tensor, values: Tensor, sigma: Tensor, xi: Tensor | None) -> Tensor:
    """alpha·values + sigma·xi; all [B, N]; xi None: sigma is 0."""
    return alpha * values if xi is None else torch.addcmul(alpha * values, sigma, xi)


def _dropped(kind: Tensor, generate: Tensor) -> Tensor:
    """Which elements (or tokens) a pass of these kinds replaces by noise; all [B, N] (or [B, L])."""
    return (kind & torch.where(generate, PassKind.DROPS_STATE, PassKind.DROPS_KNOWN)) != 0


# ------------------------------------------------------------------------------------------------- launcher


def _triton_step(prediction: Tensor, constants: BatchConstants, state: SamplerState) -> None:
    (batch, size), tokens = constants.known.shape, constants.token_modality.shape[0]
    (_, lines, modalities, _), passes = constants.coefficients.shape, state.inputs.shape[0] // batch
    assert constants.coefficients.shape == (batch, lines, modalities, len(Coefficient))
    assert constants.indices.shape == (batch, lines, modalities, StepColumn.PASS + passes - 1)
    assert all(tensor.is_contiguous() for tensor in (*constants, *state))
    # Four float32 values a thread load at once; small batches need smaller blocks to reach all processors.
    block = min(512 if batch >= 16 else 256, triton.next_power_of_2(size))
    blocks = triton.cdiv(size, block)
    cfg_step_kernel[blocks, batch](
        prediction.contiguous(), *constants, *state, lines, batch, N=size, L=tokens, M=modalities, PASSES=passes,
        LIVE=prediction.shape[0] // batch, BLOCK=block, TOKENS=triton.next_power_of_2(triton.cdiv(tokens, blocks)),
        num_warps=4, **COMPILER_OPTIONS,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- public


def cfg_step(prediction: Tensor, constants: BatchConstants, state: SamplerState, backend: str = "auto") -> None:
    """Advances every sample by one step of its table, and writes the next forward's inputs and times. In place.

    `prediction` [P'·B, N], any float dtype: the model's output for the first P' ≤ P passes of `state.inputs`; the
    kinds of the others must be OFF. It is not used for known elements and where q is 0: it may hold anything there.
    `backend` is "auto", "torch" or "triton"; the two draw the same random bits.
    """
    chosen = choose("cfg_step", prediction, tuple(constants.known.shape), asked=backend)
    (_triton_step if chosen == "triton" else _torch_step)(prediction, constants, state)


def cost(batch: int, size: int, tokens: int, passes: int) -> tuple[int, int]:
    """(FLOPs, bytes) of one `cfg_step` done in one launch, every tensor but the step tables read and written once.

    Without x0_prev2, which the kernel neither reads nor writes except for samples of UniPC.

    FLOPs count float arithmetic, 8 for a Box–Muller pair; the integer work is one Philox call per pass and element
    (10 rounds of 2 wide multiplications and 6 additions or exclusive ors).
    """
    elements, extra = batch * size, passes - 1
    combine, update, inputs, box_muller = 4 * extra, 3 + 7, 3 + 2 * extra, 8 * passes
    flops = elements * (combine + update + inputs + box_muller)
    state, float32 = 2, 4  # x and x̂0_prev; bytes
    values = passes + state + 1 + (extra > 0)  # the predictions, the state, known and null values
    read = elements * (float32 * values + 1) + batch * tokens + float32 * (size + tokens)  # masks; modalities
    written = float32 * (elements * (state + passes) + batch * tokens * passes)  # the state, inputs and times
    return flops, read + written


def example_inputs(
    batch: int = 2,
    modalities: Sequence[tuple[int, int]] = ((256, 16), (64, 64)),  # (tokens, channels) of each
    passes: int = 2,
    live: int | None = None,  # passes with a prediction, default all
    steps: int = 25,
    dtype: torch.dtype = torch.float32,  # of the prediction
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, BatchConstants, SamplerState]:
    """Arguments of `cfg_step`, at step 0, of samples as `example_constants` makes them."""
    live = live or passes
    constants = example_constants(batch, modalities, passes, live, steps, generator)
    prediction = torch.randn(live * batch, constants.known.shape[1], generator=generator).to(device, dtype)
    constants = BatchConstants(*(tensor.to(device) for tensor in constants))
    state = new_state(constants)
    init_state(constants, state)
    return prediction, constants, state
