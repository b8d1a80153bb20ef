"""What a run is made from: digests of a data set's images and captions, so that a change is noticed and named."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from engine.data.captioned import CaptionedImage, CaptionedImages

PART = 4096  # files that are given to the threads at a time


def record_of(dataset: CaptionedImages, before: Mapping[str, list] | None = None) -> dict[str, list]:
    """By image id: [size in bytes, time of modification in ns, digest of the file, digest of the captions].

    A file that cannot be read has the digest "". Values are those that JSON keeps.
    before  an earlier record: files of unchanged size and time are not read again
    """
    before = before or {}

    def entry(item: CaptionedImage) -> list:
        captions = hashlib.sha256(json.dumps(item.captions).encode()).hexdigest()[:16]
        try:
            facts = item.size_and_time()
            known = before.get(item.image_id, [None, None])
            digest = known[2] if known[:2] == facts else hashlib.sha256(item.read_bytes()).hexdigest()
        except OSError:
            facts, digest = [0, 0], ""
        return [*facts, digest, captions]

    record: dict[str, list] = {}
    with ThreadPoolExecutor() as threads:  # hashing and reading release Python's lock
        for start in range(0, len(dataset.items), PART):
            part = dataset.items[start : start + PART]
            record |= zip((item.image_id for item in part), threads.map(entry, part), strict=True)
    return record


def differences(before: Mapping[str, list], now: Mapping[str, list]) -> str:
    """What of the data has changed between two records, in words; "" if nothing has."""
    both = before.keys() & now.keys()
    kinds = {
        "changed images": [i for i in both if before[i][2] != now[i][2]],
        "images with other captions": [i for i in both if before[i][3] != now[i][3]],
        "added images": list(now.keys() - both),
        "removed images": list(before.keys() - both),
    }
    found = [f"{kind}: {len(ids)} (id {min(ids)} first)" for kind, ids in kinds.items() if ids]
    if not found and list(before) != list(now):  # steps take samples by their place
        return "images are listed in another order"
    return ", ".join(found)
