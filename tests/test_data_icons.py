"""Icon sets of other vendors as data sets of emoji."""

import json
import sys

import pytest
from emoji_cases import cldr_folder, needs_font
from PIL import Image

from engine.data.__main__ import main
from engine.data.emoji import held_out_names, render_emoji
from engine.data.icons import IconSet, icon_name
from engine.data.sources import open_captioned
from engine.errors import InputError

RED = '<path fill="#f00" d="M0 0h8v16H0z"/>'  # the left half of a square of 16
ICONS = {
    "prefix": "few",
    "icons": {
        "red-square": {"body": RED},
        "tall": {"body": '<path fill="#00f" d="M0 0h16v32H0z"/>', "height": 32},
        "moved": {"body": '<path fill="#0f0" d="M-4 -4h16v16H-4z"/>', "left": -4, "top": -4},
        "keycap-asterisk": {"body": RED},
    },
    "aliases": {
        "scarlet-square": {"parent": "red-square"},
        "crimson-square": {"parent": "scarlet-square"},
        "mirrored": {"parent": "red-square", "hFlip": True},
        "round": {"parent": "robin"},
        "robin": {"parent": "round"},
        "orphan": {"parent": "nobody"},
        "listed": {"parent": []},
    },
}


@pytest.fixture
def icons(tmp_path):
    """Writes an icon set; returns its file."""

    def written(content: object = ICONS):
        file = tmp_path / "icons.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return file

    return written


@pytest.fixture
def names(tmp_path):
    """Writes a CLDR folder with these names; returns it."""

    def written(*named: str):
        rows = [f'<annotation cp="{chr(0x1F600 + i)}" type="tts">{name}</annotation>' for i, name in enumerate(named)]
        return cldr_folder(tmp_path, f"<ldml><annotations>{''.join(rows)}</annotations></ldml>")

    return written


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("woman running: dark skin tone", "woman-running-dark-skin-tone"),
        ("flag: Côte d’Ivoire", "flag-cote-divoire"),
        ("keycap: 10", "keycap-10"),
        ("keycap: *", "keycap-asterisk"),
        ("keycap: #", "keycap-hash"),
        ("Mrs. Claus", "mrs-claus"),
        ("Japanese “open for business” button", "japanese-open-for-business-button"),
        ("—", ""),
    ],
)
def test_names_are_spelt_as_iconify_spells_them(name, expected):
    assert icon_name(name) == expected


def test_icons_are_drawn_at_the_size_asked_for_on_nothing(icons):
    drawn = IconSet(icons())
    image = drawn.draw("Red: square", 32)
    assert (image.mode, image.size) == ("RGBA", (32, 32))
    assert image.getpixel((8, 16)) == (255, 0, 0, 255) and image.getpixel((24, 16))[3] == 0
    assert drawn.draw("scarlet square", 32).tobytes() == image.tobytes()


def test_an_icon_that_is_not_square_is_centred_and_its_origin_kept(icons):
    drawn = IconSet(icons())
    tall, moved = drawn.draw("tall", 32), drawn.draw("moved", 32)
    assert tall.getchannel("A").getbbox() == (8, 0, 24, 32)
    assert moved.getchannel("A").getbbox() == (0, 0, 32, 32)


def test_icons_that_mirror_others_and_names_without_one_are_not_there(icons):
    drawn = IconSet(icons())
    assert all(name in drawn for name in ("red square", "scarlet square", "crimson square", "keycap: *"))
    assert not any(name in drawn for name in ("mirrored", "round", "robin", "orphan", "listed", "blue square", "—"))


@needs_font
def test_a_data_set_is_made_of_the_names_that_have_an_icon(icons, names, tmp_path, capsys):
    out = tmp_path / "out"
    named = names("red square", "blue square", "scarlet square", "tall")
    assert main(["emoji", "--icons", str(icons()), "--names", str(named), "--out", str(out), "--size", "16"]) == 0
    assert "3 training images, 0 held out" in capsys.readouterr().out
    items = open_captioned(out).items
    assert [item.captions[0] for item in items] == ["red square", "scarlet square", "tall"]
    with Image.open(items[0].path) as image:
        assert image.size == (16, 16) and image.getpixel((4, 8)) == (255, 0, 0, 255)
    assert "icon set few" in (out / "captions.json").read_text()


@needs_font
def test_sets_of_fewer_icons_hold_out_the_same_names(icons, names, tmp_path):
    """Else what is held out of one set would be trained on with another."""
    tones = ("light", "medium", "dark")
    every = [f"{who}: {tone} skin tone" for who in ("leg", "woman", "judge", "guard", "ear", "man") for tone in tones]
    few = [name for name in every if name.startswith("leg: medium")]  # alone, its words would occur nowhere else
    assert held_out_names(few) == set() and set(few) < held_out_names(every)
    file = icons({"prefix": "few", "icons": {icon_name(name): {"body": RED} for name in few}})
    counts = render_emoji(tmp_path / "out", 16, names=names(*every), icons=file)
    assert counts == {"training": 0, "test": 1}


@needs_font
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not JSON", "is not readable JSON"),
        ("[]", "is not an icon set"),
        ('{"prefix": "few"}', "is not an icon set"),
        ({"prefix": "few", "icons": ["red-square"]}, "is not an icon set"),
        ({"prefix": "few", "icons": {"red-square": "x"}}, "is not an icon set"),
        ({"prefix": "few", "icons": {"red-square": {"body": RED}}, "aliases": {"a": 1}}, "is not an icon set"),
        ({"prefix": "a b", "icons": {"red-square": {"body": RED}}}, "is not an icon set"),
        ({"prefix": 5, "icons": {"red-square": {"body": RED}}}, "is not an icon set"),
        ("[" * 100_000, "is not readable JSON"),
        ({"prefix": "few", "icons": {"green-square": {"body": RED}}}, "has none of the font's emoji"),
        ({"prefix": "few", "icons": {}}, "has none of the font's emoji"),
        (None, "is not a file"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_icon_sets_are_refused_in_one_line(icons, names, tmp_path, capsys, content, says):
    file = tmp_path / "nowhere.json" if content is None else icons(content)
    out = tmp_path / "out"
    assert main(["emoji", "--icons", str(file), "--names", str(names("red square")), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--icons: {file}" in error and says in error
    assert not out.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("icon", "says"),
    [
        ({}, "it has no body"),
        ({"body": None}, "it has no body"),
        ({"body": "<path"}, "damaged icon red-square"),
        ({"body": "</svg><svg>"}, "damaged icon red-square"),
        ({"body": "<!DOCTYPE svg>" + RED}, "damaged icon red-square"),
        ({"body": ""}, "nothing is drawn"),
        ({"body": RED, "width": 0}, "its box is not made of numbers"),
        ({"body": RED, "width": True}, "its box is not made of numbers"),
        ({"body": RED, "height": "16"}, "its box is not made of numbers"),
        ({"body": RED, "left": float("inf")}, "its box is not made of numbers"),
        ({"body": RED, "top": 10**400}, "damaged icon red-square"),
        ({"body": RED, "width": 1e9}, "nothing is drawn"),
        ({"body": '<g opacity="0.9">' * 5000 + RED + "</g>" * 5000}, "it is nested too deeply"),
        ({"body": f'<image href="{__file__}" width="16" height="16"/>'}, "it refers to another file"),
        ({"body": '<image xlink:href="file:///dev/zero" width="16" height="16"/>'}, "it refers to another file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_icons_that_cannot_be_drawn_safely_are_named(icons, icon, says):
    drawn = IconSet(icons({"prefix": "few", "icons": {"red-square": icon}}))
    with pytest.raises(InputError, match="^icons: .*has a damaged icon red-square") as error:
        drawn.draw("red square", 16)
    assert says in str(error.value)


def test_without_resvg_the_extra_is_named(icons, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"needs resvg.*pip install '\.\[train\]'"):
        IconSet(icons())
