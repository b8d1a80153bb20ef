"""The latent cache: correct latents, encoded once, resumed where it was killed."""

import json

import pytest
import torch
from PIL import Image

from engine.data.coco import CocoCaptions
from engine.data.latents import cache_latents
from engine.errors import InputError


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
    return CocoCaptions.open(tmp_path)


def cache(dataset, folder, encode, fingerprint="a", **options):
    return cache_latents(dataset, encode, folder, fingerprint, size=8, shard_size=2, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_latents_belong_to_their_captions(dataset, tmp_path, dtype):
    latents = cache(dataset, tmp_path / "cache", Encoder(), dtype=dtype)
    assert latents.image_ids == [100, 101, 102, 104, 105, 106] and len(latents) == 6
    assert latents.captions == [[f"grey {i}"] for i in (0, 1, 2, 4, 5, 6)]
    assert (latents.latents.dtype, latents.latents.shape) == (dtype, (6, 4, 3))
    grey = torch.tensor([0, 30, 60, 120, 150, 180]) / 127.5 - 1
    assert torch.allclose(latents.latents.float(), grey[:, None, None].expand(6, 4, 3), atol=1e-3)


def test_images_are_encoded_once_and_skipped_ones_are_remembered(dataset, tmp_path):
    first = cache(dataset, tmp_path / "cache", Encoder())
    again, encode = CocoCaptions.open(tmp_path), Encoder()
    second = cache(again, tmp_path / "cache", encode)
    assert encode.images == 0
    assert torch.equal(first.latents, second.latents) and first.image_ids == second.image_ids
    assert "1 damaged (3.png first)" in again.summary() and again.skipped == dataset.skipped


def test_a_killed_run_resumes_at_its_last_shard(dataset, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache(dataset, tmp_path / "cache", Encoder(limit=2))
    encode = Encoder()
    resumed = cache(dataset, tmp_path / "cache", encode)
    assert encode.images == 3  # shards of 2, 1 (one damaged), 2 and 1 images
    assert torch.equal(resumed.latents, cache(dataset, tmp_path / "other", Encoder()).latents)


def test_a_truncated_shard_is_replaced(dataset, tmp_path):
    expected = cache(dataset, tmp_path / "cache", Encoder()).latents
    shard = tmp_path / "cache" / "latents-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    encode = Encoder()
    assert torch.equal(cache(dataset, tmp_path / "cache", encode).latents, expected)
    assert encode.images == 2


@pytest.mark.parametrize("change", ["fingerprint", "dtype", "images", "index"])
def test_shards_of_another_origin_are_replaced(dataset, tmp_path, change):
    cache(dataset, tmp_path / "cache", Encoder())
    options = {}
    if change == "fingerprint":
        options["fingerprint"] = "b"
    elif change == "dtype":
        options["dtype"] = torch.float32
    elif change == "images":
        dataset = CocoCaptions(dataset.items[:2])
    else:
        (tmp_path / "cache" / "index.json").write_text('{"fingerprint": "a", ')
    encode = Encoder()
    latents = cache(dataset, tmp_path / "cache", encode, **options)
    assert encode.images == len(latents) == (2 if change == "images" else 6)
    assert len(list((tmp_path / "cache").glob("latents-*"))) == (1 if change == "images" else 4)


def test_a_shard_without_an_intact_image_is_passed_over(dataset, tmp_path):
    (tmp_path / "images" / "2.png").write_bytes(b"")
    assert cache(dataset, tmp_path / "cache", Encoder()).image_ids == [100, 101, 104, 105, 106]


def test_a_data_set_without_an_intact_image_is_refused(dataset, tmp_path):
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="^dataset: .*0 usable images; skipped 7 damaged"):
        cache(dataset, tmp_path / "cache", Encoder())
