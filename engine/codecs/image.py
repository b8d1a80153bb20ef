"""Pictures to tokens and back: a diffusers autoencoder's latents, cut into patch × patch squares.

Knows nothing of diffusion, masks or tasks. diffusers is imported when a codec is loaded, never before: its import
costs more than the whole of a short sampling run, so that callers can load the codec while they compute.
"""

import inspect
import json
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ConfigError, shown
from engine.device import all_finite

AUTOENCODERS = ("AutoencoderTiny", "AutoencoderKL", "AutoencoderDC")


class ImageCodec:
    """Encodes and decodes square pictures in −1..1 with a diffusers autoencoder.

    autoencoder  any of `AUTOENCODERS`
    size         pixels a side
    patch        latents a side of one token
    """

    def __init__(self, autoencoder, size: int, patch: int):
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.size, self.patch = size, patch
        config = autoencoder.config
        self.scaling_factor = config.get("scaling_factor") or 1.0
        self.shift_factor = config.get("shift_factor") or 0.0
        self.latent_channels = config["latent_channels"]
        self.factor = downscale_of(config)
        if size % (self.factor * patch):
            raise ConfigError(f"image.size: {size} does not work; use a multiple of {self.factor * patch} "
                              f"({self.factor} pixels a latent, {patch} latents a token)")  # fmt: skip

    @property
    def tokens(self) -> int:
        """L, tokens of a picture."""
        return (self.size // (self.factor * self.patch)) ** 2

    @property
    def channels(self) -> int:
        """C, channels of a token."""
        return self.latent_channels * self.patch**2

    @classmethod
    def load(cls, source: str | Path, size: int, patch: int, device="cpu") -> "ImageCodec":
        """Loads a diffusers autoencoder in float32 from a local folder or, where there is no such folder, a hub id.

        Raises ValueError where the folder holds no autoencoder this codec can use, or damaged weights.
        """
        folder = Path(source)
        if not os.path.isdir(source):  # not Path's, which raises where a name is too long
            autoencoder = _from_hub(str(source))
        else:
            config = _read_config(folder / "config.json")
            try:
                kind = autoencoder_class(config["_class_name"])
                # Only what it takes: some diffusers classes save more than that, and then warn about it.
                taken = inspect.signature(kind.__init__).parameters
                autoencoder = kind.from_config({key: value for key, value in config.items() if key in taken})
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{folder / 'config.json'}: describes no {config['_class_name']} ({error}); "
                                 "copy the autoencoder folder again") from None  # fmt: skip
            weights = _read_weights(folder / "diffusion_pytorch_model.safetensors")
            expected = {(name, w.shape) for name, w in autoencoder.state_dict().items()}
            differing = expected ^ {(name, w.shape) for name, w in weights.items()}
            if differing:
                first, _ = min(differing)
                raise ValueError(f"{folder}: the weights do not fit config.json (first difference: {first}); "
                                 "copy the autoencoder folder again")  # fmt: skip
            autoencoder.load_state_dict(weights)
        return cls(autoencoder.float().to(device), size, patch)

    def save(self, folder: str | Path, dtype=torch.float32) -> None:
        """Writes a diffusers folder (`config.json`, `diffusion_pytorch_model.safetensors`), weights in `dtype`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.autoencoder.save_config(folder)
        weights = {name: w.to(dtype).contiguous() for name, w in self.autoencoder.state_dict().items()}
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] in −1..1 → tokens [B, L, C] float32, about unit variance."""
        parameter = next(self.autoencoder.parameters())
        out = self.autoencoder.encode(pixels.to(parameter))
        if hasattr(out, "latent_dist"):  # AutoencoderKL
            latents = out.latent_dist.mode()
        else:  # AutoencoderDC, AutoencoderTiny
            latents = out.latent if hasattr(out, "latent") else out.latents
        latents = (latents.float() - self.shift_factor) * self.scaling_factor  # [B, c, h, w]
        return patchify(latents, self.patch)  # [B, L, C]

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens [B, L, C] → pixels [B, 3, S, S] float32, clamped to −1..1."""
        parameter = next(self.autoencoder.parameters())
        latents = unpatchify(tokens.float(), self.patch) / self.scaling_factor + self.shift_factor
        return self.autoencoder.decode(latents.to(parameter)).sample.float().clamp(-1, 1)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[B, c, h, w] → [B, (h/p)(w/p), p·p·c]; a token's channels run over (row, column, channel)."""
    b, c, h, w = latents.shape
    x = latents.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify` for square grids."""
    b, n, channels = tokens.shape
    side, c = int(n**0.5), channels // patch**2
    assert side * side == n and c * patch**2 == channels, f"{tuple(tokens.shape)} is no square grid of patch {patch}"
    x = tokens.reshape(b, side, side, patch, patch, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, side * patch, side * patch)


def autoencoder_class(name: str):
    """A class of diffusers. Importing it imports xformers, whose warning that it is of no use here is held back."""
    log = logging.getLogger("xformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import diffusers

        return getattr(diffusers, name)
    finally:
        log.setLevel(level)


def downscale_of(config) -> int:
    """Pixels a side of one latent, from a diffusers autoencoder's config."""
    # AutoencoderDC and AutoencoderTiny name the encoder's widths, AutoencoderKL has one list for both sides.
    widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 2 ** (len(widths) - 1)  # every level but one halves the resolution


def _from_hub(name: str):
    try:
        config = autoencoder_class("AutoencoderKL").load_config(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"autoencoder: {name!r} is neither a folder nor a model that can be downloaded; "
                         "give the folder of a diffusers autoencoder") from error  # fmt: skip
    return autoencoder_class(_check(config, name)).from_pretrained(name, use_safetensors=True)


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the folder of a diffusers autoencoder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no readable JSON ({error}); copy the autoencoder folder again") from None
    _check(config, path)
    return config


def _check(config: dict, source) -> str:
    """The name of the config's class; raises ValueError for another, or for scales that undo all latents."""
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in AUTOENCODERS:
        raise ValueError(f"{source}: holds a {shown(name)}; use one of {', '.join(AUTOENCODERS)}")
    for key, lowest in (("scaling_factor", 1e-6), ("shift_factor", -1e6)):
        value = config.get(key)
        if value is not None and not (isinstance(value, int | float) and lowest <= value <= 1e6):  # also NaN
            raise ValueError(f"{source}: {key} {shown(value)} does not work; use a number from {lowest:g} to {1e6:g}")
    return name


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the folder of a diffusers autoencoder") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged or truncated ({error}); copy the autoencoder folder again") from None
    if not all_finite(weights):
        raise ValueError(
            f"{path}: holds values that are no finite floats of 16 bits or more; copy the autoencoder folder again"
        )
    return weights
