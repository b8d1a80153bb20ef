"""Images of every mode, and how refused ones are reported, for the tests of images and masks."""

import numpy as np
import pytest
from PIL import Image

from engine.errors import InputError
from engine.images import fit_image, images_up_to_the_limit, open_image


def load_image(path, size):
    """The image at `path` as a data set reads it, uint8 [3, size, size]."""
    with images_up_to_the_limit():
        return fit_image(open_image(path), size)


def of_mode(grey, mode):
    """An image of mode L in another one, with the same brightness."""
    levels = np.asarray(grey)
    if mode.startswith("I;16"):
        return Image.fromarray((levels.astype(np.uint16) * 257).astype({"I;16": "<u2", "I;16B": ">u2"}[mode]))
    if mode == "I":
        return Image.fromarray(levels.astype(np.int32) * 257)
    if mode == "F of 0 to 1":
        return Image.fromarray(levels.astype(np.float32) / 255)
    via = {"PA": "P", "La": "LA"}.get(mode, "L")
    return grey.convert(via).convert(mode)


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F", "F of 0 to 1"]


def refusal(function, *arguments):
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value) and " object at " not in str(error.value)
    return error.value
