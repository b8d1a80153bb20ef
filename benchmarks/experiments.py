"""The paper's comparisons, one command each, which trains or loads, measures, and writes a table and a picture.

    architecture  PS-U-Net against U-ViT-multi, at equal parameters and at equal compute
    depths        PS-U-Nets of (N_text, N_image, N_shared) at equal parameters
    masking       infilling with more and more of the image, of the text, or of both masked
    guidance      quality against diversity over the guidance scale, for all ways of guidance and conditioning

python -m benchmarks.experiments architecture --data data/emoji --steps 2000 --seeds 0 1

On emoji the metrics are those of `engine.evaluate`; with `--features` (photos) a Fréchet distance, BLEU-4 and word F1.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.metrics import bleu4, features_of, frechet_distance
from benchmarks.plots import plot_bars, plot_curves
from benchmarks.sweeps import denoising_errors, guidance_sweep, masking_sweep
from benchmarks.workloads import equal_compute, equal_parameters, forward_flops, parameters, u_vit_config
from engine import Engine, Request
from engine.checkpoint import BUILT_IN
from engine.codecs.image import ImageCodec
from engine.codecs.text import TextCodec
from engine.config import PRESETS, Config, ImageConfig
from engine.data.coco import CocoCaptions
from engine.data.latents import cache_latents
from engine.device import resolve
from engine.evaluate import Gallery, evaluate, pixels_of, spread, word_f1
from engine.pictures import to_image
from engine.train import RECIPES, shortened, take_codecs, train_denoiser
from engine.training import write_atomically

ERRORS = (
    "Image error and text error: the mean square error of the model's prediction of one modality, held-out pictures, "
    "at evenly spaced times, the other modality known."
)
GRID = ((0, 0), (1, 1), (2, 2), (3, 3), (1, 3), (3, 1))  # (N_text, N_image); N_shared takes what is left


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
    split = "test" if (options.data / "captions_test.json").exists() else "val"
    pairs = list(CocoCaptions.open(options.data, split).read(size))
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
    run = _folder(name, total, seed, options)
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


def _folder(name: str, total: int, seed: int, options: argparse.Namespace) -> Path:
    return options.out / f"{name}-{total}-seed{seed}".lower().replace(" ", "-").replace(",", "").replace("/", "-")


def measured(
    name: str, config: Config, points: list[int], seed: int, data: Data, options: argparse.Namespace
) -> list[dict[str, float]]:
    """The metrics of a run at its points, at the last those of samples too; kept beside it, so none is taken twice."""
    found = []
    for point in points:
        file = _folder(name, points[-1], seed, options) / f"measured-{point}.json"
        if not file.exists():
            with trained(name, config, point, seed, data, options, points[-1]) as engine:
                values = denoising_errors(engine, data.test, seed)
                if point == points[-1]:
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

    On the way, at `--points` evenly spaced steps, the errors of `denoising_errors` are taken; at its end the samples
    are measured too.
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
    panels = [(way, metric) for metric in way[0] if metric.endswith("error")]
    return {
        "rows": rows,
        "way": way,
        "plots": {
            "": lambda path: plot_bars(rows, "model", _metrics(rows), path),
            "-training": lambda path: plot_curves(panels, "training PFLOP", "model", path),
        },
    }


def architecture(data: Data, options: argparse.Namespace) -> dict:
    config = data.config
    same = replace(config, diffusion=replace(config.diffusion, times="independent"))
    parameters_, compute = equal_parameters(config.model), equal_compute(config.model)
    fewer = round(options.steps * forward_flops(config.model, 1) / forward_flops(parameters_, 1))
    variants = {
        "PS-U-Net": config,
        "PS-U-Net, independent times": same,
        "U-ViT-multi, equal parameters": u_vit_config(config, parameters_),
        "U-ViT-multi, equal parameters, equal training compute": u_vit_config(config, parameters_),
        "U-ViT-multi, equal compute a forward": u_vit_config(config, compute),
    }
    steps = dict.fromkeys(variants, options.steps) | {"U-ViT-multi, equal parameters, equal training compute": fewer}
    return {
        "title": "PS-U-Net against U-ViT-multi",
        "note": "Same data, seeds, batches, optimiser and noise schedule. PS-U-Net as its preset trains it, and with "
        f"the U-ViT's independent times, so that nothing but the architecture differs. {ERRORS}",
        **race(variants, steps, data, options),
    }


def depths(data: Data, options: argparse.Namespace) -> dict:
    model = data.config.model
    blocks = model.shared_depth + sum(2 * m.depth for m in model.modalities)
    variants = {}
    for text, image in GRID:
        shared = blocks - 2 * (text + image)
        if shared >= 1:
            depth = {"text": text, "image": image}
            modalities = tuple(replace(m, depth=depth[m.name]) for m in model.modalities)
            variant = replace(model, modalities=modalities, shared_depth=shared)
            variants[f"{text}/{image}/{shared}"] = replace(data.config, model=variant)
    return {
        "title": "Depths (N_text/N_image/N_shared) at equal parameters",
        "note": f"{blocks} blocks and as many skips each, so equally many parameters; the cost of a forward differs. "
        + ERRORS,
        **race(variants, dict.fromkeys(variants, options.steps), data, options),
    }


def masking(data: Data, options: argparse.Namespace) -> dict:
    rows = _over_seeds(options, data, lambda engine, seed: masking_sweep(
        engine, data.test, options.ratios, options.sampling_steps, seed))  # fmt: skip
    return {
        "title": "Joint infilling by the masked share",
        "note": "Random tokens of the picture, random words of the name, or both are masked; measured inside. "
        "A ratio of 0 has nothing to generate and is left out.",
        "rows": rows,
        "plots": {"": lambda path: plot_curves([(rows, "RMSE"), (rows, "word accuracy")], "ratio", "masked", path)},
    }


def guidance(data: Data, options: argparse.Namespace) -> dict:
    rows = _over_seeds(options, data, lambda engine, seed: guidance_sweep(
        engine, data.test, data.gallery, data.features, options.scales, options.sampling_steps, seed))  # fmt: skip
    return {
        "title": "Guidance: quality against diversity",
        "note": "The same model throughout. Text-to-image: masked and empty-token guidance, both with known parts "
        "renoised and clean. Joint: two passes that take turns (alternate) and UniDiffuser's 1 + 2. Quality is "
        + ("a Fréchet distance" if data.features else "retrieval@1 of the name (joint: word F1 with the name of the "
           "nearest picture)")
        + "; diversity the RMS difference of samples, of one name each or of all joint ones, in levels.",
        "rows": rows,
        "plots": {"": lambda path: plot_curves(
            [([r for r in rows if r["task"] == task], "quality") for task in ("text-to-image", "joint")],
            "diversity", "guidance", path,
        )},
    }  # fmt: skip


def _over_seeds(options: argparse.Namespace, data: Data, sweep) -> list[dict]:
    """The rows of a sweep over one model, numbers as means over the seeds, and the spread of the first metric."""
    name_of_dtype = str(options.dtype).removeprefix("torch.")
    if options.checkpoint is None and options.steps is not None:
        engine = trained("PS-U-Net", data.config, options.steps, options.seeds[0], data, options)
    else:
        engine = Engine.from_pretrained(options.checkpoint, device=str(options.device), dtype=name_of_dtype)
    found, started = [], time.perf_counter()
    with engine:
        for i, seed in enumerate(options.seeds, 1):
            found.append(sweep(engine, seed))
            left = (time.perf_counter() - started) / i * (len(options.seeds) - i) / 60
            print(f"seed {seed} done; about {left:.0f} minutes left", flush=True)
    rows = []
    for several in zip(*found, strict=True):
        row = {}
        for key, value in several[0].items():
            numbers = isinstance(value, float) and key not in ("ratio", "scale")
            row[key] = statistics.mean(r[key] for r in several) if numbers else value
            if numbers:
                row[f"± {key}"] = statistics.stdev(r[key] for r in several) if len(several) > 1 else "one seed"
        rows.append(row)
    return rows


def _metrics(rows: list[dict]) -> tuple[str, ...]:
    return tuple(key.removeprefix("± ") for key in rows[0] if key.startswith("± "))


EXPERIMENTS = {"architecture": architecture, "depths": depths, "masking": masking, "guidance": guidance}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.experiments", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("experiment", choices=list(EXPERIMENTS))
    add("--data", type=Path, required=True, metavar="DIR", help="pictures and captions, MS-COCO captions layout")
    add("--preset", choices=["emoji", "coco256", "tiny"], default="emoji", help="default: %(default)s")
    add("--size", type=int, help="pixels a side, if not the preset's")
    add("--autoencoder", metavar="DIR", help="a diffusers autoencoder, and word vectors trained on --data, instead of "
        "the built-in model's")  # fmt: skip
    add(
        "--features", type=Path, metavar="FILE", help="a Python file whose load() gives a network for Fréchet distances"
    )
    add("--checkpoint", type=Path, metavar="DIR", help="masking, guidance: the model; default: the built-in one")
    add("--steps", type=int, help="of training; masking, guidance: train a model instead of loading one")
    add("--batch", type=int, help="of training; default: the preset's")
    add("--points", type=int, default=4, help="of training at which errors are taken (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--count", type=int, default=96, help="held-out pictures to measure on (default: %(default)s)")
    add("--sampling-steps", type=int, default=25)
    add("--ratios", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75, 1.0])
    add("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0])
    add("--compile", action="store_true", help="torch.compile the denoiser in training")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--out", type=Path, default=Path("runs/experiments"), help="trained models (default: %(default)s)")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="tables and pictures")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        stored = run(options, f"python -m benchmarks.experiments {shlex.join(given)}")
    except ValueError as error:
        print(f"benchmarks.experiments: {error}", file=sys.stderr)
        return 2
    print(json.dumps(stored["rows"], indent=1))
    return 0


def run(options: argparse.Namespace, command: str) -> dict:
    """Runs one experiment and writes RESULTS/experiment-NAME.json and .png."""
    if options.experiment in ("architecture", "depths") and (options.steps is None or options.steps < 1):
        raise ValueError(f"--steps: {options.steps} does not work; say how many steps to train, 1 or more")
    if options.features is not None and not options.autoencoder:
        raise ValueError("--autoencoder: photos need one beside --features; give its folder")
    for argument, smallest in (("count", 2), ("sampling_steps", 1), ("batch", 1), ("size", 8), ("points", 1)):
        value = getattr(options, argument)
        if value is not None and value < smallest:
            raise ValueError(f"--{argument.replace('_', '-')}: {value} does not work; use {smallest} or more")
    if not all(0 < ratio <= 1 for ratio in options.ratios):
        raise ValueError(f"--ratios: {options.ratios} do not work; use numbers above 0 and up to 1")
    options.device, options.dtype = resolve(options.device, options.dtype)
    started = time.perf_counter()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    found = EXPERIMENTS[options.experiment](read_data(options), options)
    name = f"experiment-{options.experiment}-{options.preset}"
    options.results.mkdir(parents=True, exist_ok=True)
    pictures = {f"{name}{suffix}.png": plot for suffix, plot in found.pop("plots").items()}
    for file, plot in pictures.items():
        plot(options.results / file)
    stored = {
        "experiment": options.experiment, **found, "pictures": list(pictures), "command": command,
        "commit": commit.stdout.strip() or "unknown", "date": datetime.now(timezone.utc).isoformat(),
        "machine": machine.facts(options.device), "seconds": time.perf_counter() - started,
    }  # fmt: skip
    (options.results / f"{name}.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return stored


if __name__ == "__main__":
    sys.exit(main())
