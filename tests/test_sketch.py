"""Line drawings: where their lines are, and that no two are alike."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from engine.data.sketch import draw_sketch, edges, sketch_levels
from engine.images import to_levels


def square(size: int = 64, colour: str = "navy") -> Image.Image:
    """A dark square in the middle half of a white image."""
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).rectangle((size // 4, size // 4, size * 3 // 4 - 1, size * 3 // 4 - 1), colour)
    return image


def drawn(image: Image.Image, seed: int = 0) -> np.ndarray:
    """Levels [S, S] of a sketch: 0 ink, 255 paper."""
    result = draw_sketch(image, np.random.default_rng(seed))
    levels = np.asarray(result)
    assert (result.mode, result.size) == ("RGB", image.size) and (levels.min(2) == levels.max(2)).all()
    return levels[..., 0]


@pytest.mark.parametrize("size", [8, 64, 200])
@pytest.mark.parametrize("seed", range(3))
def test_lines_are_where_the_colour_changes(size, seed):
    levels = drawn(square(size), seed)
    away = size / 4 - np.maximum(*abs(np.mgrid[:size, :size] - (size - 1) / 2))  # from the square's edge; < 0 outside
    assert (levels[abs(away) > 0.12 * size] == 255).all() and levels.min() < 200
    beside = abs(away) < 0.08 * size
    assert (levels[beside] < 255).mean() > 0.1


def test_the_generator_decides_the_drawing():
    one, same, other = drawn(square(), 1), drawn(square(), 1), drawn(square(), 2)
    assert np.array_equal(one, same) and (abs(one.astype(int) - other) > 100).sum() > 20


def test_lines_tremble_differ_in_width_and_have_gaps():
    sides = np.stack([drawn(square(), seed)[:32, 24:40] for seed in range(40)])  # a part of the upper one
    ink = (255 - sides.astype(int)).sum(1) / 255  # pixels of each column
    assert ink.min() < 0.2 and ink.max() > 2 and 1 < ink.mean() < 2
    rows = sides.argmin(1)  # where the line is darkest
    assert len(set(rows.ravel().tolist()) - {0}) >= 3 and (rows.std(1) > 0.3).any()


@pytest.mark.parametrize("image", [Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), (90, 40, 10))])
def test_a_plain_image_has_no_lines(image):
    assert (drawn(image) == 255).all()


def test_drawings_of_tensors_are_the_same():
    levels = sketch_levels(to_levels(square()), np.random.default_rng(3))
    assert levels.shape == (3, 64, 64) and np.array_equal(levels[0].numpy(), drawn(square(), 3))


@pytest.mark.parametrize(
    ("left", "right", "seen"),
    [((0, 0, 0), (1, 1, 1), True), ((0, 0, 0.5), (0, 0, 0), True), ((0.5, 0.5, 0.5), (0.55, 0.55, 0.55), False)],
)
def test_edges_are_one_pixel_wide_and_of_any_colours(left, right, seen):
    image = np.empty((20, 30, 3), np.float32)
    image[:, :15], image[:, 15:] = left, right
    found = edges(image, sigma=1.5, threshold=0.1)
    assert found[:, 14:16].sum() == found.sum() == (20 if seen else 0)


def test_a_line_goes_on_where_it_is_weak():
    image = np.zeros((30, 30, 3), np.float32)
    image[:, 15:] = np.linspace(0.2, 0.06, 30)[:, None, None]
    assert edges(image, sigma=1.5, threshold=0.15).any(1).all()
    image[:, 15:] = 0.06
    assert not edges(image, sigma=1.5, threshold=0.15).any()
