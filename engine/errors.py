"""`InputError`: what a user got wrong, with the argument, the value and the remedy as fields. `EngineClosed`."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike


class InputError(ValueError):
    """A value that cannot be used. `str(error)` is one sentence: "argument: value problem; remedy".

    argument  name of the parameter or option, as in `Request` ("steps") or a config file ("model.dim")
    value     what was given
    remedy    what to do instead
    problem   what is wrong with the value
    """

    def __init__(self, argument: str, value, remedy: str, problem: str = "is not valid"):
        self.argument, self.value, self.remedy, self.problem = argument, value, remedy, problem
        super().__init__(argument, value, remedy, problem)

    def __str__(self) -> str:
        sentence = f"{self.argument}: {shown(self.value)} {self.problem}; {self.remedy}"
        return " ".join(sentence.splitlines())


class EngineClosed(RuntimeError):
    """The engine is closed, or finishes what it has and takes nothing new."""


@contextmanager
def errors_named(argument: str) -> Iterator[None]:
    """Gives every InputError raised within this argument's name: a file's error becomes that of the option naming it.

    Errors of other kinds pass.
    """
    try:
        yield
    except InputError as error:
        raise InputError(argument, error.value, error.remedy, error.problem) from error.__cause__


def cut(text: str, most: int) -> str:
    """The start and the end of a text that is longer than `most` characters."""
    return text if len(text) <= most else f"{text[:60]}...{text[-100:]}"


def shown(value) -> str:
    """A value for a message: paths as they are, images by size and mode, all else quoted; cut where long or nested."""
    if isinstance(value, PathLike):
        return cut(str(value), 4096)  # a longer one is the name of no file
    if hasattr(value, "getbands") and not isinstance(value, type):  # an image of Pillow, which is not imported here
        return f"<image of {value.width}x{value.height} pixels, mode {value.mode}>"
    short = reprlib.Repr()
    short.maxstring = 100
    try:
        return short.repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return f"{type(value).__name__} that is too long to print"
