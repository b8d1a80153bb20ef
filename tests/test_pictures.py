"""Pictures for people: pixel values, and grids whose pictures and captions stand where they should."""

import pytest
import torch
from PIL import Image

from engine.pictures import MARGIN, grid, to_image


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


def test_captions_stand_below_their_own_pictures():
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


def test_small_pictures_are_enlarged_by_whole_factors_to_hold_captions():
    picture = flat("red", (32, 32))
    picture.putpixel((1, 0), (0, 0, 255))
    sheet = grid([picture], ["red"])
    assert sheet.width == 96 + 2 * MARGIN
    assert {sheet.getpixel((MARGIN + 3 + dx, MARGIN + dy)) for dx in range(3) for dy in range(3)} == {(0, 0, 255)}
    assert sheet.getpixel((MARGIN + 6, MARGIN)) == (255, 0, 0)


def test_a_caption_wider_than_its_picture_does_not_fail():
    assert grid([flat("red", (96, 96))], ["x" * 60]).width == 96 + 2 * MARGIN
