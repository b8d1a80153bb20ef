"""What a benchmark ran on: the device's facts, the ceilings measured on it, and its energy counter."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from engine.device import resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKAGES = ("torch", "triton", "xformers", "diffusers", "numpy")


def facts(device: torch.device) -> dict:
    """Device, driver, threads, load and versions; to be taken before the work whose load would be counted too."""
    found = {"device": _processor(), "driver": "n/a", "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found = {"device": torch.cuda.get_device_name(device), "driver": "n/a", "cuda": torch.version.cuda}
        if meter := PowerMeter.open(device):
            found |= meter.facts()
    found["load before"] = round(os.getloadavg()[0], 1)  # what else ran: shared cores make noisy times
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "n/a"
    return found


def ceilings(device: torch.device) -> dict[str, float]:
    """The best of several tries: copied bytes/s (reads and writes) and matmul FLOP/s of each dtype."""
    cuda = device.type == "cuda"
    source = torch.empty((1 << 30) if cuda else (1 << 27), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    found = {"copy": 2 * source.numel() / _fastest(lambda: target.copy_(source), device)}
    size = 8192 if cuda else 1024
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * size**3 / _fastest(lambda a=a, b=b: a @ b, device)
    return found


class PowerMeter:
    """The GPU's own energy counter, through NVML."""

    def __init__(self, nvml, handle):
        self._nvml, self._handle = nvml, handle
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # not on every GPU: fails here if not on this one

    @classmethod
    def open(cls, device: torch.device) -> "PowerMeter | None":
        """None where there is no NVML, or a GPU that does not count."""
        if device.type != "cuda":
            return None
        import pynvml

        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        except pynvml.NVMLError:
            return None

    def joules(self) -> float:
        """Energy since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000

    def facts(self) -> dict:
        nvml, handle = self._nvml, self._handle
        return {
            "driver": nvml.nvmlSystemGetDriverVersion(),
            "power_limit_watts": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fastest(run: Callable[[], object], device: torch.device, tries: int = 8) -> float:
    """Seconds of the fastest call, each measured over several."""
    best, repeats = float("inf"), 3
    for _ in range(tries):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(device)
        best = min(best, (time.perf_counter() - started) / repeats)
    return best


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    native = ", native bfloat16" if resolve("cpu", "auto")[1] == torch.bfloat16 else ""
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}{native}"
