"""Small autoencoders with random weights in folders as diffusers writes them, and codecs made of them."""

from pathlib import Path

import torch

from engine.codecs.autoencoder import SavedAutoencoder
from engine.codecs.image import ImageCodec
from engine.config import Modality

SIZE = 32


def autoencoder_of(kind):
    """A tiny diffusers autoencoder with random weights and a scaling that is not 1."""
    import diffusers

    torch.manual_seed(0)
    if kind == "AutoencoderTiny":
        widths, layers = (8, 8, 8), (1, 1, 1)
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=layers,
            num_decoder_blocks=layers, latent_channels=4, scaling_factor=2.0,
        )  # fmt: skip
    if kind == "AutoencoderKL":
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, sample_size=SIZE,
            scaling_factor=0.5, shift_factor=0.25,
        )  # fmt: skip
    return diffusers.AutoencoderDC(
        latent_channels=8, scaling_factor=0.5,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(0, 1, 1), decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
    )  # fmt: skip


KINDS = {
    "AutoencoderTiny": (4, 4),
    "AutoencoderKL": (2, 3),
    "AutoencoderDC": (4, 8),
}  # pixels a latent, latent channels


def latents_of(autoencoder, pixels):
    """The autoencoder's own latents, without scaling: of KL the mean."""
    out = autoencoder.encode(pixels)
    return out.latent_dist.mean if hasattr(out, "latent_dist") else out[0]


def save_autoencoders(tmp_path_factory) -> dict[str, Path]:
    """A folder for each kind of autoencoder."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        autoencoder_of(kind).save_pretrained(folder)
    return folders


def load(folder, size=SIZE, patch=1, **settings):
    """The codec of a folder, for a modality that fits."""
    latents = SavedAutoencoder.open(folder).latents
    side = size // (latents.factor * patch) if isinstance(size, int) and isinstance(patch, int) and patch else 1
    modality = Modality("sketch", side**2, latents.channels * patch**2 if isinstance(patch, int) else 1, depth=0)
    return ImageCodec.load(folder, {"size": size, "patch": patch, **settings}, modality)


def some_pixels(batch=2):
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
