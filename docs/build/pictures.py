"""Makes the README's pictures with the models that come with the engine: `python docs/build/pictures.py DATA`.

DATA  the folder that `python -m engine.data emoji` writes

Writes docs/grid.png, that of `python -m engine.sample --dtype float32`; engine/assets/emoji/held_out.png, sixteen
held-out names drawn; docs/infill.png, four held-out images with a half and a word left out, each beside what the model
makes of it; and docs/sketch.png, line drawings of four training images beside what is made of them, and four training
images beside the drawings that are made of them. Names are evenly spaced and seeds count from 0, so nothing is picked
by its looks.
"""

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw

from engine import Engine, Request
from engine.codecs.words import caption_words
from engine.data.sketch import draw_sketch
from engine.data.sources import open_captioned
from engine.evaluation import spread
from engine.images import from_levels, grid
from engine.sample import main as sample

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64  # pixels
HALVES = ((0, 0, 32, 64), (0, 0, 64, 32), (32, 0, 64, 64), (0, 32, 64, 64))  # left, upper, right, lower


def held_out(engine: Engine, names: list[str]) -> Image.Image:
    """Sixteen names drawn."""
    chosen = spread(names, 16)
    results = engine.generate([Request(prompt=name, seed=seed) for seed, name in enumerate(chosen)])
    return grid([result.image for result in results], chosen, columns=8)


def infill(engine: Engine, pairs: list[tuple[Image.Image, str]]) -> Image.Image:
    """Four pairs of what is given, the missing half in grey and the missing word as "_", and what comes out."""
    images, captions = [], []
    for seed, ((image, name), half) in enumerate(zip(spread(pairs, 4), HALVES, strict=True)):
        words = name.split()
        words[seed % len(words)] = "_"
        mask, given = Image.new("L", (SIZE, SIZE)), image.copy()
        mask.paste(255, half)
        given.paste("#bbb", half)
        ImageDraw.Draw(given).rectangle((0, 0, SIZE - 1, SIZE - 1), outline="#ddd")
        result = engine.generate(Request(image=image, mask=mask, prompt=" ".join(words), seed=seed))
        images += [given, result.image]
        captions += [" ".join(words), result.text]
    return grid(images, captions, columns=8)


def sketched(engine: Engine, pairs: list[tuple[Image.Image, str]]) -> Image.Image:
    """Four drawings and the images made of them; below, four images and the drawings made of them."""
    images, captions = [], []
    for seed, (image, _) in enumerate(spread(pairs, 8)):
        if seed < 4:
            given, made = {"sketch": draw_sketch(image, np.random.default_rng(seed))}, "image"
        else:
            given, made = {"image": image}, "sketch"
        result = engine.generate(Request(**given, seed=seed))
        images += [*given.values(), result.samples[0].outputs[made]]
        captions += ["", result.text]
    return grid(images, captions, columns=8)


def pairs_of(split: str) -> list[tuple[Image.Image, str]]:
    data = open_captioned(sys.argv[1], split).read(SIZE)
    return [(from_levels(pixels), " ".join(caption_words(item.captions[0]))) for item, pixels in data]


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        if sample(["--dtype", "float32", "--out", folder]):
            sys.exit(1)
        shutil.copyfile(Path(folder) / "grid.png", ROOT / "docs/grid.png")
    pairs = pairs_of("test")
    with Engine.from_pretrained("emoji-sketch", dtype="float32") as engine:
        sketched(engine, pairs_of("train")).save(ROOT / "docs/sketch.png")
    with Engine.from_pretrained(dtype="float32") as engine:
        held_out(engine, [name for _, name in pairs]).save(ROOT / "engine/assets/emoji/held_out.png")
        infill(engine, pairs).save(ROOT / "docs/infill.png")
