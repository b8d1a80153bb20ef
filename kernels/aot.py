"""Compiles every kernel ahead of time, for GPUs that need not be there, and tabulates what the compilers made of it.

    python -m engine.kernels.aot [--target sm_90]... [--out benchmarks/results/aot.md | --case REGEX]

The operations run on CPU tensors, with a driver that names the target, and their launches only compile. So what is
compiled is what a launch would compile, the arguments' divisibility and the block sizes included.
"""

import argparse
import gc
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from engine.kernels import adaln, attention, cfg_step, linear, timestep

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a block
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION_BYTES = 16  # of NVIDIA's machine code since sm_70


class Usage(NamedTuple):
    """One compiled kernel; the field names are the table's columns."""

    case: str
    kernel: str
    target: str
    registers: int  # per thread
    spills: int  # bytes of registers kept in memory (AMD: spilled registers)
    shared: int  # bytes per block
    instructions: int
    wgmma: int  # tensor-core instructions of a whole warpgroup: wgmma, tcgen05.mma, in 16 or 8 bits
    mma: int  # those of one warp: mma, mfma
    vector_loads: int  # global loads of 8 or 16 bytes a thread
    loads: int  # global loads in all


class _Driver:
    """Stands in for a GPU of the target. JITFunction caches kernels by device number, so each target has its own."""

    def __init__(self, target: str):
        self.target, self.device = TARGETS[target], list(TARGETS).index(target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[list[CompiledKernel]]:
    """Within it, launches compile for the target and go no further; yields the list of what they compiled."""
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


def usages(kernels: list[tuple[str, CompiledKernel]], target: str) -> list[Usage]:
    """What kernels, each given with its case, need on a target, read off their assembly."""
    if target == "gfx942" or not kernels:
        return [_amd_usage(case, target, kernel) for case, kernel in kernels]
    return [
        _nvidia_usage(case, target, kernel, instructions)
        for (case, kernel), instructions in zip(kernels, _disassemble(kernels), strict=True)
    ]


def _amd_usage(case: str, target: str, kernel: CompiledKernel) -> Usage:
    text = kernel.asm["amdgcn"]
    code = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat)_\w+)", text, re.MULTILINE)
    loads = [instruction for instruction in code if re.match(r"(global|buffer)_load", instruction)]
    return Usage(
        case,
        kernel.metadata.name,
        target,
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        spills=sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)),
        shared=kernel.metadata.shared,
        instructions=len(code),
        wgmma=0,
        mma=sum("mfma" in instruction for instruction in code),
        vector_loads=sum(load.endswith(("x2", "x4")) for load in loads),
        loads=len(loads),
    )


def _nvidia_usage(case: str, target: str, kernel: CompiledKernel, code: list[str]) -> Usage:
    loads = [instruction for instruction in code if instruction.startswith(("LDG", "LDGSTS", "UTMALDG"))]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _output_of(TOOLS / "cuobjdump", "-res-usage", file.name)
    # Local memory alone does not mean a spill: cos and sin have an array there, which only huge angles use.
    has_local_stores = any(instruction.startswith("STL") for instruction in code)
    return Usage(
        case,
        kernel.metadata.name,
        target,
        registers=int(re.search(r"REG:(\d+)", resources)[1]),
        spills=_spills(kernel.asm["ptx"], target) if has_local_stores else 0,
        shared=kernel.metadata.shared,
        instructions=len(code),
        wgmma=sum(instruction.startswith(("HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA")) for instruction in code),
        mma=sum(instruction.startswith(("HMMA", "DMMA")) for instruction in code),
        vector_loads=sum(bool(re.search(r"\.(64|128)\b", load)) or load.startswith("UTMALDG") for load in loads),
        loads=len(loads),
    )


def _disassemble(kernels: list[tuple[str, CompiledKernel]]) -> list[list[str]]:
    """The instructions' names of each kernel. All in one call, since nvdisasm takes a third of a second to start."""
    codes = [_machine_code(kernel.asm["cubin"], kernel.metadata.name) for _, kernel in kernels]
    architecture = re.search(r"^\.target sm_(\w+)", kernels[0][1].asm["ptx"], re.MULTILINE)[1]  # "90a"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        text = _output_of(TOOLS / "nvdisasm", "--binary", f"SM{architecture}", file.name)
    names = iter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text))
    return [[next(names) for _ in range(len(code) // INSTRUCTION_BYTES)] for code in codes]


def _machine_code(cubin: bytes, kernel: str) -> bytes:
    """The section `.text.<kernel>` of a cubin, which is a 64-bit ELF file."""
    sections_at = struct.unpack_from("<Q", cubin, 0x28)[0]  # e_shoff; then e_shentsize, e_shnum and e_shstrndx
    header_bytes, sections, names_section = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<2I4Q", cubin, sections_at + i * header_bytes) for i in range(sections)]
    names_at = headers[names_section][4]
    for name, _, _, _, at, size in headers:  # sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size
        start = names_at + name
        if cubin[start : cubin.index(b"\0", start)] == f".text.{kernel}".encode():
            return cubin[at : at + size]
    raise LookupError(f"no code of {kernel} in the cubin")


def _spills(ptx: str, target: str) -> int:
    """Bytes that ptxas reports as spilled."""
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        assembler = get_ptxas(TARGETS[target].arch).path  # the one that Triton has for this target
        report = _output_of(assembler, "-v", f"--gpu-name={architecture}", source, "-o", Path(folder, "kernel.cubin"))
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


def _output_of(*command) -> str:
    """What a tool writes, errors included."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def cases(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, a call that launches the case's kernels): every block size that a launcher can choose, and odd shapes."""
    yield from _linear_cases(eight_bits=target in ("sm_90", "sm_100"))
    shapes = ((320, 64), (1024, 64), (333, 64), (77, 64), (32, 64), (1, 64), (320, 32), (320, 128))
    for dtype, sizes in (
        ("bf16", shapes),
        ("fp16", ((320, 64), (333, 128))),
        ("fp32", ((320, 64), (333, 64), (320, 128))),
    ):
        for tokens, head_dim in sizes:
            qkv = attention.example_inputs(tokens=tokens, head_dim=head_dim, dtype=DTYPES[dtype])
            yield f"L {tokens}, d {head_dim}, {dtype}", partial(_run_attention, qkv)
    chunks = {"norm": (adaln.NONE, 0, 1), "residual": (2, adaln.NONE, adaln.NONE), "residual and norm": (2, 3, 4)}
    for dtype, dims in (("bf16", (192, 512, 768)), ("fp16", (1152,)), ("fp32", (512,))):
        for dim in dims:
            inputs = adaln.example_inputs(dim=dim, dtype=DTYPES[dtype])
            for name, used in chunks.items():
                yield f"D {dim}, {dtype}, {name}", partial(_run_adaln, inputs, used)
    for dtype in ("bf16", "fp32"):
        times, *layers = timestep.example_inputs(dtype=DTYPES[dtype])
        tensors = [tensor for layer in layers for tensor in layer]
        yield f"D 512, {dtype}", partial(timestep._table, times.float(), tensors)
    for batch, passes, live, dtype in (
        (1, 1, 1, "bf16"), (1, 2, 2, "bf16"), (16, 1, 1, "bf16"), (16, 2, 2, "bf16"), (16, 2, 1, "bf16"),
        (16, 2, 2, "fp32"),
    ):  # fmt: skip
        inputs = cfg_step.example_inputs(batch, passes=passes, live=live, dtype=DTYPES[dtype])
        yield f"B {batch}, N 8192, {live} of {passes} passes, {dtype}", partial(cfg_step._triton_step, *inputs)
    inputs = cfg_step.example_inputs(16, ((128, 16), (128, 16), (64, 64)), passes=3, dtype=torch.bfloat16)
    yield "B 16, N 8192, 3 of 3 passes, 3 modalities, bf16", partial(cfg_step._triton_step, *inputs)


def _linear_cases(eight_bits: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """eight_bits: also products in 8 bits, which not every target has."""
    for dtype, rows in (("bf16", 2), ("bf16", 64), ("fp16", 2), ("fp32", 2)):
        x, weight, bias = linear.example_inputs(rows, dtype=DTYPES[dtype])
        stream, _, table, index, vector = adaln.example_inputs(rows, dim=512, dtype=DTYPES[dtype])
        back, half = weight.t().contiguous(), weight[:512]  # [512, 2048] and [512, 512]
        hidden = x.repeat(1, 1, 4)  # [rows, 320, 2048]
        pair, gated = torch.cat([half, half], 1), (stream, table, index, vector)
        name = f"{rows} x 320, D 512, {dtype}"
        yield f"{name}, GELU", partial(linear._launch, x, weight, bias, gelu="tanh")
        yield f"{name}, residual", partial(linear._launch, hidden, back, bias[:512], residual=gated, gate=2)
        yield f"{name}, pair", partial(linear._launch, x, pair, bias[:512], second=x)
        if eight_bits and dtype == "bf16":
            yield f"{name}, 8 bits", partial(linear._launch, x, linear.quantize(weight), bias, gelu="tanh")
            back = linear.quantize(back)
            yield f"{name}, 8 bits, residual", partial(linear._launch, hidden, back, bias[:512], residual=gated, gate=2)


def _run_attention(qkv: torch.Tensor) -> None:
    out, lse = attention._attention(qkv)
    attention._attention_backward(out, qkv, out, lse)


def _run_adaln(inputs: tuple[torch.Tensor, ...], chunks: tuple[int, int, int]) -> None:
    x, y, table, index, vector = inputs
    y = None if chunks[0] == adaln.NONE else y
    _, _, mean, rstd = adaln._adaln(x, y, table, index, vector, *chunks)
    adaln._adaln_backward(x, x, x, y, mean, rstd, table, index, vector, *chunks)


def compile_all(target: str, chosen: re.Pattern) -> list[Usage]:
    """Compiles the cases whose names `chosen` matches; a kernel that several of them share is listed with the first."""
    kernels: dict[int, tuple[str, CompiledKernel]] = {}
    for case, run in cases(target):
        if not chosen.match(case):
            continue
        with compiling_for(target) as compiled:
            run()
        for kernel in compiled:
            kernels.setdefault(id(kernel), (case, kernel))
    return usages(list(kernels.values()), target)


def markdown(usages: list[Usage]) -> str:
    """The table, as committed."""
    head = " | ".join(name.replace("_", " ") for name in Usage._fields)
    lines = [f"| {head} |", "|" + "---|" * len(Usage._fields)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, u)) + " |" for u in usages)]) + "\n"


def parse(text: str) -> list[Usage]:
    """What `markdown` wrote."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    return [Usage(*row[:3], *map(int, row[3:])) for row in rows]


def _regex(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression ({error})") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m engine.kernels.aot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all of them")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--out", type=Path, metavar="FILE", help="write the table there too")
    text = "only cases whose names match from the start, such as 'L 320|D 192'"
    either.add_argument("--case", type=_regex, default=re.compile(""), metavar="REGEX", help=text)
    options = parser.parse_args(arguments)
    gc.disable()  # every collection walks through all of PyTorch's and Triton's objects: a sixth of the time
    targets = options.target or list(TARGETS)
    found = [u for target in targets for u in compile_all(target, options.case)]
    if not found:
        pattern, listed = options.case.pattern, ", ".join(targets)
        parser.error(f"argument --case: {pattern!r} matches no case of {listed}; benchmarks/results/aot.md lists them")
    table = markdown(found)
    print(table, end="")
    if options.out:
        source = f"By `python -m engine.kernels.aot`, triton {triton.__version__}."
        options.out.write_text(f"# Kernels compiled ahead of time\n\n{source}\n\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
