"""What the tests of Triton's kernels share: devices, random inputs, memory that is poisoned, and bounds on errors."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="no Triton for this platform")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]

GENERATOR = torch.Generator()


def version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


loops = pytest.mark.skipif(
    DEVICE == "cpu" and version(triton) < (3, 7) and version(np) >= (2, 4),
    reason="Triton 3.6's interpreter cannot loop up to a number that the kernel computes, with numpy 2.4 or later",
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fills what `torch.empty` returns with NaN, and restarts the test's random numbers."""
    GENERATOR.manual_seed(0)
    # PyTorch fills memory in its deterministic mode, which needs this.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=None):
    """Different numbers at every call, the same in every run; with a seed, those of the seed."""
    generator = GENERATOR if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def example(module, *sizes, **options):
    """Inputs of a kernel from the test's random numbers."""
    return module.example_inputs(*sizes, device=DEVICE, generator=GENERATOR, **options)


def rms(x):
    return x.double().square().mean().sqrt().item()


def assert_as_exact_as_torch(ours, torchs, exact, name=""):
    """At most twice PyTorch's error in the same dtype; the rest is for results of which PyTorch has every bit."""
    assert ours.dtype == torchs.dtype and ours.shape == exact.shape, name
    allowed = 2 * rms(torchs - exact) + 1e-3 * torch.finfo(ours.dtype).eps * rms(exact)
    assert rms(ours - exact) <= allowed, (name, rms(ours - exact) / rms(torchs - exact))


def check_registration(operation, *arguments):
    """As torch.compile wants it: schema, fake results, and gradients."""
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(operation.default, arguments)
