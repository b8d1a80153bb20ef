"""What the command lines share: `Parser`, options, `refuse` (one-line errors), `run` (no tracebacks), path checks.

Imports no torch, so that --help and bad options answer at once.
"""

import argparse
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from engine.errors import InputError, cut, shown
from engine.interrupts import INTERRUPTED, answer
from engine.request import QUANTIZATIONS


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations: they would break with every new option.

    description  of which the first line is printed; a module's docstring, which is None under python -OO
    """

    def __init__(self, prog: str, description: str | None = None, **settings):
        super().__init__(prog, description=(description or "").partition("\n")[0], allow_abbrev=False, **settings)

    def error(self, message: str):
        """One line instead of the whole usage."""
        sys.exit(refuse(self.prog, f"{cut(message, 500)}; see --help"))


def refuse(command: str, error: object, options: Iterable[str] = ()) -> int:
    """Prints why in one line, without the message's line breaks; returns the exit status.

    error    an exception or a message. One that has an `argument`, such as an InputError, is about that argument, or
             about several, separated by ", ". One that a failing import raised is about that package
    options  names of the command's options, as Python spells them: an argument that is one is printed as "--steps"
    """
    own = isinstance(error, BaseException) and isinstance(_root(error), OSError)  # such as a full disk
    if os.environ.get("LOCAL_RANK", "0") != "0" and not own:
        return 2  # the first process that torchrun has started on this machine prints the same
    message, argument = str(error), getattr(error, "argument", None)
    if argument is not None:
        names, options = argument.split(", "), set(options)
        spelled = ", ".join(f"--{name.replace('_', '-')}" for name in names) if options.issuperset(names) else argument
        message = f"{spelled}: {message.removeprefix(f'{argument}: ')}"
    elif isinstance(error, BaseException) and (package := broken_package(error)):
        remedy = "reinstall it, or uninstall it if nothing needs it"
        message = f"the package {package} cannot be imported ({_root(error)}); {remedy}"
    with suppress(OSError):  # standard error may be closed or full
        print(f"{command}: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


def broken_package(error: BaseException) -> str | None:
    """The package, other than this one, whose import raised an error; None for errors of other causes."""
    error = _root(error)
    module = error.name if isinstance(error, ImportError) else None
    if module is None:  # the innermost module that was being imported
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
        module = frames[-1].f_globals.get("__name__") if frames else None
    package = (module or "").partition(".")[0]
    return package if package not in ("", "__main__", "engine") else None


def _root(error: BaseException) -> BaseException:
    """The first error of a chain of `raise … from …`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def run(command: str, main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits with its status.

    These print no traceback: an interrupt; standard output or error that is closed, full, a pipe without a reader, or
    of an encoding that lacks what is printed; a user without a home folder; a package that cannot be imported.
    """
    answer(command)
    _open_streams()
    try:
        Path.home()
    except RuntimeError:  # packages that look for their settings there would fail at import
        os.environ["HOME"] = "/nonexistent"  # as Debian has it
    try:
        try:
            status = main()
        except SystemExit as stop:  # of the parser
            status = stop.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process wherever it is
        with suppress(OSError):
            print(f"{command}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:
        status = 1
        _discard_output()
    except Exception as error:
        broken = broken_package(error)
        if broken is None and not isinstance(error, OSError):
            raise
        named = broken or error.filename
        status = refuse(command, error if named else f"standard output cannot be written ({error.strerror})")
        if broken is None:  # such as standard output on a full disk
            _discard_output()
    gc.freeze()  # at its end the interpreter collects garbage, which took half a second
    sys.exit(status)


class _Stderr(TextIOWrapper):
    """Standard error that ignores failed writes, so that a progress bar or message cannot end a run."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _open_streams() -> None:
    """Puts /dev/null in the place of streams that are closed: a file opened next would become standard output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    # Not strict: what a terminal's encoding lacks is printed as \u1234.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = _Stderr(os.fdopen(2, "wb", closefd=False), "utf-8" if sys.stderr is None else sys.stderr.encoding,
                         "backslashreplace", line_buffering=True)  # fmt: skip


def _discard_output() -> None:
    """The interpreter flushes standard output when it exits, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def name(text: str) -> str:
    """The name of a file, a folder or a model: an argparse type."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not the name of a file or folder; give one")
    return text


class Once(argparse.Action):
    """Stores an option's value and refuses a second, of which argparse would keep the last. The default is None."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, f"{shown(values)} is a second one; give one")
        setattr(namespace, self.dest, values)


def path(text: str) -> Path:
    """A path: an argparse type. Refuses the empty name, which `Path` would take as the current folder."""
    return Path(name(text))


def add_model(add: Callable) -> None:
    """Adds --checkpoint, --device and --dtype; `add` is `add_argument` of a parser or of a group."""
    text = "a folder that engine.train has written, owner/name[@revision] on the hub, emoji (default) or emoji-sketch"
    add("--checkpoint", type=path, metavar="DIR", help=text)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto, as measured)")


def add_quantize(add: Callable) -> None:
    """Adds --quantize."""
    text = "keep the weights of the large products in 8 bits; needs an NVIDIA GPU that has such products"
    add("--quantize", choices=QUANTIZATIONS, default="none", help=text)


def check_writable(out: Path, files: Iterable[str] = ()) -> None:
    """Raises InputError about "out" if `files` cannot be written there, before minutes of work are spent on them."""
    try:
        nearest = next(f for f in (out, *out.absolute().parents) if f.exists() or f.is_symlink())
    except OSError as error:  # a name too long
        raise InputError("out", out, "give another folder", f"cannot be written ({error.strerror})") from None
    if not nearest.is_dir():
        raise InputError("out", nearest, "give another one", "is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError("out", nearest, "give another folder", "cannot be written")
    for file in files:
        if (out / file).is_dir():
            problem = "is a folder where a file is to be written"
            raise InputError("out", out / file, "give another folder", problem)
