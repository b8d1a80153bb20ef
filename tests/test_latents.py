"""The latent cache: correct latents, encoded once, resumed where it was killed."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.data.augmentation import Augmentation
from engine.data.captioned import CaptionedImages
from engine.data.latents import cache_latents, default_shard_size
from engine.data.sources import open_captioned
from engine.errors import InputError
from engine.processes import Processes


class Encoder:
    """Means of the four 4 × 4 quarters, [B, 4, 3]; counts the images it has encoded and fails after `limit` calls."""

    def __init__(self, limit=1000):
        self.images, self.limit = 0, limit

    def __call__(self, pixels):
        if self.limit == 0:
            raise KeyboardInterrupt
        self.limit -= 1
        self.images += len(pixels)
        assert pixels.dtype == torch.float32 and pixels.min() >= -1 and pixels.max() <= 1
        return torch.nn.functional.avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)


@pytest.fixture
def dataset(tmp_path):
    """Seven images of different grey, the fourth one damaged."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(7):
        Image.new("L", (8, 8), 30 * i).save(images / f"{i}.png")
    (images / "3.png").write_bytes(b"damaged")
    content = {
        "images": [{"id": 100 + i, "file_name": f"{i}.png"} for i in range(7)],
        "annotations": [{"image_id": 100 + i, "caption": f"grey {i}"} for i in range(7)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    return open_captioned(tmp_path)


def everything(cache):
    """[n, L, C] of all images as they are."""
    return cache.latents(list(range(len(cache))), [0] * len(cache))


def cache(dataset, folder, encode, fingerprint="a", shard_size=2, **options):
    return cache_latents(dataset, encode, folder, fingerprint, size=8, shard_size=shard_size, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_latents_belong_to_their_captions(dataset, tmp_path, dtype):
    latents = cache(dataset, tmp_path / "cache", Encoder(), dtype=dtype)
    assert latents.captions == [[f"grey {i}"] for i in (0, 1, 2, 4, 5, 6)] and len(latents) == 6
    assert {shard.dtype for shard in latents.shards} == {dtype} and latents.versions == 1
    grey = torch.tensor([0, 30, 60, 120, 150, 180]) / 127.5 - 1
    assert torch.allclose(everything(latents), grey[:, None, None].expand(6, 4, 3), atol=1e-3)
    some = latents.latents([5, 0, 2, 5], [0] * 4)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        assert torch.equal(latents.latents([5, 0, 2, 5], [0] * 4), some)
    assert some.dtype == torch.float32 and torch.allclose(some[:, 0, 0], grey[[5, 0, 2, 5]], atol=1e-3)


def test_images_are_encoded_once_and_skipped_ones_are_remembered(dataset, tmp_path):
    first = cache(dataset, tmp_path / "cache", Encoder())
    again, encode = open_captioned(tmp_path), Encoder()
    second = cache(again, tmp_path / "cache", encode)
    assert encode.images == 0
    assert torch.equal(everything(first), everything(second)) and first.captions == second.captions
    assert "1 damaged (3.png first)" in again.summary() and again.skipped == dataset.skipped


def test_a_killed_run_resumes_at_its_last_shard(dataset, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache(dataset, tmp_path / "cache", Encoder(limit=2))
    encode = Encoder()
    resumed = cache(dataset, tmp_path / "cache", encode)
    assert encode.images == 3  # shards of 2, 1 (one damaged), 2 and 1 images
    assert torch.equal(everything(resumed), everything(cache(dataset, tmp_path / "other", Encoder())))


class Thread(Processes):
    """One of two processes, as a thread."""

    def __init__(self, rank, barrier):
        self.rank, self.count, self.wait = rank, 2, barrier.wait

    def on_main(self, call):
        result = call() if self.is_main else None
        self.wait()
        return result


def test_processes_share_the_images_and_all_have_the_same_latents(dataset, tmp_path):
    encoders, barrier = [Encoder(), Encoder()], threading.Barrier(2, timeout=60)
    calls = [
        lambda rank=rank: cache(
            open_captioned(tmp_path), tmp_path / "cache", encoders[rank], processes=Thread(rank, barrier)
        )  # fmt: skip
        for rank in range(2)
    ]
    with ThreadPoolExecutor(2) as threads:
        caches = [future.result() for future in [threads.submit(call) for call in calls]]
    assert [encode.images for encode in encoders] == [4, 2]  # shards of 2, 1 (one damaged), 2 and 1 images
    expected = cache(dataset, tmp_path / "other", Encoder())
    for one in caches:
        assert torch.equal(everything(one), everything(expected)) and one.captions == expected.captions


@pytest.mark.parametrize(("images", "size"), [(1, 64), (4096, 64), (10_000, 157), (118_287, 1849), (1_000_000, 2048)])
def test_processes_can_share_small_data_sets_too(images, size):
    assert default_shard_size(images) == size


def test_a_truncated_shard_is_replaced(dataset, tmp_path):
    expected = everything(cache(dataset, tmp_path / "cache", Encoder()))
    shard = tmp_path / "cache" / "latents-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    encode = Encoder()
    assert torch.equal(everything(cache(dataset, tmp_path / "cache", encode)), expected)
    assert encode.images == 2


@pytest.mark.parametrize(
    "change, named",
    [
        ("fingerprint", "encoder"),
        ("dtype", "dtype"),
        ("images", "images"),
        ("in place", "images"),
        ("index", "encoder"),
    ],
)
def test_shards_of_another_origin_are_replaced(dataset, tmp_path, capsys, change, named):
    cache(dataset, tmp_path / "cache", Encoder())
    options = {}
    if change == "in place":  # with equal size and time of modification
        file = tmp_path / "images" / "6.png"
        status = file.stat()
        Image.new("L", (8, 8), 181).save(file)
        assert file.stat().st_size == status.st_size
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "fingerprint":
        options["fingerprint"] = "b"
    elif change == "dtype":
        options["dtype"] = torch.float32
    elif change == "images":
        dataset = CaptionedImages(dataset.items[:2])
    else:
        (tmp_path / "cache" / "index.json").write_text('{"fingerprint": "a", ')
    encode = Encoder()
    latents = cache(dataset, tmp_path / "cache", encode, **options)
    assert encode.images == len(latents) == (2 if change == "images" else 6)
    assert len(list((tmp_path / "cache").glob("latents-*"))) == (1 if change == "images" else 4)
    assert f"again, since these have changed: {named}" in capsys.readouterr().out


def test_a_shard_without_an_intact_image_is_passed_over(dataset, tmp_path):
    (tmp_path / "images" / "2.png").write_bytes(b"")
    assert cache(dataset, tmp_path / "cache", Encoder()).captions == [[f"grey {i}"] for i in (0, 1, 4, 5, 6)]


def test_a_data_set_without_an_intact_image_is_refused(dataset, tmp_path):
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="^dataset: .*0 usable images; skipped 7 damaged"):
        cache(dataset, tmp_path / "cache", Encoder())


CHANGES = Augmentation(background=0.0, jpeg=0.0, colour=0.3, variants=3)


def test_the_images_of_another_data_set_are_the_last_and_only_known(dataset, tmp_path):
    items = (replace(dataset.items[0], captions=("other",)), dataset.items[3])  # the second is damaged
    both = dataset.with_known(CaptionedImages(items, {Path("gone.png"): "missing"}), "others")
    latents = cache(both, tmp_path / "cache", Encoder())
    assert (len(latents), latents.drawn, latents.only_known) == (7, 6, 1)
    assert latents.captions[-2:] == [["grey 6"], ["other"]]
    assert [item.image_id for item in both.items[6:]] == ["106", "others/100", "others/103"]
    assert {path.name for path in both.skipped} == {"3.png", "gone.png"}


def test_data_sets_are_joined_with_all_that_is_ignored_and_no_id_twice(dataset):
    some = replace(dataset, ignored={"annotations without a caption": [1], "other": [2]})
    both = some.with_known(replace(some, ignored={"annotations without a caption": [7]}), "others")
    assert both.ignored == {"annotations without a caption": [1, 7], "other": [2]}
    with pytest.raises(InputError, match="'others/100' is the id of two images; give the image another id"):
        both.with_known(dataset, "others")


def test_a_data_set_whose_images_are_all_only_known_is_refused(dataset, tmp_path):
    known = replace(dataset, items=()).with_known(dataset, "others")
    with pytest.raises(InputError, match="has no readable image"):
        cache(known, tmp_path / "cache", Encoder())


def test_changed_versions_follow_an_images_own(dataset, tmp_path):
    plain = everything(cache(dataset, tmp_path / "plain", Encoder()))
    changed = cache(dataset, tmp_path / "cache", Encoder(), augmentation=CHANGES)
    assert changed.versions == 4 and torch.equal(everything(changed), plain)
    versions = torch.stack([changed.latents(list(range(6)), [v] * 6) for v in range(4)])  # [V, n, L, C]
    assert all(not torch.equal(versions[i, 2], versions[j, 2]) for i in range(4) for j in range(i))
    again = cache(dataset, tmp_path / "again", Encoder(), augmentation=CHANGES, shard_size=5)
    assert torch.equal(again.latents([5, 1], [3, 2]), versions[[3, 2], [5, 1]])  # whatever the size of shards


def test_drawings_of_an_image_and_of_its_versions_follow(dataset, tmp_path, monkeypatch, capsys):
    marks = {}

    def marked(levels, random):
        """The drawn image's first level and its generator's first number stand for a drawing."""
        drawing = torch.full_like(levels, random.integers(1, 250))
        drawing[:, 0, 0] = levels[0, 0, 0]
        return drawing

    monkeypatch.setattr("engine.data.latents.sketch_levels", marked)
    options = {"augmentation": CHANGES, "dtype": torch.float32}
    plain = cache(dataset, tmp_path / "plain", Encoder(), **options)
    encode = lambda pixels: pixels[:, :, :1, :2].flatten(2).transpose(1, 2)  # noqa: E731 - [B, 2, 3]: two pixels
    drawn = cache(dataset, tmp_path / "cache", encode, sketches=2, **options)
    assert (plain.versions, plain.sketches, drawn.versions, drawn.sketches) == (4, 0, 4, 2)
    for image in range(6):
        for version in range(4):
            shown = drawn.latents([image], [version])[0, 0, 0].item()
            for drawing in range(2):
                first, second = drawn.sketch_latents([image], [version], [drawing])[0, :, 0].tolist()
                assert first == shown, "the drawing is of that version"
                marks.setdefault((image, version, drawing if version == 0 else 0), second)
    assert len(set(marks.values())) > 20  # of 30
    scaled = drawn.with_unit_sketches()
    first = list(range(6)), [0] * 6, [0] * 6
    assert scaled.sketch_latents(*first).square().mean().item() == pytest.approx(1, abs=1e-3)
    others = list(range(6)), [0, 1, 2, 3, 0, 1], [1] * 6
    torch.testing.assert_close(scaled.sketch_latents(*others), scaled.sketch_scale * drawn.sketch_latents(*others))
    assert torch.equal(scaled.latents(*first[:2]), drawn.latents(*first[:2])), "images are as they were"
    assert scaled.with_unit_sketches().sketch_scale == scaled.sketch_scale
    encode = Encoder()
    cache(dataset, tmp_path / "cache", encode, sketches=3, **options)
    assert encode.images == 6 * (4 + 3 + 3)
    capsys.readouterr()
    cache(dataset, tmp_path / "cache", Encoder(), **options)
    assert "these have changed: sketches\n" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"seed": 1}, {"augmentation": replace(CHANGES, shift=0.2)}, {"augmentation": None}])
def test_other_changes_are_encoded_anew(dataset, tmp_path, change):
    options = {"augmentation": CHANGES}
    cache(dataset, tmp_path / "cache", Encoder(), **options)
    encode = Encoder()
    cache(dataset, tmp_path / "cache", encode, **options | change)
    assert encode.images == (6 if change == {"augmentation": None} else 24)


def test_latents_stay_on_disk_until_they_are_asked_for(dataset, tmp_path):
    """A shard is a map of its file: what is written there shows in a tensor that was made before."""
    latents = cache(dataset, tmp_path / "cache", Encoder(), dtype=torch.float32)
    file = tmp_path / "cache" / "latents-00000.safetensors"
    content = file.read_bytes()
    with open(file, "r+b") as open_file:
        position = content.rfind(latents.shards[0].numpy().tobytes())
        open_file.seek(position)
        open_file.write(b"\0\0\xe0\x40")  # 7.0
    assert latents.latents([0], [0])[0, 0, 0] == 7
