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
from functools import partial
from pathlib import Path

import torch

from engine.kernels import adaln, attention, backend, cfg_step, linear, timestep

ROWS = (2, 32, 128)  # of the forward: two passes of 1, 16 and 64 samples


def workloads(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[int, ...], Callable[[str], object]]]:
    """(operation, sizes as `backend.choose` gets them, a call that takes the backend), at coco256's shapes."""
    for rows in ROWS:
        for tokens in (320, 256, 64):
            qkv = attention.example_inputs(rows, tokens, dtype=dtype, device=device)
            yield "attention", (rows, tokens, 64), partial(attention.attention, qkv)
            inputs = adaln.example_inputs(rows, tokens, times=1001, dtype=dtype, device=device)
            yield "adaln", (rows, tokens, 512), partial(adaln.gated_residual_modulate, *inputs, 2, 3, 4)
        x, weight, bias = linear.example_inputs(rows, 320, 512, 2048, dtype, device)
        yield "linear_gelu", (rows * 320, 2048, 512), partial(linear.linear_gelu, x, weight, bias, "tanh")
        stream, _, *time = adaln.example_inputs(rows, times=1001, dtype=dtype, device=device)
        hidden, weight, bias = linear.example_inputs(rows, 320, 2048, 512, dtype, device)
        gated = partial(linear.linear_residual, stream, hidden, weight, bias, *time, 5)
        yield "linear_residual", (rows * 320, 512, 2048), gated
        weight = weight[:, :1024].contiguous()
        yield "linear_pair", (rows * 320, 512, 1024), partial(linear.linear_pair, x, stream, weight, bias)
    for times in (51, 1001):
        inputs = timestep.example_inputs(times, dtype=dtype, device=device)
        yield "timestep", (times, 256, 512), partial(timestep.timestep_table, *inputs)
    for batch in (1, 16, 64):
        inputs = cfg_step.example_inputs(batch, dtype=dtype, device=device)
        yield "cfg_step", (batch, 8192), partial(cfg_step.cfg_step, *inputs)


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
    parser = argparse.ArgumentParser("python -m engine.kernels.measure", description=(__doc__ or "").partition("\n")[0])
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
