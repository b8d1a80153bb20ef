"""Reading data sets whose files are missing, damaged or odd."""

import json

import pytest
import torch
from PIL import Image

from engine.data.coco import CocoCaptions
from engine.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """A data set that lists seven images, of which two are intact, present and captioned."""
    images = tmp_path / "images"
    images.mkdir()
    names = ["good.jpg", "missing.jpg", "silent.png", "cut.jpg", "no_image.jpg", "empty.png", "grey.png"]
    for name in ("good.jpg", "silent.png", "cut.jpg", "grey.png"):
        Image.effect_noise((50, 40), 60).convert("L" if name == "grey.png" else "RGB").save(images / name)
    whole = (images / "cut.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "no_image.jpg").write_text("<html>404</html>")
    (images / "empty.png").touch()
    content = {
        "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": 10 + i, "caption": f" a {name} "} for i, name in enumerate(names) if name != "silent.png"
        ]
        + [{"image_id": 10, "caption": "second"}, {"image_id": 12, "caption": " "}, {"image_id": 99, "caption": "?"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    return tmp_path


def test_unusable_images_are_recorded_and_skipped(folder):
    dataset = CocoCaptions.open(folder)
    for _ in range(2):  # a second epoch counts nothing twice
        images = [(item.path.name, item.captions, image.shape) for item, image in dataset.read(32)]
        assert images == [
            ("good.jpg", ("a good.jpg", "second"), (3, 32, 32)),
            ("grey.png", ("a grey.png",), (3, 32, 32)),
        ]
    reasons = {path.name: reason.split(":")[0] for path, reason in dataset.skipped.items()}
    assert reasons == {
        "missing.jpg": "no such file",
        "silent.png": "no captions",
        "cut.jpg": "damaged",
        "no_image.jpg": "damaged",
        "empty.png": "damaged",
    }
    assert dataset.summary() == (
        "2 usable images; skipped 1 no such file (missing.jpg first), 1 no captions (silent.png first), "
        "3 damaged (cut.jpg first)"
    )


def test_a_split_has_its_own_captions_and_folder(folder):
    (folder / "captions.json").rename(folder / "captions_val.json")
    assert CocoCaptions.open(folder, "val").items[0].path.parent == folder / "images"
    (folder / "images").rename(folder / "val")
    assert CocoCaptions.open(folder, "val").items[0].path.parent == folder / "val"
    with pytest.raises(InputError, match=r"has no captions_train\.json or captions\.json"):
        CocoCaptions.open(folder)


def test_a_data_set_without_a_usable_image_is_refused(folder):
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="0 usable images; skipped 6 no such file .*1 no captions"):
        CocoCaptions.open(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        pytest.param("[" * 100_000, "cannot be read", id="deep"),
        ("[]", "is not in MS-COCO captions layout"),
        ('{"images": [{"id": Infinity, "file_name": "y"}], "annotations": []}', "layout"),
        ('{"images": [{"id": 1}], "annotations": []}', "file_name"),
        ('{"images": [{"id": "x", "file_name": "y"}], "annotations": []}', "layout"),
        ('{"images": [], "annotations": [{"image_id": 1, "caption": 5}]}', "layout"),
    ],
)
def test_a_broken_captions_file_is_named(folder, content, says):
    (folder / "captions.json").write_text(content)
    with pytest.raises(InputError, match=says) as error:
        CocoCaptions.open(folder)
    assert error.value.argument == "folder" and error.value.value == folder / "captions.json"


def test_names_too_long_for_the_file_system_are_missing_files(folder):
    content = json.loads((folder / "captions.json").read_text())
    content["images"][1]["file_name"] = "x" * 5000
    (folder / "captions.json").write_text(json.dumps(content))
    assert CocoCaptions.open(folder).skipped[folder / "images" / ("x" * 5000)] == "no such file"
    with pytest.raises(InputError, match="; give the folder of a data set"):
        CocoCaptions.open("x" * 5000)


@pytest.mark.parametrize(("name", "split"), [("flickr8k", "train"), ("flickr8k", "val"), ("coco", "train")])
def test_real_photos_are_read(shared, name, split):
    dataset = CocoCaptions.open(shared / "data" / name, split)
    images = [image for _, image in dataset.read(64, 0, 20)]
    assert len(dataset.items) > 200 and len(images) == 20
    assert 20 < torch.stack(images).float().mean() < 230
