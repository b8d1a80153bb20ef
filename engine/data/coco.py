"""`CocoCaptions`: reads data sets in MS-COCO captions layout.

    folder/captions.json            or captions_SPLIT.json: {"images": [{"id", "file_name"}, …],
    folder/images/ or SPLIT/                                 "annotations": [{"image_id", "caption"}, …]}

Real data sets list files that were never downloaded, truncated images and images without captions. These are skipped
and recorded in `CocoCaptions.skipped`; only a data set without any usable image is an error.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from engine.errors import InputError
from engine.images import fit_image, images_up_to_the_limit, open_image


@dataclass(frozen=True)
class CaptionedImage:
    """One image of a data set and its captions."""

    image_id: int
    path: Path
    captions: tuple[str, ...]  # at least one


@dataclass(frozen=True)
class CocoCaptions:
    """The usable images of a data set, and the reasons why the others are not usable."""

    items: tuple[CaptionedImage, ...]
    skipped: dict[Path, str] = field(default_factory=dict)  # reasons by file; `read` adds damaged images

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> "CocoCaptions":
        """Lists the images of `split` without decoding them.

        Captions are in `captions_SPLIT.json` (for "train" also `captions.json`), images in `SPLIT/` or `images/`.
        Raises InputError about `folder` if a file or folder is missing, the captions are not in this layout, or no
        listed image has both a file and a caption.
        """
        folder = Path(folder)
        names = [f"captions_{split}.json"] + (["captions.json"] if split == "train" else [])
        file = _first_existing([folder / name for name in names])
        images = _first_existing([folder / split, folder / "images"])
        files, captions = _parse(file)

        items, skipped = [], {}
        for image_id, name in files.items():
            path = images / name
            if not captions[image_id]:
                skipped[path] = "no captions"
            elif not os.path.isfile(path):  # not Path.is_file, which raises for a name that is too long
                skipped[path] = "no such file"
            else:
                items.append(CaptionedImage(image_id, path, tuple(captions[image_id])))
        dataset = cls(tuple(items), skipped)
        if not items:
            problem = f"lists no image that is in {images} and has a caption ({dataset.summary()})"
            raise InputError("folder", file, "give a data set with images and captions", problem)
        return dataset

    def images(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[CaptionedImage, Image.Image]]:
        """Pairs of `items[start:stop]` and their images, as `open_image` gives them; damaged ones go to `skipped`."""
        for item in self.items[start:stop]:
            try:
                with images_up_to_the_limit():
                    image = open_image(item.path)
            except InputError as error:
                self.skipped[item.path] = f"damaged: {error.problem}"
                continue
            yield item, image

    def read(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[CaptionedImage, Tensor]]:
        """The same with images of uint8 [3, size, size], see `engine.images.fit_image`."""
        for item, image in self.images(start, stop):
            yield item, fit_image(image, size)

    def summary(self) -> str:
        """One line for a log: how many images are usable, and how many are skipped for which reason."""
        usable = sum(item.path not in self.skipped for item in self.items)
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.skipped.items():
            by_reason.setdefault(reason.split(":")[0], []).append(path.name)
        skips = [f"{len(names)} {reason} ({names[0]} first)" for reason, names in by_reason.items()]
        return f"{usable} usable images" + (f"; skipped {', '.join(skips)}" if skips else "")


def _parse(file: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """File names and captions by image id."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("folder", file, "restore the file", f"cannot be read ({error})") from None
    try:
        files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        captions = {image_id: [] for image_id in files}
        for annotation in content["annotations"]:
            caption = annotation["caption"].strip()
            if caption and annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(caption)
    except (ArithmeticError, KeyError, TypeError, AttributeError, ValueError) as error:
        remedy = 'it needs "images" with id and file_name, and "annotations" with image_id and caption'
        problem = f"is not in MS-COCO captions layout ({type(error).__name__}: {error})"
        raise InputError("folder", file, remedy, problem) from None
    return files, captions


def _first_existing(paths: list[Path]) -> Path:
    for path in paths:
        if os.path.exists(path):
            return path
    problem = f"has no {' or '.join(path.name for path in paths)}"
    raise InputError("folder", paths[0].parent, "give the folder of a data set", problem)
