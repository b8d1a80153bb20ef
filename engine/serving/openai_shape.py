"""`/v1/images/generations`, `/v1/images/edits` and `/v1/captions`: requests in the shape of OpenAI's."""

from dataclasses import replace

from PIL import Image

from engine.errors import shown
from engine.images import WHITE, open_image
from engine.request import Request, Result, Sample
from engine.serving.errors import refused
from engine.serving.handle import Handle, Preview
from engine.serving.inputs import known_text, open_upload
from engine.serving.schemas import CaptionBody, EditBody, GenerationBody
from engine.serving.service import Event, Job, Service, created, encoded, words_of

NAMES = {"num": "n", "steps": "num_inference_steps", "guidance": "guidance_scale"}


def generations(service: Service, body: GenerationBody) -> Job:
    return _images(service, body, "image_generation", lambda: {})


def edits(service: Service, body: EditBody) -> Job:
    if body.mask is not None and body.mask_image is not None:
        raise refused("mask_image", "is given beside mask; send one of them")
    job = _images(service, body, "image_edit", lambda: _image_and_mask(service, body))
    return job if body.mask_image is None else replace(job, names={**NAMES, "mask": "mask_image"})


def _images(service: Service, body: GenerationBody, kind: str, given) -> Job:
    """kind   the first word of the events' names
    given  makes the arguments of `Request` that are images
    """
    check_model(service, body.model)
    size, image_format = _check_output(service, body), body.output_format or "png"
    steps, partial = body.num_inference_steps or Request.steps, body.partial_images or 0
    about = {"size": size, "background": "opaque", "output_format": image_format}
    shown: dict[int, int] = {}  # previews that were sent, by sample

    def request() -> Request:
        num, text = body.n or 1, known_text(body.prompt, service.limits)
        options = {"steps": steps, "guidance": body.guidance_scale, "unknown_words": body.unknown_words}
        return Request(num=num, seed=body.seed, **options, **text, **given())

    def image(sample: Sample) -> str:
        return encoded(sample.image, image_format, body.output_compression)

    def answer(handle: Handle, result: Result) -> dict:
        data = [
            {"b64_json": image(sample), "revised_prompt": sample.outputs.get("text"), "seed": sample.seed}
            for sample in result.samples
        ]
        return {"created": created(), "data": data, **about}

    def preview(handle: Handle, news: Preview) -> list[Event]:
        events = []
        for i, sample in sorted(news.samples.items()):
            number = shown.get(i, 0)
            if "image" in sample.outputs and number < partial:
                shown[i] = number + 1
                name = f"{kind}.partial_image"
                data = {"b64_json": image(sample), "partial_image_index": number, "index": i}
                events.append((name, {"type": name, **data, "created_at": created(), "quality": "auto", **about}))
        return events

    def final(whole: dict) -> list[Event]:
        name = f"{kind}.completed"
        rest = {"created_at": whole["created"], "quality": "auto", **about}
        return [(name, {"type": name, **one, "index": i, **rest}) for i, one in enumerate(whole["data"])]

    return Job(
        request, answer, final, preview, NAMES, stream=bool(body.stream), counts=False,
        user=body.user,
        preview_every=max(1, steps // (partial + 1)) if partial else 0,
    )  # fmt: skip


def check_model(service: Service, model: str | None) -> None:
    """Raises ServiceError for the name of another model."""
    if model not in (None, service.model):
        raise refused("model", f"{shown(model)} is not served here; use {service.model}", "model_not_found", 404)


def _check_output(service: Service, body: GenerationBody) -> str:
    """The size of the images. Raises ServiceError about fields that ask for something else."""
    codec = service.codecs.get("image")
    if codec is None:
        raise refused("model", "makes no images", "unsupported_field")
    size = f"{codec.size}x{codec.size}"
    if body.size not in (None, "auto", size):
        raise refused("size", f"{shown(body.size)} is not that of this model; use {size} or auto")
    if body.output_compression is not None and body.output_format in (None, "png"):
        raise refused("output_compression", "is for jpeg and webp; set output_format")
    if body.partial_images and not body.stream:
        raise refused("partial_images", "needs stream; set stream to true")
    return size


def _image_and_mask(service: Service, body: EditBody) -> dict[str, Image.Image]:
    image = open_image(open_upload(body.image, "image", service.limits), "image")
    if body.mask_image is not None:
        return {"image": image, "mask": open_upload(body.mask_image, "mask_image", service.limits)}
    param = "image" if body.mask is None else "mask"
    mask = image if body.mask is None else open_image(open_upload(body.mask, "mask", service.limits), "mask")
    white = mask.convert("RGBA").getchannel("A").point(lambda alpha: 255 - alpha)
    highest = white.getextrema()[1]
    if highest <= WHITE:
        others = "mask or mask_image" if body.mask is None else "mask_image"
        problem = f"is nowhere transparent: its lowest alpha is {255 - highest} of 255"
        raise refused(param, f"{problem}; make it so where it is to be edited, or send {others}", "invalid_image")
    return {"image": image, "mask": white}


def captions(service: Service, body: CaptionBody) -> Job:
    check_model(service, body.model)

    def request() -> Request:
        return Request(
            image=open_upload(body.image, "image", service.limits),
            num=body.n,
            seed=body.seed,
            steps=body.steps,
            guidance=body.guidance,
            unknown_words=body.unknown_words,
            **known_text(body.prompt, service.limits),
        )

    def answer(handle: Handle, result: Result) -> dict:
        data = [
            {"text": s.text, "confidence": round(s.confidence, 4), "words": words_of(s), "seed": s.seed}
            for s in result.samples
        ]
        return {"created": created(), "data": data}

    return Job(request, answer, names={"num": "n", "inputs['text']": "prompt"})
