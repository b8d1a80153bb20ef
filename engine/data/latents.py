"""Latents of a data set's pictures, encoded once and kept as safetensors shards.

    folder/index.json                  what the shards were made from; made from anything else, they are made anew
    folder/latents-00000.safetensors   latents [n, L, C], image_ids int64 [n]; metadata: pictures skipped, and why

A shard covers a fixed part of the data set's items and appears by renaming, so a killed run goes on at its last shard.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.data.coco import CocoCaptions

BATCH = 64  # pictures encoded at a time


@dataclass(frozen=True, eq=False)
class LatentCache:
    """A data set as the denoiser sees it, held in memory."""

    latents: Tensor  # [n, L, C], in the dtype they were cached in
    image_ids: list[int]
    captions: list[list[str]]  # of each picture, at least one

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
    """Encode a data set's pictures, or read what an earlier run has encoded.

    dataset      its damaged pictures are left out and added to its `skipped`
    encode       float32 pictures [B, 3, size, size] in −1..1 to latents [B, L, C]
    folder       where the shards are kept
    fingerprint  names the encoder's weights; shards of other encoders, data sets or settings are replaced
    size         pixels of a picture's side
    shard_size   pictures per file
    dtype        what latents are kept in; half precision is far below an autoencoder's own error
    Raises ValueError if not one picture can be read.
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
    with tqdm(total=len(dataset.items), desc="latents", unit="picture", disable=None) as bar:
        for i, start in enumerate(range(0, len(dataset.items), shard_size)):
            path, stop = folder / f"latents-{i:05d}.safetensors", min(start + shard_size, len(dataset.items))
            if not _is_whole(path):
                _write_shard(path, dataset, encode, size, start, stop, dtype, bar)
            shards.append(_read_shard(path, dataset))
            bar.update(stop - bar.n)  # those read and those left out too

    shards = [(latents, ids) for latents, ids in shards if len(ids)]
    if not shards:
        raise ValueError(f"{dataset.items[0].path.parent}: {dataset.summary()}; give a data set with whole pictures")
    captions = {item.image_id: list(item.captions) for item in dataset.items}
    image_ids = [image_id for _, ids in shards for image_id in ids.tolist()]
    return LatentCache(torch.cat([latents for latents, _ in shards]), image_ids, [captions[i] for i in image_ids])


def _drop_shards_of_other_origin(folder: Path, origin: dict) -> None:
    index = folder / "index.json"
    try:
        if json.loads(index.read_text(encoding="utf-8")) == origin:
            return
    except (OSError, ValueError, RecursionError):
        pass  # none yet, or cut off: its shards' origin is unknown
    for shard in folder.glob("latents-*.safetensors*"):
        shard.unlink()
    # Last: were the run killed before, the new index would vouch for old shards.
    index.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _write_shard(path: Path, dataset: CocoCaptions, encode, size: int, start: int, stop: int, dtype, bar) -> None:
    before = set(dataset.skipped)
    pairs = list(dataset.read(size, start, stop))
    skipped = {str(picture): why for picture, why in dataset.skipped.items() if picture not in before}
    latents = [torch.empty(0)] if not pairs else []
    for first in range(0, len(pairs), BATCH):
        pixels = torch.stack([picture for _, picture in pairs[first : first + BATCH]])  # [B, 3, S, S] uint8
        latents.append(encode(pixels.float() / 127.5 - 1).to("cpu", dtype))  # [B, L, C]
        bar.update(len(pixels))
    tensors = {
        "latents": torch.cat(latents).contiguous(),
        "image_ids": torch.tensor([item.image_id for item, _ in pairs], dtype=torch.int64),
    }
    unfinished = path.with_name(path.name + ".unfinished")
    save_file(tensors, unfinished, metadata={"skipped": json.dumps(skipped)})
    unfinished.replace(path)


def _is_whole(path: Path) -> bool:
    """Whether a shard is there and not cut off (safetensors compares the file's length with its header)."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read_shard(path: Path, dataset: CocoCaptions) -> tuple[Tensor, Tensor]:
    with safe_open(path, framework="pt") as shard:
        for picture, why in json.loads(shard.metadata()["skipped"]).items():
            dataset.skipped.setdefault(Path(picture), why)
        return shard.get_tensor("latents"), shard.get_tensor("image_ids")
