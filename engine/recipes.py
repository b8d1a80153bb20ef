"""How the presets are trained; what they are stands in `engine.config.PRESETS`."""

from dataclasses import dataclass, field

import torch

from engine.training import StageConfig


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained."""

    denoiser: StageConfig
    autoencoder: StageConfig | None = None  # None: `--autoencoder` must give a trained one
    autoencoder_config: dict = field(default_factory=dict)  # diffusers.AutoencoderDC
    gamma: float | None = None  # min-SNR weighting, see `engine.loss`
    skew: float = 1.0  # towards noisier times, see `engine.loss`
    first_caption: float = 0.0  # how often a picture's first caption is used whatever the others; 0: all alike
    captions_alike: bool = False  # a caption counts as one, whatever its length: `engine.codecs.text.token_weights`
    repeats: int = 1  # how often an epoch shows a picture with a word of its own: `engine.train.with_repeats`
    weights_dtype: torch.dtype = torch.float32  # of the checkpoint


def _narrow_autoencoder(channels: tuple[int, ...], layers: tuple[int, ...], latent_channels: int) -> dict:
    """AutoencoderDC with convolutions only; 0 layers in the first level start at half the resolution."""
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
    StageConfig(steps=2000, batch=32, learning_rate=1e-3, decay=0.4, weight_decay=1e-4, ema=0.995),
    _narrow_autoencoder((48, 48, 96, 192), (0, 1, 2, 2), latent_channels=8),
    gamma=5.0,
    skew=3.0,
    first_caption=0.9,
    captions_alike=True,
    repeats=2,
    weights_dtype=torch.float16,
)
TINY = Recipe(
    StageConfig(steps=20, batch=8, learning_rate=1e-3, warmup=5),
    StageConfig(steps=10, batch=8, learning_rate=1e-3, warmup=5),
    _narrow_autoencoder((8, 8, 8, 16), (0, 1, 1, 1), latent_channels=4),
)
# The same training for PS-U-Net and the U-ViTs it is compared with.
RECIPES: dict[str, Recipe] = {
    "coco256": COCO256,
    "uvit-multi-coco256": COCO256,
    "uvit-multi-deep-coco256": COCO256,
    "uvit-t2i-coco256": COCO256,
    "emoji": EMOJI,
    "uvit-emoji": EMOJI,
    "tiny": TINY,
    "uvit-tiny": TINY,
}
