"""The plot of a stage's losses."""

from collections.abc import Iterator
from pathlib import Path

from engine.files import write_atomically

SMOOTHING = 50  # steps over which plotted losses are averaged


def smoothed(values: list[float], window: int) -> Iterator[float]:
    """Exponential moving average over about `window` values, without bias at the start."""
    mean, weight = 0.0, 0.0
    for value in values:
        mean += (value - mean) / window
        weight += (1 - weight) / window
        yield mean / weight


def plot_curve(curve: list[dict], path: Path) -> None:
    """Plots the smoothed losses of a stage against its steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    for name in curve[0]:
        if name != "step":
            axes.plot([r["step"] for r in curve], list(smoothed([r[name] for r in curve], SMOOTHING)), label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda p: figure.savefig(p, format="png"))
