"""Every kernel compiled for GPUs that are not there, held against the committed table."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

aot = pytest.importorskip("engine.kernels.aot", reason="no Triton for this platform")
ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "aot.md"


@pytest.fixture(scope="module")
def compilers():
    """One process for each target, all of them at once, and without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "engine.kernels.aot", "--target"]
    with ExitStack() as stack:
        options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        yield {t: stack.enter_context(subprocess.Popen([*command, t], **options)) for t in aot.TARGETS}


@pytest.fixture(scope="module", params=aot.TARGETS)
def compiled(request, compilers):
    """Usages on one target."""
    process = compilers[request.param]
    said, complaint = process.communicate()
    assert process.returncode == 0, complaint[-2000:]
    return request.param, aot.parse(said)


@pytest.fixture
def committed(compiled):
    return {(u.case, u.kernel): u for u in aot.parse(COMMITTED.read_text()) if u.target == compiled[0]}


@pytest.mark.slow
def test_kernels_fit_the_device_and_do_not_spill(compiled, committed):
    target, usages = compiled
    assert {(u.case, u.kernel) for u in usages} == committed.keys()
    for u in usages:
        # ptxas saves a few registers around the slow path of cos and sin, which runs for angles above 10⁵ only.
        assert u.spills == 0 or (u.kernel == "_timestep_table" and u.spills <= 16), u
        assert u.shared <= aot.SHARED_LIMIT[target], u
        if u.kernel.startswith(("_attention", "_adaln_forward", "_cfg_step")):
            assert u.vector_loads > 0, u


@pytest.mark.slow
def test_attention_in_16_bits_runs_on_tensor_cores(compiled):
    target, usages = compiled
    attention = [u for u in usages if u.kernel.startswith("_attention") and "fp32" not in u.case]
    assert attention
    for u in attention:
        tokens = int(u.case.split(",")[0].removeprefix("L "))
        # A warpgroup's instructions need 64 rows a program, which so few tokens do not have.
        warpgroup = target in ("sm_90", "sm_100") and tokens > 32
        assert (u.wgmma if warpgroup else u.mma) > 0, u


@pytest.mark.slow
def test_registers_do_not_grow(compiled, committed):
    same_compiler = f"triton {aot.triton.__version__}."
    if same_compiler not in COMMITTED.read_text():
        pytest.skip(f"the table is of another compiler than {same_compiler[:-1]}, so its registers do not compare")
    for u in compiled[1]:
        assert u.registers <= committed[u.case, u.kernel].registers, u
