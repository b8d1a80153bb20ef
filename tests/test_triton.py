"""Triton's kernels against float64, in Triton's interpreter where there is no GPU: small odd shapes, strides, dtypes.

Memory that a kernel should have written and did not is NaN. bfloat16 products are wrong in the interpreter, so they are
left to the tests that need a GPU.
"""

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    assert_as_exact_as_torch,
    check_registration,
    example,
    loops,
    normal,
    poisoned,  # noqa: F401
    rms,
)

from engine.kernels import adaln, attention, cfg_step, timestep
from engine.kernels.backend import BackendError, jit, tl
from engine.kernels.philox import normals, philox_4x32, sample_normals
from engine.kernels.sampler_state import at_step
from engine.kernels.step_table import NOOP_STEP, Coefficient

DIM = 24


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
        return attention.attention(qkv, backend)
    out = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, tokens, heads, head_dim", [(2, 37, 2, 32), (1, 64, 1, 64), (1, 80, 1, 128), (1, 16, 2, 64)]
)
def test_attention_and_its_gradient(rows, tokens, heads, head_dim, dtype):
    compare(attend, [1.5 * example(attention, rows, tokens, heads, head_dim)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_one_token_is_its_value(dtype):
    qkv = example(attention, 3, 1, 2, 64, dtype=dtype)
    out, gradient = differentiated(attend, [qkv], dtype, backend="triton")
    assert torch.equal(out, qkv[:, :, 2].flatten(2))
    torch.testing.assert_close(gradient[:, :, 2].flatten(2), normal(*out.shape, seed=9).to(dtype), rtol=1e-5, atol=0)
    assert rms(gradient[:, :, :2]) <= torch.finfo(torch.float32).eps * rms(qkv) * 64  # of 64 summed products


def test_attention_takes_any_strides():
    storage = normal(2, 3, 5, 2, 13, 2 * 32)  # [H, 3, …]: every axis in another place than in [B, L, 3, H, d]
    qkv = storage[:, :, 0, :, :, ::2].permute(2, 3, 1, 0, 4)  # [2, 13, 3, 2, 32]
    assert not qkv.is_contiguous()
    compare(lambda x, backend: attend(x.permute(3, 2, 0, 1, 4).permute(2, 3, 1, 0, 4), backend), [qkv], torch.float32)
    ours, contiguous = (attention.attention(x, "triton") for x in (qkv, qkv.contiguous()))
    assert torch.equal(ours, contiguous)


@pytest.mark.parametrize("sign", [-1, 1])
def test_attention_of_large_logits_stays_finite(sign):
    qkv = 30 * example(attention, 1, 21, 1, 64)
    qkv[:, :, 1] = sign * qkv[:, :, 0]  # each query's own key wins, or loses, by thousands
    ours, *gradients = differentiated(attend, [qkv], torch.float32, backend="triton")
    torch.testing.assert_close(ours.double(), attend(qkv.double(), None), rtol=1e-4, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in gradients)


def modulate(x, table, vector, index, backend):
    if backend:
        return adaln.layer_norm_modulate(x, table, index, vector, 3, 1, backend)
    m = (table[index.long()] + vector).chunk(6, -1)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + m[1]) + m[3]


def residual(x, y, table, vector, index, backend):
    if backend:
        return adaln.gated_residual(x, y, table, index, vector, 5, backend)
    return x + (table[index.long()] + vector).chunk(6, -1)[5] * y


def residual_modulate(x, y, table, vector, index, backend):
    if backend:
        return adaln.gated_residual_modulate(x, y, table, index, vector, 5, 3, 1, backend)
    stream = residual(x, y, table, vector, index, None)
    return stream, modulate(stream, table, vector, index, None)


@loops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, tokens, dim, times", [(3, 7, DIM, 5), (2, 17, 136, 4), (1, 1, 40, 1)])
@pytest.mark.parametrize("operation", [modulate, residual, residual_modulate])
def test_adaln_and_its_gradients(operation, rows, tokens, dim, times, dtype):
    x, y, table, index, vector = example(adaln, rows, tokens + 4, dim, times)
    x, y, index = x[:, 1:-3], y[:, 4:], index[:, 2:-2]  # slices of a longer sequence, as in the model's branches
    inputs = [x, table, vector] if operation is modulate else [x, y, table, vector]
    compare(lambda *a, backend: operation(*a, index, backend), inputs, dtype)


@loops
def test_gradients_of_times_that_no_token_has_are_zero():
    x, _, table, index, vector = example(adaln, 2, 40, DIM, times=7)
    index.fill_(4)
    _, _, dtable, _ = differentiated(lambda *a, backend: modulate(*a, index, backend), [x, table, vector],
                                     torch.float32, backend="triton")  # fmt: skip
    assert dtable[4].any() and not dtable[[0, 1, 2, 3, 5, 6]].any()


@loops
def test_layer_norm_keeps_its_precision_far_from_zero():
    x, _, table, index, vector = example(adaln, 2, 5, DIM, times=3)
    compare(lambda *a, backend: modulate(*a, index, backend), [x + 3000, table, vector], torch.float32)


def test_channels_beyond_the_kernels_are_refused_or_left_to_torch():
    x, _, table, index, vector = example(adaln, 1, 2, 4100, times=1)
    with pytest.raises(BackendError, match="^adaln: 'triton' takes at most 2048 channels .*; use torch or auto$"):
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
    _, *layers = example(timestep, len(times), frequencies, hidden, dim, dtype=dtype)
    ours, torchs = (timestep.timestep_table(times, *layers, backend=backend) for backend in ("triton", "torch"))
    assert_as_exact_as_torch(ours, torchs, exact_table(times, layers))
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_timestep_table(dtype):
    times = torch.tensor([1000, 0, 3, 3, *range(30)], device=DEVICE)
    ours = compare_timestep_tables(times, 16, 20, 24, dtype)
    assert torch.equal(ours[2], ours[3])


def test_timestep_table_has_no_backward_and_says_so():
    times, *layers = example(timestep, 3, 16, 20, 8)
    layers[0][0].requires_grad_()
    with pytest.raises(BackendError, match="^timestep: 'triton' has no backward .*; use torch or auto$"):
        timestep.timestep_table(times, *layers, backend="triton")


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
    reference = philox_4x32((torch.arange(64, device=DEVICE), 7, 3, 0), key)
    for ours, exact in zip(out, reference, strict=True):
        assert torch.equal(ours, exact)


@jit
def _write_normals(SEED, OUT, draw, stream, N: tl.constexpr):
    element = tl.arange(0, N)
    first, second = sample_normals(tl.load(SEED), element, draw, stream)
    tl.store(OUT + element, first)
    tl.store(OUT + N + element, second)


@pytest.mark.parametrize("seed", [5, -1])
def test_normals_are_the_references_to_rounding(seed):
    seeds, out = torch.tensor([seed], device=DEVICE), torch.zeros(2, 1024, device=DEVICE)
    _write_normals[(1,)](seeds, out, 7, 3, N=1024)
    first, second = normals(seeds, torch.tensor([7], device=DEVICE), 3, 1024)
    torch.testing.assert_close(out, torch.cat([first, second]), rtol=1e-5, atol=1e-6)


ONE, TWO, THREE = ((9, 7),), ((16, 16), (6, 8)), ((5, 3), (1, 1), (4, 11))  # (tokens, channels) of each modality


def copy_of(state, dtype=None):
    return type(state)(*(x.to(dtype, copy=True) if dtype and x.is_floating_point() else x.clone() for x in state))


def exact_step(prediction, constants, state):
    """The reference's step in float64, Box-Muller included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        constants = constants._replace(coefficients=constants.coefficients.double())
        cfg_step.cfg_step(prediction, constants, state, "torch")


def compare_steps(constants, ours, predictions):
    """Triton's steps against PyTorch's in float32 and float64, all from the same start."""
    torchs, exact = copy_of(ours), copy_of(ours, torch.float64)
    for step, prediction in enumerate(predictions):
        ours.inputs.fill_(float("nan")), ours.times.fill_(-1)  # to be written anew
        cfg_step.cfg_step(prediction, constants, ours, "triton")
        cfg_step.cfg_step(prediction, constants, torchs, "torch")
        exact_step(prediction, constants, exact)
        line = at_step(constants, ours)[0][:, constants.modality.long()]  # [B, N, len(Coefficient)]
        kept = line[..., Coefficient.E] != 0
        for name, *values in zip(ours._fields, ours, torchs, exact, strict=True):
            if name == "x0_prev2":  # elsewhere the kernel does not write it
                values = [x.where(kept, 1.0) for x in values]
            if values[0].is_floating_point():
                assert_as_exact_as_torch(*values, name=f"{name} after step {step}")
            else:
                assert torch.equal(values[0], values[1]), f"{name} after step {step}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("modalities, passes", [(ONE, 2), (TWO, 1), (TWO, 3), (THREE, 4)])
def test_cfg_step_is_as_exact_as_the_reference_for_samples_of_all_kinds(modalities, passes, dtype):
    prediction, constants, state = example(cfg_step, 3, modalities, passes, steps=4, dtype=dtype)
    more = [normal(*prediction.shape).to(dtype) for _ in range(4)]  # past the end of every table
    compare_steps(constants, state, [prediction, *more])


def test_cfg_step_of_fewer_live_passes_leaves_the_others_unread():
    prediction, constants, state = example(cfg_step, 4, TWO, passes=3, live=1)
    compare_steps(constants, state, [prediction])
    assert state.step.tolist() == [1] * 4 and not state.arrived.any()


def test_nan_in_the_prediction_of_resting_modalities_and_known_elements_goes_nowhere():
    prediction, constants, state = example(cfg_step, 3, TWO, passes=2)
    resting = constants.modality == 1
    constants.coefficients[:, :, 1] = torch.tensor(NOOP_STEP, device=DEVICE)
    prediction.view(2, 3, -1)[:, resting | ~constants.generate] = float("nan")
    before = state.state.clone()
    cfg_step.cfg_step(prediction, constants, state, "triton")
    assert torch.equal(state.state[:, resting], before[:, resting])
    assert state.state.isfinite().all() and state.inputs.isfinite().all()


@pytest.mark.parametrize("name", ["coefficients", "indices"])
def test_tables_of_another_width_are_refused(name):
    prediction, constants, state = example(cfg_step, 2, TWO)
    narrow = getattr(constants, name)[..., :-1].contiguous()
    with pytest.raises(AssertionError):
        cfg_step.cfg_step(prediction, constants._replace(**{name: narrow}), state, "triton")


def test_attention_is_registered_for_compilation():
    ops, qkv = torch.ops.psunet, example(attention, 1, 5, 1, 32)
    check_registration(ops.attention, qkv.clone().requires_grad_())
    check_registration(ops.attention_backward, normal(1, 5, 32), qkv, *ops.attention(qkv))


def test_timestep_table_is_registered_for_compilation():
    times, *layers = example(timestep, 3, 16, 20, 8)
    check_registration(torch.ops.psunet.timestep_table, times.float(), [tensor for layer in layers for tensor in layer])


@loops
@pytest.mark.parametrize(
    "chunks", [(adaln.NONE, 3, 1), (5, adaln.NONE, adaln.NONE), (5, 3, 1)], ids=["norm", "residual", "both"]
)
def test_adaln_is_registered_for_compilation(chunks):
    ops, (x, y, table, index, vector) = torch.ops.psunet, example(adaln, 2, 5, DIM, times=2)
    y = None if chunks[0] == adaln.NONE else y
    stream, _, mean, rstd = ops.adaln(x, y, table, index, vector, *chunks)
    saved = (x if y is None else stream, y, mean, rstd, table, index, vector)
    check_registration(ops.adaln_backward, normal(*x.shape), normal(*x.shape), *saved, *chunks)
    x, y, table, vector = (None if t is None else t.clone().requires_grad_() for t in (x, y, table, vector))
    check_registration(ops.adaln, x, y, table, index, vector, *chunks)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [320, 256, 64, 77, 333])
@pytest.mark.parametrize("rows", [2, 32, 128])
def test_attention_at_the_models_shapes(rows, tokens, dtype):
    compare(attend, [example(attention, rows, tokens)], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [320, 333])
def test_attention_of_128_channels(tokens):
    compare(attend, [example(attention, 2, tokens, 4, 128)], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows, dim", [(2, 512), (128, 512), (8, 192), (8, 576), (8, 768), (8, 1152)])
def test_adaln_at_the_models_widths(rows, dim, dtype):
    x, y, table, index, vector = example(adaln, rows, 320, dim)
    compare(lambda *a, backend: residual_modulate(*a, index, backend), [x, y, table, vector], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [320, 256, 64, 77, 333])
def test_adaln_at_the_models_lengths(tokens, dtype):
    x, y, table, index, vector = example(adaln, 32, tokens, 512)
    compare(lambda *a, backend: residual_modulate(*a, index, backend), [x, y, table, vector], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_timestep_table_at_the_models_shape(dtype):
    compare_timestep_tables(torch.arange(1001, device=DEVICE), 256, 512, 512, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_cfg_step_at_the_models_shape(batch, dtype):
    prediction, constants, state = example(cfg_step, batch, steps=10, dtype=dtype)
    compare_steps(constants, state, [prediction, *(normal(*prediction.shape).to(dtype) for _ in range(11))])


@pytest.mark.gpu
def test_a_thousand_repeats_are_bit_identical():
    torch.use_deterministic_algorithms(False)
    qkv, (x, y, table, index, vector) = example(attention, 4), example(adaln, 4)
    prediction, constants, start = example(cfg_step, 4, dtype=torch.bfloat16)
    times, *layers = example(timestep, dtype=torch.bfloat16)

    def adaln_step(*leaves, backend):
        return residual_modulate(*leaves, index, backend)

    def run():
        state = copy_of(start)
        cfg_step.cfg_step(prediction, constants, state, "triton")
        results = differentiated(attend, [qkv], torch.bfloat16, backend="triton")
        results += differentiated(adaln_step, [x, y, table, vector], torch.bfloat16, backend="triton")
        return [*results, *state, timestep.timestep_table(times, *layers, backend="triton")]

    first = run()
    for _ in range(1000):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
