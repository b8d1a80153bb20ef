"""Opens a data set of captioned images, in whichever of the layouts it is."""

from pathlib import Path

from engine.data.captioned import CaptionedImages
from engine.data.coco import captions_files, open_coco
from engine.data.shards import REMEDY, SPECIAL, open_shards, shard_files
from engine.errors import InputError
from engine.files import is_folder


def open_captioned(source: str | Path, split: str = "train") -> CaptionedImages:
    """Lists the images of a split without decoding them.

    source  a folder in MS-COCO captions layout, see `engine.data.coco`, a folder of tar files, a tar file, or a pattern
            of their names, see `engine.data.shards`
    Raises InputError about `folder` for what is neither, or has no usable image.
    """
    source = Path(source)
    if is_folder(source, "folder"):
        files = [] if captions_files(source, split) else shard_files(source, split)
        return open_shards(files) if files else open_coco(source, split)
    files = shard_files(source)
    if not files and (source.suffix == ".tar" or any(character in str(source) for character in SPECIAL)):
        raise InputError("folder", source, REMEDY, "matches no tar file")
    return open_shards(files) if files else open_coco(source, split)
