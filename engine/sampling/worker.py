"""A thread that owns the device: it takes turns of work as long as there is any, and sleeps until more is posted."""

import atexit
import contextvars
import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from engine.errors import EngineClosed

CLOSED = "this engine is closed; make another with Engine.from_pretrained"
FORKED = "an engine was made before this process was forked; start processes with multiprocessing's spawn instead"
WAITS_FOR_ITSELF = "the engine's own thread cannot wait for the engine; call from another thread, or use submit"
PF_FORKNOEXEC = 0x40  # Linux's flag of a process that was forked and has not started another program since
AT_EXIT = 10.0  # seconds that the interpreter waits for a worker to end


class Owner(Protocol):
    """The object whose turns a worker runs."""

    def turn(self) -> bool:
        """Does some work; False if there is nothing left to do."""

    def abort(self, error: BaseException) -> None:
        """Ends everything that was posted with this error."""


class Worker:
    """The thread; it starts with the first post and ends with `close`, with its owner, or with the interpreter.

    It computes with as many threads as whoever posted last (`torch.get_num_threads`), in inference mode and with the
    context variables of where the worker was made.
    """

    def __init__(self, owner: Owner):
        self._owner = weakref.ref(owner, lambda _: self._wake.set())
        self._lock = threading.Lock()  # orders posts and closing
        self._wake, self._pid, self._threads = threading.Event(), os.getpid(), torch.get_num_threads()
        self._posted_by: Owner | None = None  # a reference until the thread has one: the caller may drop its own
        # Settings of torch.compile, such as its limits, are context variables.
        self._context = contextvars.copy_context()
        self._thread: threading.Thread | None = None
        self.closed = False
        _ALL.add(self)
        _FIRST_PID[:] = _FIRST_PID or [self._pid]

    def post(self, item, inbox: list) -> Future:
        """Appends an item to an inbox that the owner reads in its turns; returns the item's future.

        Ends the calling thread's idle OpenMP threads. Raises as `check`.
        """
        self.check()
        if self._thread is not threading.current_thread():
            end_idle_threads()
        with self._lock:
            self.check()
            self._threads = torch.get_num_threads()
            inbox.append(item)
            self._posted_by = self._owner()
            if self._thread is None:
                run = self._context.run
                self._thread = threading.Thread(target=run, args=(self._run,), name="psunet-engine", daemon=True)
                self._thread.start()
        # Cancelling is noticed between two turns; an idle worker has to be woken for it.
        item.future.add_done_callback(lambda future: self._wake.set() if future.cancelled() else None)
        self._wake.set()
        return item.future

    def check(self) -> None:
        """Raises EngineClosed if the worker is closed, RuntimeError if it was made before this process was forked."""
        if self._pid != os.getpid():
            raise RuntimeError(FORKED)
        if self.closed:
            raise EngineClosed(CLOSED)

    def check_waiting(self) -> None:
        """Raises RuntimeError on the worker's own thread, on which waiting for it would never end."""
        if self._thread is threading.current_thread():
            raise RuntimeError(WAITS_FOR_ITSELF)

    def close(self, timeout: float | None = None) -> None:
        """Ends the thread after the turn that it is in; the owner's `abort` is called with EngineClosed.

        timeout  seconds to wait for it at most
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            self.closed = True
            thread = self._thread
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        _ALL.discard(self)

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                self._wake.wait()
                self._wake.clear()
                # Held only while there is work, so that an unused owner can be freed.
                owner, self._posted_by = self._owner(), None
                if owner is None:
                    return
                try:
                    while not self.closed and self._turn(owner):
                        pass
                except BaseException as error:  # the callers must not wait for results that never come
                    owner.abort(error)
                if self.closed:
                    owner.abort(EngineClosed(CLOSED))
                    return
                del owner
                end_idle_threads()

    def _turn(self, owner: Owner) -> bool:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        return owner.turn()


def in_own_thread(function: Callable, *arguments):
    """function(*arguments), run in a thread that then ends.

    It uses neither the caller's OpenMP threads, which do not exist in a forked process, nor the caller's settings of
    PyTorch, such as inference mode.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, function, *arguments).result()


def end_idle_threads() -> None:
    """Ends the OpenMP threads that wait for the calling thread's next parallel operation, which starts them again.

    Every thread that computes in parallel has OpenMP threads of its own. Once a process has more of them than cores,
    libgomp hardly spins at barriers: those of a program that had computed with PyTorch itself would slow down all
    that the worker does afterwards, and the worker's all that the program does (benchmarks/NOTES.md).
    """
    _pause(os.getpid())(1)  # omp_pause_soft


@cache
def _pause(pid: int) -> Callable[[int], int]:
    """omp_pause_resource_all of the OpenMP library in this process, on Linux.

    Does nothing where it is not found, nor in a forked process: it would wait for the parent's threads, which do not
    exist there.
    """
    try:
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
        if not flags & PF_FORKNOEXEC:
            return ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError):  # an older OpenMP, another system
        pass
    return lambda kind: 0


def finish_future(future: Future, result=None, error: BaseException | None = None) -> None:
    """Ends a future with a result or an error, unless it was cancelled or has ended."""
    if future.done() and not future.cancelled():
        return
    if not future.running() and not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def drive(flow: Generator) -> Future:
    """A future of what a generator returns, which yields futures and is sent their results.

    The generator starts here and goes on in the thread that ends the future it waits for. Cancelling the future that is
    returned cancels the one that it waits for.
    """
    future: Future = Future()
    current: list[Future] = []
    future.add_done_callback(lambda done: [waited.cancel() for waited in current] if done.cancelled() else None)

    def resume(step: Callable, argument) -> None:
        try:
            waited = step(argument)
        except StopIteration as end:
            finish_future(future, end.value)
        except BaseException as error:
            finish_future(future, error=error)
        else:
            current[:] = [waited]
            if future.cancelled():
                waited.cancel()
            waited.add_done_callback(proceed)

    def proceed(done: Future) -> None:
        if done.cancelled():
            flow.close()
            if not future.cancelled():
                future.cancel()
            future.set_running_or_notify_cancel()
        elif done.exception() is not None:
            resume(flow.throw, done.exception())
        else:
            resume(flow.send, done.result())

    resume(flow.send, None)
    return future


def check_process() -> None:
    """Raises RuntimeError in a process that was forked from one in which there had been a worker.

    Neither threads nor the state of OpenMP survive a fork: the first parallel operation would never end.
    """
    if _FIRST_PID and _FIRST_PID[0] != os.getpid():
        raise RuntimeError(FORKED)


_FIRST_PID: list[int] = []  # at most one: of the process in which the first worker was made
_ALL: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that computes while the interpreter shuts down would crash it."""
    for worker in list(_ALL):
        worker.close(AT_EXIT)
