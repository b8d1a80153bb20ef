"""A whole transformer block on a CPU in one call: block.cpp, compiled by this machine's C++ compiler.

Each product called through PyTorch costs some 14 microseconds besides its arithmetic (benchmarks/NOTES.md), and each
operation reads its input from memory and writes its result there; one call for the block saves both. It needs AVX-512,
for bfloat16 also AVX512-BF16. On CPUs with AMX bfloat16 is left to oneDNN: this code does not use AMX.

Shapes, and what is computed: `engine.model.blocks.Block`.
Dtypes: float32 or bfloat16 in and out; sums, norms, softmax and GELU in float32.
"""

import ctypes
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels.adaln import EPS

SOURCE = Path(__file__).with_name("block.cpp")
PANEL, LANES = 64, 16  # outputs of a panel and of a vector, as in block.cpp
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-fast-math", "-fopenmp", "-shared", "-fPIC")
PATIENCE = 120  # seconds that the compiler may take
PRODUCTS = ("skip", "qkv", "proj", "fc1", "fc2")
POINTERS = (*PRODUCTS, "skip_bias", "proj_bias", "fc1_bias", "fc2_bias", "vector", "skip_norm")
SIZES = ("dim", "heads", "hidden", "exact_gelu", "post")
NORM_EPS = 1e-5  # of nn.LayerNorm, in blocks without adaLN


class Weights(ctypes.Structure):
    """Weights of block.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        ("eps", ctypes.c_double),
    ]


def computes(dtype: torch.dtype, sizes: tuple[int, ...]) -> bool:
    """Whether this CPU can, in this dtype; sizes are all of a block's widths and that of a head."""
    if platform.system() != "Linux" or any(size % LANES for size in sizes):
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32 and torch.cpu._is_avx512_supported()


def compiler() -> str:
    """The command of the C++ compiler, with options."""
    return os.environ.get("CXX", "").strip() or "g++"


def build(path: Path) -> None:
    """Compiles the library into a file.

    Raises OSError where the compiler is missing, ValueError where its command cannot be read, and SubprocessError where
    it fails or takes more than PATIENCE seconds.
    """
    command = [*shlex.split(compiler()), *OPTIONS, "-o", str(path), str(SOURCE)]
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE,
    )


class Library:
    """The compiled library. Raises OSError where the file is none, or lacks what this CPU computes."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))  # whose calls release Python's lock
        for dtype in (torch.float32, torch.bfloat16):
            name = f"block_{str(dtype).removeprefix('torch.')}"
            if computes(dtype, ()) and not hasattr(self._library, name):
                raise OSError(f"the compiler does not know this processor: {name} is missing")

    def bind(self, weights: Mapping[str, Tensor], heads: int, norm: str, gelu: str) -> Callable[..., Tensor]:
        """The forward of a block with these weights, by the block's names, as they are now: they are copied.

        heads, norm, gelu  of the block
        """
        dtype, (hidden, dim) = weights["fc1.weight"].dtype, weights["fc1.weight"].shape
        bfloat16 = dtype == torch.bfloat16
        run = self._library.block_bfloat16 if bfloat16 else self._library.block_float32
        run.argtypes = [*[ctypes.c_void_p] * 6, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        run.restype = ctypes.c_bool
        adaln = norm == "adaln"
        held = {name: panels(weights[f"{name}.weight"]) for name in PRODUCTS if f"{name}.weight" in weights}
        held |= {f"{name}_bias": _float(weights[f"{name}.bias"]) for name in PRODUCTS if f"{name}.bias" in weights}
        held["vector"] = _float(weights["modulation"] if adaln else _affine(weights, ("norm1", "norm2")))
        if "skip_norm.weight" in weights:
            held["skip_norm"] = _affine(weights, ("skip_norm",))
        pointers = {name: tensor.data_ptr() for name, tensor in held.items()}
        sizes = dict(zip(SIZES, (dim, heads, hidden, gelu == "none", norm == "post"), strict=True))
        struct = Weights(**pointers, **sizes, eps=EPS if adaln else NORM_EPS)
        struct.held = held  # what it points to
        pointer = ctypes.byref(struct)

        def forward(x: Tensor, skip: Tensor | None, table: Tensor, index: Tensor) -> Tensor:
            assert x.dtype == dtype and (not adaln or (table.dtype == dtype and index.dtype == torch.int32))
            assert (skip is None) == (struct.skip is None)
            x, table, index = x.contiguous(), table.contiguous(), index.contiguous()
            skip = None if skip is None else skip.contiguous()
            result, table = torch.empty_like(x), table if adaln else None
            inputs = (None if given is None else given.data_ptr() for given in (x, skip, table, index, result))
            if not run(pointer, *inputs, len(x), x.shape[1], torch.get_num_threads()):
                raise torch.OutOfMemoryError(f"memory does not suffice for a block of {x.numel()} elements")
            return result  # [R, L, D]

        return forward


def panels(weight: Tensor) -> Tensor:
    """A product's weight [N, K] in the layout that block.cpp describes, [N·K]."""
    together = 4 // weight.element_size()  # inputs that follow each other
    parts = (part.unflatten(1, (-1, together)).transpose(0, 1).flatten() for part in weight.detach().split(PANEL))
    return torch.cat(list(parts))


def _float(values: Tensor) -> Tensor:
    return values.detach().to(torch.float32, copy=True)


def _affine(weights: Mapping[str, Tensor], norms: tuple[str, ...]) -> Tensor:
    """Norms with weight and bias as modulations: of each its shift, scale, and a gate of 1; [3·D·norms] float32."""
    chunks = []
    for norm in norms:
        weight, bias = (_float(weights[f"{norm}.{name}"]) for name in ("weight", "bias"))
        chunks += [bias, weight - 1, torch.ones_like(weight)]
    return torch.cat(chunks)
