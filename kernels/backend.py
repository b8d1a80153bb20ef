"""Which implementation an operation runs on: one decision per operation.

    attention                       "sdpa" (PyTorch's choice), "cudnn", "flash", "triton", "xformers"
    adaln, timestep, cfg_step       "torch" (the reference, which Inductor may fuse), "triton"
    linear_8bit, linear_gelu,       the same: a product and what follows it, in one launch
    linear_residual, linear_pair

In this order: the caller's argument; the environment variable PSUNET_<OPERATION>, read at import; off CUDA, PyTorch;
on CUDA the fastest in `measured.json` for the nearest shape of the same device family, operation and dtype; else
`UNMEASURED`. `python -m engine.kernels.measure` refreshes measured.json on the device at hand.

Triton's kernels also run on the CPU in its interpreter (TRITON_INTERPRET=1 before the first import), for tests.
"""

import json
import logging
import math
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except Exception:  # no wheels for this platform, or broken: kernels are still defined, but never chosen
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)  # for their annotations and constants

BACKENDS = {
    "attention": ("sdpa", "cudnn", "flash", "triton", "xformers"),
    "adaln": ("torch", "triton"),
    "timestep": ("torch", "triton"),
    "cfg_step": ("torch", "triton"),
    "linear_8bit": ("torch", "triton"),
    "linear_gelu": ("torch", "triton"),
    "linear_residual": ("torch", "triton"),
    "linear_pair": ("torch", "triton"),
}
PORTABLE = {operation: backends[0] for operation, backends in BACKENDS.items()}
# What CUDA runs where nothing was measured: each of these is one launch instead of five to fifty eager ones.
UNMEASURED = {"attention": "sdpa", "timestep": "torch"} | {
    operation: "triton" for operation in BACKENDS if operation not in ("attention", "timestep")
}
ENVIRONMENT = {operation: os.environ.get(f"PSUNET_{operation.upper()}", "auto") for operation in BACKENDS}
# Of every launch. Explicit, because Triton 3.9 warns without it, and 3.10 changes its default.
COMPILER_OPTIONS = {"enable_fp_fusion": True}
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
MEASURED = Path(__file__).with_name("measured.json")  # none before the first measurement

log = logging.getLogger("engine.kernels")


def read_measurements(path: Path) -> dict[tuple[str, str, str], list[tuple[tuple[int, ...], str]]]:
    """{(family, operation, dtype): [(sizes, fastest backend)]} of a measured.json."""
    found: dict = {}
    for line in json.loads(path.read_text()) if path.exists() else ():
        microseconds = line["microseconds"]
        key = line["family"], line["operation"], line["dtype"]
        found.setdefault(key, []).append((tuple(line["sizes"]), min(microseconds, key=microseconds.get)))
    return found


MEASUREMENTS = read_measurements(MEASURED)


class BackendError(ValueError):
    """A backend that does not exist or cannot run here. `str(error)` is "argument: value problem; remedy".

    argument  the operation, or the environment variable that names the backend
    value     the backend asked for
    remedy    what to do instead
    problem   what is wrong with the value
    """

    def __init__(self, argument: str, value: str, remedy: str, problem: str):
        self.argument, self.value, self.remedy, self.problem = argument, value, remedy, problem
        super().__init__(argument, value, remedy, problem)  # all of them, so that the error can be pickled

    def __str__(self) -> str:
        return f"{self.argument}: {self.value!r} {self.problem}; {self.remedy}"


def jit(function):
    """triton.jit, or the function itself where there is no Triton."""
    return function if triton is None else triton.jit(function)


def choose(operation: str, x: torch.Tensor, sizes: tuple[int, ...], asked: str = "auto", unsupported: str = "") -> str:
    """The backend for an operation on a tensor like x.

    sizes        what the speed depends on, as in measured.json: (rows, tokens, channels of a head), …
    asked        the caller's choice or "auto"
    unsupported  why the Triton kernel cannot take this call, as in "has no backward"; empty if it can
    Raises BackendError if the backend asked for cannot run. Pure Python on constants, so that torch.compile traces it.
    """
    argument = operation
    if asked == "auto":
        asked, argument = ENVIRONMENT[operation], f"PSUNET_{operation.upper()}"
    if asked == "auto":
        return _automatic(operation, x, sizes, unsupported)
    check(operation, asked, x.device.type, argument)
    if asked == "triton" and unsupported:
        raise BackendError(argument, asked, f"use {PORTABLE[operation]} or auto", f"{unsupported} (sizes {sizes})")
    return asked


def check(operation: str, asked: str, device_type: str, argument: str | None = None) -> None:
    """Raises BackendError, naming `argument`, unless the backend asked for exists and can run on such a device."""
    portable, argument = PORTABLE[operation], argument or operation
    if asked in ("auto", portable):
        return
    if asked not in BACKENDS[operation]:
        known = ", ".join(("auto", *BACKENDS[operation]))
        raise BackendError(argument, asked, f"use one of {known}", "is not known")
    if asked == "triton" and triton is None:
        raise BackendError(argument, asked, f"install triton, or use {portable} or auto", "is not installed")
    if device_type != "cuda" and not (asked == "triton" and INTERPRETED):
        raise BackendError(argument, asked, f"use {portable} or auto", "needs a CUDA device")


def _automatic(operation: str, x: torch.Tensor, sizes: tuple[int, ...], unsupported: str) -> str:
    if x.device.type != "cuda":
        if not torch.compiler.is_compiling():
            _announce(operation, PORTABLE[operation], f"on {x.device.type}", logging.INFO)
        return PORTABLE[operation]
    measured = fastest(family(x.device.index or 0), operation, str(x.dtype).removeprefix("torch."), sizes)
    chosen = measured or UNMEASURED[operation]
    reason = "measured" if measured else "nothing measured on this device"
    fallback = chosen == "triton" and (triton is None or unsupported != "")
    if fallback:
        chosen = PORTABLE[operation]
        reason = "Triton is not installed" if triton is None else f"Triton's kernel {unsupported}"
    if not torch.compiler.is_compiling():
        _announce(operation, chosen, reason, logging.WARNING if fallback else logging.INFO)
    return chosen


@cache
def _announce(operation: str, chosen: str, reason: str, level: int) -> None:
    """Logs each decision once: a warning at every call would be noise, and a silent fallback would go unnoticed."""
    log.log(level, "%s: %s (%s)", operation, chosen, reason)


def family(device: int) -> str:
    """The device's name in measured.json: "sm_90" for every H100, H200 and GH200, "gfx942" for AMD's."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def fastest(family: str, operation: str, dtype: str, sizes: tuple[int, ...]) -> str | None:
    """The measured winner at the nearest sizes, by the product of their ratios; None where nothing was measured.

    Arithmetic in plain loops: torch.compile traces it with symbolic sizes too, and guards on the choice.
    """
    nearest, winner = math.inf, None
    for measured, backend in MEASUREMENTS.get((family, operation, dtype), ()):
        distance = 1.0
        for a, b in zip(measured, sizes, strict=True):
            distance *= max(a / b, b / a)
        if distance < nearest:
            nearest, winner = distance, backend
    return winner
