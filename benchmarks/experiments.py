"""The paper's comparisons: each command trains or loads models, measures them, and stores a table.

    architecture    PS-U-Net against U-ViT-multi, at equal parameters and at equal compute
    depths          PS-U-Nets of (N_text, N_image, N_shared) at equal parameters
    masking         infilling with growing shares of the image, of the text, or of both masked
    guidance        quality against diversity over the guidance scale, for all kinds of guidance and conditioning
    approximations  quality against time: fewer steps, a step cache, a guidance interval
    modalities      two modalities against three, of which the third is a sketch of the image
    autoregression  diffusion of long texts against an autoregressive transformer

    python -m benchmarks.experiments architecture --data data/emoji --steps 2000 --seeds 0 1
    python -m benchmarks.experiments autoregression --preset text --data data/texts --steps 2000

On emoji the metrics are those of `engine.evaluate`; with `--features` (photos) a Fréchet distance, BLEU-4 and word F1.
`python -m benchmarks.report` adds the table and its plots to TABLES.md.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import autoregression, machine
from benchmarks.options import ExperimentOptions
from benchmarks.sweeps import approximation_sweep, guidance_sweep, masking_sweep, reconditioned
from benchmarks.trials import Data, compare_models, read_data, trained
from benchmarks.workloads import equal_compute, equal_parameters, u_vit_config
from engine import Engine, checkpoint
from engine.checkpoint import BUILT_IN, Checkpoint
from engine.command import Parser, name, path, refuse
from engine.command import run as run_command
from engine.device import resolve
from engine.errors import InputError
from engine.model.cost import forward_flops
from engine.presets import PRESETS, with_sketch

COMMAND = "python -m benchmarks.experiments"
GRID = ((0, 0), (1, 1), (2, 2), (3, 3), (1, 3), (3, 1))  # (N_text, N_image); N_shared is what is left


def architecture(data: Data, options: ExperimentOptions) -> dict:
    config = data.config
    independent = replace(config, diffusion=replace(config.diffusion, time_sampling="independent"))
    tokens = replace(independent, model=replace(independent.model, time_conditioning="token"))
    same_parameters, same_compute = equal_parameters(config.model), equal_compute(config.model)
    fewer = round(options.steps * forward_flops(config.model, 1) / forward_flops(same_parameters, 1))
    variants = {
        "PS-U-Net": config,
        "PS-U-Net, independent times": independent,
        "PS-U-Net, independent times, time tokens": tokens,
        "U-ViT-multi, equal parameters": u_vit_config(config, same_parameters),
        "U-ViT-multi, equal parameters, equal training compute": u_vit_config(config, same_parameters),
        "U-ViT-multi, equal compute a forward": u_vit_config(config, same_compute),
    }
    if options.models:
        if not all(1 <= n <= len(variants) for n in options.models):
            raise InputError("models", options.models, f"use numbers from 1 to {len(variants)}", "is out of range")
        variants = {name: c for n, (name, c) in enumerate(variants.items(), 1) if n in options.models}
    steps = dict.fromkeys(variants, options.steps) | {"U-ViT-multi, equal parameters, equal training compute": fewer}
    return compare_models(variants, steps, data, options)


def depths(data: Data, options: ExperimentOptions) -> dict:
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
    return compare_models(variants, dict.fromkeys(variants, options.steps), data, options)


def modalities(data: Data, options: ExperimentOptions) -> dict:
    two, three = data.config, with_sketch(data.config)
    fewer = round(options.steps * forward_flops(two.model, 1) / forward_flops(three.model, 1))
    shorter = "image, text, sketch, equal training compute"
    variants = {"image, text": two, "image, text, sketch": three, shorter: three}
    steps = dict.fromkeys(variants, options.steps) | {shorter: fewer}
    return compare_models(variants, steps, data, options)


def masking(data: Data, options: ExperimentOptions) -> dict:
    with _engine(_checkpoint(data, options), options) as engine:
        return _over_seeds(
            options,
            lambda seed: masking_sweep(engine, data.test, options.ratios, options.sampling_steps, seed),
        )


def guidance(data: Data, options: ExperimentOptions) -> dict:
    loaded = _checkpoint(data, options)
    with _engine(loaded, options) as engine, _engine(reconditioned(loaded), options) as other:
        return _over_seeds(
            options,
            lambda seed: guidance_sweep(
                engine, other, data.test, data.gallery, data.features, options.scales, options.sampling_steps, seed
            ),
        )


def approximations(data: Data, options: ExperimentOptions) -> dict:
    with _engine(_checkpoint(data, options), options) as engine:
        return _over_seeds(options, lambda seed: approximation_sweep(engine, data.test, data.gallery, seed))


def _checkpoint(data: Data, options: ExperimentOptions) -> Checkpoint:
    """The model to measure: one that is trained here for --steps, or one that exists."""
    if options.checkpoint is None and options.steps is not None:
        return trained("PS-U-Net", data.config, options.steps, options.seeds[0], data, options)
    return checkpoint.load(options.checkpoint or BUILT_IN)


def _engine(loaded: Checkpoint, options: ExperimentOptions) -> Engine:
    return Engine(loaded, options.device, options.dtype)


def _over_seeds(options: ExperimentOptions, sweep: Callable[[int], list[dict]]) -> dict:
    """The rows of a sweep over one model: every metric as its mean over the seeds, with its standard deviation."""
    sweeps, started = [], time.perf_counter()
    for i, seed in enumerate(options.seeds, 1):
        sweeps.append(sweep(seed))
        left = (time.perf_counter() - started) / i * (len(options.seeds) - i) / 60
        print(f"seed {seed} done; about {left:.0f} minutes left", flush=True)
    rows = []
    for rows_of_seeds in zip(*sweeps, strict=True):
        row = {}
        for key, value in rows_of_seeds[0].items():
            is_metric = isinstance(value, float) and key not in ("ratio", "scale")  # those are settings
            values = [r[key] for r in rows_of_seeds]
            row[key] = statistics.mean(values) if is_metric else value
            if is_metric:
                row[f"± {key}"] = statistics.stdev(values) if len(values) > 1 else "one seed"
        rows.append(row)
    return {"rows": rows}


EXPERIMENTS = {
    "architecture": architecture,
    "depths": depths,
    "modalities": modalities,
    "masking": masking,
    "guidance": guidance,
    "approximations": approximations,
}


def run(options: ExperimentOptions, command: str) -> dict:
    """Runs one experiment and writes RESULTS/experiment-NAME.json."""
    # Before the work, which puts load on the machine and whose results change files.
    before = machine.facts(options.device) | {"dtype": str(options.dtype).removeprefix("torch.")}
    commit = _commit()
    if options.experiment == "autoregression":
        measured = autoregression.compare(options)
    else:
        measured = EXPERIMENTS[options.experiment](read_data(options), options)
    stored = {
        "experiment": options.experiment, **measured, "command": command, "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(), "machine": before,
    }  # fmt: skip
    file = options.results / f"experiment-{options.experiment}-{options.preset}.json"
    options.results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return stored


def _commit() -> str:
    """The commit of what was run, with a + where files differ from it; "unknown" outside of a repository."""
    command = ["git", "describe", "--always", "--abbrev=10", "--match", "", "--dirty=+"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(COMMAND, description=__doc__)
    add = parser.add_argument
    add("experiment", choices=[*EXPERIMENTS, "autoregression"])
    add("--data", type=path, required=True, metavar="DIR", help="images and captions, MS-COCO captions layout; "
        "autoregression: texts that `python -m engine.data text` has written")  # fmt: skip
    add(
        "--preset",
        choices=["emoji", "coco256", "photos128", "tiny", "text", "text-tiny"],
        default="emoji",
        help="default: %(default)s",
    )
    add("--size", type=int, help="pixels a side, if not the preset's")
    add("--autoencoder", type=name, metavar="DIR", help="a diffusers autoencoder, used with word vectors trained on "
        "--data; default: both of the built-in model")  # fmt: skip
    add("--features", type=path, metavar="PATH", help="of Fréchet distances: a TorchScript file or the folder of a "
        "diffusers autoencoder, as engine.evaluate takes")  # fmt: skip
    add("--models", type=int, nargs="+", default=[], metavar="N",
        help="architecture: only these, numbered from 1 in the order of its table; default: all")  # fmt: skip
    add("--checkpoint", type=path, metavar="DIR", help="masking, guidance, approximations: the model; default: the "
        "built-in one")  # fmt: skip
    add("--steps", type=int, help="of training; masking, guidance, approximations: train a model instead of loading it")
    add("--batch", type=int, help="of training; default: the preset's")
    add("--points", type=int, default=4, help="of training at which errors are measured (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0])
    add(
        "--count",
        type=int,
        default=96,
        help="held-out images or texts to measure on, and texts to generate (default: %(default)s)",
    )
    add("--sampling-steps", type=int, default=25)
    add("--ratios", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75, 1.0], help="of masking")
    add("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0], help="of guidance")
    add("--compile", action="store_true", help="torch.compile the denoiser in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--out", type=path, default=Path("runs/experiments"), help="trained models (default: %(default)s)")
    add("--results", type=path, default=Path(__file__).parent / "results", help="stored tables")
    return parser.parse_args(arguments)


def options_of(parsed: argparse.Namespace) -> ExperimentOptions:
    """What was parsed, checked; raises InputError."""
    device, dtype = resolve(parsed.device, parsed.dtype, PRESETS[parsed.preset].model)
    return ExperimentOptions(**vars(parsed) | {"device": device, "dtype": dtype})


def main(arguments: list[str] | None = None) -> int:
    parsed = parse(arguments)
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    try:
        stored = run(options_of(parsed), f"{COMMAND} {given}")
    except InputError as error:
        return refuse(COMMAND, error, vars(parsed))
    print(json.dumps(stored["rows"], indent=1))
    return 0


if __name__ == "__main__":
    run_command(COMMAND, main)
