"""Writes RESULTS.md, TABLES.md and their plots from stored runs, and compares one run with another of the same machine.

python -m benchmarks.report                          all of benchmarks/results/*.json
python -m benchmarks.report --compare NEW OLD        ratios of two runs of `pytest benchmarks/ --benchmark-json FILE`
"""

import statistics
from pathlib import Path

from benchmarks.descriptions import TABLES_INTRODUCTION
from benchmarks.stored import read, rows_by_group
from benchmarks.summary import first_page
from benchmarks.tables import experiment_markdown, markdown
from engine.command import Parser, path, refuse
from engine.command import run as run_command
from engine.errors import InputError, errors_named

COMMAND = "python -m benchmarks.report"
HERE = Path(__file__).parent
COMPARABLE = ("device", "threads", "torch", "power_limit_watts")  # that two runs must share to be compared


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


def write(results: Path, out: Path) -> list[Path]:
    """Writes the first page `out`, TABLES.md beside it and the plots beside the stored runs; returns what was written.

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
    tables = out.with_name("TABLES.md")
    tables.write_text("\n\n".join(["# Tables", TABLES_INTRODUCTION, *sections]) + "\n", encoding="utf-8")
    out.write_text(first_page(runs, tables.name) + "\n", encoding="utf-8")
    return [out, tables, *written]


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
