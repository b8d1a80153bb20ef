"""The peers of `benchmarks/test_peers.py` compute what the engine computes, or do not take part."""

import sys
from functools import partial

import pytest
import torch

from benchmarks.peers import Exported, diffusers_call, unidiffuser_shape
from benchmarks.race import Contender, Refusal
from benchmarks.test_peers import built
from benchmarks.workloads import forward_inputs, random_model
from engine.model.denoiser import Denoiser
from engine.presets import PRESETS

CPU, TINY = torch.device("cpu"), PRESETS["tiny"]
PEERS = {"openvino": ["openvino"], "onnx_runtime": ["onnxruntime", "onnx", "onnxscript"]}
PATCH = TINY.codecs["image"].settings["patch"]


def denoiser_and_inputs(model):
    return Denoiser(random_model(model, CPU, torch.float32), 1000), forward_inputs(model, 2, CPU)


@torch.no_grad()
def test_diffusers_unidiffuser_computes_the_same_from_the_same_weights():
    denoiser, inputs = denoiser_and_inputs(unidiffuser_shape(TINY.model))
    call = diffusers_call(denoiser, *inputs, PATCH)
    assert Contender(call, partial(denoiser, *inputs), 1e-5).mismatch() is None
    denoiser.network.out_blocks[0].skip_norm.bias.add_(0.1)  # diffusers' model has the weights of before
    assert "relative error" in Contender(call, partial(denoiser, *inputs), 1e-5).mismatch()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of exporters, in other packages
@pytest.mark.parametrize("shape", [lambda model: model, unidiffuser_shape], ids=["PS-U-Net", "UniDiffuser"])
@pytest.mark.parametrize(
    "peer, packages", [("openvino", ["openvino"]), ("onnx_runtime", ["onnxruntime", "onnxscript"])]
)
def test_an_exported_network_computes_the_same(shape, peer, packages):
    for package in packages:
        pytest.importorskip(package, reason="an optional peer, extra [peers]")
    denoiser, inputs = denoiser_and_inputs(shape(TINY.model))
    with torch.no_grad():
        call = getattr(Exported(denoiser, inputs), peer)(threads=1)
        assert Contender(call, partial(denoiser, *inputs), 1e-5).mismatch() is None


@pytest.mark.parametrize("peer, packages", PEERS.items())
def test_a_peer_without_its_package_is_left_out_and_one_that_fails_is_refused(monkeypatch, peer, packages):
    exported = Exported(*denoiser_and_inputs(TINY.model))
    monkeypatch.setitem(sys.modules, packages[0], None)
    reason = built(partial(getattr(exported, peer), threads=1))
    assert "psunet-engine[peers]" in reason and not isinstance(reason, Refusal)
    refusal = built(partial(int, "not a number"))
    assert isinstance(refusal, Refusal) and "ValueError" in refusal
