"""Bodies and answers of the service, from which its OpenAPI document is made.

Bounds and defaults are the engine's; a service's own limits, which may be lower, are in its list of models.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from engine.request import (
    GUIDANCE_KINDS,
    INFILLS,
    MAX_SEED,
    NUMBERS,
    SOLVERS,
    SPACINGS,
    TASKS,
    WHOLE_NUMBERS,
    Request,
)

ImageData = Annotated[
    str | bytes,
    WithJsonSchema(
        {
            "type": "string",
            "contentEncoding": "base64",
            "description": "base64 or a data: URL; in a form also a file. PNG, JPEG, WebP, GIF or BMP",
        }
    ),
]
InputData = Annotated[
    str | bytes,
    WithJsonSchema({"type": "string", "description": "a text; of other modalities an image: base64 or a data: URL"}),
]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"  # 1×1, white
Seed = Annotated[int, Field(ge=0, le=MAX_SEED, description="of the first sample, the others count up; null: random")]


def _whole(key: str, description: str):
    lowest, highest = WHOLE_NUMBERS[key]
    return Field(getattr(Request, key), ge=lowest, le=highest, description=description)


def _number(key: str, description: str):
    lowest, highest = NUMBERS[key]
    return Field(getattr(Request, key), ge=lowest, le=highest, description=description)


class Body(BaseModel):
    """Unknown fields are refused, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class InfillBody(Body):
    """What is given is known, everything else is generated."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "red heart", "seed": 7},
                {"image": PNG, "num": 2, "steps": 10},
                {"prompt": "_ heart", "image": PNG, "mask": PNG, "stream": True, "preview_every": 5},
            ]
        }
    )

    prompt: str | None = Field(None, description="words; _ is a word to be filled in; empty: known to be empty")
    image: ImageData | None = None
    mask: ImageData | None = Field(None, description="white: generate; black or transparent: keep")
    sketch: ImageData | None = Field(None, description="black lines on white, for a model that has sketches")
    sketch_mask: ImageData | None = Field(None, description="white: generate")
    inputs: dict[str, InputData] = Field({}, description="what is given of any modality, by its name")
    masks: dict[str, ImageData] = Field({}, description="masks of given images, by modality")
    num: int = _whole("num", "samples")
    steps: int = _whole("steps", "of the solver; for each modality in an order")
    solver: Literal[SOLVERS] | None = Field(None, description="null: dpm++, or ddpm where known parts are renoised")
    spacing: Literal[SPACINGS] | None = Field(None, description="of the times; null: the better one for the model")
    guidance: float | None = _number(
        "guidance", "scale; 1: none; null: the model's, by task, or 1 if nothing is given and order is together"
    )
    temperature: float | None = _number("temperature", "of words' probabilities; null: the model's, by task")
    guidance_kind: Literal[GUIDANCE_KINDS] | None = None
    guidance_interval: list[float] | None = Field(
        None, min_length=2, max_length=2, description="[start, end] of the guided steps, 0 to 1"
    )
    eta: float = _number("eta", "of solver ddim")
    seed: Seed | None = None
    resample: int = _whole("resample", "RePaint: how often each stretch of `jump` steps is done; 1: once")
    jump: int = _whole("jump", "steps of such a stretch; below `steps` if `resample` is above 1")
    infill: Literal[INFILLS] = Field(Request.infill, description="langevin: for models that renoise known parts")
    inner_steps: int = _whole("inner_steps", "of langevin: further calls of the model at each step")
    step_size: float = _number("step_size", "of langevin, in units of the noise's variance")
    step_cache: int = _whole("step_cache", "an approximation: run inner blocks at every `step_cache`-th step only")
    adapter: str | None = Field(None, description="the name of a LoRA adapter in the list of models; null: none")
    adapter_scale: float = _number("adapter_scale", "how much of the adapter is added to the weights")
    order: list[str] | Literal["together"] | None = Field(
        None, description="modalities, first to last; or together; null: the model's"
    )
    unknown_words: Literal["error", "fill"] = Request.unknown_words
    task: Literal[TASKS] = Request.task
    priority: int = Field(0, ge=-100, le=100, description="higher ones are served first")
    deadline: float | None = Field(None, gt=0, le=86400, description="seconds until the request is given up")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    stream: bool = Field(False, description="answer with server-sent events")
    preview_every: int = Field(0, ge=0, le=1000, description="steps between previews; 0: none; needs stream")


class Word(BaseModel):
    word: str
    confidence: float


class SampleAnswer(BaseModel):
    index: int = Field(description="0 to num - 1")
    seed: int
    outputs: dict[str, str] = Field(description="of each modality, given ones too: a text, or an image in base64")
    image: str | None = Field(None, description="the output of that name")
    text: str | None = Field(None, description="the output of that name")
    confidence: dict[str, float] = Field(description="of each text, 0 to 1")
    words: list[Word] = Field(description="of the text")


class Timings(BaseModel):
    queue_s: float
    run_s: float
    total_s: float
    steps: int


class InfillAnswer(BaseModel):
    id: str
    created: int
    model: str
    task: str
    order: list[str] = Field(description="in which modalities were generated; empty: together, or only one")
    guidance: float
    solver: str
    spacing: str
    samples: list[SampleAnswer]
    timings: Timings


class ErrorObject(BaseModel):
    message: str = Field(description="what is wrong and what to do")
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="the field that it is about")
    code: str = Field(description="for programs, such as invalid_value or queue_full")


class ErrorAnswer(BaseModel):
    error: ErrorObject


class QueuedEvent(BaseModel):
    id: str = Field(description="with which the request can be cancelled")
    position: int = Field(description="samples of other waiting requests that are served first, at most")


class ProgressEvent(BaseModel):
    done: int = Field(description="steps, those of all samples counted")
    total: int


class PreviewSample(SampleAnswer):
    outputs: dict[str, str] = Field(description="of each modality that has begun: a text, or an image in base64")


class PreviewEvent(BaseModel):
    done: int = Field(description="steps, those of all samples counted")
    samples: list[PreviewSample]


INFILL_EVENTS: dict[str, type[BaseModel]] = {
    "queued": QueuedEvent,
    "progress": ProgressEvent,
    "preview": PreviewEvent,
    "result": InfillAnswer,
    "error": ErrorAnswer,
}


class GenerationBody(Body):
    """OpenAI's fields that apply here, and seed, num_inference_steps, guidance_scale, unknown_words."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "red heart", "n": 2, "seed": 7}]})

    prompt: str | None = Field(None, description="words; _ is a word to be filled in; null: generated too")
    model: str | None = None
    n: int | None = Field(None, ge=1, le=WHOLE_NUMBERS["num"][1], description="images; null: 1")
    size: str | None = Field(None, description='the model\'s, such as "64x64", or "auto"')
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(
        None, ge=0, le=3, description="previews of each image, fewer if there are fewer steps; needs stream"
    )
    user: str | None = Field(None, max_length=256, description="kept in the service's log")
    seed: Seed | None = None
    num_inference_steps: int | None = Field(None, ge=1, le=WHOLE_NUMBERS["steps"][1])
    guidance_scale: float | None = Field(None, ge=-100, le=100)
    unknown_words: Literal["error", "fill"] = Request.unknown_words


class EditBody(GenerationBody):
    """As for generations, with an image of which a part is regenerated."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "red heart", "image": PNG, "mask_image": PNG, "seed": 7}]}
    )

    image: ImageData = Field(description="without mask and mask_image: transparent where it is edited")
    mask: ImageData | None = Field(None, description="of the image's size: transparent where the image is edited")
    mask_image: ImageData | None = Field(None, description="of the image's size: white where the image is edited")


class ImageAnswer(BaseModel):
    b64_json: str
    revised_prompt: str | None = Field(None, description="the words, with those that were filled in")
    seed: int


class ImagesAnswer(BaseModel):
    created: int
    data: list[ImageAnswer]
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    size: str


class ImageEvent(BaseModel):
    type: str = Field(description="the event's name")
    b64_json: str
    index: int = Field(description="of the image, 0 to n - 1")
    created_at: int
    size: str
    quality: Literal["auto"]
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]


class PartialImageEvent(ImageEvent):
    partial_image_index: int = Field(description="0 to partial_images - 1")


class CompletedImageEvent(ImageEvent):
    revised_prompt: str | None = Field(None, description="the words, with those that were filled in")
    seed: int


def image_events(kind: str) -> dict[str, type[BaseModel]]:
    """The events of images; their names begin with `kind`."""
    return {f"{kind}.partial_image": PartialImageEvent, f"{kind}.completed": CompletedImageEvent, "error": ErrorAnswer}


class CaptionBody(Body):
    """An image to describe."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": PNG}, {"image": PNG, "prompt": "_ heart"}]})

    image: ImageData
    prompt: str | None = Field(None, description="words that are known, _ for each one to be filled in")
    model: str | None = None
    n: int = Field(1, ge=1, le=WHOLE_NUMBERS["num"][1], description="captions")
    seed: Seed | None = None
    steps: int = _whole("steps", "of the solver")
    guidance: float | None = Field(None, ge=-100, le=100)
    unknown_words: Literal["error", "fill"] = Request.unknown_words


class Caption(BaseModel):
    text: str
    confidence: float
    words: list[Word]
    seed: int


class CaptionsAnswer(BaseModel):
    created: int
    data: list[Caption]


class CancelAnswer(BaseModel):
    id: str
    cancelled: Literal[True]


class Modality(BaseModel):
    name: str
    kind: str = Field(description="that of its codec: text, or one for images")


class ModelDefaults(BaseModel):
    steps: int
    guidance: dict[str, float] = Field(description="by task")
    temperature: dict[str, float] = Field(description="by task, of words; 1 for tasks not named")
    order: list[str] | Literal["together"]
    feather: int = Field(description="pixels over which generated and given parts of an image blend")
    solver: str | None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    modalities: list[Modality]
    size: str | None = Field(None, description="of images, such as 64x64")
    words: int | None = Field(None, description="of a text at most")
    vocabulary_size: int | None = None
    tasks: list[str]
    adapters: list[str] = Field(description="names that `adapter` may have")
    defaults: ModelDefaults
    limits: dict[str, float] = Field(description="of one request; queue: of the service")


class ModelsAnswer(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class VocabularyAnswer(BaseModel):
    words: list[str] = Field(description="that begin with `prefix`: that word itself, then the most frequent ones")


class StatusAnswer(BaseModel):
    status: Literal["ok", "closed", "ready", "not ready"]
