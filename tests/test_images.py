"""Images: opening and fitting what people bring, masks of every kind, compositing, grids."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from engine.errors import InputError
from engine.images import (
    MARGIN,
    composite,
    feather,
    fill_masked,
    fit_image,
    grid,
    load_image,
    open_image,
    open_mask,
    to_image,
)

SOME_GREY = Image.linear_gradient("L").resize((40, 30))


def of_mode(grey, mode):
    """An image of mode L in another one, with the same brightness."""
    levels = np.asarray(grey)
    if mode.startswith("I;16"):
        return Image.fromarray((levels.astype(np.uint16) * 257).astype({"I;16": "<u2", "I;16B": ">u2"}[mode]))
    if mode == "I":
        return Image.fromarray(levels.astype(np.int32) * 257)
    if mode == "F of 0 to 1":
        return Image.fromarray(levels.astype(np.float32) / 255)
    return grey.convert("P").convert(mode) if mode == "PA" else grey.convert(mode)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F", "F of 0 to 1"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_keeps_its_brightness(mode):
    image = fit_image(of_mode(SOME_GREY, mode), 16)
    assert (image.dtype, image.shape) == (torch.uint8, (3, 16, 16))
    expected = fit_image(SOME_GREY.convert("RGB"), 16).float()
    assert (image.float().mean((1, 2)) - expected.mean((1, 2))).abs().max() < 4


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "big-endian.tif", "float.tif"])
def test_deep_grey_files_keep_their_brightness(tmp_path, name):
    mode = {"big-endian.tif": "I;16B", "float.tif": "F of 0 to 1"}.get(name, "I;16")
    of_mode(SOME_GREY, mode).save(tmp_path / name)
    assert (load_image(tmp_path / name, 30).int() - fit_image(SOME_GREY, 30).int()).abs().max() <= 1


def test_a_dark_image_of_16_bits_is_dark():
    image = Image.fromarray(np.full((8, 8), 255, np.uint16))
    assert fit_image(image, 8).eq(1).all()


def test_levels_that_are_not_numbers_are_black():
    levels = np.full((8, 8), 0.5, np.float32)
    levels[0], levels[1] = np.nan, np.inf
    image = fit_image(Image.fromarray(levels), 8)
    assert image[0, 0].eq(0).all() and image[0, 1].eq(255).all() and image[0, 2:].eq(128).all()


def test_transparency_becomes_white(tmp_path):
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (10, 0, 20, 20))
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 0
    assert fit_image(image, 20)[:, 5, 5].tolist() == [255, 255, 255]
    assert fit_image(image, 20)[:, 5, 15].tolist() == [0, 0, 255]
    assert fit_image(palette, 20)[:, 5, 5].tolist() == [255, 255, 255]
    deep = np.full((20, 20), 5140, np.uint16)
    deep[:, 10:] = 0
    Image.fromarray(deep).save(tmp_path / "deep.png", transparency=0)
    assert load_image(tmp_path / "deep.png", 20)[0, 5].tolist() == [20] * 10 + [255] * 10


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (300, 2), (7, 13)])
def test_odd_sizes_fit(size):
    assert fit_image(Image.new("RGB", size, "red"), 16).eq(torch.tensor([255, 0, 0])[:, None, None]).all()


def test_longer_side_is_cropped_about_the_centre():
    image = Image.new("RGB", (90, 30), "red")
    image.paste("lime", (30, 0, 60, 30))
    cropped = fit_image(image, 30)
    assert cropped[1].eq(255).all() and cropped[0].eq(0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(tmp_path, orientation):
    shown = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that undoes each
    stored = shown.transpose(back[orientation]) if orientation > 1 else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").convert("L").tobytes() == shown.tobytes()


def test_opening_leaves_the_callers_image_as_it_was():
    image = of_mode(SOME_GREY, "LA")
    before = image.tobytes()
    assert (open_image(image).mode, image.mode, image.tobytes()) == ("RGBA", "LA", before)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"], ids=["nonsense", "cut off"])
def test_malformed_exif_is_ignored(tmp_path, kind, exif):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "image", kind, exif=exif)
    assert load_image(tmp_path / "image", 8)[0].float().mean() > 250


def refusal(function, *arguments):
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value) and " object at " not in str(error.value)
    return error.value


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "does not exist; give the file of an image"),
        (b"", "is not a readable image (of no known format); give a whole one"),
        (b"<html>404</html>", "is not a readable image (of no known format); give a whole one"),
        ("half", "is not a readable image (image file is truncated"),
    ],
    ids=["missing", "empty", "text", "half"],
)
def test_files_that_are_no_whole_images_are_named(tmp_path, content, says):
    path = tmp_path / "photo.jpg"
    if content == "half":
        buffer = io.BytesIO()
        Image.effect_noise((50, 40), 60).save(buffer, "JPEG")
        content = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    if content is not None:
        path.write_bytes(content)
    for value in (path, str(path)):
        error = refusal(open_image, value, "image")
        assert (error.argument, error.value) == ("image", path)
        assert str(error).startswith(f"image: {path} {says}")


def test_an_image_that_was_opened_before_is_named_by_its_file(tmp_path):
    path = tmp_path / "photo.png"
    Image.effect_noise((50, 40), 60).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with Image.open(path) as image:
        assert str(path) in str(refusal(open_image, image, "image"))


def test_a_folder_is_not_an_image(tmp_path):
    assert "(Is a directory)" in str(refusal(open_image, tmp_path, "image"))


@pytest.mark.parametrize("value", [7, b"photo.png", ["photo.png"], np.zeros((8, 8, 3))], ids=lambda v: type(v).__name__)
def test_what_is_neither_an_image_nor_a_file_is_refused(value):
    assert "is not an image; give a PIL image or a file" in str(refusal(open_image, value, "inputs.sketch"))


@pytest.mark.parametrize("raised", [SyntaxError("broken PNG file"), ValueError("buffer is not large enough")])
def test_what_pillow_raises_on_rare_damage_is_an_input_error(tmp_path, monkeypatch, raised):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")

    def fail(image):
        raise raised

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert f"photo.png is not a readable image ({raised})" in str(refusal(load_image, tmp_path / "photo.png", 8))


def test_large_images_are_read_without_a_warning(tmp_path, monkeypatch):
    Image.new("RGB", (12, 10)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above it, and refuses above its double
    assert load_image(tmp_path / "large.png", 8).shape == (3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert "large.png" in str(refusal(load_image, tmp_path / "large.png", 8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_damage_of_any_kind_is_an_input_error(tmp_path, kind):
    path = tmp_path / "photo"
    Image.effect_noise((24, 20), 80).convert("RGB").save(path, kind)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    failures = 0
    for _ in range(100):
        damaged = bytearray(whole)
        for place in torch.randint(len(whole), (6,), generator=generator).tolist():
            damaged[place % (60 if place % 2 else len(whole))] ^= 0xFF
        path.write_bytes(damaged[: int(torch.randint(len(whole), (1,), generator=generator)) + 1])
        try:
            assert load_image(path, 16).shape == (3, 16, 16)
        except InputError as error:
            assert error.value == path
            failures += 1
    assert failures > 20


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
    assert np.argwhere(open_mask(mask, (960, 960), 32)).tolist() == [[0, 16]]


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


def test_pixels_keep_their_place_and_colour():
    pixels = torch.full((3, 2, 5), -1.0)
    pixels[0, 1, 4], pixels[2, 0, 0] = 1.0, 0.0
    image = to_image(pixels)
    assert (image.size, image.mode) == ((5, 2), "RGB")
    assert image.getpixel((4, 1)) == (255, 0, 0) and image.getpixel((0, 0)) == (0, 0, 128)
    assert image.getpixel((1, 1)) == (0, 0, 0)


def test_every_level_comes_back_and_what_is_beyond_is_clamped():
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    for dtype in (torch.float32, torch.float64):
        image = to_image(levels.to(dtype) / 127.5 - 1)
        assert image.tobytes() == bytes(level for level in range(256) for _ in range(3))
    beyond = to_image(torch.tensor([-7.0, 7.0]).expand(3, 1, 2).bfloat16())
    assert beyond.tobytes() == bytes([0] * 3 + [255] * 3)


def flat(colour, size=(20, 10)):
    return Image.new("RGB", size, colour)


COLOURS = ["red", "lime", "blue", "black", "cyan"]
RGB = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (0, 255, 255)]


def test_a_grid_fills_its_rows_from_the_left():
    sheet = grid([flat(c) for c in COLOURS], columns=3)
    assert sheet.size == (3 * (20 + MARGIN) + MARGIN, 2 * (10 + MARGIN) + MARGIN)
    for i, rgb in enumerate(RGB):
        x, y = MARGIN + i % 3 * (20 + MARGIN), MARGIN + i // 3 * (10 + MARGIN)
        assert {sheet.getpixel((x + dx, y + dy)) for dx in (0, 19) for dy in (0, 9)} == {rgb}
        assert sheet.getpixel((x - 1, y)) == sheet.getpixel((x, y - 1)) == (255, 255, 255)
    assert sheet.getpixel((sheet.width - MARGIN - 10, sheet.height - MARGIN - 5)) == (255, 255, 255)  # the sixth place


@pytest.mark.parametrize("count, columns", [(1, 1), (2, 1), (4, 2), (9, 3), (16, 4)])
def test_a_grid_is_about_square_by_default(count, columns):
    assert grid([flat("red", (10, 10))] * count).width == columns * (10 + MARGIN) + MARGIN


def ink(sheet, box):
    """How many pixels of a part of the sheet are not white."""
    part = sheet.crop(box).convert("L").point(lambda level: 255 * (level < 250))
    return part.histogram()[255]


def test_captions_stand_below_their_own_images():
    captions = ["one", "", "two words"]
    sheet = grid([flat("white", (96, 96))] * 3, captions, columns=3)
    for i, caption in enumerate(captions):
        left = MARGIN + i * (96 + MARGIN)
        assert ink(sheet, (left, 0, left + 96, MARGIN + 96)) == 0
        assert bool(ink(sheet, (left, MARGIN + 96, left + 96, sheet.height))) == bool(caption)


def test_long_captions_are_wrapped_and_never_cut():
    words = "a long caption of many words that does not fit on one line"
    short, long = (grid([flat("white", (96, 96))], [c]) for c in ("a", words))
    assert long.height > short.height and long.width == short.width
    below = (MARGIN, MARGIN + 96, MARGIN + 96, long.height)
    assert ink(long, below) == ink(long, (0, 0, *long.size)) > 5 * ink(short, (0, 0, *short.size))
    assert ink(long, (0, long.height - MARGIN, *long.size)) == 0


def test_small_images_are_enlarged_by_whole_factors_to_hold_captions():
    image = flat("red", (32, 32))
    image.putpixel((1, 0), (0, 0, 255))
    sheet = grid([image], ["red"])
    assert sheet.width == 96 + 2 * MARGIN
    assert {sheet.getpixel((MARGIN + 3 + dx, MARGIN + dy)) for dx in range(3) for dy in range(3)} == {(0, 0, 255)}
    assert sheet.getpixel((MARGIN + 6, MARGIN)) == (255, 0, 0)


def test_a_caption_wider_than_its_image_does_not_fail():
    assert grid([flat("red", (96, 96))], ["x" * 60]).width == 96 + 2 * MARGIN
