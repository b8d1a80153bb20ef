"""`StageFiles`: the last states of a stage, its loss curve and its settings, written in the background.

The rows of the curve are written before the state, which has their number: rows beyond it are ignored.
"""

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from engine.errors import InputError
from engine.files import load_tensors, save_tensors, unreadable, write_atomically

STATE, CURVE, SETTINGS = "state.safetensors", "curve.jsonl", "settings.jsonl"
EARLIER = "state-*.safetensors"


class StageFiles:
    """The files in a stage's folder.

        state.safetensors           tensors of the last saved step; its metadata are strings
        state-0000000250.safetensors   those of earlier steps
        curve.jsonl                 a row for each step
        settings.jsonl              from which step on the stage was trained with which settings

    keep  how many states there are at most
    """

    def __init__(self, folder: Path, keep: int = 1):
        self.folder, self.keep = folder, keep
        self._step = 0  # of the last state
        self._rows: int | None = None  # in the curve's file; None: unknown
        self._thread = ThreadPoolExecutor(1, "save")
        self._write: Future | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def state(self) -> Path | None:
        """The last state, or None: of an earlier step if a run was killed between two writes."""
        last = self.folder / STATE
        return last if last.exists() else max(self.folder.glob(EARLIER), default=None)

    def save(self, tensors: Mapping[str, Tensor], metadata: dict[str, str], curve: list, settings: list) -> None:
        """Writes all files in the background, after `finish`.

        tensors  on the CPU, copies that training does not change
        """
        assert self._write is None, "finish comes first"
        self._write = self._thread.submit(self._save, tensors, metadata, list(curve), list(settings))

    def finish(self) -> None:
        """Waits for the write that is under way, if there is one.

        Raises what it failed with, such as OSError for a full disk: the last state is then intact.
        """
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def _save(self, tensors: Mapping[str, Tensor], metadata: dict[str, str], curve: list, settings: list) -> None:
        if self._rows is None:  # what is there may go beyond the state that this run began with
            write_atomically(self.folder / CURVE, lambda path: path.write_text(_lines(curve)))
        else:
            with open(self.folder / CURVE, "a") as file:
                file.write(_lines(curve[self._rows :]))
        self._rows = len(curve)
        write_atomically(self.folder / SETTINGS, lambda path: path.write_text(_lines(settings)))
        last = self.folder / STATE
        if self.keep > 1 and last.exists():
            last.rename(self.folder / EARLIER.replace("*", f"{self._step:010d}"))
        save_tensors(last, tensors, metadata)
        self._step = int(metadata["step"])
        earlier = sorted(self.folder.glob(EARLIER))
        for path in earlier[: max(0, len(earlier) - self.keep + 1)]:
            path.unlink()

    def load(self) -> tuple[dict[str, Tensor], dict[str, str], list[dict], list[dict]] | None:
        """Tensors, metadata, curve and settings of the last state; None: there is none.

        Raises InputError about `folder` for files that are damaged or cannot be read.
        """
        path = self.state
        if path is None:
            return None
        remedy = "delete it to restart this stage"
        if earlier := [other for other in self.folder.glob(EARLIER) if other != path]:
            remedy = f"delete it to resume from {max(earlier).name}"
        try:
            tensors, metadata = load_tensors(path)
            self._step = step = int(metadata["step"])
        except OSError as error:
            raise unreadable("folder", path, error, remedy) from None
        except (SafetensorError, LookupError, TypeError, ValueError) as error:  # of the file or its metadata
            raise InputError("folder", path, remedy, f"is damaged ({error})") from None
        curve = self._read_rows(CURVE, step)
        settings = self._read_rows(SETTINGS) if (self.folder / SETTINGS).exists() else []  # not in runs of version 0.1
        return tensors, metadata, curve, settings

    def _read_rows(self, name: str, count: int | None = None) -> list[dict]:
        """The rows of a file; `count`: those of so many steps, whatever follows."""
        path, remedy = self.folder / name, f"delete {self.state} to restart this stage"
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
            if not rows or not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
                raise ValueError("not every line is an object with a step")
            if count is not None and [row["step"] for row in rows] != list(range(1, count + 1)):
                raise ValueError(f"it does not have the steps 1 to {count}")
            return rows
        except OSError as error:
            raise unreadable("folder", path, error, remedy) from None
        except (ValueError, RecursionError) as error:
            raise InputError("folder", path, remedy, f"is damaged ({error})") from None


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
