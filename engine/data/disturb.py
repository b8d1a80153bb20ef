"""Fixed changes of an image that a person would describe in nearly the same words: for measuring, not for training."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from engine.data.augment import compressed, moved, outlined
from engine.images import BACKGROUND, fit_image, from_levels, on_background

GREY = (128, 128, 128)
NOISE = 5  # standard deviation, in levels of 0…255


def _moved(scale: float, x: float = 0, y: float = 0) -> Callable:
    """Scaled about the centre and shifted by whole pixels of the result; white under and around transparency."""

    def change(image: Image.Image, size: int) -> Image.Image:
        background = BACKGROUND if image.mode == "RGBA" else None
        return moved(on_background(image), size, scale, np.array([x, y]) / size, background)

    return change


def _plain(image: Image.Image, size: int) -> Image.Image:
    return from_levels(fit_image(image, size))


def _noisy(image: Image.Image, size: int) -> Image.Image:
    levels = np.asarray(_plain(image, size), np.float32)
    noise = np.random.default_rng(0).normal(0, NOISE, levels.shape)
    return Image.fromarray((levels + noise).round().clip(0, 255).astype(np.uint8))


# By name: (an image as `open_image` gives it, pixels a side) → RGB, size × size. The grey background needs an image
# that is transparent somewhere; it leaves others as they are.
DISTURBANCES: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "shift 1 0": _moved(1, 1),
    "shift 2 1": _moved(1, 2, 1),
    "scale 0.95": _moved(0.95),
    "scale 0.9": _moved(0.9),
    "mirrored": lambda image, size: ImageOps.mirror(_plain(image, size)),
    "grey background": lambda image, size: _plain(on_background(image, GREY), size),
    "outlined": lambda image, size: outlined(_plain(image, 2 * size), width=3, steep=50),
    "without colours": lambda image, size: ImageOps.grayscale(_plain(image, size)).convert("RGB"),
    "JPEG 75": lambda image, size: compressed(_plain(image, size), quality=75),
    "noise 5": _noisy,
    "bicubic": lambda image, size: ImageOps.fit(on_background(image), (size, size), Image.Resampling.BICUBIC),
}
