"""The sections of TABLES.md: one for each stored run, with its machine, its command and a table for each group."""

import statistics

from benchmarks.descriptions import DESCRIPTIONS
from benchmarks.questions import PRODUCTS, QUESTIONS, answers
from benchmarks.stored import rows_by_group

PAPER_SAMPLES = 1_000_000 * 256  # U-ViT's training on MS-COCO, which the coco256 recipe follows: steps × batch
# Contenders compared round by round, by the beginning of the group's name.
BY_ROUNDS = {"hand-over": ("Engine.generate", "calling thread"), "service, HTTP": ("HTTP", "Engine.submit")}


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
        _answers(run),
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


def _answers(run: dict) -> str:
    """What was asked of the groups that this run has, and whether it holds."""
    lines = []
    for question in QUESTIONS:
        text = question.text
        for answer in answers(question, rows_by_group(run)):
            lines.append([text, answer.group, f"{question.target:g}", f"{answer.ratio:.2f}", answer.verdict])
            text = ""
    if not lines:
        return ""
    return (
        "**What was asked, and what was measured.** The ratio is that of the median times, of the service that of the "
        "95th percentiles; an answer is undecided where the interquartile ranges overlap."
        "\n\n" + table(["asked", "tested on", "at most", "ratio", "holds here"], lines)
    )


def table(header: list[str], rows: list[list[str]]) -> str:
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
        "launches": lambda r: str(r["launches"]),
        "predicted": lambda r: _time(r["predicted"]),
        "predicted/measured": lambda r: f"{r['predicted'] / r['median']:.2f}",
        "peak MiB": lambda r: f"{r['peak_bytes'] / 2**20:.1f}",
        "M parameters": lambda r: f"{r['parameters'] / 1e6:.2f}",
    }
    needs = {"calls": "calls", "images/s": "images_per_second", "GFLOP/s": "flops_per_second",
             "launches": "launches", "predicted": "predicted", "predicted/measured": "predicted",
             "% of matmul": "percent_of_matmul", "% of copy": "percent_of_copy", "peak MiB": "peak_bytes",
             "M parameters": "parameters"}  # fmt: skip
    used = [c for c in columns if any(row.get(needs.get(c, "median")) is not None for row in rows)]
    lines = [[columns[c](r) if r.get(needs.get(c, "median")) is not None else "n/a" for c in used] for r in rows]
    return f"### {group}\n\n{table(used, lines)}"


def _loop(rows: list[dict]) -> str:
    """The sampler's fastest loop against a plain one and against its own products; empty if one of them is missing."""
    median = {row["contender"]: row["median"] for row in rows}
    loops = [name for name in ("captured", "compiled", "eager") if name in median]
    if not loops or not {"plain, float32", "plain", PRODUCTS} <= set(median):
        return ""
    best, products = min(loops, key=median.get), median[PRODUCTS]
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
    return f"### {group}\n\n{table([*header, 'good answers/s'], lines)}{comparison}"


def _energy(group: str, rows: list[dict]) -> str:
    lines = [[r["contender"], *(_number(r[key]) for key in ("joules_per_image", "watts"))] for r in rows]
    return f"### {group}\n\n{table(['contender', 'J/image', 'W'], lines)}"


def _start(group: str, rows: list[dict]) -> str:
    stages = list(rows[0]["stages"])
    lines = [[r["contender"], *(f"{r['stages'][s]:.2f}" for s in stages)] for r in rows]
    return f"### {group}, seconds since the process began\n\n{table(['', *stages], lines)}"


def _time(seconds: float) -> str:
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.3g} {unit}"


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def experiment_markdown(name: str, stored: dict, plots: list[str]) -> str:
    """The section of one experiment: what was run, its table, its plots."""
    machine, description = stored["machine"], DESCRIPTIONS[stored["experiment"]]
    return "\n\n".join([
        f"## {name}: {description.title}",
        f"`{stored['command']}`, commit `{stored['commit'][:10]}`"
        + (" with uncommitted changes" if stored["commit"].endswith("+") else "")
        + f", {stored['date'][:10]}, {machine['device']}, "
        + ", ".join(f"{k} {machine[k]}" for k in ("dtype", "threads", "load before", "torch") if k in machine)
        + ".",
        description.text,
        experiment_table(stored["rows"]),
        *(f"![{description.title}]({plot})" for plot in plots),
    ])  # fmt: skip


def experiment_table(rows: list[dict]) -> str:
    """All columns that any row has."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    return table(header, [[_number(row.get(key, "n/a")) for key in header] for row in rows])
