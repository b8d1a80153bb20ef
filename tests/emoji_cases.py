"""What tests of emoji share: names as CLDR has them, and the font."""

import pytest

from engine.data.emoji import FONT

needs_font = pytest.mark.skipif(not FONT.is_file(), reason="Debian's fonts-noto-color-emoji is not installed")


def cldr_folder(folder, annotations: str, derived: str = "<ldml/>"):
    """Writes CLDR's two files of names into FOLDER/common; returns it."""
    for part, content in (("annotations", annotations), ("annotationsDerived", derived)):
        path = folder / "common" / part / "en.xml"
        path.parent.mkdir(parents=True)
        path.write_text(content, encoding="utf-8")
    return folder / "common"
