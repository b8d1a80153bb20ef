"""`AsyncEngine`: an `Engine` for asyncio, with a bounded queue, priorities, deadlines, events and draining.

All requests share the slots of the one engine: its scheduler lets samples enter and leave between steps, so nothing is
batched here. What takes time (opening images, encoding and decoding, steps) runs in threads, never on the event loop.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from engine.errors import EngineClosed, InputError
from engine.request import Request, Result, Sample, Watch
from engine.runtime import Engine
from engine.serving.handle import Cancelled, Handle, Preview, Progress, Queued

__all__ = ["AsyncEngine", "Cancelled", "DeadlineExceeded", "Handle", "Preview", "Progress", "QueueFull", "Queued"]

READERS = 4  # threads that open and check images
GATHER = 0.002  # seconds that the loop waits for the other samples of a step


class QueueFull(RuntimeError):
    """The queue cannot take the request's samples: `waiting` samples are in it, and it holds `limit`."""

    def __init__(self, waiting: int, limit: int):
        self.waiting, self.limit = waiting, limit
        super().__init__(f"the queue is full: {waiting} samples wait, it holds {limit}; try again later")


class DeadlineExceeded(TimeoutError):
    """The request was not done within `seconds`, its deadline; it has been cancelled."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        super().__init__(f"not done within the deadline of {seconds:g} s")


class AsyncEngine:
    """Serves requests on an engine, which it closes at its end. Belongs to the event loop in which it is used.

    max_queue  samples that may wait for a slot, beyond those that the engine computes together
    """

    def __init__(self, engine: Engine, max_queue: int = 256):
        if not isinstance(max_queue, int) or isinstance(max_queue, bool) or max_queue < 0:
            raise InputError("max_queue", max_queue, "use a whole number from 0")
        self.engine, self.max_queue = engine, max_queue
        self.warm = False  # whether `warmup` is done
        self._handles: dict[str, Handle] = {}  # of requests that are not done
        self._queue: list[Handle] = []  # those that have not started, in the order in which they will
        self._tasks: set[asyncio.Task] = set()
        self._told: deque[Callable[[], None]] = deque()  # by the engine's thread, for the loop to do
        self._hearing = False  # whether the loop will
        self._closing = asyncio.Event()
        self._threads = ThreadPoolExecutor(READERS, "psunet-reader")

    @property
    def alive(self) -> bool:
        """Whether the engine can still compute."""
        return not self.engine.closed

    @property
    def ready(self) -> bool:
        """Whether a request of one sample would be taken now, and served without warming up."""
        accepts = self.alive and not self._closing.is_set()
        return self.warm and accepts and self.samples < self.engine.max_rows + self.max_queue

    @property
    def samples(self) -> int:
        """Samples of all requests that are not done."""
        return sum(handle.request.num for handle in self._handles.values())

    @property
    def requests(self) -> tuple[int, int]:
        """Requests that have started and are not done, and those that wait."""
        return len(self._handles) - len(self._queue), len(self._queue)

    @property
    def waiting(self) -> int:
        """Of these, the samples of requests that have not started."""
        return sum(handle.request.num for handle in self._queue)

    def check_room(self, samples: int = 1) -> None:
        """Raises EngineClosed or QueueFull if a request of so many samples would not be taken now."""
        if self._closing.is_set() or not self.alive:
            raise EngineClosed("the engine is shutting down; try again later, or elsewhere")
        if self.samples + samples > self.engine.max_rows + self.max_queue:
            raise QueueFull(max(0, self.samples - self.engine.max_rows), self.max_queue)

    async def closing(self) -> None:
        """Waits until the engine takes no new requests."""
        await self._closing.wait()

    def find(self, id: str) -> Handle | None:
        """The request of this id, if it is not done."""
        return self._handles.get(id)

    async def warmup(self, batch: int = 1) -> None:
        """See `Engine.warmup`; 0: nothing is warmed up. Requests may come meanwhile."""
        if batch:
            await asyncio.to_thread(self.engine.warmup, batch)
        self.warm = True

    async def submit(
        self,
        request: Request,
        *,
        priority: int = 0,
        deadline: float | None = None,
        preview_every: int = 0,
        done: Callable[[Handle], None] | None = None,
    ) -> Handle:
        """Takes a request once it has been read and checked; does not wait for its steps.

        priority       waiting requests of a higher one are served first
        deadline       seconds from now after which it is cancelled; None: never
        preview_every  steps after which its events show x̂0; 0: never
        done           is called on the event loop once the request is done, also where that is an error raised here
        Raises QueueFull and EngineClosed at once, InputError if the request cannot be served, and Cancelled or
        DeadlineExceeded if that comes first. If the wait is cancelled, so is the request.
        """
        limit = self.engine.max_rows + self.max_queue
        if request.num > limit:
            raise InputError("num", request.num, f"use at most {limit}", "is more than the queue holds")
        self.check_room(request.num)
        if deadline is not None and not 0 < deadline < float("inf"):
            raise InputError("deadline", deadline, "use a number of seconds above 0")
        Watch(priority=priority, preview_every=preview_every or 1)  # before the queue is sorted by it
        handle = Handle(request, priority, self._leave)
        if done is not None:
            handle.add_done_callback(done)
        self._handles[handle.id] = handle
        places = [i for i, other in enumerate(self._queue) if other.priority < priority]
        self._queue.insert(places[0] if places else len(self._queue), handle)
        self._tell_positions()
        accepted = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(self._serve(handle, accepted, deadline, preview_every))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait([accepted, handle.future], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            handle.cancel()
            raise
        if not accepted.done():
            await handle.result()  # raises
        return handle

    async def generate(self, request: Request, **options) -> Result:
        """`submit`, and waits for the result; if the wait is cancelled, so is the request."""
        async with await self.submit(request, **options) as handle:
            return await handle.result()

    async def drain(self, seconds: float = 30.0) -> None:
        """Refuses what is new, waits for what runs, ends after `seconds` what is not done, and closes the engine.

        Another call, meanwhile, with fewer seconds ends it earlier.
        """
        self._closing.set()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)
        for handle in list(self._handles.values()):
            handle.end(error=EngineClosed("the engine was shut down before the request was done"))
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        await asyncio.to_thread(self.engine.close)
        self._threads.shutdown(wait=False)

    async def _serve(self, handle: Handle, accepted: asyncio.Future, deadline: float | None, every: int) -> None:
        loop = asyncio.get_running_loop()
        timer = deadline and loop.call_later(deadline, lambda: handle.end(error=DeadlineExceeded(deadline)))

        # The engine's thread calls the next four functions. Waking the loop interrupts it, so that is done seldom.
        def tell(function, *arguments) -> None:
            self._told.append(partial(function, *arguments))
            if not self._hearing:  # once for all samples of a step
                self._hearing = True
                loop.call_soon_threadsafe(loop.call_later, GATHER, self._hear)

        def progress(done: int, total: int) -> None:
            if loop.is_closed():
                raise RuntimeError("the event loop of the request has ended")
            first, handle.progress = handle.progress is None, Progress(done, total)
            if first:
                tell(self._on_start, handle, time.perf_counter())
            if handle.watched:
                tell(handle.tell_progress)

        def preview(samples: dict[int, Sample]) -> None:
            tell(handle.tell, Preview(handle.steps, samples))

        def end(_: Future) -> None:
            self._told.append(partial(ended.set_result, None))
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._hear)

        def submit() -> Future[Result]:
            how = {"priority": handle.priority, "preview_every": every or 1}
            return self.engine.submit(handle.request, progress, preview=preview if every else None, **how)

        ended, future = loop.create_future(), None
        try:
            future = await loop.run_in_executor(self._threads, lambda: None if handle.done else submit())
            if future is None:
                return
            if not accepted.done():
                accepted.set_result(None)
            future.add_done_callback(end)
            await asyncio.wait([ended, handle.future], return_when=asyncio.FIRST_COMPLETED)
            if handle.done:  # cancelled, or past its deadline
                future.cancel()
                await asyncio.wait([ended])
            else:
                handle.end(future.result())
        except (CancelledError, asyncio.CancelledError):  # the engine was closed, or the loop ends
            if future is not None:
                future.cancel()
            handle.end(error=EngineClosed("the engine was closed before the request was done"))
        except Exception as error:
            handle.end(error=error)
        finally:
            if timer:
                timer.cancel()

    def _hear(self) -> None:
        self._hearing = False  # first: what is told from now on is heard later
        while self._told:
            self._told.popleft()()

    def _on_start(self, handle: Handle, at: float) -> None:
        handle.started = at
        self._leave_queue(handle)

    def _leave(self, handle: Handle) -> None:
        del self._handles[handle.id]
        self._leave_queue(handle)

    def _leave_queue(self, handle: Handle) -> None:
        if handle in self._queue:
            self._queue.remove(handle)
            self._tell_positions()

    def _tell_positions(self) -> None:
        """Tells the requests that wait how many samples are before theirs, where that has changed."""
        position = 0
        for handle in self._queue:
            if handle.position != position:
                handle.position = position
                handle.tell(Queued(position))
            position += handle.request.num
