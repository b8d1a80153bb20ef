"""Latents of a data set's images, encoded once and saved as safetensors shards.

    folder/index.json                  what the shards were made from; for anything else they are replaced
    folder/latents-00000.safetensors   latents [n, L, C], image_ids int64 [n]; metadata: skipped images and the reasons

A shard holds a fixed part of the data set's items and is renamed when complete, so a killed run resumes after its last
complete shard.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from engine.data.coco import CocoCaptions
from engine.errors import InputError
from engine.files import save_tensors

BATCH = 64  # images encoded at a time


@dataclass(frozen=True, eq=False)
class LatentCache:
    """Latents of a data set with their captions, in memory."""

    latents: Tensor  # [n, L, C], in the dtype of the shards
    image_ids: list[int]
    captions: list[list[str]]  # of each image, at least one

    def __len__(self) -> int:
        return len(self.image_ids)


def cache_latents(
    dataset: CocoCaptions,
    encode: Callable[[Tensor], Tensor],
    folder: str | Path,
    fingerprint: str,
    size: int,
    shard_size: int = 2048,
    dtype: torch.dtype = torch.float16,
) -> LatentCache:
    """Encodes a data set's images, or reads the latents that an earlier run has encoded.

    dataset      damaged images are left out and added to its `skipped`
    encode       images [B, 3, size, size] float32 in −1..1 → latents [B, L, C]
    folder       of the shards
    fingerprint  identifies the encoder's weights; shards of other encoders, data sets or settings are replaced
    size         pixels per side
    shard_size   images per file
    dtype        of the shards; the error of half precision is far below an autoencoder's own
    Raises InputError about `dataset` if no image can be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    listing = json.dumps([(item.image_id, item.path.name, item.path.stat().st_size) for item in dataset.items])
    origin = {
        "fingerprint": fingerprint,
        "dataset": hashlib.sha256(listing.encode()).hexdigest(),
        "size": size,
        "shard_size": shard_size,
        "dtype": str(dtype),
    }
    _drop_shards_of_other_origin(folder, origin)

    shards = []
    with tqdm(total=len(dataset.items), desc="latents", unit="image", disable=None) as bar:
        for i, start in enumerate(range(0, len(dataset.items), shard_size)):
            path, stop = folder / f"latents-{i:05d}.safetensors", min(start + shard_size, len(dataset.items))
            if not _is_complete(path):
                _write_shard(path, dataset, encode, size, start, stop, dtype, bar)
            shards.append(_read_shard(path, dataset))
            bar.update(stop - bar.n)  # also for images that were read from a shard or left out

    shards = [(latents, ids) for latents, ids in shards if len(ids)]
    if not shards:
        problem = f"has no readable image ({dataset.summary()})"
        raise InputError("dataset", dataset.items[0].path.parent, "give a data set with intact images", problem)
    captions = {item.image_id: list(item.captions) for item in dataset.items}
    image_ids = [image_id for _, ids in shards for image_id in ids.tolist()]
    return LatentCache(torch.cat([latents for latents, _ in shards]), image_ids, [captions[i] for i in image_ids])


def _drop_shards_of_other_origin(folder: Path, origin: dict) -> None:
    index = folder / "index.json"
    try:
        if json.loads(index.read_text(encoding="utf-8")) == origin:
            return
    except (OSError, ValueError, RecursionError):
        pass  # missing or truncated: the origin of the shards is unknown
    for shard in folder.glob("latents-*.safetensors*"):
        shard.unlink()
    # Written last: if the run is killed before this, no new index can claim the old shards.
    index.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _write_shard(path: Path, dataset: CocoCaptions, encode, size: int, start: int, stop: int, dtype, bar) -> None:
    before = set(dataset.skipped)
    pairs = list(dataset.read(size, start, stop))
    skipped = {str(image): reason for image, reason in dataset.skipped.items() if image not in before}
    latents = [torch.empty(0)] if not pairs else []
    for first in range(0, len(pairs), BATCH):
        pixels = torch.stack([image for _, image in pairs[first : first + BATCH]])  # [B, 3, S, S] uint8
        latents.append(encode(pixels.float() / 127.5 - 1).to("cpu", dtype))  # [B, L, C]
        bar.update(len(pixels))
    tensors = {
        "latents": torch.cat(latents).contiguous(),
        "image_ids": torch.tensor([item.image_id for item, _ in pairs], dtype=torch.int64),
    }
    save_tensors(path, tensors, {"skipped": json.dumps(skipped)})


def _is_complete(path: Path) -> bool:
    """Whether a shard exists and is not truncated (safetensors compares the file's length with its header)."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read_shard(path: Path, dataset: CocoCaptions) -> tuple[Tensor, Tensor]:
    with safe_open(path, framework="pt") as shard:
        for image, reason in json.loads(shard.metadata()["skipped"]).items():
            dataset.skipped.setdefault(Path(image), reason)
        return shard.get_tensor("latents"), shard.get_tensor("image_ids")
