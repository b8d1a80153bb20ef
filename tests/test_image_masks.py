"""Masks of every kind, filling what they hide, and compositing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from image_cases import MODES, of_mode, refusal
from PIL import Image, ImageOps

from engine.images import composite, feather, fill_masked, fit_image, open_mask

LEFT = np.zeros((12, 12), bool)
LEFT[:, :5] = True


def drawn(mask, mode="L"):
    """A mask as people draw it: white where True."""
    return of_mode(Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)), mode)


@pytest.mark.parametrize("mode", MODES)
def test_masks_of_every_mode_are_white_where_white(mode):
    assert np.array_equal(open_mask(drawn(LEFT, mode), (12, 12), 12), LEFT)


MODES_OF_FORMATS = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B"),
    "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I", "F", "F of 0 to 1"),
    "bmp": ("1", "L", "P", "RGB", "RGBA"),
    "gif": ("1", "L", "P", "RGB", "RGBA"),
    "webp": ("L", "RGB", "RGBA"),
    "jpg": ("1", "L", "RGB", "CMYK"),
}


@pytest.mark.parametrize("name, mode", [(name, mode) for name, modes in MODES_OF_FORMATS.items() for mode in modes])
def test_masks_of_every_file_format_are_white_where_white(tmp_path, name, mode):
    path = tmp_path / f"mask.{name}"
    drawn(LEFT, mode).save(path, **({"lossless": True} if name == "webp" else {}))
    assert np.array_equal(open_mask(path, (12, 12), 12), LEFT)


def test_a_grey_level_is_white_from_the_middle_on():
    for dtype, dark, bright in ((np.uint8, 127, 128), (np.uint16, 32767, 32768), (np.float32, 0.499, 0.501)):
        levels = np.full((4, 4), dark, dtype)
        levels[0], levels[1] = bright, np.iinfo(dtype).max if dtype != np.float32 else 1
        assert open_mask(Image.fromarray(levels), (4, 4), 4).any(1).tolist() == [True, True, False, False]


def layers(colour, alpha, background=(255, 255, 255, 0)):
    """A mask whose left side has a colour and an alpha, and whose rest is the background."""
    mask = Image.new("RGBA", (12, 12), background)
    mask.paste((*colour, alpha), (0, 0, 5, 12))
    return mask


@pytest.mark.parametrize(
    "mask, selected",
    [
        (layers((255, 255, 255), 255), True),
        (layers((255, 255, 255), 128), True),
        (layers((255, 255, 255), 255, background=(0, 0, 0, 0)), True),
        (layers((255, 255, 255), 255, background=(255, 0, 0, 0)), True),
        (layers((0, 0, 0), 255), False),
        (layers((0, 0, 0), 255, background=(0, 0, 0, 0)), False),
    ],
    ids=["white", "half transparent", "on transparent black", "on transparent red", "black", "black on black"],
)
def test_what_is_transparent_in_a_mask_is_kept(mask, selected):
    assert np.array_equal(open_mask(mask, (12, 12), 12), LEFT & selected)


def test_a_transparent_colour_of_a_palette_is_kept(tmp_path):
    mask = Image.fromarray(np.where(LEFT, 1, 0).astype(np.uint8), "L").convert("P")
    mask.putpalette([255, 255, 255, 255, 255, 255])
    mask.save(tmp_path / "mask.png", transparency=0)
    assert np.array_equal(open_mask(tmp_path / "mask.png", (12, 12), 12), LEFT)


@pytest.mark.parametrize(
    "mask, says",
    [
        (Image.fromarray(LEFT.astype(np.uint8)), "has no white: its brightest level is 1"),
        (Image.fromarray(LEFT.astype(np.uint16) * 200), "has no white: its brightest level is 1 of 255"),
        (Image.fromarray(LEFT.astype(np.uint16)), "has no white: its brightest level is 1 of 255"),  # of 65535
        (Image.fromarray(LEFT.astype(np.uint8) * 127), "has no white: its brightest level is 127"),
        (layers((255, 255, 255), 30), "has no white: its brightest level is 30"),
        (layers((255, 0, 0), 255), "has pixels of other colours, such as rgb(255, 0, 0)"),
        (
            layers((255, 255, 0), 255, background=(0, 0, 0, 255)),
            "has pixels of other colours, such as rgb(255, 255, 0)",
        ),
    ],
    ids=["0 and 1", "16 bits of 200", "16 bits of 1", "grey", "nearly transparent", "red", "yellow"],
)
def test_a_mask_that_means_neither_white_nor_black_is_refused(mask, says):
    error = refusal(open_mask, mask, (12, 12), 12, "masks.sketch")
    assert error.argument == "masks.sketch" and says in str(error) and "white" in error.remedy


def test_colours_that_a_jpeg_leaves_at_edges_are_accepted(tmp_path):
    drawn(LEFT, "RGB").save(tmp_path / "mask.jpg", quality=20)
    assert np.array_equal(open_mask(tmp_path / "mask.jpg", (12, 12), 12), LEFT)


def test_a_black_mask_selects_nothing():
    assert not open_mask(Image.new("L", (9, 9)), (9, 9), 4).any()


def test_a_mask_of_another_size_than_its_image_is_refused(tmp_path):
    drawn(LEFT).save(tmp_path / "mask.png")
    error = refusal(open_mask, tmp_path / "mask.png", (12, 13), 12)
    assert str(error) == f"mask: {tmp_path / 'mask.png'} is 12x12; give a mask of the image's size, 12x13"


def test_a_lone_white_pixel_of_a_large_mask_counts():
    mask = Image.new("L", (960, 960))
    mask.putpixel((485, 7), 255)
    rows, columns = np.nonzero(open_mask(mask, (960, 960), 32))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 2, 13, 18), "Lanczos reads 90 pixels each way"


SIDES = st.integers(1, 40)
MODES_OF_IMAGES = ("RGB", "RGBA", "L", "P", "P with transparency")


def painted(mask, mode, hidden, seed):
    """An image of a mode in which `hidden`, black, white or noise, lies under a mask [H, W]."""
    mode, transparent, random = mode.split()[0], "transparency" in mode, np.random.default_rng(seed)
    shape = (*mask.shape, {"RGB": 3, "RGBA": 4}.get(mode, 1))
    below = {"black": 0, "white": 255}.get(hidden, random.integers(0, 256, shape))
    levels = np.where(mask[..., None], below, np.random.default_rng(0).integers(0, 256, shape)).astype(np.uint8)
    image = Image.fromarray(levels.squeeze(2) if shape[2] == 1 else levels)
    if mode == "P":
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes())
        image.info |= {"transparency": bytes(range(256))} if transparent else {}
    return image


@given(st.data(), SIDES, SIDES, st.integers(1, 24), st.sampled_from(MODES_OF_IMAGES))
def test_nothing_under_a_mask_shows_in_the_kept_pixels_of_a_resized_image(data, width, height, size, mode):
    mask = data.draw(arrays(bool, (height, width), elements=st.sampled_from([True, False, False, False])))
    fitted = open_mask(drawn(mask), (width, height), size)
    images = [fit_image(painted(mask, mode, hidden, 2), size).numpy() for hidden in ("black", "white", "noise")]
    for image in images[1:]:
        assert np.array_equal(image[:, ~fitted], images[0][:, ~fitted])
    assert mask.any() or not fitted.any()


@given(st.data(), SIDES, SIDES, st.integers(1, 24))
def test_only_pixels_that_are_made_from_masked_ones_are_generated(data, width, height, size):
    mask, weights = np.zeros((height, width), bool), np.zeros((height, width), np.float32)
    at = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask[at], weights[at] = True, 1
    weights = np.asarray(ImageOps.fit(Image.fromarray(weights), (size, size), Image.Resampling.LANCZOS))
    fitted = open_mask(drawn(mask), (width, height), size)
    assert fitted[np.abs(weights) > 1e-6].all() and not fitted[np.abs(weights) < 1e-12].any()


@pytest.mark.parametrize("size", [(12, 12), (12, 30), (32, 12)])
def test_a_mask_of_an_image_that_is_not_resized_stays_as_it_is(size):
    mask = np.random.default_rng(0).random(size[::-1]) < 0.5
    top, left = ((side - 12) // 2 for side in mask.shape)
    assert np.array_equal(open_mask(drawn(mask), size, 12), mask[top : top + 12, left : left + 12])


def test_a_mask_is_cropped_and_turned_as_its_image_is(tmp_path):
    mask = Image.new("L", (90, 30))
    mask.paste(255, (0, 0, 45, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    mask.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "mask.png", exif=exif)
    expected = np.zeros((30, 30), bool)
    expected[:, :15] = True
    assert np.array_equal(open_mask(tmp_path / "mask.png", (90, 30), 30), expected)


@given(arrays(bool, (9, 7)), st.integers(0, 4))
def test_feather_is_the_chessboard_distance_from_known_pixels(mask, radius):
    known = np.argwhere(~mask)
    for (y, x), weight in np.ndenumerate(feather(mask, radius)):
        distance = np.abs(known - (y, x)).max(1).min() if len(known) else radius + 1
        assert weight == np.float32(min(distance, radius + 1)) / np.float32(radius + 1)


@given(arrays(bool, (9, 7)), st.integers(0, 4))
def test_feather_is_zero_on_known_pixels_and_never_reaches_out_of_the_generated_side(pixels, radius):
    weights = feather(pixels, radius)
    assert (weights[~pixels] == 0).all()
    assert (weights[pixels] > 0).all() and (weights <= 1).all()
    for (y, x), weight in np.ndenumerate(weights):
        near = pixels[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        assert (weight == 1) == (near.all() and pixels[y, x])


def test_feather_rises_linearly_from_a_straight_edge():
    pixels = np.zeros((4, 8), bool)
    pixels[:, 3:] = True
    np.testing.assert_allclose(feather(pixels, 3)[1], [0, 0, 0, 0.25, 0.5, 0.75, 1, 1])


def test_feather_of_a_wholly_generated_image_is_one_everywhere():
    assert (feather(np.ones((5, 5), bool), 3) == 1).all()


MASKS = arrays(bool, (9, 7)).filter(lambda mask: mask.any() and not mask.all())


def random_image(seed, *count):
    return torch.rand(*count, 3, 9, 7, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@given(MASKS, st.integers(0, 3))
def test_known_pixels_come_back_and_nothing_under_the_mask_shows(mask, radius):
    given_image, generated = random_image(0), random_image(1, 2)
    other = torch.where(torch.from_numpy(mask), random_image(2), given_image)
    result = composite(given_image, generated, mask, radius)
    assert torch.equal(result[:, :, ~mask], given_image[:, ~mask].expand(2, -1, -1))
    assert torch.equal(result, composite(other, generated, mask, radius))
    far = torch.from_numpy(feather(mask, radius) == 1)
    assert torch.equal(result[:, :, far], generated[:, :, far])


def test_a_seam_fades_out_inside_the_masked_region():
    mask = np.zeros((4, 8), bool)
    mask[:, 3:] = True
    result = composite(torch.full((3, 4, 8), 0.4), torch.zeros(1, 3, 4, 8), mask, 2)
    expected = torch.tensor([0.4, 0.4, 0.4, 0.4 * 2 / 3, 0.4 / 3, 0, 0, 0])
    torch.testing.assert_close(result, expected.expand(1, 3, 4, 8))


@given(MASKS)
def test_masked_pixels_are_filled_like_the_nearest_known_ones(mask):
    given_image = random_image(0)
    filled = fill_masked(given_image, mask)
    assert torch.equal(filled[:, ~mask], given_image[:, ~mask])
    known = np.argwhere(~mask)
    for y, x in np.argwhere(mask):
        distance = ((known - (y, x)) ** 2).sum(1)
        nearest = known[distance == distance.min()]
        assert any(torch.equal(filled[:, y, x], given_image[:, i, j]) for i, j in nearest)


def test_an_image_without_known_pixels_is_filled_with_grey():
    assert not fill_masked(random_image(0), np.ones((9, 7), bool)).any()
