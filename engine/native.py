"""The library of `engine.kernels.block` as an entry of `engine.compiled`: one for blocks of all shapes and weights."""

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path

from engine import compiled
from engine.errors import InputError, cut
from engine.kernels import block

DIGEST = hashlib.sha256().digest_size
REMEDY = "install a C++ compiler such as g++, or leave it out"


class Source(compiled.Source[block.Library]):
    """Its file is the library, followed by the digest of the library and of what it was compiled from."""

    name, suffix = "blocks", ".so"

    def facts(self) -> Mapping:
        return {"compiler": block.compiler(), "options": block.OPTIONS}

    def compile(self, path: Path) -> None:
        """Raises InputError if the compiler is missing or fails, or what it makes cannot be used."""
        try:
            block.build(path)
        except subprocess.TimeoutExpired as error:
            raise _failed(f"the compiler takes more than {error.timeout:g} s") from None
        except subprocess.CalledProcessError as error:
            said = error.stderr.strip().partition("\n")[0]
            raise _failed(said or f"{block.compiler()}: exit status {error.returncode}") from None
        except OSError as error:
            raise _failed(f"{error.filename}: {error.strerror}") from None
        except ValueError as error:
            raise _failed(f"CXX: {error}") from None
        content = path.read_bytes() if path.exists() else b""
        path.write_bytes(content + self._digest(content))
        try:
            self.load(path)
        except OSError as error:
            raise _failed(f"{block.compiler()}: {error}") from None

    def load(self, path: Path) -> block.Library:
        content = path.read_bytes()
        if content[-DIGEST:] != self._digest(content[:-DIGEST]):
            raise compiled.Unfit("is damaged or was built from something else")
        return block.Library(path)

    def _digest(self, library: bytes) -> bytes:
        return hashlib.sha256(self.description.encode() + library).digest()


def _failed(reason: str) -> InputError:
    return InputError("compile", True, REMEDY, f"failed ({cut(reason, 200)})")
