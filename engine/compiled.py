"""Code compiled for this machine, kept in the user's cache folder.

An entry belongs to what it was compiled from: the versions of torch and of the engine's source, the processor, and all
that its own kind depends on. That is in its name and inside it; an entry that does not fit, or is damaged, is never
loaded. Entries are written beside their place and renamed, so several processes may build at once.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Generic, TypeVar

import torch

from engine.device import processor
from engine.errors import InputError, cut
from engine.files import cache_folder

LIMIT = 256 << 20  # bytes of the folder; beyond it the least recently used entries are removed
SUFFIXES = (".pt2", ".so")  # of entries
ROOM = 32 << 20  # bytes that have to be free to build an entry
ABANDONED = 24 * 3600  # seconds after which the folder of a build that was killed is removed
DAMAGE = (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)

Loaded = TypeVar("Loaded")
log = logging.getLogger("engine.compiled")


class Unfit(Exception):
    """Why an entry cannot be used: "is damaged"."""


class Source(Generic[Loaded]):
    """What an entry is compiled from, and how.

    name    for people: the first part of the file's name
    suffix  of the file, one of `SUFFIXES`
    """

    name: str
    suffix: str

    def facts(self) -> Mapping:
        """All that the code depends on, besides the machine and the engine, in JSON's types."""
        raise NotImplementedError

    def compile(self, path: Path) -> None:
        """Compiles into a file; raises what the compiler raises."""
        raise NotImplementedError

    def load(self, path: Path) -> Loaded:
        """Loads a file that `compile` has made; raises Unfit, or one of `DAMAGE`, for any other."""
        raise NotImplementedError

    @cached_property
    def description(self) -> str:
        """All that identifies an entry, in JSON."""
        return json.dumps({**_here(), **self.facts()}, sort_keys=True)

    @property
    def file(self) -> str:
        return f"{self.name}-{hashlib.sha256(self.description.encode()).hexdigest()[:20]}{self.suffix}"


def entry(source: Source[Loaded], build: bool = False) -> Loaded | None:
    """The code compiled from this; None where there is none and none is to be built, or it cannot be kept or loaded.

    Damaged entries and those built from something else are announced, once, and with `build` built again.
    Raises what the compiler raises where it fails or is missing.
    """
    folder = _folder()
    found = _stored(folder / source.file, source) if folder else None
    if found is None and build:
        try:
            add(source)
        except OSError as error:
            where, reason = folder or "the cache", error.strerror or error
            _announce(f"compile: {where} cannot be written ({reason}); continuing without compiled code")
            return None
        assert folder is not None, "without one it cannot be added"
        found = _stored(folder / source.file, source)
    return found


def lacks(source: Source) -> bool:
    """Whether there is no entry of this, not even one that cannot be used."""
    folder = _folder()
    return folder is None or not os.path.exists(folder / source.file)


def add(source: Source) -> None:
    """Compiles an entry. Raises OSError where it cannot be kept, and what the compiler raises."""
    folder = _folder()
    if folder is None:
        raise OSError("no home folder")
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < ROOM:  # PyTorch's writer aborts the process on a full disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as building:
        made = Path(building) / source.file
        source.compile(made)
        os.replace(made, folder / source.file)
    _shrink(folder, keep=source.file)


@cache  # once
def _announce(problem: str) -> None:
    log.warning(problem)


def _folder() -> Path | None:
    cache = cache_folder()
    return cache and cache / "packages"


def _stored(path: Path, source: Source[Loaded]) -> Loaded | None:
    """What is in a file; None if there is none, or none that can be trusted, which is announced."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return None
    try:
        if owner not in (0, os.getuid()):  # it would run as code
            raise Unfit("belongs to another user")
        found = source.load(path)
        with suppress(OSError):
            os.utime(path)
        return found
    except Unfit as error:
        problem = str(error)
    except DAMAGE as error:
        problem = f"is damaged or cannot be loaded ({' '.join(str(error).split())[:100]})"
    _announce(f"compile: {path} {problem}; it is not used, --compile builds it again")
    return None


def _shrink(folder: Path, keep: str) -> None:
    """Removes the least recently used entries until the folder is within its limit, and abandoned builds."""
    entries = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process may have removed it
            status = path.stat()
            if path.name.startswith(".building-"):
                if time.time() - status.st_mtime > ABANDONED:
                    shutil.rmtree(path, ignore_errors=True)
            elif path.suffix in SUFFIXES:
                entries.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total > LIMIT and path.name != keep:
            with suppress(OSError):
                path.unlink()
            total -= size


def compile_failure(error: Exception) -> Exception:
    """A failure of torch.compile, such as for want of a C++ compiler, as InputError; any other error as it is."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return error
    remedy = "install a C++ compiler such as g++ and Python's headers, or leave it out"
    reason = cut(str(error).partition("\n")[0], 200)
    return InputError("compile", True, remedy, f"failed ({reason})")


@cache
def _here() -> dict[str, str]:
    """Versions and processor that compiled code depends on."""
    engine = Path(__file__).parent
    patterns = "packages.py", "model/*.py", "kernels/*.py", "kernels/*.cpp"
    files = sorted(file for pattern in patterns for file in engine.glob(pattern))
    source = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files))
    flags = ""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "source": source.hexdigest(),
        "processor": f"{processor()}, {capability}, {hashlib.sha256(flags.encode()).hexdigest()}",
    }
