"""What a benchmark ran on: facts about the device, and its energy counter."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from engine.device import processor

PACKAGES = ("torch", "triton", "xformers", "diffusers", "numpy", "openvino", "onnxruntime")


def facts(device: torch.device) -> dict:
    """Device, driver, threads, load and versions; call it before the work, whose load would be counted too."""
    known = {"device": _cpu(), "driver": "n/a", "threads": torch.get_num_threads()}
    if device.type == "cuda":
        known = {"device": torch.cuda.get_device_name(device), "driver": "n/a", "cuda": torch.version.cuda}
        if meter := PowerMeter.open(device):
            known |= meter.facts()
    known["load before"] = round(os.getloadavg()[0], 1)  # of other processes: shared cores make noisy times
    known["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "n/a"
    return known


class PowerMeter:
    """The GPU's own energy counter, through NVML."""

    def __init__(self, nvml, handle):
        self._nvml, self._handle = nvml, handle
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # fails here on a GPU that has no such counter

    @classmethod
    def open(cls, device: torch.device) -> "PowerMeter | None":
        """None where there is no NVML, or a GPU without an energy counter."""
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


def _cpu() -> str:
    # Private, but older than the public torch.cpu.get_capabilities, which the oldest release allowed may not have.
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    native = ", native bfloat16" if has_bfloat16 else ""
    return f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}{native}"
