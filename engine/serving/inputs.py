"""What clients send: bodies of JSON or multipart/form-data, read within limits, and the images and texts in them.

No URL is ever fetched and no path opened: an image is bytes, base64 or a data: URL.
"""

import asyncio
import base64
import binascii
import io
import json
import re
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from functools import cache, partial

from fastapi import Request as HttpRequest
from PIL import Image
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from engine.errors import cut, shown
from engine.images import IMAGE_ERRORS
from engine.serving.errors import ServiceError, refused

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow reads others with external programs or less robust decoders
DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)  # browsers do not know the type of every file
PART = r"\[([^\[\]]+)\]"
PART_OF = re.compile(f"(inputs|masks){PART}")  # a form's field "inputs[sketch]"
LEFT_OUT = re.compile(r"^(Input|List) |, unable to parse.*| after validation")  # of Pydantic's messages
MOST_PARTS, MOST_FILES = 64, 8  # of a form
CONSTANTS = ("NaN", "Infinity", "-Infinity")  # which Python's JSON has beyond the standard
EXAMPLE = '{"prompt": "red heart"}'
IN_FORMS = {"boolean": "true or false", "integer": "a whole number", "number": "a number"}  # other types: as in JSON


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 16 * 2**20
    body_seconds: float = 30.0  # until the body is there
    pixels: int = 16 * 2**20  # of an image or mask, as its header says
    prompt_chars: int = 4000
    num: int = 64  # samples
    steps: int = 250
    calls: int = 2500  # of the model, for each sample: steps · resample, or steps · (1 + inner_steps)
    seconds: float = 300.0  # until the answer is there

    def most(self, field: str) -> float:
        """The largest value of a body's field, where the service has a limit of its own for it."""
        named = {"num": self.num, "n": self.num, "steps": self.steps, "num_inference_steps": self.steps}
        return {**named, "deadline": self.seconds}.get(field, float("inf"))


async def read(http: HttpRequest, model: type[BaseModel], limits: Limits) -> BaseModel:
    """The body of a request, checked against its model. Raises ServiceError."""
    if http.query_params:
        problem = "is a query parameter, of which this endpoint has none; send it in the body"
        raise refused(next(iter(http.query_params)), problem, "unsupported_field")
    coding = http.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        problem = f"Content-Encoding {cut(coding, 100)} is not supported; send the body without it, uncompressed"
        raise ServiceError(415, "unsupported_media_type", problem, headers={"Accept-Encoding": "identity"})
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    readers = {"application/json": _read_json, "multipart/form-data": partial(_read_form, model=model)}
    if kind not in readers:
        problem = f"Content-Type {cut(kind, 100)} is not supported" if kind else "there is no Content-Type"
        raise ServiceError(415, "unsupported_media_type", f"{problem}; send {' or '.join(readers)}")
    fields = await _in_time(readers[kind](http, limits), http, limits)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error, limits) from None


async def whole(http: HttpRequest, limits: Limits) -> bytes:
    """The body of a request as it is. Raises ServiceError."""
    return await _in_time(_joined(http, limits), http, limits)


async def _in_time(reading: Coroutine, http: HttpRequest, limits: Limits):
    length = http.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length) > limits.body_bytes:
        reading.close()
        raise _too_large(limits)
    try:
        return await asyncio.wait_for(reading, limits.body_seconds)
    except asyncio.TimeoutError:
        problem = f"the body was not there within {limits.body_seconds:g} s; send it at once, or a smaller one"
        raise ServiceError(408, "timeout", problem) from None
    except ClientDisconnect:  # nobody reads the answer
        raise ServiceError(400, "invalid_body", "the body ends before its Content-Length") from None


def _refusal(error: ValidationError, limits: Limits) -> ServiceError:
    """About the first field that is wrong, with its value and all that it may be."""
    errors = error.errors(include_url=False)
    first = errors[0]
    if not first["loc"]:  # pydantic does not say which
        return ServiceError(400, "invalid_body", "a field's name is not Unicode; use those of /openapi.json")
    name = _named(first["loc"])
    match first["type"], first["input"]:
        case "extra_forbidden", _:
            return refused(name, "is not a field of this endpoint; leave it out", "unsupported_field")
        case "missing", _:
            return refused(name, "is missing; send it")
        case "string_too_long", value:
            return refused(name, f"has {len(value)} characters; use at most {first['ctx']['max_length']}")
        case _, bytes():
            return refused(name, "is a file; send a value")
        case "less_than_equal", value if limits.most(name) < first["ctx"]["le"]:
            return refused(name, f"{shown(value)} should be less than or equal to {limits.most(name)}")
    messages = [e["msg"] for e in errors if _named(e["loc"]) == name and e["type"] != "bytes_type"]  # bytes: of forms
    return refused(name, wrong_value(first["input"], messages))


def wrong_value(value, messages: list[str]) -> str:
    """What is wrong with a value; Pydantic has a message for each type that it could have."""
    said = [LEFT_OUT.sub("", message) for message in messages]
    return f"{shown(value)} {', or '.join(dict.fromkeys(said))}"


def _named(place: tuple[str | int, ...]) -> str:
    """The field at a place in a body: of a list as a whole, of an object the part."""
    name = str(place[0])
    return f"{name}[{place[1]!r}]" if name in ("inputs", "masks") and len(place) > 1 else name


def _too_large(limits: Limits) -> ServiceError:
    return ServiceError(413, "too_large", f"the body is too large; send at most {limits.body_bytes} bytes")


async def _chunks(http: HttpRequest, limits: Limits) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in http.stream():
        size += len(chunk)
        if size > limits.body_bytes:
            raise _too_large(limits)
        yield chunk


async def _joined(http: HttpRequest, limits: Limits) -> bytes:
    return b"".join([chunk async for chunk in _chunks(http, limits)])


async def _read_json(http: HttpRequest, limits: Limits) -> dict:
    body = await _joined(http, limits)
    try:
        fields = await asyncio.to_thread(_from_json, body)
    except ValueError as error:
        problem = f"the body is not JSON ({error}); send an object such as {EXAMPLE}"
        raise ServiceError(400, "invalid_body", problem) from None
    if not isinstance(fields, dict):
        raise ServiceError(400, "invalid_body", f"the body is not a JSON object; send one such as {EXAMPLE}")
    return fields


def _from_json(text: str | bytes):
    """Raises ValueError with what is wrong in words for the client, ServiceError for a name that is there twice."""
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        reason = f"{error.msg}: line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError:
        reason = "it is not in UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        constant = f", {error}" if str(error) in CONSTANTS else ""
        reason = f"it has a number that cannot be read{constant}"
    raise ValueError(reason)


def _no_constant(name: str):
    raise ValueError(name)  # NaN and Infinity are not JSON


def _once(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON; of the values of a repeated name all but the last would be dropped without a word."""
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise refused(name, "is given twice; give it once")
        fields[name] = value
    return fields


class _FormParser(MultiPartParser):
    ended = False

    def on_end(self) -> None:
        self.ended = True


async def _read_form(http: HttpRequest, limits: Limits, model: type[BaseModel]) -> dict:
    """A form's fields. Numbers, booleans and objects are written as in JSON; lists also item by item."""
    parser = _FormParser(
        http.headers,
        _chunks(http, limits),
        max_files=MOST_FILES,
        max_fields=MOST_PARTS,
        max_part_size=limits.body_bytes,
    )
    try:
        form = await parser.parse()
        if not parser.ended:
            raise MultiPartException("Its last boundary is missing.")
    except (MultiPartException, ValueError, LookupError) as error:
        reason = f" ({error.message.rstrip('.')})" if isinstance(error, MultiPartException) else ""
        remedy = f"send a whole form (multipart/form-data) of at most {MOST_PARTS} fields and {MOST_FILES} files"
        problem = f"the body is not a form that can be read{reason}; {remedy}"
        raise ServiceError(400, "invalid_body", problem) from None
    properties, fields, lists = _properties(model), {}, {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if not value.filename and not value.size:  # what browsers send for a file that was not chosen
                    continue
                value = await value.read()
            name = name.removesuffix("[]")
            part = PART_OF.fullmatch(name)
            schema = {} if part else properties.get(name, {})
            if any("items" in kind for kind in kinds(schema)):
                lists.setdefault(name, []).append(value)
                continue
            target, key = (fields.setdefault(part[1], {}), part[2]) if part else (fields, name)
            if not isinstance(target, dict) or key in target:
                raise refused(name, "is given twice; give it once")
            target[key] = _from_form(name, value, schema)
    finally:
        await form.close()
    return fields | {name: _list_from_form(name, values, properties[name]) for name, values in lists.items()}


@cache
def _properties(model: type[BaseModel]) -> dict[str, dict]:
    """The JSON schemas of a body's fields; making them takes milliseconds."""
    return model.model_json_schema()["properties"]


def kinds(schema: dict) -> list[dict]:
    """A JSON schema and its alternatives."""
    return [schema, *schema.get("anyOf", ())]


def _from_form(name: str, value: str | bytes, schema: dict):
    types = {kind.get("type") for kind in kinds(schema)}
    if isinstance(value, bytes) or not types - {"string", "null", None} or ("string" in types and value[:1] != "["):
        return value
    try:
        return _from_json(value)
    except ValueError:
        remedy = " or ".join(text for kind, text in IN_FORMS.items() if kind in types) or "it as in JSON"
        raise refused(name, f"{shown(value)} cannot be read; write {remedy}") from None


def _list_from_form(name: str, values: list[str | bytes], schema: dict):
    """A list as one field in JSON, or as a field for each item; or a word that may stand in its place."""
    words = [kind.get("const") for kind in kinds(schema)]
    if len(values) == 1 and (values[0][:1] == "[" or values[0] in (*words, "null")):
        return _from_form(name, values[0], schema)
    item = next(kind["items"] for kind in kinds(schema) if "items" in kind)
    return [_from_form(name, value, item) for value in values]


def open_upload(value: str | bytes, param: str, limits: Limits) -> Image.Image:
    """An image that a client sent; its pixels are not read yet. Raises ServiceError about `param`. Not on the loop."""
    data = value if isinstance(value, bytes) else _from_base64(value, param)
    if not data:
        raise refused(param, "is empty; send an image", "invalid_image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels = limits.pixels + 1
    except IMAGE_ERRORS:
        problem = f"is not a readable image; send a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
        raise refused(param, problem, "invalid_image") from None
    if pixels > limits.pixels:
        raise refused(param, f"has too many pixels; send at most {limits.pixels}", "too_large", 413)
    return image


def _from_base64(value: str, param: str) -> bytes:
    prefix = DATA_URL.match(value)
    text = value[prefix.end() :] if prefix else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # MIME's has lines of 76 characters
    except (binascii.Error, ValueError):
        problem = "is neither base64 nor a data: URL of an image; URLs are not fetched, files not opened"
        raise refused(param, problem, "invalid_image") from None


def known_text(prompt: str | None, limits: Limits) -> dict:
    """The arguments of `Request` for a prompt; "": the text is known to be empty, None: it is generated."""
    prompt = text(prompt, "prompt", limits)
    if prompt is None:
        return {}
    return {"prompt": prompt} if prompt else {"inputs": {"text": ""}}


def text(value: str | bytes | None, param: str, limits: Limits) -> str | None:
    """A text within the limits. Raises ServiceError about `param`."""
    if value is not None and not isinstance(value, str):
        raise refused(param, "is a file; send a text")
    if value is not None and len(value) > limits.prompt_chars:
        raise refused(param, f"has {len(value)} characters; use at most {limits.prompt_chars}")
    return value
