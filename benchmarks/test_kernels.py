"""Kernels: each hot operation of the engine against its peers, at the shapes of the compared preset.

To add a contender to an operation, add a line to its table.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.race import Contender
from benchmarks.workloads import presets
from engine.batch import Row, batch_rows, new_progress
from engine.config import PRESETS
from engine.kernels import adaln, attention, cfg_step, timestep
from engine.schedule import NoiseSchedule, solver_table, timesteps

ROWS = (2, 32)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CUDA_ONLY = "runs on CUDA devices only"


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def table_of(contenders: dict, device, call, expected, dtype, **cost) -> dict[str, Contender | str]:
    """Contenders of a table {name: function or None where it needs CUDA}, each called by `call(function)`."""
    return {
        name: CUDA_ONLY
        if function is None or (name.startswith("cuda") and device.type != "cuda")
        else Contender(call(function), expected, TOLERANCE[dtype], **cost)
        for name, function in contenders.items()
    }


def sdpa(*backends):
    """SDPA on packed QKV, of the named implementations only."""

    def run(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return run


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


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("contender", ATTENTION)
def test_attention(compete, device, dtype, full, contender, rows):
    model = PRESETS[presets(full)].model
    heads, d = model.dim // model.head_dim, model.head_dim

    def build():
        qkv = torch.randn(rows, model.tokens, 3, heads, d, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        reference = attention_in_products(qkv.float())
        flops, moved = attention.cost(rows, model.tokens, heads, d, qkv.itemsize)
        return table_of(ATTENTION, device, lambda f: lambda: f(qkv), lambda: reference, dtype, flops=flops, moved=moved)

    compete(f"attention, {rows} × {model.tokens} tokens, {heads} heads", contender, build)


def layer_norm_modulate_in_pytorch(x, shift, scale):
    """As DiT writes it, with the time's vectors already gathered for every row: less work than the engine's."""
    return F.layer_norm(x, x.shape[-1:], eps=adaln.EPS) * (1 + scale) + shift


LAYER_NORM = {
    "engine": adaln.layer_norm_modulate,
    "cuda Triton": partial(adaln.layer_norm_modulate, backend="triton"),
    "cuda eager": partial(adaln.layer_norm_modulate, backend="torch"),
    "Inductor": compiled(partial(adaln.layer_norm_modulate, backend="torch")),
    "PyTorch, one time a row": layer_norm_modulate_in_pytorch,
}
RESIDUAL = {
    "engine": adaln.gated_residual_modulate,
    "cuda Triton": partial(adaln.gated_residual_modulate, backend="triton"),
    "cuda eager": partial(adaln.gated_residual_modulate, backend="torch"),
    "Inductor": compiled(partial(adaln.gated_residual_modulate, backend="torch")),
    "PyTorch, one time a row": lambda x, y, gate, shift, scale: layer_norm_modulate_in_pytorch(
        x + gate * y, shift, scale
    ),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("contender", LAYER_NORM)
@pytest.mark.parametrize("residual", [False, True], ids=["norm", "residual"])
def test_adaln(compete, device, dtype, full, contender, rows, residual):
    model = PRESETS[presets(full)].model
    dim, tokens = model.dim, model.tokens

    def build():
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(rows, tokens, dim, generator=generator).to(device, dtype) for _ in range(2))
        table, vector = (torch.randn(s, generator=generator).to(device, dtype) for s in ((1001, 6 * dim), (6 * dim,)))
        time = torch.randint(1001, (rows, 1), generator=generator, dtype=torch.int32).to(device)
        index = time.expand(-1, tokens).contiguous()
        gathered = (table[time.long()].float() + vector.float()).to(dtype).unflatten(-1, (6, dim)).unbind(2)

        def call(f):
            if f in (layer_norm_modulate_in_pytorch, RESIDUAL["PyTorch, one time a row"]):
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


TIMESTEP = {
    "engine": timestep.timestep_table,
    "cuda Triton": partial(timestep.timestep_table, backend="triton"),
    "Inductor": compiled(partial(timestep.timestep_table, backend="torch")),
}


@pytest.mark.parametrize("contender", TIMESTEP)
def test_timestep(compete, device, dtype, full, contender):
    dim, frequencies, times = PRESETS[presets(full)].model.dim, 256, 1001

    def build():
        generator = torch.Generator().manual_seed(0)

        def layer(out, into):
            weight = torch.randn(out, into, generator=generator) / into**0.5
            return weight.to(device, dtype), torch.zeros(out, device=device, dtype=dtype)

        layers = layer(dim, frequencies), layer(dim, dim), layer(6 * dim, dim)
        t = torch.arange(times, device=device)
        reference = timestep.timestep_table(t, *(tuple(w.float() for w in one) for one in layers))
        flops, moved = timestep.cost(times, frequencies, dim, dim, 6, layers[0][0].itemsize)
        return table_of(TIMESTEP, device, lambda f: lambda: f(t, *layers), lambda: reference, dtype,
                        flops=flops, moved=moved)  # fmt: skip

    compete(f"timestep table, {times} times, D {dim}", contender, build)


# Inductor's C++ draws other random numbers than PyTorch: it does not wrap Philox's 64-bit products around.
CFG_STEP = {
    "engine": cfg_step.cfg_step,
    "cuda eager": partial(cfg_step.cfg_step, backend="torch"),
    "cuda Inductor": compiled(partial(cfg_step.cfg_step, backend="torch")),
}


@pytest.mark.parametrize("batch", ROWS)
@pytest.mark.parametrize("contender", CFG_STEP)
def test_cfg_step(compete, device, full, contender, batch):
    model = PRESETS[presets(full)].model

    def build():
        generator = torch.Generator().manual_seed(0)
        table = solver_table(NoiseSchedule("cosine", 1000), timesteps(1000, 1000), prediction="v_prediction",
                             conditioning="renoise", guidance_scale=3.0)  # fmt: skip
        known = torch.randn(model.size, generator=generator)
        generate = torch.rand(model.size, generator=generator) < 0.5
        rows = batch_rows([Row(seed, table, generate, known) for seed in range(batch)], model, device)
        prediction = torch.randn(2 * batch, model.size, generator=generator).to(device)
        start = new_progress(rows)
        cfg_step.begin(rows, start)

        def call(f):
            progress = type(start)(*(tensor.clone() for tensor in start))

            def run():
                progress.step.zero_()  # always the same step, so that contenders do the same work
                progress.state.copy_(start.state), progress.x0_prev.copy_(start.x0_prev)
                f(prediction, rows, progress)
                return progress.inputs

            return run

        flops, moved = cfg_step.cost(batch, model.size, model.tokens, passes=2)
        reference = call(CFG_STEP["engine"])().clone()
        return table_of(CFG_STEP, device, call, lambda: reference, torch.float32, flops=flops, moved=moved,
                        facts={"dtype": "float32"})  # fmt: skip

    compete(f"cfg_step, {batch} rows of {model.size}", contender, build)
