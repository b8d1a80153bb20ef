"""Reading of training data: `python -m benchmarks.reading --samples 1000000 --out FOLDER` prints one line of JSON.

Writes random latents in the shards of `engine.data.latents` (1 KB a sample for `emoji`), maps them, and reads batches
in random order as training does. Seconds are of the process's CPU, so that it can run on a busy machine. Memory is
what the kernel cannot take back (RssAnon); pages of mapped files (RssFile) it drops when memory is short.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.workloads import without_categories
from engine.checkpoint import BUILT_IN, load
from engine.data.captioned import CaptionedImage, CaptionedImages
from engine.data.latents import LatentCache, default_shard_size, map_latents
from engine.diffusion.loss import DenoisingLoss, distinct_times
from engine.files import save_tensors
from engine.model.denoiser import build
from engine.training.examples import Examples
from engine.training.recipes import RECIPES

BATCH = 256
PRESET = "emoji"  # whose built-in checkpoint has the vocabulary


def memory() -> dict[str, float]:
    """Megabytes of this process that the kernel cannot take back, and of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


def write(folder: Path, samples: int, tokens: int, channels: int) -> list[Path]:
    """Shards of random latents, whose first value is the sample's number modulo 1000."""
    size, paths = default_shard_size(samples), []
    values = torch.randn(size, 1, tokens, channels).half()
    for i, start in enumerate(range(0, samples, size)):
        items = torch.arange(start, min(start + size, samples))
        values[: len(items), 0, 0, 0] = items % 1000
        paths.append(folder / f"latents-{i:05d}.safetensors")
        save_tensors(paths[-1], {"latents": values[: len(items)], "items": items}, {"skipped": "{}"})
    return paths


def captioned(samples: int, words: tuple[str, ...]) -> CaptionedImages:
    """A data set of images that are not there, with captions of eight known words."""
    choice = random.Random(0).choices
    captions = (" ".join(choice(words, k=8)) for _ in range(samples))
    return CaptionedImages(tuple(CaptionedImage(str(i), Path(f"{i}.jpg"), (c,)) for i, c in enumerate(captions)))


def training_rate(x0: Tensor, steps: int) -> float:
    """Samples a CPU-second of the training step on clean data [B, N], without reading."""
    recipe, config = RECIPES[PRESET], without_categories(load(BUILT_IN).config)
    network, loss = (
        build(config.model),
        DenoisingLoss(config, recipe.gamma, skew=recipe.skew, odds=recipe.odds, device=torch.device("cpu")),
    )
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def denoise(inputs: Tensor, times: Tensor) -> Tensor:
        distinct, index = distinct_times(times, len(times) * len(config.model.modalities) + 2)
        return network(inputs, network.time_table(distinct), index)

    def step() -> None:
        draws = loss.draw(len(x0), torch.Generator().manual_seed(0))
        sum(loss(denoise, x0, torch.randn_like(x0), draws, None, slice(None)).values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    began = time.process_time()
    for _ in range(steps):
        step()
    return steps * len(x0) / (time.process_time() - began)


def measure(folder: Path, samples: int, batches: int, steps: int = 3) -> dict:
    """Memory and rates of reading `batches` batches in random order."""
    checkpoint = load(BUILT_IN)
    image, text = checkpoint.config.model.modality("image"), checkpoint.codec("text")
    paths = write(folder, samples, image.tokens, image.channels)
    empty, began = memory(), time.process_time()
    cache: LatentCache = map_latents(paths, captioned(samples, text.vocabulary[1:]))
    examples = Examples(cache, text, checkpoint.config, RECIPES[PRESET])
    opening, opened = time.process_time() - began, memory()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(examples), generator=generator)

    def read(i: int) -> Tensor:
        indices = order[torch.arange(i * BATCH, (i + 1) * BATCH) % len(order)].tolist()
        choice = examples.choose(indices, generator)
        x0 = examples.read(choice)
        first = x0[:, checkpoint.config.model.state_slices["image"]][:, 0]
        assert first.tolist() == [i % 1000 for i in choice.images], "latents of other images"
        return x0

    x0 = read(0)
    before, began = memory(), time.process_time()
    for i in range(1, batches + 1):
        read(i)
    reading = batches * BATCH / (time.process_time() - began)
    after = memory()
    training = training_rate(x0[:64], steps)
    return {
        "samples": samples, "latents MB": sum(path.stat().st_size for path in paths) / 2**20,
        "MB before opening": empty["RssAnon"], "MB opened": opened["RssAnon"], "seconds to open": opening,
        "MB before reading": before["RssAnon"], "MB after reading": after["RssAnon"],
        "mapped MB after reading": after["RssFile"], "samples read": batches * BATCH,
        "read samples/s": reading, "trained samples/s": training, "ratio": reading / training,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.reading", description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=2000, help=f"of {BATCH} samples")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder for the latents, which stay there")
    options = parser.parse_args()
    facts = machine.facts(torch.device("cpu"))
    print(json.dumps(measure(options.out, options.samples, options.batches) | facts))


if __name__ == "__main__":
    main()
