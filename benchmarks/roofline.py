"""A static model of a step's time: what its bytes, its FLOPs and its launches take at a machine's ceilings.

The step is traced on tensors without memory, so it needs no GPU and takes less than a second. Each operation takes
max(FLOPs / matmul rate, bytes / copy rate, one launch), and a step the sum of its operations. This is a lower bound of
an eager or captured step: no operation reaches a ceiling, none overlaps with another, and no compiler has merged any.
Where a measured step takes much longer than predicted, something else costs.

`python -m benchmarks.roofline` prints a step of text-to-image with the paper's preset on an H100 and an H200.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.workloads import constant_modalities
from engine.command import Parser
from engine.command import run as run_command
from engine.config import Config, ModelConfig
from engine.device import fastest
from engine.kernels import attention, backend, cfg_step
from engine.model.denoiser import build
from engine.presets import PRESETS

COMMAND = "python -m benchmarks.roofline"
TIMES = 1001  # rows of a denoiser's table, of which a step reads few
ALLOCATIONS = ("empty", "new_empty", "empty_like")
PASSES = 2


@dataclass(frozen=True)
class Ceilings:
    """What a machine does at most."""

    copy: float  # bytes/s, reads and writes
    matmul: float  # FLOP/s of a matrix product in the step's dtype
    launch: float  # seconds that the smallest operation takes


# Seconds that a kernel takes at least, replayed in a CUDA graph (Hazy Research 2025, "Look Ma, No Bubbles!").
IN_GRAPH = 1.3e-6
LAUNCHED = 3e-6  # one by one from the host; 2 to 5 µs are usual
MACHINES = {  # bytes/s copied, FLOP/s of dense bfloat16 products
    "H200": (4.3e12, 790e12),  # measured on one: 90 and 80 % of NVIDIA's figures
    "H100": (3.0e12, 790e12),  # the same shares of NVIDIA's figures for the SXM module, 3.35 TB/s and 989 TFLOP/s
}


@dataclass(frozen=True)
class Operation:
    """One operation of a step: one launch on a GPU."""

    name: str
    flops: float  # of matrix products; elementwise arithmetic is never what an operation waits for
    moved: float  # bytes: arguments read once, results written once

    def seconds(self, at: Ceilings) -> float:
        return max(self.flops / at.matmul, self.moved / at.copy, at.launch)


def predicted(operations: Sequence[Operation], at: Ceilings) -> float:
    """Seconds of the operations, one after the other."""
    return sum(operation.seconds(at) for operation in operations)


def step_operations(
    config: Config,
    batch: int,
    dtype: torch.dtype,
    device_type: str,
    outputs: Collection[str] | None = None,
    passes: int = PASSES,
) -> list[Operation]:
    """The operations of one sampling step of `batch` samples: the forward of all passes, then `cfg_step`."""
    constant = () if outputs is None else constant_modalities(config, outputs)
    operations = forward_operations(config.model, passes * batch, dtype, device_type, outputs, constant)
    flops, moved = cfg_step.cost(batch, config.model.size, config.model.tokens, passes)
    return [*operations, Operation("psunet.cfg_step", 0, moved)]


def forward_operations(
    model: ModelConfig,
    rows: int,
    dtype: torch.dtype,
    device_type: str,
    outputs: Collection[str] | None = None,
    cached: Collection[str] = (),
) -> list[Operation]:
    """The operations of one forward in the order in which they run; arguments as in `engine.model.cost`.

    device_type  "cuda": with the kernels that are the default there where nothing was measured; "cpu": PyTorch's own
    """
    with torch.device("meta"), kernels_of(device_type), torch.inference_mode():
        network = build(model).to(dtype)
        inputs, index = torch.empty(rows, model.size), torch.empty(rows, model.tokens, dtype=torch.int32)
        table = network.time_table(torch.arange(TIMES))
        features = {name: network.branch_features(name, inputs, table, index) for name in cached}
        with _Trace() as trace:
            network(inputs, table, index, outputs, features)
    return trace.operations


@contextmanager
def kernels_of(device_type: str) -> Iterator[None]:
    """Within it, tensors without memory take the kernels that tensors on such a device would take."""
    chosen = backend.UNMEASURED if device_type == "cuda" else backend.PORTABLE
    with patch.dict(backend.ENVIRONMENT, chosen), patch.object(backend, "INTERPRETED", True):
        yield


class _Trace(TorchDispatchMode):
    """Records the operations that run within it."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not _is_free(function, args, result):
            name, read, written = function.name().partition("::")[2], _tensors(args), _tensors(result)
            lookup = name.startswith(("embedding", "index"))
            if lookup or function.namespace == "psunet":
                read = [x for x in read if x.shape[:1] != (TIMES,)]
            moved = _bytes(read) + (1 + lookup) * _bytes(written)  # as many of the table's values are read as written
            self.operations.append(Operation(name, _flops(name, args, result), moved))
        return result


def _is_free(function, args: Sequence, result) -> bool:
    """Whether it only makes another view of its argument, allocates, or is about metadata."""
    if function.namespace == "prim" or function.name().partition("::")[2].partition(".")[0] in ALLOCATIONS:
        return True
    aliases = [r.alias_info for r in function._schema.returns]
    if not aliases or any(a is None or a.is_write for a in aliases):
        return False
    before, after = _tensors(args), _tensors(result)
    return all(x.dtype == before[0].dtype for x in after)  # `to` another dtype is a copy


def _tensors(values) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


def _flops(name: str, args: Sequence, result) -> float:
    """Of a matrix product or an attention; 0 for all others."""
    if name.startswith(("linear", "addmm", "_addmm_activation", "mm", "bmm")):
        ours = name == "linear" and len(args) > 3  # engine.kernels.linear: x, a second input, the weight, …
        matrix = args[2 if ours else 0 if name.startswith(("mm", "bmm")) else 1]  # whose rows have the inner dimension
        return 2 * matrix.shape[-1] * prod(result.shape)
    if name.startswith(("attention", "scaled_dot_product_attention")):
        packed = name.startswith("attention")  # [R, L, 3, H, d], else queries [R, H, L, d]
        rows, tokens, heads = (args[0].shape[i] for i in ((0, 1, 3) if packed else (0, 2, 1)))
        return attention.cost(rows, tokens, heads, args[0].shape[-1], args[0].itemsize)[0]
    return 0


def launch_seconds(device: torch.device) -> float:
    """What the smallest operation takes, launched one by one, measured here."""
    one = torch.zeros(1, device=device)
    return fastest(lambda: one.add_(1), device, repeats=100)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(COMMAND, description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="coco256")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(arguments)
    config = PRESETS[options.preset]
    outputs = ("image",) if "image" in config.model.predicted else config.model.predicted
    print(f"text-to-image, {options.preset}, bfloat16, {PASSES} passes, {options.steps} steps\n")
    print("| device | batch | launches a step | GFLOP | MB | a step in a graph | launched one by one | all steps |")
    print("| --- |" + " ---: |" * 7)
    for device, (copy, matmul) in MACHINES.items():
        for batch in (1, 16, 64):
            operations = step_operations(config, batch, torch.bfloat16, "cuda", outputs)
            graph, launched = (predicted(operations, Ceilings(copy, matmul, x)) for x in (IN_GRAPH, LAUNCHED))
            flops, moved = (sum(getattr(o, key) for o in operations) for key in ("flops", "moved"))
            seconds = f"{1e3 * graph:.3f} ms | {1e3 * launched:.3f} ms | {1e3 * options.steps * graph:.1f} ms"
            print(f"| {device} | {batch} | {len(operations)} | {flops / 1e9:.0f} | {moved / 1e6:.0f} | {seconds} |")
    return 0


if __name__ == "__main__":
    run_command(COMMAND, main)
