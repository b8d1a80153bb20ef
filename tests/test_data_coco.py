"""Reading data sets whose files are missing, damaged or odd."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.data.captioned import CaptionedImages
from engine.data.sources import open_captioned
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
    dataset = open_captioned(folder)
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
        "3 damaged (cut.jpg first); ignored 1 annotations without a caption (annotations[7] first), "
        "1 annotations of unlisted images (annotations[8] first)"
    )


def test_a_split_has_its_own_captions_and_folder(folder):
    (folder / "captions.json").rename(folder / "captions_val.json")
    assert open_captioned(folder, "val").items[0].path.parent == folder / "images"
    (folder / "images").rename(folder / "val")
    assert open_captioned(folder, "val").items[0].path.parent == folder / "val"
    with pytest.raises(InputError, match=r"has no captions_train\.json or captions\.json"):
        open_captioned(folder)


def test_a_data_set_without_a_usable_image_is_refused(folder):
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="0 usable images; skipped 6 no such file .*1 no captions"):
        open_captioned(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        pytest.param("[" * 100_000, "cannot be read", id="deep"),
        ('[{"image_id": 1, "caption": "a dog"}]', 'layout .it has no list "images"'),  # results, as pycocotools reads
        ('{"images": [{"cocoid": 1, "filename": "y", "sentences": []}]}', 'no list "annotations"'),  # Karpathy's splits
        ('{"images": {}, "annotations": []}', 'no list "images"'),
        ('{"images": [null, {"id": 1}], "annotations": []}', r"2 images without id or file_name .images\[0\] first"),
        ('{"images": [{"id": Infinity, "file_name": "y"}], "annotations": []}', "1 images without id"),
        ('{"images": [{"id": "x", "file_name": "y"}], "annotations": []}', "1 no captions .y first"),
        ('{"images": [], "annotations": [{"image_id": 1, "caption": 5}]}', "1 annotations without a caption"),
    ],
)
def test_a_captions_file_without_a_usable_entry_is_named(folder, content, says):
    (folder / "captions.json").write_text(content)
    with pytest.raises(InputError, match=says) as error:
        open_captioned(folder)
    assert error.value.argument == "folder" and error.value.value == folder / "captions.json"


def captioned(folder, images, annotations, file="captions.json", encoding="utf-8"):
    """Writes images [(id, file name)] and annotations [(image id, caption)], and the image files; opens the folder."""
    content = {
        "images": [{"id": i, "file_name": name, "width": 4, "height": 4} for i, name in images],
        "annotations": [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(annotations)],
    }
    for _, name in images:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    (folder / file).write_text(json.dumps(content), encoding=encoding)
    return open_captioned(folder)


def read_captions(dataset):
    return {item.path.name: item.captions for item in dataset.items}


@pytest.mark.parametrize(
    ("listed", "annotated"),
    [("7", "7"), (7, "7"), ("7", 7), (7, 7.0), (7.0, "7"), ("000000000139", "000000000139"), ("n02_1", "n02_1"),
     (2**63, 2**63), (2**64 + 7, str(2**64 + 7)), (-1, -1), ("é", "é"), ("\ud800", "\ud800")],
    ids=ascii,
)  # fmt: skip
def test_ids_of_any_kind_bind_captions_to_images(tmp_path, listed, annotated):
    dataset = captioned(tmp_path, [(0, "a.png"), (listed, "b.png")], [(annotated, "bee"), (0, "ay")])
    assert read_captions(dataset) == {"a.png": ("ay",), "b.png": ("bee",)}
    assert [item.image_id for item in dataset.items] == ["0", "7" if listed == 7.0 else str(listed)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.5, None, True, [7], {}, ""], ids=str)
def test_values_that_cannot_be_ids_are_counted(tmp_path, bad):
    dataset = captioned(tmp_path, [(7, "a.png"), (bad, "b.png")], [(bad, "?"), (7, "ay")])
    assert read_captions(dataset) == {"a.png": ("ay",)}
    assert dataset.summary() == (
        "1 usable images; ignored 1 images without id or file_name (images[1] first), "
        "1 annotations of unlisted images (annotations[0] first)"
    )


def test_captions_of_an_id_that_several_files_have_go_to_none_of_them(tmp_path):
    images = [(7, "a.png"), (7, "b.png"), (8, "c.png"), (8, "c.png"), (9, "d.png"), (7, "d.png")]
    dataset = captioned(tmp_path, images, [(7, "whose"), (8, "sea"), (9, "dee")])
    assert read_captions(dataset) == {"c.png": ("sea",), "d.png": ("dee",)}
    assert dataset.summary() == "2 usable images; skipped 2 id that several files have (a.png first)"


def test_a_file_under_several_ids_is_one_image_with_all_captions(tmp_path):
    images = [(1, "a.png"), (2, "./a.png"), (3, "images/a.png"), (4, "b.png")]
    (tmp_path / "images" / "images").mkdir(parents=True)
    (tmp_path / "images" / "images").rmdir()
    (tmp_path / "images" / "images").symlink_to(".")
    dataset = captioned(tmp_path, images[:2] + images[3:], [(1, "one"), (2, "two"), (4, "four")])
    assert read_captions(dataset) == {"a.png": ("one", "two"), "b.png": ("four",)}
    assert [item.image_id for item in dataset.items] == ["1", "4"]


def test_annotations_without_captions_are_counted(tmp_path):
    dataset = captioned(tmp_path, [(1, "a.png")], [(1, "ay"), (1, None), (1, 5), (1, ""), (1, "\n"), (1, ["x"])])
    content = json.loads((tmp_path / "captions.json").read_text())
    content["annotations"] += [{"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 3}, None, "x"]
    (tmp_path / "captions.json").write_text(json.dumps(content))
    dataset = open_captioned(tmp_path)
    assert read_captions(dataset) == {"a.png": ("ay",)}
    assert dataset.summary() == "1 usable images; ignored 8 annotations without a caption (annotations[1] first)"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_files_with_a_byte_order_mark_are_read(tmp_path, encoding):
    dataset = captioned(tmp_path, [(1, "é.png")], [(1, "Frühstück 早餐")], encoding=encoding)
    assert read_captions(dataset) == {"é.png": ("Frühstück 早餐",)}


@pytest.mark.parametrize("name", ["../x.png", "{folder}/x.png", "a/../../x.png", "..\\x.png"])
def test_file_names_do_not_leave_the_folder(tmp_path, name):
    name = name.format(folder=tmp_path)
    dataset = captioned(tmp_path, [(1, "sub/a.png"), (2, "sub/../b.png")], [(1, "ay"), (2, "bee"), (3, "x")])
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    content = json.loads((tmp_path / "captions.json").read_text())
    content["images"].append({"id": 3, "file_name": name})
    (tmp_path / "captions.json").write_text(json.dumps(content))
    dataset = open_captioned(tmp_path)
    assert read_captions(dataset) == {"a.png": ("ay",), "b.png": ("bee",)}
    assert list(dataset.skipped.values()) == ["outside of the folder"] and "x.png first" in dataset.summary()


def test_names_from_the_folder_above_and_of_windows_are_found(tmp_path):
    """As Label Studio exports them."""
    dataset = captioned(tmp_path, [(1, "a.png"), (2, "sub/b.png")], [(1, "ay"), (2, "bee")])
    text = (tmp_path / "captions.json").read_text()
    text = text.replace('"a.png"', '"images/a.png"').replace('"sub/b.png"', json.dumps("images\\sub\\b.png"))
    (tmp_path / "captions.json").write_text(text)
    assert open_captioned(tmp_path).items == dataset.items


@pytest.mark.parametrize(
    ("name", "images"),
    [("train2017", "train2017"), ("train2014", "images/train2014"), ("train2017", "images"), ("val2017", "val2017")],
)
def test_ms_coco_is_read_as_it_is_downloaded(tmp_path, name, images):
    (tmp_path / "annotations").mkdir()
    for other in ("train2014", "val2014", "train2017", "val2017"):  # the archives of both years have all of these
        for kind in ("captions", "instances"):
            content = {"images": [{"id": 1, "file_name": f"{other}.jpg"}], "annotations": [{"id": 1, "image_id": 1}]}
            if kind == "captions":
                content["annotations"][0]["caption"] = other
            (tmp_path / "annotations" / f"{kind}_{other}.json").write_text(json.dumps(content))
    (tmp_path / images).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / images / f"{name}.jpg")
    dataset = open_captioned(tmp_path, name[:-4])
    assert [(item.path, item.captions) for item in dataset.items] == [(tmp_path / images / f"{name}.jpg", (name,))]


def test_a_summary_is_one_printable_line(tmp_path):
    dataset = captioned(tmp_path, [(1, "a.png")], [(1, "ay")])
    dataset = CaptionedImages(dataset.items, {Path(f"two\nlines\ud800{'x' * 300}"): "no such file"})
    assert dataset.summary().encode() and "\n" not in dataset.summary() and len(dataset.summary()) < 200


def test_images_that_may_not_be_read_are_not_missing(tmp_path, forbid):
    captioned(tmp_path, [(1, "a.png"), (2, "b.png")], [(1, "ay"), (2, "bee")])
    forbid(tmp_path / "images" / "b.png")
    assert open_captioned(tmp_path).skipped == {tmp_path / "images" / "b.png": "no permission to read"}


def test_names_too_long_for_the_file_system_are_missing_files(folder):
    content = json.loads((folder / "captions.json").read_text())
    content["images"][1]["file_name"] = "x" * 5000
    (folder / "captions.json").write_text(json.dumps(content))
    assert open_captioned(folder).skipped[folder / "images" / ("x" * 5000)] == "no such file"
    with pytest.raises(InputError, match="; give the folder of a data set"):
        open_captioned("x" * 5000)


@pytest.mark.parametrize(("name", "split"), [("flickr8k", "train"), ("flickr8k", "val"), ("coco", "train")])
def test_real_photos_are_read(shared, name, split):
    dataset = open_captioned(shared / "data" / name, split)
    images = [image for _, image in dataset.read(64, 0, 20)]
    assert len(dataset.items) > 200 and len(images) == 20
    assert 20 < torch.stack(images).float().mean() < 230


KARPATHY = [
    {"split": "train", "filepath": "train2014", "filename": "a.jpg", "cocoid": 5, "imgid": 0},
    {"split": "restval", "filepath": "val2014", "filename": "b.jpg", "cocoid": 6, "imgid": 1},
    {"split": "test", "filepath": "val2014", "filename": "c.jpg", "cocoid": 7, "imgid": 2},
    {"split": "train", "filename": "d.jpg", "imgid": 3},  # as in the file for Flickr8k
    {"split": "train", "filepath": "../..", "filename": "e.jpg", "cocoid": 8},
    {"split": "train", "filepath": "train2014", "filename": "f.jpg", "cocoid": 9, "sentences": None},
    {"split": "train", "filepath": "train2014", "cocoid": 10},
    None,
]


@pytest.mark.parametrize("below", ["", "images"])
def test_karpathys_split_is_read_beside_ms_cocos_own(tmp_path, below):
    for folder, names in (("train2014", "af"), ("val2014", "bc"), ("images", "d")):
        place = tmp_path / below / folder if folder != "images" else tmp_path / "images"
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.new("RGB", (4, 4)).save(place / f"{name}.jpg")
    images = [image and {"sentences": [{"raw": f" {image.get('filename')} ", "tokens": []}, {}]} | image
              for image in KARPATHY]  # fmt: skip
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    dataset = open_captioned(tmp_path)
    assert read_captions(dataset) == {"a.jpg": ("a.jpg",), "d.jpg": ("d.jpg",)}
    assert [item.image_id for item in dataset.items] == ["5", "3"]
    assert dataset.summary() == (
        "2 usable images; skipped 1 outside of the folder (e.jpg first), 1 no captions (f.jpg first); "
        "ignored 1 images without cocoid or filename (images[6] first)"
    )
    assert list(read_captions(open_captioned(tmp_path, "train+restval"))) == ["a.jpg", "b.jpg", "d.jpg"]
    assert list(read_captions(open_captioned(tmp_path, "test"))) == ["c.jpg"]
    with pytest.raises(InputError, match=r"has no split 'train2014'; use restval, test, train"):
        open_captioned(tmp_path, "train2014")
    (tmp_path / "annotations").mkdir()
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "own"}]}
    (tmp_path / "annotations" / "captions_train2014.json").write_text(json.dumps(content))
    assert read_captions(open_captioned(tmp_path, "train2014")) == {"a.jpg": ("own",)}
