"""What the command lines share: a parser that refuses in one line, types of arguments, the check of an output folder.

Imports no torch, so that --help and bad options answer at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations: they would break with every new option."""

    def __init__(self, prog: str, **settings):
        super().__init__(prog, allow_abbrev=False, **settings)

    def error(self, message: str):
        """One line instead of the whole usage."""
        sys.exit(refuse(self.prog, f"{message}; see --help"))


def refuse(command: str, error: object, options: Iterable[str] = ()) -> int:
    """Says why in one line, whatever line ends a file's name holds; returns the exit status.

    options  arguments that the command has: of these "steps: 0 …" becomes "--steps: 0 …", as the command spells them
    """
    names, colon, rest = str(error).partition(":")
    if set(options).issuperset(names.split(", ")):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in names.split(", "))
    print(f"{command}: {' '.join((names + colon + rest).splitlines())}", file=sys.stderr)
    return 2


@contextmanager
def about(option: str, *other: str) -> Iterator[None]:
    """Begins the message of a ValueError with the option that it is about, in place of any `other` argument's name."""
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(": ")
        raise ValueError(f"{option}: {rest if colon and name in (option, *other) else error}") from None


def name(text: str) -> str:
    """The name of a file, a folder or a model: an argparse type."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file or folder; give one")
    return text


def path(text: str) -> Path:
    """A path, which is never the current folder by mistake: an argparse type."""
    return Path(name(text))


def whole(lowest: int, highest: int) -> Callable[[str], int]:
    """The argparse type of whole numbers in a range."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {lowest} to {highest}; use one")
        return value

    return number


def check_writable(out: Path, files: Iterable[str] = ()) -> None:
    """Refuses an --out in which `files` cannot be written, before minutes of work are spent on them."""
    try:
        nearest = next(f for f in (out, *out.absolute().parents) if f.exists() or f.is_symlink())
    except OSError as error:  # a name too long
        raise ValueError(f"out: {out} cannot be written ({error.strerror}); give another folder") from None
    if not nearest.is_dir():
        raise ValueError(f"out: {nearest} is no folder; give another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"out: {nearest} cannot be written; give another folder")
    for file in files:
        if (out / file).is_dir():
            raise ValueError(f"out: {out / file} is a folder where a file is to be written; give another folder")
