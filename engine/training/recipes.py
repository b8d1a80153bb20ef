"""How each preset of `engine.presets` is trained. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.data.augmentation import Augmentation


@dataclass(frozen=True)
class StageConfig:
    """Hyperparameters of one training stage."""

    steps: int  # optimiser steps in all
    batch: int  # samples per step, all micro-batches together
    learning_rate: float  # of AdamW, after the warm-up
    warmup: int = 200  # steps of linear warm-up
    decay: float = 0.2  # last fraction of the steps, over which the learning rate falls linearly to 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.03  # of matrices only
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999  # decay of the averaged weights; lower in the first steps
    accumulate: int = 1  # micro-batches per step
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, linear decay (Hägele et al. 2024, arXiv 2405.18392)."""
        up = min(1.0, (step + 1) / max(1, self.warmup))
        down = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.learning_rate * min(up, down)


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a whole run."""

    denoiser: StageConfig
    autoencoder: StageConfig | None = None  # None: a trained one must be given
    autoencoder_config: dict = field(default_factory=dict)  # arguments of diffusers.AutoencoderDC
    gamma: float | None = None  # min-SNR weighting, see `engine.diffusion.loss`
    skew: float = 1.0  # draws noisier times more often, see `engine.diffusion.loss`
    odds: Mapping[str, float] = field(default_factory=dict)  # of modalities to be known, see `engine.diffusion.loss`
    first_caption: float = 0.0  # probability of taking an image's first caption; else one of all is drawn uniformly
    joined: float = 0.0  # fraction of the texts known as a whole that are one to three of the image's captions, joined
    reordered: float = 0.0  # fraction of the captions that are known as a whole whose words come in another order
    captions_alike: bool = False  # every caption has the same weight: `engine.codecs.text.token_weights`
    augmentation: Augmentation | None = None  # of images that are known, and of half of those the autoencoder sees
    repeats: int = 1  # of images with rare words in an epoch: `engine.training.examples.with_repeats`
    weights_dtype: str = "float32"  # of the checkpoint


def _convolutional_autoencoder(channels: tuple[int, ...], layers: tuple[int, ...], latent_channels: int) -> dict:
    """AutoencoderDC without attention; with 0 layers in the first level it starts at half the resolution."""
    none = tuple(() for _ in channels)
    return {
        "latent_channels": latent_channels,
        "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock",
        "encoder_block_out_channels": channels, "decoder_block_out_channels": channels,
        "encoder_layers_per_block": layers, "decoder_layers_per_block": layers,
        "encoder_qkv_multiscales": none, "decoder_qkv_multiscales": none,
    }  # fmt: skip


# As U-ViT on MS-COCO (arXiv 2209.12152, appendix): 1 M steps of 256.
COCO256 = Recipe(
    StageConfig(steps=1_000_000, batch=256, learning_rate=2e-4, warmup=5000, decay=0, betas=(0.9, 0.9), ema=0.9999)
)
EMOJI = Recipe(
    StageConfig(steps=20_000, batch=64, learning_rate=2e-3, warmup=500, decay=0.4, ema=0.9995),
    StageConfig(steps=9000, batch=32, learning_rate=2e-3, decay=0.4, weight_decay=1e-4),
    _convolutional_autoencoder((48, 48, 96, 192), (0, 1, 2, 2), latent_channels=16),
    gamma=5.0,
    skew=3.0,
    odds={"text": 3.0},
    first_caption=1.0,
    joined=0.25,
    reordered=0.25,
    captions_alike=True,
    augmentation=Augmentation(directional=("left", "right", "clock", "thirty", "flag", "moon")),
    repeats=3,
    weights_dtype="float16",
)
PHOTOS128 = Recipe(
    StageConfig(steps=40_000, batch=32, learning_rate=1e-3, decay=0.4, ema=0.9995),
    gamma=5.0,
    captions_alike=True,
)
TINY = Recipe(
    StageConfig(steps=20, batch=8, learning_rate=1e-3, warmup=5),
    StageConfig(steps=10, batch=8, learning_rate=1e-3, warmup=5),
    _convolutional_autoencoder((8, 8, 8, 16), (0, 1, 1, 1), latent_channels=4),
)
TEXT = Recipe(
    StageConfig(steps=20_000, batch=64, learning_rate=2e-3, warmup=500, decay=0.4, ema=0.9995),
    gamma=5.0,
    skew=3.0,
    captions_alike=True,
)
TEXT_TINY = Recipe(StageConfig(steps=20, batch=8, learning_rate=1e-3, warmup=5))
# PS-U-Nets and the U-ViTs they are compared with are trained in the same way.
RECIPES: dict[str, Recipe] = {
    "coco256": COCO256,
    "uvit-multi-coco256": COCO256,
    "uvit-multi-deep-coco256": COCO256,
    "uvit-t2i-coco256": COCO256,
    "uvit-t2i-deep-coco256": COCO256,
    "emoji": EMOJI,
    "emoji-sketch": EMOJI,
    "photos128": PHOTOS128,
    "uvit-emoji": EMOJI,
    "text": TEXT,
    "text-tiny": TEXT_TINY,
    "tiny": TINY,
    "tiny-sketch": TINY,
    "uvit-tiny": TINY,
}
