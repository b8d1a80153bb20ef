"""Times every backend of every operation on the GPU at hand and writes measured.json, which `backend` decides by.

    python -m engine.kernels.measure [--dtype bfloat16]... [--out FILE]

Lines of other device families are kept. Each line: family, operation, dtype, sizes, microseconds of each backend, the
device, versions and date. A backend that cannot run (cuDNN without a plan, no xformers) is left out and named.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from engine.kernels import adaln, attention, backend, timestep
from engine.kernels.cfg_step import Coefficient, Guided, Index, Progress, Rows, cfg_step

ROWS = (2, 32, 128)  # of the forward: two passes of 1, 16 and 64 samples


def workloads(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[int, ...], Callable[[str], object]]]:
    """(operation, sizes as `backend.choose` gets them, a call that takes the backend), at coco256's shapes."""
    for rows in ROWS:
        for tokens in (320, 256, 64):
            qkv = torch.randn(rows, tokens, 3, 8, 64, device=device, dtype=dtype)
            yield "attention", (rows, tokens, 64), lambda b, qkv=qkv: attention.attention(qkv, b)

            x, y = torch.randn(2, rows, tokens, 512, device=device, dtype=dtype)
            table, vector = torch.randn(1001, 3072, device=device, dtype=dtype), torch.randn(3072, device=device)
            index = torch.randint(1001, (rows, tokens), device=device, dtype=torch.int32)
            both = (x, y, table, index, vector.to(dtype), 2, 3, 4)
            yield "adaln", (rows, tokens, 512), lambda b, both=both: adaln.gated_residual_modulate(*both, b)
    shapes = (512, 256), (512,), (512, 512), (512,), (3072, 512), (3072,)
    weights = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    layers = list(zip(weights[::2], weights[1::2], strict=True))
    for times in (51, 1001):
        t = torch.arange(times, device=device)
        yield "timestep", (times, 256, 512), lambda b, t=t: timestep.timestep_table(t, *layers, backend=b)
    for batch in (1, 16, 64):
        step = _step_buffers(batch, dtype, device)
        yield "cfg_step", (batch, 8192), lambda b, step=step: cfg_step(*step, b)


def _step_buffers(batch: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, Rows, Progress]:
    """A step of two passes of `batch` rows of coco256, half of whose elements are known."""
    size, tokens, lines = 8192, 320, 10_001  # more lines than a measurement makes steps
    generate = torch.arange(size, device=device).lt(size // 2).expand(batch, -1).contiguous()
    indices = torch.zeros(batch, lines, Index.GUIDED + 1, dtype=torch.int32, device=device)
    indices[..., Index.GUIDED] = Guided.MASKED
    rows = Rows(
        torch.arange(batch, device=device), generate, *torch.randn(2, batch, size, device=device).unbind(),
        torch.zeros(size, dtype=torch.int32, device=device),
        torch.arange(tokens, device=device).lt(tokens // 2).expand(batch, -1).contiguous(),
        torch.zeros(tokens, dtype=torch.int32, device=device),
        torch.rand(batch, lines, len(Coefficient), device=device), indices,
    )  # fmt: skip
    inputs, state = torch.randn(2 * batch, size, device=device), torch.randn(batch, size, device=device)
    progress = Progress(
        torch.zeros(batch, dtype=torch.int64, device=device), state, torch.zeros_like(state), inputs,
        torch.zeros(2 * batch, tokens, dtype=torch.int32, device=device),
        torch.zeros(batch, dtype=torch.int32, device=device),
    )  # fmt: skip
    return torch.randn_like(inputs).to(dtype), rows, progress


def measure(dtypes: list[torch.dtype], device: str) -> list[dict]:
    """One line per operation, sizes and dtype; the median of replays of a CUDA graph, so without launch overhead."""
    from triton.testing import do_bench_cudagraph

    about = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": backend.triton.__version__,
        "date": datetime.date.today().isoformat(),
    }
    lines = []
    for dtype in dtypes:
        for operation, sizes, call in workloads(dtype, device):
            microseconds = {}
            for name in backend.BACKENDS[operation]:
                try:
                    with torch.inference_mode():
                        microseconds[name] = 1e3 * do_bench_cudagraph(lambda c=call, n=name: c(n), return_mode="median")
                except (RuntimeError, ImportError, NotImplementedError) as error:
                    print(f"{operation} {sizes}: {name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            line = {"family": backend.family(0), "operation": operation, "dtype": str(dtype).removeprefix("torch.")}
            lines.append({**line, "sizes": sizes, "microseconds": microseconds, **about})
            print(operation, sizes, line["dtype"], {k: round(v, 2) for k, v in microseconds.items()})
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m engine.kernels.measure", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dtype", action="append", choices=["bfloat16", "float16", "float32"], help="default: bfloat16")
    add("--out", type=Path, default=backend.MEASURED, metavar="FILE")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or backend.triton is None:
        print("engine.kernels.measure: no CUDA device with Triton here; run it where there is one", file=sys.stderr)
        return 2
    lines = measure([getattr(torch, name) for name in options.dtype or ["bfloat16"]], "cuda")
    kept = json.loads(options.out.read_text()) if options.out.exists() else []
    kept = [line for line in kept if line["family"] != backend.family(0)]
    options.out.write_text("[\n" + ",\n".join(json.dumps(line) for line in kept + lines) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
