"""`/v1/infill`: all arguments of `Request`, under the same names."""

from engine.errors import shown
from engine.request import Request, most_repeats
from engine.serving.errors import refused
from engine.serving.handle import Handle, Preview
from engine.serving.inputs import known_text, open_upload, text
from engine.serving.schemas import InfillBody
from engine.serving.service import Event, Job, Service, created, described, timings

SAME = ("num", "steps", "solver", "guidance", "guidance_kind", "guidance_interval", "eta", "resample", "jump",
        "step_cache", "order", "unknown_words", "task", "spacing", "infill", "inner_steps", "step_size",
        "adapter", "adapter_scale", "temperature")  # fmt: skip

IMAGES = ("image", "mask", "sketch", "sketch_mask")


def infill(service: Service, body: InfillBody) -> Job:
    if body.preview_every and not body.stream:
        raise refused("preview_every", "needs stream; set stream to true")

    def answer(handle: Handle, result) -> dict:
        samples = [described(sample, i, body.output_format) for i, sample in enumerate(result.samples)]
        head = {"id": handle.id, "created": created(), "model": service.model, "task": result.task}
        middle = {key: getattr(result, key) for key in ("order", "guidance", "solver", "spacing")}
        return head | middle | {"samples": samples, "timings": timings(handle)}

    def preview(handle: Handle, shown: Preview) -> list[Event]:
        samples = [described(sample, i, body.output_format) for i, sample in sorted(shown.samples.items())]
        return [("preview", {"done": shown.done, "samples": samples})]

    return Job(
        lambda: _request(body, service),
        answer,
        preview=preview,
        names={} if body.deadline is None else {"deadline": "deadline"},
        priority=body.priority,
        deadline=body.deadline,
        stream=body.stream,
        preview_every=body.preview_every,
    )


def _check(body: InfillBody, service: Service) -> None:
    """Raises ServiceError for what the engine would refuse only after images are opened, or with its own bounds."""
    limits = service.limits
    repeated, most = most_repeats(body.infill, body.steps, limits.calls)
    if body.steps <= limits.steps and getattr(body, repeated) > most:
        raise refused(repeated, f"{getattr(body, repeated)} makes too many steps; use at most {most}, or fewer steps")
    names = service.config.codecs
    for key in ("inputs", "masks"):
        for name in getattr(body, key):
            if name not in names:
                raise refused(f"{key}[{shown(name)}]", f"is not a modality of the model; use one of {', '.join(names)}")


def _request(body: InfillBody, service: Service) -> Request:
    _check(body, service)
    limits, given = service.limits, {}
    for name, value in body.inputs.items():
        read = text if service.is_text(name) else open_upload
        given[name] = read(value, f"inputs[{name!r}]", limits)
    if body.prompt is not None and "text" in given:
        raise refused("prompt", "is given twice; leave it out of inputs")
    uploads = {key: getattr(body, key) for key in IMAGES}
    words = known_text(body.prompt, limits)
    return Request(
        prompt=words.get("prompt"),
        **{key: None if data is None else open_upload(data, key, limits) for key, data in uploads.items()},
        inputs=given | words.get("inputs", {}),
        masks={name: open_upload(value, f"masks[{name!r}]", limits) for name, value in body.masks.items()},
        seed=body.seed,
        **{name: getattr(body, name) for name in SAME},
    )
