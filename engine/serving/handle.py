"""`Handle`: a request of an `AsyncEngine` in progress, and its events."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from engine.request import Request, Result, Sample


class Cancelled(RuntimeError):
    """The request was cancelled."""


@dataclass(frozen=True)
class Queued:
    """At most `position` samples of requests that wait enter before the first of this one."""

    position: int


@dataclass(frozen=True)
class Progress:
    """`done` steps of `total`, those of all samples counted."""

    done: int
    total: int


@dataclass(frozen=True)
class Preview:
    """What samples look like after `done` steps, by number; of each the modalities that have begun."""

    done: int
    samples: dict[int, Sample]


class Handle:
    """A request in progress. As an asynchronous context manager it cancels the request on exit."""

    def __init__(self, request: Request, priority: int, leave: Callable[["Handle"], None]):
        self.id = uuid.uuid4().hex
        self.request, self.priority = request, priority
        self._leave = leave  # called when it is done
        self.submitted = time.perf_counter()
        self.started: float | None = None  # when its first step was done
        self.ended: float | None = None
        self.progress: Progress | None = None  # the latest, set by the engine's thread
        self.watched = False  # whether its events are read
        self.position = -1  # of `Queued`; −1: not yet reported
        self.future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        # Retrieves the error: asyncio warns about errors that are never retrieved.
        self.future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._told: Progress | None = None  # the latest that its events have told
        self._news: dict[type, Queued | Progress | Preview] = {}  # the latest of each kind: a slow reader skips some
        self._changed = asyncio.Event()

    async def __aenter__(self) -> "Handle":
        return self

    async def __aexit__(self, *exception) -> None:
        self.cancel()

    @property
    def steps(self) -> int:
        """Steps that are done, those of all samples counted."""
        return 0 if self.progress is None else self.progress.done

    @property
    def done(self) -> bool:
        return self.future.done()

    @property
    def error(self) -> BaseException | None:
        """What a request that is done failed with; None if it succeeded."""
        return self.future.exception()

    def add_done_callback(self, function: Callable[["Handle"], None]) -> None:
        """Has `function(handle)` called on the event loop once the request is done."""
        self.future.add_done_callback(lambda _: function(self))

    def cancel(self) -> bool:
        """Frees the request's slots before the next step; False if it is done."""
        return self.end(error=Cancelled("the request was cancelled"))

    async def result(self) -> Result:
        """Waits for the result. Cancelling the wait does not cancel the request.

        Raises what the engine's future raises, and Cancelled, DeadlineExceeded or EngineClosed.
        """
        return await asyncio.shield(self.future)

    async def events(self) -> AsyncIterator[Queued | Progress | Preview]:
        """What happens to the request, until it is done or fails; of what a slow reader has missed, the latest."""
        self.watched = True  # before the progress is read: the engine's thread sets it and then looks here
        self.tell_progress()
        while self._news or not self.done:
            await self._changed.wait()
            self._changed.clear()
            news, self._news = self._news, {}
            for event in news.values():
                yield event

    def tell(self, event: Queued | Progress | Preview) -> None:
        """Adds to its events, unless it is done."""
        if not self.done:
            self._news.pop(type(event), None)  # the order is that of the latest
            self._news[type(event)] = event
            self._changed.set()

    def tell_progress(self) -> None:
        """Adds the latest progress to its events, if that is new."""
        progress = self.progress  # once: the engine's thread may set it meanwhile
        if progress is not None and progress is not self._told:
            self._told = progress
            self.tell(progress)

    def end(self, result: Result | None = None, error: BaseException | None = None) -> bool:
        """Gives it its result or its error; False if it is done."""
        if self.done:
            return False
        self.ended = time.perf_counter()
        self.tell_progress()
        if error is not None:
            self.future.set_exception(error)
        elif result is not None:
            self.future.set_result(result)
        self._leave(self)
        self._changed.set()
        return True
