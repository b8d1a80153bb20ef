"""The HTTP application: endpoints, access control and the page."""

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from mimetypes import guess_type
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from engine.errors import cut
from engine.serving.async_engine import AsyncEngine
from engine.serving.errors import AsciiJSON, ServiceError, internal_error, refused
from engine.serving.inputs import Limits, wrong_value
from engine.serving.metrics import METRICS_TYPE
from engine.serving.models import model_card, vocabulary
from engine.serving.native import infill
from engine.serving.openai_shape import captions, check_model, edits, generations
from engine.serving.openapi import ABOUT, Events, about_stream, document, errors
from engine.serving.schemas import (
    INFILL_EVENTS,
    CancelAnswer,
    CaptionBody,
    CaptionsAnswer,
    EditBody,
    GenerationBody,
    ImagesAnswer,
    InfillAnswer,
    InfillBody,
    ModelCard,
    ModelsAnswer,
    StatusAnswer,
    VocabularyAnswer,
    image_events,
)
from engine.serving.service import Job, Service

PAGE = Path(__file__).parent / "page"
PROTECTED = ("/v1/", "/metrics")
OTHER_PAGES = ServiceError(403, "forbidden", "scripts of other pages may not call this service (--cors)")
ERRORS = errors(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503, 504)


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
        description=ABOUT,
        lifespan=lifespan,
        docs_url=None,  # its pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # a redirect has no body: curl would print nothing
        openapi_tags=[{"name": "native"}, {"name": "OpenAI's shape"}, {"name": "service"}],
        middleware=guards(tokens, origins),
    )
    app.state.drain = engine.drain  # for a server that drains before it stops
    service = Service(engine, model, limits)
    _add_errors(app)
    _add_sampling(app, service)
    _add_lists(app, service)
    _add_service(app, service)
    _add_page(app)
    bodies = {path: endpoint.body for path, endpoint in SAMPLING.items()}
    events = [data for endpoint in SAMPLING.values() for data in endpoint.events.values()]
    app.openapi = partial(document, app, bodies, events, limits)
    return app


def guards(tokens: Sequence[str], origins: Sequence[str]) -> list[Middleware]:
    """The middleware, outermost first; `tokens` and `origins` as for `create_app`."""
    options = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": ["Retry-After"]}
    cors = Middleware(CORSMiddleware, allow_origins=list(origins), **options)
    return [cors] * bool(origins) + [Middleware(Gate, tokens=tokens, origins=origins)]


@dataclass(frozen=True)
class Sampling:
    """An endpoint that samples."""

    about: str
    tag: str
    job: Callable[..., Job]
    body: type[BaseModel]
    answer: type[BaseModel]
    events: Events = field(default_factory=dict)


SHAPE = "OpenAI's shape"
SAMPLING = {
    "/v1/infill": Sampling("Generate whatever is not given", "native", infill, InfillBody, InfillAnswer, INFILL_EVENTS),
    "/v1/images/generations": Sampling(
        "Images from words", SHAPE, generations, GenerationBody, ImagesAnswer, image_events("image_generation")
    ),
    "/v1/images/edits": Sampling(
        "Regenerate a part of an image", SHAPE, edits, EditBody, ImagesAnswer, image_events("image_edit")
    ),
    "/v1/captions": Sampling("Words for an image", "native", captions, CaptionBody, CaptionsAnswer),
}


def _add_sampling(app: FastAPI, service: Service) -> None:
    def add(path: str, sampling: Sampling) -> None:
        async def endpoint(http: HttpRequest) -> Response:
            return await service.serve(http, sampling.job(service, await service.read(http, sampling.body)))

        stream = about_stream(sampling.events) if sampling.events else {"description": "", "content": {}}
        answers = {200: {"model": sampling.answer, "content": stream["content"]}, **ERRORS}
        about = {"summary": sampling.about, "description": stream["description"], "tags": [sampling.tag]}
        app.add_api_route(path, endpoint, methods=["POST"], responses=answers, name=sampling.job.__name__, **about)

    for path, sampling in SAMPLING.items():
        add(path, sampling)

    answers = {200: {"model": CancelAnswer}, **errors(401, 403, 404)}

    @app.delete("/v1/requests/{id}", tags=["native"], summary="Cancel a request", responses=answers)
    async def cancel(id: str) -> Response:
        handle = service.engine.find(id)
        if handle is None:
            raise refused("id", "is not that of a request that is being served; it may be done", "not_found", 404)
        handle.cancel()
        return AsciiJSON({"id": id, "cancelled": True})


def _add_lists(app: FastAPI, service: Service) -> None:
    def answers(model: type[BaseModel], *statuses: int) -> dict:
        return {200: {"model": model}, **errors(401, 403, *statuses)}

    @app.get("/v1/models", tags=[SHAPE], summary="The model that is served", responses=answers(ModelsAnswer))
    async def models() -> Response:
        return AsciiJSON({"object": "list", "data": [model_card(service)]})

    @app.get("/v1/models/{model}", tags=[SHAPE], summary="A model by its name", responses=answers(ModelCard, 404))
    async def one_model(model: str) -> Response:
        check_model(service, model)
        return AsciiJSON(model_card(service))

    answers_of_words = answers(VocabularyAnswer, 400)

    @app.get("/v1/vocabulary", tags=["native"], summary="Words that the model knows", responses=answers_of_words)
    async def words(http: HttpRequest, prefix: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> Response:
        for name in http.query_params:
            if name not in ("prefix", "limit"):
                raise refused(name, "is not a parameter of this endpoint; leave it out", "unsupported_field")
            if len(http.query_params.getlist(name)) > 1:
                raise refused(name, "is given twice; give it once")
        return AsciiJSON({"words": vocabulary(service, prefix, limit)})


def _add_service(app: FastAPI, service: Service) -> None:
    states = {200: {"model": StatusAnswer}, 503: {"model": StatusAnswer}}

    @app.get("/health", tags=["service"], summary="Whether the process is alive", responses=states)
    async def health() -> Response:
        alive = service.engine.alive
        return AsciiJSON({"status": "ok" if alive else "closed"}, 200 if alive else 503)

    about = "Whether a request would be taken and served at once"

    @app.get("/ready", tags=["service"], summary=about, responses=states)
    async def ready() -> Response:
        ready = service.engine.ready
        return AsciiJSON({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    answers = errors(401, 403)

    @app.get(
        "/metrics", tags=["service"], summary="For Prometheus", response_class=PlainTextResponse, responses=answers
    )
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
        app.add_api_route(path, endpoint, methods=["GET"], include_in_schema=False)


def _file(content: bytes, media_type: str | None, headers: dict[str, str]) -> Callable:
    async def endpoint() -> Response:
        return Response(content, headers=headers, media_type=media_type)

    return endpoint


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ServiceError)
    async def foreseen(_, error: ServiceError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def of_http(http: HttpRequest, error: HTTPException) -> Response:
        code, message = "invalid_request", str(error.detail)
        if error.status_code == 404:
            code, message = "not_found", f"{cut(http.url.path, 200)}: is not an endpoint; /openapi.json lists them"
        elif http.method == "OPTIONS" and "access-control-request-method" in http.headers:  # a browser's, before a call
            return OTHER_PAGES.response()
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            code, message = "method_not_allowed", f"{http.method}: is not a method of this endpoint; use {allowed}"
        return ServiceError(error.status_code, code, message, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def of_parameters(_, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return refused(str(first["loc"][-1]), wrong_value(first["input"], [first["msg"]])).response()

    @app.exception_handler(Exception)
    async def unforeseen(_, error: Exception) -> Response:  # the server logs it
        return internal_error().response()


class Gate:
    """Middleware. Checks the token and refuses scripts of other pages on the paths under PROTECTED.

    A HEAD is answered as a GET, of which the server sends no body: those who monitor services ask so.
    """

    def __init__(self, app, tokens: Sequence[str], origins: Sequence[str]):
        self.app, self._digests = app, [_digest(token.encode()) for token in tokens]
        self._origins = {origin.encode() for origin in origins}

    async def __call__(self, scope, receive, send) -> None:
        protected = scope["type"] == "http" and scope["path"].startswith(PROTECTED) and scope["method"] != "OPTIONS"
        error = self._error(dict(scope["headers"])) if protected else None
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await (self.app if error is None else error.response())(scope, receive, send)

    def _error(self, headers: dict[bytes, bytes]) -> ServiceError | None:
        # Any page can post a form to any address; browsers mark such requests.
        if headers.get(b"sec-fetch-site") == b"cross-site" and headers.get(b"origin") not in self._origins:
            return OTHER_PAGES
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        # Digests of equal length, all compared, so that the time taken does not depend on the tokens.
        matches = [secrets.compare_digest(_digest(token.strip()), digest) for digest in self._digests]
        if self._digests and (kind.lower() != b"bearer" or not any(matches)):
            problem = "the token is not valid" if token.strip() else "no token was sent"
            message = f"{problem}; send a token of this service: Authorization: Bearer …"
            return ServiceError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})
        return None


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
