"""Files: written whole or not at all, in the mode that the umask gives; read with errors that say what is wrong.

Also checks of the weights in them. Imports no torch.
"""

import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def cache_folder() -> Path | None:
    """Where the engine keeps what it can make again, below XDG_CACHE_HOME or ~/.cache; None without a home folder."""
    folder = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(folder or Path.home() / ".cache") / "psunet-engine"
    except RuntimeError:
        return None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with the path of a temporary file, flushes that file to disk and renames it to `path`.

    The file is in a folder of its own beside `path`: what a killed process has left there, such as the temporary files
    that safetensors makes, is removed by the next write. It gets the mode of a new file, which safetensors does not.
    """
    folder = path.with_name(f".{path.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        temporary = folder / path.name
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata))


def load_tensors(path: str | PathLike) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises OSError as `open` does, where safetensors takes every file that it cannot open for a missing one, and
    safetensors.SafetensorError for a damaged one.
    """
    from safetensors import safe_open

    with open(path, "rb"), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


def files_within(folder: Path) -> list[Path]:
    """The files of a checkpoint or an adapter and of its folders, also of links to folders, which rglob passes over."""
    return sorted(path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file())


def all_finite(weights: dict[str, "Tensor"]) -> bool:
    """Whether these are floats that can be computed with (8 bits are for storage only), without infinities and NaN."""
    return all(w.is_floating_point() and w.element_size() > 1 and w.isfinite().all() for w in weights.values())


def shape_difference(expected: Mapping[str, "Tensor"], found: Mapping[str, "Tensor"]) -> str | None:
    """The first difference between the names and shapes of two networks' weights, in words; None: there is none."""
    a, b = ({name: tuple(w.shape) for name, w in weights.items()} for weights in (expected, found))
    differing = a.items() ^ b.items()
    if not differing:
        return None
    name = min(differing)[0]
    return f"{name} is {b.get(name, 'missing')}, should be {a.get(name, 'absent')}"


def read_json(path: Path, argument: str, absent: str, damaged: str):
    """The parsed JSON of a file, of any type; InputError about `argument`, with one of two remedies."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise unreadable(argument, path, error, absent) from None
    except (ValueError, RecursionError) as error:
        raise InputError(argument, path, damaged, f"is not readable JSON ({error})") from None


def unreadable(argument: str, path: object, error: OSError, remedy: str) -> InputError:
    """The InputError for a file that cannot be opened; `remedy` is for one that is not there."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return InputError(argument, path, remedy, "does not exist")
    remedy = "make it readable" if isinstance(error, PermissionError) else remedy
    return InputError(argument, path, remedy, f"cannot be read ({error.strerror or error})")


def is_file(path: str | PathLike, argument: str) -> bool:
    """As os.path.isfile; InputError about `argument` where permissions hide the answer."""
    return stat.S_ISREG(_mode(path, argument))


def is_folder(path: str | PathLike, argument: str) -> bool:
    """As os.path.isdir; InputError about `argument` where permissions hide the answer."""
    return stat.S_ISDIR(_mode(path, argument))


def _mode(path: str | PathLike, argument: str) -> int:
    try:
        return os.stat(path).st_mode
    except PermissionError as error:
        raise unreadable(argument, Path(path), error, "") from None
    except (OSError, ValueError):  # missing, or no name that a file can have
        return 0
