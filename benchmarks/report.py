"""Stored runs to RESULTS.md and its plots, and one run against another of the same machine.

python -m benchmarks.report                          all of benchmarks/results/*.json
python -m benchmarks.report --compare NEW OLD        ratios of two runs of `pytest benchmarks/ --benchmark-json FILE`
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
SAME = ("device", "threads", "torch", "power_limit_watts")  # what two runs must share to be compared
PAPER_SAMPLES = 1_000_000 * 256  # U-ViT's training on MS-COCO, which the coco256 recipe follows: steps × batch


def read(path: Path) -> dict:
    """A stored run: pytest-benchmark's JSON, or an experiment's. Raises ValueError if it is neither."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is no stored run ({error}); give a file of --benchmark-json") from None
    if not isinstance(stored, dict) or not ("experiment" in stored or "engine" in stored.get("machine_info", {})):
        raise ValueError(f"{path}: is no run of these benchmarks; give a file of `pytest benchmarks/ --benchmark-json`")
    return stored


def compare(new: dict, old: dict, tolerance: float) -> tuple[list[str], bool]:
    """(a table of ratios new/old of the medians, whether all is well).

    The machine as a whole may have been slower: the median of all ratios is that drift. A benchmark is slower if its
    ratio, with the drift taken out, is above `tolerance`.
    """
    if "experiment" in new or "experiment" in old:
        raise ValueError("--compare: an experiment's table has no times to compare; give runs of `pytest benchmarks/`")
    machines = [run["machine_info"]["engine"] for run in (new, old)]
    different = [key for key in SAME if machines[0].get(key) != machines[1].get(key)]
    if different:
        values = ", ".join(f"{key} {machines[0].get(key)!r} and {machines[1].get(key)!r}" for key in different)
        raise ValueError(f"--compare: the runs are of different machines ({values}); compare runs of the same one")
    before = {b["fullname"]: b["stats"]["median"] for b in old["benchmarks"]}
    ratios = {
        b["fullname"]: b["stats"]["median"] / before[b["fullname"]]
        for b in new["benchmarks"]
        if before.get(b["fullname"]) and not b["name"].startswith("test_energy")
    }
    if not ratios:
        raise ValueError("--compare: the runs have no benchmark in common; compare runs of the same tests")
    drift = statistics.median(ratios.values())
    lines, well = [f"{len(ratios)} benchmarks in both; the median ratio is {drift:.3f}"], True
    for name, ratio in sorted(ratios.items(), key=lambda item: -item[1]):
        slower = ratio / drift > tolerance
        well &= not slower
        lines.append(f"{ratio:8.3f} {ratio / drift:8.3f}  {'SLOWER  ' if slower else ''}{name.partition('::')[2]}")
    return lines, well


def rows_by_group(run: dict) -> dict[str, list[dict]]:
    """A run's results by group, fastest first: what was recorded, the statistics and the distance to the ceilings."""
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
    """The chapter of one benchmark run."""
    machine, commit = run["machine_info"]["engine"], run["commit_info"]
    ceilings = machine["ceilings"]
    changed = " with uncommitted changes" if commit.get("dirty") else ""
    parts = [
        f"## {name}",
        f"{machine['device']}, commit `{(commit.get('id') or 'unknown')[:10]}`{changed}, {run['datetime'][:10]}. "
        + ", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("device", "ceilings"))
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
        else:
            parts.append(_timings(group, rows))
        if group.startswith("loop"):
            parts.append(_loop(rows))
    for rows in (r for g, r in rows_by_group(run).items() if g == "training, batch 256"):
        for row in rows:
            hours = PAPER_SAMPLES / row["pictures_per_second"] / 3600
            parts.append(f"At this rate the 256 M samples of the coco256 recipe take {row['contender']} {hours:,.0f} "
                         "hours on this device.")  # fmt: skip
    return "\n\n".join(part for part in parts if part)


CLAIMS = (  # (what the paper says, or needs; groups that try it, whose time, over whose time)
    ("What the next two would rest on: a forward of PS-U-Net takes less time than a U-ViT-multi's of equal parameters.",
     "forward,", "PS-U-Net, eager", "U-ViT-multi, equal parameters, eager"),
    ("PS-U-Net samples faster than a U-ViT-multi with as many parameters.",
     "sampling,", "PS-U-Net", "U-ViT-multi, equal parameters"),
    ("PS-U-Net trains faster than a U-ViT-multi with as many parameters.",
     "training,", "PS-U-Net, eager", "U-ViT-multi, eager"),
    ("Guided joint sampling in two passes takes less time than in UniDiffuser's three, even if these are one batch.",
     "sampling, guided joint", "alternate, 2 passes", "UniDiffuser, 3 passes in a batch"),
    ("The same against three passes one by one, as UniDiffuser runs them.",
     "sampling, guided joint", "alternate, 2 passes", "UniDiffuser, 3 passes one by one"),
)  # fmt: skip


def _claims(run: dict) -> str:
    """What the paper says of speed, tried on this machine."""
    lines, by_group = [], rows_by_group(run)
    for claim, groups, ours, theirs in CLAIMS:
        for group, several in by_group.items():
            rows = {row["contender"]: row for row in several}
            if group.startswith(groups) and not group.startswith("sampling, steps") and {ours, theirs} <= set(rows):
                a, b = rows[ours], rows[theirs]
                verdict = "yes" if a["q3"] < b["q1"] else "no" if a["q1"] > b["q3"] else "undecided"
                lines.append([claim, group, f"{a['median'] / b['median']:.2f}", verdict])
                claim = ""
    if not lines:
        return ""
    return (
        "**What the paper says of speed, tried here.** The ratio is that of the median times; undecided is what has "
        "overlapping middle halves of the times. Of speed only: for what a pass is worth, see the experiments.\n\n"
        + _table(["the paper", "tried on", "ratio", "so here?"], lines)
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
        "pictures/s": lambda r: f"{r['pictures_per_second']:.4g}",
        "GFLOP/s": lambda r: f"{r['flops_per_second'] / 1e9:.4g}",
        "% of matmul": lambda r: f"{r['percent_of_matmul']:.1f}",
        "% of copy": lambda r: f"{r['percent_of_copy']:.1f}",
        "peak MiB": lambda r: f"{r['peak_bytes'] / 2**20:.1f}",
        "M parameters": lambda r: f"{r['parameters'] / 1e6:.2f}",
    }
    needs = {"pictures/s": "pictures_per_second", "GFLOP/s": "flops_per_second", "% of matmul": "percent_of_matmul",
             "% of copy": "percent_of_copy", "peak MiB": "peak_bytes", "M parameters": "parameters"}  # fmt: skip
    used = [c for c in columns if any(row.get(needs.get(c, "median")) is not None for row in rows)]
    lines = [[columns[c](r) if r.get(needs.get(c, "median")) is not None else "n/a" for c in used] for r in rows]
    return f"### {group}\n\n{_table(used, lines)}"


def _loop(rows: list[dict]) -> str:
    """The engine's best loop against a plain one, and against its own products; nothing if one of them is missing."""
    median = {row["contender"]: row["median"] for row in rows}
    loops = [name for name in ("captured", "compiled", "eager") if name in median]
    if not loops or not {"plain, float32", "plain", "matrix products and attention alone"} <= set(median):
        return ""
    best, products = min(loops, key=median.get), median["matrix products and attention alone"]
    return (
        f"The fastest loop is {best}: {median['plain, float32'] / median[best]:.2f} times as fast as a plain one in "
        f"float32, {median['plain'] / median[best]:.2f} times as fast as a plain one in the same dtype. It takes "
        f"{median[best] / products:.2f} times as long as its matrix products and attention alone, which are "
        f"{100 * products / median[best]:.0f} % of it."
    )


def _energy(group: str, rows: list[dict]) -> str:
    lines = [[r["contender"], *(_number(r[key]) for key in ("joules_per_picture", "watts"))] for r in rows]
    return f"### {group}\n\n{_table(['contender', 'J/picture', 'W'], lines)}"


def _start(group: str, rows: list[dict]) -> str:
    stages = list(rows[0]["stages"])
    lines = [[r["contender"], *(f"{r['stages'][s]:.2f}" for s in stages)] for r in rows]
    return f"### {group}, seconds since the process began\n\n{_table(['', *stages], lines)}"


def _time(seconds: float) -> str:
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.3g} {unit}"


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def experiment_markdown(name: str, stored: dict) -> str:
    """The chapter of one experiment: what was run, its table, its picture."""
    machine = stored["machine"]
    header = list(dict.fromkeys(key for row in stored["rows"] for key in row))
    rows = [[_number(row.get(key, "n/a")) for key in header] for row in stored["rows"]]
    return "\n\n".join([
        f"## {name}: {stored['title']}",
        f"`{stored['command']}`, commit `{stored['commit'][:10]}`"
        + (" with uncommitted changes" if stored["commit"].endswith("+") else "")
        + f", {stored['date'][:10]}, {machine['device']}, "
        + ", ".join(f"{k} {machine[k]}" for k in ("dtype", "threads", "load before", "torch") if k in machine)
        + ".",
        stored["note"],
        _table(header, rows),
        *(f"![{stored['title']}](results/{picture})" for picture in stored["pictures"]),
    ])  # fmt: skip


def write(results: Path, out: Path) -> list[Path]:
    """Writes RESULTS.md and the plots beside the stored runs; returns what was written."""
    from benchmarks.plots import plot_run

    files = sorted(results.glob("*.json"))
    if not files:
        raise ValueError(f"--results: {results} has no stored run; write one with --benchmark-json {results}/NAME.json")
    runs = {path.stem: read(path) for path in files}
    chapters, written = [], []
    for name, run in runs.items():
        if "experiment" in run:
            chapters.append(experiment_markdown(name, run))
            continue
        pictures = plot_run(run, rows_by_group(run), results / name)
        written += pictures
        chapters.append(markdown(name, run, [f"{results.name}/{p.name}" for p in pictures]))
    missing = _missing(list(runs.values()))
    text = ["# Results", "Written by `python -m benchmarks.report` from `benchmarks/results/`; not edited by hand. "
            "A chapter of times is a run of `python -m pytest benchmarks/ --benchmark-json FILE`. "
            "Times are medians over rounds in which all contenders took turns (starts, energy and what the experiments "
            "say of seconds were measured one after the other); IQR is the distance of the quartiles, p95 the nearest "
            "round, which of few is the slowest. In the experiments ± is the standard deviation over the seeds: of "
            "training where models were trained, else of sampling.",
            "**Not measured:** " + " ".join(missing) if missing else "", *chapters]  # fmt: skip
    out.write_text("\n\n".join(part for part in text if part) + "\n", encoding="utf-8")
    return [out, *written]


def _missing(runs: list[dict]) -> list[str]:
    """What no stored run has measured, in sentences."""
    timed = [run for run in runs if "experiment" not in run]
    groups = {group.split(",")[0] for run in timed for group in rows_by_group(run)}
    found = {run["experiment"] for run in runs if "experiment" in run}
    sentences = []
    if not any("cuda" in run["machine_info"]["engine"] for run in timed):
        sentences.append("Anything on a GPU: captured forwards, energy, the coco256 preset, its training rate, and so "
                         "how long the paper's MS-COCO training would take.")  # fmt: skip
    lacking = [group for group in ("forward", "loop", "sampling", "training", "start", "energy") if group not in groups]
    if lacking:
        sentences.append(f"The benchmarks of {', '.join(lacking)}.")
    lacking = [
        name for name in ("architecture", "masking", "guidance", "depths", "approximations") if name not in found
    ]
    if lacking:
        sentences.append(f"The experiments on {', '.join(lacking)}.")
    return sentences


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md", help="default: %(default)s")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("NEW", "OLD"), help="print ratios, write nothing")
    parser.add_argument("--tolerance", type=float, default=1.25, help="ratio that is slower (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            lines, well = compare(*(read(path) for path in options.compare), options.tolerance)
            print("\n".join(lines))
            return 0 if well else 1
        for path in write(options.results, options.out):
            print(path)
    except ValueError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
