"""Random changes of images: what they show stays, and the same seed gives the same change."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from engine.data.augment import augment
from engine.data.augmentation import Augmentation

NONE = Augmentation((1, 1), 0, flip=False, background=0, colour=0, outline=0, grey=0, jpeg=0)


def glyph(mode="RGBA", size=(40, 40)):
    """A red disc left of the centre, on transparency or on grey."""
    image = Image.new(mode, size, (0, 0, 0, 0) if mode == "RGBA" else (90, 90, 90))
    x, y = size[0] // 2 - 8, size[1] // 2
    ImageDraw.Draw(image).ellipse((x - 6, y - 6, x + 6, y + 6), "red")
    return image


def changed(image, seed=0, size=40, flip=False, **how):
    options = {**vars(NONE), **how}
    return np.asarray(augment(image, size, Augmentation(**options), np.random.default_rng(seed), flip)).astype(int)


def red(pixels):
    """Centre (x, y) and area of what is red, as fractions of the side."""
    mask = (pixels[..., 0] > 150) & (pixels[..., 1] < 100) & (pixels[..., 2] < 100)
    y, x = np.nonzero(mask)
    return (x.mean() + 0.5) / len(pixels), (y.mean() + 0.5) / len(pixels), mask.mean()


def test_without_changes_an_image_is_as_it_is():
    assert np.array_equal(changed(glyph("RGB")), np.asarray(glyph("RGB")))
    assert (changed(glyph())[0, 0] == 255).all()  # white under transparency


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(40, 40), (60, 40), (40, 90)])
def test_shift_and_scale_stay_within_their_bounds(mode, size):
    x0, y0, area0 = red(changed(glyph(mode, size)))
    seen = []
    for seed in range(60):
        x, y, area = red(changed(glyph(mode, size), seed, scale=(0.8, 1.1), shift=0.1))
        scale = (area / area0) ** 0.5
        assert 0.75 < scale < 1.17
        seen.append((scale, x - 0.5 - (x0 - 0.5) * scale, y - 0.5 - (y0 - 0.5) * scale))
        assert np.abs(seen[-1][1:]).max() < 0.115
    low, high = np.min(seen, 0), np.max(seen, 0)
    assert low[0] < 0.85 and high[0] > 1.03 and (low[1:] < -0.07).all() and (high[1:] > 0.07).all()


def test_the_border_goes_on_outside():
    for seed in range(10):
        assert (changed(glyph("RGB"), seed, scale=(0.5, 0.5), shift=0.2)[[0, -1]] == 90).all()
        assert (changed(glyph("RGBA"), seed, scale=(0.5, 0.5), shift=0.2)[[0, -1]] == 255).all()


def test_what_the_centre_square_leaves_out_is_shown_rather_than_the_border():
    image = Image.new("RGB", (80, 40), "blue")
    image.paste((0, 255, 0), (20, 0, 60, 40))  # the centre square
    pixels = changed(image, scale=(0.5, 0.5))
    assert pixels[20, 2].tolist() == [0, 0, 255] and pixels[20, 20].tolist() == [0, 255, 0]


def test_half_of_the_images_are_flipped_where_they_may_be():
    left = [red(changed(glyph("RGB"), seed, flip=True))[0] < 0.5 for seed in range(60)]
    assert 15 < sum(left) < 45
    assert all(red(changed(glyph("RGB"), seed))[0] < 0.5 for seed in range(20))


@pytest.mark.parametrize(
    "captions, flips",
    [(("red heart", "love"), True), (("arrow", "Leftwards arrow"), False), (("seven o'clock",), False)],
)
def test_images_with_a_direction_in_a_caption_are_not_flipped(captions, flips):
    how = Augmentation(directional=("left", "clock"))
    assert how.may_flip(captions) == flips and not Augmentation(flip=False).may_flip(captions)


def test_backgrounds_change_under_transparency_only():
    backgrounds = {tuple(changed(glyph(), seed, background=0.5)[0, 0]) for seed in range(40)}
    assert (255, 255, 255) in backgrounds and 10 < len(backgrounds) < 35
    assert {tuple(changed(glyph("RGB"), seed, background=1)[0, 0]) for seed in range(20)} == {(90, 90, 90)}


def test_colours_change_slightly():
    before = changed(glyph("RGB"))
    differences = [np.abs(changed(glyph("RGB"), seed, colour=0.1) - before).max() for seed in range(30)]
    assert 5 < np.mean(differences) < 60 and len(set(differences)) > 10


def test_outlines_follow_the_edges_and_leave_the_rest():
    before = changed(glyph(), size=80)
    y, x = np.mgrid[:80, :80]
    distance = np.hypot(x - 24.5, y - 40.5)  # from the centre of the disc, whose radius is 13
    lines = []
    for seed in range(20):
        after = changed(glyph(), seed, size=80, outline=1)
        lines.append((after.max(2) < 80).sum())
        assert (after[abs(distance - 13) < 0.5].max(1) < 200).mean() > 0.9, "the edge is dark"
        away = abs(distance - 13) > 6
        assert np.abs(after[away] - before[away]).max() < 30  # of another size meanwhile
    assert min(lines) > 15 and 1.5 * min(lines) < max(lines), "thin and thick lines"
    plain = [np.array_equal(changed(glyph(), seed, size=80, outline=0.5), before) for seed in range(40)]
    assert 8 < sum(plain) < 32


def test_some_images_lose_their_colours():
    grey = [np.ptp(changed(glyph("RGB"), seed, grey=0.5), axis=2).max() == 0 for seed in range(40)]
    assert 8 < sum(grey) < 32


def test_some_images_are_compressed():
    before = changed(glyph("RGB"))
    exact = [np.array_equal(changed(glyph("RGB"), seed, jpeg=0.5), before) for seed in range(40)]
    assert 8 < sum(exact) < 32


def test_the_seed_decides():
    half = dict.fromkeys(("background", "outline", "grey", "jpeg"), 0.5)
    how = {"scale": (0.8, 1.1), "shift": 0.1, "colour": 0.1, **half}
    pictures = [changed(glyph(), seed, **how) for seed in (1, 1, 2)]
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])
