"""Images: opening and fitting them, masks in pixels, compositing, and grids with captions for people to look at.

Independent of autoencoders, tokens and tasks. A mask is a numpy array [H, W] of bool, True where the image is to be
generated.
"""

import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import avg_pool2d

from engine.errors import InputError
from engine.files import unreadable

# What Pillow raises on damaged files: most formats, some PNGs, TIFF and EXIF, absurd sizes (a header's flipped bit),
# PNGs without their palette or with an empty chunk, AVIF and DDS, SPIDER.
IMAGE_ERRORS = (
    OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError,
    AssertionError, LookupError, RuntimeError, AttributeError,
)  # fmt: skip
ORIENTATION = 0x0112  # tag of EXIF
PHOTOMETRIC, WHITE_IS_ZERO = 0x0106, 0  # tag of TIFF
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BACKGROUND = (255, 255, 255)  # what is seen through transparent images
WHITE = 127.5  # of 255; a mask is white above it
COLOURED = 64  # a mask's pixel is refused if its highest and lowest channel differ by more levels
MARGIN, FONT_SIZE = 8, 12  # of a grid, in pixels


def open_image(value: Image.Image | str | PathLike | BinaryIO, argument: str = "image") -> Image.Image:
    """A PIL image, a file or a binary stream → an upright image in memory: RGBA where it has transparency, else RGB.

    Raises InputError about `argument`, naming the file, for what is not a whole image.
    """
    if not isinstance(value, Image.Image | str | PathLike) and not hasattr(value, "read"):
        raise InputError(argument, value, "give a PIL image or a file", "is not an image")
    try:
        if isinstance(value, Image.Image):
            return _upright(value)
        # Opened here: files that Pillow opens itself it may map into memory, which garbles turned TIFFs.
        with nullcontext(value) if hasattr(value, "read") else open(value, "rb") as stream, Image.open(stream) as file:
            if file.format == "EPS":  # a program, which Pillow would have Ghostscript run
                raise UnidentifiedImageError
            return _upright(file)
    except UnidentifiedImageError:
        raise InputError(argument, _name(value), "give a PNG or JPEG", "is not an image of a known format") from None
    except IMAGE_ERRORS as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not about what is in the file
            raise unreadable(argument, _name(value), error, "give the file of an image") from None
        problem = f"is not a readable image ({error})" if str(error) else "is not a readable image"
        raise InputError(argument, _name(value), "give a whole one", problem) from None


def open_mask(
    value: Image.Image | str | PathLike, image_size: tuple[int, int], size: int, argument: str = "mask"
) -> np.ndarray:
    """A mask as people draw it → [size, size] bool, True where the image's resized pixel is made from any white one.

    value       a PIL image or a file, upright as the image is: white where that is to be generated. Transparent is kept
    image_size  (width, height) of the image that the mask belongs to
    size        pixels a side of the image as `fit_image` crops and resizes it
    Raises InputError about `argument` if the mask cannot be read, has another size, has colours, or is nowhere white
    though not black.
    """
    mask = open_image(value, argument)
    if mask.size != image_size:
        remedy = f"give a mask of the image's size, {image_size[0]}x{image_size[1]}"
        raise InputError(argument, _name(value), remedy, f"is {mask.width}x{mask.height}")
    grey, colours = np.asarray(mask.convert("L")), np.asarray(mask.convert("RGB"))  # [H, W], [H, W, 3] uint8
    alpha = np.asarray(mask.getchannel("A")) if mask.mode == "RGBA" else np.uint8(255)  # [H, W] or one for all
    coloured = (colours.max(2) - colours.min(2) > COLOURED) & (alpha > WHITE)
    if coloured.any():
        example = ", ".join(map(str, colours[coloured][0].tolist()))
        remedy = "use white where the image is to be generated, and black or transparent elsewhere"
        raise InputError(argument, _name(value), remedy, f"has pixels of other colours, such as rgb({example})")
    levels = grey * (alpha / np.float32(255))  # [H, W] float32, 0…255: a half transparent white is half as white
    white = levels > WHITE
    if not white.any() and levels.max() >= 1:
        remedy = "give white (255) where the image is to be generated, or leave the mask out to keep all of it"
        raise InputError(
            argument, _name(value), remedy, f"has no white: its brightest level is {levels.max():.0f} of 255"
        )
    return _fit_mask(white, size)


def _fit_mask(white: np.ndarray, size: int) -> np.ndarray:
    """[H, W] bool → [size, size] bool: True where `fit_image` makes a pixel from any that is True."""
    (height, width), (left, top, right, bottom) = white.shape, _centre_square(white.shape[::-1])
    rows = np.stack([white[read].any(0) for read in _pixels_read(height, top, bottom, size)])  # [size, W]
    return np.stack([rows[:, read].any(1) for read in _pixels_read(width, left, right, size)], 1)


def _pixels_read(length: int, start: float, stop: float, size: int) -> Iterator[np.ndarray]:
    """Which of `length` pixels in a line each of `size` is made from, where Pillow resizes start…stop by Lanczos.

    The filter is sinc(d)·sinc(d / 3) for distances d below 3, in pixels of the coarser of the two. Its zeros are left
    out: where the size stays, a pixel is made from itself alone.
    """
    scale = (stop - start) / size
    unit = max(scale, 1.0)
    for i in range(size):
        centre = start + (i + 0.5) * scale
        near = np.arange(max(0, int(centre - 3 * unit)), min(length, int(centre + 3 * unit) + 1))
        distance = np.abs(near + 0.5 - centre) / unit
        yield near[(distance < 3) & (np.abs(np.sinc(distance)) > 1e-9)]


def _centre_square(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest square in the middle of an image of this width and height."""
    left, top = ((length - min(size)) / 2 for length in size)
    return left, top, left + min(size), top + min(size)


@contextmanager
def images_up_to_the_limit() -> Iterator[None]:
    """Silences Pillow's warnings about images of more than half the size it refuses, and about unreadable metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        yield


def fit_image(image: Image.Image, size: int) -> Tensor:
    """Any Pillow image as RGB uint8 [3, size, size]: on white, shorter side resized to `size`, centre cropped.

    Takes greyscale of any depth, palettes, transparency and CMYK. Raises ValueError for a mode that Pillow cannot
    convert.
    """
    image = on_background(_eight_bits(image))
    return to_levels(image.resize((size, size), Image.Resampling.LANCZOS, box=_centre_square(image.size)))


def on_background(image: Image.Image, colour: tuple[int, int, int] = BACKGROUND) -> Image.Image:
    """An image of mode RGB or RGBA as RGB, its transparent parts in this colour."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
    return image.convert("RGB")


def to_levels(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return levels.reshape(image.height, image.width, 3).permute(2, 0, 1)


def from_levels(levels: Tensor) -> Image.Image:
    """uint8 [3, H, W] → an RGB image."""
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _upright(image: Image.Image) -> Image.Image:
    """The image in 8 bits a channel, turned as its EXIF data say."""
    image.load()  # before anything else, so that damage in the pixels is never taken for damage in the metadata
    if 0 in image.size:
        raise ValueError("without a pixel")
    try:
        turn = TURNED.get(image.getexif()[ORIENTATION])
    except Exception:  # metadata can be absent, or wrong in any way, and the pixels are whole
        turn = None
    image = _eight_bits(image)
    image.info = {}  # with EXIF data it would be turned again when it is next opened
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image in 8 bits a channel: RGBA where it has transparency, else RGB.

    Grey levels of mode I;16, of either byte order, are of 0…65535. Those of modes I and F, which do not say their
    range, are of 0…1 (F only), 0…255 or 0…65535, whichever the highest fits into.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_grey(image)
    if image.mode == "La":  # which Pillow converts to nothing but LA
        image = image.convert("LA")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.float64)  # [H, W]
    highest = 65535
    if not image.mode.startswith("I;16"):
        peak = levels[np.isfinite(levels)].max(initial=0)
        highest = 1 if image.mode == "F" and peak <= 1 else 255 if peak <= 255 else 65535
    levels = np.nan_to_num(levels, nan=0.0).clip(0, highest)
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = highest - levels  # Pillow does so for 8 bits only
    # A level above 0 stays above 0: whether a mask is black must not depend on its depth.
    grey = Image.fromarray(np.maximum((levels * (255 / highest)).round(), levels > 0).astype(np.uint8))
    transparent = image.info.get("transparency")  # 16-bit PNGs may name one level that is transparent
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    alpha = Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))
    return Image.merge("RGBA", (grey, grey, grey, alpha))


def _name(value) -> object:
    """What an error calls an image: its file where it has one."""
    if isinstance(value, Image.Image):
        return Path(file) if (file := getattr(value, "filename", "")) else value
    return Path(value) if isinstance(value, str) and value else value


def fill_masked(given: Tensor, mask: np.ndarray) -> Tensor:
    """An image [3, H, W] whose masked pixels [H, W] bool are each as the nearest known one; grey if none is known.

    An autoencoder's latents of known pixels also depend on the pixels around them: filled before encoding, hidden
    content cannot leak into the latents. Runs on one thread: numpy throughout.
    """
    if mask.all():
        return torch.from_numpy(np.zeros_like(given.numpy()))
    if not mask.any():
        return given
    from scipy.ndimage import distance_transform_edt  # takes a third of a second to import; only masks need it

    rows, columns = distance_transform_edt(mask, return_distances=False, return_indices=True)  # [H, W] each
    return torch.from_numpy(given.numpy()[:, rows, columns])


def composite(given: Tensor, generated: Tensor, mask: np.ndarray, radius: int) -> Tensor:
    """Generated images [n, 3, H, W] in the masked pixels [H, W] bool of a given one [3, H, W], without a seam.

    Known pixels are the given ones. How the two differ there is carried on into the masked region, as a mean over the
    known pixels at most `radius` away, and fades out over as many. The given image's masked pixels are not used.
    """
    weights, masked = torch.from_numpy(feather(mask, radius)), torch.from_numpy(mask)  # [H, W]

    def summed(x: Tensor) -> Tensor:
        """Sums over the window around each pixel, but for a common factor."""
        return avg_pool2d(x, 2 * radius + 1, stride=1, padding=radius)

    known = (~masked).float()[None]  # [1, H, W]
    carried = summed((given - generated) * known) / summed(known).clamp_min(1e-6)  # [n, 3, H, W]
    return torch.where(masked, generated + (1 - weights) * carried, given)


def feather(mask: np.ndarray, radius: int) -> np.ndarray:
    """How generated each pixel is, [H, W] float32.

    Exactly 0 on known pixels (mask False), rising linearly inside the masked region to 1 at a distance of radius + 1
    pixels from the nearest known one (chessboard distance). The border of the image is not a known pixel.
    """
    assert radius >= 0, radius
    mask = np.asarray(mask, bool)
    if mask.all():  # there is nothing to be distant from
        return np.ones(mask.shape, np.float32)
    from scipy.ndimage import distance_transform_cdt

    distance = distance_transform_cdt(mask, metric="chessboard")  # [H, W], 0 on known pixels
    return distance.clip(0, radius + 1).astype(np.float32) / np.float32(radius + 1)


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in −1..1 → an RGB image."""
    return from_levels(((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte())


def grid(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """Images of one size side by side on white, `columns` in a row (default: about square), captions wrapped below."""
    columns = columns or max(1, round(len(images) ** 0.5))
    rows = -(-len(images) // columns)
    # Captions need room: small images are enlarged to at least 96 pixels, by whole factors so that they stay sharp.
    enlarge = -(-96 // images[0].width) if captions else 1
    width, height = images[0].width * enlarge, images[0].height * enlarge
    font = ImageFont.load_default(FONT_SIZE)
    lines = [_wrap(caption, font, width) for caption in captions or [""] * len(images)]
    text = max(len(line) for line in lines) * (FONT_SIZE + 3) if captions else 0
    cell = (width + MARGIN, height + text + MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = MARGIN + i % columns * cell[0], MARGIN + i // columns * cell[1]
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for j, line in enumerate(lines[i]):
            draw.text((x + width / 2, y + height + 2 + j * (FONT_SIZE + 3)), line, "black", font, anchor="ma")
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
