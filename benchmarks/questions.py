"""What was asked of the engine's speed: each question compares two contenders, wherever both have been timed."""

from collections.abc import Iterator
from dataclasses import dataclass

PRODUCTS = "matrix products and attention alone"
KERNELS = (
    "attention,", "attention backward,", "LayerNorm +", "gated residual +", "adaLN backward,", "timestep table,",
    "cfg_step,",
)  # fmt: skip
LESS_WORK = "(less work)"  # ends the name of a contender that is not a peer: part of its work was done before


@dataclass(frozen=True)
class Question:
    """Whether `ours` takes at most `target` times as long as `theirs`."""

    text: str
    groups: str | tuple[str, ...]  # how the names of the groups begin that answer it
    ours: str  # contender
    theirs: str | float | None  # contender; seconds; None: the fastest of all others
    target: float = 1.0
    key: str = "median"  # of the two times that are compared; "p95" has no quartiles


@dataclass(frozen=True)
class Answer:
    group: str
    ratio: float
    verdict: str  # yes, no, undecided
    theirs: str  # what it was compared with


QUESTIONS = (
    Question("PS-U-Net: an eager forward takes less time than one of a U-ViT-multi with as many parameters.",
             "forward,", "PS-U-Net, eager", "U-ViT-multi, equal parameters, eager"),
    Question("The same, compiled (default with AVX-512 and g++).",
             "forward,", "PS-U-Net, compiled", "U-ViT-multi, equal parameters, compiled"),
    Question("PS-U-Net samples faster than a U-ViT-multi with as many parameters.",
             "sampling,", "PS-U-Net", "U-ViT-multi, equal parameters"),
    Question("PS-U-Net trains faster than a U-ViT-multi with as many parameters.",
             "training,", "PS-U-Net, eager", "U-ViT-multi, eager"),
    Question("Guided joint sampling in two passes takes less time than UniDiffuser's three passes in one batch.",
             "sampling, guided joint", "alternate, 2 passes", "UniDiffuser, 3 passes in a batch"),
    Question("The same against three passes one by one, as UniDiffuser runs them.",
             "sampling, guided joint", "alternate, 2 passes", "UniDiffuser, 3 passes one by one"),
    Question("The loop takes little more than its products: eager, 2 rows.",
             "loop, text-to-image, batch 1,", "eager", PRODUCTS, 1.8),
    Question("The loop takes little more than its products: eager, 32 rows.",
             "loop, text-to-image, batch 16,", "eager", PRODUCTS, 1.5),
    Question("The loop takes little more than its products: compiled, 2 rows (default with AVX-512 and g++).",
             "loop, text-to-image, batch 1,", "compiled", PRODUCTS, 1.3),
    Question("The loop takes little more than its products: compiled, 32 rows (default with AVX-512 and g++).",
             "loop, text-to-image, batch 16,", "compiled", PRODUCTS, 1.15),
    Question("A compiled forward takes no longer than OpenVINO's.", "peers,", "compiled", "OpenVINO"),
    Question("A compiled forward takes no longer than ONNX Runtime's.", "peers,", "compiled", "ONNX Runtime"),
    Question("An eager forward of UniDiffuser takes no longer than diffusers'.", "peers,", "eager", "diffusers"),
    Question("Each kernel takes no longer than its fastest peer.", KERNELS, "engine", None),
    Question("A request takes hardly longer than the same work in the calling thread.",
             "hand-over,", "Engine.generate", "calling thread", 1.05),
    Question("HTTP adds little to `Engine.submit`.", "service, HTTP", "HTTP", "Engine.submit", 1.05),
    Question("Batching between steps: a shorter 95th percentile than batching whole requests.",
             "service,", "step-level batching", "request-level batching", key="p95"),
    Question("The first image is on disk within 5 s: the first start on a machine.", "start,", "first", 5.0),
    Question("The first image is on disk within 5 s: a later one, without `--compile`.", "start,", "second", 5.0),
    Question("The first image is on disk within 2.5 s: with everything compiled.", "start,", "with packages", 2.5),
)  # fmt: skip


def answers(question: Question, groups: dict[str, list[dict]]) -> Iterator[Answer]:
    """The answers of one run, whose `groups` hold rows by contender; those that differ in steps alone are left out."""
    for group, rows in groups.items():
        if not group.startswith(question.groups) or group.startswith("sampling, steps"):
            continue
        found = {row["contender"]: row for row in rows}
        ours = found.pop(question.ours, None)
        theirs = _other(question, found)
        if ours is None or theirs is None:
            continue
        ratio, at = ours[question.key] / theirs[question.key], question.target
        if question.key != "median":
            verdict = "yes" if ratio <= at else "no"
        elif ours["q3"] <= at * theirs["q1"]:
            verdict = "yes"
        else:
            verdict = "no" if ours["q1"] > at * theirs["q3"] else "undecided"
        yield Answer(group, ratio, verdict, theirs["contender"])


def _other(question: Question, others: dict[str, dict]) -> dict | None:
    """The row of what `ours` is compared with; None where it was not timed."""
    if isinstance(question.theirs, float):
        seconds = question.theirs
        return {"contender": f"{seconds:g} s", "median": seconds, "q1": seconds, "q3": seconds}
    if question.theirs is not None:
        return others.get(question.theirs)
    peers = [row for name, row in others.items() if not name.endswith(LESS_WORK)]
    return min(peers, key=lambda row: row["median"], default=None)
