"""Rendering emoji, and the compositional test set."""

import json

import pytest
from emoji_cases import cldr_folder, needs_font
from PIL import Image, features

from engine.codecs.words import tokenize
from engine.data.__main__ import main
from engine.data.emoji import FONT, NAMES, Renderer, base_name, held_out_names, read_emoji, render_emoji
from engine.data.sources import open_captioned
from engine.errors import InputError

needs_names = pytest.mark.skipif(not NAMES.is_dir(), reason="Debian's unicode-cldr-core is not installed")

ANNOTATIONS = """<ldml><annotations>
    <annotation cp="{">brace | bracket</annotation><annotation cp="{" type="tts">open curly bracket</annotation>
    <annotation cp="😀">face | grin | grinning face</annotation>
    <annotation cp="😀" type="tts">grinning face</annotation>
    <annotation cp="⁉">! | ? | mark</annotation><annotation cp="⁉" type="tts">exclamation question mark</annotation>
</annotations></ldml>"""
DERIVED = """<ldml><annotations>
    <annotation cp="🏃🏿‍♀">dark skin tone | racing | type 6 | woman</annotation>
    <annotation cp="🏃🏿‍♀" type="tts">woman running: dark skin tone</annotation>
    <annotation cp="🇫🇷">flag</annotation><annotation cp="🇫🇷" type="tts">flag: France</annotation>
</annotations></ldml>"""


@pytest.fixture
def few_names(tmp_path):
    """A CLDR folder with five names; the font has four of these emoji."""
    return cldr_folder(tmp_path, ANNOTATIONS, DERIVED)


@pytest.fixture(scope="module")
def renderer():
    if not FONT.is_file():
        pytest.skip("Debian's fonts-noto-color-emoji is not installed")
    return Renderer()


def test_name_comes_first_and_modifier_keywords_are_dropped(few_names):
    captions = {e.text: e.captions for e in read_emoji(few_names)}
    assert captions["😀"] == ("grinning face", "face", "grin")
    assert captions["🏃🏿‍♀"] == ("woman running: dark skin tone", "racing", "woman")


def test_keywords_without_a_word_are_dropped(few_names):
    assert {e.text: e.captions for e in read_emoji(few_names)}["⁉"] == ("exclamation question mark", "mark")


@pytest.mark.parametrize("text", ["😀", "🇫🇷", "👩🏿‍🚒", "1⃣", "👁‍🗨", "🏴‍☠", "🏃🏿‍♀", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"])  # fmt: skip
def test_sequences_draw_as_one_glyph(renderer, text):
    assert renderer.can_draw(text)


@pytest.mark.parametrize("text", ["{", "—", "𝄞", "\u200d", "\U0010ffff", "😀😀", "👩👩", "🇫😀"])
def test_text_that_the_font_lacks_and_broken_sequences_are_not_drawn(renderer, text):
    assert not renderer.can_draw(text)


def test_emoji_are_centred_on_nothing_in_one_scale(renderer):
    drawn = renderer.draw("⚪", 64)
    assert (drawn.size, drawn.mode) == ((64, 64), "RGBA")
    assert drawn.getpixel((0, 0))[3] == drawn.getpixel((63, 63))[3] == 0
    image = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
    left, top, right, bottom = image.convert("L").point(lambda grey: 255 * (grey < 250)).getbbox()
    assert abs(left - (64 - right)) <= 1 and abs(top - (64 - bottom)) <= 2 and right - left > 48
    assert image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) != (255, 255, 255)


def test_base_name_is_the_part_before_the_colon():
    assert base_name("woman running: dark skin tone") == "woman running"
    assert base_name("red heart") == "red heart"


def test_held_out_names_have_several_parts_and_only_known_words():
    colours, things = ("red", "green", "blue", "dark", "light"), [f"thing{i}" for i in range(200)]
    names = {f"{thing}: {colour}" for thing in things for colour in colours} | {f"alone {i}" for i in range(500)}
    once = {f"flag: land{i}" for i in range(300)}
    held_out = held_out_names(names | once)
    assert 0.03 * 1000 < len(held_out) < 0.07 * 1000
    assert all(":" in name for name in held_out) and not held_out & once
    words = {word for name in (names | once) - held_out for word in tokenize(name)}
    assert all(words.issuperset(tokenize(name)) for name in held_out)


def test_the_held_out_names_do_not_depend_on_order_or_process():
    tones = ("light", "medium", "dark")
    names = [f"{who}: {tone} skin tone" for who in ("leg", "woman", "judge", "guard", "ear", "man") for tone in tones]
    expected = {"leg: medium skin tone", "woman: dark skin tone", "judge: light skin tone", "guard: dark skin tone"}
    assert held_out_names(names) == held_out_names(reversed(names)) == expected


@needs_font
def test_the_data_set_is_in_coco_layout_and_can_be_rendered_again(tmp_path, few_names, capsys):
    out = tmp_path / "made" / "emoji"
    arguments = ["emoji", "--out", str(out), "--size", "32", "--names", str(few_names)]
    for _ in range(2):
        assert main(arguments) == 0
        assert "4 training images, 0 held out" in capsys.readouterr().out
        items = open_captioned(out).items
        assert [item.path.name for item in items] == [f"0000{i}.png" for i in range(4)]
        assert items[3].captions == ("flag: France", "flag")
        with Image.open(items[0].path) as image:
            assert image.size == (32, 32)
        assert [path.name for path in out.parent.iterdir()] == ["emoji"]  # no temporary folder is left


@needs_font
def test_folders_of_other_content_are_not_overwritten(tmp_path, few_names, capsys):
    (tmp_path / "captions.json").write_text(json.dumps({"info": {"description": "mine"}}))
    assert main(["emoji", "--out", str(tmp_path), "--names", str(few_names)]) == 2
    assert "did not make; give a new or empty folder" in capsys.readouterr().err
    assert (tmp_path / "captions.json").exists() and not (tmp_path / "images").exists()


@needs_font
def test_interrupted_rendering_leaves_the_earlier_data_set(tmp_path, few_names, monkeypatch):
    out = tmp_path / "emoji"
    render_emoji(out, 16, names=few_names)
    before = (out / "captions.json").read_text()
    monkeypatch.setattr(Renderer, "draw", lambda self, text, size: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        render_emoji(out, 32, names=few_names)
    assert (out / "captions.json").read_text() == before and len(list(out.glob("images/*"))) == 4
    assert not list(tmp_path.glob(".emoji*"))


@needs_font
@needs_names
def test_the_whole_data_set_has_every_glyph_once():
    renderer = Renderer()
    drawn = [e for e in read_emoji() if renderer.can_draw(e.text)]
    assert len(drawn) > 3000
    assert len({e.name for e in drawn}) == len({e.text for e in drawn}) == len(drawn)
    assert all(tokenize(caption) for e in drawn for caption in e.captions)
    assert 50 < len(held_out_names(e.name for e in drawn)) < 200


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--font", "nowhere.ttf", "fonts-noto-color-emoji"),
        ("--font", __file__, "cannot be read at its 109 px strike"),
        ("--names", "nowhere", "unicode-cldr-core"),
        ("--font", "x" * 5000, "fonts-noto-color-emoji"),
        ("--font", "", "give one"),
        ("--names", "x" * 5000, "unicode-cldr-core"),
        ("--names", "", "give one"),
        ("--size", "0", "use 8 to"),
        ("--size", "99999999999", "use 8 to"),
        ("--size", "big", "see --help"),
        ("--out", "", "give one"),
        ("--out", "a\0b", "give one"),
        ("--out", "x" * 5000, "give another folder"),
        ("--out", f"{__file__}/below", "give another folder"),
        ("--colour", "1", "see --help"),
        ("--out", __file__, "is a file"),
    ],
    ids=lambda text: text[:20],
)
@needs_font
def test_bad_options_are_refused_in_one_line_with_the_remedy(tmp_path, few_names, capsys, option, value, says):
    out = tmp_path / "out"
    try:
        status = main(["emoji", "--out", str(out), "--names", str(few_names), option, value])
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("python -m engine.data")
    assert error.count("\n") == 1 and option in error and repr(value)[1:-1][:60] in error and says in error
    assert not out.exists()


def test_a_truncated_names_file_is_named(tmp_path, few_names):
    path = few_names / "annotations" / "en.xml"
    path.write_text(ANNOTATIONS[:200], encoding="utf-8")
    with pytest.raises(InputError, match=r"en\.xml is not XML"):
        read_emoji(few_names)


def test_a_missing_text_layout_is_named(monkeypatch):
    monkeypatch.setattr(features, "check", lambda feature: False)
    with pytest.raises(InputError, match="RAQM.*libfribidi0"):
        Renderer()


def test_a_font_without_emoji_is_refused(tmp_path, few_names, monkeypatch):
    monkeypatch.setattr(Renderer, "__init__", lambda self, font: None)
    monkeypatch.setattr(Renderer, "can_draw", lambda self, text: False)
    with pytest.raises(InputError, match="has none of the emoji"):
        render_emoji(tmp_path / "out", names=few_names)
