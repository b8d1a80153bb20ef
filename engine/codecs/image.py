"""Image codec: a diffusers autoencoder's latents, cut into patch × patch squares, and back.

Independent of diffusion and tasks. The autoencoder is built when it is first needed, see `engine.codecs.autoencoder`:
for decoding alone it need not be, once its decoder was compiled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.codecs.autoencoder import LatentSpace, SavedAutoencoder, save_autoencoder
from engine.codecs.codec import Decoded, Given
from engine.codecs.packing import pack_convolutions
from engine.config import MAX_PIXELS, Modality
from engine.errors import InputError
from engine.images import composite, fill_masked, fit_image, open_image, open_mask, to_image
from engine.kernels.linear import onednn_computes

PART = 1 << 15  # pixels that one call of a compiled decoder makes, or one image


@dataclass(frozen=True, eq=False)
class GivenImage:
    """An image of which all or a part is known."""

    pixels: Tensor  # [3, S, S] float32 in −1..1; masked pixels are filled in
    mask: np.ndarray  # [S, S] bool, True where the image is to be generated
    feather: int  # pixels


class ImageCodec:
    """Encodes and decodes square images with a diffusers autoencoder; see `engine.codecs.codec.Codec`.

    autoencoder  one of `AUTOENCODERS`, or a saved one that is built when it is needed
    size         pixels a side
    patch        latents a side of one token
    device       where a saved one computes
    scale        of the latents, beside the autoencoder's own, for images of another variance than those it was made for
    """

    def __init__(
        self, autoencoder: nn.Module | SavedAutoencoder, size: int, patch: int, device="cpu", scale: float = 1.0
    ):
        self.size, self.patch, self.device = size, patch, device
        self._lock = Lock()  # guards the building
        self._saved: SavedAutoencoder | None = None
        self._built: Any = None  # a diffusers module; these have no types
        self._decode: Callable[[Tensor], Tensor] | None = None
        if isinstance(autoencoder, SavedAutoencoder):
            self._saved, latents = autoencoder, autoencoder.latents
        else:
            self._built = autoencoder.eval()
            latents = LatentSpace.of(self._built.config, type(autoencoder).__name__)
        self.latents = replace(latents, scale=latents.scale * scale)
        self.factor, self.latent_channels = latents.factor, latents.channels
        if size % (self.factor * patch):
            remedy = f"use a multiple of {self.factor * patch} ({self.factor} pixels a latent, {patch} latents a token)"
            raise InputError("size", size, remedy)

    @property
    def tokens(self) -> int:
        """L, tokens of an image."""
        return (self.size // (self.factor * self.patch)) ** 2

    @property
    def channels(self) -> int:
        """C, channels of a token."""
        return self.latent_channels * self.patch**2

    @classmethod
    def load(cls, folder: str | Path, settings: Mapping, modality: Modality, device="cpu") -> "ImageCodec":
        """Reads config.json of a diffusers autoencoder's folder or, if that does not exist, of a model on the hub.

        settings  size (pixels a side), patch (latents a side of a token) and, if it is not 1, scale
        Raises InputError: about "checkpoint", naming the file, or about a setting such as "codecs.image.size".
        """
        size, patch, scale = _checked(settings, f"codecs.{modality.name}")
        saved = SavedAutoencoder.open(folder)
        try:
            codec = cls(saved, size, patch, device, scale)
        except InputError as error:
            argument = f"codecs.{modality.name}.{error.argument}"
            raise InputError(argument, error.value, error.remedy, error.problem) from None
        if (codec.tokens, codec.channels) != (modality.tokens, modality.channels):
            problem = (
                f"makes {codec.tokens} tokens of {codec.channels} channels from images of {size} pixels, "
                f"the model takes {modality.tokens} of {modality.channels}"
            )
            raise InputError("checkpoint", saved.source, "use an autoencoder that fits the model", problem)
        return codec

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes a diffusers folder, weights in `dtype`."""
        save_autoencoder(self.autoencoder, folder, dtype)

    def build(self, compile: bool = False) -> None:
        """Loads the decoder's package if there is one, or with `compile` builds it, on a CPU; else the autoencoder.

        Raises InputError naming a damaged file.
        """
        with self._lock:
            nothing, cpu = self._built is None and self._decode is None, torch.device(self.device).type == "cpu"
            if self._saved is not None and nothing and cpu:
                self._decode = self._saved.packaged_decoder(self.size // self.factor, compile)
        if self._decode is None:
            _ = self.autoencoder

    @property
    def autoencoder(self) -> Any:
        """The diffusers module, in evaluation mode; builds it when first used."""
        with self._lock:
            if self._built is None and self._saved is not None:
                # A caller's inference mode must not reach the weights: they could not be saved or changed then.
                with torch.inference_mode(False):
                    self._built = self._saved.build().to(self.device).eval().requires_grad_(False)
                if torch.device(self.device).type == "cpu" and onednn_computes(torch.float32):
                    pack_convolutions(self._built)
        return self._built

    def read(
        self,
        value,
        argument: str,
        mask=None,
        unknown_words: str = "error",
        feather: int = 0,
        mask_argument: str = "mask",
    ) -> Given:
        """A PIL image or a file, cropped and resized to the codec's size, and its mask; see `Codec.read`."""
        if value is None:
            if mask is not None:
                raise InputError(mask_argument, mask, "give both", "needs the image it belongs to")
            return Given(torch.ones(self.tokens, self.channels, dtype=torch.bool), None)
        image = open_image(value, argument)
        masked = np.zeros((self.size, self.size), bool)
        if mask is not None:
            masked = open_mask(mask, image.size, self.size, mask_argument)
        levels = fit_image(image, self.size).numpy()  # numpy from here on, which starts no threads
        pixels = torch.from_numpy(levels.astype(np.float32) / np.float32(127.5) - np.float32(1))  # [3, S, S]
        return self._given(GivenImage(fill_masked(pixels, masked), masked, feather))

    def null(self) -> Given:
        """A mid-grey image, all of it known."""
        pixels = torch.from_numpy(np.zeros((3, self.size, self.size), np.float32))
        return self._given(GivenImage(pixels, np.zeros((self.size, self.size), bool), feather=0))

    def _given(self, image: GivenImage) -> Given:
        return Given(image_elements(image.mask, self.factor, self.patch, self.latent_channels), image)

    def encode(self, given: Sequence[Given]) -> Tensor:
        """Tokens [B, L, C] float32 on the CPU, zeros where they are to be generated."""
        tokens = torch.zeros(len(given), self.tokens, self.channels)
        rows = [i for i, one in enumerate(given) if not one.generate.all()]
        if rows:
            pixels = torch.stack([given[i].content.pixels for i in rows])  # [b, 3, S, S]
            generate = torch.stack([given[i].generate for i in rows])  # [b, L, C]
            tokens[rows] = self.encode_pixels(pixels).cpu().masked_fill(generate, 0)
        return tokens

    def decode(self, tokens: Tensor, given: Sequence[Given]) -> list[Decoded]:
        """PIL images from tokens [B, L, C]: known pixels are those given, and what is wholly known is not decoded."""
        images = self.decode_images(tokens, given)
        return [Decoded(to_image(image) if image.isfinite().all() else None) for image in images]

    def decode_images(self, tokens: Tensor, given: Sequence[Given]) -> list[Tensor]:
        """`decode` before it rounds: pixels [3, S, S] float32 on the CPU, about −1..1, or not finite."""
        images = {i: one.content.pixels for i, one in enumerate(given) if not one.generate.any()}
        rows = [i for i in range(len(given)) if i not in images]
        if rows:
            decoded = self.decode_pixels(tokens[rows]).cpu()  # [b, 3, S, S]
            rows_of: dict[Given, list[int]] = {}  # samples of one request are composited together
            for place, i in enumerate(rows):
                rows_of.setdefault(given[i], []).append(place)
            for one, places in rows_of.items():
                pixels, image = decoded[places], one.content
                if image is not None:
                    pixels = composite(image.pixels, pixels, image.mask, image.feather)
                images |= {rows[place]: p for place, p in zip(places, pixels, strict=True)}
        return [images[i] for i in range(len(given))]

    def project(self, tokens: Tensor, given: Given) -> Tensor:
        """The tokens as they are: any stands for an image."""
        return tokens

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] in −1..1 → tokens [B, L, C] float32, about unit variance, on the autoencoder's device."""
        parameter = next(self.autoencoder.parameters())
        out = self.autoencoder.encode(pixels.to(parameter))
        if hasattr(out, "latent_dist"):  # AutoencoderKL
            latents = out.latent_dist.mode()
        else:  # AutoencoderDC, AutoencoderTiny
            latents = out.latent if hasattr(out, "latent") else out.latents
        latents = (latents.float() - self.latents.shift) * self.latents.scale  # [B, c, h, w]
        return patchify(latents, self.patch)  # [B, L, C]

    @torch.inference_mode()
    def decode_pixels(self, tokens: Tensor) -> Tensor:
        """tokens [B, L, C] → pixels [B, 3, S, S] float32, clamped to −1..1, on the autoencoder's device."""
        latents = unpatchify(tokens.float(), self.patch) / self.latents.scale + self.latents.shift  # [B, c, h, w]
        if self._decode is not None:
            # Compiled code holds Python's lock, and other threads must go on.
            parts = latents.split(max(1, PART // self.size**2))
            return torch.cat([self._decode(part) for part in parts]).clamp(-1, 1)
        return self.autoencoder.decode(latents.to(next(self.autoencoder.parameters()))).sample.float().clamp(-1, 1)


def _checked(settings: Mapping, where: str) -> tuple[int, int, float]:
    """Size, patch and scale; raises InputError about `where` or one of them."""
    unknown = sorted(set(settings) - {"size", "patch", "scale"})
    if unknown:
        raise InputError(where, ", ".join(unknown), "use size, patch and scale", "is not a known setting")
    size, scale = _whole(settings, where, "size", 8, MAX_PIXELS), settings.get("scale", 1.0)
    if not (isinstance(scale, int | float) and not isinstance(scale, bool) and 1e-3 <= scale <= 1e3):  # also NaN
        raise InputError(f"{where}.scale", scale, "use a number from 0.001 to 1000")
    return size, _whole(settings, where, "patch", 1, size), float(scale)


def _whole(settings: Mapping, where: str, key: str, lowest: int, highest: int) -> int:
    value = settings.get(key)
    if not (isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest):
        raise InputError(f"{where}.{key}", value, f"use a whole number from {lowest} to {highest}")
    return value


def image_elements(mask: np.ndarray, factor: int, patch: int, channels: int) -> Tensor:
    """Pixel mask [H, W] bool to elements of patchified latents, [tokens, patch·patch·channels] bool.

    A latent covers factor × factor pixels and is generated if any of them is: no masked pixel may keep its old
    content. (Known pixels it covers are put back in the image, see `engine.images.composite`.) Tokens are row-major
    over patches; within a token: row in patch, column in patch, channel.
    """
    height, width = mask.shape
    assert height % (factor * patch) == 0 and width % (factor * patch) == 0, (mask.shape, factor, patch)
    rows, columns = height // (factor * patch), width // (factor * patch)
    cells = np.asarray(mask, bool).reshape(rows * patch, factor, columns * patch, factor).any(axis=(1, 3))
    tokens = cells.reshape(rows, patch, columns, patch).transpose(0, 2, 1, 3).reshape(rows * columns, patch * patch)
    return torch.from_numpy(np.repeat(tokens, channels, axis=1))  # [L, patch·patch·channels]


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[B, c, h, w] → [B, (h/p)(w/p), p·p·c]; a token's channels run over (row, column, channel)."""
    b, c, h, w = latents.shape
    x = latents.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify` for square grids."""
    b, n, channels = tokens.shape
    side, c = int(n**0.5), channels // patch**2
    assert side * side == n and c * patch**2 == channels, f"{tuple(tokens.shape)} is not a square grid of patch {patch}"
    x = tokens.reshape(b, side, side, patch, patch, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, side * patch, side * patch)
