"""Reads data sets in MS-COCO captions layout.

    folder/captions.json            or captions_SPLIT.json: {"images": [{"id", "file_name"}, …],
    folder/images/ or SPLIT/                                 "annotations": [{"image_id", "caption"}, …]}

    folder/annotations/captions_train2017.json              MS-COCO as it is downloaded; also val, and 2014
    folder/train2017/ or images/train2017/

    folder/dataset_coco.json                                Karpathy's split of MS-COCO 2014: train, restval, val, test
    folder/train2014/ and val2014/, or both in images/      or of Flickr8k or 30k, with its images in images/

Captions files list ids of any kind, and boxes of objects beside captions. What cannot be used is left out, counted and
named.
"""

import json
import os
from pathlib import Path

from engine.data.captioned import CaptionedImage, CaptionedImages, leaves_folder
from engine.errors import InputError
from engine.files import is_file, is_folder, unreadable

YEARS = ("2017", "2014")  # of MS-COCO's archives
KARPATHY = ("dataset_coco.json", "dataset_flickr8k.json", "dataset_flickr30k.json")
REMEDY = "give the folder of a data set"
# File names and captions by image id, and the entries that cannot be used by reason, which names their list.
Listed = tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[int]]]


def open_coco(folder: str | Path, split: str = "train") -> CaptionedImages:
    """Lists the images of `split` without decoding them.

    Captions are in `captions_SPLIT.json` (for "train" also `captions.json`), images in `SPLIT/`, `images/SPLIT/` or
    `images/`; or both are where MS-COCO's archives have them, also for "train2014" and the like. A file of Karpathy's
    is used if it has the split; "train+restval" joins two of its splits. A file that is listed under several ids is one
    image with the captions of all of them. Several files under one id are skipped, since it is unknown which of them
    the captions describe.
    Raises InputError about `folder` if a file or folder is missing, the captions are not in this layout, or no listed
    image has both a file and a caption.
    """
    file, images, (listed, captions, ignored) = _find(Path(folder), split)
    files = {image_id: {_path(images, name): name for name in names} for image_id, names in listed.items()}
    names = {path: name for by_path in files.values() for path, name in by_path.items()}
    ids: dict[Path, list[str]] = {path: [] for path in names}  # those that no other file has
    for image_id, paths in files.items():
        for path in paths if len(paths) == 1 else ():
            ids[path].append(image_id)

    items, skipped = [], {}
    for path, name in names.items():
        texts = tuple(text for image_id in ids[path] for text in captions[image_id])
        if leaves_folder(name):
            skipped[path] = "outside of the folder"
        elif not texts:
            skipped[path] = "no captions" if ids[path] else "id that several files have"
        elif not is_file(path, "folder"):
            skipped[path] = "no such file"
        elif not os.access(path, os.R_OK):
            skipped[path] = "no permission to read"
        else:
            items.append(CaptionedImage(ids[path][0], path, texts))
    dataset = CaptionedImages(tuple(items), skipped, ignored)
    if not items:
        problem = f"lists no image that is in {images} and has a caption ({dataset.summary()})"
        raise InputError("folder", file, "give a data set with images and captions", problem)
    return dataset


def captions_files(folder: Path, split: str) -> list[Path]:
    """The files in a folder that may have the captions of a split."""
    files = [folder / name for name in KARPATHY] + [file for file, _ in _places(folder, split)]
    return [file for file in files if is_file(file, "folder")]


def _places(folder: Path, split: str) -> list[tuple[Path, list[Path]]]:
    """Where captions files of MS-COCO's layout may be, and the folders where their images are."""
    own = [f"captions_{split}.json"] + ["captions.json"] * (split == "train")
    places = [(folder / name, [folder / split, folder / "images" / split, folder / "images"]) for name in own]
    downloaded = [split] if split.endswith(YEARS) else [split + year for year in YEARS]
    for images in ("{}", "images/{}", "images"):
        for name in downloaded:
            for parent in (folder / "annotations", folder):
                places.append((parent / f"captions_{name}.json", [folder / images.format(name)]))
    return places


def _find(folder: Path, split: str) -> tuple[Path, Path, Listed]:
    """The file of captions and the folder of images of a split, and what the file lists."""
    if not is_folder(folder, "folder"):
        raise InputError("folder", folder, REMEDY, "is not a folder")
    places = [(file, images) for file, images in _places(folder, split) if is_file(file, "folder")]
    for file in (folder / name for name in KARPATHY):
        if is_file(file, "folder"):
            content = _content(file, ("images",), 'it needs the list "images" of a file of Karpathy\'s')
            splits = {str(image.get("split")) for image in content["images"] if isinstance(image, dict)}
            if splits.issuperset(split.split("+")):
                return file, folder / "images", _karpathy(content, split.split("+"))
            if not places:
                raise InputError("folder", file, f"use {', '.join(sorted(splits))}", f"has no split {split!r}")
    if not places:
        own = f"captions_{split}.json" + " or captions.json" * (split == "train")
        problem = f"has no {own}, nor annotations/captions_{split}{YEARS[0]}.json, {KARPATHY[0]} or tar files"
        raise InputError("folder", folder, REMEDY, problem)
    for file, candidates in places:
        for images in candidates:
            if is_folder(images, "folder"):
                return file, images, parse_captions(file)
    missing = dict.fromkeys(str(images.relative_to(folder)) for _, candidates in places for images in candidates)
    raise InputError("folder", folder, REMEDY, f"has {places[0][0].name}, but no folder {' or '.join(missing)}")


def _content(file: Path, lists: tuple[str, ...], remedy: str) -> dict:
    """The object in a JSON file that has these lists."""
    try:
        content = json.loads(file.read_bytes())  # as bytes: json detects UTF-8 and UTF-16
    except OSError as error:
        raise unreadable("folder", file, error, "restore the file") from None
    except (ValueError, RecursionError) as error:
        raise InputError("folder", file, "restore the file", f"cannot be read ({error})") from None
    for key in lists:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError("folder", file, remedy, f'is not in MS-COCO captions layout (it has no list "{key}")')
    return content


def parse_captions(file: Path) -> Listed:
    """What a file in MS-COCO captions layout lists; raises InputError about `folder`."""
    remedy = 'it needs the lists "images", with id and file_name, and "annotations", with image_id and caption'
    content = _content(file, ("images", "annotations"), remedy)
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


def _karpathy(content: dict, splits: list[str]) -> Listed:
    """{"images": [{"split", "filepath", "filename", "cocoid" or "imgid", "sentences": [{"raw"}, …]}, …]}"""
    names: dict[str, list[str]] = {}
    captions: dict[str, list[str]] = {}
    ignored: dict[str, list[int]] = {}
    for i, image in enumerate(content["images"]):
        if not isinstance(image, dict) or image.get("split") not in splits:
            continue
        image_id, name = _id(image.get("cocoid", image.get("imgid"))), image.get("filename")
        if image_id is None or not isinstance(name, str):
            ignored.setdefault("images without cocoid or filename", []).append(i)
            continue
        folder, sentences = image.get("filepath"), image.get("sentences")
        names.setdefault(image_id, []).append(f"{folder}/{name}" if isinstance(folder, str) else name)
        raw = [s.get("raw") for s in sentences if isinstance(s, dict)] if isinstance(sentences, list) else []
        captions.setdefault(image_id, []).extend(c.strip() for c in raw if isinstance(c, str) and c.strip())
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
