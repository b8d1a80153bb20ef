"""The description of the model and its vocabulary, as clients get them."""

from dataclasses import asdict

from engine.codecs.text import TextCodec
from engine.request import TASKS, Request
from engine.serving.service import Service


def model_card(service: Service) -> dict:
    """The model as in OpenAI's list, with its modalities, tasks, defaults and limits."""
    config, defaults = service.config, Request()
    codecs = service.codecs
    text = codecs.get("text")
    image = codecs.get("image")
    known = {"size": f"{image.size}x{image.size}"} if image is not None else {}
    if isinstance(text, TextCodec):
        known |= {"words": text.tokens, "vocabulary_size": len(text.vocabulary) - 1}
    modalities = [{"name": name, "kind": config.codecs[name].kind} for name in codecs]
    order = list(config.sampling.order) if config.sampling.order != "together" else "together"
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "psunet-engine",
        "modalities": modalities,
        **known,
        "tasks": [task for task in TASKS[1:] if {"text", "image"} <= codecs.keys() or task in ("joint", "infill")],
        "defaults": {
            "steps": defaults.steps,
            "guidance": dict(config.sampling.guidance),
            "temperature": dict(config.sampling.temperature),
            "order": order,
            "feather": config.sampling.feather,
            "solver": defaults.solver,
        },
        "adapters": service.engine.engine.adapters,
        "limits": asdict(service.limits) | {"queue": service.engine.max_queue},
    }


def vocabulary(service: Service, prefix: str, limit: int) -> list[str]:
    """Known words that begin with `prefix`: that word itself, then the most frequent ones of the training captions."""
    text = service.codecs.get("text")
    if not isinstance(text, TextCodec):
        return []
    prefix = prefix.lower()
    found = [word for word in text.vocabulary[1:] if word.startswith(prefix)]  # without "</s>"
    return sorted(found, key=lambda word: word != prefix)[:limit]
