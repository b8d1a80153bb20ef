"""Sampling from the command line: `python -m engine.sample`; see `--help`, and README.md for examples.

Parses options, calls `engine.runtime`, and writes the results with `engine.sample_folder`; thousands of samples are
made by `engine.sample_bulk`.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

from engine.command import Once, Parser, add_model, add_quantize, check_writable, path, refuse, run
from engine.errors import InputError, shown
from engine.files import files_within
from engine.hub import MODELS
from engine.request import (
    ADAPTER,
    ATTENTIONS,
    GUIDANCE_KINDS,
    INFILLS,
    MAX_NUM,
    SOLVERS,
    SPACINGS,
    TASKS,
    NotFiniteSamplesError,
    Request,
    Result,
    Sample,
)
from engine.sample_folder import check_files, image_file, is_image, to_json, write

COMMAND = "python -m engine.sample"
JOINT_NUM = 16  # samples of a run that asks for nothing


def _parser() -> Parser:
    parser = Parser(COMMAND, description="Sample images and texts; without arguments, a joint grid.")
    _add_request(parser.add_argument_group("what to sample").add_argument)
    _add_solver(parser.add_argument_group("how to sample").add_argument)
    _add_engine(parser.add_argument_group("model, device and output").add_argument)
    text = "many samples, also by several processes (torchrun -m engine.sample); an interrupted run is resumed"
    _add_bulk(parser.add_argument_group("in bulk", text).add_argument)
    return parser


def _add_request(add) -> None:
    add("--prompt", action="append", metavar="TEXT", help="words, _ for each one to be filled in; may be repeated")
    text = "an image to describe, or to infill with --mask or _ in --prompt"
    add("--image", action=Once, type=path, metavar="FILE", help=text)
    add("--mask", action=Once, type=path, metavar="FILE", help="white where the image is to be regenerated")
    text = "a line drawing (default --checkpoint with it: emoji-sketch)"
    add("--sketch", action=Once, type=path, metavar="FILE", help=text)
    add("--sketch-mask", action=Once, type=path, metavar="FILE", help="white where the sketch is to be regenerated")
    text = "a value of any modality, an image's file or a text; may be repeated"
    add("--input", action="append", type=_named, default=[], metavar="NAME=VALUE", help=text)
    text = "the mask of an image given with --input; may be repeated"
    add("--input-mask", action="append", type=_named, default=[], metavar="NAME=FILE", help=text)
    add("--task", choices=TASKS, default="auto", help="checks the task that the other options make (default: auto)")
    text = f"samples of each prompt, at most {MAX_NUM} (default: 1; joint: {JOINT_NUM}); of a bulk run, all in all"
    # torchrun takes --num for the beginning of one of its own options, also behind the module's name.
    add("--num", "--count", type=int, metavar="N", help=text)
    add("--seed", type=int, default=0, help="of each prompt's first sample, the others count up (default: 0)")
    add("--unknown-words", choices=("error", "fill"), default="error", help="fill: treat them like _ (default: error)")


def _add_solver(add) -> None:
    add("--steps", type=int, default=25, help="steps of the solver, for each modality in an --order (default: 25)")
    add("--solver", choices=SOLVERS, help="(default: dpm++; ddpm where a model renoises known parts)")
    text = "of the times: even, or power, shorter towards the end (default: even for the cosine schedule, else power)"
    add("--spacing", choices=SPACINGS, help=text)
    add("--eta", type=float, default=0.0, help="of solver ddim: 0 deterministic, 1 as noisy as ddpm (default: 0)")
    text = "together, or modalities in the order in which they are generated, such as text,image (default: the model's)"
    add("--order", type=_order, help=text)
    add("--guidance", type=float, metavar="W", help="guidance scale, 1 for no guidance (default: by task)")
    text = "of words, for models that give their probabilities: below 1 likelier words more often (default: by task)"
    add("--temperature", type=float, metavar="T", help=text)
    text = "what the second pass drops (default: masked; alternate for --order together with nothing given)"
    add("--guidance-kind", choices=GUIDANCE_KINDS, help=text)
    text = "guide only this part of the way, 0 to 1; the rest takes one pass instead of two (default: all of it)"
    add("--guidance-interval", nargs=2, type=float, metavar=("START", "END"), help=text)
    text = "an approximation: run the inner blocks at every K-th step only (default: 1, all steps)"
    add("--step-cache", type=int, default=1, metavar="K", help=text)
    add("--resample", type=int, default=1, metavar="R", help="RePaint: do each stretch of steps R times (default: 1)")
    add("--jump", type=int, default=5, metavar="J", help="RePaint: steps of a stretch (default: 5)")
    text = "langevin: fit known parts in by inner steps, for models that renoise them (default: repaint)"
    add("--infill", choices=INFILLS, default=Request.infill, help=text)
    text = f"Langevin: further calls of the model at each step (default: {Request.inner_steps})"
    add("--inner-steps", type=int, default=Request.inner_steps, metavar="K", help=text)
    text = f"Langevin: in units of the noise's variance (default: {Request.step_size:g})"
    add("--step-size", type=float, default=Request.step_size, metavar="SIZE", help=text)


def _add_engine(add) -> None:
    add_model(add)
    add("--attention", choices=ATTENTIONS, default="auto")
    text = "a LoRA adapter of the checkpoint, from engine.train --lora or peft"
    add("--adapter", action=Once, type=path, metavar="DIR", help=text)
    text = "how much of the adapter is added to the weights (default: 1)"
    add("--adapter-scale", type=float, default=1.0, metavar="S", help=text)
    text = "compile all that can be: on a CPU once, for all later runs too, with --compile or without"
    add("--compile", action="store_true", help=text)
    add_quantize(add)
    add("--no-graphs", action="store_true", help="capture no CUDA graphs, which only CUDA has")
    text = "where the images go, in place of those of an earlier run (default: samples)"
    add("--out", type=path, default=Path("samples"), metavar="DIR", help=text)
    add("--json", action="store_true", help="print samples.json and nothing else")
    add("--quiet", action="store_true", help="print nothing")
    text = "say which implementation and dtype are used and why, and how near the run was to the machine's limits"
    add("--verbose", action="store_true", help=text)


def _add_bulk(add) -> None:
    what = add.__self__.add_mutually_exclusive_group().add_argument
    text = "an image of each line, or of captions drawn at random from a captions_….json of MS-COCO"
    what("--prompts", action=Once, type=path, metavar="FILE", help=text)
    text = "a text of each image of a data set in MS-COCO captions layout"
    what("--images", action=Once, type=path, metavar="DIR", help=text)
    what("--joint", action=Once, type=int, metavar="N", help="N joint samples")
    add("--split", default="val", help="of the data set of --images (default: %(default)s)")
    add("--shards", type=int, default=0, metavar="N", help="write N tar files, as WebDataset has them, instead of PNGs")
    add("--batch", type=int, default=64, metavar="N", help="samples computed together (default: %(default)s)")


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not NAME=VALUE; name a modality and its value")
    return name, value


def _order(text: str) -> str | tuple[str, ...]:
    return text if text == "together" else tuple(text.split(","))


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.checkpoint is None and (options.sketch is not None or "sketch" in dict(options.input)):
        options.checkpoint = MODELS["emoji-sketch"]
    if options.verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr
    try:
        if options.prompts or options.images or options.joint is not None:
            from engine.sample_bulk import run_bulk

            return run_bulk(options)
        requests = _requests(options)
        check_writable(options.out)
        report, listed, failed = _run(options, requests)
    except InputError as error:
        return refuse(COMMAND, _about_options(error), vars(options))
    except (ValueError, FloatingPointError) as error:
        return refuse(COMMAND, error, vars(options))
    if options.json:
        is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        print(to_json(report, ascii=not is_unicode))
    elif not options.quiet:
        timing = report[-1]["timing"]
        print(f"{len(report) - 1} samples in {options.out} ({', '.join(listed)}); "
              f"{timing['seconds_per_image']:.2f} s per image, {timing['total']:.1f} s in all")  # fmt: skip
    return 0 if failed is None else refuse(COMMAND, failed)


def _requests(options: argparse.Namespace) -> list[Request]:
    joint = options.prompt is None and options.image is None and options.sketch is None and not options.input
    num = options.num if options.num is not None else JOINT_NUM if joint else 1
    same = {key: getattr(options, key) for key in (
        "image", "mask", "task", "steps", "solver", "guidance", "seed", "resample", "jump", "unknown_words",
        "step_cache", "order", "eta", "guidance_kind", "spacing", "infill", "inner_steps", "step_size", "sketch",
        "sketch_mask", "adapter_scale", "temperature",
    )}  # fmt: skip
    same["adapter"] = ADAPTER if options.adapter else None
    interval = tuple(options.guidance_interval) if options.guidance_interval else None
    given = {"inputs": _once("input", options.input), "masks": _once("input_mask", options.input_mask)}
    return [
        Request(prompt, num=num, guidance_interval=interval, **given, **same) for prompt in options.prompt or [None]
    ]


def _inputs(options: argparse.Namespace) -> list[tuple[str, Path]]:
    """(option, file) of all files that are read, and the texts given as --input, which could be names of files too."""
    named = [(option, Path(file)) for option in ("input", "input_mask") for _, file in getattr(options, option)]
    options_of_files = ("image", "mask", "sketch", "sketch_mask")
    given = [(option, getattr(options, option)) for option in options_of_files if getattr(options, option)]
    folders = [(key, getattr(options, key)) for key in ("checkpoint", "adapter") if getattr(options, key)]
    return [*given, *named, *((key, file) for key, folder in folders for file in files_within(folder))]


def _about_options(error: InputError) -> InputError:
    """An error about inputs['sketch'] of a request as one about --input."""
    options = {"inputs": "input", "masks": "input_mask"}
    names = [options.get(name.partition("[")[0], name) for name in error.argument.split(", ")]
    return InputError(", ".join(dict.fromkeys(names)), error.value, error.remedy, error.problem)


def _once(option: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    names = [name for name, _ in pairs]
    for name, value in pairs:
        if names.count(name) > 1:
            raise InputError(option, f"{name}={value}", "give each modality once", "is given twice")
    return dict(pairs)


def _run(options: argparse.Namespace, requests: list[Request]) -> tuple[list[dict], list[str], Exception | None]:
    """Generates and writes all files.

    Returns the content of samples.json, which of `grid.png` and `samples.json` were written, and the error about
    samples that are not finite. Raises that error if no sample is finite.
    """
    started = time.perf_counter()
    # Late, so that --help and bad options answer at once.
    from tqdm import tqdm

    from engine.images import images_up_to_the_limit
    from engine.runtime import Engine

    with Engine.from_pretrained(
        options.checkpoint, device=options.device, dtype=options.dtype, attention=options.attention,
        compile=options.compile, graphs=not options.no_graphs, quantize=options.quantize,
        adapters={ADAPTER: options.adapter} if options.adapter else None,
    ) as engine:  # fmt: skip
        loaded = time.perf_counter()
        images = [name for name, codec in engine.config.codecs.items() if codec.kind == "image"]
        count = sum(request.num for request in requests)
        check_files(options.out, [image_file(i, name) for name in images for i in range(count)], _inputs(options))
        # disable=None: only on a terminal.
        with tqdm(desc="sampling", unit="step", disable=options.quiet or options.json or None) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            with images_up_to_the_limit():
                try:
                    results, failed = engine.generate(requests, show), None
                except NotFiniteSamplesError as error:
                    results, failed = error.results, error
        generated = time.perf_counter()
        if options.verbose:
            _log_speed(engine)

    samples = [(result, sample) for result in results for sample in result.samples]
    if not samples:
        raise failed
    report = [_described(i, result, sample) for i, (result, sample) in enumerate(samples)]
    timing = {
        "load": round(loaded - started, 3),
        "generate": round(generated - loaded, 3),
        "total": round(generated - started, 3),
        "seconds_per_image": round((generated - loaded) / len(samples), 4),
    }
    report.append({"timing": timing})
    return report, write(options.out, [sample for _, sample in samples], report), failed


def _described(i: int, result: Result, sample: Sample) -> dict:
    """A sample's entry in samples.json: images as file names; `outputs` has all modalities."""
    outputs = {name: image_file(i, name) if is_image(value) else value for name, value in sample.outputs.items()}
    return {
        "task": result.task,
        "prompt": result.request.prompt,
        **{name: outputs[name] for name in ("image", "text") if name in outputs},
        "outputs": outputs,
        "seed": sample.seed,
        "steps": result.request.steps,
        "solver": result.solver,
        "spacing": result.spacing,
        "order": list(result.order) or "together",
        "guidance": result.guidance,
    }


def _log_speed(engine) -> None:
    """What the sampling achieved, and what part it is of what the machine was measured to reach."""
    from engine.device import ceilings

    stats, log = engine.stats(), logging.getLogger("engine.sample")
    seconds, dtype = stats.sample_seconds, str(engine.dtype).removeprefix("torch.")
    most = ceilings(engine.device, (engine.dtype,), tries=3)
    log.info(
        "%d forwards in %.2f s: %.1f GFLOP/s of matrix products in %s, %.0f %% of the %.1f measured here; "
        "%.1f GB/s at least, %.0f %% of a copy's %.1f",
        stats.forwards, seconds, stats.flops / seconds / 1e9, dtype, 100 * stats.flops / seconds / most[dtype],
        most[dtype] / 1e9, stats.bytes / seconds / 1e9, 100 * stats.bytes / seconds / most["copy"],
        most["copy"] / 1e9,
    )  # fmt: skip


if __name__ == "__main__":
    run(COMMAND, main)
