"""How well a checkpoint does on captioned pictures: `python -m engine.evaluate --checkpoint DIR --data data/emoji`.

For training and held-out names separately, at equal counts:
    text-to-image  retrieval@1: the nearest of all pictures (L2 at the model's size) has the prompt's base name, or its
                   exact name
    image-to-text  word F1 and exact match against the name
    infilling      root mean square error inside the mask, left half of the picture masked, name given; levels 0…255
    autoencoder    PSNR of encoding and decoding
The name is a picture's first caption. Prints a table, and one JSON object with `--json`.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.codecs.text import tokenize
from engine.command import Parser, about, path, refuse
from engine.data.coco import CaptionedImage, CocoCaptions
from engine.data.emoji import base_name
from engine.request import Request
from engine.runtime import Engine

TOGETHER = 256  # requests handed to the engine at a time, for the progress bar


@dataclass(frozen=True)
class Scores:
    """One split's results; every score is better the higher, but infill_rmse."""

    count: int
    retrieval_base: float
    retrieval_exact: float
    word_f1: float
    caption_exact: float
    infill_rmse: float  # levels 0…255 inside the mask
    autoencoder_psnr: float  # dB


@dataclass(frozen=True)
class Gallery:
    """All pictures of a data set with their names, to find the nearest of."""

    names: list[str]
    pictures: Tensor  # [n, 3·S·S] float32 in −1..1

    @classmethod
    def of(cls, pairs: list[tuple[CaptionedImage, Tensor]]) -> "Gallery":
        pictures = torch.stack([picture for _, picture in pairs]).flatten(1).float() / 127.5 - 1
        return cls([item.captions[0] for item, _ in pairs], pictures)

    def nearest(self, pictures: Tensor) -> list[str]:
        """The names of the pictures nearest in L2 to [m, 3·S·S]."""
        return [self.names[i] for i in torch.cdist(pictures, self.pictures).argmin(1).tolist()]


def word_f1(text: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of words, counted with repetitions."""
    found, wanted = Counter(tokenize(text)), Counter(tokenize(reference))
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total()) if common else 0.0


def evaluate(
    engine: Engine, pairs: list[tuple[CaptionedImage, Tensor]], gallery: Gallery, steps: int, seed: int
) -> Scores:
    """Scores of pictures [3, S, S] uint8 and their names, against a gallery that contains them."""
    size = engine.config.image.size
    names = [item.captions[0] for item, _ in pairs]
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for _, picture in pairs]
    flat = torch.stack([picture for _, picture in pairs]).float() / 127.5 - 1  # [n, 3, S, S]
    words = [" ".join(tokenize(name)) for name in names]
    left = Image.fromarray(np.where(np.arange(size) < size // 2, 255, 0).astype(np.uint8)[None].repeat(size, 0))

    def run(label: str, requests: list[Request]) -> list:
        samples = []
        for i in tqdm(range(0, len(requests), TOGETHER), desc=label, disable=None):
            samples += [result.samples[0] for result in engine.generate(requests[i : i + TOGETHER])]
        return samples

    numbered = list(enumerate(zip(words, images, strict=True), seed))
    given = {"steps": steps, "unknown_words": "fill"}  # a held-out name may have a word that training never had
    drawn = run("text-to-image", [Request(prompt=w, seed=s, **given) for s, (w, _) in numbered])
    told = run("image-to-text", [Request(image=i, steps=steps, seed=s) for s, (_, i) in numbered])
    filled = run("infill", [Request(prompt=w, image=i, mask=left, seed=s, **given) for s, (w, i) in numbered])

    found = gallery.nearest(torch.stack([pixels_of(s.image) for s in drawn]).flatten(1))
    inside = torch.stack([pixels_of(s.image) for s in filled])[..., : size // 2] - flat[..., : size // 2]
    decoded = torch.cat([engine.image.decode(engine.image.encode(p.to(engine.device))).cpu() for p in flat.split(64)])
    error = ((decoded - flat) / 2).square().mean((1, 2, 3))  # [n], of levels 0..1
    return Scores(
        count=len(pairs),
        retrieval_base=_mean(base_name(f) == base_name(n) for f, n in zip(found, names, strict=True)),
        retrieval_exact=_mean(f == n for f, n in zip(found, names, strict=True)),
        word_f1=_mean(word_f1(s.text, n) for s, n in zip(told, names, strict=True)),
        caption_exact=_mean(s.text == w for s, w in zip(told, words, strict=True)),
        infill_rmse=float(inside.square().mean().sqrt() * 127.5),
        autoencoder_psnr=float(-10 * error.log10().mean()),
    )


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # [3, S, S]


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m engine.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=path, help="default: the built-in model")
    add("--data", type=path, required=True, help="pictures with captions.json and captions_test.json")
    add("--count", type=int, default=0, help="names of each split, evenly spread (default: all held-out names)")
    add("--steps", type=int, default=25)
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    try:
        scores = _run(options)
    except ValueError as error:
        return refuse(parser.prog, error, vars(options))
    if options.json:
        print(json.dumps({split: asdict(s) for split, s in scores.items()}, indent=2))
    else:
        print(f"{'':18}" + "".join(f"{split:>10}" for split in scores))
        for key in asdict(scores["train"]):
            print(f"{key:18}" + "".join(f"{getattr(s, key):10.4g}" for s in scores.values()))
    return 0


def _run(options: argparse.Namespace) -> dict[str, Scores]:
    if options.count < 0:
        raise ValueError(f"count: {options.count} does not work; use 1 or more, or 0 for all held-out names")
    Request(steps=options.steps, seed=options.seed)  # refuses bad ones before the work
    with Engine.from_pretrained(options.checkpoint, device=options.device, dtype=options.dtype) as engine:
        size = engine.config.image.size
        with about("data"):
            splits = {split: list(CocoCaptions.open(options.data, split).read(size)) for split in ("train", "test")}
        for split, pairs in splits.items():
            if not pairs:
                raise ValueError(f"data: no {split} picture of {options.data} can be read; render or copy it again")
        gallery = Gallery.of([pair for pairs in splits.values() for pair in pairs])
        count = options.count or len(splits["test"])
        return {
            split: evaluate(engine, spread(pairs, count), gallery, options.steps, options.seed)
            for split, pairs in splits.items()
        }


def spread(pairs: list, count: int) -> list:
    """`count` of the pairs, evenly spaced, or all."""
    step = max(1.0, len(pairs) / count)
    return [pairs[int(i * step)] for i in range(min(count, len(pairs)))]


if __name__ == "__main__":
    sys.exit(main())
