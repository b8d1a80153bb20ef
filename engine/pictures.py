"""Pictures for people: tensors to PIL images, and grids with captions under the pictures."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, FONT_SIZE = 8, 12


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in −1..1 → an RGB image."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()  # [3, H, W]
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def grid(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """Images of one size side by side on white, `columns` in a row (default: about square), captions wrapped below."""
    columns = columns or max(1, round(len(images) ** 0.5))
    rows = -(-len(images) // columns)
    # Captions need room: small pictures are enlarged to at least 96 pixels, by whole factors so that they stay sharp.
    enlarge = -(-96 // images[0].width) if captions else 1
    width, height = images[0].width * enlarge, images[0].height * enlarge
    font = ImageFont.load_default(FONT_SIZE)
    lines = [_wrap(caption, font, width) for caption in captions or [""] * len(images)]
    text = max(len(line) for line in lines) * (FONT_SIZE + 3) if captions else 0
    cell = (width + MARGIN, height + text + MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = MARGIN + i % columns * cell[0], MARGIN + i // columns * cell[1]
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for j, line in enumerate(lines[i]):
            draw.text((x + width / 2, y + height + 2 + j * (FONT_SIZE + 3)), line, "black", font, anchor="ma")
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
