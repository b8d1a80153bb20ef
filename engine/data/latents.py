"""Latents of a data set's images, encoded once and saved as safetensors shards.

    folder/index.json                  what the shards were made from; for anything else they are replaced
    folder/latents-00000.safetensors   latents [n, 1 + V, L, C], items int64 [n]; metadata: skipped images, the reasons

The first latents of an image are its own; the V others are those of the image as `engine.data.augment` changes it. With
sketches, S drawings of the image and one of each changed image follow, [n, 1 + V + S + V, L, C]. A shard holds a fixed
part of the data set's items and is renamed when complete, so a killed run resumes after its last complete shard, and
several processes share the work. Shards are memory-mapped: only the latents of a batch are read from disk.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from engine.data.augment import augment
from engine.data.augmentation import Augmentation
from engine.data.captioned import CaptionedImages
from engine.data.record import record_of
from engine.data.sketch import sketch_levels
from engine.errors import InputError
from engine.files import save_tensors
from engine.images import fit_image, to_levels
from engine.processes import Processes

BATCH = 64  # images encoded at a time
SHARDS = 64  # of a data set of middle size, for as many processes to share


@dataclass(frozen=True, eq=False)
class LatentCache:
    """Latents of a data set with their captions."""

    shards: list[Tensor]  # [n, 1 + V, L, C] each, of images in order
    captions: list[list[str]]  # of each image, at least one
    only_known: int = 0  # images at the end that training never draws
    sketches: int = 0  # S
    sketch_scale: float = 1.0  # of sketches' latents

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def drawn(self) -> int:
        """Images, from the first on, that training also draws."""
        return len(self) - self.only_known

    @property
    def versions(self) -> int:
        """1 + V, of each image; the first is the image itself."""
        columns = self.shards[0].shape[1]
        return 1 + (columns - 1 - self.sketches) // 2 if self.sketches else columns

    def sketch_latents(self, images: list[int], versions: list[int], drawings: list[int]) -> Tensor:
        """[B, L, C] float32 of a drawing of that version of each image; drawings are 0 … S - 1, used for version 0."""
        first = self.versions
        drawn = zip(versions, drawings, strict=True)
        columns = [first + d if v == 0 else first + self.sketches + v - 1 for v, d in drawn]
        return self.sketch_scale * self.latents(images, columns)

    def with_unit_sketches(self) -> "LatentCache":
        """The same, sketches scaled so that those of about 512 images have latents of mean square 1.

        An autoencoder's own factor does this for images. Sketches have more contrast.
        """
        images = list(range(0, len(self), max(1, len(self) // 512)))
        first = [0] * len(images)
        rms = replace(self, sketch_scale=1.0).sketch_latents(images, first, first).square().mean().sqrt().item()
        return replace(self, sketch_scale=round(1 / rms, 4))

    def latents(self, images: list[int], versions: list[int]) -> Tensor:
        """[B, L, C] float32 of one version of each of these images."""
        ends = np.cumsum([len(shard) for shard in self.shards])
        places = np.searchsorted(ends, images, side="right").tolist()
        # As float32 before they are stacked: under autocast on a CPU, half precision cannot be.
        rows = [self.shards[p][i - int(ends[p]), v].float() for p, i, v in zip(places, images, versions, strict=True)]
        return torch.stack(rows)


def cache_latents(
    dataset: CaptionedImages,
    encode: Callable[[Tensor], Tensor],
    folder: str | Path,
    fingerprint: str,
    size: int,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    record: Mapping[str, list] | None = None,
    shard_size: int | None = None,
    dtype: torch.dtype = torch.float16,
    processes: Processes | None = None,
    sketches: int = 0,
) -> LatentCache:
    """Encodes a data set's images, or maps the latents that an earlier run has encoded.

    dataset       damaged images are left out and added to its `skipped`
    encode        images [B, 3, size, size] float32 in −1..1 → latents [B, L, C]
    folder        of the shards
    fingerprint   identifies the encoder's weights; shards of other encoders, images or settings are replaced
    size          pixels per side
    augmentation  how many further versions of each image there are, and how they are changed; None: no further ones
    seed          of those changes; the image's place in the data set and the version's number are added to it
    record        of the data set, see `engine.data.record.record_of`, which is called if it is None
    shard_size    images per file; None: 2048, fewer for data sets that processes could not share then
    dtype         of the shards; the error of half precision is far below an autoencoder's own
    processes     that encode together, each its share of the shards
    sketches      S, how many drawings there are of each image, see `engine.data.sketch`; 0: none, nor of its versions
    Raises InputError about `dataset` if no image can be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    processes, shard_size = processes or Processes(), shard_size or default_shard_size(len(dataset.items))

    def drop_stale_shards() -> None:
        of_data = record_of(dataset) if record is None else record
        origin = {
            "encoder": fingerprint,
            "images": _digest([(image_id, digest) for image_id, (_, _, digest, _) in of_data.items()]),
            "size": size,
            "changes": _digest([asdict(augmentation), seed] if augmentation else None),
            "shard_size": shard_size,
            "dtype": str(dtype),
        }
        _drop_shards_of_other_origin(folder, origin | ({"sketches": [sketches, seed]} if sketches else {}))

    processes.on_main(drop_stale_shards)
    paths = [folder / f"latents-{i:05d}.safetensors" for i in range(-(-len(dataset.items) // shard_size))]
    own = range(len(paths))[processes.rank :: processes.count]
    total = sum(len(dataset.items[i * shard_size : (i + 1) * shard_size]) for i in own)
    hidden = None if processes.is_main else True  # None: hidden unless standard error is a terminal
    with tqdm(total=total, desc="latents", unit="image", disable=hidden) as bar:
        for n, i in enumerate(own, 1):
            if not _is_complete(paths[i]):
                images = _versions(dataset, i * shard_size, (i + 1) * shard_size, size, augmentation, seed, sketches)
                _write_shard(paths[i], dataset, encode, images, dtype, bar)
            bar.update(min(n * shard_size, total) - bar.n)  # also for images that were there or are left out
    processes.wait()
    return map_latents(paths, dataset, sketches)


def map_latents(paths: list[Path], dataset: CaptionedImages, sketches: int = 0) -> LatentCache:
    """Maps all shards of a data set, encoded with this number of sketches; their skipped images are added to its own.

    Raises InputError about `dataset` if no image could be read, or none that training may draw.
    """
    read = [_read_shard(path, dataset) for path in paths]
    shards = [latents for latents, items in read if len(items)]
    images = [dataset.items[i] for _, items in read for i in items.tolist()]
    only_known = sum(image.only_known for image in images)
    if only_known == len(images):
        problem = f"has no readable image ({dataset.summary()})"
        raise InputError("dataset", dataset.items[0].path.parent, "give a data set with intact images", problem)
    return LatentCache(shards, [list(image.captions) for image in images], only_known, sketches)


def default_shard_size(images: int) -> int:
    """Images per file, the same for any number of processes, so that another number resumes."""
    return min(2048, max(BATCH, -(-images // SHARDS)))


def _versions(
    dataset: CaptionedImages,
    start: int,
    stop: int,
    size: int,
    augmentation: Augmentation | None,
    seed: int,
    sketches: int,
) -> Iterator[tuple[int, Tensor]]:
    """(place in the data set, uint8 [1 + V (+ S + V), 3, size, size]) of each readable image of `items[start:stop]`."""
    place_of = {item.image_id: start + i for i, item in enumerate(dataset.items[start:stop])}
    for item, image in dataset.images(start, stop):
        levels, place = [fit_image(image, size)], place_of[item.image_id]
        for version in range(1, 1 + (augmentation.variants if augmentation else 0)):
            random = np.random.default_rng((seed, place, version))
            changed = augment(image, size, augmentation, random, augmentation.may_flip(item.captions))
            levels.append(to_levels(changed))
        if sketches:
            sources = [levels[0]] * sketches + levels[1:]
            levels += [sketch_levels(x, np.random.default_rng((seed, place, i, 1))) for i, x in enumerate(sources)]
        yield place, torch.stack(levels)


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _drop_shards_of_other_origin(folder: Path, origin: dict) -> None:
    index = folder / "index.json"
    try:
        before = dict(json.loads(index.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        before = {}  # missing or truncated: the origin of the shards is unknown
    if before == origin:
        return
    stale = list(folder.glob("latents-*.safetensors*"))
    if stale:
        differing = ", ".join(key for key in before | origin if before.get(key) != origin.get(key))
        print(f"{folder}: encoding the images again, since these have changed: {differing}")
    for shard in stale:
        shard.unlink()
    # Written last: if the run is killed before this, no new index can claim the old shards.
    index.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _write_shard(
    path: Path, dataset: CaptionedImages, encode, images: Iterator[tuple[int, Tensor]], dtype, bar
) -> None:
    before = set(dataset.skipped)
    places, latents, waiting = [], [torch.empty(0, dtype=dtype)], []

    def encode_waiting() -> None:
        pixels = torch.cat(waiting)  # [B, 3, S, S] uint8
        latents.append(encode(pixels.float() / 127.5 - 1).to("cpu", dtype))  # [B, L, C]
        waiting.clear()

    for place, versions in images:
        places.append(place)
        waiting.append(versions)
        bar.update()
        if sum(map(len, waiting)) >= BATCH:
            encode_waiting()
    if waiting:
        encode_waiting()
    skipped = {str(image): reason for image, reason in dataset.skipped.items() if image not in before}
    encoded = torch.cat(latents)  # [n·(1 + V), L, C]
    tensors = {
        "latents": encoded.unflatten(0, (len(places), -1)) if places else encoded,
        "items": torch.tensor(places, dtype=torch.int64),
    }
    save_tensors(path, tensors, {"skipped": json.dumps(skipped)})


def _is_complete(path: Path) -> bool:
    """Whether a shard exists and is not truncated (safetensors compares the file's length with its header)."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read_shard(path: Path, dataset: CaptionedImages) -> tuple[Tensor, Tensor]:
    with safe_open(path, framework="pt") as shard:
        for image, reason in json.loads(shard.metadata()["skipped"]).items():
            dataset.skipped.setdefault(Path(image), reason)
        return shard.get_tensor("latents"), shard.get_tensor("items")
