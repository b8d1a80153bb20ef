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

import os
from pathlib import Path

from engine.data.captioned import CaptionedImage, CaptionedImages, leaves_folder
from engine.data.captions import Listed, parse_captions, parse_karpathy, read_lists
from engine.errors import InputError
from engine.files import is_file, is_folder

YEARS = ("2017", "2014")  # of MS-COCO's archives
KARPATHY = ("dataset_coco.json", "dataset_flickr8k.json", "dataset_flickr30k.json")
REMEDY = "give the folder of a data set"


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
            content = read_lists(file, ("images",), 'it needs the list "images" of a file of Karpathy\'s')
            splits = {str(image.get("split")) for image in content["images"] if isinstance(image, dict)}
            if splits.issuperset(split.split("+")):
                return file, folder / "images", parse_karpathy(content, split.split("+"))
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


def _path(images: Path, name: str) -> Path:
    """Where a listed file is, or should be: some tools write names from the folder above, and some with backslashes."""
    plain = os.path.normpath(name)
    spellings = dict.fromkeys([plain, os.path.normpath(name.replace("\\", "/"))])
    paths = [folder / spelling for spelling in spellings for folder in (images, images.parent)]
    return next((path for path in paths if is_file(path, "folder")), paths[0])
