"""Which implementation runs: by argument, environment, measurement or default; and no graph break in torch.compile."""

import json
import logging
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels import backend
from engine.model.blocks import Block, quantize_blocks
from engine.model.psunet import PSUNet
from engine.presets import PRESETS

SIZES = (2, 320, 64)


class OnGPU:
    """As much of a CUDA tensor as a decision reads."""

    device, dtype = torch.device("cuda", 0), torch.bfloat16


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device of family sm_90 on which nothing was measured."""
    monkeypatch.setattr(backend, "family", lambda device: "sm_90")
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "MEASUREMENTS", {})
    backend._announce.cache_clear()
    yield
    backend._announce.cache_clear()


@pytest.fixture
def measured(gpu, monkeypatch, tmp_path):
    """The same with a measured.json of these lines."""

    def write(*lines):
        path = tmp_path / "measured.json"
        path.write_text(json.dumps(lines))
        monkeypatch.setattr(backend, "MEASUREMENTS", backend.read_measurements(path))

    return write


def line(sizes, dtype="bfloat16", family="sm_90", **microseconds):
    return {"family": family, "operation": "attention", "dtype": dtype, "sizes": sizes, "microseconds": microseconds}


def test_the_fastest_measured_at_the_nearest_sizes_is_chosen(measured):
    measured(
        line([2, 320, 64], triton=3.0, sdpa=4.0), line([128, 320, 64], triton=90.0, cudnn=80.0, sdpa=85.0),
        line([2, 320, 64], dtype="float16", flash=1.0), line([2, 320, 64], family="sm_80", flash=1.0),
    )  # fmt: skip
    assert backend.choose("attention", OnGPU, (2, 333, 64)) == "triton"
    assert backend.choose("attention", OnGPU, (100, 320, 64)) == "cudnn"


def test_what_was_never_measured_takes_the_default(gpu):
    for operation, default in backend.UNMEASURED.items():
        assert backend.choose(operation, OnGPU, SIZES) == default


def test_the_argument_wins_over_the_environment_and_that_over_the_measurement(measured, monkeypatch):
    measured(line([2, 320, 64], triton=3.0))
    monkeypatch.setitem(backend.ENVIRONMENT, "attention", "flash")
    assert backend.choose("attention", OnGPU, SIZES) == "flash"
    assert backend.choose("attention", OnGPU, SIZES, asked="cudnn") == "cudnn"


def test_a_fallback_is_announced_once(gpu, caplog):
    caplog.set_level(logging.INFO, "engine.kernels")
    for _ in range(3):
        assert backend.choose("adaln", OnGPU, (2, 320, 9000), unsupported="takes few channels") == "torch"
        assert backend.choose("adaln", OnGPU, (2, 320, 512)) == "triton"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "adaln: torch (Triton's kernel takes few channels)"),
        ("INFO", "adaln: triton (nothing measured on this device)"),
    ]


def test_without_triton_cuda_falls_back_to_torch(gpu, monkeypatch):
    monkeypatch.setattr(backend, "triton", None)
    assert backend.choose("cfg_step", OnGPU, (2, 64)) == "torch"
    with pytest.raises(backend.BackendError, match="'triton' is not installed; install triton"):
        backend.choose("cfg_step", OnGPU, (2, 64), asked="triton")


@pytest.mark.parametrize("asked, message", [
    ("triton", "'triton' needs a CUDA device; use sdpa or auto"), ("xformers", "needs a CUDA device"),
    ("cudnn", "needs a CUDA device"), ("fast", "'fast' is not known; use one of auto, sdpa, cudnn"),
])  # fmt: skip
def test_what_cannot_run_on_a_cpu_is_refused(asked, message, monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(backend.BackendError, match=f"^attention: .*{message}"):
        backend.choose("attention", torch.zeros(1), SIZES, asked=asked)


def test_a_bad_environment_variable_is_named_and_the_error_has_fields(monkeypatch):
    monkeypatch.setitem(backend.ENVIRONMENT, "adaln", "fast")
    with pytest.raises(backend.BackendError) as caught:
        backend.choose("adaln", torch.zeros(1), SIZES)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):  # a worker process sends errors pickled
        assert isinstance(error, ValueError)
        fields = error.argument, error.value, error.problem, error.remedy
        assert fields == ("PSUNET_ADALN", "fast", "is not known", "use one of auto, torch, triton")
        assert str(error) == "PSUNET_ADALN: 'fast' is not known; use one of auto, torch, triton"


def test_what_a_kernel_does_not_take_is_refused_where_it_was_asked_for_only(gpu):
    reason = {"unsupported": "takes at most 8 channels"}
    assert backend.choose("adaln", OnGPU, (2, 3, 9), **reason) == "torch"
    message = r"^adaln: 'triton' takes at most 8 channels \(sizes \(2, 3, 9\)\); use torch or auto$"
    with pytest.raises(backend.BackendError, match=message):
        backend.choose("adaln", OnGPU, (2, 3, 9), "triton", **reason)


def test_cpus_take_pytorch_for_everything():
    assert {o: backend.choose(o, torch.zeros(1), SIZES) for o in backend.BACKENDS} == backend.PORTABLE


def test_every_operation_has_its_backends_default_and_variable():
    assert backend.BACKENDS.keys() == backend.UNMEASURED.keys() == backend.ENVIRONMENT.keys()
    assert all(backend.UNMEASURED[o] in backend.BACKENDS[o] for o in backend.BACKENDS)


def test_the_engine_works_where_triton_has_no_wheels():
    code = "import sys; sys.modules['triton'] = None\n"
    code += "import torch\nfrom engine.presets import PRESETS\nfrom engine.model.psunet import PSUNet\n"
    code += "m = PSUNet(PRESETS['tiny'].model); n = PRESETS['tiny'].model\n"
    code += "print(m(torch.zeros(1, n.size), m.time_table(torch.arange(2)), torch.zeros(1, n.tokens).int()).shape)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "torch.Size" in done.stdout, done.stderr


def traced(config, asked="auto", rows=2, device="cuda", trained=False, **options):
    """The targets of all nodes of Dynamo's graph of the model on fake tensors; `fullgraph` raises at a break."""
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.device("meta"):
        model = PSUNet(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device).train(trained).requires_grad_(trained)
        for block in model.blocks():
            block.attention = asked
        inputs, table = torch.empty(rows, config.size, device=device), torch.empty(7, 6 * config.dim, device=device)
        index = torch.empty(rows, config.tokens, dtype=torch.int32, device=device)
        out = torch.compile(model, fullgraph=True, backend=collect, **options)(inputs, table, index)
    torch._dynamo.reset()
    assert out.shape == (rows, config.size) and out.requires_grad == trained and len(graphs) == 1
    return [str(node.target) for node in graphs[0].graph.nodes]


@pytest.mark.parametrize("asked", ["triton", "sdpa"])
def test_dynamo_traces_the_whole_model_for_cuda_without_a_gpu(asked, gpu):
    called = traced(PRESETS["tiny"].model, asked)
    assert any("psunet.adaln" in name for name in called)
    assert any("psunet.attention" in name for name in called) == (asked == "triton")


@pytest.mark.parametrize("trained", [False, True], ids=["sampling", "training"])
def test_dynamo_traces_the_depth_of_the_full_model(trained, gpu, monkeypatch):
    full, tiny = PRESETS["coco256"].model, PRESETS["tiny"].model
    depths = {m.name: m.depth for m in full.modalities}
    modalities = tuple(replace(m, depth=depths[m.name]) for m in tiny.modalities)
    config = replace(tiny, modalities=modalities, shared_depth=full.shared_depth)
    if trained:  # fake CUDA tensors with gradients want a CUDA build of PyTorch; the kernels trace alike on a CPU
        monkeypatch.setattr(backend, "INTERPRETED", True)
        monkeypatch.setitem(backend.ENVIRONMENT, "adaln", "triton")
    called = traced(config, "triton", device="cpu" if trained else "cuda", trained=trained)
    blocks = full.shared_depth + 2 * sum(depths.values())
    assert sum("psunet.attention" in name for name in called) == blocks
    assert sum("psunet.adaln" in name for name in called) == 3 * blocks + len(depths)


class Launches(TorchDispatchMode):
    """Counts the operations that launch something: all but views and new memory."""

    FREE = ("device", "empty", "new_empty", "detach", "alias", "_unsafe_view", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("skip", "most"), [(False, 7), (True, 8)])
@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_block_takes_few_launches_on_a_gpu(skip, most, eight_bits, gpu):
    config, rows = PRESETS["coco256"].model, 2
    with torch.device("meta"):
        block = Block.from_config(config, skip=skip)
        if eight_bits:
            quantize_blocks([block])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), torch.device("cuda"):
        block.to_empty(device="cuda")
        x, y, table = torch.empty(rows, 320, 512), torch.empty(rows, 320, 512), torch.empty(7, 6 * 512)
        index = torch.empty(rows, 320, dtype=torch.int32)
        with Launches() as launches:
            block(x, y if skip else None, table, index)
    assert 5 < len(launches.names) <= most, launches.names


@pytest.mark.parametrize("dynamic", [True, False])
def test_dynamo_traces_a_choice_by_measurement(dynamic, measured):
    few, many = [2, 22, 64], [64, 22, 64]
    measured(line(few, "float32", sdpa=2.0, triton=3.0), line(many, "float32", sdpa=3.0, triton=2.0))
    called = traced(PRESETS["tiny"].model, rows=60, dynamic=dynamic)
    assert any("psunet.attention" in name for name in called)
