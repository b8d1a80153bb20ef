"""Every kernel compiled for GPUs that are not there, compared with the committed table."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

aot = pytest.importorskip("engine.kernels.aot", reason="no Triton for this platform")
ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "aot.md"


@pytest.fixture(scope="session", params=aot.TARGETS)
def target(request):
    return request.param


@pytest.fixture(scope="session")
def compiled(target, tmp_path_factory):
    """Usages on one target, which is compiled once, whichever worker of pytest-xdist asks first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # every worker has a folder of its own within that of the run
    table = folder / f"aot-{target}.md"
    with open(table.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not table.exists():
            # In a process without Triton's interpreter, which this one may have.
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", "engine.kernels.aot", "--target", target, "--out", table]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
    return aot.parse(table.read_text())


@pytest.fixture
def committed(target):
    return {(u.case, u.kernel): u for u in aot.parse(COMMITTED.read_text()) if u.target == target}


@pytest.mark.slow
def test_kernels_fit_the_device_and_do_not_spill(target, compiled, committed):
    assert {(u.case, u.kernel) for u in compiled} == committed.keys()
    for u in compiled:
        assert u.target == target and u.registers > 0 and u.instructions > 0, u
        # ptxas saves a few registers around the slow path of cos and sin, which runs for angles above 10⁵ only.
        assert u.spills == 0 or (u.kernel == "_timestep_table" and u.spills <= 16), u
        assert u.shared <= aot.SHARED_LIMIT[target], u
        if u.kernel.startswith(("_attention", "adaln_forward", "cfg_step")):
            assert u.vector_loads > 0, u


@pytest.mark.slow
def test_attention_in_16_bits_runs_on_tensor_cores(target, compiled):
    attention = [u for u in compiled if u.kernel.startswith("_attention") and "fp32" not in u.case]
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
    for u in compiled:
        assert u.registers <= committed[u.case, u.kernel].registers, u
