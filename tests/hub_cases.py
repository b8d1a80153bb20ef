"""A cache of the Hugging Face hub, made by a test."""

import shutil
from collections.abc import Iterable
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_cache(source: Path, cache: Path, name: str, refs: Iterable[str]) -> Path:
    """Puts a folder into a cache in huggingface_hub's layout, as a commit of branches and tags; its snapshot there."""
    folder = cache / f"models--{name.replace('/', '--')}"
    for path in filter(Path.is_file, source.rglob("*")):
        blob = folder / "blobs" / str(path.relative_to(source)).replace("/", "-")
        link = folder / "snapshots" / COMMIT / path.relative_to(source)
        for file in (blob, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(blob)
    (folder / "refs").mkdir()
    for ref in refs:
        (folder / "refs" / ref).write_text(COMMIT)
    return folder / "snapshots" / COMMIT
