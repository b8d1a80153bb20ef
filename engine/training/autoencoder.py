"""Trains the autoencoder of an image codec, on images held in memory."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.codecs.autoencoder import autoencoder_class
from engine.codecs.image import ImageCodec
from engine.config import Config
from engine.data.augment import augment
from engine.data.captioned import CaptionedImages
from engine.data.sketch import sketch_levels
from engine.errors import InputError, errors_named
from engine.files import write_atomically
from engine.images import fit_image, grid, to_image, to_levels
from engine.training.curve import plot_curve
from engine.training.options import image_and_text, sketch_of
from engine.training.recipes import Recipe
from engine.training.stage import Stage, StageOptions, noise_of

# Standard deviation of the noise that training adds to the latents, so that the decoder tolerates the small errors of a
# denoiser.
LATENT_NOISE = 0.1
CHANGED = 0.5  # fraction of the images that are augmented, if the recipe says how
SKETCHED = 0.25  # fraction of which a sketch is taken, if the model has sketches


def train_autoencoder(
    run: Path, data: CaptionedImages, config: Config, recipe: Recipe, options: StageOptions
) -> ImageCodec:
    """Trains the autoencoder of `recipe` in RUN/autoencoder.

    Raises InputError about `data` if no image can be read, about `out` if the stage cannot be resumed.
    """
    torch.manual_seed(recipe.autoencoder.seed)
    network = autoencoder_class("AutoencoderDC")(**recipe.autoencoder_config)
    network.to(options.device, memory_format=torch.channels_last)  # the faster layout for convolutions
    name, has_sketches = image_and_text(config)[0], sketch_of(config) is not None
    settings, values = config.codecs[name].settings, config.model.modality(name).size  # values of an image's latents
    size = settings["size"]
    plain, sources = [], []  # uint8 [3, S, S]; if there are to be changed versions, what these are made from
    for item, image in data.images():
        plain.append(fit_image(image, size))
        if recipe.augmentation is not None:
            sources.append((image, recipe.augmentation.may_flip(item.captions)))
    if not plain:
        folder = data.items[0].path.parent
        raise InputError("data", folder, "give a folder of intact images", f"has none ({data.summary()})")
    with errors_named("out"):
        stage = Stage(run / "autoencoder", network, recipe.autoencoder, len(plain), options.dtype, keep=options.keep)

    def pixels_of(indices: list[int] | range, random: np.random.Generator | None = None) -> Tensor:
        """Images [B, 3, S, S] in −1..1, some of them changed at random."""
        levels = []
        for i in indices:
            if random is None or recipe.augmentation is None or random.random() >= CHANGED:
                levels.append(plain[i])
            else:
                image, flip = sources[i]
                levels.append(to_levels(augment(image, size, recipe.augmentation, random, flip)))
            if random is not None and has_sketches and random.random() < SKETCHED:
                levels[-1] = sketch_levels(levels[-1], random)
        pixels = torch.stack(levels).float() / 127.5 - 1
        return pixels.to(options.device, memory_format=torch.channels_last)

    def draw(generator: torch.Generator, indices: list[int]) -> tuple[Tensor, int]:
        seeds = torch.randint(2**62, (2,), generator=generator).tolist()
        return pixels_of(indices, np.random.default_rng(seeds[0])), seeds[1]

    def read(batch: tuple[Tensor, int], part: slice) -> tuple[Tensor, Tensor, float]:
        pixels, seed = batch
        return pixels[part], noise_of(seed, part, values), len(pixels[part]) / len(pixels)

    def losses(pixels: Tensor, noise: Tensor, share: float) -> dict[str, Tensor]:
        return {name: share * loss for name, loss in autoencoder_losses(network, pixels, noise).items()}

    @torch.inference_mode()
    def preview(step: int, _weights: dict[str, Tensor]) -> None:
        pixels = pixels_of(range(0, len(plain), max(1, len(plain) // 32))[:32])
        decoded = stage.average.decode(stage.average.encode(pixels).latent).sample
        sheet = grid([to_image(p) for pair in zip(pixels, decoded, strict=True) for p in pair], columns=16)
        write_atomically(stage.folder / "samples.png", lambda p: sheet.save(p, "PNG"))
        plot_curve(stage.curve, stage.folder / "curve.png")

    stage.run(draw, losses, options.save_every, preview, read=read)
    with torch.inference_mode():
        pixels = pixels_of(range(0, len(plain), max(1, len(plain) // 512)))
        rms = stage.average.encode(pixels).latent.square().mean().sqrt().item()
    stage.average.register_to_config(scaling_factor=1 / rms)
    return ImageCodec(stage.average, size, settings["patch"])


def autoencoder_losses(autoencoder, pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Reconstruction losses, and one that pulls each latent channel to mean 0 and variance 1.

    pixels  [B, 3, S, S] float32 in −1..1
    noise   [B, c·h·w] float32, of the latents
    """
    latents = autoencoder.encode(pixels).latent.float()  # [B, c, h, w]
    noise = noise.view(latents.shape).to(latents.device)
    error = autoencoder.decode(latents + LATENT_NOISE * noise).sample.float() - pixels  # [B, 3, S, S]
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))  # [c]
    return {
        "squared error": error.square().mean(),
        "absolute error": 0.1 * error.abs().mean(),  # for sharper edges than with squares alone
        "latent moments": 0.01 * (mean.square() + variance.log().square()).mean(),
    }
