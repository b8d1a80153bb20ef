"""Compiles every kernel ahead of time, for GPUs that need not be there, and tabulates what the compilers made of it.

    python -m engine.kernels.aot [--target sm_90]... [--out benchmarks/results/aot.md]

The operations run as always, on CPU tensors, but with a driver that names the target and launches nothing; so what is
compiled is what a launch would compile, arguments' divisibility and block sizes included.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from engine.kernels import adaln, attention, cfg_step, timestep

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a block
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Usage(NamedTuple):
    """One compiled kernel; the field names are the table's columns."""

    case: str
    kernel: str
    target: str
    registers: int  # per thread
    spills: int  # bytes of registers kept in memory (AMD: spilled registers)
    shared: int  # bytes per block
    instructions: int
    wgmma: int  # tensor-core instructions of a whole warpgroup: wgmma, tcgen05.mma
    mma: int  # those of one warp: mma, mfma
    vector_loads: int  # global loads of 8 or 16 bytes a thread
    loads: int  # global loads in all


class _Driver:
    """Stands for a GPU of the target. JITFunction keeps its kernels by device number, so each target has its own."""

    def __init__(self, target: str):
        self.target, self.device = TARGETS[target], list(TARGETS).index(target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[list]:
    """Within it, launches compile for the target and go no further; the list collects the compiled kernels."""
    run, active, compiled = JITFunction.run, driver._active, []

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))
        return compiled[-1]

    driver.set_active(_Driver(target))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active  # reset_active() would look for a GPU


def usage(case: str, target: str, compiled) -> Usage:
    """Reads a kernel's cost off its assembly."""
    asm, shared = compiled.asm, compiled.metadata.shared
    name = compiled.metadata.name
    if target == "gfx942":
        text = asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
        code = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat)_\w+)", text, re.MULTILINE)
        mma = sum("mfma" in instruction for instruction in code)
        loads = [i for i in code if re.match(r"(global|buffer)_load", i)]
        wide = [i for i in loads if i.endswith(("x2", "x4"))]
        return Usage(case, name, target, registers, spills, shared, len(code), 0, mma, len(wide), len(loads))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        resources, sass = (_said(TOOLS / "cuobjdump", what, file.name) for what in ("-res-usage", "-sass"))
    registers = int(re.search(r"REG:(\d+)", resources)[1])
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass)
    wgmma, mma = (sum(i.startswith(names) for i in code) for names in (("HGMMA", "UTCHMMA"), ("HMMA", "DMMA")))
    loads = [i for i in code if i.startswith(("LDG", "LDGSTS", "UTMALDG"))]
    wide = [i for i in loads if re.search(r"\.(64|128)\b", i) or i.startswith("UTMALDG")]
    # Local memory alone is no spill: the never-taken slow path of cos and sin for huge angles has an array there.
    spills = _spills(asm["ptx"], target) if any(i.startswith("STL") for i in code) else 0
    return Usage(case, name, target, registers, spills, shared, len(code), wgmma, mma, len(wide), len(loads))


def _spills(ptx: str, target: str) -> int:
    """Bytes that ptxas says it spilled."""
    assembler = TOOLS / ("ptxas-blackwell" if target == "sm_100" else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        command = [assembler, "-v", f"--gpu-name={architecture}", source, "-o", Path(folder, "kernel.cubin")]
        said = _said(*command)
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))


def _said(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, a call that launches the case's kernels): every block size that a launcher can choose, and odd shapes."""
    heads = 8
    for dtype, shapes in (
        (torch.bfloat16, ((320, 64), (1024, 64), (333, 64), (77, 64), (32, 64), (1, 64), (320, 32), (320, 128))),
        (torch.float16, ((320, 64), (333, 128))),
        (torch.float32, ((320, 64), (333, 64), (320, 128))),
    ):
        for tokens, head_dim in shapes:
            qkv = torch.empty(2, tokens, 3, heads, head_dim, dtype=dtype)
            out, lse = qkv.new_empty(2, tokens, heads * head_dim), torch.empty(2, heads, tokens)

            def run(qkv=qkv, out=out, lse=lse):
                attention._attention(qkv)
                attention._attention_backward(out, qkv, out, lse)

            yield f"L {tokens}, d {head_dim}, {_short(dtype)}", run
    chunks = {"norm": (adaln.NONE, 0, 1), "residual": (2, adaln.NONE, adaln.NONE), "residual and norm": (2, 3, 4)}
    for dtype, dims in ((torch.bfloat16, (192, 512, 768)), (torch.float16, (1152,)), (torch.float32, (512,))):
        for dim in dims:
            for name, used in chunks.items():
                yield f"D {dim}, {_short(dtype)}, {name}", lambda dim=dim, dtype=dtype, u=used: _adaln(dim, dtype, u)
    for dtype in (torch.bfloat16, torch.float32):
        sizes = (512, 256), (512,), (512, 512), (512,), (3072, 512), (3072,)
        layers = [torch.empty(size, dtype=dtype) for size in sizes]
        yield f"D 512, {_short(dtype)}", lambda layers=layers: timestep._table(torch.empty(51), layers)
    for batch, passes, live, dtype in (
        (1, 1, 1, torch.bfloat16), (1, 2, 2, torch.bfloat16), (64, 1, 1, torch.bfloat16), (64, 2, 2, torch.bfloat16),
        (64, 2, 1, torch.bfloat16), (64, 3, 3, torch.bfloat16), (64, 2, 2, torch.float32),
    ):  # fmt: skip
        name = f"B {batch}, N 8192, {live} of {passes} passes, {_short(dtype)}"
        yield name, lambda b=batch, p=passes, live=live, dtype=dtype: _cfg_step(b, p, live, dtype)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _adaln(dim: int, dtype: torch.dtype, chunks: tuple[int, int, int]) -> None:
    x, vector, table = (torch.empty(size, dtype=dtype) for size in ((2, 320, dim), (6 * dim,), (66, 6 * dim)))
    y, index = None if chunks[0] == adaln.NONE else x, torch.zeros(2, 320, dtype=torch.int32)
    _, _, mean, rstd = adaln._adaln(x, y, table, index, vector, *chunks)
    adaln._adaln_backward(x, x, x, y, mean, rstd, table, index, vector, *chunks)


def _cfg_step(batch: int, passes: int, live: int, dtype: torch.dtype) -> None:
    size, tokens, lines = 8192, 320, 26
    mask, values, int32 = torch.ones(batch, size, dtype=torch.bool), torch.empty(batch, size), torch.int32
    rows = cfg_step.Rows(
        torch.zeros(batch, dtype=torch.int64), mask, values, values, torch.zeros(size, dtype=int32),
        torch.ones(batch, tokens, dtype=torch.bool), torch.zeros(tokens, dtype=int32),
        torch.empty(batch, lines, len(cfg_step.Coefficient)),
        torch.zeros(batch, lines, cfg_step.Index.GUIDED + passes - 1, dtype=int32),
    )  # fmt: skip
    progress = cfg_step.Progress(
        rows.seeds, values, values, torch.empty(passes * batch, size), torch.zeros(passes * batch, tokens, dtype=int32),
        torch.zeros(batch, dtype=int32),
    )  # fmt: skip
    cfg_step._triton_step(torch.empty(live * batch, size, dtype=dtype), rows, progress)


def compile_all(target: str) -> list[Usage]:
    """Every case on one target; a kernel that several cases share is listed with the first."""
    found: dict[int, Usage] = {}
    for case, run in cases():
        with compiling_for(target) as compiled:
            run()
        for kernel in compiled:
            if id(kernel) not in found:
                found[id(kernel)] = usage(case, target, kernel)
    return list(found.values())


def markdown(usages: list[Usage]) -> str:
    """The table, as committed."""
    head = " | ".join(name.replace("_", " ") for name in Usage._fields)
    lines = [f"| {head} |", "|" + "---|" * len(Usage._fields)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, u)) + " |" for u in usages)]) + "\n"


def parse(text: str) -> list[Usage]:
    """What `markdown` wrote."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    return [Usage(*row[:3], *map(int, row[3:])) for row in rows]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m engine.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args(arguments)
    table = markdown([u for target in options.target or TARGETS for u in compile_all(target)])
    print(table, end="")
    if options.out:
        source = f"By `python -m engine.kernels.aot`, triton {triton.__version__}."
        options.out.write_text(f"# Kernels compiled ahead of time\n\n{source}\n\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
