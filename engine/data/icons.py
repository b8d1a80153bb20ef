"""Icon sets in Iconify's JSON format (https://iconify.design/docs/types/iconify-json.html): SVG images by name.

The npm packages `@iconify-json/…` have one each, in `icons.json`: many emoji of other vendors, under open licences.
"""

import io
import math
import re
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

from engine.errors import InputError
from engine.files import is_file, read_json
from engine.request import is_number

REMEDY = "give the icons.json of an Iconify package"
SVG = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
SIDE = 16  # of icons without a width or height, as the format says
MOST_LEVELS = 100  # of nested elements: resvg crashes at some hundreds
SPELT = str.maketrans({"#": " hash ", "*": " asterisk ", "’": "", "'": ""})


class IconSet:
    """The icons of a file, and their aliases; those that only mirror or turn another icon are left out.

    Raises InputError about `icons` if the file cannot be read or is of another format, and if resvg is not installed.
    """

    def __init__(self, file: Path):
        self.file = file
        if not is_file(file, "icons"):
            raise InputError("icons", file, REMEDY, "is not a file")
        content = read_json(file, "icons", REMEDY, REMEDY)
        try:
            self.prefix = content["prefix"]
            if not re.fullmatch(r"[a-z0-9-]{1,100}", self.prefix):
                raise ValueError(f"the prefix {self.prefix!r:.100}")
            self._icons = {name: content | dict(icon) for name, icon in content["icons"].items()}
            aliases = content.get("aliases", {}).items()
            parents = {name: alias["parent"] for name, alias in aliases if alias.keys() == {"parent"}}
            self._parents = {name: parent for name, parent in parents.items() if isinstance(parent, str)}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"is not an icon set ({type(error).__name__}: {error})"
            raise InputError("icons", file, REMEDY, problem) from None
        try:
            import resvg_py
        except ModuleNotFoundError:
            raise InputError("icons", file, "use pip install '.[train]'", "needs resvg, which draws SVG") from None
        self._render = resvg_py.svg_to_bytes

    def __contains__(self, name: str) -> bool:
        """Whether there is an icon of this name, given as words ("woman running: dark skin tone")."""
        return self._icon(name) is not None

    def draw(self, name: str, size: int) -> Image.Image:
        """RGBA image, size × size; an icon that is not square is centred.

        Raises InputError about `icons` if it cannot be drawn.
        """
        try:
            svg = _svg(self._icon(name) or {}, size)
            image = Image.open(io.BytesIO(bytes(self._render(svg_string=svg, skip_system_fonts=True)))).convert("RGBA")
            if image.getbbox() is None:
                raise ValueError("nothing is drawn")
            return image.resize((size, size))
        except (ValueError, OverflowError, OSError, ElementTree.ParseError) as error:
            problem = f"has a damaged icon {icon_name(name)} ({error})"
            raise InputError("icons", self.file, "install the package again", problem) from None

    def _icon(self, name: str) -> dict | None:
        found = icon_name(name)
        for _ in self._parents:  # an alias may be that of another alias; this ends also where they form a circle
            if found in self._icons:
                break
            found = self._parents.get(found, found)
        return self._icons.get(found)


def icon_name(name: str) -> str:
    """Words as Iconify writes them in names: "flag: Côte d’Ivoire" → "flag-cote-divoire"."""
    plain = unicodedata.normalize("NFKD", name.translate(SPELT)).encode("ascii", "ignore").decode()
    return "-".join("".join(c if c.isalnum() else " " for c in plain.lower()).split())


def _svg(icon: dict, size: int) -> str:
    """An icon as a whole SVG file; raises ValueError or ParseError for one that cannot be drawn safely."""
    left, top, width, height = (icon.get(k, d) for k, d in (("left", 0), ("top", 0), ("width", SIDE), ("height", SIDE)))
    if not all(is_number(v) and math.isfinite(v) for v in (left, top, width, height)) or min(width, height) <= 0:
        raise ValueError("its box is not made of numbers")
    body = icon.get("body")
    if not isinstance(body, str):
        raise ValueError("it has no body")
    svg = f'<svg {SVG} width="{size}" height="{size}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    level = 0
    for event, element in ElementTree.iterparse(io.BytesIO(svg.encode()), ("start", "end")):
        level += 1 if event == "start" else -1
        if level > MOST_LEVELS:
            raise ValueError("it is nested too deeply")
        if any(key.endswith("href") and not value.startswith("#") for key, value in element.attrib.items()):
            raise ValueError("it refers to another file")
    return svg
