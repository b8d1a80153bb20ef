"""Images: opening and fitting files of every kind, pixels and levels, grids."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from image_cases import MODES, load_image, of_mode, refusal
from PIL import Image

from engine.errors import InputError
from engine.images import (
    MARGIN,
    fit_image,
    grid,
    open_image,
    to_image,
)

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
SOME_GREY = Image.linear_gradient("L").resize((40, 30))


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


def test_tiffs_in_which_0_is_white_keep_their_brightness(tmp_path):
    for mode in ("L", "I;16"):
        inverted = of_mode(SOME_GREY.point(lambda level: 255 - level), mode)
        inverted.save(tmp_path / "inverted.tif")
        entry = b"\x06\x01\x03\0\x01\0\0\0"  # of the tag that says what 0 means
        content = (tmp_path / "inverted.tif").read_bytes()
        assert content.count(entry + b"\x01") == 1
        (tmp_path / "inverted.tif").write_bytes(content.replace(entry + b"\x01", entry + b"\0"))
        assert (load_image(tmp_path / "inverted.tif", 30).int() - fit_image(SOME_GREY, 30).int()).abs().max() <= 1


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


@pytest.mark.parametrize("name", ["turned.png", "turned.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(tmp_path, orientation, name):
    shown = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that undoes each
    stored = shown.transpose(back[orientation]) if orientation > 1 else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif)
    opened = open_image(tmp_path / name)
    assert opened.convert("L").tobytes() == shown.tobytes()
    assert open_image(opened).tobytes() == opened.tobytes(), "an image that is opened twice is turned once"


def test_opening_leaves_the_callers_image_as_it_was():
    image = of_mode(SOME_GREY, "LA")
    before = image.tobytes()
    assert (open_image(image).mode, image.mode, image.tobytes()) == ("RGBA", "LA", before)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"], ids=["nonsense", "cut off"])
def test_malformed_exif_is_ignored(tmp_path, kind, exif):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "image", kind, exif=exif)
    assert load_image(tmp_path / "image", 8)[0].float().mean() > 250


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "does not exist; give the file of an image"),
        (b"", "is not an image of a known format; give a PNG or JPEG"),
        (b"<html>404</html>", "is not an image of a known format; give a PNG or JPEG"),
        (EPS, "is not an image of a known format; give a PNG or JPEG"),
        ("half", "is not a readable image (image file is truncated"),
    ],
    ids=["missing", "empty", "text", "EPS", "half"],
)
def test_files_other_than_whole_images_are_named(tmp_path, content, says):
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
    assert "cannot be read (Is a directory); give the file of an" in str(refusal(open_image, tmp_path, "image"))


@pytest.mark.parametrize("size", [(0, 9), (9, 0), (0, 0)])
def test_an_image_without_a_pixel_is_refused(size):
    assert "is not a readable image (without a pixel)" in str(refusal(open_image, Image.new("RGB", size), "image"))


@pytest.mark.parametrize("value", [7, b"photo.png", ["photo.png"], np.zeros((8, 8, 3))], ids=lambda v: type(v).__name__)
def test_what_is_neither_an_image_nor_a_file_is_refused(value):
    assert "is not an image; give a PIL image or a file" in str(refusal(open_image, value, "inputs.sketch"))


@pytest.mark.parametrize(
    "raised",
    [
        SyntaxError("broken PNG file"),
        ValueError("buffer is not large enough"),
        IndexError("index out of range"),  # of an empty chunk of a PNG
        NotImplementedError("Unknown pixel format flags 16"),  # of a DDS
        AttributeError("'SpiderImageFile' object has no attribute 'stkoffset'"),
    ],
    ids=lambda raised: type(raised).__name__,
)
def test_what_pillow_raises_on_rare_damage_is_an_input_error(tmp_path, monkeypatch, raised):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")

    def fail(image):
        raise raised

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert f"photo.png is not a readable image ({raised})" in str(refusal(load_image, tmp_path / "photo.png", 8))


@pytest.mark.parametrize("chunks", ["PLTE missing", "iCCP empty"])
def test_a_png_whose_chunks_do_not_fit_together_is_an_input_error(tmp_path, chunks):
    path = tmp_path / "photo.png"
    Image.new("L", (8, 8)).save(path)
    header, rest = bytearray(path.read_bytes()[:33]), path.read_bytes()[33:]
    if chunks == "PLTE missing":
        header[25] = 3  # the type of colours: a palette
        header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    else:
        rest = rest[:-12] + struct.pack(">I", 0) + b"iCCP" + struct.pack(">I", zlib.crc32(b"iCCP")) + rest[-12:]
    path.write_bytes(header + rest)
    assert str(refusal(load_image, path, 8)).startswith(f"image: {path} is not a readable image")


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
