"""How good a checkpoint is on captioned images: `python -m engine.evaluate --checkpoint DIR --data data/emoji`.

For names that were trained on and for held-out names (a name is an image's first caption), the same number of each:

    retrieval_base    text-to-image: how often the nearest image of all (L2 over pixels at the model's size) has the
                      prompt's base name, the part before ":"
    retrieval_exact   how often it has the prompt's whole name
    reordered_exact   the same of prompts whose words are in a random order
    keyword_retrieval  text-to-image of one of the image's further captions, such as a keyword of an emoji: how often
                      the nearest image of all has that caption; images with one caption are left out
    word_f1           image-to-text: word F1 of the generated text against the name
    caption_exact     how often the generated text is the name
    infill_rmse       infilling: root mean square error in levels of 0…255 inside the mask, which is the left half of
                      the image; the name is given
    autoencoder_psnr  encoding and decoding alone, in dB
    classes           the first six for each class of name, with its count: flags, other names with ":" (compositions),
                      faces and objects, see `engine.data.emoji.name_class`. The tables leave out a single class
    disturbed         word_f1 and caption_exact of changed images, see `engine.data.disturb`

For a model that has sketches, of sketches that are drawn from the images (`engine.data.sketch`):

    retrieval_base, retrieval_exact   sketch-to-image+text: as above, of the image generated for a sketch
    word_f1           of the text generated for a sketch against the name
    edge_f1           image-to-sketch: F1 of the dark pixels of the generated sketch against those of a drawn one, where
                      one may lie a pixel beside the other
    edge_f1_drawn     the same of two drawn ones, for comparison: no two are alike

For joint samples, of which nothing is given and everything is generated, image and text:

    word_f1           of each sample's text against the name of the image that is nearest to the sample's image
    distinct_images   how many different images are the nearest of a sample
    nearest_rmse      root mean square distance to the nearest image in levels, the mean over the samples

With --json, one object: "train" and "test" with "count" (images) and the keys above; "joint" with "count" (samples),
"seed", "order" (in which the modalities were generated, the checkpoint's default; [] for all together) and its keys
above; "skipped", what this model cannot do and why. The scores of skipped tasks are null. "train" and "test" of a model
with sketches have "sketch", with "count" and its keys. Other modalities are generated with these and not scored.

With --samples, a folder that `engine.sample` has written in bulk (or any of images, .txt and .json) is scored against
the images and captions of --data, split --split. Each score has a 95 % interval (bootstrap) and a count:

    FID               with --inception: the Fréchet distance of Inception's features, images at the samples' size
    FD(…)             the same of other features: the built-in autoencoder's, or those of --features
    diversity FD(…)   mean distance of two samples' features as a part of that of two of the data's images
    CLIP score, R@k   with --clip: agreement of images and texts; how often the own image, or text, of all is in the k
                      nearest
    BLEU, ROUGE-L, CIDEr   of generated texts of the data's images, as pycocoevalcap computes them
    perplexity        of generated texts under 3-grams of the captions (for comparison: of captions it has not learned),
                      and under a --language-model
    distinct-n        different n-grams as a part of all
"""

import argparse
import json
from dataclasses import asdict, fields, replace

from engine.command import Parser, add_model, path, refuse, run
from engine.data.sources import open_captioned
from engine.device import resolve_device
from engine.errors import InputError, errors_named
from engine.evaluation import (
    JOINT_SAMPLES,
    Gallery,
    NameScores,
    Scores,
    evaluate,
    evaluate_disturbed,
    evaluate_joint,
    evaluate_sketches,
    evaluated_modalities,
    skipped_tasks,
    spread,
)
from engine.metrics.report import MeasureOptions, measure
from engine.request import SOLVERS, SPACINGS, Request
from engine.runtime import Engine

COMMAND = "python -m engine.evaluate"


def _parser() -> Parser:
    parser = Parser(COMMAND, description=__doc__)
    add = parser.add_argument
    add_model(add)
    add("--data", type=path, required=True, help="folder of images, captions.json and captions_test.json")
    add("--count", type=int, default=0, help="names of each split, evenly spaced (default: as many as are held out)")
    add("--joint-count", type=int, default=JOINT_SAMPLES, help="joint samples, 0 for none (default: %(default)s)")
    add("--disturbed", action=argparse.BooleanOptionalAction, default=True,
        help="describe changed images too, which takes most of the time (default: yes)")  # fmt: skip
    add("--steps", type=int, default=25, help="steps of the solver (default: %(default)s)")
    add("--solver", choices=SOLVERS, help="default: the model's")
    add("--spacing", choices=SPACINGS, help="of the steps' times (default: the schedule's)")
    add("--seed", type=int, default=0, help="of the first sample of every task (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    _add_samples(parser.add_argument_group("a folder of samples").add_argument)
    return parser


def _add_samples(add) -> None:
    add("--samples", type=path, metavar="DIR", help="score these instead of sampling a checkpoint")
    add("--split", default="val", help="of the data (default: %(default)s)")
    text = "features: a TorchScript file that takes uint8 [B, 3, S, S], or the folder of a diffusers autoencoder"
    add("--features", type=path, metavar="PATH", help=f"{text} (default: the built-in one)")
    text = "FID: torch-fidelity's weights-inception-2015-12-05-6726825d.pth; needs [evaluate]"
    add("--inception", type=path, metavar="FILE", help=text)
    add("--clip", type=path, metavar="DIR", help="a CLIP model of transformers; needs [evaluate]")
    add("--language-model", type=path, metavar="DIR", help="a causal one of transformers; needs [evaluate]")
    add("--bootstrap", type=int, default=200, metavar="N", help="resamples, 0 for no intervals (default: %(default)s)")
    add("--no-cache", action="store_true", help="keep no statistics of the data's images under ~/.cache")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: bad input, reported in one line)."""
    options = _parser().parse_args(arguments)
    try:
        report = _run(options) if options.samples is None else _measure(options)
    except (InputError, FloatingPointError) as error:
        return refuse(COMMAND, error, vars(options))
    if options.json:
        print(json.dumps(report, indent=2))
    elif options.samples is not None:
        _print_scores(report)
    else:
        _print_tables(report)
    return 0


def _measure(options: argparse.Namespace) -> dict:
    if options.checkpoint is not None:
        raise InputError("checkpoint", options.checkpoint, "leave out one of them", "conflicts with samples")
    for key, highest in (("bootstrap", 100_000), ("seed", 2**63 - 1)):
        if not 0 <= getattr(options, key) <= highest:
            raise InputError(key, getattr(options, key), f"use a whole number from 0 to {highest}", "is out of range")
    given = {field.name: getattr(options, field.name) for field in fields(MeasureOptions) if field.name != "cache"}
    return measure(MeasureOptions(**given, cache=not options.no_cache), resolve_device(options.device))


def _print_scores(report: dict) -> None:
    width = max(map(len, report["scores"]), default=0) + 2
    print(f"{'':{width}}{'value':>12}{'95 % interval':>26}{'count':>9}")
    for name, score in report["scores"].items():
        interval = f"{score['low']:.5g} … {score['high']:.5g}" if score["low"] != score["high"] else "-"
        print(f"{name:{width}}{score['value']:12.5g}{interval:>26}{score['count']:9}")
    reference = report["reference"]
    print(f"against the {reference['images']} images of {reference['split']} and their captions")
    for what, reason in report["skipped"].items():
        print(f"{what} skipped: {reason}")


def _run(options: argparse.Namespace) -> dict:
    for key in ("count", "joint_count"):
        if getattr(options, key) < 0:
            raise InputError(key, getattr(options, key), "use a whole number from 0", "is out of range")
    how = Request(steps=options.steps, solver=options.solver, spacing=options.spacing, seed=options.seed)
    with Engine.from_pretrained(options.checkpoint, device=options.device, dtype=options.dtype) as engine:
        size = engine.config.codecs[evaluated_modalities(engine.config)[0]].settings["size"]
        with errors_named("data"):
            data = {split: open_captioned(options.data, split) for split in ("train", "test")}
        splits = {split: list(dataset.read(size)) for split, dataset in data.items()}
        for split, pairs in splits.items():
            if not pairs:
                raise InputError("data", options.data, "render or copy it again", f"has no readable {split} image")
        gallery = Gallery.of([pair for pairs in splits.values() for pair in pairs])
        count = options.count or len(splits["test"])
        report = {}
        for split, pairs in splits.items():
            chosen = spread(pairs, count)
            report[split] = asdict(evaluate(engine, chosen, gallery, how))
            sketches = evaluate_sketches(engine, chosen, gallery, how)
            if sketches is not None:
                report[split]["sketch"] = asdict(sketches)
            if options.disturbed:
                images = list(replace(data[split], items=tuple(item for item, _ in chosen)).images())
                report[split]["disturbed"] = evaluate_disturbed(engine, images, how)
        joint = evaluate_joint(engine, gallery, how, options.joint_count) if options.joint_count else None
        return report | {"joint": asdict(joint) if joint else None, "skipped": skipped_tasks(engine.config)}


def _print_tables(report: dict) -> None:
    splits = {split: report[split] for split in ("train", "test")}
    rows = [(key, [scores[key] for scores in splits.values()]) for key in _keys(Scores)]
    _print_table(list(splits), rows)
    for split, scores in splits.items():
        if len(scores["classes"]) > 1:
            print(f"\n{split} by class of name")
            _print_table(_keys(NameScores), [(kind, list(means.values())) for kind, means in scores["classes"].items()])
        if sketch := scores.get("sketch"):
            print(f"\n{split} sketches")
            _print_table(list(sketch)[1:], [(f"of {sketch['count']} images", list(sketch.values())[1:])])
        if scores.get("disturbed"):
            print(f"\n{split} images changed")
            changed = scores["disturbed"]
            _print_table(["word_f1", "caption_exact"], [(label, list(of.values())) for label, of in changed.items()])
    if joint := report["joint"]:
        order = f"order {', '.join(joint['order'])}" if joint["order"] else "all modalities together"
        print(f"\n{joint['count']} joint samples ({order}, seed {joint['seed']}): word_f1 {joint['word_f1']:.4g}, "
              f"distinct_images {joint['distinct_images']}, nearest_rmse {joint['nearest_rmse']:.4g}")  # fmt: skip
    for task, reason in report["skipped"].items():
        print(f"{task} skipped: {reason}")


def _keys(scores: type) -> list[str]:
    """The names of single numbers."""
    return [field.name for field in fields(scores) if field.name != "classes"]


def _print_table(columns: list[str], rows: list[tuple[str, list[float | None]]]) -> None:
    print(f"{'':18}" + "".join(f"{column:>19}" for column in columns))
    for label, values in rows:
        print(f"{label:18}" + "".join(f"{'-':>19}" if v is None else f"{v:19.4g}" for v in values))


if __name__ == "__main__":
    run(COMMAND, main)
