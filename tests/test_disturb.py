"""The fixed changes of images that evaluation makes: what they do, and nothing more."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from engine.data.disturb import DISTURBANCES
from engine.images import fit_image

SIZE = 32


@pytest.fixture(params=["RGB", "RGBA"])
def image(request):
    """A red square on white or on transparency, left of the centre."""
    image = Image.new(request.param, (SIZE, SIZE), (255, 255, 255) if request.param == "RGB" else (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((4, 8, 15, 19), "red")
    return image


def levels(image):
    return np.asarray(image).astype(int)


def plain(image):
    return fit_image(image, SIZE).permute(1, 2, 0).numpy().astype(int)


def changed(image, label):
    result = DISTURBANCES[label](image, SIZE)
    assert (result.mode, result.size) == ("RGB", (SIZE, SIZE))
    return levels(result)


@pytest.mark.parametrize(("label", "down", "right"), [("shift 1 0", 0, 1), ("shift 2 1", 1, 2)])
def test_shifts_are_by_whole_pixels(image, label, down, right):
    expected = np.full((SIZE, SIZE, 3), 255)
    expected[down:, right:] = plain(image)[: SIZE - down, : SIZE - right]
    assert np.array_equal(changed(image, label), expected)


@pytest.mark.parametrize(("label", "scale"), [("scale 0.95", 0.95), ("scale 0.9", 0.9)])
def test_scales_keep_the_centre(image, label, scale):
    red = 255 - changed(image, label)[..., 2]
    assert red.sum() / (255 - plain(image)[..., 2]).sum() == pytest.approx(scale**2, rel=0.03)
    columns = (red.sum(0) * np.arange(SIZE)).sum() / red.sum() + 0.5
    assert columns == pytest.approx(SIZE / 2 + (10 - SIZE / 2) * scale, abs=0.1)


def test_left_and_right_are_exchanged(image):
    assert np.array_equal(changed(image, "mirrored"), plain(image)[:, ::-1])


def test_only_a_transparent_background_turns_grey(image):
    result, before = changed(image, "grey background"), plain(image)
    if image.mode == "RGB":
        assert np.array_equal(result, before)
    else:
        assert (result[0, 0] == 128).all() and (result[10, 6] == before[10, 6]).all()


def test_outlines_are_where_the_square_ends(image):
    result, before = changed(image, "outlined"), plain(image)
    dark = result.max(2) < 180  # half of a pixel on both sides of the edge is black
    assert dark[8, 5:15].all() and dark[19, 5:15].all() and dark[9:19, 4].all() and dark[9:19, 15].all()
    away = np.s_[10:18, 6:14], np.s_[:6]
    assert all(np.abs(result[part] - before[part]).max() < 8 for part in away)  # it was resized


def test_without_colours_brightness_stays(image):
    result = changed(image, "without colours")
    assert np.ptp(result, axis=2).max() == 0 and result[12, 8, 0] == 76  # 0.299 of 255
    assert (result[0, 0] == 255).all()


@pytest.mark.parametrize(("label", "least", "most"), [("JPEG 75", 1, 25), ("noise 5", 2, 6), ("bicubic", 0, 0)])
def test_the_others_change_levels_a_little(image, label, least, most):
    assert least <= np.abs(changed(image, label) - plain(image)).mean() <= most
    assert np.array_equal(changed(image, label), changed(image, label))


def test_resizing_by_bicubic_interpolation_differs_from_the_usual():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 50, 3), np.uint8))
    assert 0.5 < np.abs(changed(image, "bicubic") - plain(image)).mean() < 10
