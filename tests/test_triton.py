"""Triton's kernels against float64, in Triton's interpreter where there is no GPU: small odd shapes, strides, dtypes.

Memory that a kernel should have written and did not is NaN. bfloat16 products are wrong in the interpreter, so they are
left to the tests that need a GPU.
"""

import pytest
import torch

from engine.batch import Row, batch_rows, new_progress
from engine.config import PRESETS
from engine.kernels import adaln, cfg_step, timestep
from engine.kernels.adaln import gated_residual, gated_residual_modulate, layer_norm_modulate
from engine.kernels.attention import attention
from engine.kernels.backend import jit, tl
from engine.schedule import NoiseSchedule, solver_table, timesteps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
DIM = 24


GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fills what `torch.empty` returns with NaN, and starts the test's random numbers anew."""
    GENERATOR.manual_seed(0)
    monkeypatch.setenv(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # PyTorch fills in its deterministic mode, which wants this
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=None):
    """Other numbers at every call, the same in every run; with a seed, those of the seed."""
    generator = GENERATOR if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def rms(x):
    return x.double().square().mean().sqrt().item()


def assert_as_exact_as_torch(ours, torchs, exact, name=""):
    """At most twice PyTorch's error in the same dtype; the rest is for results of which PyTorch has every bit."""
    assert ours.dtype == torchs.dtype and ours.shape == exact.shape, name
    allowed = 2 * rms(torchs - exact) + 1e-3 * torch.finfo(ours.dtype).eps * rms(exact)
    assert rms(ours - exact) <= allowed, (name, rms(ours - exact) / rms(torchs - exact))


def differentiated(function, inputs, dtype, **options):
    """(outputs, gradients of the inputs) of a function under fixed random weights."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    outputs = function(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((out * normal(*out.shape, seed=9 + i).to(dtype)).sum() for i, out in enumerate(outputs)).backward()
    return [*outputs, *(leaf.grad for leaf in leaves)]


def compare(function, inputs, dtype):
    rounded = [x.to(dtype) for x in inputs]
    exact = differentiated(function, rounded, torch.float64, backend=None)
    torchs = differentiated(function, rounded, dtype, backend="torch")
    ours = differentiated(function, rounded, dtype, backend="triton")
    for i, values in enumerate(zip(ours, torchs, exact, strict=True)):
        assert_as_exact_as_torch(*values, name=f"output or gradient {i}")


def attend(qkv, backend):
    """Textbook attention in qkv's dtype without a backend; PyTorch's own is SDPA."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if backend == "torch":
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    if backend:
        return attention(qkv, backend)
    out = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, tokens, heads, head_dim", [(2, 37, 2, 32), (1, 64, 1, 64), (1, 80, 1, 128), (1, 16, 2, 64)]
)
def test_attention_and_its_gradient(rows, tokens, heads, head_dim, dtype):
    compare(attend, [normal(rows, tokens, 3, heads, head_dim).mul(1.5)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_one_token_is_its_value(dtype):
    qkv = normal(3, 1, 3, 2, 64).to(dtype)
    out, gradient = differentiated(attend, [qkv], dtype, backend="triton")
    assert torch.equal(out, qkv[:, :, 2].flatten(2))
    torch.testing.assert_close(gradient[:, :, 2].flatten(2), normal(*out.shape, seed=9).to(dtype), rtol=1e-5, atol=0)
    assert rms(gradient[:, :, :2]) <= torch.finfo(torch.float32).eps * rms(qkv) * 64  # of 64 summed products


def test_attention_takes_any_strides():
    storage = normal(2, 3, 5, 2, 13, 2 * 32)  # [H, 3, …]: every axis in another place than in [B, L, 3, H, d]
    qkv = storage[:, :, 0, :, :, ::2].permute(2, 3, 1, 0, 4)  # [2, 13, 3, 2, 32]
    assert not qkv.is_contiguous()
    compare(lambda x, backend: attend(x.permute(3, 2, 0, 1, 4).permute(2, 3, 1, 0, 4), backend), [qkv], torch.float32)
    torch.testing.assert_close(attention(qkv, "triton"), attention(qkv.contiguous(), "triton"), rtol=0, atol=0)


@pytest.mark.parametrize("sign", [-1, 1])
def test_attention_of_large_logits_stays_finite(sign):
    qkv = 30 * normal(1, 21, 3, 1, 64)
    qkv[:, :, 1] = sign * qkv[:, :, 0]  # each query's own key wins, or loses, by thousands
    ours, *gradients = differentiated(attend, [qkv], torch.float32, backend="triton")
    torch.testing.assert_close(ours.double(), attend(qkv.double(), None), rtol=1e-4, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in gradients)


def time_of(inputs, times, rows, tokens):
    """The index of every token, a slice of a longer row of indices; it jumps about in the table."""
    index = torch.arange(rows * (tokens + 3)).mul(8).remainder(times).reshape(rows, tokens + 3).int()
    return index.to(inputs.device)[:, 2:-1]


def modulate(x, table, vector, index, backend):
    if backend:
        return layer_norm_modulate(x, table, index, vector, 3, 1, backend)
    m = (table[index.long()] + vector).chunk(6, -1)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + m[1]) + m[3]


def residual(x, y, table, vector, index, backend):
    if backend:
        return gated_residual(x, y, table, index, vector, 5, backend)
    return x + (table[index.long()] + vector).chunk(6, -1)[5] * y


def residual_modulate(x, y, table, vector, index, backend):
    if backend:
        return gated_residual_modulate(x, y, table, index, vector, 5, 3, 1, backend)
    stream = residual(x, y, table, vector, index, None)
    return stream, modulate(stream, table, vector, index, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, tokens, dim, times", [(3, 7, DIM, 5), (2, 33, 192, 11), (1, 1, 40, 1)])
@pytest.mark.parametrize("operation", [modulate, residual, residual_modulate])
def test_adaln_and_its_gradients(operation, rows, tokens, dim, times, dtype):
    # Slices of a longer sequence, as the branches of the model see them.
    x = normal(rows, tokens + 4, dim)[:, 1:-3]
    inputs = [x] if operation is modulate else [x, normal(rows, tokens + 2, dim)[:, 2:]]
    inputs += [normal(times, 6 * dim), normal(6 * dim)]
    index = time_of(x, times, rows, tokens)
    compare(lambda *a, backend: operation(*a, index, backend), inputs, dtype)


def test_gradients_of_times_that_no_token_has_are_zero():
    x, table, vector = normal(2, 40, DIM), normal(7, 6 * DIM), normal(6 * DIM)
    index = torch.full((2, 40), 4, dtype=torch.int32, device=DEVICE)
    _, _, dtable, _ = differentiated(lambda *a, backend: modulate(*a, index, backend), [x, table, vector],
                                     torch.float32, backend="triton")  # fmt: skip
    assert dtable[4].any() and not dtable[[0, 1, 2, 3, 5, 6]].any()


def test_layer_norm_keeps_its_precision_far_from_zero():
    x, table, vector = normal(2, 5, DIM) + 3000, normal(3, 6 * DIM), normal(6 * DIM)
    compare(lambda *a, backend: modulate(*a, time_of(x, 3, 2, 5), backend), [x, table, vector], torch.float32)


def test_channels_beyond_the_kernels_are_refused_or_left_to_torch():
    x, table, vector = normal(1, 2, 4100), normal(1, 6 * 4100), normal(6 * 4100)
    index = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="'triton' does not take sizes"):
        modulate(x, table, vector, index, "triton")
    assert modulate(x, table, vector, index, "auto").isfinite().all()


def exact_table(times, layers):
    """The timestep table's formula in float64."""
    channels = layers[0][0].shape[1]
    omega = 10000.0 ** (-torch.arange(channels // 2, dtype=torch.float64, device=DEVICE) / (channels // 2))
    h = torch.cat([(times[:, None] * omega).cos(), (times[:, None] * omega).sin()], dim=1)
    for i, (weight, bias) in enumerate(layers):
        h = torch.nn.functional.silu(h) if i else h
        h = h @ weight.double().T + bias.double()
    return h


def compare_timestep_tables(times, frequencies, hidden, dim, dtype):
    sizes = [(hidden, frequencies), (dim, hidden), (6 * dim, dim)]
    layers = [((normal(*size) / size[1] ** 0.5).to(dtype), normal(size[0]).to(dtype)) for size in sizes]
    ours, torchs = (timestep.timestep_table(times, *layers, backend=backend) for backend in ("triton", "torch"))
    assert_as_exact_as_torch(ours, torchs, exact_table(times, layers))
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_timestep_table(dtype):
    times = torch.tensor([1000, 0, 3, 3, *range(30)], device=DEVICE)
    ours = compare_timestep_tables(times, 16, 20, 24, dtype)
    assert torch.equal(ours[2], ours[3])


def test_timestep_table_has_no_backward_and_says_so():
    layers = [(normal(20, 16).requires_grad_(), normal(20)), (normal(24, 20), normal(24)), (normal(48, 24), normal(48))]
    with pytest.raises(ValueError, match="timestep: 'triton'"):
        timestep.timestep_table(torch.arange(3, device=DEVICE), *layers, backend="triton")


@jit
def _philox_words(SEED, OUT, N: tl.constexpr):
    element = tl.arange(0, N)
    words = tl.philox(tl.load(SEED), element, 7, 3, 0)
    for i in tl.static_range(4):
        tl.store(OUT + i * N + element, words[i].to(tl.int64) & 0xFFFFFFFF)


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, -(2**63), -1, 2**32])
def test_philox_words_are_the_references_bit_for_bit(seed):
    seeds, out = torch.tensor([seed], device=DEVICE), torch.zeros(4, 64, dtype=torch.int64, device=DEVICE)
    _philox_words[(1,)](seeds, out, N=64)
    key = seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF
    reference = cfg_step.philox_4x32((torch.arange(64, device=DEVICE), 7, 3, 0), key)
    for ours, exact in zip(out, reference, strict=True):
        assert torch.equal(ours, exact)


def mixed_rows():
    """Four rows of other solvers, guidances, conditionings, lengths, masks and seeds."""
    model, schedule = PRESETS["tiny"].model, NoiseSchedule("cosine", 1000)
    both = {"guided_modalities": (0, 1)}
    rows = []
    for i, (solver, guidance, more) in enumerate([
        ("dpm++", "masked", {}), ("ddpm", "unidiffuser", both), ("ddim", "empty", {"eta": 1.0}),
        ("ddim", "alternate", both),
    ]):  # fmt: skip
        table = solver_table(
            schedule, timesteps(1000, 3 + i), prediction="v_prediction", solver=solver, guidance=guidance,
            conditioning="renoise" if i % 2 else "clean", guidance_scale=2.5, **more,
        )  # fmt: skip
        generate = torch.rand(model.size, generator=torch.Generator().manual_seed(i)) < 0.5
        if i % 2 == 0:  # clean conditioning knows whole tokens
            generate = torch.zeros(model.size, dtype=torch.bool)
            generate[model.state_slices["image"]] = True
        rows.append(Row(2**63 + i * 12345678901, table, generate, normal(model.size, seed=i).cpu(),
                        normal(model.size, seed=5).cpu()))  # fmt: skip
    return batch_rows(rows, model, DEVICE)


def in_double(progress):
    return type(progress)(*(x.double() if x.is_floating_point() else x.clone() for x in progress))


def exact_step(prediction, rows, progress):
    """The reference's step in float64, Box-Muller included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        cfg_step.cfg_step(prediction, rows._replace(coefficients=rows.coefficients.double()), progress, "torch")


def compare_steps(rows, predictions):
    """Triton's steps against PyTorch's in float32 and float64, all from the same start."""
    ours, torchs = new_progress(rows), new_progress(rows)
    cfg_step.begin(rows, ours)
    cfg_step.begin(rows, torchs)
    exact = in_double(ours)
    for step, prediction in enumerate(predictions):
        cfg_step.cfg_step(prediction, rows, ours, "triton")
        cfg_step.cfg_step(prediction, rows, torchs, "torch")
        exact_step(prediction, rows, exact)
        for name, *values in zip(ours._fields, ours, torchs, exact, strict=True):
            if values[0].is_floating_point():
                assert_as_exact_as_torch(*values, name=f"{name} after step {step}")
            else:
                assert torch.equal(values[0], values[1]), f"{name} after step {step}"
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cfg_step_is_as_exact_as_the_reference_for_rows_of_all_kinds(dtype):
    rows = mixed_rows()
    size = new_progress(rows).inputs.shape
    compare_steps(rows, [normal(*size).to(dtype) for _ in range(8)])  # past the end of every table


def test_cfg_step_of_fewer_live_passes_leaves_the_others_unread():
    rows = mixed_rows()
    rows.indices[..., cfg_step.Index.GUIDED :] = cfg_step.Guided.OFF
    ours = compare_steps(rows, [normal(*new_progress(rows).state.shape)])
    assert ours.step.tolist() == [1] * 4 and not ours.arrived.any()


def test_operations_are_registered_as_torch_compile_wants_them():
    index = torch.zeros(2, 5, dtype=torch.int32, device=DEVICE)
    x, table, vector = (normal(*s).requires_grad_() for s in ((2, 5, DIM), (3, 6 * DIM), (6 * DIM,)))
    qkv = normal(1, 5, 3, 1, 32).requires_grad_()
    dout, dh = normal(1, 5, 32), normal(2, 5, DIM)
    layers = [normal(20, 16), normal(20), normal(24, 20), normal(24), normal(48, 24), normal(48)]
    torch.use_deterministic_algorithms(False)
    ops = torch.ops.psunet
    torch.library.opcheck(ops.attention.default, (qkv,))
    torch.library.opcheck(ops.timestep_table.default, (torch.arange(3.0, device=DEVICE), layers))
    saved = [t.detach() for t in (qkv, *ops.attention(qkv))]
    torch.library.opcheck(ops.attention_backward.default, (dout, *saved))
    for y, chunks in ((None, (adaln.NONE, 3, 1)), (x, (5, adaln.NONE, adaln.NONE)), (x, (5, 3, 1))):
        torch.library.opcheck(ops.adaln.default, (x, y, table, index, vector, *chunks))
        stream, _, mean, rstd = (t.detach() for t in ops.adaln(x, y, table, index, vector, *chunks))
        normed, y = x.detach() if y is None else stream, None if y is None else y.detach()
        saved = (normed, y, mean, rstd, table.detach(), index, vector.detach())
        torch.library.opcheck(ops.adaln_backward.default, (dh, dh, *saved, *chunks))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [320, 256, 64, 77, 333])
@pytest.mark.parametrize("rows", [2, 32, 128])
def test_attention_at_the_models_shapes(rows, tokens, dtype):
    compare(attend, [normal(rows, tokens, 3, 8, 64)], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [320, 333])
def test_attention_of_128_channels(tokens):
    compare(attend, [normal(2, tokens, 3, 4, 128)], torch.bfloat16)


def adaln_inputs(rows, tokens, dim):
    return [normal(rows, tokens, dim), normal(rows, tokens, dim), normal(66, 6 * dim), normal(6 * dim)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows, dim", [(2, 512), (128, 512), (8, 192), (8, 576), (8, 768), (8, 1152)])
def test_adaln_at_the_models_widths(rows, dim, dtype):
    inputs = adaln_inputs(rows, 320, dim)
    index = time_of(inputs[0], 66, rows, 320)
    compare(lambda *a, backend: residual_modulate(*a, index, backend), inputs, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [320, 256, 64, 77, 333])
def test_adaln_at_the_models_lengths(tokens, dtype):
    inputs = adaln_inputs(32, tokens, 512)
    index = time_of(inputs[0], 66, 32, tokens)
    compare(lambda *a, backend: residual_modulate(*a, index, backend), inputs, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_timestep_table_at_the_models_shape(dtype):
    compare_timestep_tables(torch.arange(1001, device=DEVICE), 256, 512, 512, dtype)


def alike_rows(batch, model):
    """Rows of one solver with masks and values of their own."""
    schedule, steps = NoiseSchedule("cosine", 1000), timesteps(1000, 10)
    table = solver_table(schedule, steps, prediction="v_prediction", conditioning="renoise", guidance_scale=3.0)
    known = normal(2 * batch, model.size).cpu()
    return batch_rows([Row(i, table, known[i] < 0, known[batch + i]) for i in range(batch)], model, DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_cfg_step_at_the_models_shape(batch, dtype):
    rows = alike_rows(batch, PRESETS["coco256"].model)
    size = new_progress(rows).inputs.shape
    compare_steps(rows, [normal(*size).to(dtype) for _ in range(12)])


@pytest.mark.gpu
def test_a_thousand_repeats_are_bit_identical():
    torch.use_deterministic_algorithms(False)
    qkv, (x, y, table, vector) = normal(4, 320, 3, 8, 64), adaln_inputs(4, 320, 512)
    index, rows, times = (
        time_of(x, 66, 4, 320),
        alike_rows(4, PRESETS["coco256"].model),
        torch.arange(51, device=DEVICE),
    )
    start = new_progress(rows)
    cfg_step.begin(rows, start)
    prediction = normal(*start.inputs.shape).bfloat16()
    sizes = (512, 256), (512,), (512, 512), (512,), (3072, 512), (3072,)
    layers = [normal(*size).bfloat16() for size in sizes]

    def adaln_step(*leaves, backend):
        return residual_modulate(*leaves, index, backend)

    def run():
        progress = type(start)(*(tensor.clone() for tensor in start))
        cfg_step.cfg_step(prediction, rows, progress, "triton")
        results = differentiated(attend, [qkv], torch.bfloat16, backend="triton")
        results += differentiated(adaln_step, [x, y, table, vector], torch.bfloat16, backend="triton")
        pairs = list(zip(layers[::2], layers[1::2], strict=True))
        return [*results, *progress, timestep.timestep_table(times, *pairs, backend="triton")]

    first = run()
    for _ in range(1000):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
