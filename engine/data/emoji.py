"""Emoji with their CLDR names, rendered into a data set in MS-COCO captions layout.

Images: Noto Color Emoji, the font of Debian's `fonts-noto-color-emoji` (OFL 1.1), or an icon set, see
`engine.data.icons`. Names and keywords: the CLDR annotations of Debian's `unicode-cldr-core` (Unicode licence),
https://unicode.org/reports/tr35/tr35-general.html#Annotations.
Names are compositional ("woman running: dark skin tone"). A fixed 5 % of the names with several parts are held out: a
model gets these right only by combining words that it learnt from other names.
"""

import hashlib
import json
import os
import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from engine.codecs.words import tokenize
from engine.data.icons import IconSet
from engine.errors import InputError
from engine.files import is_file, unreadable

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/cldr/common")
NAME_FILES = ("annotations/en.xml", "annotationsDerived/en.xml")
STRIKE = 109  # pixels per em of the font's only bitmap size
MAX_PIXELS = 4096  # per side
HELD_OUT = 0.05  # fraction of the multi-part names that is never trained on
MADE_BY = "python -m engine.data emoji"  # in captions.json; only folders with this mark are overwritten

# Keywords that thousands of images share and that only repeat the second part of the name.
MODIFIER_KEYWORD = re.compile(r"(.* )?skin tone|type \d.*|(blond|curly|red|white) hair|bald")


@dataclass(frozen=True)
class Emoji:
    """One emoji and its names."""

    text: str  # its code points
    name: str  # CLDR's
    captions: tuple[str, ...]  # the name, then the keywords


def base_name(name: str) -> str:
    """The name without its variant: "woman running: dark skin tone" → "woman running"."""
    return name.split(":")[0].strip()


def name_class(name: str) -> str:
    """What kind of image a name belongs to: compositions (with a ":"), flags, faces or objects."""
    if name.startswith("flag:"):
        return "flags"
    if ":" in name:
        return "compositions"
    return "faces" if "face" in tokenize(name) else "objects"


def held_out_names(names: Iterable[str]) -> set[str]:
    """The compositional test set: names with ":" selected by a hash, if all of their words occur in other names.

    The hash (SHA-256 of the name) makes the selection independent of order and platform. A selected name with a word
    that no unselected name has ("flag: France") stays in the training set, since it cannot be composed of known words.
    """
    names = set(names)
    selected = {name for name in names if ":" in name and _unit_hash(name) < HELD_OUT}
    known = {word for name in names - selected for word in tokenize(name)}
    return {name for name in selected if known.issuperset(tokenize(name))}


def render_emoji(
    out: Path, size: int = 136, font: Path = FONT, names: Path = NAMES, icons: Path | None = None
) -> dict[str, int]:
    """Renders every emoji that both the font and CLDR have into the folder `out`; returns the images of each split.

    out    then holds `images/00000.png` … (RGBA, transparent around the glyph), `captions.json` (training) and
           `captions_test.json` (held out). It is written beside `out` and renamed, so `out` is complete or absent
    size   pixels per side; the font's bitmaps have 136
    font   a bitmap colour font
    names  CLDR's `common` folder
    icons  the file of an icon set, to draw the font's emoji in another way; the same names are held out
    Raises InputError if the font, the icons, the names or the RAQM text layout are missing, or if `out` holds anything
    else.
    """
    if not 8 <= size <= MAX_PIXELS:
        raise InputError("size", size, f"use 8 to {MAX_PIXELS} pixels", "is out of range")
    _require_replaceable(out)
    renderer = Renderer(font)
    emoji = [e for e in read_emoji(names) if renderer.can_draw(e.text)]
    if not emoji:
        raise InputError("font", font, f"use {FONT.name}", "has none of the emoji that CLDR names")
    test = held_out_names(e.name for e in emoji)
    if icons is None:
        drawings, source = [(e, partial(renderer.draw, e.text)) for e in emoji], "Noto Color Emoji (OFL 1.1)"
    else:
        drawn = IconSet(icons)
        drawings = [(e, partial(drawn.draw, e.name)) for e in emoji if e.name in drawn]
        source = f"Emoji of the icon set {drawn.prefix}"
    if not drawings:
        raise InputError("icons", icons, "use a set of emoji", "has none of the font's emoji")

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        (new / "images").mkdir(parents=True)
        for i, (_, draw) in enumerate(tqdm(drawings, desc="emoji", unit="image", disable=None)):
            draw(size).save(new / "images" / _file_name(i))
        counts = _write_captions(new, [e for e, _ in drawings], test, source, size)
        if out.exists():
            out.rename(old)
        new.rename(out)
    return counts


def read_emoji(names: Path = NAMES) -> list[Emoji]:
    """All characters and sequences with an English name in CLDR, in CLDR's order, whether a font has them or not."""
    tts: dict[str, str] = {}  # names, which CLDR marks as "text to speech"
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
    """Draws emoji with a bitmap colour font; a whole sequence (ZWJ, flag, keycap, skin tone) becomes one glyph."""

    def __init__(self, font: Path = FONT):
        if not features.check("raqm"):
            remedy = "install Pillow's own wheel, with FriBiDi (Debian: libfribidi0)"
            problem = "cannot be used: Pillow lacks the RAQM text layout, without which flags and families do not form"
            raise InputError("font", font, remedy, problem)
        if not is_file(font, "font"):
            remedy = "install Debian's fonts-noto-color-emoji or give the font"
            raise InputError("font", font, remedy, "is not a file")
        try:
            self.font = ImageFont.truetype(str(font), STRIKE, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            problem = f"cannot be read at its {STRIKE} px strike ({error})"
            raise InputError("font", font, f"use {FONT.name}", problem) from None
        self.em = self.font.getlength("\N{GRINNING FACE}")
        self.missing = self._glyph("\U0010ffff")  # a noncharacter: drawn like all that the font lacks (Noto: a blank)

    def can_draw(self, text: str) -> bool:
        """Whether `text` is a single visible glyph of the font.

        CLDR leaves U+FE0F (emoji presentation) out of its sequences, and so does Noto's glyph substitution: adding it
        back would not make one more sequence a glyph.
        """
        return self.font.getlength(text) == self.em and self._glyph(text) != self.missing

    def draw(self, text: str, size: int) -> Image.Image:
        """RGBA image, size × size, of the glyph."""
        return self._glyph(text).resize((size, size), Image.Resampling.LANCZOS)

    def _glyph(self, text: str) -> Image.Image:
        """At the size of the strike; the bitmap's box, not its ink, is centred, so that all glyphs share a scale."""
        left, top, right, bottom = self.font.getbbox(text)
        side = max(right - left, bottom - top)
        origin = ((side - left - right) // 2, (side - top - bottom) // 2)
        image = Image.new("RGBA", (side, side))
        ImageDraw.Draw(image).text(origin, text, font=self.font, embedded_color=True)
        # Drawn on transparent black, colours are multiplied by their alpha, which Pillow calls RGBa.
        return Image.frombytes("RGBa", image.size, image.tobytes()).convert("RGBA")


def _write_captions(folder: Path, emoji: list[Emoji], test: set[str], source: str, size: int) -> dict[str, int]:
    splits = {
        "captions.json": [i for i, e in enumerate(emoji) if e.name not in test],
        "captions_test.json": [i for i, e in enumerate(emoji) if e.name in test],
    }
    for file, indices in splits.items():
        captions = [(i, caption) for i in indices for caption in emoji[i].captions]
        content = {
            "info": {
                "description": f"{source} with CLDR names and keywords (Unicode licence)",
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
        raise InputError("out", out, "give a new folder", "is a file")
    if not any(out.iterdir()):
        return
    try:
        replaceable = json.loads((out / "captions.json").read_text(encoding="utf-8"))["info"]["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        replaceable = False
    if not replaceable:
        raise InputError("out", out, "give a new or empty folder", "holds files that this command did not make")


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except OSError as error:
        remedy = "install Debian's unicode-cldr-core or give CLDR's `common` folder"
        raise unreadable("names", path, error, remedy) from None
    except ElementTree.ParseError as error:
        raise InputError("names", path, "install it again", f"is not XML ({error})") from None


def _captions(name: str, keywords: list[str]) -> tuple[str, ...]:
    specific = [k for k in keywords if tokenize(k) and not MODIFIER_KEYWORD.fullmatch(k)]  # "?!" has no words
    return tuple(dict.fromkeys([name, *specific]))


def _file_name(index: int) -> str:
    return f"{index:05d}.png"


def _unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name only; Python's hash() differs between processes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
