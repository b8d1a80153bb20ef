"""The Triton kernel of cfg_step.py, in one launch of one program per block of elements and sample.

Each program reads its sample's step counter, and the sample's last program advances it.

Shapes: B samples, N elements of packed state, L tokens, M modalities, P passes, S steps.
"""

from engine.kernels import step_table
from engine.kernels.backend import jit, tl
from engine.kernels.philox import DROP_STREAM, STATE_STREAM, sample_normals

FROM_STATE_STREAM, FROM_DROP_STREAM = tl.constexpr(STATE_STREAM), tl.constexpr(DROP_STREAM)


@jit
def _column(
    LINE,  # [M, WIDTH] float32 or int32, one line of a sample's step table
    column,  # int
    modality,  # [BLOCK] int32
    M: tl.constexpr,  # modalities
    WIDTH: tl.constexpr,  # columns
):
    """A column for each element (or token) of a block. Modalities are few: selecting takes less than gathering."""
    value = tl.load(LINE + column)
    for m in tl.static_range(1, M):
        value = tl.where(modality == m, tl.load(LINE + m * WIDTH + column), value)
    return value


@jit
def _drops(
    kind,  # [BLOCK] int32, a `PassKind`
    generate,  # [BLOCK] bool
):
    """Whether a pass of this kind replaces an element (or token) by noise."""
    return (kind & tl.where(generate, step_table.DROPS_STATE, step_table.DROPS_KNOWN)) != 0


@jit
def _clean_estimate(
    PREDICTION,  # [LIVE·B, N] any float dtype
    at,  # [BLOCK] int32, the elements in a pass
    real,  # [BLOCK] bool, which of them exist
    pass_stride,  # int, B·N
    coefficients,  # pointer, [M, len(Coefficient)] float32 of the present step
    indices,  # pointer, [M, WIDTH] int32 of the present step
    modality,  # [BLOCK] int32
    x,  # [BLOCK] float32
    M: tl.constexpr,  # modalities
    WIDTH: tl.constexpr,  # columns of indices
    LIVE: tl.constexpr,  # passes that have a prediction
):
    """Guidance and x̂0, float32 [BLOCK]."""
    f_0 = tl.load(PREDICTION + at, mask=real, other=0.0).to(tl.float32)
    f = f_0
    for k in tl.static_range(LIVE - 1):
        w = _column(coefficients, step_table.W, modality, M, step_table.COEFFICIENTS)
        kind = _column(indices, step_table.PASS + k, modality, M, WIDTH)
        f_k = tl.load(PREDICTION + (k + 1) * pass_stride + at, mask=real, other=0.0).to(tl.float32)
        f += tl.where((kind & step_table.GUIDES) != 0, (w - 1) * (f_0 - f_k), 0.0)
    p = _column(coefficients, step_table.P, modality, M, step_table.COEFFICIENTS)
    q = _column(coefficients, step_table.Q, modality, M, step_table.COEFFICIENTS)
    return p * x + tl.where(q != 0, q * f, 0.0)


@jit
def _updated(
    X0_PREV,  # [B, N] float32
    X0_PREV2,  # [B, N] float32
    at,  # [BLOCK] int32, the elements
    real,  # [BLOCK] bool, which of them exist
    coefficients,  # pointer, [M, len(Coefficient)] float32 of the present step
    modality,  # [BLOCK] int32
    x,  # [BLOCK] float32
    x0,  # [BLOCK] float32
    z,  # [BLOCK] float32
    M: tl.constexpr,  # modalities
):
    """The solver's update and x̂0_prev, float32 [BLOCK] each."""
    COLUMNS: tl.constexpr = step_table.COEFFICIENTS
    x0_prev = tl.load(X0_PREV + at, mask=real, other=0.0)
    a = _column(coefficients, step_table.A, modality, M, COLUMNS)
    b = _column(coefficients, step_table.B, modality, M, COLUMNS)
    c = _column(coefficients, step_table.C, modality, M, COLUMNS)
    d = _column(coefficients, step_table.D, modality, M, COLUMNS)
    e = _column(coefficients, step_table.E, modality, M, COLUMNS)
    x = a * x + b * x0
    x += c * x0_prev
    x += d * z
    return x + e * tl.load(X0_PREV2 + at, mask=tl.where(e != 0, real, False), other=0.0), x0_prev


@jit
def _write_next_inputs(
    INPUTS,  # [PASSES·B, N] float32
    NULL,  # [B, N] float32
    at,  # [BLOCK] int32, the elements in a pass
    real,  # [BLOCK] bool, which of them exist
    pass_stride,  # int, B·N
    coefficients,  # pointer, [M, len(Coefficient)] float32 of the next step
    indices,  # pointer, [M, WIDTH] int32 of the next step
    modality,  # [BLOCK] int32
    generate,  # [BLOCK] bool
    x,  # [BLOCK] float32, the next state
    known,  # [BLOCK] float32
    xi,  # [BLOCK] float32, noise of the known part
    seed,  # int64
    element,  # [BLOCK] int32
    M: tl.constexpr,  # modalities
    WIDTH: tl.constexpr,  # columns of indices
    PASSES: tl.constexpr,  # P
):
    """The inputs of all passes."""
    known_alpha = _column(coefficients, step_table.KNOWN_ALPHA, modality, M, step_table.COEFFICIENTS)
    known_noise = _column(coefficients, step_table.KNOWN_SIGMA, modality, M, step_table.COEFFICIENTS) * xi
    conditional = tl.where(generate, x, known_alpha * known + known_noise)
    tl.store(INPUTS + at, conditional, mask=real)
    drop_draw = tl.load(indices + step_table.DROP_DRAW)  # all modalities have the same
    for k in tl.static_range(PASSES - 1):
        kind = _column(indices, step_table.PASS + k, modality, M, WIDTH)
        eta, _ = sample_normals(seed, element, drop_draw, FROM_DROP_STREAM + k)
        nulled = ((kind & step_table.NULLS_KNOWN) != 0) & ~generate
        null = tl.load(NULL + at, mask=real, other=0.0)
        kept = tl.where(nulled, known_alpha * null + known_noise, conditional)
        tl.store(INPUTS + (k + 1) * pass_stride + at, tl.where(_drops(kind, generate), eta, kept), mask=real)


@jit
def _write_next_times(
    TIMES,  # [PASSES·B, L] int32
    at,  # [TOKENS] int32, the tokens in a pass
    real,  # [TOKENS] bool, which of them exist
    pass_stride,  # int, B·L
    indices,  # pointer, [M, WIDTH] int32 of the next step
    modality,  # [TOKENS] int32
    generate,  # [TOKENS] bool
    M: tl.constexpr,  # modalities
    WIDTH: tl.constexpr,  # columns of indices
    PASSES: tl.constexpr,  # P
):
    """The tokens' times in all passes."""
    known_time = _column(indices, step_table.KNOWN_TIME, modality, M, WIDTH)
    drop_time = _column(indices, step_table.DROP_TIME, modality, M, WIDTH)
    time = tl.where(generate, _column(indices, step_table.TIME, modality, M, WIDTH), known_time)
    tl.store(TIMES + at, time, mask=real)
    for k in tl.static_range(PASSES - 1):
        kind = _column(indices, step_table.PASS + k, modality, M, WIDTH)
        tl.store(TIMES + (k + 1) * pass_stride + at, tl.where(_drops(kind, generate), drop_time, time), mask=real)


@jit
def cfg_step_kernel(
    PREDICTION,  # [LIVE·B, N] any float dtype
    SEEDS,  # [B] int64
    GENERATE,  # [B, N] bool
    KNOWN,  # [B, N] float32
    NULL,  # [B, N] float32
    MODALITY,  # [N] int32
    TOKEN_GENERATE,  # [B, L] bool
    TOKEN_MODALITY,  # [L] int32
    COEFFICIENTS,  # [B, S + 1, M, len(Coefficient)] float32
    INDICES,  # [B, S + 1, M, StepColumn.PASS + PASSES − 1] int32
    STEP,  # [B] int64, read and written
    STATE,  # [B, N] float32, read and written
    X0_PREV,  # [B, N] float32, read and written
    X0_PREV2,  # [B, N] float32, read where E is not 0, written where that of the next step is not 0
    INPUTS,  # [PASSES·B, N] float32, written
    TIMES,  # [PASSES·B, L] int32, written
    ARRIVED,  # [B] int32, counted up by a sample's programs, set to 0 by the last
    lines,  # int, S + 1
    batch,  # int, B
    N: tl.constexpr,  # elements
    L: tl.constexpr,  # tokens
    M: tl.constexpr,  # modalities
    PASSES: tl.constexpr,  # P, those that have inputs
    LIVE: tl.constexpr,  # P' ≤ P, those that have a prediction
    BLOCK: tl.constexpr,  # elements of a program
    TOKENS: tl.constexpr,  # tokens of a program
):
    """One step of BLOCK elements and TOKENS tokens of sample `program_id(1)`."""
    COLUMNS: tl.constexpr = step_table.COEFFICIENTS
    WIDTH: tl.constexpr = step_table.PASS + PASSES - 1
    sample = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real, at = element < N, sample * N + element
    seed, step = tl.load(SEEDS + sample), tl.load(STEP + sample)
    modality = tl.load(MODALITY + element, mask=real, other=0)
    line = (sample * lines + tl.minimum(step, lines - 1)) * M
    table, indices = COEFFICIENTS + line * COLUMNS, INDICES + line * WIDTH

    x = tl.load(STATE + at, mask=real, other=0.0)
    x0 = _clean_estimate(PREDICTION, at, real, batch * N, table, indices, modality, x, M, WIDTH, LIVE)
    z, xi = sample_normals(seed, element, (step + 1).to(tl.int32), FROM_STATE_STREAM)
    x, x0_prev = _updated(X0_PREV, X0_PREV2, at, real, table, modality, x, x0, z, M)
    generate = tl.load(GENERATE + at, mask=real, other=0) != 0
    known = tl.load(KNOWN + at, mask=real, other=0.0)
    x = tl.where(generate, x, known)
    tl.store(STATE + at, x, mask=real)
    tl.store(X0_PREV + at, x0, mask=real)

    line = (sample * lines + tl.minimum(step + 1, lines - 1)) * M
    table, indices = COEFFICIENTS + line * COLUMNS, INDICES + line * WIDTH
    e = _column(table, step_table.E, modality, M, COLUMNS)
    tl.store(X0_PREV2 + at, x0_prev, mask=tl.where(e != 0, real, False))
    _write_next_inputs(INPUTS, NULL, at, real, batch * N, table, indices, modality, generate, x, known, xi, seed,
                       element, M, WIDTH, PASSES)  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real, at = token < L, sample * L + token
    modality = tl.load(TOKEN_MODALITY + token, mask=real, other=0)
    generate = tl.load(TOKEN_GENERATE + at, mask=real, other=0) != 0
    _write_next_times(TIMES, at, real, batch * L, indices, modality, generate, M, WIDTH, PASSES)

    # Every program of the sample has read its step once it has arrived here.
    if tl.atomic_add(ARRIVED + sample, 1) == tl.num_programs(0) - 1:
        tl.store(STEP + sample, step + 1)
        tl.store(ARRIVED + sample, 0)
