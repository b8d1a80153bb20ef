"""From a client's request to its answer, for all endpoints that sample."""

import asyncio
import base64
import io
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse
from PIL import Image
from pydantic import BaseModel

from engine.errors import EngineClosed
from engine.request import Request, Result, Sample
from engine.serving.async_engine import AsyncEngine, QueueFull
from engine.serving.errors import AsciiJSON, dumps, internal_error, refused, service_error
from engine.serving.handle import Handle, Preview, Progress
from engine.serving.inputs import Limits, read
from engine.serving.metrics import Metrics

log = logging.getLogger("engine.serving")
SILENCE = 15.0  # seconds until a comment is sent in a stream without events
DONE = "data: [DONE]\n\n"  # the last event of a stream
SEED = "psunet.seed"  # in an ASGI scope: for a request without one
Event = tuple[str, dict]  # name and data


@dataclass(frozen=True)
class Job:
    """What an endpoint makes of a client's request, and how it answers. The functions run in threads."""

    request: Callable[[], Request]
    answer: Callable[[Handle, Result], dict]
    final: Callable[[dict], list[Event]] = lambda answer: [("result", answer)]  # as events
    preview: Callable[[Handle, Preview], list[Event]] = lambda handle, preview: []
    names: Mapping[str, str] = field(default_factory=dict)  # the client's, of arguments of `Request`
    priority: int = 0
    deadline: float | None = None
    stream: bool = False
    counts: bool = True  # whether a stream has events of the queue and of steps
    preview_every: int = 0
    user: str | None = None


class Service:
    """An engine, its limits and its metrics."""

    def __init__(self, engine: AsyncEngine, model: str, limits: Limits):
        self.engine, self.model, self.limits = engine, model, limits
        self.config, self.codecs = engine.engine.config, dict(engine.engine.codecs)
        self.metrics, self.created = Metrics(engine), created()

    def is_text(self, modality: str) -> bool:
        codec = self.config.codecs.get(modality)
        return codec is not None and codec.kind == "text"

    async def warmup(self, batch: int) -> None:
        """Warms up for batches of so many samples; 0: not at all. If that fails, the service never becomes ready."""
        try:
            await self.engine.warmup(batch)
        except Exception:
            if self.engine.alive:  # else it was closed meanwhile
                log.exception("the warm-up failed")

    async def read(self, http: HttpRequest, model: type[BaseModel]) -> BaseModel:
        """The body of a request, with a seed. If the queue is full it is not read. Raises ServiceError."""
        try:
            self.engine.check_room()
            body = await self._unless_closing(read(http, model, self.limits))
        except (QueueFull, EngineClosed) as error:
            raise service_error(error) from None
        if body.seed is None:
            body.seed = http.scope.get(SEED, new_seed())
        return body

    async def _unless_closing(self, reading: Coroutine[None, None, BaseModel]) -> BaseModel:
        """What is read; raises EngineClosed if the engine closes meanwhile: slow clients would delay the end."""
        tasks = body, closing = asyncio.ensure_future(reading), asyncio.ensure_future(self.engine.closing())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not body.done():
                self.engine.check_room()
            return await body
        finally:
            body.cancel()
            closing.cancel()

    async def serve(self, http: HttpRequest, job: Job) -> Response:
        """Answers with JSON or with events; cancels the request if the client disconnects. Raises ServiceError."""
        try:
            request = await asyncio.to_thread(job.request)
            self._check(request, job)
            watch = {"preview_every": job.preview_every, "done": self.metrics.count}
            handle = await self.engine.submit(
                request, priority=job.priority, deadline=job.deadline or self.limits.seconds, **watch
            )
            if job.user is not None:
                log.info("request %s is of user %r", handle.id, job.user)
            if job.stream:
                return EventStream(handle, self._events(handle, job))
            async with handle, _cancelled_on_disconnect(http, handle):
                answer = await asyncio.to_thread(job.answer, handle, await handle.result())
        except Exception as error:
            known = service_error(error, job.names)
            if known is None:
                raise
            raise known from None
        return AsciiJSON(answer)

    def _check(self, request: Request, job: Job) -> None:
        """Raises ServiceError where a request asks for more than the service's limits."""
        limits = self.limits
        checks = {
            "num": (request.num, limits.num),
            "steps": (request.steps, limits.steps),
            "deadline": (job.deadline or 0, limits.seconds),
        }
        for key, (value, most) in checks.items():
            if value > most:
                raise refused(job.names.get(key, key), f"{value} exceeds the limit; use at most {most}")

    async def _events(self, handle: Handle, job: Job) -> AsyncIterator[str]:
        async for event in _with_pauses(handle.events()):
            if event is None:
                yield ": nothing new\n\n"
                continue
            for name, data in await self._event(handle, event, job):
                yield server_sent(name, data)
        try:
            events = job.final(await asyncio.to_thread(job.answer, handle, await handle.result()))
        except Exception as error:
            known = service_error(error, job.names)
            events = [("error", (known or internal_error()).body())]
            if known is None:
                log.exception("request %s failed", handle.id)
        for name, data in events:
            yield server_sent(name, data)
        yield DONE

    async def _event(self, handle: Handle, event, job: Job) -> list[Event]:
        if isinstance(event, Preview):
            return await asyncio.to_thread(job.preview, handle, event)
        if not job.counts:
            return []
        if isinstance(event, Progress):
            return [("progress", {"done": event.done, "total": event.total})]
        return [("queued", {"id": handle.id, "position": event.position})]


async def _with_pauses(events: AsyncIterator) -> AsyncIterator:
    """These events, and None after SILENCE without any: proxies close connections that are silent."""
    while True:
        following = asyncio.ensure_future(anext(events))
        try:
            while not (await asyncio.wait({following}, timeout=SILENCE))[0]:
                yield None
            yield following.result()
        except StopAsyncIteration:
            return
        finally:
            following.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; cancels the request when the client disconnects, also before the first event."""

    media_type = "text/event-stream"

    def __init__(self, handle: Handle, events: AsyncIterator[str]):
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._handle = handle

    async def __call__(self, scope, receive, send) -> None:
        async with self._handle:
            await super().__call__(scope, receive, send)


@asynccontextmanager
async def _cancelled_on_disconnect(http: HttpRequest, handle: Handle):
    async def watch() -> None:
        await disconnected(http.receive)
        handle.cancel()

    task = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        task.cancel()


async def disconnected(receive: Callable[[], Awaitable[Mapping]]) -> None:
    """Waits until the client has disconnected; `receive` is ASGI's, of a request whose body is read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def server_sent(name: str, data: dict) -> str:
    return f"event: {name}\ndata: {dumps(data)}\n\n"


def new_seed() -> int:
    """Random, and small enough for JavaScript's numbers."""
    return secrets.randbelow(2**32)


def encoded(image: Image.Image, output_format: str, quality: int | None = None) -> str:
    """An image file in base64."""
    file, options = io.BytesIO(), {} if quality is None else {"quality": quality}
    image.save(file, output_format.upper(), **options)
    return base64.b64encode(file.getvalue()).decode()


def words_of(sample: Sample) -> list[dict]:
    """The words of a sample's text with their confidence."""
    words = sample.outputs.get("text", "").split()
    return [{"word": w, "confidence": round(c, 4)} for w, c in zip(words, sample.word_confidence, strict=True)]


def described(sample: Sample, index: int, output_format: str) -> dict:
    """A sample as clients get it."""
    outputs = {
        name: value if isinstance(value, str) else encoded(value, output_format)
        for name, value in sample.outputs.items()
    }
    shorthands = {name: outputs[name] for name in ("image", "text") if name in outputs}
    confidence = {name: round(sample.confidence, 4) for name, v in sample.outputs.items() if isinstance(v, str)}
    rest = {"confidence": confidence, "words": words_of(sample)}
    return {"index": index, "seed": sample.seed, "outputs": outputs, **shorthands, **rest}


def timings(handle: Handle) -> dict:
    started = handle.started or handle.ended
    return {
        "queue_s": round(started - handle.submitted, 4),
        "run_s": round(handle.ended - started, 4),
        "total_s": round(handle.ended - handle.submitted, 4),
        "steps": handle.steps,
    }


def created() -> int:
    return int(time.time())
