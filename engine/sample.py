"""Sampling from the command line: `python -m engine.sample`; see `--help`, and README.md for examples.

Parse, generate, write: everything else is `engine.runtime`. Pictures are written under a temporary name and renamed,
so that a run that fails leaves nothing half-written.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from engine.command import Parser, check_writable, path, refuse
from engine.request import ATTENTIONS, MAX_NUM, SOLVERS, TASKS, Request, Sample

COMMAND = "python -m engine.sample"
JOINT_NUM = 16  # samples of a run that asks for nothing


def _parser() -> Parser:
    text = "Sample pictures and texts; without arguments, a joint grid."
    parser = Parser(COMMAND, description=text)
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="words, _ for each one to be filled in; may be given again")
    add("--image", type=path, metavar="FILE", help="a picture to describe, or to infill with --mask or _ in --prompt")
    add("--mask", type=path, metavar="FILE", help="white where the picture is to be regenerated")
    add("--task", choices=TASKS, default="auto", help="checks the task that the other options make (default: auto)")
    add(
        "--num",
        type=int,
        metavar="N",
        help=f"samples of each prompt, at most {MAX_NUM} (default: 1; joint: {JOINT_NUM})",
    )
    add("--steps", type=int, default=25, help="steps of the solver (default: 25)")
    add("--solver", choices=SOLVERS, default="dpm++")
    add("--guidance", type=float, metavar="W", help="guidance scale, 1 is none (default: by task)")
    add(
        "--guidance-interval",
        nargs=2,
        type=float,
        metavar=("START", "END"),
        help="guide only this part of the way, 0 to 1; the rest takes one pass instead of two (default: all of it)",
    )
    add(
        "--step-cache",
        type=int,
        default=1,
        metavar="K",
        help="an approximation: run the inner blocks at every K-th step only (default: 1, all steps)",
    )
    add("--seed", type=int, default=0, help="of each prompt's first sample, the others count up (default: 0)")
    add("--resample", type=int, default=1, metavar="R", help="RePaint: do each stretch of steps R times (default: 1)")
    add("--jump", type=int, default=5, metavar="J", help="RePaint: steps of a stretch (default: 5)")
    add("--unknown-words", choices=("error", "fill"), default="error", help="fill: treat them like _ (default: error)")
    add(
        "--checkpoint",
        type=path,
        metavar="DIR",
        help="a folder that engine.train has written (default: the built-in model)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    add("--attention", choices=ATTENTIONS, default="auto")
    add("--compile", action="store_true", help="compile the model; pays from some dozens of samples on")
    add("--no-graphs", action="store_true", help="capture no CUDA graphs, which only CUDA has")
    add("--out", type=path, default=Path("samples"), metavar="DIR", help="where the pictures go (default: samples)")
    add("--json", action="store_true", help="print samples.json and nothing else")
    add("--quiet", action="store_true", help="print nothing")
    add("--verbose", action="store_true", help="say which implementation each operation runs on")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr
    try:
        requests = _requests(options)
        check_writable(options.out, _files(sum(request.num for request in requests)))
        report = _run(options, requests)
    except ValueError as error:
        return refuse(COMMAND, error, vars(options))
    if options.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    elif not options.quiet:
        timing = report[-1]["timing"]
        print(f"{len(report) - 1} samples in {options.out} (grid.png, samples.json); "
              f"{timing['seconds_per_image']:.2f} s per image, {timing['total']:.1f} s in all")  # fmt: skip
    return 0


def _requests(options: argparse.Namespace) -> list[Request]:
    joint = options.prompt is None and options.image is None
    num = options.num if options.num is not None else JOINT_NUM if joint else 1
    return [
        Request(
            prompt, options.image, options.mask, options.task, num, options.steps, options.solver, options.guidance,
            options.seed, options.resample, options.jump, options.unknown_words,
            tuple(options.guidance_interval) if options.guidance_interval else None, options.step_cache,
        )
        for prompt in options.prompt or [None]
    ]  # fmt: skip


def _run(options: argparse.Namespace, requests: list[Request]) -> list[dict]:
    """Generates, writes all files and returns what samples.json says."""
    started = time.perf_counter()
    # Late, so that --help and bad options answer at once.
    from tqdm import tqdm

    from engine.data.coco import pictures_up_to_the_limit
    from engine.runtime import Engine

    with Engine.from_pretrained(
        options.checkpoint, device=options.device, dtype=options.dtype, attention=options.attention,
        compile=options.compile, graphs=not options.no_graphs,
    ) as engine:  # fmt: skip
        loaded = time.perf_counter()
        # disable=None: only on a terminal.
        with tqdm(desc="sampling", unit="step", disable=options.quiet or options.json or None) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            with pictures_up_to_the_limit():
                results = engine.generate(requests, show)
    generated = time.perf_counter()

    samples = [(result, sample) for result in results for sample in result.samples]
    report = [
        {
            "task": result.task,
            "prompt": result.request.prompt,
            "text": sample.text,
            "image": f"{i:04d}.png",
            "seed": sample.seed,
            "steps": result.request.steps,
            "solver": result.request.solver,
            "guidance": result.guidance,
        }
        for i, (result, sample) in enumerate(samples)
    ]
    timing = {
        "load": round(loaded - started, 3),
        "generate": round(generated - loaded, 3),
        "total": round(generated - started, 3),
        "seconds_per_image": round((generated - loaded) / len(samples), 4),
    }
    report.append({"timing": timing})
    _write(options.out, [sample for _, sample in samples], report)
    return report


def _files(samples: int) -> list[str]:
    return [*(f"{i:04d}.png" for i in range(samples)), "grid.png", "samples.json"]


def _write(out: Path, samples: list[Sample], report: list[dict]) -> None:
    """Pictures, grid and samples.json; each appears whole or not at all."""
    from engine.pictures import grid

    sheet = grid([sample.image for sample in samples], [sample.text for sample in samples])
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".writing-") as folder:
            for i, sample in enumerate(samples):
                sample.image.save(Path(folder, f"{i:04d}.png"))
            sheet.save(Path(folder, "grid.png"))
            Path(folder, "samples.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
            for file in sorted(Path(folder).iterdir()):
                os.replace(file, out / file.name)
    except OSError as error:
        raise ValueError(f"out: {out} cannot be written ({error.strerror}); give another folder") from None


if __name__ == "__main__":
    sys.exit(main())
