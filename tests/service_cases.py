"""Services of a test's engine, clients that speak to them without a network, and files as clients send them."""

import asyncio
import base64
import functools
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
from engine_cases import left_half, noise
from PIL import Image

from engine import Engine, Request
from engine.request import Result, Sample
from engine.serving.app import create_app
from engine.serving.async_engine import AsyncEngine

ROOT = Path(__file__).resolve().parents[1]
INFILL, GENERATIONS, EDITS, CAPTIONS = "/v1/infill", "/v1/images/generations", "/v1/images/edits", "/v1/captions"
ENDPOINTS = [INFILL, GENERATIONS, EDITS, CAPTIONS]
LONG = {"num": 2, "steps": 250, "resample": 10, "seed": 0}  # 2,500 steps of two samples, ten seconds at least


def file_of(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def base64_of(image: Image.Image | bytes, **options) -> str:
    data = image if isinstance(image, bytes) else file_of(image, **options)
    return base64.b64encode(data).decode()


PHOTO, MASK = base64_of(noise()), base64_of(left_half())
MINIMAL = {INFILL: {"steps": 1}, GENERATIONS: {"prompt": "red", "num_inference_steps": 1},
           EDITS: {"prompt": "red", "image": PHOTO, "mask_image": MASK, "num_inference_steps": 1},
           CAPTIONS: {"image": PHOTO, "steps": 1}}  # fmt: skip


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
    raise AssertionError("the condition was not met within 30 s")


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


def image_of(text: str) -> Image.Image:
    """An image that the service answered."""
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def result_of(answer: dict, request: Request) -> Result:
    """An answer of /v1/infill as the engine's result."""
    samples = [Sample({"image": image_of(s["image"]), "text": s["text"]}, s["seed"], 1.0) for s in answer["samples"]]
    settled = (answer[key] for key in ("task", "guidance", "order", "solver", "spacing"))
    return Result(request, *(tuple(x) if isinstance(x, list) else x for x in settled), tuple(samples))


def start(*options, **environment) -> tuple[subprocess.Popen, str]:
    """A service on a free port and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.serve", "--port", "0", "--dtype", "float32", *map(str, options)],
        cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line + process.stderr.read()
    return process, found[0].rstrip("/")


def memory() -> int:
    """Bytes of this process that are resident."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_error(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Returns the message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"] and "Traceback" not in error["message"]
    return error["message"]
