"""cfg_step: everything a sampling step does between two forwards of the model, on the packed state, in one operation.

Every row of the batch carries its own seed, step counter, masks and solver table, so rows of different tasks, solvers,
step counts and progress share a batch, and a row's result does not depend on its neighbours. Let f_0 be the
prediction of the conditional pass and f_k that of extra pass k, u_k ∈ {0, 1} whether pass k guides an element, g the
generate mask, and p, q, a, b, c, d, w the row's coefficients at its step n:

    f    = f_0 + Σ_k (w − 1)·u_k·(f_0 − f_k)        classifier-free guidance; P = 2: f_u + w·(f_c − f_u)
    x̂0   = p·x + q·f
    x    ← a·x + b·x̂0 + c·x̂0_prev + d·z             any of the solvers of engine/schedule.py
    in_0 = g·x + (1 − g)·(known_alpha·x0 + known_sigma·ξ)
    in_k = in_0 with the elements that pass k drops replaced by pure noise η_k

with in_0, in_k and the tokens' times those of step n + 1. A row past the end of its table stays as it is. The
Triton kernel does all of it in one launch: each program reads its row's step, and the row's last one advances it.
Sources: joint infilling and masked guidance, arXiv 2311.16488 §3; guidance, Ho & Salimans 2022 (arXiv 2207.12598);
one pass per modality, UniDiffuser (arXiv 2303.06555) eq. 7; the generator, Salmon et al. 2011 (Philox-4x32-10).

Shapes: B rows, N elements of packed state, L tokens, P passes, S table rows. Everything is float32, whatever the
model computes in: one step's rounding in bfloat16 is larger than the update of a late step.
Nothing here reads a tensor on the host or branches on its values, so a step can be captured in a CUDA graph.
"""

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.backend import choose, jit, tl, triton


class Coefficient(IntEnum):
    """Columns of `Rows.coefficients`."""

    KNOWN_ALPHA = 0
    KNOWN_SIGMA = 1
    P = 2
    Q = 3
    A = 4
    B = 5
    C = 6
    D = 7
    W = 8


class Index(IntEnum):
    """Columns of `Rows.indices`; from GUIDED on, one `Guided` code per extra pass."""

    TIME = 0  # of generated tokens
    KNOWN_TIME = 1  # of known tokens
    DROP_TIME = 2  # of tokens that an extra pass replaced by noise
    DROP_DRAW = 3  # which draw that noise is: the step for fresh noise, 0 for one draw per request
    REFRESH = 4  # 0: the model may use its inner blocks' last result again; not read here
    GUIDED = 5


class Guided(IntEnum):
    """What an extra pass drops and which elements it guides.

    A code m ≥ 0 names a modality: everything known and every other modality is dropped, and only m is guided.
    """

    MASKED = -1  # drops the known elements, guides all
    EMPTY = -2  # replaces the known values by the row's null values, guides all
    OFF = -3  # the same input as the conditional pass, guides nothing


class Rows(NamedTuple):
    """What a batch's rows are: constant while they are sampled."""

    seeds: Tensor  # [B] int64, the 64 bits of each seed
    generate: Tensor  # [B, N] bool, True where the engine must produce the value
    known: Tensor  # [B, N] float32, read where generate is False
    null: Tensor  # [B, N] float32, what EMPTY passes know instead
    modality: Tensor  # [N] int32
    token_generate: Tensor  # [B, L] bool, True where any element of the token is generated
    token_modality: Tensor  # [L] int32
    coefficients: Tensor  # [B, S + 1, len(Coefficient)] float32, ending in a row of `IDENTITY`
    indices: Tensor  # [B, S + 1, Index.GUIDED + P − 1] int32, ending in OFF


class Progress(NamedTuple):
    """How far they have come: buffers that `begin` and `cfg_step` write in place."""

    step: Tensor  # [B] int64
    state: Tensor  # [B, N] float32; known elements hold their known values, always
    x0_prev: Tensor  # [B, N] float32, the previous step's x̂0
    inputs: Tensor  # [P·B, N] float32, pass-major: rows [0:B] conditional, [B:2B] the first extra pass, …
    times: Tensor  # [P·B, L] int32
    arrived: Tensor  # [B] int32, programs of the row that are done with the present step; 0 between launches


# A table row that leaves the state alone: pads shorter tables and ends each.
IDENTITY = tuple(float(column in (Coefficient.KNOWN_ALPHA, Coefficient.A, Coefficient.W)) for column in Coefficient)

# Third word of the Philox counter. Extra pass k draws from DROP_STREAM + k, so adding passes changes no other draw.
STATE_STREAM = 0  # draw 0: initial state and ξ of step 0; draw n + 1: z of step n and ξ of step n + 1
DROP_STREAM = 1

_WORD = 0xFFFFFFFF


def philox_4x32(counter: tuple, key: tuple, rounds: int = 10) -> tuple:
    """Philox-4x32: 4 counter words and 2 key words to 4 random words (Salmon et al., SC 2011, figure 4).

    Words are int64 tensors (of any shapes that broadcast) or ints, holding uint32 values.
    A 32×32-bit product may wrap around in int64; its 64 bits are right all the same.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def normals(seeds: Tensor, draw: Tensor, stream: int, size: int) -> tuple[Tensor, Tensor]:
    """Two independent N(0, 1) values for each (seed, element, draw, stream): float32 [B, size] each.

    `seeds` and `draw` are [B] int64. Key = seed, counter = (element, draw, stream, 0); Box–Muller on the first two
    words, u = (⌊bits/2⁸⌋ + ½)·2⁻²⁴ ∈ (0, 1], so |value| ≤ 5.9 and the logarithm is finite.
    """
    element = torch.arange(size, device=seeds.device)  # [N]
    key = (seeds & _WORD)[:, None], ((seeds >> 32) & _WORD)[:, None]  # [B, 1]
    bits0, bits1, _, _ = philox_4x32((element, draw[:, None], stream, 0), key)  # [B, N]
    radius = torch.sqrt(-2.0 * torch.log(_uniform(bits0)))
    angle = 2.0 * math.pi * _uniform(bits1)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _uniform(bits: Tensor) -> Tensor:
    return ((bits >> 8).float() + 0.5) * 2.0**-24


def initial_noise(seeds: Tensor, size: int) -> Tensor:
    """The state [B, size] float32 from which rows with these seeds ([B] int64) start."""
    return normals(seeds, torch.zeros_like(seeds), STATE_STREAM, size)[0]


def begin(rows: Rows, progress: Progress) -> None:
    """Sets every row to its step 0: initial noise, and the inputs and times of the first forward. In place."""
    progress.step.zero_()
    noise, xi = normals(rows.seeds, progress.step, STATE_STREAM, rows.known.shape[1])  # [B, N] each
    progress.state.copy_(torch.where(rows.generate, noise, rows.known))
    progress.x0_prev.zero_()
    _write_inputs(rows, progress, xi)


def cfg_step(prediction: Tensor, rows: Rows, progress: Progress, backend: str = "auto") -> None:
    """Advances every row by one step of its table, and writes the next forward's inputs and times. In place.

    `prediction` [P'·B, N], any float dtype: the model's output for the first P' ≤ P passes of `progress.inputs`; no
    row may need more (its codes for the others are OFF). Known elements of it are ignored, whatever they hold.
    `backend` is "auto", "torch" or "triton"; the two draw the same random bits.
    """
    batch, size = rows.known.shape
    chosen = choose("cfg_step", prediction, (batch, size), asked=backend)
    (_triton_step if chosen == "triton" else _torch_step)(prediction, rows, progress)


def _torch_step(prediction: Tensor, rows: Rows, progress: Progress) -> None:
    f_0, *f_extra = prediction.float().reshape(-1, *progress.state.shape)  # [B, N] each
    coefficients, indices = at_step(rows, progress)
    p, q, a, b, c, d, w = (coefficients[:, column, None] for column in range(Coefficient.P, len(Coefficient)))  # [B, 1]

    f = f_0
    for k, f_k in enumerate(f_extra):
        code = indices[:, Index.GUIDED + k, None]  # [B, 1]
        guides = (code == rows.modality) | (code == Guided.MASKED) | (code == Guided.EMPTY)  # [B, N]
        f = f + torch.where(guides, (w - 1) * (f_0 - f_k), 0.0)

    z, xi = normals(rows.seeds, progress.step + 1, STATE_STREAM, rows.known.shape[1])  # [B, N] each
    x0 = p * progress.state + q * f
    x = a * progress.state + b * x0 + c * progress.x0_prev + d * z
    progress.state.copy_(torch.where(rows.generate, x, rows.known))
    progress.x0_prev.copy_(x0)
    progress.step.add_(1)
    _write_inputs(rows, progress, xi)


def at_step(rows: Rows, progress: Progress) -> tuple[Tensor, Tensor]:
    """Each row's line of its tables: [B, len(Coefficient)] and [B, Index.GUIDED + P − 1]."""
    line = progress.step.clamp(max=rows.coefficients.shape[1] - 1)[:, None, None]  # the last line is IDENTITY
    coefficients = rows.coefficients.gather(1, line.expand(-1, 1, rows.coefficients.shape[2]))
    indices = rows.indices.gather(1, line.expand(-1, 1, rows.indices.shape[2]))
    return coefficients[:, 0], indices[:, 0]


def _write_inputs(rows: Rows, progress: Progress, xi: Tensor) -> None:
    """The inputs and times of all passes at the rows' present steps; ξ [B, N] is the known part's noise."""
    coefficients, indices = at_step(rows, progress)
    known_alpha = coefficients[:, Coefficient.KNOWN_ALPHA, None]  # [B, 1]
    known_noise = coefficients[:, Coefficient.KNOWN_SIGMA, None] * xi  # [B, N]
    time, known_time, drop_time = (indices[:, i, None] for i in (Index.TIME, Index.KNOWN_TIME, Index.DROP_TIME))
    inputs = progress.inputs.view(-1, *progress.state.shape)  # [P, B, N]
    times = progress.times.view(inputs.shape[0], inputs.shape[1], -1)  # [P, B, L]

    inputs[0] = torch.where(rows.generate, progress.state, known_alpha * rows.known + known_noise)
    times[0] = torch.where(rows.token_generate, time, known_time)
    for k in range(inputs.shape[0] - 1):
        code = indices[:, Index.GUIDED + k, None]  # [B, 1]
        eta, _ = normals(rows.seeds, indices[:, Index.DROP_DRAW].long(), DROP_STREAM + k, rows.known.shape[1])  # [B, N]
        nulled = (code == Guided.EMPTY) & ~rows.generate
        kept = torch.where(nulled, known_alpha * rows.null + known_noise, inputs[0])
        inputs[k + 1] = torch.where(_dropped(code, rows.generate, rows.modality), eta, kept)
        times[k + 1] = torch.where(_dropped(code, rows.token_generate, rows.token_modality), drop_time, times[0])


def _dropped(code: Tensor, generate: Tensor, modality: Tensor) -> Tensor:
    """Which elements (or tokens) a pass with this code [B, 1] replaces by noise: [B, N] (or [B, L])."""
    drops_known = (code >= 0) | (code == Guided.MASKED)
    drops_others = (code >= 0) & (code != modality)
    return (drops_known & ~generate) | drops_others


# ------------------------------------------------------------------------------------------------- kernel


@jit
def _normals(seed, element, draw, stream):
    """`normals` of one row: two float32 values for each element."""
    bits0, bits1, _, _ = tl.philox(seed, element, draw, stream, 0)
    u0 = ((bits0 >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2⁻²⁴
    u1 = ((bits1 >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    radius, angle = tl.sqrt(-2.0 * tl.log(u0)), 6.283185307179586 * u1
    return radius * tl.cos(angle), radius * tl.sin(angle)


@jit
def _drops(code, generate, modality):
    """`_dropped` of one row: whether a pass with this code replaces an element (or token) by noise."""
    return ((code >= -1) & ~generate) | ((code >= 0) & (code != modality))


@jit
def _cfg_step(PREDICTION, SEEDS, GENERATE, KNOWN, NULL, MODALITY, TOKEN_GENERATE, TOKEN_MODALITY, COEFFICIENTS, INDICES,
              STEP, STATE, X0_PREV, INPUTS, TIMES, ARRIVED, lines, batch, N: tl.constexpr, L: tl.constexpr,
              PASSES: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """One step of BLOCK elements and TOKENS tokens of row `program_id(1)`. Column numbers: `Coefficient`, `Index`."""
    row = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = element < N
    at = row * N + element
    step = tl.load(STEP + row)
    line = COEFFICIENTS + (row * lines + tl.minimum(step, lines - 1)) * 9
    p, q, w = tl.load(line + 2), tl.load(line + 3), tl.load(line + 8)
    a, b, c, d = tl.load(line + 4), tl.load(line + 5), tl.load(line + 6), tl.load(line + 7)
    codes = INDICES + (row * lines + tl.minimum(step, lines - 1)) * (4 + PASSES) + 5

    # Guidance, x̂0 and the solver's update
    modality = tl.load(MODALITY + element, mask=real, other=0)
    f_0 = tl.load(PREDICTION + at, mask=real, other=0.0).to(tl.float32)
    f = f_0
    for k in tl.static_range(LIVE - 1):
        code = tl.load(codes + k)
        guides = (code == modality) | (code == -1) | (code == -2)
        f_k = tl.load(PREDICTION + (k + 1) * batch * N + at, mask=real, other=0.0).to(tl.float32)
        f += tl.where(guides, (w - 1) * (f_0 - f_k), 0.0)
    seed = tl.load(SEEDS + row)
    z, xi = _normals(seed, element, (step + 1).to(tl.int32), 0)
    x = tl.load(STATE + at, mask=real, other=0.0)
    x0 = p * x + q * f
    x = a * x + b * x0 + c * tl.load(X0_PREV + at, mask=real, other=0.0) + d * z
    generate = tl.load(GENERATE + at, mask=real, other=0) != 0
    known = tl.load(KNOWN + at, mask=real, other=0.0)
    x = tl.where(generate, x, known)
    tl.store(STATE + at, x, mask=real)
    tl.store(X0_PREV + at, x0, mask=real)

    # The next step's inputs and times
    following = row * lines + tl.minimum(step + 1, lines - 1)
    line, index = COEFFICIENTS + following * 9, INDICES + following * (4 + PASSES)
    known_alpha, known_sigma = tl.load(line), tl.load(line + 1)
    time, known_time = tl.load(index), tl.load(index + 1)
    drop_time, drop_draw = tl.load(index + 2), tl.load(index + 3)
    kept = tl.where(generate, x, known_alpha * known + known_sigma * xi)
    tl.store(INPUTS + at, kept, mask=real)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists, token_at = token < L, row * L + token
    token_generate = tl.load(TOKEN_GENERATE + token_at, mask=exists, other=0) != 0
    token_modality = tl.load(TOKEN_MODALITY + token, mask=exists, other=0)
    token_time = tl.where(token_generate, time, known_time)
    tl.store(TIMES + token_at, token_time, mask=exists)
    for k in tl.static_range(PASSES - 1):
        code = tl.load(index + 5 + k)
        eta, _ = _normals(seed, element, drop_draw, 1 + k)
        null = tl.load(NULL + at, mask=real, other=0.0)
        nulled = tl.where((code == -2) & ~generate, known_alpha * null + known_sigma * xi, kept)
        tl.store(INPUTS + (k + 1) * batch * N + at, tl.where(_drops(code, generate, modality), eta, nulled), mask=real)
        dropped = _drops(code, token_generate, token_modality)
        tl.store(TIMES + (k + 1) * batch * L + token_at, tl.where(dropped, drop_time, token_time), mask=exists)

    # Every program of the row has read its step once it has arrived here.
    if tl.atomic_add(ARRIVED + row, 1) == tl.num_programs(0) - 1:
        tl.store(STEP + row, step + 1)
        tl.store(ARRIVED + row, 0)


def _triton_step(prediction: Tensor, rows: Rows, progress: Progress) -> None:
    (batch, size), tokens = rows.known.shape, rows.token_modality.shape[0]
    lines, width = rows.indices.shape[1:]
    assert all(tensor.is_contiguous() for tensor in (*rows, *progress))
    # Small batches need small blocks to reach all processors.
    block = min(1024 if batch >= 16 else 256, triton.next_power_of_2(size))
    blocks = triton.cdiv(size, block)
    _cfg_step[blocks, batch](
        prediction.contiguous(), *rows[:-2], rows.coefficients, rows.indices, *progress, lines, batch, N=size, L=tokens,
        PASSES=width - Index.GUIDED + 1, LIVE=prediction.shape[0] // batch, BLOCK=block,
        TOKENS=triton.next_power_of_2(triton.cdiv(tokens, blocks)), num_warps=4,
    )  # fmt: skip


def cost(batch: int, size: int, tokens: int, passes: int) -> tuple[int, int]:
    """(FLOPs, bytes) of one `cfg_step` done in one launch, every tensor read and written once.

    FLOPs count float arithmetic, 8 for a Box–Muller pair; the integer work is one Philox call per pass and element
    (10 rounds of 2 wide multiplications and 6 additions or exclusive ors).
    """
    elements = batch * size
    combine, update, inputs, box_muller = 4 * (passes - 1), 3 + 7, 3 + 2 * (passes - 1), 8 * passes
    flops = elements * (combine + update + inputs + box_muller)
    read = elements * (4 * passes + 4 + 4 + 4 + 4 + 1) + batch * tokens  # f, x, x̂0_prev, known, null, generate
    written = elements * (4 + 4 + 4 * passes) + 4 * batch * tokens * passes  # x, x̂0_prev, inputs; times
    return flops, read + written
