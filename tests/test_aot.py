"""Every kernel compiled for GPUs that are not there, held against the committed table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

aot = pytest.importorskip("engine.kernels.aot", reason="no Triton for this platform")
ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "aot.md"


@pytest.fixture(scope="module", params=aot.TARGETS)
def compiled(request):
    """Usages on one target, from a process without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "engine.kernels.aot", "--target", request.param]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, aot.parse(done.stdout)


@pytest.mark.slow
def test_kernels_fit_the_device_without_spills_and_do_not_grow(compiled):
    target, usages = compiled
    text = COMMITTED.read_text()
    committed = {(u.case, u.kernel): u for u in aot.parse(text) if u.target == target}
    same_compiler = f"triton {aot.triton.__version__}." in text
    assert {(u.case, u.kernel) for u in usages} == committed.keys()
    for u in usages:
        before = committed[u.case, u.kernel]
        # ptxas saves a few registers around the slow path of cos and sin, which runs for angles above 10⁵ only.
        assert u.spills == 0 or (u.kernel == "_timestep_table" and u.spills <= 32), u
        assert u.shared <= aot.SHARED_LIMIT[target], u
        assert not same_compiler or u.registers <= before.registers, (u, before)
        # 16-bit attention runs on tensor cores: on sm_90 by wgmma, which needs 64 rows a program.
        if u.kernel.startswith("_attention") and "fp32" not in u.case:
            assert u.matrix > 0, u
        if u.kernel.startswith(("_attention", "_adaln_forward", "_cfg_step")):
            assert u.vector_loads > 0, u
