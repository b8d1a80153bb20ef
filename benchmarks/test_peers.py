"""Peers: one call of the denoiser in the engine, and with the same weights in OpenVINO, ONNX Runtime and diffusers.

Networks are PS-U-Net, and UniDiffuser's with as many parameters, which diffusers has too. All contenders take the same
inputs, and one whose output differs is refused. The packages come with the extra `[peers]`; without, they are skipped.
On a CPU each number of threads is a group; "matrix products and attention alone" is what no contender can beat with
PyTorch's libraries.
"""

import os
from contextlib import contextmanager
from functools import lru_cache, partial

import pytest
import torch

from benchmarks.peers import Exported, diffusers_call, unidiffuser_shape
from benchmarks.questions import PRODUCTS
from benchmarks.race import Contender, Refusal
from benchmarks.roofline import forward_operations
from benchmarks.test_forward import TOLERANCE
from benchmarks.workloads import forward_inputs, measured_preset, products, random_model
from engine.model.cost import forward_flops
from engine.model.denoiser import Denoiser
from engine.sampling.graphs import set_up

NETWORKS = {"PS-U-Net": lambda model: model, "UniDiffuser": unidiffuser_shape}
OPENVINO_PRECISION = {torch.float32: "f32", torch.bfloat16: "bf16"}
CONTENDERS = ("eager", "compiled", "OpenVINO", "ONNX Runtime", PRODUCTS)
PAIRS = [(network, contender) for network in NETWORKS for contender in CONTENDERS] + [("UniDiffuser", "diffusers")]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [2, 8, 32])
@pytest.mark.parametrize("network, contender", PAIRS)
def test_peers(compete, predict, device, dtype, full, network, contender, rows, threads):
    if device.type != "cpu" and threads > 1:
        pytest.skip("threads matter on a CPU only")
    if device.type == "cpu" and threads > len(os.sched_getaffinity(0)):
        pytest.skip("this process may use one core only")

    def build():
        with thread_count(threads):
            return contenders_of(network, full, rows, threads, device, dtype, predict)

    counted = f"{threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device.type
    compete(f"peers, {network}, {rows} rows, {counted}", contender, build)


def contenders_of(network, full, rows, threads, device, dtype, predict):
    """{name: Contender, or why it cannot take part}."""
    config = measured_preset(full)
    model = NETWORKS[network](config.model)
    inputs = forward_inputs(model, rows, device)
    networks = [random_model(model, device, dtype) for _ in range(2)]
    set_up(networks[1], device, compile=True)
    eager, compiled = (Denoiser(module, config.diffusion.timesteps) for module in networks)
    facts = {"flops": forward_flops(model, rows), "within": partial(thread_count, threads)}
    facts["facts"] = {"rows": rows, "threads": threads}
    checked = {"expected": partial(eager, *inputs), "tolerance": TOLERANCE[dtype], **facts}
    static = facts["facts"] | predict(forward_operations(model, rows, dtype, device.type))
    contenders = {
        "eager": Contender(checked["expected"], **facts | {"facts": static}),
        "compiled": Contender(partial(compiled, *inputs), **checked | {"facts": static}),
        PRODUCTS: Contender(products(eager, *inputs), **facts),
    }
    others = {"OpenVINO": "computes on a CPU only here", "ONNX Runtime": "computes on a CPU only here"}
    if device.type == "cpu":
        exported = exported_of(network, full, rows)
        others["OpenVINO"] = partial(exported.openvino, threads, OPENVINO_PRECISION[dtype])
        others["ONNX Runtime"] = partial(exported.onnx_runtime, threads)
        if dtype != torch.float32:
            others["ONNX Runtime"] = "computes in float32 only here"
    if network == "UniDiffuser":
        others["diffusers"] = partial(diffusers_call, eager, *inputs, config.codecs["image"].settings["patch"])
    for name, make in others.items():
        call = make if isinstance(make, str) else built(make)
        contenders[name] = call if isinstance(call, str) else Contender(call, **checked)
    return contenders


def built(make):
    """The call that a peer makes; the reason to skip it if its package is missing, to refuse it if it fails."""
    try:
        return make()
    except ImportError as error:
        return f"pip install 'psunet-engine[peers]' ({error})"
    except Exception as error:
        return Refusal(f"cannot be built: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


@lru_cache(maxsize=1)  # groups that differ in threads only share what was exported
def exported_of(network, full, rows):
    config, cpu = measured_preset(full), torch.device("cpu")
    model = NETWORKS[network](config.model)
    denoiser = Denoiser(random_model(model, cpu, torch.float32), config.diffusion.timesteps)
    return Exported(denoiser, forward_inputs(model, rows, cpu))


@contextmanager
def thread_count(threads):
    """Within it, PyTorch computes in so many threads on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
