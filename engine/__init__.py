"""Joint text-and-image diffusion with PS-U-Net (arXiv 2311.16488).

The public names are imported on first use, so that `import engine` costs milliseconds and not the seconds of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from engine.interrupts import answer_at_start

if TYPE_CHECKING:
    from engine.errors import InputError
    from engine.request import Request, Result
    from engine.runtime import Engine
    from engine.serving.async_engine import AsyncEngine

answer_at_start()  # for `python -m engine.…`, before anything slow is imported; else it does nothing

__version__ = "0.1.0"
__all__ = ["AsyncEngine", "Engine", "InputError", "Request", "Result", "__version__"]

_HOME = {
    "AsyncEngine": "engine.serving.async_engine",
    "Engine": "engine.runtime",
    "InputError": "engine.errors",
    "Request": "engine.request",
    "Result": "engine.request",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOME.keys())
