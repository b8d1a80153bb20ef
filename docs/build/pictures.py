"""Makes the README's pictures with the built-in model: `python docs/build/pictures.py DATA`.

DATA  the folder that `python -m engine.data emoji` writes

Writes engine/assets/emoji/held_out.png, sixteen held-out names drawn, and docs/infill.png, four held-out images with a
half and a word left out, each beside what the model makes of it. Names are evenly spaced and seeds count from 0, so
nothing is picked by its looks.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from engine import Engine, Request
from engine.codecs.words import caption_words
from engine.data.sources import open_captioned
from engine.evaluation import spread
from engine.images import from_levels, grid

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


if __name__ == "__main__":
    data = open_captioned(sys.argv[1], "test").read(SIZE)
    pairs = [(from_levels(pixels), " ".join(caption_words(item.captions[0]))) for item, pixels in data]
    with Engine.from_pretrained(dtype="float32") as engine:
        held_out(engine, [name for _, name in pairs]).save(ROOT / "engine/assets/emoji/held_out.png")
        infill(engine, pairs).save(ROOT / "docs/infill.png")
