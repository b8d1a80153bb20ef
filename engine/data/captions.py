"""Reads captions files: those in MS-COCO captions layout and Karpathy's. Imports no torch."""

import json
from pathlib import Path

from engine.errors import InputError
from engine.files import unreadable

# File names and captions by image id, and the entries that cannot be used by reason, which names their list.
Listed = tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[int]]]


def read_lists(file: Path, lists: tuple[str, ...], remedy: str) -> dict:
    """The object in a JSON file that has these lists."""
    try:
        content = json.loads(file.read_bytes())  # as bytes: json detects UTF-8 and UTF-16
    except OSError as error:
        raise unreadable("folder", file, error, "restore the file") from None
    except (ValueError, RecursionError) as error:
        raise InputError("folder", file, "restore the file", f"cannot be read ({error})") from None
    return with_lists(content, lists, "folder", file, remedy)


def with_lists(content: object, lists: tuple[str, ...], argument: str, file: Path, remedy: str) -> dict:
    """The parsed content of a captions file, an object that has these lists; InputError if it is not."""
    for key in lists:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(argument, file, remedy, f'is not in MS-COCO captions layout (it has no list "{key}")')
    return content


def parse_captions(file: Path) -> Listed:
    """What a file in MS-COCO captions layout lists; raises InputError about `folder`."""
    remedy = 'it needs the lists "images", with id and file_name, and "annotations", with image_id and caption'
    content = read_lists(file, ("images", "annotations"), remedy)
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


def parse_karpathy(content: dict, splits: list[str]) -> Listed:
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
