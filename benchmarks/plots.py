"""The plots of stored runs, as PNG: bars, latency against batch, images/s against steps, roofline, experiments."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Of groups; any others are kernels.
KINDS = ("forward", "loop", "peers", "sampling", "joint order", "hand-over", "training", "service")


def plot_run(run: dict, groups: dict[str, list[dict]], stem: Path) -> list[Path]:
    """Writes STEM-*.png for what a run has measured, and returns their paths; `groups` holds flat result rows."""
    ceilings = run["machine_info"]["engine"]["ceilings"]
    kinds = {kind: {g: r for g, r in groups.items() if g.startswith(f"{kind},")} for kind in KINDS}
    kinds["kernels"] = {g: r for g, r in groups.items() if not g.startswith(("energy", "start", *KINDS))}
    written = []
    for kind, rows_of_kind in kinds.items():
        if rows_of_kind:
            written.append(_save(_bars(rows_of_kind), stem, f"bars-{kind.replace(' ', '-')}"))
    tasks = [row for g, rows in groups.items() for row in rows if "task" in row and "steps" not in g.split(",")[1]]
    if tasks:
        written.append(_save(_lines(tasks, "batch", "median", "seconds", "task"), stem, "latency"))
    steps = [row for g, rows in groups.items() for row in rows if g.startswith("sampling, steps")]
    if steps:
        written.append(_save(_lines(steps, "steps", "images_per_second", "images/s", "task"), stem, "steps"))
    points = [row for rows in groups.values() for row in rows if "flops" in row and "bytes" in row]
    if points:
        written.append(_save(_roofline(points, ceilings, groups), stem, "roofline"))
    return written


def plot_experiment(stored: dict, stem: Path) -> list[Path]:
    """Writes STEM*.png for an experiment, and returns their paths."""
    rows, experiment = stored["rows"], stored["experiment"]
    if experiment == "autoregression":
        return []  # a few numbers, which its table has
    if experiment in ("architecture", "depths", "modalities"):
        metrics = [key.removeprefix("± ") for key in rows[0] if key.startswith("± ")]
        panels = [(stored["curve"], metric) for metric in metrics if metric in stored["curve"][0]]
        bars, curves = _metric_bars(rows, "model", metrics), _curves(panels, "training PFLOP", "model")
        return [_save(bars, stem), _save(curves, stem, "training")]
    if experiment == "masking":
        return [_save(_curves([(rows, "RMSE"), (rows, "word accuracy")], "ratio", "masked"), stem)]
    if experiment == "guidance":
        tasks = [([row for row in rows if row["task"] == task], "quality") for task in ("text-to-image", "joint")]
        return [_save(_curves(tasks, "diversity", "guidance"), stem)]
    assert experiment == "approximations", experiment
    panels = []
    for task, metric in (("text-to-image", "retrieval@1"), ("image-to-text", "word F1")):
        panels.append(([row | {"seconds": row[f"seconds {task}"]} for row in rows], metric))
    return [_save(_curves(panels, "seconds", "approximation"), stem)]


def _metric_bars(rows: list[dict], name: str, metrics: list[str]) -> Figure:
    """A panel of bars for each metric; the whiskers are `± metric` where that is a number."""
    figure = Figure(figsize=(4.5 * len(metrics), 0.4 * len(rows) + 1.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        spread = [row[f"± {metric}"] if isinstance(row[f"± {metric}"], float) else 0.0 for row in rows]
        axes.barh([row[name] for row in rows], [row[metric] for row in rows], xerr=spread, color="tab:blue")
        axes.set_xlabel(metric)
    panels[0].invert_yaxis()
    return figure


def _curves(panels: list[tuple[list[dict], str]], x: str, series: str) -> Figure:
    """A panel for each (rows, y); in it a line for each value of `series` among the rows that have y."""
    figure = Figure(figsize=(6 * len(panels), 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (rows, y) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key in dict.fromkeys(row[series] for row in rows if y in row):
            line = [row for row in rows if row[series] == key and y in row]
            axes.plot([row[x] for row in line], [row[y] for row in line], marker="o", label=key)
            if "scale" in line[0]:
                for row in line:
                    axes.annotate(f"{row['scale']:g}", (row[x], row[y]), fontsize=7)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _bars(groups: dict[str, list[dict]]) -> Figure:
    """A panel for each group: each contender's median, with its interquartile range, as multiples of the fastest."""
    heights = [len(rows) + 1.5 for rows in groups.values()]
    figure = Figure(figsize=(9, 0.28 * sum(heights) + 0.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (group, rows) in zip(panels, groups.items(), strict=True):
        fastest = rows[0]["median"]
        axes.barh([r["contender"] for r in rows], [r["median"] / fastest for r in rows],
                  xerr=[r["iqr"] / 2 / fastest for r in rows], color="tab:blue")  # fmt: skip
        axes.invert_yaxis()
        axes.set_title(f"{group}: time, 1 = {_short(fastest)}", loc="left", fontsize=9)
        axes.tick_params(labelsize=8)
    return figure


def _lines(rows: list[dict], x: str, y: str, label: str, kind: str) -> Figure:
    figure, axes = _figure(4.5, xlabel=x, ylabel=label, xscale="log", yscale="log")
    for key in sorted({(r["contender"], r[kind]) for r in rows}):
        line = sorted((r[x], r[y]) for r in rows if (r["contender"], r[kind]) == key)
        axes.plot(*zip(*line, strict=True), marker="o", label=", ".join(key))
    ticks = sorted({r[x] for r in rows})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _roofline(points: list[dict], ceilings: dict[str, float], groups: dict[str, list[dict]]) -> Figure:
    """FLOP/s against FLOP/byte, with the ceilings of memory and arithmetic."""
    figure, axes = _figure(5, xlabel="FLOP/byte", ylabel="FLOP/s", xscale="log", yscale="log")
    lowest, highest = 0.1, max(p["flops"] / p["bytes"] for p in points) * 10
    for dtype in sorted({p["dtype"] for p in points}):
        knee = ceilings[dtype] / ceilings["copy"]
        xs = sorted((lowest, min(max(knee, lowest), highest), highest))
        axes.plot(xs, [min(ceilings["copy"] * x, ceilings[dtype]) for x in xs], label=f"ceiling, {dtype}")
    for group, rows in groups.items():
        measured = [r for r in rows if "flops" in r and "bytes" in r]
        if measured:
            xs, ys = zip(*((r["flops"] / r["bytes"], r["flops_per_second"]) for r in measured), strict=True)
            axes.plot(xs, ys, "o", markersize=4, label=group)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
    return figure


def _figure(height: float, **labels) -> tuple[Figure, object]:
    figure = Figure(figsize=(9, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot(**labels)


def _save(figure: Figure, stem: Path, name: str = "") -> Path:
    path = stem.with_name(f"{stem.name}-{name}.png" if name else f"{stem.name}.png")
    figure.savefig(path, format="png")
    return path


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
