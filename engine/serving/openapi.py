"""The OpenAPI document: FastAPI's, with what it does not know of endpoints that read their bodies themselves."""

from collections.abc import Mapping

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from engine.serving.inputs import PART, Limits, kinds
from engine.serving.schemas import ErrorAnswer

ABOUT = """\
Bodies are JSON or `multipart/form-data`. In JSON, an image is base64 or a data: URL; in a form it may be a file. In a
form, numbers and booleans are written as in JSON, a list as in JSON or as a field for each item, and `inputs` and
`masks` as a field for each modality, such as `inputs[image]`. A text is taken as it is: leave the field out where it
would be null.

A given image is turned as its EXIF data say, and its transparent parts become white; its middle square is used, resized
to the model's size (`size` in `/v1/models`). A mask has the size of its turned image. A pixel brighter
than 127 of 255 counts as white, one whose alpha is below 128 as transparent.

Every error of an endpoint has a status and an error object: `param` names the field, `message` says what to do, `code`
is for programs. With 429 and 503, `Retry-After` says in how many seconds to try again. What one request may ask for is
in `/v1/models` under `limits`: `calls` is how often the model may be called for one sample, `seconds` how long a whole
request may take, and `body_seconds` how long its body may take to arrive."""
STREAM = """\
With `stream`, the answer is server-sent events, of which each has a name and JSON as data: {}. The last line of data is
`[DONE]`; lines that begin with a colon are comments. A request that is refused has a status and no events; one that
fails later ends with the event `error`. A client that disconnects cancels its request."""
FILE = {"type": "string", "format": "binary", "description": "a file: PNG, JPEG, WebP, GIF or BMP"}
PARTS = {f"^inputs{PART}$": {"type": "string", "description": "a text, or the file of an image"},
         f"^masks{PART}$": FILE}  # fmt: skip
TOKEN = {
    "type": "http",
    "scheme": "bearer",
    "description": "asked for where the service was started with --token-file",
}
REF = "#/components/schemas/{model}"
Events = Mapping[str, type[BaseModel]]  # the schemas of their data, by their names


def errors(*statuses: int) -> dict[int | str, dict]:
    """Answers of an endpoint that are errors."""
    return {status: {"model": ErrorAnswer} for status in statuses}


def about_stream(events: Events) -> dict:
    """What an endpoint that can stream says of it: its description, and the content of its answer."""
    return {
        "description": STREAM.format(", ".join(f"`{name}`" for name in events)),
        "content": {"text/event-stream": {"schema": _stream([_event(*event) for event in events.items()])}},
    }


def _stream(events: list[dict]) -> dict:
    """A text that stands for a list of events: OpenAPI has a field of its own for this from 3.2 only."""
    content = {"type": "array", "items": {"oneOf": events}}
    return {"type": "string", "contentMediaType": "text/event-stream", "contentSchema": content}


def _event(name: str, data: type[BaseModel]) -> dict:
    content = {"contentMediaType": "application/json", "contentSchema": {"$ref": REF.format(model=data.__name__)}}
    properties = {"event": {"const": name}, "data": {"type": "string", **content}}
    return {"type": "object", "properties": properties, "required": ["event", "data"]}


def document(
    app: FastAPI, bodies: Mapping[str, type[BaseModel]], events: list[type[BaseModel]], limits: Limits
) -> dict:
    """The document of `app`.

    bodies  of the endpoints that read theirs themselves, by path
    events  data of events, beside answers that FastAPI knows
    limits  of the service, which can be lower than the bodies' own bounds
    """
    found = FastAPI.openapi(app)
    components = found["components"]
    components["schemas"] |= models_json_schema([(model, "serialization") for model in events], ref_template=REF)[1][
        "$defs"
    ]
    components["securitySchemes"] = {"token": TOKEN}
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # which FastAPI lists everywhere, and this service never returns
            if "401" in operation["responses"]:
                operation["security"] = [{"token": []}, {}]
            for status, answer in operation["responses"].items():  # FastAPI gives errors the type of the other answer
                if status != "200" and "text/plain" in answer.get("content", {}):
                    answer["content"] = {"application/json": answer["content"].pop("text/plain")}
        if path in bodies:  # not through FastAPI's openapi_extra: it makes bounds floats, which round 2^64 − 1
            operations["post"]["requestBody"] = _body(bodies[path], limits)
    return found


def _body(model: type[BaseModel], limits: Limits) -> dict:
    schema = model.model_json_schema(ref_template=REF)
    examples = {f"example {i}": {"value": value} for i, value in enumerate(schema.pop("examples", ()), 1)}
    for name, field in schema["properties"].items():
        for kind in kinds(field):
            if limits.most(name) < kind.get("maximum", 0):
                kind["maximum"] = limits.most(name)
    form = {**schema, "properties": {name: _in_form(field) for name, field in schema["properties"].items()}}
    if "inputs" in form["properties"]:
        form["patternProperties"] = PARTS
    content = {"application/json": {"schema": schema, "examples": examples}, "multipart/form-data": {"schema": form}}
    return {"required": True, "content": content}


def _in_form(field: dict) -> dict:
    """The schema of a body's field as a form has it: images are files."""
    if not any("contentEncoding" in kind for kind in kinds(field)):
        return field
    return FILE | {key: field[key] for key in ("title", "description") if key in field}
