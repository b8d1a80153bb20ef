"""Models trained for a comparison on the same data, and what is measured of each during training and at its end."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.metrics import features_of
from benchmarks.options import ExperimentOptions
from benchmarks.sweeps import Pairs, denoising_errors
from benchmarks.workloads import parameters, without_categories
from engine import Engine, Request, checkpoint
from engine.checkpoint import BUILT_IN, Checkpoint
from engine.codecs.autoencoder import SavedAutoencoder
from engine.codecs.codec import load_codec
from engine.codecs.image import ImageCodec
from engine.codecs.text import TextCodec
from engine.codecs.words import shortened
from engine.config import CodecConfig, Config
from engine.data.captioned import CaptionedImages
from engine.data.latents import cache_latents
from engine.data.sketch import VARIANTS
from engine.data.sources import open_captioned
from engine.errors import errors_named
from engine.evaluation import Gallery, evaluate, evaluate_sketches, pixels_of, spread, word_f1
from engine.files import write_atomically
from engine.images import to_image
from engine.metrics.captions import bleu, bleu_counts
from engine.metrics.frechet import Statistics, frechet_distance
from engine.model.cost import forward_flops
from engine.presets import PRESETS
from engine.training.denoiser import train_denoiser
from engine.training.options import sketch_of
from engine.training.recipes import RECIPES
from engine.training.stage import StageOptions
from engine.training.stages import copy_codecs, with_unit_sketches


@dataclass(frozen=True)
class Data:
    """What all models of one experiment are trained on and measured with."""

    config: Config  # the preset's, with the tokens and channels of the codecs
    train: CaptionedImages
    test: Pairs  # held out
    gallery: Gallery
    codecs: Path  # a folder with a folder for each codec, as in a checkpoint
    features: Callable[[Tensor], Tensor] | None  # of images in −1..1; None on emoji


def read_data(options: ExperimentOptions) -> Data:
    """Opens the data and the codecs: the built-in model's, or the autoencoder given and word vectors trained for it."""
    config = without_categories(PRESETS[options.preset])  # as the U-ViTs beside it
    settings = dict(config.codecs["image"].settings)
    if options.size is not None:
        settings["size"] = options.size
    with errors_named("data"):
        train = open_captioned(options.data)
    codecs = BUILT_IN if options.autoencoder is None else _own_codecs(train, config, settings, options)
    image = ImageCodec(SavedAutoencoder.open(codecs / "image"), **settings)
    modalities = tuple(
        replace(m, tokens=image.tokens, channels=image.channels) if m.name == "image" else m
        for m in config.model.modalities
    )
    config = replace(
        config,
        model=replace(config.model, modalities=modalities),
        codecs={**config.codecs, "image": CodecConfig("image", settings=settings)},
    )
    split = next((s for s in ("test", "val") if (options.data / f"captions_{s}.json").exists()), None)
    if split is None:  # one split only: the images to measure on are taken out of it
        held_out = spread(train.items, options.count)
        test = replace(train, items=tuple(held_out))
        train = replace(train, items=tuple(item for item in train.items if item not in held_out))
    else:
        with errors_named("data"):
            test = open_captioned(options.data, split)
    pairs = list(test.read(image.size))
    features = features_of(options.features, options.device) if options.features else None
    gallery = Gallery.of(pairs if features else [*train.read(image.size), *pairs])
    return Data(config, train, spread(pairs, options.count), gallery, codecs, features)


def _own_codecs(train: CaptionedImages, config: Config, settings: dict, options: ExperimentOptions) -> Path:
    """Writes the given autoencoder, and word vectors of the captions, unless an earlier run has."""
    codecs = options.out / f"codecs-{settings['size']}"
    if not (codecs / "text").exists():
        with errors_named("autoencoder"):
            ImageCodec(SavedAutoencoder.open(options.autoencoder), **settings).save(codecs / "image")
        captions = [caption for item in train.items for caption in item.captions]
        with errors_named("data"):
            text = TextCodec.train(captions, config.model.modality("text").channels)
        text.save(codecs / "text")
    return codecs


def trained(
    name: str,
    config: Config,
    steps: int,
    seed: int,
    data: Data,
    options: ExperimentOptions,
    total: int | None = None,
) -> Checkpoint:
    """The model of one run after `steps` of its `total` steps; trains those that earlier calls have not.

    The learning rate stays constant, so that metrics during training are comparable with those at its end; the
    averaged weights take the place of the decay.
    """
    total = total or steps
    run = _folder(name, config, total, seed, data, options)
    run.mkdir(parents=True, exist_ok=True)
    copy_codecs(data.codecs, run, config)
    image, text = (
        load_codec(run / "checkpoint", config.codecs[key], config.model.modality(key), options.device)
        for key in ("image", "text")
    )
    kind, sketches = ("latents", 0) if sketch_of(config) is None else ("sketch-latents", VARIANTS)
    latents, fingerprint = options.out / f"{kind}-{image.size}", str(data.codecs.resolve())
    cache = cache_latents(data.train, image.encode_pixels, latents, fingerprint, image.size, sketches=sketches)
    config, cache = with_unit_sketches(config, cache)
    recipe = RECIPES[options.preset]
    denoiser = replace(recipe.denoiser, steps=steps, seed=seed, batch=options.batch or recipe.denoiser.batch, decay=0.0,
                       warmup=min(recipe.denoiser.warmup, total // 10))  # fmt: skip
    how = StageOptions(options.device, options.dtype, save_every=steps, compile=options.compile)
    train_denoiser(run, cache, text, config, replace(recipe, denoiser=denoiser), how)
    return checkpoint.load(run / "checkpoint")


def _folder(name: str, config: Config, total: int, seed: int, data: Data, options: ExperimentOptions) -> Path:
    """The folder of a run, named by all that its weights and its metrics during training depend on."""
    everything = (
        config.to_dict(), RECIPES[options.preset], options.batch, str(options.data.resolve()),
        str(data.codecs.resolve()), options.dtype, options.count, options.sampling_steps, options.points,
    )  # fmt: skip
    run = f"{name}-{total}-seed{seed}-{hashlib.sha256(repr(everything).encode()).hexdigest()[:8]}"
    return options.out / run.lower().replace(" ", "-").replace(",", "").replace("/", "-")


def measured(
    name: str, config: Config, points: list[int], seed: int, data: Data, options: ExperimentOptions
) -> list[dict[str, float]]:
    """The metrics of a run after each of `points` steps; they are stored beside it, so that they are measured once.

    Those of samples are measured at the last point, on photos at every one.
    """
    metrics = []
    for point in points:
        file = _folder(name, config, points[-1], seed, data, options) / f"measured-{point}.json"
        if not file.exists():
            loaded = trained(name, config, point, seed, data, options, points[-1])
            values = denoising_errors(loaded, options.device, options.dtype, data.test, seed)
            if point == points[-1] or data.features is not None:
                with Engine(loaded, options.device, options.dtype) as engine:
                    values |= scores(engine, data, options.sampling_steps, seed)
            write_atomically(file, lambda path, v=values: path.write_text(json.dumps(v)))
        metrics.append(json.loads(file.read_text()))
    return metrics


def scores(engine: Engine, data: Data, steps: int, seed: int) -> dict[str, float]:
    """The metrics of one model on held-out images."""
    if data.features is None:
        how = Request(steps=steps, seed=seed)
        found = evaluate(engine, data.test, data.gallery, how)
        metrics = {"retrieval@1": found.retrieval_base, "word F1": found.word_f1, "infill RMSE": found.infill_rmse}
        if (sketches := evaluate_sketches(engine, data.test, data.gallery, how)) is not None:
            metrics |= {"sketch to image": sketches.retrieval_base, "image to sketch": sketches.edge_f1}
        return metrics
    words, options = engine.config.model.modality("text").tokens, {"steps": steps, "unknown_words": "fill"}
    prompts = [shortened(item.captions[0], words) for item, _ in data.test]
    images = [to_image(image / 127.5 - 1) for _, image in data.test]
    drawn = engine.generate([Request(prompt=p, seed=seed + i, **options) for i, p in enumerate(prompts)])
    captioned = engine.generate([Request(image=image, seed=seed + i, steps=steps) for i, image in enumerate(images)])
    made = torch.stack([pixels_of(r.image) for r in drawn])
    real = torch.stack([image for _, image in data.test]).float() / 127.5 - 1
    texts, references = [r.text for r in captioned], [item.captions for item, _ in data.test]
    f1 = [max(word_f1(text, r) for r in of_image) for text, of_image in zip(texts, references, strict=True)]
    return {
        "FD": frechet_distance(Statistics.of(data.features(made)), Statistics.of(data.features(real))),
        "BLEU-4": bleu(bleu_counts(texts, references)),
        "word F1": statistics.mean(f1),
    }


def compare_models(variants: dict[str, Config], steps: dict[str, int], data: Data, options: ExperimentOptions) -> dict:
    """Trains every variant with every seed and measures it at `options.points` evenly spaced steps.

    Returns "rows", one a variant with the mean and the standard deviation of each metric at the end of training, and
    "curve", the means at every point.
    """
    rows, curve, done, total, started = [], [], 0, len(variants) * len(options.seeds), time.perf_counter()
    batch = options.batch or RECIPES[options.preset].denoiser.batch
    for name, config in variants.items():
        points = sorted({max(1, steps[name] * k // options.points) for k in range(1, options.points + 1)})
        metrics = []  # [seed][point]
        for seed in options.seeds:
            metrics.append(measured(name, config, points, seed, data, options))
            done += 1
            left = (time.perf_counter() - started) / done * (total - done) / 60
            last = metrics[-1][-1]
            print(f"{name}, seed {seed}: {last}; {done} of {total}, about {left:.0f} minutes left", flush=True)
        petaflop = 3 * forward_flops(config.model, batch) / 1e15  # of a step: the backward costs two forwards
        for point, of_seeds in zip(points, zip(*metrics, strict=True), strict=True):
            mean = {metric: statistics.mean(m[metric] for m in of_seeds) for metric in metrics[0][0]}
            curve.append({"model": name, "steps": point, "training PFLOP": petaflop * point} | mean)
        row = {
            "model": name, "M parameters": parameters(config.model) / 1e6,
            "MFLOP/forward": forward_flops(config.model, 1) / 1e6, "steps": steps[name],
            "training PFLOP": petaflop * steps[name],
        }  # fmt: skip
        for metric in metrics[0][-1]:
            values = [of_seed[-1][metric] for of_seed in metrics]
            row[metric] = statistics.mean(values)
            row[f"± {metric}"] = statistics.stdev(values) if len(values) > 1 else "one seed"
        rows.append(row)
    return {"rows": rows, "curve": curve}
