"""`CocoCaptions`: reads data sets in MS-COCO captions layout.

    folder/captions.json            or captions_SPLIT.json: {"images": [{"id", "file_name"}, …],
    folder/images/ or SPLIT/                                 "annotations": [{"image_id", "caption"}, …]}

    folder/annotations/captions_train2017.json              MS-COCO as it is downloaded; also val, and 2014
    folder/train2017/ or images/train2017/

Real data sets list files that were never downloaded, truncated images, images without captions, boxes of objects beside
captions, and ids of any kind. What cannot be used is left out, counted and named; only a data set without any usable
image is an error.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from engine.errors import InputError, shown
from engine.files import is_file, is_folder, unreadable
from engine.images import fit_image, images_up_to_the_limit, open_image

YEARS = ("2017", "2014")  # of MS-COCO's archives


@dataclass(frozen=True)
class CaptionedImage:
    """One image of a data set and its captions."""

    image_id: str  # the file's own, as text
    path: Path
    captions: tuple[str, ...]  # at least one


@dataclass(frozen=True)
class CocoCaptions:
    """The usable images of a data set, and the reasons why the others are not usable."""

    items: tuple[CaptionedImage, ...]
    skipped: dict[Path, str] = field(default_factory=dict)  # reasons by file; `read` adds damaged images
    ignored: dict[str, list[int]] = field(default_factory=dict)  # other entries of the captions file, by reason

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> "CocoCaptions":
        """Lists the images of `split` without decoding them.

        Captions are in `captions_SPLIT.json` (for "train" also `captions.json`), images in `SPLIT/`, `images/SPLIT/` or
        `images/`; or both are where MS-COCO's archives have them. A file that is listed under several ids is one image
        with the captions of all of them. Several files under one id are skipped,
        since it is unknown which of them the captions describe.
        Raises InputError about `folder` if a file or folder is missing, the captions are not in this layout, or no
        listed image has both a file and a caption.
        """
        file, images = _find(Path(folder), split)
        listed, captions, ignored = parse_captions(file)
        files = {image_id: {_path(images, name): name for name in names} for image_id, names in listed.items()}
        names = {path: name for by_path in files.values() for path, name in by_path.items()}
        ids: dict[Path, list[str]] = {path: [] for path in names}  # those that no other file has
        for image_id, paths in files.items():
            for path in paths if len(paths) == 1 else ():
                ids[path].append(image_id)

        items, skipped = [], {}
        for path, name in names.items():
            texts = tuple(text for image_id in ids[path] for text in captions[image_id])
            if _leaves_folder(name):
                skipped[path] = "outside of the folder"
            elif not texts:
                skipped[path] = "no captions" if ids[path] else "id that several files have"
            elif not is_file(path, "folder"):
                skipped[path] = "no such file"
            elif not os.access(path, os.R_OK):
                skipped[path] = "no permission to read"
            else:
                items.append(CaptionedImage(ids[path][0], path, texts))
        dataset = cls(tuple(items), skipped, ignored)
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
        """One line for a log: how many images are usable, and how much is left out for which reason."""
        usable = sum(item.path not in self.skipped for item in self.items)
        names: dict[str, list[str]] = {}
        for path, reason in self.skipped.items():
            names.setdefault(reason.split(":")[0], []).append(path.name)
        # `shown` escapes and cuts names; without its quotes.
        skipped = [f"{len(files)} {reason} ({shown(files[0])[1:-1]} first)" for reason, files in names.items()]
        ignored = [f"{len(i)} {reason} ({reason.split()[0]}[{i[0]}] first)" for reason, i in self.ignored.items()]
        parts = [f"{usable} usable images", f"skipped {', '.join(skipped)}", f"ignored {', '.join(ignored)}"]
        return "; ".join(part for part, some in zip(parts, (True, skipped, ignored), strict=True) if some)


def _find(folder: Path, split: str) -> tuple[Path, Path]:
    """The file of captions and the folder of images of a split."""
    remedy = "give the folder of a data set"
    if not is_folder(folder, "folder"):
        raise InputError("folder", folder, remedy, "is not a folder")
    own = [f"captions_{split}.json"] + (["captions.json"] if split == "train" else [])
    places = [(folder / name, [folder / split, folder / "images" / split, folder / "images"]) for name in own]
    downloaded = [split + year for year in YEARS]
    for images in ("{}", "images/{}", "images"):
        for name in downloaded:
            for parent in (folder / "annotations", folder):
                places.append((parent / f"captions_{name}.json", [folder / images.format(name)]))
    places = [(file, images) for file, images in places if is_file(file, "folder")]
    if not places:
        problem = f"has no {' or '.join(own)}, nor annotations/captions_{downloaded[0]}.json"
        raise InputError("folder", folder, remedy, problem)
    for file, candidates in places:
        for images in candidates:
            if is_folder(images, "folder"):
                return file, images
    missing = dict.fromkeys(str(images.relative_to(folder)) for _, candidates in places for images in candidates)
    raise InputError("folder", folder, remedy, f"has {places[0][0].name}, but no folder {' or '.join(missing)}")


def parse_captions(file: Path) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[int]]]:
    """File names and captions by image id, and the entries that cannot be used by reason, which names their list."""
    remedy = 'it needs the lists "images", with id and file_name, and "annotations", with image_id and caption'
    try:
        content = json.loads(file.read_bytes())  # as bytes: json detects UTF-8 and UTF-16
    except OSError as error:
        raise unreadable("folder", file, error, "restore the file") from None
    except (ValueError, RecursionError) as error:
        raise InputError("folder", file, "restore the file", f"cannot be read ({error})") from None
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError("folder", file, remedy, f'is not in MS-COCO captions layout (it has no list "{key}")')

    names: dict[str, list[str]] = {}
    ignored: dict[str, list[int]] = {}
    for i, image in enumerate(content["images"]):
        image_id, name = (_id(image.get("id")), image.get("file_name")) if isinstance(image, dict) else (None, None)
        if image_id is None or not isinstance(name, str):
            ignored.setdefault("images without id or file_name", []).append(i)
        else:
            names.setdefault(image_id, []).append(name)
    captions: dict[str, list[str]] = {image_id: [] for image_id in names}
    for i, annotation in enumerate(content["annotations"]):
        entry = annotation if isinstance(annotation, dict) else {}
        image_id, caption = _id(entry.get("image_id")), entry.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            ignored.setdefault("annotations without a caption", []).append(i)
        elif image_id not in captions:
            ignored.setdefault("annotations of unlisted images", []).append(i)
        else:
            captions[image_id].append(caption.strip())
    return names, captions, ignored


def _id(value) -> str | None:
    """An id as text, so that 7, 7.0 and "7" are one; None for a value of another kind."""
    if isinstance(value, float) and value.is_integer():  # not NaN
        value = int(value)
    if isinstance(value, str):
        return value or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _path(images: Path, name: str) -> Path:
    """Where a listed file is, or should be: some tools write names from the folder above, and some with backslashes."""
    plain = os.path.normpath(name)
    spellings = dict.fromkeys([plain, os.path.normpath(name.replace("\\", "/"))])
    paths = [folder / spelling for spelling in spellings for folder in (images, images.parent)]
    return next((path for path in paths if is_file(path, "folder")), paths[0])


def _leaves_folder(name: str) -> bool:
    plain = os.path.normpath(name.replace("\\", "/"))
    return os.path.isabs(plain) or plain.split("/")[0] == ".."
