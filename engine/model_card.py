"""A model card for the hub, written from a checkpoint's config and from what `engine.evaluate --json` printed."""

import json
from collections.abc import Iterable, Mapping

from engine.config import Config
from engine.errors import InputError

SCORES = {
    "retrieval_base": "text-to-image: the nearest image of the data has the prompt's base name",
    "retrieval_exact": "text-to-image: it has the prompt's whole name",
    "reordered_exact": "the same of prompts whose words are in a random order",
    "keyword_retrieval": "text-to-image of a further caption (a keyword): the nearest image has it too",
    "word_f1": "image-to-text: word F1 of the generated text against the name",
    "caption_exact": "image-to-text: the generated text is the name",
    "infill_rmse": "infilling the left half: error in levels of 0…255 (lower is better)",
    "autoencoder_psnr": "autoencoder alone: PSNR in dB",
}
JOINT = {
    "word_f1": "word F1 of a sample's text against the name of the image nearest to its image",
    "distinct_images": "different nearest images",
    "nearest_rmse": "distance to the nearest image in levels",
}
USE = """```python
from engine import Engine, Request

with Engine.from_pretrained({name}) as engine:
    result = engine.generate(Request({request}))
```
"""


def model_card(config: Config, name: str, evaluation: Mapping | None = None) -> str:
    """Markdown with the hub's metadata on top: the model's modalities, how to use it, and its scores if there are any.

    name        of the model on the hub, "owner/name"
    evaluation  the object that `python -m engine.evaluate --json` prints; raises InputError about "evaluation" if it is
                another one
    """
    kinds = {modality: codec.kind for modality, codec in config.codecs.items()}
    tasks = ["text-to-image"] * (kinds.get("image") == "image") + ["image-to-text"] * (kinds.get("text") == "text")
    tags = "".join(f"- {tag}\n" for tag in ("psunet-engine", "arxiv:2311.16488", *tasks))
    task = f"pipeline_tag: {tasks[0]}\n" if tasks else ""
    model, diffusion = config.model, config.diffusion
    rows = [
        (m.name, kinds.get(m.name, ""), m.tokens, m.channels, m.depth or "none", _settings(config, m.name))
        for m in model.modalities
    ]
    architecture = "PS-U-Net" if model.uvit is None else "U-ViT"
    request = 'prompt="…"' if "text" in kinds else ""
    return "\n".join(
        [
            f"---\nlibrary_name: psunet-engine\n{task}tags:\n{tags}---\n",
            f"# {name}\n",
            f"A {architecture} of psunet-engine: joint diffusion of {', '.join(m.name for m in model.modalities)}, "
            "each of which can be given, wholly or in part, or generated.\n",
            USE.format(name=json.dumps(name), request=request),
            _table(["modality", "codec", "tokens", "channels", "blocks on each side", "settings"], rows),
            f"Width {model.dim}, {model.shared_depth} shared blocks; {diffusion.schedule} schedule of "
            f"{diffusion.timesteps} times, {diffusion.prediction} prediction, {diffusion.conditioning} conditioning, "
            f"{diffusion.time_sampling} training times.\n",
            *(_scores(evaluation) if evaluation is not None else []),
        ]
    )


def _settings(config: Config, modality: str) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.codecs[modality].settings.items())


def _scores(evaluation: Mapping) -> list[str]:
    """The section about the scores."""
    try:
        splits = {split: evaluation[split] for split in ("train", "test")}
        counts = ", ".join(f"{scores['count']} images of the {split} split" for split, scores in splits.items())
        rows = [(text, *(_number(of[key]) for of in splits.values())) for key, text in SCORES.items()]
        parts = [f"## Scores\n\n`python -m engine.evaluate` on {counts}:\n", _table(["", *splits], rows)]
        for split, scores in splits.items():
            if scores.get("disturbed"):
                rows = [(change, *map(_number, of.values())) for change, of in scores["disturbed"].items()]
                parts += [f"Describing changed images of the {split} split:\n"]
                parts += [_table(["", "word F1", "exact"], rows)]
        if joint := evaluation["joint"]:
            order = ", ".join(joint["order"]) or "all together"
            parts += [f"{joint['count']} joint samples, seed {joint['seed']}, order: {order}:\n"]
            parts += [_table(["", "joint"], [(text, _number(joint[key])) for key, text in JOINT.items()])]
        parts += [f"{task} was skipped: {reason}.\n" for task, reason in evaluation["skipped"].items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"is not a report of engine.evaluate ({type(error).__name__}: {error})"
        raise InputError("evaluation", evaluation, "give what engine.evaluate --json prints", problem) from None
    return parts


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _table(columns: Iterable[str], rows: Iterable[Iterable]) -> str:
    lines = [list(columns), ["---"] * len(list(columns)), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
