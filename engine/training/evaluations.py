"""`Evaluations`: scores of RUN/checkpoint on held-out images while it is trained (`--evaluate-every`)."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from engine.codecs.words import shortened
from engine.data.captioned import CaptionedImages
from engine.data.sources import open_captioned
from engine.errors import InputError, errors_named
from engine.evaluation import (
    Gallery,
    Pairs,
    described_images,
    drawn_images,
    evaluate,
    evaluate_joint,
    evaluated_modalities,
    skipped_tasks,
    spread,
)
from engine.files import cache_folder, is_folder, unreadable, write_atomically
from engine.images import from_levels
from engine.metrics.features import feature_network
from engine.metrics.report import image_scores, text_scores
from engine.metrics.scores import Bootstrap, Score
from engine.request import Request
from engine.runtime import Engine
from engine.training.options import TrainOptions
from engine.training.tracking import Tracker

COUNT, GALLERY, JOINT_SAMPLES = 64, 448, 16  # held-out images; others to find the nearest among; joint samples
HOW = Request(steps=25, seed=0)


class Evaluations:
    """The rows of RUN/evaluation.jsonl: "step", "test" and "joint" as `engine.evaluate --json` prints them, and
    "samples", the "scores" of `engine.evaluate --samples --json`.

    Samples have seeds of their own, so training's random numbers stay as they are.

    options  with `evaluate_every`, the steps between evaluations; there is one of the last step too. With
             `evaluate_samples`, how many captions are drawn and images described for "samples"
    train    the images that are trained on
    Raises InputError about "data" if it has no readable held-out image.
    """

    def __init__(self, options: TrainOptions, train: CaptionedImages):
        self.file, self.every = options.out / "evaluation.jsonl", options.evaluate_every
        config, data = options.config, options.data
        size = config.codecs[evaluated_modalities(config)[0]].settings["size"]
        if not is_folder(data, "data"):
            raise InputError("data", data, "give a folder with test/ beside them", "are tar files without a test split")
        with errors_named("data"):
            held_out = open_captioned(data, "test")
        self._held_out, count = held_out, options.evaluate_samples
        self._pairs, self._sources = _read(held_out, COUNT, size), _read(held_out, count, size) if count else []
        if not self._pairs or (count and not self._sources):
            raise InputError("data", data, "leave out evaluate_every, or copy it again", "has no readable test image")
        drawn = tuple(item for item in train.items if not item.only_known)
        self._others = _read(replace(train, items=drawn), GALLERY, size)
        self._rows: list[dict] = []

    def begin(self, step: int) -> None:
        """Reads the rows of a run that resumes from a step; later ones are those of weights that were lost."""
        try:
            lines = self.file.read_text().splitlines() if self.file.exists() else []
            self._rows = [row for row in map(json.loads, lines) if row["step"] <= step]
        except OSError as error:
            raise unreadable("out", self.file, error, "give another folder") from None
        except (ValueError, LookupError, TypeError) as error:
            raise InputError("out", self.file, "delete it", f"cannot be read ({error})") from None
        self._write()

    def is_due(self, step: int, last: bool) -> bool:
        return step > 0 and (last or step % self.every == 0) and all(row["step"] != step for row in self._rows)

    def run(self, step: int, checkpoint: Path, device: torch.device, dtype: torch.dtype, tracker: Tracker | None):
        """Scores a checkpoint folder, appends a row and reports its numbers."""
        gallery = Gallery.of(self._pairs + self._others)
        with Engine.from_pretrained(checkpoint, device=str(device), dtype=dtype) as engine:
            scores = evaluate(engine, self._pairs, gallery, HOW)
            joint = evaluate_joint(engine, gallery, HOW, JOINT_SAMPLES)
            samples = self._sampled(engine) if self._sources else None
        row = {"step": step, "test": asdict(scores), "joint": asdict(joint) if joint else None}
        row |= {"samples": samples} if samples else {}
        self._rows.append(row)
        self._write()
        if tracker is not None:
            tracker.log(step, _numbers(row))

    def _sampled(self, engine: Engine) -> dict[str, dict]:
        """Scores of images drawn from held-out captions, and of texts that describe held-out images, by name."""
        pairs, skipped = self._sources, skipped_tasks(engine.config)
        scores: dict[str, Score] = {}
        if "text-to-image" not in skipped and len(pairs) > 1:
            words = engine.config.model.modality(evaluated_modalities(engine.config)[1]).tokens
            drawn = drawn_images(engine, [shortened(item.captions[0], words) for item, _ in pairs], HOW)
            network, cache = feature_network(None, engine.device), cache_folder()
            references = cache and cache / "references"
            scores |= image_scores(network, lambda: iter(drawn), self._held_out, Bootstrap(), references)
        if "image-to-text" not in skipped:
            texts = described_images(engine, "image-to-text", [from_levels(pixels) for _, pixels in pairs], HOW)
            captions = {item.image_id: item.captions for item in self._held_out.items}
            scores |= text_scores(texts, [item.image_id for item, _ in pairs], captions, Bootstrap(), {})
        return {name: asdict(score) for name, score in scores.items()}

    def _write(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self._rows)
        write_atomically(self.file, lambda path: path.write_text(lines))


def _read(data: CaptionedImages, count: int, size: int) -> Pairs:
    """Images of a data set, evenly spaced."""
    return list(replace(data, items=tuple(spread(data.items, count))).read(size))


def _numbers(row: dict) -> dict[str, float]:
    """Its single scores, by names such as "evaluation/test word_f1"."""
    parts = {name: row[name] or {} for name in ("test", "joint")}
    numbers = {
        f"evaluation/{name} {key}": value
        for name, scores in parts.items()
        for key, value in scores.items()
        if isinstance(value, float)
    }
    return numbers | {f"evaluation/samples {name}": score["value"] for name, score in row.get("samples", {}).items()}
