"""The HTTP application: endpoints, access control and the page."""

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from mimetypes import guess_type
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, WithJsonSchema
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from engine.serving.async_engine import AsyncEngine
from engine.serving.errors import AsciiJSON, ServiceError, internal_error, refused
from engine.serving.inputs import Limits
from engine.serving.metrics import METRICS_TYPE
from engine.serving.models import model_card, vocabulary
from engine.serving.native import infill
from engine.serving.openai_shape import captions, edits, generations
from engine.serving.schemas import (
    CaptionBody,
    CaptionsAnswer,
    EditBody,
    ErrorAnswer,
    GenerationBody,
    ImagesAnswer,
    InfillAnswer,
    InfillBody,
)
from engine.serving.service import Job, Service

PAGE = Path(__file__).parent / "page"
PROTECTED = ("/v1/", "/metrics")
ERRORS = {status: {"model": ErrorAnswer} for status in (400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503, 504)}
Count = Annotated[str, WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 1000})]  # checked by the endpoint


def create_app(
    engine: AsyncEngine,
    *,
    model: str = "psunet",
    limits: Limits = Limits(),  # noqa: B008 - frozen
    tokens: Sequence[str] = (),
    origins: Sequence[str] = (),
    warmup: int = 0,
    drain: float = 30.0,
) -> FastAPI:
    """The service of one engine; the engine is drained and closed when the application ends.

    model    the name under which clients know the model
    tokens   of which clients have to send one, if there are any: "Authorization: Bearer …"
    origins  of other pages whose scripts may call the service (CORS)
    warmup   samples in the largest batch to warm up for; 0: none
    drain    seconds that running requests have to end in at the application's end
    """

    @asynccontextmanager
    async def lifespan(_):
        warming = asyncio.ensure_future(service.warmup(warmup))
        yield
        await engine.drain(drain)
        await warming

    app = FastAPI(
        title="psunet-engine",
        version="1",
        summary="Joint text-and-image diffusion: give any part of an image and its caption, get the rest.",
        lifespan=lifespan,
        docs_url=None,  # its pages load scripts from other hosts
        redoc_url=None,
        openapi_tags=[{"name": "native"}, {"name": "OpenAI's shape"}, {"name": "service"}],
        middleware=guards(tokens, origins),
    )
    service = Service(engine, model, limits)
    _add_errors(app)
    _add_sampling(app, service)
    _add_lists(app, service)
    _add_service(app, service)
    _add_page(app)
    app.openapi = partial(_openapi, app)
    return app


def guards(tokens: Sequence[str], origins: Sequence[str]) -> list[Middleware]:
    """The middleware, outermost first; `tokens` and `origins` as for `create_app`."""
    headers = ["Authorization", "Content-Type"]
    cors = Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=headers)
    return [cors] * bool(origins) + [Middleware(Gate, tokens=tokens, origins=origins)]


def _add_sampling(app: FastAPI, service: Service) -> None:
    def add(path: str, body: type[BaseModel], answer: type[BaseModel], job: Callable[..., Job], tag: str, about: str):
        async def endpoint(http: HttpRequest) -> Response:
            return await service.serve(http, job(service, await service.read(http, body)))

        answers = {200: {"model": answer}, **ERRORS}
        if "stream" in body.model_fields:
            answers[200]["content"] = {"text/event-stream": {}}
        about = {"summary": about, "tags": [tag], "name": job.__name__, "openapi_extra": _body_of(body)}
        app.add_api_route(path, endpoint, methods=["POST"], responses=answers, **about)

    shape = "OpenAI's shape"
    add("/v1/infill", InfillBody, InfillAnswer, infill, "native", "Generate whatever is not given")
    add("/v1/images/generations", GenerationBody, ImagesAnswer, generations, shape, "Images from words")
    add("/v1/images/edits", EditBody, ImagesAnswer, edits, shape, "Regenerate a part of an image")
    add("/v1/captions", CaptionBody, CaptionsAnswer, captions, "native", "Words for an image")

    @app.delete("/v1/requests/{id}", tags=["native"], summary="Cancel a request", responses=ERRORS)
    async def cancel(id: str) -> Response:
        handle = service.engine.find(id)
        if handle is None:
            raise refused("id", "is not that of a request that is being served", "not_found", 404)
        handle.cancel()
        return AsciiJSON({"id": id, "cancelled": True})


def _body_of(model: type[BaseModel]) -> dict:
    """The body of an endpoint that reads it itself, for the OpenAPI document."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    examples = {f"example {i}": {"value": value} for i, value in enumerate(schema.pop("examples", ()), 1)}
    content = {"application/json": {"schema": schema, "examples": examples}, "multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def _openapi(app: FastAPI) -> dict:
    """The document, without the status 422, which FastAPI lists for every endpoint and this service never returns."""
    document = FastAPI.openapi(app)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document


def _add_lists(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["OpenAI's shape"], summary="The model that is served")
    async def models() -> Response:
        return AsciiJSON({"object": "list", "data": [model_card(service)]})

    @app.get("/v1/models/{model}", tags=["OpenAI's shape"], summary="A model by its name", responses=ERRORS)
    async def one_model(model: str) -> Response:
        if model != service.model:
            raise refused("model", f"is not served here; use {service.model}", "not_found", 404)
        return AsciiJSON(model_card(service))

    @app.get("/v1/vocabulary", tags=["native"], summary="Words that the model knows", responses=ERRORS)
    async def words(http: HttpRequest, prefix: str = "", limit: Count = "20") -> Response:
        if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= 1000:
            raise refused("limit", "use a whole number from 1 to 1000")
        return AsciiJSON({"words": vocabulary(service, prefix, int(limit))})


def _add_service(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["service"], summary="Whether the process is alive")
    async def health() -> Response:
        alive = service.engine.alive
        return AsciiJSON({"status": "ok" if alive else "closed"}, 200 if alive else 503)

    @app.get("/ready", tags=["service"], summary="Whether a request would be taken and served at once")
    async def ready() -> Response:
        ready = service.engine.ready
        return AsciiJSON({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/metrics", tags=["service"], summary="For Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=METRICS_TYPE)


def _add_page(app: FastAPI) -> None:
    headers = {
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
        "Cache-Control": "no-cache",
    }
    for file in sorted(PAGE.iterdir()):  # read now: a FileResponse that is cut off leaves its file open
        path = "/" if file.name == "index.html" else f"/{file.name}"
        endpoint = _file(file.read_bytes(), guess_type(file.name)[0], headers)
        app.add_api_route(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)


def _file(content: bytes, media_type: str | None, headers: dict[str, str]) -> Callable:
    async def endpoint() -> Response:
        return Response(content, headers=headers, media_type=media_type)

    return endpoint


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ServiceError)
    async def foreseen(_, error: ServiceError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def of_http(_, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return ServiceError(error.status_code, code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unforeseen(_, error: Exception) -> Response:  # the server logs it
        return internal_error().response()


class Gate:
    """Middleware for the paths under PROTECTED: checks the token and refuses scripts of other pages."""

    def __init__(self, app, tokens: Sequence[str], origins: Sequence[str]):
        self.app, self._digests = app, [_digest(token.encode()) for token in tokens]
        self._origins = {origin.encode() for origin in origins}

    async def __call__(self, scope, receive, send) -> None:
        protected = scope["type"] == "http" and scope["path"].startswith(PROTECTED) and scope["method"] != "OPTIONS"
        error = self._error(dict(scope["headers"])) if protected else None
        await (self.app if error is None else error.response())(scope, receive, send)

    def _error(self, headers: dict[bytes, bytes]) -> ServiceError | None:
        # Any page can post a form to any address; browsers mark such requests.
        if headers.get(b"sec-fetch-site") == b"cross-site" and headers.get(b"origin") not in self._origins:
            return ServiceError(403, "forbidden", "scripts of other pages may not call this service (--cors)")
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        # Digests of equal length, all compared, so that the time taken does not depend on the tokens.
        matches = [secrets.compare_digest(_digest(token.strip()), digest) for digest in self._digests]
        if self._digests and (kind.lower() != b"bearer" or not any(matches)):
            challenge = {"WWW-Authenticate": "Bearer"}
            return ServiceError(401, "unauthorized", "send a token: Authorization: Bearer …", headers=challenge)
        return None


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
