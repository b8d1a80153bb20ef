"""Draws the figures of the explanations: `python docs/build/figures.py` writes docs/figures/*.svg.

Blocks, schedules and step tables are those of the program: `engine.presets`, `engine.diffusion`.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np

from engine.diffusion.schedule import NoiseSchedule, timesteps
from engine.diffusion.solver_table import SolverOptions, solver_table
from engine.kernels.step_table import StepColumn
from engine.presets import PRESETS

FOLDER = Path(__file__).resolve().parents[1] / "figures"
IMAGE, TEXT, SHARED, KNOWN, NOISE, STATE = "#cfe0fc", "#fbe0c4", "#dcd6f5", "#bfe3c8", "#d6d6d6", "#ffffff"
LINES = ("#3b5bdb", "#d9480f", "#2b8a3e")


def box(x: float, y: float, width: float, height: float, text: str, fill: str) -> str:
    """A rectangle with a text in its middle."""
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} rx="3" fill="{fill}" stroke="#555"/>' + label(x + width / 2, y + height / 2 + 4.5, text)


def label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" class="arrow"/>'


def skip(x1: float, x2: float, y: float, height: float) -> str:
    """A dashed arc above two blocks."""
    return f'<path d="M{x1:g} {y:g}C{x1:g} {y - height:g} {x2:g} {y - height:g} {x2:g} {y:g}" class="skip"/>'


def line(points: Iterable[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'


def document(width: int, height: int, parts: Iterable[str]) -> str:
    style = (
        "text{font:12px sans-serif;fill:#222}.arrow{stroke:#444;fill:none;marker-end:url(#head)}"
        ".skip{stroke:#888;fill:none;stroke-dasharray:4 3;marker-end:url(#head)}"
    )
    marker = '<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
    head = f'{marker}<path d="M0 0L7 3L0 6z" fill="#444"/></marker>'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    ground = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return "\n".join([start, f"<style>{style}</style><defs>{head}</defs>", ground, *parts, "</svg>", ""])


def psunet() -> str:
    """The blocks of preset coco256, with their long skips."""
    model, parts, ends = PRESETS["coco256"].model, [], []
    width, step, y_shared = 30, 38, 130
    half, left = model.shared_depth // 2, 330
    right = left + model.shared_depth * step
    for m, y, colour in zip(model.modalities, (60, 225), (IMAGE, TEXT), strict=True):
        ins = [left - 30 - (m.depth - i) * step for i in range(m.depth)]
        outs = [right + 22 + i * step for i in range(m.depth)]
        parts += [box(x, y, width, 44, name, colour) for xs, name in ((ins, "in"), (outs, "out")) for x in xs]
        parts += [
            skip(a + 15, b + 15, y, 14 + 11 * i) for i, (a, b) in enumerate(zip(reversed(ins), outs, strict=True))
        ]
        parts += [
            label(12, y + 26, f"{m.name}: {m.tokens} × {m.channels}", "start"),
            arrow(118, y + 22, ins[0] - 2, y + 22),
        ]
        parts += [
            arrow(ins[-1] + width, y + 22, left - 4, y_shared + 22),
            arrow(right - 6, y_shared + 22, outs[0] - 2, y + 22),
        ]
        parts += [arrow(outs[-1] + width, y + 22, outs[-1] + width + 30, y + 22)]
        ends.append(label(outs[-1] + width + 36, y + 26, f"{m.name} prediction", "start"))
    shared = [left + i * step for i in range(model.shared_depth)]
    names = ["in"] * half + ["mid"] + ["out"] * half
    parts += [box(x, y_shared, width, 44, name, SHARED) for x, name in zip(shared, names, strict=True)]
    parts += [skip(shared[half - 1 - i] + 15, shared[half + 1 + i] + 15, y_shared, 10 + 8 * i) for i in range(half)]
    parts.append(label((left + right) / 2, y_shared + 60, f"{model.shared_depth} shared blocks, {model.tokens} tokens"))
    return document(1060, 290, [*parts, *ends])


def tasks() -> str:
    """Which part of the joint sample each task knows."""
    rows = [
        ("joint", "gggggggg", "gggg"),
        ("text-to-image", "gggggggg", "kkkk"),
        ("image-to-text", "kkkkkkkk", "gggg"),
        ("infill: half an image", "kkkkgggg", "gggg"),
        ("infill: half an image, a word", "kkkkgggg", "kggg"),
    ]
    parts = [label(330, 20, "image tokens"), label(530, 20, "text tokens")]
    for i, (name, image, text) in enumerate(rows):
        parts.append(label(205, 48 + 30 * i, name, "end"))
        for x, cells in ((220, image), (475, text)):
            colours = {"k": KNOWN, "g": STATE}
            parts += [box(x + 28 * j, 32 + 30 * i, 26, 22, "", colours[cell]) for j, cell in enumerate(cells)]
    parts += [box(220, 190, 26, 18, "", KNOWN), label(252, 204, "known", "start"), box(320, 190, 26, 18, "", STATE)]
    return document(620, 220, [*parts, label(352, 204, "to be generated", "start")])


def passes() -> str:
    """The inputs of the two passes of a step, for text-to-image."""
    parts = [label(290, 22, "image: to be generated"), label(520, 22, "text: known")]
    rows = [
        ("clean", "conditional", "x", "x0, at time 0", KNOWN),
        ("clean", "unconditional", "x", "η ~ N(0, I), at time N", NOISE),
        ("renoise", "conditional", "x", "α·x0 + σ·ξ, at time t", KNOWN),
        ("renoise", "unconditional", "x", "η ~ N(0, I), at time t", NOISE),
    ]
    for i, (conditioning, name, state, known, colour) in enumerate(rows):
        y = 34 + 40 * i + 14 * (i > 1)
        parts += [
            label(12, y + 20, f"{conditioning}: {name}", "start"),
            box(195, y, 190, 30, f"{state}, at time t", STATE),
        ]
        parts += [box(390, y, 260, 30, known, colour), arrow(655, y + 15, 690, y + 15)]
        parts.append(label(698, y + 20, "f_c" if name == "conditional" else "f_u", "start"))
    return document(740, 220, [*parts, label(12, 214, "f = f_u + w·(f_c − f_u)", "start")])


def schedules() -> str:
    """α_t of the two schedules."""
    parts = axes("t / N", "α_t")
    for name, colour, y in (("scaled_linear", LINES[0], 60), ("cosine", LINES[1], 80)):
        alpha = NoiseSchedule(name, 1000).alpha(np.arange(1001))
        parts += [line(((50 + 0.4 * t, 220 - 200 * alpha[t]) for t in range(0, 1001, 10)), colour)]
        parts += [line([(330, y), (355, y)], colour), label(360, y + 4, name, "start")]
    return document(480, 260, parts)


def axes(x: str, y: str) -> list[str]:
    frame = '<rect x="50" y="20" width="400" height="200" fill="none" stroke="#555"/>'
    ticks = [label(50, 238, "0"), label(450, 238, "1"), label(42, 224, "0", "end"), label(42, 26, "1", "end")]
    return [frame, *ticks, label(250, 250, x), label(22, 124, y)]


def paths() -> str:
    """The times of the modalities at each step, together and text first."""
    emoji, parts = PRESETS["emoji"].diffusion, []
    for k, (title, order) in enumerate((("together", ()), ("order text, image", ((1,), (0,))))):
        table = solver_table(emoji, timesteps(1000, 8), 2, SolverOptions("ddim", order=order))
        times, x0 = table.indices[:, :, StepColumn.TIME], 50 + 330 * k  # [S, M]
        step = 280 / table.steps
        parts += [
            label(x0 + 140, 20, title),
            f'<rect x="{x0}" y="30" width="280" height="160" fill="none" stroke="#555"/>',
        ]
        parts += [label(x0 + 140, 212, "step"), label(x0 - 8, 42, "N", "end"), label(x0 - 8, 192, "0", "end")]
        for m, colour in ((0, LINES[0]), (1, LINES[1])):
            level = [times[0, m], *times[1:, m], 0]
            shift = 1.5 * (2 * m - 1)  # lines that lie on each other are both seen
            parts.append(line(((x0 + step * i, 190 - 0.16 * t + shift) for i, t in enumerate(level)), colour))
    parts += [line([(60, 235), (85, 235)], LINES[0]), label(92, 239, "time of the image", "start")]
    parts += [line([(240, 235), (265, 235)], LINES[1]), label(272, 239, "time of the text", "start")]
    return document(680, 250, parts)


def slots() -> str:
    """Samples of different requests in the slots of one batch, step by step."""
    runs = [  # slot, first step, end, sample
        (0, 0, 8, "A: joint", IMAGE),
        (1, 0, 4, "B: 4 steps", TEXT),
        (2, 2, 8, "C: infill", SHARED),
        (1, 4, 10, "D: waited for a slot", KNOWN),
    ]
    parts = [label(12, 50 + 40 * i, f"slot {i}", "start") for i in range(3)]
    for slot, start, end, name, fill in runs:
        parts.append(box(70 + 50 * start, 30 + 40 * slot, 50 * (end - start) - 3, 32, name, fill))
    parts += [label(95 + 50 * i, 170, str(i + 1)) for i in range(10)]
    return document(590, 195, [*parts, label(320, 188, "step: one forward for all slots")])


FIGURES = {"psunet": psunet, "tasks": tasks, "passes": passes, "schedules": schedules, "paths": paths, "slots": slots}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
