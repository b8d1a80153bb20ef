"""RESULTS.md, the page to read first: what was asked, what was measured, where it falls short, what is missing."""

import re
from collections.abc import Iterator
from itertools import product

from benchmarks.descriptions import DESCRIPTIONS, INTRODUCTION
from benchmarks.questions import QUESTIONS, Answer, Question, answers
from benchmarks.stored import rows_by_group
from benchmarks.tables import experiment_table, table

# How names of groups begin, beside those of kernels.
BENCHMARKS = (
    "forward", "loop", "peers", "sampling", "joint order", "hand-over", "training", "service", "start", "energy"
)  # fmt: skip
QUALITY = ("image error", "text error")
# By experiment, the models that are compared: each of the first with each of the second.
COMPARED = {
    "architecture": (
        ("PS-U-Net", "PS-U-Net, independent times"),
        ("U-ViT-multi, equal parameters", "U-ViT-multi, equal parameters, equal training compute"),
    ),
    "modalities": (("image, text, sketch", "image, text, sketch, equal training compute"), ("image, text",)),
}


def first_page(runs: dict[str, dict], tables: str) -> str:
    """The text; `runs` by name, in the order of their sections in the file `tables`."""
    missing = _missing(list(runs.values()))
    parts = ["# Results", INTRODUCTION]
    timed = {name: run for name, run in runs.items() if "experiment" not in run}
    for device in dict.fromkeys(_machine(run)["device"] for run in timed.values()):
        parts += _of_device(device, {n: run for n, run in timed.items() if _machine(run)["device"] == device})
    parts += _quality(runs)
    parts += _long_texts(runs)
    if missing:
        parts += ["## What was not measured", "\n".join(f"* {sentence}" for sentence in missing)]
    parts += ["## Runs", table(["run", "measured", "date", "commit", "device"], list(_runs(runs, tables)))]
    return "\n\n".join(parts)


def _machine(run: dict) -> dict:
    return run["machine"] if "experiment" in run else run["machine_info"]["engine"]


def _of_device(device: str, runs: dict[str, dict]) -> list[str]:
    """The answers of all runs of a device; where several have the same group, those of the latest run."""
    groups: dict[str, list[dict]] = {}
    for run in sorted(runs.values(), key=lambda run: run["datetime"]):
        groups |= rows_by_group(run)
    found = {question: list(answers(question, groups)) for question in QUESTIONS}
    lines = [_line(question, some) for question, some in found.items() if some]
    if not lines:
        return []
    parts = [
        f"## Speed on {device}",
        "The ratio is that of the median times, of the service that of the 95th percentiles: lowest to highest over "
        "all comparisons. It is undecided where the interquartile ranges overlap.",
        table(["asked", "at most", "ratio", "holds in", "undecided in"], lines),
    ]
    short = [(answer, question) for question, some in found.items() for answer in some if answer.verdict == "no"]
    if short:
        parts += [f"## Where it falls short on {device}", "\n".join(_short(short))]
    return parts


def _line(question: Question, some: list[Answer]) -> list[str]:
    ratios = sorted(answer.ratio for answer in some)
    low, high = (f"{ratio:.2f}" for ratio in (ratios[0], ratios[-1]))
    counts = {verdict: sum(answer.verdict == verdict for answer in some) for verdict in ("yes", "undecided")}
    return [question.text, f"{question.target:g}", low if low == high else f"{low} to {high}",
            f"{counts['yes']} of {len(some)}", str(counts["undecided"] or "")]  # fmt: skip


def _short(short: list[tuple[Answer, Question]]) -> Iterator[str]:
    """One line for each question: the worst answer first, and how many more there are."""
    by_question: dict[Question, list[Answer]] = {}
    for answer, question in sorted(short, key=lambda pair: -pair[0].ratio / pair[1].target):
        by_question.setdefault(question, []).append(answer)
    for question, (worst, *others) in by_question.items():
        more = f", and {len(others)} more" if others else ""
        yield (
            f"* **{worst.ratio:.2f}** instead of at most {question.target:g}: {question.ours} against {worst.theirs}, "
            f"in {worst.group}{more}."
        )


def _quality(runs: dict[str, dict]) -> list[str]:
    """What the experiments in COMPARED found, in a table; the other experiments are in TABLES.md."""
    lines = []
    for name, run in runs.items():
        if run.get("experiment") not in COMPARED:
            continue
        rows = {row["model"]: row for row in run["rows"]}
        for ours, theirs in product(*COMPARED[run["experiment"]]):
            if ours in rows and theirs in rows and all(key in rows[theirs] for key in QUALITY):
                ratios = (f"{rows[ours][key] / rows[theirs][key]:.2f}" for key in QUALITY)
                spread = rows[ours].get(f"± {QUALITY[0]}")
                seeds = spread if isinstance(spread, str) else "several seeds"
                steps = " and ".join(dict.fromkeys(str(rows[model]["steps"]) for model in (ours, theirs)))
                lines.append([f"{ours} against {theirs}", *ratios, f"{steps}, {seeds}", name])
    if not lines:
        return []
    text = "Ratios of the errors on held-out images at the end of training; below 1, the model named first is better."
    return ["## Quality", text, table(["compared", *QUALITY, "steps", "run"], lines)]


def _long_texts(runs: dict[str, dict]) -> list[str]:
    """What the experiment on autoregression found: its table, and texts drawn at random."""
    parts = []
    for name, run in runs.items():
        if run.get("experiment") == "autoregression":
            description = DESCRIPTIONS["autoregression"]
            parts += [
                f"## {description.title}",
                f"{description.text} The run is {name}.",
                experiment_table(run["rows"]),
            ]
            for kind, texts in run["samples"].items():
                parts += [f"Drawn at random, {kind}:", "\n".join(f"* {text or '(no word)'}" for text in texts)]
    return parts


def _runs(runs: dict[str, dict], tables: str) -> Iterator[list[str]]:
    for name, run in runs.items():
        if "experiment" in run:
            title = f"{name}: {DESCRIPTIONS[run['experiment']].title}"
            what, date, commit = DESCRIPTIONS[run["experiment"]].title, run["date"], run["commit"]
        else:
            title, date, commit = name, run["datetime"], run["commit_info"].get("id") or "unknown"
            begun = [group.split(",")[0] for group in rows_by_group(run)]
            kinds = [kind for kind in dict.fromkeys(begun) if kind in BENCHMARKS]
            what = ", ".join([*kinds, "kernels"] if set(begun) - set(BENCHMARKS) else kinds)
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        yield [f"[{name}]({tables}#{anchor})", what, date[:10], f"`{commit[:10]}`", _machine(run)["device"]]


def _missing(runs: list[dict]) -> list[str]:
    """What no stored run has measured, in sentences."""
    timed = [run for run in runs if "experiment" not in run]
    groups = {group.split(",")[0] for run in timed for group in rows_by_group(run)}
    sentences = []
    if not any("cuda" in run["machine_info"]["engine"] for run in timed):
        sentences.append("Anything on a GPU: captured forwards, energy, the coco256 preset, its training rate, and so "
                         "the time that the paper's MS-COCO training would take.")  # fmt: skip
    benchmarks = [name for name in BENCHMARKS if name not in groups]
    if benchmarks:
        sentences.append(f"The benchmarks of {', '.join(benchmarks)}.")
    experiments = DESCRIPTIONS.keys() - {run.get("experiment") for run in runs}
    if experiments:
        sentences.append(f"The experiments on {', '.join(sorted(experiments))}.")
    return sentences
