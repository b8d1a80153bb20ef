"""Random changes of an image that leave what it shows the same: for training on images that are known.

A model that is trained on unchanged images only describes them badly once they are shifted or scaled. Images that are
to be generated are never changed, since the model would learn to generate the changes.
"""

import io
import math

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from engine.data.augmentation import Augmentation
from engine.images import BACKGROUND, on_background

STEEP = (30, 80)  # differences of brightness, in levels, from which on there is an outline
WIDTH = (0.012, 0.035)  # of outlines, as a fraction of the image's side


def augment(image: Image.Image, size: int, how: Augmentation, random: np.random.Generator, flip: bool) -> Image.Image:
    """An image of mode RGB or RGBA → RGB, size × size: its centre square, changed at random.

    Where the result reaches beyond the square, it shows the rest of the image. Beyond the image it is filled with the
    background colour if the image is transparent, else by repeating the outermost pixels.
    flip  whether it may be flipped, see `Augmentation.may_flip`
    """
    background = None  # of a transparent image
    if image.mode == "RGBA":
        background = tuple(random.integers(0, 256, 3).tolist()) if random.random() < how.background else BACKGROUND
        image = on_background(image, background)
    scale, shift = random.uniform(*how.scale), random.uniform(-how.shift, how.shift, 2)
    outline = random.random() < how.outline
    image = moved(image, 2 * size if outline else size, scale, shift, background)
    if outline:
        width = 2 * max(1, round(size * random.uniform(*WIDTH))) + 1
        image = outlined(image, width, random.uniform(*STEEP))
    if flip and random.random() < 0.5:
        image = ImageOps.mirror(image)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(1 + random.uniform(-how.colour, how.colour))
    if random.random() < how.grey:
        image = ImageOps.grayscale(image).convert("RGB")
    if random.random() < how.jpeg:
        image = compressed(image, quality=int(random.integers(how.quality[0], how.quality[1] + 1)))
    return image


def outlined(image: Image.Image, width: int, steep: float) -> Image.Image:
    """An RGB image → half its size, with black lines along its edges; smooth, since they are drawn before it is halved.

    width  of the lines, an odd number of pixels before halving
    steep  difference of brightness within `width` pixels, in levels of 0…255, from which on there is a line
    """
    grey = ImageOps.grayscale(image)
    brightest, darkest = grey.filter(ImageFilter.MaxFilter(width)), grey.filter(ImageFilter.MinFilter(width))
    lines = ImageChops.difference(brightest, darkest).point([255 * (level >= steep) for level in range(256)])
    return Image.composite(Image.new("RGB", image.size), image, lines).reduce(2)


def compressed(image: Image.Image, quality: int) -> Image.Image:
    """An RGB image after JPEG of this quality."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def moved(image: Image.Image, size: int, scale: float, shift: np.ndarray, background=None) -> Image.Image:
    """The centre square scaled about its centre and shifted by `shift` (x, y) of its side → size × size.

    image       RGB; resampled once
    background  colour around the image; None: its outermost pixels are repeated
    """
    square = min(image.size)
    side = square / scale  # of the part that is shown, in pixels of the image
    left, top = ((extent - side) / 2 - square * by for extent, by in zip(image.size, shift, strict=True))
    margin = max(0, math.ceil(max(-left, -top, left + side - image.width, top + side - image.height)))
    if margin and background is not None:
        image = ImageOps.expand(image, margin, background)
    elif margin:
        image = Image.fromarray(np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), "edge"))
    box = (left + margin, top + margin, left + margin + side, top + margin + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box)
