"""Icon sets in Iconify's JSON format (https://iconify.design/docs/types/iconify-json.html): SVG images by name.

The npm packages `@iconify-json/…` have one each, in `icons.json`: many emoji of other vendors, under open licences.
"""

import io
import json
import unicodedata
from pathlib import Path

from PIL import Image

from engine.errors import InputError
from engine.files import unreadable

SVG = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
SIDE = 16  # of icons without a width or height, as the format says


class IconSet:
    """The icons of a file, and their aliases; those that only mirror or turn another icon are left out.

    Raises InputError about `icons` if the file cannot be read or is of another format, and if resvg is not installed.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            self.prefix = str(content["prefix"])
            icons = {name: _svg(content | icon) for name, icon in content["icons"].items()}
            aliases = {name: alias["parent"] for name, alias in content.get("aliases", {}).items() if len(alias) == 1}
        except OSError as error:
            raise unreadable("icons", file, error, "give the icons.json of an Iconify package") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"is not an icon set ({type(error).__name__}: {error})"
            raise InputError("icons", file, "give the icons.json of an Iconify package", problem) from None
        self._svg = {name: icons[parent] for name, parent in aliases.items() if parent in icons} | icons
        try:
            import resvg_py
        except ModuleNotFoundError:
            raise InputError("icons", file, "use pip install '.[train]'", "needs resvg, which draws SVG") from None
        self._render = resvg_py.svg_to_bytes

    def __contains__(self, name: str) -> bool:
        """Whether there is an icon of this name, given as words ("woman running: dark skin tone")."""
        return icon_name(name) in self._svg

    def draw(self, name: str, size: int) -> Image.Image:
        """RGBA image, size × size; an icon that is not square is centred.

        Raises InputError about `icons` if it cannot be drawn.
        """
        try:
            svg = self._svg[icon_name(name)].replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
            image = Image.open(io.BytesIO(bytes(self._render(svg_string=svg, skip_system_fonts=True))))
            return image.convert("RGBA").resize((size, size))
        except (ValueError, OSError) as error:
            remedy = "install the package again"
            raise InputError("icons", self.file, remedy, f"has a damaged icon {icon_name(name)} ({error})") from None


def icon_name(name: str) -> str:
    """Words as Iconify writes them in names: "flag: Côte d’Ivoire" → "flag-cote-divoire"."""
    plain = unicodedata.normalize("NFKD", name.replace("’", "").replace("'", "")).encode("ascii", "ignore").decode()
    return "-".join("".join(c if c.isalnum() else " " for c in plain.lower()).split())


def _svg(icon: dict) -> str:
    box = [icon.get(key, default) for key, default in (("left", 0), ("top", 0), ("width", SIDE), ("height", SIDE))]
    return f'<svg {SVG} viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
