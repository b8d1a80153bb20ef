"""From a folder of captioned pictures to a checkpoint: `python -m engine.train --preset emoji --data DIR --out RUN`.

Three stages in order, each of which goes on where it was interrupted: the autoencoder (unless `--autoencoder` gives
one), the word vectors, the denoiser. RUN/checkpoint is what `engine.sample --checkpoint` reads.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine import checkpoint
from engine.codecs.image import ImageCodec, autoencoder_class
from engine.codecs.text import HOLE, TextCodec, token_weights, tokenize
from engine.command import Parser, about, check_writable, name, path, refuse, whole
from engine.config import PRESETS, Config
from engine.data.coco import CocoCaptions
from engine.data.latents import LatentCache, cache_latents
from engine.device import resolve
from engine.graphs import compile_blocks
from engine.loss import DenoisingLoss, distinct_times
from engine.model import PSUNet
from engine.pictures import grid, to_image
from engine.recipes import RECIPES, Recipe
from engine.request import Request
from engine.runtime import Engine
from engine.training import Stage, plot_curve, taken, write_atomically
from engine.uvit import UViT, initialise_from

COMMAND = "python -m engine.train"
MOST_STEPS, MOST_SAMPLES = 1_000_000_000, 65_536  # of a stage, of a step: more is a slip
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
        raise ValueError(f"data: {data.summary()}; give a folder with whole pictures")
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
    shown = with_repeats([several[0] for several in cache.captions], recipe.repeats)
    stage = Stage(run / "denoiser", model, recipe.denoiser, len(shown), options.dtype)
    if init is not None and stage.step == 0:
        for network in (stage.module, stage.average):
            if config.model.uvit is None and init.config.uvit is not None:
                initialise_from(network, init)
            else:
                network.load_state_dict(init.state_dict())
    loss = DenoisingLoss(config, recipe.gamma, skew=recipe.skew, device=options.device)
    words = config.model.modality("text").tokens
    # Rows of the vectors' table: as vectors themselves, the captions of MS-COCO would take 10 GB.
    with about("data", "captions"):
        captions = text.indices((shortened(c, words) for several in cache.captions for c in several), words)  # [n, L]
    counts = [len(several) for several in cache.captions]
    first_of = [0, *accumulate(counts)]

    if options.compile:
        compile_blocks(model.blocks())

    def denoise(inputs: Tensor, times: Tensor) -> Tensor:
        # A sample has a time for each modality at most, or one beside the two of what is known.
        distinct, index = distinct_times(times, len(times) * len(config.model.modalities) + 2)
        return model(inputs, model.time_table(distinct), index)

    def losses(generator: torch.Generator, indices: list[int]) -> dict[str, Tensor]:
        indices = [shown[i] for i in indices]
        choice = torch.rand(len(indices), 2, generator=generator).tolist()
        chosen = [
            first_of[i] + (0 if first < recipe.first_caption else int(any_ * counts[i]))
            for i, (first, any_) in zip(indices, choice, strict=True)
        ]
        values = {"image": cache.latents[indices].float(), "text": text.vectors[captions[chosen]]}  # [B, L, C] each
        x0 = torch.cat([values[m.name].flatten(1) for m in config.model.modalities], dim=1)  # [B, N]
        weights = None
        if recipe.captions_alike:
            counted = {"image": torch.ones(values["image"].shape[:2]), "text": token_weights(captions[chosen])}
            weights = torch.cat([counted[m.name] for m in config.model.modalities], dim=1)  # [B, L]
        return loss(denoise, x0.to(options.device), generator, weights)

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


def with_repeats(captions: list[str], most: int) -> list[int]:
    """The pictures of an epoch: index i as often as most/√n, where n captions have the rarest word of captions[i].

    A name of one's own ("ghost") is learned from one picture, "firefighter" from its variants and their skin tones
    from hundreds. The square root, as in sampling languages for translation, is between seeing all pictures and all
    words alike.
    """
    words = [set(tokenize(caption)) for caption in captions]
    captions_with = Counter(word for several in words for word in several)
    rarest = [min((captions_with[word] for word in several), default=len(captions)) for several in words]
    return [i for i, n in enumerate(rarest) for _ in range(max(1, round(most / math.sqrt(n))))]


def shortened(caption: str, words: int) -> str:
    """The first words of a caption; a lone _ in it is no hole, and one without any word becomes the empty text."""
    return " ".join([word for word in tokenize(caption) if word != HOLE][:words])


def _recipe(options: argparse.Namespace) -> Recipe:
    """The preset's recipe with the command line's changes."""
    recipe = RECIPES[options.preset]
    given = {key: getattr(options, key) for key in ("steps", "batch", "learning_rate", "accumulate")}
    denoiser = replace(recipe.denoiser, seed=options.seed, **{k: v for k, v in given.items() if v is not None})
    if denoiser.batch % denoiser.accumulate:
        raise ValueError(
            f"accumulate: {denoiser.accumulate} does not divide the batch of {denoiser.batch}; use a divisor"
        )
    autoencoder = recipe.autoencoder
    brings_codecs = options.init and not os.path.isfile(options.init)
    if brings_codecs and options.autoencoder:
        raise ValueError(
            f"autoencoder: {options.autoencoder} cannot be used with --init, which brings its own; leave one out"
        )
    if autoencoder is None and not (options.autoencoder or brings_codecs):
        raise ValueError(f"autoencoder: preset {options.preset!r} needs a trained one; give its folder or hub id")
    if autoencoder is not None:
        steps = options.autoencoder_steps or autoencoder.steps
        autoencoder = replace(autoencoder, seed=options.seed, steps=steps)
    return replace(recipe, denoiser=denoiser, autoencoder=autoencoder)


def _same_run(run: Path, settings: dict) -> None:
    """Refuses to go on with a run of another preset, seed, autoencoder or loss; `Stage` checks the rest."""
    file = run / "run.json"
    if file.exists():
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"out: {file} cannot be read ({error}); delete it to go on with these options") from None
        if found != settings:
            raise ValueError(f"out: {run} holds a run with {found}, not {settings}; choose another folder")
    write_atomically(file, lambda p: p.write_text(json.dumps(settings) + "\n"))


def _start(source: Path, config: Config) -> PSUNet | UViT:
    """The denoiser of a checkpoint, or of a file of published U-ViT weights, to go on from."""
    if os.path.isfile(source):  # not Path's, which raises where a name is too long
        model = checkpoint.load_uvit(source, config.model.modality("text").tokens)
        if config.model.uvit is None or model.config == config.model:
            return model
        raise ValueError(f"init: {source} holds a U-ViT of another shape; use a --preset that fits, or a PS-U-Net's")
    loaded = checkpoint.load(source)
    if config.model.uvit is None and loaded.config.model.uvit is not None and loaded.config.image == config.image:
        return loaded.model
    if loaded.config.model != config.model or loaded.config.image != config.image:
        raise ValueError(f"init: {source} holds a model of another shape; use the --preset it was trained with")
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
            f"autoencoder: gives {image.tokens} tokens of {image.channels} channels at {image.size} pixels, the "
            f"preset takes {want.tokens} of {want.channels}; use an autoencoder that fits"
        )


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0; use one")
    return rate


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser, steps = Parser(COMMAND, description=__doc__.splitlines()[0]), whole(1, MOST_STEPS)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="emoji", help="what to train (default: %(default)s)")
    add("--data", type=path, required=True, metavar="DIR", help="pictures and captions.json, MS-COCO captions layout")
    add("--out", type=path, required=True, metavar="RUN", help="folder of the run; an interrupted run goes on")
    add("--autoencoder", type=name, metavar="DIR", help="a trained diffusers autoencoder: a folder or a hub id")
    add("--init", type=path, metavar="DIR", help="start from a checkpoint, or a U-ViT weights file")
    add("--steps", type=steps, help="optimiser steps of the denoiser")
    add("--batch", type=whole(1, MOST_SAMPLES), help="samples a step of the denoiser")
    add("--learning-rate", type=_rate, help="of the denoiser")
    add("--accumulate", type=whole(1, MOST_SAMPLES), help="micro-batches a step of the denoiser")
    add("--autoencoder-steps", type=steps, help="optimiser steps of the autoencoder")
    add("--save-every", type=steps, default=250, metavar="STEPS", help="state and pictures (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the denoiser: a minute's wait, then faster steps")
    add("--seed", type=whole(0, (1 << 32) - 1), default=0, help="32 bits: gensim's generator takes no more")
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
    except (ValueError, FloatingPointError) as error:
        return refuse(COMMAND, error, vars(options))
    except (OSError, SafetensorError) as error:  # a full disk, a folder that was taken away
        return refuse(COMMAND, f"{error}; once that is mended, the same command goes on with the run")
    return 0


def train(options: argparse.Namespace) -> None:
    """Checks all that can be checked beforehand, then takes the three stages in order."""
    if find_spec("matplotlib") is None:
        raise ValueError("matplotlib draws the loss curves and is not installed; pip install 'psunet-engine[train]'")
    config, recipe, run = PRESETS[options.preset], _recipe(options), options.out
    options.device, options.dtype = resolve(options.device, options.dtype)
    check_writable(run, ["run.json"])
    with about("data"):
        data = CocoCaptions.open(options.data)
    print(f"{options.data}: {data.summary()}; on {options.device} in {options.dtype}")

    codec = init = None
    if options.autoencoder and not (run / "checkpoint" / "image").exists():
        with about("autoencoder"):
            codec = ImageCodec.load(options.autoencoder, config.image.size, config.image.patch)
            _fits(config, codec)
    if options.init:
        with about("init", "checkpoint"):
            init = _start(options.init, config)
    run.mkdir(parents=True, exist_ok=True)
    with taken(run):
        settings = {key: str(getattr(options, key)) for key in ("preset", "seed", "autoencoder", "init")}
        weighing = ("gamma", "skew", "first_caption", "captions_alike", "repeats")
        _same_run(run, settings | {key: str(getattr(recipe, key)) for key in weighing})
        _stages(run, data, config, recipe, options, codec, init)
    print(f"checkpoint: {run / 'checkpoint'}")


def _stages(
    run: Path, data: CocoCaptions, config: Config, recipe: Recipe, options, codec: ImageCodec | None, init
) -> None:
    """The three stages; `codec` is the autoencoder to use, if one was given."""
    size, folder = config.image.size, run / "checkpoint" / "image"
    if init and not os.path.isfile(options.init):
        take_codecs(options.init, run)
    if codec is None and not folder.exists():
        codec = train_autoencoder(run, data, recipe, size, options)
    if codec is not None:
        unfinished = folder.with_name("image.unfinished")  # renamed when whole, as the word vectors below
        codec.save(unfinished, recipe.weights_dtype)
        unfinished.rename(folder)
    image = ImageCodec.load(folder, size, config.image.patch, options.device)
    _fits(config, image)

    text = train_words(run, data, config, options.seed)
    fingerprint = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.iterdir()))).hexdigest()
    cache = cache_latents(data, lambda x: image.encode(x.to(options.device)), run / "latents", fingerprint, size)
    train_denoiser(run, cache, text, config, recipe, options, init)


if __name__ == "__main__":
    sys.exit(main())
