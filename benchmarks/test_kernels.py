"""Kernels: each operation of the engine against its peers, at the shapes of the compared preset.

To add a contender to an operation, add a line to its table.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.race import Contender
from benchmarks.workloads import measured_preset
from engine.kernels import adaln, attention, cfg_step, timestep

ROWS = (2, 32, 128)  # of the forward: two passes of 1, 16 and 64 samples
PARTS = ("shared", "image", "text")  # whose tokens attend to each other: in the shared stack all
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CUDA_ONLY = "runs on CUDA devices only"


def model_of(full: bool, rows: int, part: str = "shared"):
    """(the model whose shapes are measured, the tokens of one of its parts)."""
    if not full and (rows > 32 or part != "shared"):
        pytest.skip("more rows and other lengths only on a GPU or with --full")
    model = measured_preset(full).model
    return model, model.tokens if part == "shared" else model.modality(part).tokens


def generator() -> torch.Generator:
    """The same random numbers for every heat."""
    return torch.Generator().manual_seed(0)


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def table_of(contenders: dict, device, call, expected, dtype, **cost) -> dict[str, Contender | str]:
    """Contenders of a table {name: function or None where it needs CUDA}, each called by `call(function)`."""
    return {
        name: CUDA_ONLY
        if function is None or (name.startswith("cuda") and device.type != "cuda")
        else Contender(call(function), expected, TOLERANCE[dtype], within=_within(function), **cost)
        for name, function in contenders.items()
    }


def sdpa(backend):
    """SDPA on packed QKV, to be called within the choice of one implementation, which takes time of its own."""

    def run(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    run.within = partial(sdpa_kernel, [backend])
    return run


def _within(function):
    return getattr(function, "within", nullcontext)


def attention_in_products(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


ATTENTION = {
    "engine": attention.attention,
    "cuda Triton": partial(attention.attention, backend="triton"),
    "cuda xformers": partial(attention.attention, backend="xformers"),
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA math": sdpa(SDPBackend.MATH),
    "cuda SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "cuda SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "PyTorch products": attention_in_products,
    "Inductor products": compiled(attention_in_products),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("contender", ATTENTION)
def test_attention(compete, device, dtype, full, contender, rows, part):
    model, tokens = model_of(full, rows, part)
    heads, d = model.dim // model.head_dim, model.head_dim

    def build():
        qkv = attention.example_inputs(rows, tokens, heads, d, dtype, device, generator())
        reference = attention_in_products(qkv.float())
        flops, moved = attention.cost(rows, tokens, heads, d, qkv.itemsize)
        return table_of(ATTENTION, device, lambda f: lambda: f(qkv), lambda: reference, dtype, flops=flops, moved=moved)

    compete(f"attention, {rows} × {tokens} tokens, {heads} heads", contender, build)


def backward(function, inputs, weights, of):
    """A call that takes all gradients and returns that of input number `of`; the forward is done here, once."""
    with torch.enable_grad(), _within(function)():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
    return lambda: torch.autograd.grad(outputs, leaves, weights, retain_graph=True)[of]


ATTENTION_BACKWARD = {
    name: ATTENTION[name]
    for name in ("engine", "cuda Triton", "SDPA flash", "cuda SDPA cuDNN", "cuda SDPA efficient", "PyTorch products")
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("contender", ATTENTION_BACKWARD)
def test_attention_backward(compete, device, dtype, full, contender, rows, part):
    model, tokens = model_of(full, rows, part)
    heads, d = model.dim // model.head_dim, model.head_dim

    def build():
        qkv = attention.example_inputs(rows, tokens, heads, d, dtype, device, generator())
        weights = torch.randn(rows, tokens, heads * d, generator=generator()).to(device, dtype)
        reference = backward(attention_in_products, [qkv.float()], weights.float(), of=0)()
        flops, moved = attention.cost(rows, tokens, heads, d, qkv.itemsize)
        # Five products for the forward's two; QKV, the output and both their gradients.
        return table_of(ATTENTION_BACKWARD, device, lambda f: backward(f, [qkv], weights, of=0), lambda: reference,
                        dtype, flops=2.5 * flops, moved=2 * moved)  # fmt: skip

    compete(f"attention backward, {rows} × {tokens} tokens, {heads} heads", contender, build)


def layer_norm_modulate_in_pytorch(x, shift, scale):
    """As DiT writes it, with the time's vectors already gathered for every row: less work than the engine's."""
    return F.layer_norm(x, x.shape[-1:], eps=adaln.EPS) * (1 + scale) + shift


LAYER_NORM = {
    "engine": adaln.layer_norm_modulate,
    "cuda Triton": partial(adaln.layer_norm_modulate, backend="triton"),
    "cuda eager": partial(adaln.layer_norm_modulate, backend="torch"),
    "Inductor": compiled(partial(adaln.layer_norm_modulate, backend="torch")),
    "PyTorch, times gathered before (less work)": layer_norm_modulate_in_pytorch,
}
RESIDUAL = {
    "engine": adaln.gated_residual_modulate,
    "cuda Triton": partial(adaln.gated_residual_modulate, backend="triton"),
    "cuda eager": partial(adaln.gated_residual_modulate, backend="torch"),
    "Inductor": compiled(partial(adaln.gated_residual_modulate, backend="torch")),
    "PyTorch, times gathered before (less work)": lambda x, y, gate, shift, scale: layer_norm_modulate_in_pytorch(
        x + gate * y, shift, scale
    ),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("contender", LAYER_NORM)
@pytest.mark.parametrize("residual", [False, True], ids=["norm", "residual"])
def test_adaln(compete, device, dtype, full, contender, rows, residual):
    model, tokens = model_of(full, rows)
    dim = model.dim

    def build():
        x, y, table, index, vector = adaln.example_inputs(rows, tokens, dim, 1001, dtype, device, generator())
        index = index[:, :1].expand(-1, tokens).contiguous()  # one time a row
        gathered = (table[index[:, :1].long()].float() + vector.float()).to(dtype)  # [R, 1, 6·D]
        gathered = gathered.unflatten(-1, (adaln.CHUNKS, dim)).unbind(2)
        if device.type == "cpu":  # the times that occur, as `Denoiser` gives them there
            times, index = index.unique(return_inverse=True)
            table, index = table[times], index.int()

        def call(f):
            if f in (layer_norm_modulate_in_pytorch, RESIDUAL["PyTorch, times gathered before (less work)"]):
                if residual:
                    return lambda: f(x, y, gathered[2], gathered[3], gathered[4])
                return lambda: f(x, gathered[0], gathered[1])
            if residual:
                return lambda: f(x, y, table, index, vector, 2, 3, 4)[1]
            return lambda: f(x, table, index, vector, 0, 1)

        exact = [t.double() for t in (x, y, *gathered)]
        reference = layer_norm_modulate_in_pytorch(
            *((exact[0] + exact[4] * exact[1], *exact[5:7]) if residual else (exact[0], *exact[2:4]))
        )

        flops, moved = adaln.cost(rows, tokens, dim, x.itemsize, residual)
        return table_of(
            RESIDUAL if residual else LAYER_NORM, device, call, lambda: reference, dtype, flops=flops, moved=moved
        )

    name = "gated residual + LayerNorm + modulate" if residual else "LayerNorm + modulate"
    compete(f"{name}, {rows} × {tokens} tokens of {dim}", contender, build)


def residual_modulate_in_pytorch(x, y, table, index, vector, gate, shift, scale):
    m = (table[index.long()] + vector).chunk(6, -1)
    stream = x + m[gate] * y
    return stream, layer_norm_modulate_in_pytorch(stream, m[shift], m[scale])


RESIDUAL_BACKWARD = {
    "engine": adaln.gated_residual_modulate,
    "cuda Triton": partial(adaln.gated_residual_modulate, backend="triton"),
    "cuda eager": partial(adaln.gated_residual_modulate, backend="torch"),
    "PyTorch, gathered": residual_modulate_in_pytorch,
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("contender", RESIDUAL_BACKWARD)
def test_adaln_backward(compete, device, dtype, full, contender, rows):
    model, tokens = model_of(full, rows)
    dim, times = model.dim, rows + 2  # training has a time or two for each row

    def build():
        x, y, table, index, vector = adaln.example_inputs(rows, tokens, dim, times, dtype, device, generator())
        index = index[:, :1].expand(-1, tokens)  # one time a row
        inputs = [x, y, table, vector]
        weights = list(torch.randn(2, *x.shape, generator=generator()).to(device, dtype))

        def call(f, inputs=inputs, weights=weights):
            # The table's gradient is checked: it is made of those of x and of the output.
            return backward(lambda x, y, table, vector: f(x, y, table, index, vector, 2, 3, 4), inputs, weights, of=2)

        exact = call(residual_modulate_in_pytorch, *([x.double() for x in some] for some in (inputs, weights)))()
        flops, moved = adaln.cost(rows, tokens, dim, inputs[0].itemsize, residual=True)
        # Both outputs' gradients, the stream and y are read, dx and dy are written: 6 tensors for the forward's 4.
        return table_of(RESIDUAL_BACKWARD, device, call, lambda: exact, dtype, flops=2 * flops, moved=1.5 * moved)

    compete(f"adaLN backward, {rows} × {tokens} tokens of {dim}", contender, build)


def cat_and_linear(x, skip, joined, weight, bias):
    return F.linear(torch.cat([x, skip], dim=-1), weight, bias)


def two_products(x, skip, joined, weight, bias):
    left, right = weight.t().chunk(2)  # 2 × [D, D]
    out = torch.addmm(torch.addmm(bias, x.flatten(0, 1), left), skip.flatten(0, 1), right)
    return out.view_as(x)


SKIP = {
    "cat and linear": cat_and_linear,
    "two products added": two_products,
    "linear on a buffer filled before (less work)": lambda x, skip, joined, weight, bias: F.linear(
        joined, weight, bias
    ),
    "cuda Inductor": compiled(cat_and_linear),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("contender", SKIP)
def test_skip_connection(compete, device, dtype, full, contender, rows):
    """The buffer is filled beforehand: what a skip would cost if both producers wrote their halves into it."""
    model, tokens = model_of(full, rows)
    dim = model.dim

    def build():
        random, sizes = generator(), ((rows, tokens, dim), (rows, tokens, dim), (dim, 2 * dim), (dim,))
        x, skip, weight, bias = (torch.randn(size, generator=random).to(device, dtype) for size in sizes)
        inputs = x, skip, torch.cat([x, skip], dim=-1), weight, bias
        reference = cat_and_linear(*(t.float() for t in inputs))
        flops, moved = 4 * rows * tokens * dim**2, x.itemsize * (3 * x.numel() + weight.numel())
        return table_of(SKIP, device, lambda f: lambda: f(*inputs), lambda: reference, dtype, flops=flops, moved=moved)

    compete(f"skip connection, {rows} × {tokens} tokens of {dim}", contender, build)


def linear_then_gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def gelu_in_the_epilogue(x, weight, bias):
    """On CUDA it is the tanh GELU, on CPUs the other one."""
    return torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).unflatten(0, x.shape[:2])


FIRST_LAYER = {
    "linear, then GELU": linear_then_gelu,
    "cuda GELU in the epilogue": gelu_in_the_epilogue,
    "cuda Inductor": compiled(linear_then_gelu),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("contender", FIRST_LAYER)
def test_first_layer(compete, device, dtype, full, contender, rows):
    model, tokens = model_of(full, rows)
    dim, hidden = model.dim, model.mlp_ratio * model.dim

    def build():
        random, sizes = generator(), ((rows, tokens, dim), (hidden, dim), (hidden,))
        inputs = [torch.randn(size, generator=random).to(device, dtype) for size in sizes]
        reference = linear_then_gelu(*(t.float() for t in inputs))
        flops = 2 * rows * tokens * dim * hidden
        moved = inputs[0].itemsize * (rows * tokens * (dim + hidden) + dim * hidden)
        return table_of(FIRST_LAYER, device, lambda f: lambda: f(*inputs), lambda: reference, dtype,
                        flops=flops, moved=moved)  # fmt: skip

    compete(f"first MLP layer + GELU, {rows} × {tokens} tokens of {dim}", contender, build)


TIMESTEP = {
    "engine": timestep.timestep_table,
    "cuda Triton": partial(timestep.timestep_table, backend="triton"),
    "Inductor": compiled(partial(timestep.timestep_table, backend="torch")),
}


@pytest.mark.parametrize("contender", TIMESTEP)
def test_timestep(compete, device, dtype, full, contender):
    dim, frequencies, times = measured_preset(full).model.dim, 256, 1001

    def build():
        t, *layers = timestep.example_inputs(times, frequencies, dim, dim, dtype, device, generator())
        reference = timestep.timestep_table(t, *(tuple(w.float() for w in one) for one in layers))
        flops, moved = timestep.cost(times, frequencies, dim, dim, 6, layers[0][0].itemsize)
        return table_of(TIMESTEP, device, lambda f: lambda: f(t, *layers), lambda: reference, dtype,
                        flops=flops, moved=moved)  # fmt: skip

    compete(f"timestep table, {times} times, D {dim}", contender, build)


# Inductor's C++ draws other random numbers than PyTorch: it does not wrap Philox's 64-bit products around.
CFG_STEP = {
    "engine": cfg_step.cfg_step,
    "cuda Triton": partial(cfg_step.cfg_step, backend="triton"),
    "cuda eager": partial(cfg_step.cfg_step, backend="torch"),
    "cuda Inductor": compiled(partial(cfg_step.cfg_step, backend="torch")),
}


@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("contender", CFG_STEP)
def test_cfg_step(compete, device, full, contender, batch):
    """Every call is a step further, and past the last one still as much work; the first one is checked."""
    sizes = [(m.tokens, m.channels) for m in measured_preset(full).model.modalities]
    if not full:
        sizes = [(16, 32), (16, 32)]  # of the stored runs: the built-in model's images have 64 channels since
    size = sum(tokens * channels for tokens, channels in sizes)

    def build():
        prediction, constants, start = cfg_step.example_inputs(batch, sizes, device=device, generator=generator())

        def call(f):
            state = type(start)(*(tensor.clone() for tensor in start))

            def run():
                f(prediction, constants, state)
                return state.inputs

            return run

        flops, moved = cfg_step.cost(batch, size, sum(tokens for tokens, _ in sizes), passes=2)
        reference = call(CFG_STEP["cuda eager"])().clone()
        return table_of(CFG_STEP, device, call, lambda: reference, torch.float32, flops=flops, moved=moved,
                        facts={"dtype": "float32"})  # fmt: skip

    compete(f"cfg_step, {batch} rows of {size}", contender, build)
