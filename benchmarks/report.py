"""Writes RESULTS.md and its plots from stored runs, and compares one run with another of the same machine.

python -m benchmarks.report                          all of benchmarks/results/*.json
python -m benchmarks.report --compare NEW OLD        ratios of two runs of `pytest benchmarks/ --benchmark-json FILE`
"""

import json
import statistics
from pathlib import Path

from benchmarks.descriptions import DESCRIPTIONS, INTRODUCTION
from engine.command import Parser, path, refuse
from engine.command import run as run_command
from engine.errors import InputError, errors_named

COMMAND = "python -m benchmarks.report"
HERE = Path(__file__).parent
COMPARABLE = ("device", "threads", "torch", "power_limit_watts")  # that two runs must share to be compared
PAPER_SAMPLES = 1_000_000 * 256  # U-ViT's training on MS-COCO, which the coco256 recipe follows: steps × batch
# How names of groups begin, beside those of kernels.
BENCHMARKS = ("forward", "loop", "sampling", "joint order", "hand-over", "training", "service", "start", "energy")
# Contenders compared round by round, by the beginning of the group's name.
BY_ROUNDS = {"hand-over": ("Engine.generate", "calling thread"), "service, HTTP": ("HTTP", "Engine.submit")}
RENAMED = {  # keys of runs that were stored before, and what they are called now
    "pictures_per_second": "images_per_second",
    "joules_per_picture": "joules_per_image",
    "first picture": "first image",
    "way": "curve",
    "seconds drawing": "seconds text-to-image",
    "± seconds drawing": "± seconds text-to-image",
    "seconds telling": "seconds image-to-text",
    "± seconds telling": "± seconds image-to-text",
}


def read(file: Path) -> dict:
    """A stored run: pytest-benchmark's JSON, or an experiment's. Raises InputError about "results" if it is neither."""
    remedy = "give a file of `pytest benchmarks/ --benchmark-json FILE`"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("results", file, remedy, f"cannot be read as JSON ({error})") from None
    is_run = isinstance(stored, dict) and (
        stored.get("experiment") in DESCRIPTIONS or "engine" in stored.get("machine_info", {})
    )
    if not is_run:
        raise InputError("results", file, remedy, "is not a run of these benchmarks")
    return _renamed(stored)


def _renamed(stored):
    """A value of JSON with the keys that it would have now."""
    if isinstance(stored, dict):
        return {RENAMED.get(key, key): _renamed(value) for key, value in stored.items()}
    return [_renamed(value) for value in stored] if isinstance(stored, list) else stored


def compare(new: dict, old: dict, tolerance: float) -> tuple[list[str], bool]:
    """(a table of ratios new/old of the medians, whether no benchmark is slower).

    The machine as a whole may have become slower: the median of all ratios is that drift. A benchmark is slower if its
    ratio, divided by the drift, is above `tolerance`. Raises InputError about "compare" for runs without common times.
    """
    if "experiment" in new or "experiment" in old:
        raise InputError("compare", "an experiment", "give two runs of `pytest benchmarks/`", "has no times to compare")
    machines = [run["machine_info"]["engine"] for run in (new, old)]
    differing = [key for key in COMPARABLE if machines[0].get(key) != machines[1].get(key)]
    if differing:
        values = ", ".join(f"{key} {machines[0].get(key)!r} and {machines[1].get(key)!r}" for key in differing)
        raise InputError("compare", values, "give runs of the same machine", "is of different machines")
    before = {b["fullname"]: b["stats"]["median"] for b in old["benchmarks"]}
    ratios = {
        b["fullname"]: b["stats"]["median"] / before[b["fullname"]]
        for b in new["benchmarks"]
        if before.get(b["fullname"]) and not b["name"].startswith("test_energy")
    }
    if not ratios:
        raise InputError("compare", [], "give runs of the same tests", "is what the runs have in common")
    drift = statistics.median(ratios.values())
    lines, none_slower = [f"{len(ratios)} benchmarks in both runs; the median ratio is {drift:.3f}"], True
    for name, ratio in sorted(ratios.items(), key=lambda item: -item[1]):
        slower = ratio / drift > tolerance
        none_slower &= not slower
        lines.append(f"{ratio:8.3f} {ratio / drift:8.3f}  {'SLOWER  ' if slower else ''}{name.partition('::')[2]}")
    return lines, none_slower


def rows_by_group(run: dict) -> dict[str, list[dict]]:
    """A run's results by group, fastest first: what was recorded, the statistics and the share of the ceilings."""
    groups: dict[str, list[dict]] = {}
    ceilings = run["machine_info"]["engine"]["ceilings"]
    for b in run["benchmarks"]:
        row = b["extra_info"] | b["stats"]
        if "flops_per_second" in row:
            row["percent_of_matmul"] = 100 * row["flops_per_second"] / ceilings[row["dtype"]]
        if "bytes_per_second" in row:
            row["percent_of_copy"] = 100 * row["bytes_per_second"] / ceilings["copy"]
        groups.setdefault(b["group"], []).append(row)
    return {group: sorted(rows, key=lambda row: row["median"]) for group, rows in groups.items()}


def markdown(name: str, run: dict, plots: list[str]) -> str:
    """The section of one benchmark run."""
    machine, commit = run["machine_info"]["engine"], run["commit_info"]
    ceilings = machine["ceilings"]
    changed = " with uncommitted changes" if commit.get("dirty") else ""
    parts = [
        f"## {name}",
        f"{_command(run)}, {machine['device']}, commit `{(commit.get('id') or 'unknown')[:10]}`{changed}, "
        f"{run['datetime'][:10]}. "
        + ", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("command", "device", "ceilings"))
        + ".",
        f"Ceilings measured in the same run: copy {ceilings['copy'] / 1e9:.1f} GB/s; matmul "
        + ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in ceilings.items() if dtype != "copy")
        + ".",
        _claims(run),
        *(f"![{plot}]({plot})" for plot in plots),
    ]
    for group, rows in rows_by_group(run).items():
        if group.startswith("energy"):
            parts.append(_energy(group, rows))
        elif group.startswith("start"):
            parts.append(_start(group, rows))
        elif "goodput" in rows[0]:
            parts.append(_load(group, rows))
        else:
            parts.append(_timings(group, rows))
        if group.startswith("loop"):
            parts.append(_loop(rows))
        parts += [_by_rounds(rows, *pair) for prefix, pair in BY_ROUNDS.items() if group.startswith(prefix)]
    for rows in (r for g, r in rows_by_group(run).items() if g == "training, batch 256"):
        for row in rows:
            hours = PAPER_SAMPLES / row["images_per_second"] / 3600
            parts.append(
                f"At this rate, {row['contender']} needs {hours:,.0f} hours on this device for the 256 M samples of "
                "the coco256 recipe."
            )
    return "\n\n".join(part for part in parts if part)


def _command(run: dict) -> str:
    """The command of a run; of runs stored before commands were recorded, the files of its tests."""
    command = run["machine_info"]["engine"].get("command")
    files = sorted({b["fullname"].partition("::")[0] for b in run["benchmarks"]})
    return f"`{command}`" if command else f"{', '.join(f'`{file}`' for file in files)} (options not recorded)"


CLAIMS = (  # (what the paper says, or relies on; prefix of the groups that test it, whose time, over whose time)
    ("Basis of the next two claims: a forward of PS-U-Net takes less time than one of a U-ViT-multi with as many "
     "parameters.",
     "forward,", "PS-U-Net, eager", "U-ViT-multi, equal parameters, eager"),
    ("PS-U-Net samples faster than a U-ViT-multi with as many parameters.",
     "sampling,", "PS-U-Net", "U-ViT-multi, equal parameters"),
    ("PS-U-Net trains faster than a U-ViT-multi with as many parameters.",
     "training,", "PS-U-Net, eager", "U-ViT-multi, eager"),
    ("Guided joint sampling in two passes takes less time than UniDiffuser's three passes, even in one batch.",
     "sampling, guided joint", "alternate, 2 passes", "UniDiffuser, 3 passes in a batch"),
    ("The same against three passes one by one, as UniDiffuser runs them.",
     "sampling, guided joint", "alternate, 2 passes", "UniDiffuser, 3 passes one by one"),
)  # fmt: skip


def _claims(run: dict) -> str:
    """The paper's claims about speed, tested on this machine."""
    lines, by_group = [], rows_by_group(run)
    for claim, prefix, ours, theirs in CLAIMS:
        for group, rows_of_group in by_group.items():
            rows = {row["contender"]: row for row in rows_of_group}
            if group.startswith(prefix) and not group.startswith("sampling, steps") and {ours, theirs} <= set(rows):
                a, b = rows[ours], rows[theirs]
                verdict = "yes" if a["q3"] < b["q1"] else "no" if a["q1"] > b["q3"] else "undecided"
                lines.append([claim, group, f"{a['median'] / b['median']:.2f}", verdict])
                claim = ""
    if not lines:
        return ""
    return (
        "**The paper's claims about speed, tested on this machine.** The ratio is that of the median times; a claim is "
        "undecided where the interquartile ranges overlap. This is about speed only; the experiments are about quality."
        "\n\n" + _table(["claim", "tested on", "ratio", "holds here"], lines)
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _timings(group: str, rows: list[dict]) -> str:
    columns = {
        "contender": lambda r: r["contender"],
        "median": lambda r: _time(r["median"]),
        "IQR": lambda r: _time(r["iqr"]),
        "p95": lambda r: _time(r["p95"]),
        "rounds": lambda r: str(r["rounds"]),
        "× fastest": lambda r: f"{r['median'] / rows[0]['median']:.2f}",
        "calls": lambda r: str(r["calls"]),
        "images/s": lambda r: f"{r['images_per_second']:.4g}",
        "GFLOP/s": lambda r: f"{r['flops_per_second'] / 1e9:.4g}",
        "% of matmul": lambda r: f"{r['percent_of_matmul']:.1f}",
        "% of copy": lambda r: f"{r['percent_of_copy']:.1f}",
        "peak MiB": lambda r: f"{r['peak_bytes'] / 2**20:.1f}",
        "M parameters": lambda r: f"{r['parameters'] / 1e6:.2f}",
    }
    needs = {"calls": "calls", "images/s": "images_per_second", "GFLOP/s": "flops_per_second",
             "% of matmul": "percent_of_matmul", "% of copy": "percent_of_copy", "peak MiB": "peak_bytes",
             "M parameters": "parameters"}  # fmt: skip
    used = [c for c in columns if any(row.get(needs.get(c, "median")) is not None for row in rows)]
    lines = [[columns[c](r) if r.get(needs.get(c, "median")) is not None else "n/a" for c in used] for r in rows]
    return f"### {group}\n\n{_table(used, lines)}"


def _loop(rows: list[dict]) -> str:
    """The sampler's fastest loop against a plain one and against its own products; empty if one of them is missing."""
    median = {row["contender"]: row["median"] for row in rows}
    loops = [name for name in ("captured", "compiled", "eager") if name in median]
    if not loops or not {"plain, float32", "plain", "matrix products and attention alone"} <= set(median):
        return ""
    best, products = min(loops, key=median.get), median["matrix products and attention alone"]
    return (
        f"The fastest loop is {best}: {median['plain, float32'] / median[best]:.2f} times as fast as the plain loop in "
        f"float32 and {median['plain'] / median[best]:.2f} times as fast as the plain loop in the same dtype. It takes "
        f"{median[best] / products:.2f} times as long as its matrix products and attention alone, which are "
        f"{100 * products / median[best]:.0f} % of its time."
    )


def _by_rounds(rows: list[dict], ours: str, theirs: str) -> str:
    """What one contender costs beside another, by the rounds' ratios; empty if one of the two is missing."""
    seconds = {row["contender"]: row["data"] for row in rows}
    if not {ours, theirs} <= set(seconds):
        return ""
    pairs = zip(seconds[ours], seconds[theirs], strict=True)
    lower, middle, upper = (100 * q for q in statistics.quantiles([a / b for a, b in pairs], n=4))
    return (
        f"`{ours}` takes {middle:.1f} % of the time of `{theirs}`, with the same work (median of the rounds; quartiles "
        f"{lower:.1f} % and {upper:.1f} %)."
    )


def _load(group: str, rows: list[dict]) -> str:
    """Latencies of requests that arrive at random times, and the ratios of their 95th percentiles."""
    times, counts = ("p50", "p95", "p99", "queue_p50", "queue_p95"), ("requests", "answered", "goodput")
    lines = [[r["contender"], *(_time(r[t]) for t in times), *(_number(r[c]) for c in counts)] for r in rows]
    header = ["contender", "p50", "p95", "p99", "in queue, p50", "in queue, p95", "requests", "answered"]
    p95 = {row["contender"]: row["p95"] for row in rows}
    ours = p95.pop("step-level batching", None)
    ratios = [f"{ours / theirs:.2f} times that of {name}" for name, theirs in p95.items()] if ours else []
    comparison = f"\n\nThe p95 of step-level batching is {' and '.join(ratios)}." if ratios else ""
    if ratios and "predicted_ratio" in rows[0]:
        a, b = (_time(seconds) for seconds in rows[0]["step"])
        predicted = f"{rows[0]['predicted_ratio']:.2f} times that of request-level batching"
        comparison += f" Predicted from steps of {a} + {b} a sample (`benchmarks/queueing.py`): {predicted}."
    return f"### {group}\n\n{_table([*header, 'good answers/s'], lines)}{comparison}"


def _energy(group: str, rows: list[dict]) -> str:
    lines = [[r["contender"], *(_number(r[key]) for key in ("joules_per_image", "watts"))] for r in rows]
    return f"### {group}\n\n{_table(['contender', 'J/image', 'W'], lines)}"


def _start(group: str, rows: list[dict]) -> str:
    stages = list(rows[0]["stages"])
    lines = [[r["contender"], *(f"{r['stages'][s]:.2f}" for s in stages)] for r in rows]
    return f"### {group}, seconds since the process began\n\n{_table(['', *stages], lines)}"


def _time(seconds: float) -> str:
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.3g} {unit}"


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def experiment_markdown(name: str, stored: dict, plots: list[str]) -> str:
    """The section of one experiment: what was run, its table, its plots."""
    machine, description = stored["machine"], DESCRIPTIONS[stored["experiment"]]
    header = list(dict.fromkeys(key for row in stored["rows"] for key in row))
    rows = [[_number(row.get(key, "n/a")) for key in header] for row in stored["rows"]]
    return "\n\n".join([
        f"## {name}: {description.title}",
        f"`{stored['command']}`, commit `{stored['commit'][:10]}`"
        + (" with uncommitted changes" if stored["commit"].endswith("+") else "")
        + f", {stored['date'][:10]}, {machine['device']}, "
        + ", ".join(f"{k} {machine[k]}" for k in ("dtype", "threads", "load before", "torch") if k in machine)
        + ".",
        description.text,
        _table(header, rows),
        *(f"![{description.title}]({plot})" for plot in plots),
    ])  # fmt: skip


def write(results: Path, out: Path) -> list[Path]:
    """Writes RESULTS.md, and the plots beside the stored runs; returns what was written.

    Raises InputError about "results" if the folder has no stored run, or one that cannot be read.
    """
    from benchmarks.plots import plot_experiment, plot_run

    files = sorted(results.glob("*.json"))
    if not files:
        remedy = f"write one with `pytest benchmarks/ --benchmark-json {results}/NAME.json`"
        raise InputError("results", results, remedy, "has no stored run")
    runs = {file.stem: read(file) for file in files}
    sections, written = [], []
    for name, run in runs.items():
        if "experiment" in run:
            section, plots = experiment_markdown, plot_experiment(run, results / name)
        else:
            section, plots = markdown, plot_run(run, rows_by_group(run), results / name)
        sections.append(section(name, run, [f"{results.name}/{plot.name}" for plot in plots]))
        written += plots
    missing = _missing(list(runs.values()))
    parts = ["# Results", INTRODUCTION, "**Not measured:** " + " ".join(missing) if missing else "", *sections]
    out.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return [out, *written]


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


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(COMMAND, description=__doc__)
    add = parser.add_argument
    add("--results", type=path, default=HERE / "results", help="folder of stored runs (default: %(default)s)")
    add("--out", type=path, default=HERE / "RESULTS.md", help="default: %(default)s")
    add("--compare", type=path, nargs=2, metavar=("NEW", "OLD"), help="print ratios, write nothing")
    add("--tolerance", type=float, default=1.25, help="ratio from which on it is slower (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            with errors_named("compare"):
                lines, none_slower = compare(*(read(file) for file in options.compare), options.tolerance)
            print("\n".join(lines))
            return 0 if none_slower else 1
        for file in write(options.results, options.out):
            print(file)
    except InputError as error:
        return refuse(COMMAND, error, vars(options))
    return 0


if __name__ == "__main__":
    run_command(COMMAND, main)
