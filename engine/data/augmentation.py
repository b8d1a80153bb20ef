"""How much training changes images; no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Augmentation:
    """How much training changes images, see `engine.data.augment`. All draws are uniform."""

    scale: tuple[float, float] = (0.8, 1.1)
    shift: float = 0.1  # at most, along each axis, as a fraction of the side
    flip: bool = True  # left and right, half of the images
    directional: tuple[str, ...] = ()  # images with one of these in a caption are not flipped
    background: float = 0.5  # of transparent images: the fraction on a random colour instead of white
    colour: float = 0.1  # brightness, contrast and saturation change by this fraction at most
    outline: float = 0.3  # fraction of the images that get dark outlines
    grey: float = 0.1  # fraction of the images that lose their colours
    jpeg: float = 0.3  # fraction of the images that are compressed
    quality: tuple[int, int] = (50, 95)  # of JPEG
    variants: int = 16  # changed versions of each image whose latents are kept

    def may_flip(self, captions: tuple[str, ...]) -> bool:
        """Whether an image with these captions shows the same when left and right are exchanged."""
        return self.flip and not any(part in caption.lower() for caption in captions for part in self.directional)
