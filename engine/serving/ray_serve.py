"""The service on many machines: Ray Serve runs replicas of the application, each with an engine of its own.

    client ── Front, in the process of `python -m engine.serve` ──┬── Replica: application, engine
                                                                  └── Replica: application, engine

The front does not parse bodies: it hands a request on as ASGI to the replica with fewer requests, and hands the
messages of the answer back. If the replica dies, the front asks another one, once, which makes the same samples, since
the front has chosen the seed for requests without one. Cancelling by id, metrics and draining go to all replicas. Ray
is imported where it is used.
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from fastapi import Request as HttpRequest
from fastapi.responses import Response
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Route

from engine.errors import InputError
from engine.runtime import Engine
from engine.serving.app import create_app, guards
from engine.serving.async_engine import AsyncEngine
from engine.serving.errors import RETRY_AFTER, ServiceError, internal_error
from engine.serving.inputs import Limits, whole
from engine.serving.metrics import METRICS_TYPE
from engine.serving.service import DONE, SEED, disconnected, new_seed, server_sent

log = logging.getLogger("engine.serving")
NAME = "psunet"  # of the application in Ray Serve
PLAIN = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
         "client", "server")  # of a scope: what other processes can be sent  # fmt: skip
SPARE = 10.0  # seconds beyond `drain` until Ray kills a replica
SPARE_REQUESTS = 256  # beyond those that a replica takes: its application refuses them, with 429
CONTROL = 10.0  # seconds in which replicas answer what is broadcast


@dataclass(frozen=True)
class Settings:
    """What is deployed.

    engine      arguments of `Engine.from_pretrained`
    warmup      samples in the largest batch to warm up for, before a replica gets requests
    max_queue   of each replica, as for `AsyncEngine`
    replicas    at least; Ray adds replicas, up to max_replicas, while each has `max_rows` requests
    cpus, gpus  that Ray sets aside for each
    The rest is as for `create_app`.
    """

    engine: dict = field(default_factory=dict)
    model: str = "psunet"
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    tokens: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    warmup: int = 1
    drain: float = 30.0
    max_queue: int = 256
    replicas: int = 2
    max_replicas: int = 2
    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def max_rows(self) -> int:
        return self.engine.get("max_rows", 64)


class Replica:
    """An engine and its application, called with ASGI messages instead of over a socket."""

    async def __init__(self, settings: Settings):
        engine = await asyncio.to_thread(Engine.from_pretrained, **settings.engine)
        self._engine, self._drained = AsyncEngine(engine, settings.max_queue), False
        await self._engine.warmup(settings.warmup)
        self._app = create_app(self._engine, model=settings.model, limits=settings.limits, drain=settings.drain)
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()

    async def __del__(self) -> None:  # Ray calls it when no request is left
        await self._life.__aexit__(None, None, None)

    def check_health(self) -> None:
        """Ray replaces a replica that fails this."""
        if not self._engine.alive and not self._drained:
            raise RuntimeError("the engine is closed")

    async def drain(self, seconds: float) -> None:
        self._drained = True  # Ray is not to replace it
        await self._engine.drain(seconds)

    async def answer(self, scope: dict, body: bytes) -> AsyncIterator[dict]:
        """The messages with which the application answers; closing the iterator cancels the request."""
        messages: asyncio.Queue[dict | None] = asyncio.Queue()
        sent = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            return sent.pop() if sent else await asyncio.Future()  # on a disconnect the front cancels the call

        async def call() -> None:
            try:
                await self._app(scope, receive, messages.put)
            except Exception:  # the application has answered with status 500
                log.exception("%s failed", scope["path"])
            finally:
                messages.put_nowait(None)

        task = asyncio.ensure_future(call())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            task.cancel()

    async def whole_answer(self, scope: dict) -> tuple[str, int, bytes]:
        """This replica's name, the status and the body of an answer to a request without a body."""
        from ray import serve

        messages = [message async for message in self.answer(scope, b"")]
        body = b"".join(message.get("body", b"") for message in messages)
        return serve.get_replica_context().replica_id.unique_id, messages[0]["status"], body


class Front:
    """The ASGI application that clients reach: passes requests on to replicas, and asks another one if one dies."""

    def __init__(self, replicas, limits: Limits):
        self._replicas, self._limits = replicas, limits

    async def drain(self, seconds: float) -> None:
        """Drains all replicas: they refuse new requests, finish running ones and close their engines."""
        drained = self._replicas.broadcast("drain", seconds)
        await drained.results_async(timeout_s=seconds + SPARE, return_exceptions=True)

    async def __call__(self, scope, receive, send) -> None:
        plain = {key: scope[key] for key in PLAIN if key in scope} | {"root_path": ""}
        if scope["method"] == "DELETE" or (scope["method"], scope["path"]) == ("GET", "/metrics"):
            await (await self._of_all(plain))(scope, receive, send)
            return
        try:
            body = await whole(HttpRequest(scope, receive), self._limits)
        except ServiceError as error:
            await error.response()(scope, receive, send)
            return
        await self._pass_on(plain | {SEED: new_seed()}, body, receive, send)

    async def _pass_on(self, scope: dict, body: bytes, receive, send) -> None:
        from ray.exceptions import RayActorError, TaskCancelledError

        answer = _Answer(send)
        for _ in range(2):
            try:
                return await self._ask(scope, body, receive, answer)
            except TaskCancelledError:  # the client is gone
                return None
            except RayActorError:  # the replica died, or cannot be reached
                log.warning("a replica was lost that answered %s", scope["path"])
                if answer.complete:
                    return None
                if not answer.can_restart:
                    raise
        await _closed("the replicas that had the request died").response()(scope, receive, answer.add)

    async def _ask(self, scope: dict, body: bytes, receive, answer: "_Answer") -> None:
        messages = self._replicas.answer.options(stream=True).remote(scope, body)

        async def cancel() -> None:
            await disconnected(receive)
            messages.cancel()

        watch = asyncio.ensure_future(cancel())
        try:
            async for message in messages:
                await answer.add(message)
        finally:
            watch.cancel()
            messages.cancel()

    async def _of_all(self, scope: dict) -> Response:
        """Of an id, the answer of the replica that knows it; of metrics, those of all with a label `replica`."""
        asked = self._replicas.broadcast("whole_answer", scope)
        answers = await asked.results_async(timeout_s=CONTROL, return_exceptions=True)
        answers = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not answers:
            return _closed("no replica answers").response()
        if scope["path"] == "/metrics":
            text = merged_metrics({name: body.decode() for name, _, body in answers})
            return Response(text, media_type=METRICS_TYPE)
        _, status, body = min(answers, key=lambda answer: answer[1])  # 200 before 404
        return Response(body, status, media_type="application/json")


class _Answer:
    """An answer to the client. It can restart if nothing was sent, or only events, which are then repeated."""

    def __init__(self, send):
        self._send, self._start = send, None
        self._begun = self._events = self.complete = False

    @property
    def can_restart(self) -> bool:
        return self._events or not self._begun

    async def add(self, message: dict) -> None:
        if message["type"] == "http.response.start":  # kept until there is something to send with it
            self._start = message
            return
        events = dict(self._start["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        if not self._begun:
            self._begun, self._events = True, events
            await self._send(self._start)
        elif self._events and not events:  # the second replica refused
            text = server_sent("error", json.loads(message["body"])) + DONE
            message = {**message, "body": text.encode()}
        await self._send(message)
        self.complete = not message.get("more_body", False)


def _closed(problem: str) -> ServiceError:
    return ServiceError(503, "closed", f"{problem}; try again later", headers=RETRY_AFTER)


def merged_metrics(texts: dict[str, str]) -> bytes:
    """The metrics of all replicas, by the replica's name, with a label `replica`."""
    families = {}
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            samples = [sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples]
            merged = families.setdefault(family.name, family)
            merged.samples = samples if merged is family else merged.samples + samples
    return generate_latest(SimpleNamespace(collect=families.values))


@contextmanager
def running(settings: Settings) -> Iterator[Starlette]:
    """The front's application while the replicas run: in the Ray cluster at RAY_ADDRESS of the environment, or in one
    that is started on this machine. Raises InputError if no replica can be made.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would have replicas yield to all other processes
    import ray
    from ray import serve

    alone = {} if "RAY_ADDRESS" in os.environ else {"address": "local", "include_dashboard": False}
    ray.init(**alone, namespace=NAME)
    try:
        resources = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
        if alone:  # a cluster may grow
            _check_resources(settings, ray.cluster_resources())
        inside = replace(settings, tokens=())  # the front checks them
        check = ray.remote(**resources, max_calls=1)(_refusal)  # its process ends, and frees what the model took
        if (refusal := ray.get(check.remote(settings.engine))) is not None:
            raise InputError(*refusal)
        serve.start(proxy_location="Disabled")
        try:
            yield _front_application(serve.run(_deployment(inside, resources), name=NAME, route_prefix=None), settings)
        finally:
            serve.shutdown()
    finally:
        ray.shutdown()


def _check_resources(settings: Settings, there: dict[str, float]) -> None:
    """Raises InputError if the machine has too few processors for the replicas."""
    for unit, each in {"CPU": settings.cpus, "GPU": settings.gpus}.items():
        needed, most = settings.replicas * each, there.get(unit, 0)
        if needed > most:
            problem = f"need {needed:g} {unit}s, of which there are {most:g}"
            raise InputError("replicas", settings.replicas, f"ask for fewer, or fewer {unit}s for each", problem)


def _refusal(engine: dict) -> tuple | None:
    """The arguments of the InputError with which no engine can be made of these arguments. Runs where replicas run.

    The model is loaded once more for this, and with `compile` the packages are built that replicas then load: of an
    error that a replica's constructor raises, Ray reports the text, not the fields.
    """
    try:
        Engine.from_pretrained(**engine).close()
    except InputError as error:
        return error.argument, error.value, error.remedy, error.problem
    return None


def _deployment(settings: Settings, resources: dict):
    from ray import serve

    replicas = serve.deployment(
        Replica,
        autoscaling_config={
            "min_replicas": settings.replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.max_rows,
        },
        max_ongoing_requests=settings.max_rows + settings.max_queue + SPARE_REQUESTS,
        ray_actor_options=resources,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.drain + SPARE,
    )
    return replicas.bind(settings)


def _front_application(replicas, settings: Settings) -> Starlette:
    front = Front(replicas, settings.limits)

    @asynccontextmanager
    async def lifespan(_):
        yield
        await front.drain(settings.drain)

    application = Starlette(
        routes=[Route("/{path:path}", front)],  # of an object that is not a function, Starlette routes all methods
        middleware=guards(settings.tokens, settings.origins),
        exception_handlers={Exception: lambda http, error: internal_error().response()},
        lifespan=lifespan,
    )
    application.state.drain = front.drain
    return application
