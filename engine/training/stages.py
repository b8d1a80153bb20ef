"""A training run: `train` runs its three stages, each of which is also a function of its own.

    images ──── train_autoencoder ──> image codec ── cache_latents ──> latents ─┐
    captions ── train_words ────────> text codec ───────────────────────────────┴─ train_denoiser ──> RUN/checkpoint

Each stage resumes where it was interrupted.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from engine import checkpoint
from engine.codecs.autoencoder import autoencoder_class
from engine.codecs.codec import Codec, codec_folder, load_codec
from engine.codecs.image import ImageCodec
from engine.codecs.text import TextCodec
from engine.command import check_writable
from engine.config import Config
from engine.data.coco import CocoCaptions
from engine.data.latents import LatentCache, cache_latents
from engine.device import DTYPES, resolve
from engine.diffusion.loss import DenoisingLoss, distinct_times
from engine.errors import InputError, errors_named
from engine.images import grid, to_image
from engine.model.denoiser import build
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT
from engine.presets import PRESETS
from engine.request import Request
from engine.runtime import Engine
from engine.sampling.graphs import compile_blocks
from engine.training.examples import Examples, shortened
from engine.training.initial import initial_network, start_from
from engine.training.options import TrainOptions, image_and_text
from engine.training.recipes import Recipe
from engine.training.stage import Stage, plot_curve, run_lock, write_atomically

# Standard deviation of the noise that the autoencoder's training adds to the latents, so that its decoder tolerates the
# small errors of a denoiser.
LATENT_NOISE = 0.1
PROMPTS, JOINT_SAMPLES = 24, 16  # in the denoiser's sample sheets
# What else makes a run the same one, beside the settings that `Stage` checks.
RUN_OPTIONS = ("preset", "seed", "autoencoder", "init")
RUN_RECIPE = ("gamma", "skew", "first_caption", "captions_alike", "repeats")


@dataclass(frozen=True)
class StageOptions:
    """How a stage computes. Its hyperparameters are in the `Recipe`."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # or bfloat16, under autocast
    save_every: int = 250  # steps
    compile: bool = False  # torch.compile the denoiser's blocks


def train(options: TrainOptions) -> None:
    """Checks all that can be checked beforehand, then runs the three stages in order.

    Raises InputError; FloatingPointError if a loss is not finite; OSError if the run cannot be written;
    ModuleNotFoundError without matplotlib; what a broken matplotlib or gensim raises.
    """
    if find_spec("matplotlib") is None:
        install = "pip install 'psunet-engine[train]'"
        raise ModuleNotFoundError(f"matplotlib, which plots the loss curves, is not installed; use {install}")
    for module in ("matplotlib.figure", "gensim.models"):  # now: a broken one would be found after hours
        import_module(module)
    config, run = options.config, options.out
    device, dtype = resolve(options.device, options.dtype, config.model)
    check_writable(run, ["run.json"])
    with errors_named("data"):
        data = CocoCaptions.open(options.data)
    print(f"{options.data}: {data.summary()}; on {device} in {dtype}")

    image, init = None, None
    if options.autoencoder and not _codec_folder(run, config, image_and_text(config)[0]).exists():
        with errors_named("autoencoder"):
            image = _given_autoencoder(options.autoencoder, config)
    if options.init:
        init = initial_network(options.init, config)
    run.mkdir(parents=True, exist_ok=True)
    with run_lock(run):
        _require_same_run(options)
        _run_stages(data, options, StageOptions(device, dtype, options.save_every, options.compile), image, init)
    print(f"checkpoint: {run / 'checkpoint'}")


def _run_stages(
    data: CocoCaptions, options: TrainOptions, how: StageOptions, image: ImageCodec | None, init: PSUNet | UViT | None
) -> None:
    """The three stages; `image` has the autoencoder to use and `init` the initial weights, if they were given."""
    config, recipe, run = options.config, options.recipe, options.out
    image_name, _ = image_and_text(config)
    if options.init_has_codecs:
        copy_codecs(options.init, run, config)
    folder = _codec_folder(run, config, image_name)
    if image is None and not folder.exists():
        image = train_autoencoder(run, data, config, recipe, how)
    if image is not None:
        _save_codec(image, folder, DTYPES[recipe.weights_dtype])
    image = load_codec(run / "checkpoint", config.codecs[image_name], config.model.modality(image_name), how.device)
    text = train_words(run, data, config, options.seed)

    fingerprint = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.iterdir()))).hexdigest()
    with errors_named("data"):
        cache = cache_latents(data, image.encode_pixels, run / "latents", fingerprint, image.size)
    train_denoiser(run, cache, text, config, recipe, how, init)


def train_autoencoder(
    run: Path, data: CocoCaptions, config: Config, recipe: Recipe, options: StageOptions
) -> ImageCodec:
    """Trains the autoencoder of `recipe` in RUN/autoencoder, on images held in memory.

    Raises InputError about `data` if no image can be read, about `out` if the stage cannot be resumed.
    """
    torch.manual_seed(recipe.autoencoder.seed)
    network = autoencoder_class("AutoencoderDC")(**recipe.autoencoder_config).to(options.device)
    settings = config.codecs[image_and_text(config)[0]].settings
    readable = [image for _, image in data.read(settings["size"])]
    if not readable:
        folder = data.items[0].path.parent
        raise InputError("data", folder, "give a folder of intact images", f"has none ({data.summary()})")
    images = torch.stack(readable)  # uint8 [n, 3, S, S]
    with errors_named("out"):
        stage = Stage(run / "autoencoder", network, recipe.autoencoder, len(images), options.dtype)

    def pixels_of(indices: list[int] | range) -> Tensor:
        return (images[list(indices)].float() / 127.5 - 1).to(options.device)  # [B, 3, S, S]

    @torch.inference_mode()
    def preview(step: int) -> None:
        pixels = pixels_of(range(0, len(images), max(1, len(images) // 32))[:32])
        decoded = stage.average.decode(stage.average.encode(pixels).latent).sample
        sheet = grid([to_image(p) for pair in zip(pixels, decoded, strict=True) for p in pair], columns=16)
        write_atomically(stage.folder / "samples.png", lambda p: sheet.save(p, "PNG"))
        plot_curve(stage.curve, stage.folder / "curve.png")

    stage.run(lambda generator, i: autoencoder_losses(network, pixels_of(i), generator), options.save_every, preview)
    with torch.inference_mode():
        pixels = pixels_of(range(0, len(images), max(1, len(images) // 512)))
        rms = stage.average.encode(pixels).latent.square().mean().sqrt().item()
    stage.average.register_to_config(scaling_factor=1 / rms)
    return ImageCodec(stage.average, settings["size"], settings["patch"])


def autoencoder_losses(autoencoder, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Reconstruction losses, and one that pulls each latent channel to mean 0 and variance 1.

    pixels  [B, 3, S, S] float32 in −1..1
    """
    latents = autoencoder.encode(pixels).latent.float()  # [B, c, h, w]
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    error = autoencoder.decode(latents + LATENT_NOISE * noise).sample.float() - pixels  # [B, 3, S, S]
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))  # [c]
    return {
        "squared error": error.square().mean(),
        "absolute error": 0.1 * error.abs().mean(),  # for sharper edges than with squares alone
        "latent moments": 0.01 * (mean.square() + variance.log().square()).mean(),
    }


def train_words(run: Path, data: CocoCaptions, config: Config, seed: int) -> TextCodec:
    """Trains the word vectors and saves them as the text codec of RUN/checkpoint, unless that exists; returns it."""
    name = image_and_text(config)[1]
    folder, modality = _codec_folder(run, config, name), config.model.modality(name)
    if not folder.exists():
        captions = [caption for item in data.items for caption in item.captions]
        with errors_named("data"):
            _save_codec(TextCodec.train(captions, modality.channels, seed), folder)
    return load_codec(run / "checkpoint", config.codecs[name], modality)


def train_denoiser(
    run: Path,
    cache: LatentCache,
    text: TextCodec,
    config: Config,
    recipe: Recipe,
    options: StageOptions,
    init: PSUNet | UViT | None = None,
) -> None:
    """Trains the denoiser in RUN/denoiser and writes its averaged weights to RUN/checkpoint, which has the codecs.

    cache  latents and captions of the images
    text   the codec of the captions
    init   a network of the same config, or a U-ViT for a PS-U-Net, to start from
    Raises InputError about `data` for captions with unknown words, about `out` if the stage cannot be resumed.
    """
    torch.manual_seed(recipe.denoiser.seed)
    network = build(config.model).to(options.device)
    examples = Examples(cache, text, config, recipe)
    with errors_named("out"):
        stage = Stage(run / "denoiser", network, recipe.denoiser, len(examples), options.dtype)
    if init is not None and stage.step == 0:
        start_from(init, stage.module)
        stage.average.load_state_dict(stage.module.state_dict())
    if options.compile:
        compile_blocks(network.blocks())
    loss = DenoisingLoss(config, recipe.gamma, skew=recipe.skew, device=options.device)

    def denoise(inputs: Tensor, times: Tensor) -> Tensor:
        # A sample has at most one time for each modality, or one beside the times 0 and N of its known tokens.
        distinct, index = distinct_times(times, len(times) * len(config.model.modalities) + 2)
        return network(inputs, network.time_table(distinct), index)

    def losses(generator: torch.Generator, indices: list[int]) -> dict[str, Tensor]:
        x0, weights = examples.batch(indices, generator)  # [B, N], [B, L]
        return loss(denoise, x0.to(options.device), generator, weights)

    words = config.model.modality(image_and_text(config)[1]).tokens
    spread = range(0, len(cache), max(1, len(cache) // PROMPTS))[:PROMPTS]
    prompts = [prompt for i in spread if (prompt := shortened(cache.captions[i][0], words))]

    def export(step: int) -> None:
        checkpoint.save(run / "checkpoint", config, stage.average.state_dict(), DTYPES[recipe.weights_dtype])
        plot_curve(stage.curve, stage.folder / "curve.png")
        sheet = _sample_sheet(run / "checkpoint", prompts, config, recipe.denoiser.seed, options)
        if sheet is not None:
            write_atomically(stage.folder / f"samples-{step:07d}.png", lambda p: sheet.save(p, "PNG"))

    if stage.done:
        export(stage.step)
    stage.run(losses, options.save_every, export)


def _sample_sheet(
    folder: Path, prompts: list[str], config: Config, seed: int, options: StageOptions
) -> Image.Image | None:
    """A grid of what a checkpoint generates from prompts, and of joint samples, as far as it can do both."""
    (image, text), predicted = image_and_text(config), config.model.predicted
    requests = [Request(inputs={text: prompt}, seed=seed) for prompt in prompts if image in predicted]
    if image in predicted and text in predicted:
        requests.append(Request(num=JOINT_SAMPLES))
    if not requests:
        return None
    dtype = str(options.dtype).removeprefix("torch.")
    with Engine.from_pretrained(folder, device=str(options.device), dtype=dtype) as engine:
        outputs = [sample.outputs for result in engine.generate(requests) for sample in result.samples]
    return grid([values[image] for values in outputs], [values[text] for values in outputs], columns=8)


def copy_codecs(source: Path, run: Path, config: Config) -> None:
    """Copies the codecs of the checkpoint folder `source` into RUN/checkpoint, except for those it already has."""
    for name, codec in config.codecs.items():
        folder = _codec_folder(run, config, name)
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.copytree(codec_folder(source, codec, name), unfinished, dirs_exist_ok=True)
            unfinished.rename(folder)


def _save_codec(codec: Codec, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Saves a codec under a temporary name that is then changed: a kill leaves no partial codec."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    codec.save(unfinished, dtype)
    unfinished.rename(folder)


def _codec_folder(run: Path, config: Config, name: str) -> Path:
    return codec_folder(run / "checkpoint", config.codecs[name], name)


def _given_autoencoder(source: str, config: Config) -> ImageCodec:
    """The codec of an image modality with a given autoencoder, loaded: a damaged one is refused before any work."""
    name = image_and_text(config)[0]
    codec = ImageCodec.load(source, config.codecs[name].settings, config.model.modality(name))
    codec.build()
    return codec


def _require_same_run(options: TrainOptions) -> None:
    """Refuses to resume a run of other settings; `Stage` checks those of the optimiser. Records the settings."""
    file = options.out / "run.json"
    settings = {key: str(getattr(options, key)) for key in RUN_OPTIONS}
    settings |= {key: str(getattr(options.recipe, key)) for key in RUN_RECIPE}
    if options.config != PRESETS[options.preset]:
        settings["config"] = hashlib.sha256(json.dumps(options.config.to_dict()).encode()).hexdigest()[:16]
    if file.exists():
        try:
            recorded = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            remedy = "delete it to resume with these options"
            raise InputError("out", file, remedy, f"cannot be read ({error})") from None
        if recorded != settings:
            raise InputError("out", options.out, "use another folder", f"holds a run with {recorded}, not {settings}")
    write_atomically(file, lambda p: p.write_text(json.dumps(settings) + "\n"))
