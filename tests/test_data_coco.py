"""Reading data sets whose files are missing, damaged or odd."""

import json

import pytest
import torch
from PIL import Image

from engine.data.coco import CocoCaptions
from engine.errors import InputError
from engine.images import fit_image, load_image


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


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
def test_every_mode_keeps_its_brightness(mode):
    grey = Image.linear_gradient("L").resize((40, 30))
    if mode == "I;16":
        image = Image.new("I;16", grey.size)
        for x in range(40):
            for y in range(30):
                image.putpixel((x, y), grey.getpixel((x, y)) * 257)
    else:
        image = grey.convert("P").convert(mode) if mode == "PA" else grey.convert(mode)
    pixels = fit_image(image, 16)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 16, 16))
    expected = fit_image(grey.convert("RGB"), 16).float()
    assert (pixels.float().mean((1, 2)) - expected.mean((1, 2))).abs().max() < 4


def test_transparency_becomes_white():
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (10, 0, 20, 20))
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 0
    assert fit_image(image, 20)[:, 5, 5].tolist() == [255, 255, 255]
    assert fit_image(image, 20)[:, 5, 15].tolist() == [0, 0, 255]
    assert fit_image(palette, 20)[:, 5, 5].tolist() == [255, 255, 255]


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (300, 2), (7, 13)])
def test_odd_sizes_fit(size):
    assert fit_image(Image.new("RGB", size, "red"), 16).eq(torch.tensor([255, 0, 0])[:, None, None]).all()


def test_longer_side_is_cropped_about_the_centre():
    image = Image.new("RGB", (90, 30), "red")
    image.paste("lime", (30, 0, 60, 30))
    pixels = fit_image(image, 30)
    assert pixels[1].eq(255).all() and pixels[0].eq(0).all()


def test_images_are_turned_as_their_exif_says(tmp_path):
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 16, 8))  # dark above
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to view
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = load_image(tmp_path / "turned.png", 16)
    assert pixels[0, 8, 12] < 20 and pixels[0, 8, 3] > 235  # dark on the right


@pytest.mark.parametrize("raised", [SyntaxError("broken PNG file"), ValueError("buffer is not large enough")])
def test_what_pillow_raises_on_rare_damage_is_an_input_error(tmp_path, monkeypatch, raised):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")

    def fail(image):
        raise raised

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(InputError, match=r"image\.png is not a readable image"):
        load_image(tmp_path / "image.png", 8)


def test_large_images_are_read_without_a_warning(tmp_path, monkeypatch):
    Image.new("RGB", (12, 10)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above it, and refuses above its double
    assert load_image(tmp_path / "large.png", 8).shape == (3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(InputError, match="large.png"):
        load_image(tmp_path / "large.png", 8)


def test_names_too_long_for_the_file_system_are_missing_files(folder):
    content = json.loads((folder / "captions.json").read_text())
    content["images"][1]["file_name"] = "x" * 5000
    (folder / "captions.json").write_text(json.dumps(content))
    assert CocoCaptions.open(folder).skipped[folder / "images" / ("x" * 5000)] == "no such file"
    with pytest.raises(InputError, match="; give the folder of a data set"):
        CocoCaptions.open("x" * 5000)


def test_an_unreadable_image_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.png does not exist"):
        load_image(tmp_path / "absent.png", 16)
    with pytest.raises(InputError, match="is not a readable image"):
        load_image(tmp_path, 16)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about files that it can read in spite of damage
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_damage_of_any_kind_is_an_input_error(tmp_path, kind):
    path = tmp_path / "image"
    Image.effect_noise((24, 20), 80).convert("RGB").save(path, kind)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    failures = 0
    for _ in range(100):
        damaged = bytearray(whole)
        for place in torch.randint(len(whole), (6,), generator=generator).tolist():
            damaged[place % (60 if place % 2 else len(whole))] ^= 0xFF
        path.write_bytes(damaged[: int(torch.randint(len(whole), (1,), generator=generator)) + 1])
        try:
            assert load_image(path, 16).shape == (3, 16, 16)
        except InputError:
            failures += 1
    assert failures > 20


@pytest.mark.parametrize(("name", "split"), [("flickr8k", "train"), ("flickr8k", "val"), ("coco", "train")])
def test_real_photos_are_read(shared, name, split):
    dataset = CocoCaptions.open(shared / "data" / name, split)
    images = [image for _, image in dataset.read(64, 0, 20)]
    assert len(dataset.items) > 200 and len(images) == 20
    assert 20 < torch.stack(images).float().mean() < 230
