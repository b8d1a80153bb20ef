"""Models trained for a comparison, on the same data, and what is measured of each on its way and at its end."""

import argparse
import hashlib
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.metrics import bleu4, features_of, frechet_distance
from benchmarks.plots import plot_bars, plot_curves
from benchmarks.sweeps import denoising_errors
from benchmarks.workloads import forward_flops, parameters
from engine import Engine, Request
from engine.checkpoint import BUILT_IN
from engine.codecs.image import ImageCodec
from engine.codecs.text import TextCodec
from engine.config import PRESETS, Config, ImageConfig
from engine.data.coco import CocoCaptions
from engine.data.latents import cache_latents
from engine.evaluate import Gallery, evaluate, pixels_of, spread, word_f1
from engine.pictures import to_image
from engine.recipes import RECIPES
from engine.train import shortened, take_codecs, train_denoiser
from engine.training import write_atomically


@dataclass(frozen=True)
class Data:
    """What all models of one experiment are trained on and measured with."""

    config: Config  # the preset, with tokens and channels as the autoencoder makes them
    train: CocoCaptions
    test: list  # pairs of CaptionedImage and picture uint8 [3, S, S]
    gallery: Gallery
    codecs: Path  # folder with image/ and text/
    features: object  # pictures in −1..1 → features; None on emoji


def read_data(options: argparse.Namespace) -> Data:
    """Opens the data and brings the codecs: the built-in model's, or `--autoencoder` and newly trained word vectors."""
    config = PRESETS[options.preset]
    size = options.size or config.image.size
    train = CocoCaptions.open(options.data)
    codecs = BUILT_IN
    if options.autoencoder:
        codecs = options.out / f"codecs-{size}"
        if not (codecs / "text").exists():
            captions = [c for item in train.items for c in item.captions]
            ImageCodec.load(options.autoencoder, size, config.image.patch).save(codecs / "image")
            TextCodec.train(captions, config.model.modality("text").channels).save(codecs / "text")
    image = ImageCodec.load(codecs / "image", size, config.image.patch)
    modalities = tuple(
        replace(m, tokens=image.tokens, channels=image.channels) if m.name == "image" else m
        for m in config.model.modalities
    )
    config = replace(config, model=replace(config.model, modalities=modalities), image=ImageConfig(size, image.patch))
    split = next((s for s in ("test", "val") if (options.data / f"captions_{s}.json").exists()), None)
    if split is None:  # a folder of one split: what is measured on is taken out of it
        held = spread(train.items, options.count)
        test = replace(train, items=tuple(held))
        train = replace(train, items=tuple(item for item in train.items if item not in held))
    else:
        test = CocoCaptions.open(options.data, split)
    pairs = list(test.read(size))
    features = features_of(options.features, options.device) if options.features else None
    everything = pairs if features else [*train.read(size), *pairs]
    return Data(config, train, spread(pairs, options.count), Gallery.of(everything), codecs, features)


def trained(
    name: str, config: Config, steps: int, seed: int, data: Data, options: argparse.Namespace, total: int | None = None
) -> Engine:
    """The model of one run after `steps` of its `total`, trained now or as far as an earlier start has not.

    At a constant learning rate, so that a run's way can be looked at: the averaged weights make up for the decay.
    """
    total = total or steps
    run = _folder(name, config, total, seed, data, options)
    run.mkdir(parents=True, exist_ok=True)
    take_codecs(data.codecs, run)
    image = ImageCodec.load(data.codecs / "image", config.image.size, config.image.patch, options.device)
    text = TextCodec.load(data.codecs / "text")
    cache = cache_latents(
        data.train, lambda x: image.encode(x.to(options.device)), options.out / f"latents-{config.image.size}",
        str(data.codecs.resolve()), config.image.size,
    )  # fmt: skip
    recipe = RECIPES[options.preset]
    denoiser = replace(recipe.denoiser, steps=steps, seed=seed, batch=options.batch or recipe.denoiser.batch, decay=0.0,
                       warmup=min(recipe.denoiser.warmup, total // 10))  # fmt: skip
    settings = argparse.Namespace(seed=seed, device=options.device, dtype=options.dtype, compile=options.compile,
                                  save_every=steps)  # fmt: skip
    train_denoiser(run, cache, text, config, replace(recipe, denoiser=denoiser), settings, None)
    name_of_dtype = str(options.dtype).removeprefix("torch.")
    return Engine.from_pretrained(run / "checkpoint", device=str(options.device), dtype=name_of_dtype)


def _folder(name: str, config: Config, total: int, seed: int, data: Data, options: argparse.Namespace) -> Path:
    """A run's own, by all that makes its weights and by how it is measured, on the way, which cannot be done later."""
    recipe, measure = RECIPES[options.preset], (options.count, options.sampling_steps, options.points)
    what = (
        config,
        recipe,
        options.batch,
        str(options.data.resolve()),
        str(data.codecs.resolve()),
        options.dtype,
        measure,
    )
    run = f"{name}-{total}-seed{seed}-{hashlib.sha256(repr(what).encode()).hexdigest()[:8]}"
    return options.out / run.lower().replace(" ", "-").replace(",", "").replace("/", "-")


def measured(
    name: str, config: Config, points: list[int], seed: int, data: Data, options: argparse.Namespace
) -> list[dict[str, float]]:
    """The metrics of a run at its points; kept beside it, so none is taken twice.

    Those of samples are taken at the last point, on photos at every one.
    """
    found = []
    for point in points:
        file = _folder(name, config, points[-1], seed, data, options) / f"measured-{point}.json"
        if not file.exists():
            with trained(name, config, point, seed, data, options, points[-1]) as engine:
                values = denoising_errors(engine, data.test, seed)
                if point == points[-1] or data.features is not None:
                    values |= scores(engine, data, options, seed)
            write_atomically(file, lambda path, v=values: path.write_text(json.dumps(v)))
        found.append(json.loads(file.read_text()))
    return found


def scores(engine: Engine, data: Data, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """The metrics of one model on held-out pictures."""
    if data.features is None:
        found = asdict(evaluate(engine, data.test, data.gallery, options.sampling_steps, seed))
        return {
            "retrieval@1": found["retrieval_base"],
            "word F1": found["word_f1"],
            "infill RMSE": found["infill_rmse"],
        }
    words = engine.config.model.modality("text").tokens
    steps = options.sampling_steps
    captions = [shortened(item.captions[0], words) for item, _ in data.test]
    known = {"steps": steps, "unknown_words": "fill"}
    drawn = engine.generate([Request(prompt=c, seed=seed + i, **known) for i, c in enumerate(captions)])
    told = engine.generate([Request(image=to_image(p / 127.5 - 1), seed=seed + i, steps=steps)
                            for i, (_, p) in enumerate(data.test)])  # fmt: skip
    real = torch.stack([p for _, p in data.test]).float() / 127.5 - 1
    texts, references = [r.text for r in told], [item.captions for item, _ in data.test]
    f1 = [max(word_f1(t, r) for r in several) for t, several in zip(texts, references, strict=True)]
    return {
        "FD": frechet_distance(data.features(torch.stack([pixels_of(r.image) for r in drawn])), data.features(real)),
        "BLEU-4": bleu4(texts, references),
        "word F1": statistics.mean(f1),
    }


def race(variants: dict[str, Config], steps: dict[str, int], data: Data, options: argparse.Namespace) -> dict:
    """Trains every variant with every seed: a row a variant with means and spreads over the seeds, and the way there.

    On the way, at `--points` evenly spaced steps, the metrics of `measured` are taken.
    """
    rows, way, done, total, started = [], [], 0, len(variants) * len(options.seeds), time.perf_counter()
    batch = options.batch or RECIPES[options.preset].denoiser.batch
    for name, config in variants.items():
        errors = []
        petaflop = 3 * forward_flops(config.model, batch) / 1e15  # a training step's: forward, and twice that backward
        points = sorted({max(1, steps[name] * k // options.points) for k in range(1, options.points + 1)})
        for seed in options.seeds:
            errors.append(measured(name, config, points, seed, data, options))
            done += 1
            left = (time.perf_counter() - started) / done * (total - done) / 60
            last = errors[-1][-1]
            print(f"{name}, seed {seed}: {last}; {done} of {total}, about {left:.0f} minutes left", flush=True)
        found = [run[-1] for run in errors]
        for point, several in zip(points, zip(*errors, strict=True), strict=True):
            mean = {metric: statistics.mean(e[metric] for e in several) for metric in errors[0][0]}
            way.append({"model": name, "steps": point, "training PFLOP": petaflop * point} | mean)
        row = {
            "model": name, "M parameters": parameters(config.model) / 1e6,
            "MFLOP/forward": forward_flops(config.model, 1) / 1e6, "steps": steps[name],
            "training PFLOP": petaflop * steps[name],
        }  # fmt: skip
        for metric in found[0]:
            values = [f[metric] for f in found]
            row[metric] = statistics.mean(values)
            row[f"± {metric}"] = statistics.stdev(values) if len(values) > 1 else "one seed"
        rows.append(row)
    panels = [(way, metric) for metric in errors[0][0]]
    return {
        "rows": rows,
        "way": way,
        "plots": {
            "": lambda path: plot_bars(rows, "model", metrics_of(rows), path),
            "-training": lambda path: plot_curves(panels, "training PFLOP", "model", path),
        },
    }


def metrics_of(rows: list[dict]) -> tuple[str, ...]:
    return tuple(key.removeprefix("± ") for key in rows[0] if key.startswith("± "))
