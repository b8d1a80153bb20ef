"""Where and in which dtype to compute: "auto" made definite, impossible wishes and useless weights told apart."""

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """("auto" | "cpu" | "cuda" | "cuda:N", "auto" | a name of `DTYPES`) → a device and a dtype.

    auto is CUDA where there is one, and bfloat16 where the hardware has it natively (several times faster), else
    float32.
    Raises ValueError for a device that is not there and a dtype it cannot compute in.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: {device!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {device!r} is not there ({torch.cuda.device_count()} CUDA devices); use auto or cpu")
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if dtype == "auto":
        return where, torch.bfloat16 if _native_bfloat16(where) else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not known; use auto, {', '.join(DTYPES)}")
    if dtype == "float16" and where.type == "cpu":
        raise ValueError("dtype: 'float16' is not computed on a CPU; use auto, float32 or bfloat16")
    return where, DTYPES[dtype]


def all_finite(weights: dict[str, Tensor]) -> bool:
    """Whether these are floats that can be computed with (8 bits are for storage only), without infinities and NaN."""
    return all(w.is_floating_point() and w.element_size() > 1 and w.isfinite().all() for w in weights.values())


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private, but older than the public torch.cpu.get_capabilities, which the oldest release allowed may not have.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
