"""From a folder of captioned pictures to a checkpoint: `python -m engine.train --preset emoji --data DIR --out RUN`.

Three stages in order, each of which goes on where it was interrupted: the autoencoder (unless `--autoencoder` gives
one), the word vectors, the denoiser. RUN/checkpoint is what `engine.sample --checkpoint` reads.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from engine import checkpoint
from engine.codecs.image import ImageCodec, autoencoder_class
from engine.codecs.text import HOLE, TextCodec, tokenize
from engine.config import PRESETS, Config
from engine.data.coco import CocoCaptions
from engine.data.latents import LatentCache, cache_latents
from engine.device import resolve
from engine.graphs import compile_blocks
from engine.loss import DenoisingLoss, distinct_times
from engine.model import PSUNet
from engine.pictures import grid, to_image
from engine.request import Request
from engine.runtime import Engine
from engine.training import Stage, StageConfig, plot_curve, write_atomically
from engine.uvit import UViT, initialise_from


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained; what it is stands in `engine.config.PRESETS`."""

    denoiser: StageConfig
    autoencoder: StageConfig | None = None  # None: `--autoencoder` must give a trained one
    autoencoder_config: dict = field(default_factory=dict)  # diffusers.AutoencoderDC
    gamma: float | None = None  # min-SNR weighting, see `engine.loss`
    skew: float = 1.0  # towards noisier times, see `engine.loss`
    first_caption: float = 0.0  # how often a picture's first caption is used whatever the others; 0: all alike
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

NOISE = 0.1  # added to the latents while the autoencoder trains, so that it forgives the denoiser's small errors


def autoencoder_losses(autoencoder, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Reconstruction, and a pull of each latent channel towards mean 0, variance 1; pixels [B, 3, S, S] in −1..1."""
    latents = autoencoder.encode(pixels).latent.float()  # [B, c, h, w]
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    error = autoencoder.decode(latents + NOISE * noise).sample.float() - pixels  # [B, 3, S, S]
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))  # [c]
    return {
        "squared error": error.square().mean(),
        "absolute error": 0.1 * error.abs().mean(),  # sharper edges than the squares alone
        "latent moments": 0.01 * (mean.square() + variance.log().square()).mean(),
    }


def train_autoencoder(run: Path, data: CocoCaptions, recipe: Recipe, size: int, options) -> ImageCodec:
    """Trains the autoencoder on pictures held in memory."""
    torch.manual_seed(options.seed)
    module = autoencoder_class("AutoencoderDC")(**recipe.autoencoder_config).to(options.device)
    readable = [picture for _, picture in data.read(size)]
    if not readable:
        raise ValueError(f"--data: {data.summary()}; give a folder with whole pictures")
    pictures = torch.stack(readable)  # uint8 [n, 3, S, S]
    stage = Stage(run / "autoencoder", module, recipe.autoencoder, len(pictures), options.dtype)

    def pixels_of(indices: list[int]) -> Tensor:
        return (pictures[indices].float() / 127.5 - 1).to(options.device)  # [B, 3, S, S]

    def losses(generator: torch.Generator, indices: list[int]) -> dict[str, Tensor]:
        return autoencoder_losses(module, pixels_of(indices), generator)

    @torch.inference_mode()
    def preview(step: int) -> None:
        pixels = pixels_of(list(range(0, len(pictures), max(1, len(pictures) // 32)))[:32])
        back = stage.average.decode(stage.average.encode(pixels).latent).sample
        sheet = grid([to_image(p) for pair in zip(pixels, back, strict=True) for p in pair], columns=16)
        write_atomically(stage.folder / "samples.png", lambda p: sheet.save(p, "PNG"))
        plot_curve(stage.curve, stage.folder / "curve.png")

    stage.run(losses, options.save_every, preview)
    with torch.inference_mode():
        every = max(1, len(pictures) // 512)
        rms = stage.average.encode(pixels_of(list(range(0, len(pictures), every)))).latent.square().mean().sqrt().item()
    stage.average.register_to_config(scaling_factor=1 / rms)
    return ImageCodec(stage.average, size, patch=1)


def train_words(run: Path, data: CocoCaptions, config: Config, seed: int) -> TextCodec:
    """Trains the word vectors and writes RUN/checkpoint/text, or reads those of an earlier start of the run."""
    folder = run / "checkpoint" / "text"
    if not folder.exists():
        captions = [caption for item in data.items for caption in item.captions]
        unfinished = folder.with_name("text.unfinished")  # renamed when whole: a kill never leaves half a codec
        TextCodec.train(captions, config.model.modality("text").channels, seed).save(unfinished)
        unfinished.rename(folder)
    return TextCodec.load(folder)


def train_denoiser(
    run: Path, cache: LatentCache, text: TextCodec, config: Config, recipe: Recipe, options, init: PSUNet | UViT | None
) -> None:
    """Trains the denoiser, from `init` if given, on cached latents and captions, and writes RUN/checkpoint."""
    torch.manual_seed(options.seed)
    model = checkpoint.build(config.model).to(options.device)
    stage = Stage(run / "denoiser", model, recipe.denoiser, len(cache), options.dtype)
    if init is not None and stage.step == 0:
        for network in (stage.module, stage.average):
            if config.model.uvit is None and init.config.uvit is not None:
                initialise_from(network, init)
            else:
                network.load_state_dict(init.state_dict())
    loss = DenoisingLoss(config, recipe.gamma, skew=recipe.skew, device=options.device)
    words = config.model.modality("text").tokens
    captions = [[text.encode(shortened(c, words), words)[0] for c in several] for several in cache.captions]

    if options.compile:
        compile_blocks(model.blocks())

    def denoise(inputs: Tensor, times: Tensor) -> Tensor:
        # A sample has a time for each modality at most, or one beside the two of what is known.
        distinct, index = distinct_times(times, len(times) * len(config.model.modalities) + 2)
        return model(inputs, model.time_table(distinct), index)

    def losses(generator: torch.Generator, indices: list[int]) -> dict[str, Tensor]:
        choice = torch.rand(len(indices), 2, generator=generator).tolist()
        chosen = [
            captions[i][0 if first < recipe.first_caption else int(any_ * len(captions[i]))]
            for i, (first, any_) in zip(indices, choice, strict=True)
        ]
        values = {"image": cache.latents[indices].float(), "text": torch.stack(chosen)}  # [B, L, C] each
        x0 = torch.cat([values[m.name].flatten(1) for m in config.model.modalities], dim=1)  # [B, N]
        return loss(denoise, x0.to(options.device), generator)

    spread = range(0, len(cache), max(1, len(cache) // 24))[:24]
    prompts = [prompt for i in spread if (prompt := shortened(cache.captions[i][0], words))]

    def export(step: int) -> None:
        """The checkpoint as it stands, the loss curve, and what the average draws: prompts, then joint samples."""
        checkpoint.save(run / "checkpoint", config, stage.average.state_dict(), recipe.weights_dtype)
        plot_curve(stage.curve, stage.folder / "curve.png")
        engine = Engine(checkpoint.load(run / "checkpoint"), torch.device(options.device), options.dtype)
        joint = [Request(num=16)] if "text" in config.model.predicted else []
        results = engine.generate([*(Request(prompt=p, seed=options.seed) for p in prompts), *joint])
        samples = [sample for result in results for sample in result.samples]
        sheet = grid([s.image for s in samples], [s.text for s in samples], columns=8)
        write_atomically(stage.folder / f"samples-{step:07d}.png", lambda p: sheet.save(p, "PNG"))

    if stage.done:
        export(stage.step)
    stage.run(losses, options.save_every, export)


def shortened(caption: str, words: int) -> str:
    """The first words of a caption; a lone _ in it is no hole, and one without any word becomes the empty text."""
    return " ".join([word for word in tokenize(caption) if word != HOLE][:words])


def _recipe(options: argparse.Namespace) -> Recipe:
    """The preset's recipe with the command line's changes."""
    recipe = RECIPES[options.preset]
    given = {key: getattr(options, key) for key in ("steps", "batch", "learning_rate", "accumulate")}
    denoiser = replace(recipe.denoiser, seed=options.seed, **{k: v for k, v in given.items() if v is not None})
    if denoiser.batch % denoiser.accumulate:
        raise ValueError(f"--accumulate: {denoiser.accumulate} does not divide the batch of {denoiser.batch}")
    autoencoder = recipe.autoencoder
    brings_codecs = options.init and not options.init.is_file()
    if brings_codecs and options.autoencoder:
        raise ValueError(f"--autoencoder: {options.autoencoder} cannot be used with --init, which brings its own")
    if autoencoder is None and not (options.autoencoder or brings_codecs):
        raise ValueError(f"--autoencoder: preset {options.preset!r} needs a trained one; give its folder or hub id")
    if autoencoder is not None:
        steps = options.autoencoder_steps or autoencoder.steps
        autoencoder = replace(autoencoder, seed=options.seed, steps=steps)
    return replace(recipe, denoiser=denoiser, autoencoder=autoencoder)


def _same_run(run: Path, settings: dict) -> None:
    """Refuses to go on with a run of another preset, seed or autoencoder; `Stage` checks the rest."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "run.json"
    if path.exists() and (found := json.loads(path.read_text())) != settings:
        raise ValueError(f"--out: {run} holds a run with {found}, not {settings}; choose another folder")
    write_atomically(path, lambda p: p.write_text(json.dumps(settings) + "\n"))


def _start(source: Path, config: Config) -> PSUNet | UViT:
    """The denoiser of a checkpoint, or of a file of published U-ViT weights, to go on from."""
    if source.is_file():
        model = checkpoint.load_uvit(source, config.model.modality("text").tokens)
        if config.model.uvit is None or model.config == config.model:
            return model
        raise ValueError(f"--init: {source} holds a U-ViT of another shape; use a --preset that fits, or a PS-U-Net's")
    loaded = checkpoint.load(source)
    if config.model.uvit is None and loaded.config.model.uvit is not None and loaded.config.image == config.image:
        return loaded.model
    if loaded.config.model != config.model or loaded.config.image != config.image:
        raise ValueError(f"--init: {source} holds a model of another shape; use the --preset it was trained with")
    return loaded.model


def take_codecs(source: Path, run: Path) -> None:
    """Copies a checkpoint's autoencoder and word vectors into a run that has none yet."""
    for part in ("image", "text"):
        folder = run / "checkpoint" / part
        if not folder.exists():
            unfinished = folder.with_name(f"{part}.unfinished")
            shutil.copytree(source / part, unfinished, dirs_exist_ok=True)
            unfinished.rename(folder)


def _fits(config: Config, image: ImageCodec) -> None:
    want = config.model.modality("image")
    if (image.tokens, image.channels) != (want.tokens, want.channels):
        raise ValueError(
            f"--autoencoder: gives {image.tokens} tokens of {image.channels} channels at {image.size} pixels, the "
            f"preset takes {want.tokens} of {want.channels}; use an autoencoder that fits"
        )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _rate(text: str) -> float:
    rate = float(text)  # argparse words the error
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return rate


def _seed(text: str) -> int:
    # gensim's generator takes no more than 32 bits.
    if not text.isdigit() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {(1 << 32) - 1}")
    return int(text)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m engine.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="emoji", help="what to train (default: %(default)s)")
    add("--data", type=Path, required=True, metavar="DIR", help="pictures and captions.json, MS-COCO captions layout")
    add("--out", type=Path, required=True, metavar="RUN", help="folder of the run; an interrupted run goes on")
    add("--autoencoder", metavar="DIR", help="a trained diffusers autoencoder (folder or hub id) instead of an own one")
    add("--init", type=Path, metavar="DIR", help="start from a checkpoint, or a U-ViT weights file")
    add("--steps", type=_positive, help="optimiser steps of the denoiser")
    add("--batch", type=_positive, help="samples a step of the denoiser")
    add("--learning-rate", type=_rate, help="of the denoiser")
    add("--accumulate", type=_positive, help="micro-batches a step of the denoiser")
    add("--autoencoder-steps", type=_positive, help="optimiser steps of the autoencoder")
    add("--save-every", type=_positive, default=250, metavar="STEPS", help="state and pictures (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the denoiser: a minute's wait, then faster steps")
    add("--seed", type=_seed, default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the arithmetic; weights stay float32",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        train(options)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"engine.train: {error}", file=sys.stderr)
        return 2
    return 0


def train(options: argparse.Namespace) -> None:
    """The three stages in order."""
    if find_spec("matplotlib") is None:
        raise ValueError("matplotlib draws the loss curves and is not installed; pip install 'psunet-engine[train]'")
    config, recipe, run = PRESETS[options.preset], _recipe(options), options.out
    options.device, options.dtype = resolve(options.device, options.dtype)
    data = CocoCaptions.open(options.data)
    print(f"{options.data}: {data.summary()}; on {options.device} in {options.dtype}")

    size, patch, folder, codec = config.image.size, config.image.patch, run / "checkpoint" / "image", None
    if options.autoencoder and not folder.exists():
        codec = ImageCodec.load(options.autoencoder, size, patch)  # before anything is written: it may not fit
        _fits(config, codec)
    init = options.init and _start(options.init, config)
    _same_run(run, {key: str(getattr(options, key)) for key in ("preset", "seed", "autoencoder", "init")})
    if init and not options.init.is_file():
        take_codecs(options.init, run)

    if codec is None and not folder.exists():
        codec = train_autoencoder(run, data, recipe, size, options)
    if codec is not None:
        unfinished = folder.with_name("image.unfinished")  # renamed when whole, as the word vectors below
        codec.save(unfinished, recipe.weights_dtype)
        unfinished.rename(folder)
    image = ImageCodec.load(folder, size, patch, options.device)
    _fits(config, image)

    text = train_words(run, data, config, options.seed)
    fingerprint = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.iterdir()))).hexdigest()
    cache = cache_latents(data, lambda x: image.encode(x.to(options.device)), run / "latents", fingerprint, size)
    train_denoiser(run, cache, text, config, recipe, options, init)
    print(f"checkpoint: {run / 'checkpoint'}")


if __name__ == "__main__":
    sys.exit(main())
