"""The server of `python -m engine.serve`, which drains the engine before it stops."""

import asyncio
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn

ANSWERING = 5  # seconds until clients must have read their answers, once nothing runs any more


class Server(uvicorn.Server):
    """Calls `drain(seconds)` on the first SIGTERM or SIGINT, and `drain(0)` on the second; stops when that is done.

    Uvicorn alone would refuse connections at once, and cancel requests that take too long: their clients would get
    status 500, or half a stream. Here the application answers them, and what comes meanwhile, with the engine's error.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[float], Awaitable[None]], seconds: float):
        config.timeout_graceful_shutdown = ANSWERING
        super().__init__(config)
        self._drain, self._seconds = drain, seconds
        self._signals = 0
        self._draining: list[asyncio.Future[None]] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if not await super().on_tick(counter):
            return False
        while len(self._draining) < min(self._signals, 2):
            seconds = 0 if self._draining else self._seconds
            self._draining.append(asyncio.ensure_future(self._drain(seconds)))
        return all(drained.done() for drained in self._draining)
