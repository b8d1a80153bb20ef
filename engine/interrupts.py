"""Ctrl-C in a command line: one line and exit status 130, also while Python is still importing.

An interrupt in the middle of an import ends the process at once: as an exception it would pass through C++ and through
destructors, which swallow it or turn it into another error. Imported before anything else, so it imports nothing slow.
"""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
OURS = ("engine.", "benchmarks.")


def answer_at_start() -> None:
    """Makes an interrupt end the process until `answer` is called, if `python -m` runs one of our modules."""
    arguments = sys.orig_argv
    if sys.argv[:1] != ["-m"] or "-m" not in arguments:  # argv[0] is "-m" only while the module's package is imported
        return
    module = arguments[arguments.index("-m") + 1]
    if module.startswith(OURS):
        _handle(lambda *_: _end(f"python -m {module}"))


def answer(command: str) -> None:
    """Makes an interrupt raise KeyboardInterrupt from now on; during an import it still ends the process."""

    def handler(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            _end(command)
        raise KeyboardInterrupt

    _handle(handler)


def _handle(handler) -> None:
    """Replaces Python's handler, unless interrupts are ignored (nohup, or a shell's &)."""
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
