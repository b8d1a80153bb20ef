"""Noto Color Emoji with its CLDR names, rendered into a data set in MS-COCO captions layout.

Pictures: the font of Debian's `fonts-noto-color-emoji` (OFL 1.1). Names and keywords: CLDR annotations of Debian's
`unicode-cldr-core` (Unicode licence), https://unicode.org/reports/tr35/tr35-general.html#Annotations.
Names are compositional ("woman running: dark skin tone"), so a fixed 5 % of those with several parts is held out:
pictures a model can only get right by putting known words together.
"""

import hashlib
import json
import os
import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from engine.codecs.text import tokenize

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/cldr/common")
NAME_FILES = ("annotations/en.xml", "annotationsDerived/en.xml")
STRIKE = 109  # pixels per em of the font's only bitmap size
MOST_PIXELS = 4096  # a side: the font's own are 136
HELD_OUT = 0.05  # share of the multi-part names that is never trained on
MADE_BY = "python -m engine.data emoji"  # in captions.json: what may be overwritten

# Keywords that thousands of pictures share and that say only what the name's second part says.
MODIFIER_KEYWORD = re.compile(r"(.* )?skin tone|type \d.*|(blond|curly|red|white) hair|bald")


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points, its CLDR name, and its captions (the name first, then the keywords)."""

    text: str
    name: str
    captions: tuple[str, ...]


def base_name(name: str) -> str:
    """What a name shows, without its variant: "woman running: dark skin tone" gives "woman running"."""
    return name.split(":")[0].strip()


def held_out_names(names: Iterable[str]) -> set[str]:
    """The compositional test set: names with ":" that a hash selects, all of whose words occur in other names.

    The hash (SHA-256 of the name) makes the choice independent of order and platform. A selected name with a word that
    no unselected name has ("flag: France") stays in training: composing asks for parts seen before.
    """
    names = set(names)
    selected = {name for name in names if ":" in name and _unit_hash(name) < HELD_OUT}
    known = {word for name in names - selected for word in tokenize(name)}
    return {name for name in selected if known.issuperset(tokenize(name))}


def render_emoji(out: Path, size: int = 64, font: Path = FONT, names: Path = NAMES) -> dict[str, int]:
    """Render every emoji that both the font and CLDR know into the folder `out`; returns pictures per split.

    `out` then holds `images/00000.png` … (RGB, size × size, on white), `captions.json` (training) and
    `captions_test.json` (held out). It is written beside `out` and renamed, so `out` is complete or absent.
    Raises ValueError if the font, the names or the RAQM text layout are missing, or if `out` holds anything else.
    """
    if not 8 <= size <= MOST_PIXELS:
        raise ValueError(f"--size {size}: does not work; use 8 to {MOST_PIXELS} pixels")
    _require_replaceable(out)
    renderer = Renderer(font)
    emoji = [e for e in read_emoji(names) if renderer.can_draw(e.text)]
    if not emoji:
        raise ValueError(f"--font {font}: it draws none of the emoji that CLDR names; use {FONT.name}")

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as workshop:
        new, old = Path(workshop, "new"), Path(workshop, "old")
        (new / "images").mkdir(parents=True)
        for i, e in enumerate(tqdm(emoji, desc="emoji", unit="picture", disable=None)):
            renderer.draw(e.text, size).save(new / "images" / _file_name(i))
        counts = _write_captions(new, emoji, size)
        if out.exists():
            out.rename(old)
        new.rename(out)
    return counts


def read_emoji(names: Path = NAMES) -> list[Emoji]:
    """All characters and sequences that CLDR names in English, in CLDR's order, drawable or not."""
    tts: dict[str, str] = {}  # "text to speech": the name
    keywords: dict[str, list[str]] = {}
    for file in NAME_FILES:
        for annotation in _parse(names / file).iter("annotation"):
            text = annotation.get("cp")
            if annotation.get("type") == "tts":
                tts[text] = annotation.text.strip()
            else:
                keywords[text] = [phrase.strip() for phrase in annotation.text.split("|")]
    return [Emoji(text, name, _captions(name, keywords.get(text, []))) for text, name in tts.items()]


class Renderer:
    """Draws emoji with a bitmap colour font; whole sequences (ZWJ, flags, keycaps, skin tones) become one glyph."""

    def __init__(self, font: Path = FONT):
        if not features.check("raqm"):
            raise ValueError(
                "Pillow has no RAQM text layout, without which flags and families fall apart into pieces; "
                "install Pillow's own wheel, with FriBiDi (Debian: libfribidi0)"
            )
        if not os.path.isfile(font):
            raise ValueError(f"--font {font}: no such file; install Debian's fonts-noto-color-emoji or name the font")
        try:
            self.font = ImageFont.truetype(str(font), STRIKE, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            raise ValueError(
                f"--font {font}: cannot be read at its {STRIKE} px strike ({error}); use {FONT.name}"
            ) from None
        self.em = self.font.getlength("\N{GRINNING FACE}")
        self.missing = self._glyph("\U0010ffff")  # a noncharacter: what shows for all the font lacks (Noto: a blank)

    def can_draw(self, text: str) -> bool:
        """Whether `text` is a single visible glyph of the font.

        CLDR leaves U+FE0F (emoji presentation) out of its sequences; so does Noto's glyph substitution, so none is
        put back: with U+FE0F not one more sequence becomes a glyph.
        """
        return self.font.getlength(text) == self.em and self._glyph(text) != self.missing

    def draw(self, text: str, size: int) -> Image.Image:
        """RGB picture, size × size, of the glyph on white."""
        return self._glyph(text).resize((size, size), Image.Resampling.LANCZOS)

    def _glyph(self, text: str) -> Image.Image:
        """At the strike's own size; its bitmap box, not its ink, is centred, so that all glyphs share a scale."""
        left, top, right, bottom = self.font.getbbox(text)
        side = max(right - left, bottom - top)
        origin = ((side - left - right) // 2, (side - top - bottom) // 2)
        picture = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(picture).text(origin, text, font=self.font, embedded_color=True)
        return picture


def _write_captions(folder: Path, emoji: list[Emoji], size: int) -> dict[str, int]:
    test = held_out_names(e.name for e in emoji)
    splits = {
        "captions.json": [i for i, e in enumerate(emoji) if e.name not in test],
        "captions_test.json": [i for i, e in enumerate(emoji) if e.name in test],
    }
    for file, indices in splits.items():
        captions = [(i, caption) for i in indices for caption in emoji[i].captions]
        content = {
            "info": {
                "description": "Noto Color Emoji (OFL 1.1) with CLDR names and keywords (Unicode licence)",
                "made_by": MADE_BY,
            },
            "images": [{"id": i, "file_name": _file_name(i), "width": size, "height": size} for i in indices],
            "annotations": [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)],
        }
        (folder / file).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return {"training": len(splits["captions.json"]), "test": len(splits["captions_test.json"])}


def _require_replaceable(out: Path) -> None:
    if not os.path.exists(out):
        return
    if not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a new folder")
    if not any(out.iterdir()):
        return
    try:
        mine = json.loads((out / "captions.json").read_text(encoding="utf-8"))["info"]["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        mine = False
    if not mine:
        raise ValueError(f"--out {out}: holds files that this command did not make; name a new or empty folder")


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except OSError:
        raise ValueError(
            f"--names {path.parents[1]}: has no {'/'.join(path.parts[-2:])}; "
            "install Debian's unicode-cldr-core or name CLDR's `common` folder"
        ) from None
    except ElementTree.ParseError as error:
        raise ValueError(f"--names {path.parents[1]}: {path} is not XML ({error}); install it again") from None


def _captions(name: str, keywords: list[str]) -> tuple[str, ...]:
    own = [k for k in keywords if tokenize(k) and not MODIFIER_KEYWORD.fullmatch(k)]  # "?!" has no words
    return tuple(dict.fromkeys([name, *own]))


def _file_name(index: int) -> str:
    return f"{index:05d}.png"


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone; Python's own hash() differs between processes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
