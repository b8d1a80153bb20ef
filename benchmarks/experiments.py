"""The paper's comparisons, one command each, which trains or loads, measures, and writes a table and a picture.

    architecture  PS-U-Net against U-ViT-multi, at equal parameters and at equal compute
    depths        PS-U-Nets of (N_text, N_image, N_shared) at equal parameters
    masking       infilling with more and more of the image, of the text, or of both masked
    guidance      quality against diversity over the guidance scale, for all ways of guidance and conditioning
    approximations  quality against time: fewer steps, a step cache, a guidance interval

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
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import machine
from benchmarks.plots import plot_curves
from benchmarks.sweeps import approximation_sweep, guidance_sweep, masking_sweep
from benchmarks.trials import Data, race, read_data, trained
from benchmarks.workloads import equal_compute, equal_parameters, forward_flops, u_vit_config
from engine import Engine
from engine.device import resolve

ERRORS = (
    "Image error and text error: the mean square error of the model's prediction of one modality, held-out pictures, "
    "at evenly spaced times, the other modality known."
)
GRID = ((0, 0), (1, 1), (2, 2), (3, 3), (1, 3), (3, 1))  # (N_text, N_image); N_shared takes what is left


def architecture(data: Data, options: argparse.Namespace) -> dict:
    config = data.config
    same = replace(config, diffusion=replace(config.diffusion, times="independent"))
    tokens = replace(same, model=replace(same.model, time="token"))
    parameters_, compute = equal_parameters(config.model), equal_compute(config.model)
    fewer = round(options.steps * forward_flops(config.model, 1) / forward_flops(parameters_, 1))
    variants = {
        "PS-U-Net": config,
        "PS-U-Net, independent times": same,
        "PS-U-Net, independent times, time tokens": tokens,
        "U-ViT-multi, equal parameters": u_vit_config(config, parameters_),
        "U-ViT-multi, equal parameters, equal training compute": u_vit_config(config, parameters_),
        "U-ViT-multi, equal compute a forward": u_vit_config(config, compute),
    }
    steps = dict.fromkeys(variants, options.steps) | {"U-ViT-multi, equal parameters, equal training compute": fewer}
    return {
        "title": "PS-U-Net against U-ViT-multi",
        "note": "Same data, seeds, batches, optimiser and noise schedule; the learning rate was chosen for PS-U-Net. "
        "PS-U-Net as its preset trains it; with the U-ViT's independent times; and with its time tokens, too, so that "
        f"nothing but the sharing of blocks differs. {ERRORS}",
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
        "A ratio of 0 has nothing to generate and is left out. How many words a name has is always given; at ratio 1, "
        "both, nothing else is.",
        "rows": rows,
        "plots": {"": lambda path: plot_curves([(rows, "RMSE"), (rows, "word accuracy")], "ratio", "masked", path)},
    }


def guidance(data: Data, options: argparse.Namespace) -> dict:
    rows = _over_seeds(options, data, lambda engine, seed: guidance_sweep(
        engine, data.test, data.gallery, data.features, options.scales, options.sampling_steps, seed))  # fmt: skip
    return {
        "title": "Guidance: quality against diversity",
        "note": "The same model throughout. Text-to-image: masked and empty-token guidance, both with known parts "
        "renoised and clean; the model was trained for one of these four only. Joint: two passes that take turns "
        "(alternate) and UniDiffuser's 1 + 2. Quality is "
        + ("a Fréchet distance" if data.features else "retrieval@1 of the name (joint: word F1 with the name of the "
           "nearest picture)")
        + "; diversity the RMS difference of samples, of one name each or of all joint ones, in levels.",
        "rows": rows,
        "plots": {"": lambda path: plot_curves(
            [([r for r in rows if r["task"] == task], "quality") for task in ("text-to-image", "joint")],
            "diversity", "guidance", path,
        )},
    }  # fmt: skip


def approximations(data: Data, options: argparse.Namespace) -> dict:
    rows = _over_seeds(options, data, lambda engine, seed: approximation_sweep(engine, data.test, data.gallery, seed))
    return {
        "title": "Approximations: quality against time",
        "note": "The same names drawn and pictures told at 4, 8 and 16 steps, plainly and with each approximation. "
        "Seconds are those of a sample's steps, all samples in one batch; compare them within one run only.",
        "rows": rows,
        "plots": {"": lambda path: plot_curves(
            [([r | {"seconds": r["seconds drawing"]} for r in rows], "retrieval@1"),
             ([r | {"seconds": r["seconds telling"]} for r in rows], "word F1")],
            "seconds", "approximation", path,
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
            numbers = isinstance(value, float) and key not in ("ratio", "scale")  # those are what was set
            row[key] = statistics.mean(r[key] for r in several) if numbers else value
            if numbers:
                row[f"± {key}"] = statistics.stdev(r[key] for r in several) if len(several) > 1 else "one seed"
        rows.append(row)
    return rows


EXPERIMENTS = {
    "architecture": architecture,
    "depths": depths,
    "masking": masking,
    "guidance": guidance,
    "approximations": approximations,
}


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
    # Before the work: it makes load, and its results change files.
    before = machine.facts(options.device) | {"dtype": str(options.dtype).removeprefix("torch.")}
    commit = _commit()
    found = EXPERIMENTS[options.experiment](read_data(options), options)
    name = f"experiment-{options.experiment}-{options.preset}"
    options.results.mkdir(parents=True, exist_ok=True)
    pictures = {f"{name}{suffix}.png": plot for suffix, plot in found.pop("plots").items()}
    for file, plot in pictures.items():
        plot(options.results / file)
    stored = {
        "experiment": options.experiment, **found, "pictures": list(pictures), "command": command,
        "commit": commit, "date": datetime.now(timezone.utc).isoformat(), "machine": before,
    }  # fmt: skip
    (options.results / f"{name}.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return stored


def _commit() -> str:
    """The commit of what was run, with a + where files differ from it; "unknown" outside of a repository."""
    command = ["git", "describe", "--always", "--abbrev=10", "--match", "", "--dirty=+"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
