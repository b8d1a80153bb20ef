"""Services of a test's engine, clients that speak to them without a network, and files as clients send them."""

import asyncio
import base64
import functools
import io
import json
from collections.abc import Callable

import httpx
from PIL import Image

from engine import Engine
from engine.serving.app import create_app
from engine.serving.async_engine import AsyncEngine

LONG = {"num": 2, "steps": 250, "resample": 10, "seed": 0}  # 2,500 steps of two samples, ten seconds at least


def asynchronous(test: Callable) -> Callable:
    """A test that is a coroutine, run in an event loop of its own, three minutes at most."""

    @functools.wraps(test)
    def run(*arguments, **named):
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 180))

    return run


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what other tasks or threads bring about, half a minute at most."""
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it does not come about")


def app_of(engine: Engine, max_queue: int = 256, **options):
    """A service of an engine that outlives it, and its AsyncEngine. Belongs to the running loop."""
    served = AsyncEngine(engine, max_queue)
    served.warm = True
    return create_app(served, model="tiny", **options), served


def client(app) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://service", timeout=60)


def service(engine: Engine, **options) -> httpx.AsyncClient:
    return client(app_of(engine, **options)[0])


class Connection:
    """A request as a server hands it to the application: events arrive as they are sent, and the client may leave."""

    def __init__(self, app, path: str, body: dict, method: str = "POST"):
        self.status, self.body, self.gone = None, b"", asyncio.Event()
        sent = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},  # uvicorn's
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"service")],
            "client": ("127.0.0.1", 1),
            "server": ("service", 80),
        }

        async def receive():
            if sent:
                return sent.pop()
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            self.status = message.get("status", self.status)
            self.body += message.get("body", b"")

        self.task = asyncio.ensure_future(app(scope, receive, send))

    @property
    def events(self) -> list[tuple[str | None, dict]]:
        return events_of(self.body.decode())


def events_of(text: str) -> list[tuple[str | None, dict]]:
    """Names and data of server-sent events; the last, "[DONE]", has no name and no data."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines.get("event"), {} if lines["data"] == "[DONE]" else json.loads(lines["data"])))
    return found


def file_of(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def base64_of(image: Image.Image | bytes, **options) -> str:
    data = image if isinstance(image, bytes) else file_of(image, **options)
    return base64.b64encode(data).decode()


def image_of(text: str) -> Image.Image:
    """An image that the service answered."""
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image
