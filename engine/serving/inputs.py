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

from engine.images import IMAGE_ERRORS
from engine.serving.errors import ServiceError, refused

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow reads others with external programs or less robust decoders
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
PART_OF = re.compile(r"(inputs|masks)\[([^\[\]]+)\]")  # a form's field "inputs[sketch]"
MOST_PARTS = 64


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


async def read(http: HttpRequest, model: type[BaseModel], limits: Limits) -> BaseModel:
    """The body of a request, checked against its model. Raises ServiceError."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    readers = {"application/json": _read_json, "multipart/form-data": partial(_read_form, model=model)}
    if kind not in readers:
        raise ServiceError(415, "unsupported_media_type", f"send {' or '.join(readers)}, not {kind[:100] or 'nothing'}")
    fields = await _in_time(readers[kind](http, limits), http, limits)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _first_error(error) from None


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
        raise ServiceError(408, "timeout", f"the body was not there within {limits.body_seconds:g} s") from None


def _first_error(error: ValidationError) -> ServiceError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return ServiceError(400, "unsupported_field", f"{name}: is not a field of this endpoint; leave it out", name)
    return ServiceError(400, "invalid_value", f"{name}: {first['msg']}", name)


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
        fields = await asyncio.to_thread(json.loads, body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ServiceError(400, "invalid_body", "the body is not JSON") from None
    if not isinstance(fields, dict):
        raise ServiceError(400, "invalid_body", "the body is not a JSON object")
    return fields


def _no_constant(name: str):
    raise ValueError(name)  # NaN and Infinity are not JSON


async def _read_form(http: HttpRequest, limits: Limits, model: type[BaseModel]) -> dict:
    """A form's fields; numbers, booleans, lists and objects are written as in JSON."""
    parser = MultiPartParser(
        http.headers, _chunks(http, limits), max_files=8, max_fields=MOST_PARTS, max_part_size=limits.body_bytes
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, LookupError):
        raise ServiceError(400, "invalid_body", "the body is not multipart/form-data") from None
    properties, fields = _properties(model), {}
    try:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            part = PART_OF.fullmatch(name)
            target, key = (fields.setdefault(part[1], {}), part[2]) if part else (fields, name)
            if not isinstance(target, dict) or key in target:
                raise refused(name, "is given twice; give it once")
            if isinstance(value, UploadFile):
                target[key] = await value.read()
            else:
                target[key] = value if part else _from_form(name, value, properties.get(name, {}))
    finally:
        await form.close()
    return fields


@cache
def _properties(model: type[BaseModel]) -> dict[str, dict]:
    """The JSON schemas of a body's fields; making them takes milliseconds."""
    return model.model_json_schema()["properties"]


def _from_form(name: str, value: str, schema: dict):
    types = {kind.get("type") for kind in (schema, *schema.get("anyOf", ()))}
    if not types & {"integer", "number", "boolean", "array", "object"} or ("string" in types and value[:1] != "["):
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise refused(name, "cannot be read; write it as in JSON") from None


def open_upload(value: str | bytes, param: str, limits: Limits) -> Image.Image:
    """An image that a client sent; its pixels are not read yet. Raises ServiceError about `param`. Not on the loop."""
    data = value if isinstance(value, bytes) else _from_base64(value, param)
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
    try:
        return base64.b64decode(value[prefix.end() :] if prefix else value, validate=True)
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
