"""Reader of data sets in MS-COCO captions layout, and of single pictures.

    folder/captions.json            or captions_SPLIT.json: {"images": [{"id", "file_name"}, …],
    folder/images/ or SPLIT/                                 "annotations": [{"image_id", "caption"}, …]}

Real sets list files that were never downloaded, pictures that are cut off, and pictures nobody captioned. They are
skipped and named in `CocoCaptions.skipped`; only a set without any usable picture is an error.
"""

import json
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

# What Pillow raises on damaged files: most formats, some PNGs, TIFF and EXIF, absurd sizes (a header's flipped bit).
DAMAGED = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


class ImageError(ValueError):
    """A picture that cannot be read; the message names the file."""


@dataclass(frozen=True)
class CaptionedImage:
    """One picture of a data set and its captions, at least one."""

    image_id: int
    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CocoCaptions:
    """The usable pictures of a data set, and why the others are not."""

    items: tuple[CaptionedImage, ...]
    skipped: dict[Path, str] = field(default_factory=dict)  # why; `read` adds the damaged ones it meets

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> "CocoCaptions":
        """List the pictures of `split` without decoding them.

        Captions are in `captions_SPLIT.json` (for "train" also `captions.json`), pictures in `SPLIT/` or `images/`.
        Raises ValueError if there is no such file or folder, if the file is not in this layout, or if no listed picture
        has both a file and a caption.
        """
        folder = Path(folder)
        names = [f"captions_{split}.json"] + (["captions.json"] if split == "train" else [])
        file = _first_existing([folder / name for name in names])
        pictures = _first_existing([folder / split, folder / "images"])
        files, captions = _parse(file)

        items, skipped = [], {}
        for image_id, name in files.items():
            path = pictures / name
            if not captions[image_id]:
                skipped[path] = "no captions"
            elif not os.path.isfile(path):  # not Path's, which raises where a name is too long
                skipped[path] = "no such file"
            else:
                items.append(CaptionedImage(image_id, path, tuple(captions[image_id])))
        dataset = cls(tuple(items), skipped)
        if not items:
            raise ValueError(f"{file}: {dataset.summary()}; give a set whose pictures are in {pictures} with captions")
        return dataset

    def read(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[CaptionedImage, Tensor]]:
        """Pairs of `items[start:stop]` and their pictures, uint8 [3, size, size]; damaged ones go to `skipped`."""
        for item in self.items[start:stop]:
            try:
                picture = load_image(item.path, size)
            except ImageError as error:
                self.skipped[item.path] = f"damaged: {error}"
                continue
            yield item, picture

    def summary(self) -> str:
        """One line for a log: how many pictures are usable, and how many are skipped for which reason."""
        usable = sum(item.path not in self.skipped for item in self.items)
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.skipped.items():
            by_reason.setdefault(reason.split(":")[0], []).append(path.name)
        skips = [f"{len(names)} {reason} ({names[0]} first)" for reason, names in by_reason.items()]
        return f"{usable} usable pictures" + (f"; skipped {', '.join(skips)}" if skips else "")


def load_image(path: str | Path, size: int) -> Tensor:
    """The picture at `path` as uint8 [3, size, size], see `fit_image`; raises ImageError naming a damaged file."""
    try:
        with pictures_up_to_the_limit(), Image.open(path) as image:
            return fit_image(image, size)
    except DAMAGED as error:
        raise ImageError(f"{path}: not a readable picture ({error})") from None


@contextmanager
def pictures_up_to_the_limit() -> Iterator[None]:
    """Without Pillow's warnings of pictures above half of the size that it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def fit_image(image: Image.Image, size: int) -> Tensor:
    """Any Pillow image as RGB uint8 [3, size, size]: upright, on white, shorter side resized to `size`, centre cropped.

    Takes greyscale of 1 to 16 bits, palettes, transparency and CMYK, and turns the picture as its EXIF data say.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") and image.getextrema()[1] > 255:  # 16 bits, which Pillow would clip to 8
        image = image.convert("I").point(lambda grey: grey / 257).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(size, size, 3).permute(2, 0, 1)


def _parse(file: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """File names and captions by image id."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); restore the file") from None
    try:
        files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        captions = {image_id: [] for image_id in files}
        for annotation in content["annotations"]:
            caption = annotation["caption"].strip()
            if caption and annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(caption)
    except (ArithmeticError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file}: is not in MS-COCO captions layout ({type(error).__name__}: {error}); "
            'it needs "images" with id and file_name, and "annotations" with image_id and caption'
        ) from None
    return files, captions


def _first_existing(paths: list[Path]) -> Path:
    for path in paths:
        if os.path.exists(path):
            return path
    raise ValueError(f"{paths[0].parent}: has no {' or '.join(path.name for path in paths)}; give a data set's folder")
