"""Ctrl-C in a command line: one line and exit status 130, also while Python is still importing.

An interrupt in the middle of an import ends the process at once: as an exception it would pass through C++ and through
destructors, which swallow it or turn it into another error. Imports nothing slow, since it is imported first.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
OURS = ("engine.", "benchmarks.")


def answer_at_start() -> None:
    """Until `answer` is called, ends the process; only if it is one of our modules that `python -m` runs."""
    command, arguments = sys.argv[:1], sys.orig_argv
    if command != ["-m"] or "-m" not in arguments:  # "-m" only while the module's package is imported
        return
    module = arguments[arguments.index("-m") + 1]
    if module.startswith(OURS):
        _handle(lambda *_: _end(f"python -m {module}"))


def answer(command: str) -> None:
    """From now on, raises KeyboardInterrupt, except within an import."""

    def handler(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            _end(command)
        raise KeyboardInterrupt

    _handle(handler)


def _handle(handler) -> None:
    """Replaces Python's handler; one that ignores interrupts (nohup, or a shell's &) stays."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end(command: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # standard error may be closed
        print(f"{command}: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
