"""Regenerate a rectangle of an image of your own.

    python examples/infill_photo.py photo.jpg --box 0.5 0 1 1

writes `infilled.png`: the image as the model sees it (a square of 64 pixels), the same with the rectangle greyed out,
and four ways to fill that in, each with the caption that was generated with it. Pixels outside of the rectangle are
unaltered. The built-in model knows emoji: it fills any photo in with parts of emoji.
"""

import argparse

from PIL import Image

from engine import Engine, Request
from engine.images import grid


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photo")
    parser.add_argument("--box", type=float, nargs=4, default=(0.5, 0, 1, 1), help="left, top, right, bottom; 0 to 1")
    parser.add_argument("--prompt", help="words, _ for each one to be filled in; default: all of them are generated")
    parser.add_argument("--num", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", default="infilled.png")
    options = parser.parse_args(arguments)

    photo = Image.open(options.photo).convert("RGB")
    left, top, right, bottom = options.box
    box = round(left * photo.width), round(top * photo.height), round(right * photo.width), round(bottom * photo.height)
    mask = Image.new("L", photo.size)  # black: keep
    mask.paste(255, box)  # white: regenerate
    greyed = photo.copy()
    greyed.paste((128, 128, 128), box)

    request = Request(options.prompt, image=photo, mask=mask, num=options.num, steps=options.steps)
    with Engine.from_pretrained() as engine:
        result = engine.generate(request)
        # Given whole, an image comes back as the model sees it.
        known = engine.generate([Request(image=image, steps=options.steps) for image in (photo, greyed)])
    images = [*(one.image for one in known), *(sample.image for sample in result.samples)]
    grid(images, ["given", "masked", *(sample.text for sample in result.samples)], columns=len(images)).save(
        options.out
    )


if __name__ == "__main__":
    main()
