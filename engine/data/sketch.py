"""Line drawings of images, as a person might make them by hand: black on white.

    image ── edges ──> lines one pixel wide ── hand ──> strokes, moved, of varying width, with gaps

`edges` is Canny's detector (1986): gradient, non-maximum suppression, hysteresis. `hand` draws a line wherever the
distance to the nearest edge is less than half the pen's width; that map of distances is bent by a smooth random field,
and the width is another such field, which below zero leaves a gap. So lines stay whole and smooth however they are
bent.
"""

import numpy as np
from PIL import Image
from torch import Tensor

from engine.images import from_levels, to_levels

WORK = 128  # pixels a side at least, at which edges and strokes are made
REFERENCE = 64  # pixels a side of the images that the lengths below are given for
VARIANTS = 8  # drawings of each image that training keeps


def draw_sketch(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A square RGB image → RGB of the same size: a line drawing of it.

    random  decides how much detail it has, how it trembles, how wide its lines are and where they break
    """
    from scipy.ndimage import distance_transform_edt, label

    scale = -(-WORK // image.width)
    size = image.width * scale
    unit = size / REFERENCE
    large = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255  # [S, S, 3]
    lines = edges(large, unit * random.uniform(0.7, 1.1), random.uniform(0.08, 0.16))
    parts, count = label(lines, np.ones((3, 3)))
    lengths = np.bincount(parts.ravel(), minlength=count + 1)
    kept = (lengths >= 5 * unit) & (random.random(count + 1) < 0.95)  # a hand leaves out specks, and some other lines
    kept[lengths == lengths[1:].max(initial=0)] = True
    kept[0] = False
    lines = kept[parts]
    distance = distance_transform_edt(~lines) if lines.any() else np.full((size, size), 2.0 * size)  # [S, S]
    ink = hand(distance, unit, random)  # [S, S] in 0…1
    ink = ink.reshape(image.height, scale, image.width, scale).mean((1, 3))
    return Image.fromarray((255 * (1 - ink)).round().astype(np.uint8)).convert("RGB")


def sketch_levels(image: Tensor, random: np.random.Generator) -> Tensor:
    """The same for images as training has them, uint8 [3, S, S]."""
    return to_levels(draw_sketch(from_levels(image), random))


def edges(image: np.ndarray, sigma: float, threshold: float) -> np.ndarray:
    """[H, W] bool: where colours change most, in lines one pixel wide.

    image      [H, W, 3] float32 in 0…1
    sigma      of the Gaussian whose derivative is taken, in pixels
    threshold  the least change, as the height of a step in 0…1; a third of it where a line goes on
    """
    from scipy.ndimage import binary_propagation, gaussian_filter, map_coordinates

    across, down = (gaussian_filter(image, sigma, order, axes=(0, 1)) for order in ((0, 1), (1, 0)))  # [H, W, 3]
    strength = np.hypot(across, down)  # [H, W, 3]
    strongest = strength.argmax(2)[..., None]
    dx, dy, magnitude = (np.take_along_axis(x, strongest, 2)[..., 0] for x in (across, down, strength))  # [H, W]
    magnitude *= sigma * np.sqrt(2 * np.pi)  # the slope of a smoothed step, as the step's height
    length = np.maximum(np.hypot(dx, dy), 1e-12)
    rows, columns = np.mgrid[: len(image), : image.shape[1]]
    ahead, behind = (
        map_coordinates(magnitude, [rows + sign * dy / length, columns + sign * dx / length], order=1, mode="nearest")
        for sign in (1, -1)
    )
    ridge = (magnitude >= ahead) & (magnitude > behind)
    return binary_propagation(ridge & (magnitude > threshold), np.ones((3, 3)), ridge & (magnitude > threshold / 3))


def hand(distance: np.ndarray, unit: float, random: np.random.Generator) -> np.ndarray:
    """How much ink is on each pixel, [S, S] in 0…1.

    distance  [S, S] of each pixel from the nearest line, in pixels
    unit      pixels to one of an image of REFERENCE pixels
    """
    from scipy.ndimage import map_coordinates

    size = len(distance)
    where = np.mgrid[:size, :size].astype(np.float32)  # [2, S, S]
    for wave, most in ((20, 1.5), (6, 0.5), (2.5, 0.2)):  # misjudged proportions, an unsteady arm, tremor
        strength = unit * random.uniform(0.2, 1) * most
        where += strength * np.stack([smooth(size, wave * unit, random) for _ in range(2)])
    bent = map_coordinates(distance, where, order=1, mode="nearest")
    width = unit * (random.uniform(1.1, 1.9) + 0.2 * smooth(size, 5 * unit, random))  # [S, S]
    gaps = smooth(size, 5 * unit, random) > random.uniform(1.7, 3)
    width = np.where(gaps, 0, width)
    return np.clip(width / 2 - bent + 0.5, 0, 1)


def smooth(size: int, wave: float, random: np.random.Generator) -> np.ndarray:
    """A random field [size, size] float32 of variance about 1 that changes over `wave` pixels."""
    nodes = size / wave
    field = Image.fromarray(random.standard_normal((round(nodes) + 4,) * 2, np.float32))
    left, top = random.uniform(1, 2, 2)
    box = (left, top, left + nodes, top + nodes)
    return 1.4 * np.asarray(field.resize((size, size), Image.Resampling.BICUBIC, box))
