"""The bill of the paper's training run: hours, cost and memory on 1, 8 and 64 H100s, from a model of a step's time.

`python -m benchmarks.bill --out benchmarks/BILL.md` writes the page. `--measure` first measures the exchange of
gradients between two processes here, with gloo, and keeps it in `benchmarks/links.json`.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from math import log2
from pathlib import Path

import torch
from torch import distributed

from benchmarks import stored
from benchmarks.roofline import LAUNCHED, MACHINES, Ceilings, forward_operations, kernels_of, predicted
from benchmarks.workloads import parameters
from engine.command import Parser
from engine.command import run as run_command
from engine.config import ModelConfig
from engine.device import processor
from engine.files import write_atomically
from engine.model.denoiser import build
from engine.presets import PRESETS

COMMAND = "python -m benchmarks.bill"
HERE = Path(__file__).parent
LINKS_FILE, RATES_FILE = HERE / "links.json", HERE / "results" / "cpu.json"
STEPS, BATCH, PRICE = 4_000_000, 256, 3.0  # of the paper; of the preset; dollars for an hour of one GPU
GPUS = (1, 8, 64)
NODE = 8  # GPUs of a machine
BUCKET = 25 << 20  # bytes that DistributedDataParallel exchanges at a time
HOP = 5e-6  # seconds that a message takes at least, from one GPU to another
SHARE = 0.8  # of a link's stated bandwidth that an exchange reaches
DTYPE = torch.bfloat16
# Bytes for each parameter, all of float32 but for the copy that autocast computes with.
STATE = {"weights": 4, "gradient": 4, "Adam's moments": 8, "average": 4, "bfloat16 copy": 2}
# What the end of a step reads and writes: AdamW 7 values, the average 3, the gradient's norm and clipping 3; the copies
# in bfloat16 of weights and gradients 6 bytes each.
UPDATE = 4 * (7 + 3 + 3) + 2 * 6


@dataclass(frozen=True)
class Link:
    """What connects GPUs: bytes/s in one direction, for a GPU within a machine, for a machine between machines."""

    name: str
    within: float
    between: float
    source: str


NVLINK = 450e9
LINKS = (
    Link("NVLink and 8 × 400 Gb/s InfiniBand", NVLINK, 400e9, "NVIDIA's data sheet of the DGX H100"),
    Link("NVLink and 100 Gb/s Ethernet", NVLINK, 12.5e9, "IEEE 802.3: one port for each machine"),
)


@lru_cache
def compute_seconds(model: ModelConfig, batch: int, at: Ceilings, device_type: str = "cuda") -> tuple[float, float]:
    """(forward, backward and update) of a training step of one process, at a machine's ceilings.

    A backward has twice the operations of its forward: the gradients of both arguments of each product.
    """
    forward = predicted(forward_operations(model, batch, DTYPE, device_type), at)
    return forward, 2 * forward + UPDATE * parameters(model) / at.copy


def exchange_bytes(count: int, values: int, sharded: bool = False) -> float:
    """What each of `count` GPUs sends in a step, in a ring, of the gradients of so many values.

    All-reduce of float32: each part goes round twice. Sharded (FSDP2): weights in bfloat16 are gathered in the forward
    and again in the backward, gradients in float32 are scattered.
    """
    return (count - 1) / count * values * (2 + 2 + 4 if sharded else 2 * 4)


def exchange_seconds(count: int, values: int, link: Link, sharded: bool = False) -> float:
    """Of the gradients of a step: bytes over the slowest link, and the latency of each bucket's tree."""
    if count == 1:
        return 0.0
    slowest = link.within if count <= NODE else min(link.within, link.between)
    buckets = max(1, round(4 * values / BUCKET))
    return exchange_bytes(count, values, sharded) / (SHARE * slowest) + buckets * 2 * log2(count) * HOP


def step_seconds(model: ModelConfig, batch: int, count: int, link: Link, slack: float, sharded: bool = False) -> float:
    """Of a step of `batch` samples on `count` H100s, whose arithmetic takes `slack` times what the ceilings allow.

    The exchange overlaps with the backward pass, but for its last bucket.
    """
    copy, matmul = MACHINES["H100"]
    forward, backward = compute_seconds(model, -(-batch // count), Ceilings(copy, matmul, LAUNCHED))
    exchange = exchange_seconds(count, parameters(model), link, sharded)
    last = exchange / max(1, round(4 * parameters(model) / BUCKET))
    return slack * (forward + backward) + max(exchange - slack * backward, last)


def memory_bytes(model: ModelConfig, samples: int, count: int = 1, sharded: bool = False) -> int:
    """Of one GPU: its state, and what the forward of its samples keeps for the backward."""
    state = sum(STATE.values()) * parameters(model)
    return (state // count if sharded else state) + samples * saved_bytes(model)


@lru_cache
def saved_bytes(model: ModelConfig) -> int:
    """What the forward of one sample keeps for its backward; traced without memory."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # so that no other storage gets its number
        return tensor

    alive: list[torch.Tensor] = []
    with torch.device("meta"), kernels_of("cuda"):
        network = build(model).to(DTYPE)
        inputs, index = torch.empty(1, model.size), torch.empty(1, model.tokens, dtype=torch.int32)
        table = network.time_table(torch.arange(2))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(inputs, table, index)
        weights = {p.untyped_storage()._cdata for p in network.parameters()}
    return sum(size for storage, size in kept.items() if storage not in weights)


def stops_at(model: ModelConfig, batch: int, link: Link, slack: float) -> int:
    """The number of GPUs, doubled from 1, from which on each does less than half of what one alone does."""
    alone, count = step_seconds(model, batch, 1, link, slack), 2
    while count < batch and alone / count > step_seconds(model, batch, count, link, slack) / 2:
        count *= 2
    return count


def measured_rate() -> dict:
    """The stored training step of PS-U-Net on a CPU, and its ratio to what the model of a step's time predicts."""
    run = stored.read(RATES_FILE)
    rows = [row for group, rows in stored.rows_by_group(run).items() if group.startswith("training") for row in rows]
    row = next(row for row in rows if row["contender"] == "PS-U-Net, eager")
    machine = run["machine_info"]["engine"]
    ceilings = machine["ceilings"]
    at = Ceilings(ceilings["copy"], ceilings[row["dtype"]], LAUNCHED)
    bound = sum(compute_seconds(PRESETS["emoji"].model, row["batch"], at, "cpu"))
    facts = {key: row[key] for key in ("batch", "parameters", "dtype", "median")}
    return {**facts, "device": machine["device"], "bound": bound, "slack": row["median"] / bound}


# ------------------------------------------------------------------------------------------------- gloo


def measure_gloo(sizes: tuple[int, ...] = (1 << 20, 1 << 25), tries: int = 20) -> dict:
    """All-reduces of float32 between two processes of this machine: the fastest of some tries for each size, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        context, file = multiprocessing.get_context("spawn"), Path(folder) / "times.json"
        processes = [context.Process(target=_exchange, args=(rank, folder, sizes, tries)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        times = json.loads(file.read_text())
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    facts = {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "date": date}
    return {**facts, "load": round(os.getloadavg()[0], 1), "bytes": list(sizes), "seconds": times}


def _exchange(rank: int, folder: str, sizes: tuple[int, ...], tries: int) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    times = []
    for size in sizes:
        values, found = torch.ones(size // 4), []
        for _ in range(tries + 1):
            distributed.barrier()
            started = time.perf_counter()
            distributed.all_reduce(values)
            found.append(time.perf_counter() - started)
        times.append(min(found[1:]))
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(times))
    distributed.destroy_process_group()


def gloo_seconds(measured: dict, size: float) -> float:
    """Of an all-reduce of so many bytes: a line through the two sizes that were measured."""
    (a, b), (s, t) = measured["bytes"], measured["seconds"]
    return s + (size - a) * (t - s) / (b - a)


# ------------------------------------------------------------------------------------------------- the page


PAGE = """\
# The bill of the paper's run

Written by `{command}`.
**Nothing on this page was measured on a GPU.** Times on H100s are predicted; measured are a training step and an
exchange of gradients on a CPU, see below.

The run: {steps:,} steps (the paper's) of {batch} samples (of the preset `coco256`, as U-ViT's runs on MS-COCO),
{millions:.1f} M parameters. An hour of a GPU costs ${price:g}, an assumption (`--price`): public offers are $2 to $4.

## Hours and cost (predicted)

"Bound" is a step in which every operation is as fast as the ceilings allow. "Likely" takes {slack:.2f} times as long
for its arithmetic: that is the distance of the step that was measured on a CPU, and on GPUs it is not known.
"Efficiency" is what a GPU does in comparison with one that is alone.

| H100s | samples a GPU | between machines | step, bound | step, likely | hours, likely | cost, likely | efficiency |
| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |
{times}

## Where it stops scaling (predicted)

* With {fast}, a GPU does less than half of what one alone does
  from {stop_fast} GPUs on: so few samples are left to each that launching operations takes longer than computing them.
  Larger batches help, faster links do not.
* With {slow}, from {stop_slow} GPUs on: beyond one machine the exchange of a step takes {exchange_slow:.0f} ms, within
  a machine {exchange_within:.1f} ms.

## Bytes and memory (computed)

| H100s | a GPU sends in a step: DDP | FSDP2 | memory of a GPU: DDP | FSDP2 |
| ---: | ---: | ---: | ---: | ---: |
{bytes}

Bytes for each parameter: {state}. A sample's activations, traced: {saved:.0f} MB.
An H100 has 80 GB, so nothing has to be sharded; the numbers of FSDP2 are for comparison.

## What is measured

* **A training step** ({device}, {dtype}, batch {rate_batch},
  {rate_millions:.1f} M parameters, stored in `benchmarks/results/cpu.json`): {measured:.0f} ms, {rate:.0f} samples/s.
  The same model of a step's time gives {bound:.0f} ms for that machine's ceilings.
* **An all-reduce with gloo** between two processes of one machine ({where}, stored in
  `benchmarks/links.json`): {gloo}.
  The {rate_bytes:.0f} MB of gradients of that step would take {gloo_ms:.0f} ms.

## What is assumed

* H100 SXM: {copy:g} TB/s and {matmul:g} TFLOP/s are reached, a launch takes {launch:g} µs: see
  `benchmarks/roofline.py`.
* A backward pass takes twice a forward, which is the sampler's with its fused kernels. The update moves {update} bytes
  for each parameter.
* Links, in one direction, of which {share:.0f} % is reached: NVLink {nvlink:g} GB/s a GPU (NVIDIA's data sheet of the
  H100: 900 GB/s both ways).
{links}
* DDP sums gradients of float32 in a ring, in buckets of {bucket} MB, {hop:g} µs a hop, while the backward pass runs.
* No time for evaluation, checkpoints and failures, and none for data: images are encoded once, before, and a thread
  reads a step ahead (drawing noise: NOTES.md).
"""


def page(steps: int, batch: int, price: float, gloo: dict) -> str:
    """The page; gloo: what `measure_gloo` has returned."""
    model, rate = PRESETS["coco256"].model, measured_rate()
    values, slack, (fast, slow) = parameters(model), rate["slack"], LINKS
    pairs = zip(gloo["bytes"], gloo["seconds"], strict=True)
    copy, matmul = MACHINES["H100"]
    return PAGE.format(
        command=f"{COMMAND} --steps {steps} --batch {batch} --price {price:g} --out benchmarks/BILL.md",
        steps=steps, batch=batch, price=price, slack=slack, millions=values / 1e6,
        times="\n".join(_times(model, steps, batch, price, slack)),
        fast=fast.name, stop_fast=stops_at(model, batch, fast, slack),
        slow=slow.name, stop_slow=stops_at(model, batch, slow, slack),
        exchange_slow=1e3 * exchange_seconds(2 * NODE, values, slow),
        exchange_within=1e3 * exchange_seconds(NODE, values, fast),
        bytes="\n".join(_bytes(model, batch)),
        state=", ".join(f"{name} {size}" for name, size in STATE.items()), saved=saved_bytes(model) / 1e6,
        device=rate["device"], dtype=rate["dtype"], rate_batch=rate["batch"], rate_millions=rate["parameters"] / 1e6,
        measured=1e3 * rate["median"], rate=rate["batch"] / rate["median"], bound=1e3 * rate["bound"],
        where=f"{gloo['processor']}, load {gloo['load']}, torch {gloo['torch']}, {gloo['date']}",
        gloo=", ".join(f"{size / 1e6:.0f} MB in {1e3 * seconds:.1f} ms" for size, seconds in pairs),
        rate_bytes=4 * rate["parameters"] / 1e6, gloo_ms=1e3 * gloo_seconds(gloo, 4 * rate["parameters"]),
        copy=copy / 1e12, matmul=matmul / 1e12, launch=1e6 * LAUNCHED, update=UPDATE, share=100 * SHARE,
        nvlink=NVLINK / 1e9, bucket=BUCKET >> 20, hop=1e6 * HOP,
        links="\n".join(f"  {_outer(link)}: {link.between / 1e9:g} GB/s a machine ({link.source})." for link in LINKS),
    )  # fmt: skip


def _outer(link: Link) -> str:
    return link.name.partition(" and ")[2]


def _times(model: ModelConfig, steps: int, batch: int, price: float, slack: float) -> Iterator[str]:
    alone = step_seconds(model, batch, 1, LINKS[0], slack)
    for n in GPUS:
        for link in LINKS if n > NODE else LINKS[:1]:
            bound, likely = (step_seconds(model, batch, n, link, times) for times in (1.0, slack))
            hours, outer = steps * likely / 3600, _outer(link) if n > NODE else "none"
            cells = f"{1e3 * bound:.1f} ms | {1e3 * likely:.1f} ms | {hours:,.0f} | ${hours * n * price:,.0f}"
            yield f"| {n} | {-(-batch // n)} | {outer} | {cells} | {100 * alone / n / likely:.0f} % |"


def _bytes(model: ModelConfig, batch: int) -> Iterator[str]:
    for n in GPUS:
        sent = [exchange_bytes(n, parameters(model), sharded) / 1e6 for sharded in (False, True)]
        memory = [memory_bytes(model, -(-batch // n), n, sharded) / 1e9 for sharded in (False, True)]
        yield f"| {n} | {sent[0]:.0f} MB | {sent[1]:.0f} MB | {memory[0]:.1f} GB | {memory[1]:.1f} GB |"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(COMMAND, description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps (default: %(default)s, the paper's)")
    parser.add_argument("--batch", type=int, default=BATCH, help="samples a step (default: %(default)s, the preset's)")
    parser.add_argument("--price", type=float, default=PRICE, help="dollars for a GPU-hour (default: %(default)s)")
    parser.add_argument("--measure", action="store_true", help="measure gloo here first")
    parser.add_argument("--out", type=Path, help="write the page there, in place of printing it")
    options = parser.parse_args(arguments)
    if options.measure:
        measured = json.dumps(measure_gloo(), indent=2) + "\n"
        write_atomically(LINKS_FILE, lambda path: path.write_text(measured))
    content = page(options.steps, options.batch, options.price, json.loads(LINKS_FILE.read_text()))
    if options.out is None:
        print(content, end="")
    else:
        write_atomically(options.out, lambda path: path.write_text(content))
    return 0


if __name__ == "__main__":
    run_command(COMMAND, main)
