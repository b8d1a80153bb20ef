"""Where and in which dtype to compute, and how fast the machine is: "auto" decided by a measurement of milliseconds."""

import json
import logging
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from engine.config import ModelConfig
from engine.errors import InputError
from engine.files import cache_folder
from engine.request import QUANTIZATIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CANDIDATES = ("float32", "bfloat16")  # for "auto" on a CPU
GAIN = 1.2  # how many times faster bfloat16 has to be on a CPU to be chosen: it is less exact
ROWS = 4  # of the forward that "auto" is decided on: two samples of two passes

log = logging.getLogger("engine.device")


def resolve(
    device: str, dtype: str | torch.dtype, model: ModelConfig | None = None
) -> tuple[torch.device, torch.dtype]:
    """`resolve_device` and `resolve_dtype`."""
    where = resolve_device(device)
    return where, resolve_dtype(dtype, where, model)


def resolve_device(device: str) -> torch.device:
    """ "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"; InputError for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError("device", device, "use auto, cpu, cuda or cuda:N", "is not known") from None
    if where.type not in ("cpu", "cuda"):
        raise InputError("device", device, "use auto, cpu, cuda or cuda:N", "is not supported")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        found = f"is not there ({torch.cuda.device_count()} CUDA devices)"
        raise InputError("device", device, "use auto or cpu", found)
    return where


def resolve_dtype(dtype: str | torch.dtype, device: torch.device, model: ModelConfig | None = None) -> torch.dtype:
    """ "auto", a name of `DTYPES` or the dtype itself; InputError for a dtype that the device cannot compute in.

    "auto" is bfloat16 on CUDA devices that have it natively. On a CPU it is whichever of float32 and bfloat16 does the
    products of the model's MLP faster, measured once per machine, number of threads and width: processors with the same
    flags differ in this. Without a model it is float32 there.
    """
    if isinstance(dtype, str) and dtype == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float32
        return torch.float32 if model is None else _faster_dtype(model)
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, str | torch.dtype) else None
    if name not in DTYPES:
        raise InputError("dtype", dtype, f"use auto, {', '.join(DTYPES)}", "is not known")
    if name == "float16" and device.type == "cpu":
        raise InputError("dtype", dtype, "use auto, float32 or bfloat16", "is not computed on a CPU")
    return DTYPES[name]


def check_quantization(quantize: str, device: torch.device) -> None:
    """Raises InputError unless a device can compute with weights quantised in this way."""
    if quantize not in QUANTIZATIONS:
        raise InputError("quantize", quantize, f"use one of {', '.join(QUANTIZATIONS)}", "is not known")
    nvidia = device.type == "cuda" and torch.version.hip is None
    if quantize == "fp8" and not (nvidia and torch.cuda.get_device_capability(device) >= (8, 9)):
        needs = "needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell)"
        raise InputError("quantize", quantize, "leave it out", needs)


def ceilings(device: torch.device, dtypes: tuple[torch.dtype, ...], tries: int = 8) -> dict[str, float]:
    """The most that was measured here: "copy" bytes/s, reads and writes, and FLOP/s of a matrix product by dtype."""
    cuda = device.type == "cuda"
    source = torch.empty((1 << 30) if cuda else (1 << 27), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    found = {"copy": 2 * source.numel() / fastest(lambda: target.copy_(source), device, tries)}
    size = 8192 if cuda else 1024
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        found[name] = 2 * size**3 / fastest(partial(torch.matmul, a, b), device, tries)
    return found


def fastest(run: Callable[[], object], device: torch.device, tries: int = 8, repeats: int = 3) -> float:
    """Seconds of the fastest call, each measured over several."""
    best = float("inf")
    for _ in range(tries):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(device)
        best = min(best, (time.perf_counter() - started) / repeats)
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _faster_dtype(model: ModelConfig) -> torch.dtype:
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    tokens, width, hidden = model.tokens, model.dim, model.mlp_ratio * model.dim
    key = f"{processor()}, {capability}, {threads} threads, torch {torch.__version__}, {tokens}×{width}×{hidden}"
    folder = cache_folder()  # None without a home
    cache = folder and folder / "dtype.json"
    known = _read_json(cache)
    milliseconds = known.get(key)
    if not isinstance(milliseconds, dict) or not all(isinstance(milliseconds.get(d), float) for d in CANDIDATES):
        milliseconds = _measure_dtypes(ROWS * tokens, width, hidden)
        _write_json(cache, known | {key: milliseconds})
    chosen = "bfloat16" if milliseconds["bfloat16"] * GAIN < milliseconds["float32"] else "float32"
    log.info("dtype: %s (measured: %s)", chosen, ", ".join(f"{v:.2f} ms in {k}" for k, v in milliseconds.items()))
    return DTYPES[chosen]


@torch.inference_mode()
def _measure_dtypes(tokens: int, width: int, hidden: int) -> dict[str, float]:
    """Milliseconds of an MLP's two products in each dtype, the best of several turns."""
    calls = {}
    for name in CANDIDATES:
        x, up, down = (
            torch.randn(size).to(DTYPES[name]) for size in ((tokens, width), (hidden, width), (width, hidden))
        )
        calls[name] = lambda x=x, up=up, down=down: torch.nn.functional.linear(torch.nn.functional.linear(x, up), down)
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(6):
        for name, call in calls.items():
            seconds = fastest(call, torch.device("cpu"), tries=1, repeats=1 + (turn > 0))
            if turn > 0:  # the first is a warm-up
                best[name] = min(best[name], 1e3 * seconds)
    return {name: round(value, 4) for name, value in best.items()}


def _read_json(path: Path | None) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path | None, values: dict) -> None:
    """Best effort: without it, the next process measures again."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        log.info("%s: not written (%s)", path, error)
