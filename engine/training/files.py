"""`StageFiles`: the last states of a stage, its loss curve and its settings, written in the background.

torch.distributed.checkpoint writes and reads the states: each process its part, as safetensors, so nothing is
unpickled, and another number of processes can read them. The rows of the curve are written before a state gets its
name, which has their number: rows beyond it are ignored.
"""

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor

from engine.errors import InputError
from engine.files import unreadable, write_atomically
from engine.processes import Processes

PROGRESS, CURVE, SETTINGS = "progress.json", "curve.jsonl", "settings.jsonl"
STATE, NAME = "state-{:010d}", re.compile(r"state-\d{10}")
WRITING, DELETING = ".state.writing", ".state.deleting"
PART = 64 << 20  # bytes of a file, roughly: safetensors puts one together without letting other threads run


class StageFiles:
    """The files in a stage's folder.

        state-0000000250/   of a saved step: safetensors files of each process, and `progress.json`
        curve.jsonl         a row for each step
        settings.jsonl      from which step on the stage was trained with which settings

    keep       how many states there are at most
    processes  that write a state together; all call `save` and `fill`
    """

    def __init__(self, folder: Path, keep: int = 1, processes: Processes | None = None):
        self.folder, self.keep, self.processes = folder, keep, processes or Processes()
        self._rows: int | None = None  # in the curve's file; None: unknown
        self._thread = ThreadPoolExecutor(1, "save")
        self._write: Future | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if self.processes.is_main:  # of a run that was killed
            _remove(folder / WRITING)
            _remove(folder / DELETING)

    @property
    def states(self) -> list[Path]:
        """The states' folders, the last one last."""
        return sorted(path for path in self.folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir())

    def save(self, tensors: Mapping[str, Tensor], progress: dict, curve: list, settings: list) -> None:
        """Writes all files in the background, after `finish`.

        tensors   whole, or shared (DTensor); they are copied now
        progress  "step", "config" and whatever else JSON can hold
        """
        files, size = {}, 0  # the number of each tensor's file, the same in all processes
        for name, tensor in sorted(tensors.items()):
            files[name] = 1 + size // PART
            size += tensor.nbytes
        copies = self.processes.copied(tensors)
        self._write = self._thread.submit(self._save, copies, files, progress, list(curve), list(settings))

    def finish(self) -> None:
        """Waits for the write that is under way, if there is one.

        Raises, in the first process, what it failed with in any, such as OSError for a full disk: the last state is
        then intact.
        """
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def _save(self, copies: dict[str, Tensor], files: dict, progress: dict, curve: list, settings: list) -> None:
        writing, is_main = self.folder / WRITING, self.processes.is_main
        writer = dcp.HuggingFaceStorageWriter(str(writing), files, save_distributed=True)
        try:
            dcp.save(copies, storage_writer=writer, **self._among())
            if is_main:
                self._write_rows(curve, settings)
                sizes = {path.name: path.stat().st_size for path in sorted(writing.iterdir())}
                text = json.dumps({**progress, "files": sizes}, indent=2)
                write_atomically(writing / PROGRESS, lambda path: path.write_text(text + "\n"))
                writing.rename(self.folder / STATE.format(progress["step"]))
        except dcp.CheckpointException as error:  # in all processes, whichever failed
            if is_main:
                raise _cause(error) from None
        finally:
            if is_main:
                _remove(writing)
        if is_main:
            for path in self.states[: -self.keep]:
                _remove(self.folder / DELETING)
                path.rename(self.folder / DELETING)  # first, so that a kill leaves no part of a state
                _remove(self.folder / DELETING)

    def _write_rows(self, curve: list, settings: list) -> None:
        if self._rows is None:  # what is there may go beyond the state that this run began with
            write_atomically(self.folder / CURVE, lambda path: path.write_text(_lines(curve)))
        else:
            with open(self.folder / CURVE, "a") as file:
                file.write(_lines(curve[self._rows :]))
        self._rows = len(curve)
        write_atomically(self.folder / SETTINGS, lambda path: path.write_text(_lines(settings)))

    def load(self) -> tuple[dict, list[dict], list[dict]] | None:
        """Progress, curve and settings of the last state; None: there is none.

        Raises InputError about `folder` for files that are damaged, cannot be read or are those of version 0.1.
        """
        if not self.states:
            if (old := self.folder / "state.safetensors").exists():
                remedy = "use another folder, and --init with this run's checkpoint to continue from its weights"
                raise InputError("folder", old, remedy, "was written by version 0.1")
            return None
        state = self.states[-1]
        try:
            progress = json.loads((state / PROGRESS).read_text())
            step = progress["step"]
            if type(step) is not int or STATE.format(step) != state.name or not isinstance(progress["config"], dict):
                raise ValueError(f"{PROGRESS} is not that of this step")
            for name, size in dict(progress["files"]).items():
                if not (state / name).exists():
                    raise ValueError(f"{name} is missing")
                if (found := (state / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {found} bytes in place of {size}")
        except FileNotFoundError:
            raise self.damaged(f"{PROGRESS} is missing") from None
        except OSError as error:
            raise unreadable("folder", state, error, f"delete it {self._then()}") from None
        except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise self.damaged(error) from None
        return progress, self._read_rows(CURVE, step), self._read_rows(SETTINGS)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Reads the last state into these tensors, of which DTensors take their part.

        Raises InputError about `folder` if it is damaged or has other tensors.
        """
        path = self.states[-1]
        reader = dcp.HuggingFaceStorageReader(str(path))
        try:
            saved = {name: value.size for name, value in reader.read_metadata().state_dict_metadata.items()}
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise self.damaged(error) from None
        if saved != {name: tensor.shape for name, tensor in tensors.items()}:
            raise InputError("folder", path, "use another folder", "was written by a model of another shape")
        try:
            dcp.load(dict(tensors), storage_reader=reader, **self._among())
        except dcp.CheckpointException as error:
            raise self.damaged(_cause(error)) from None

    def damaged(self, problem: object) -> InputError:
        """The error that says so of the last state."""
        return InputError("folder", self.states[-1], f"delete it {self._then()}", f"is damaged ({problem})")

    def _among(self) -> dict:
        """The arguments that tell torch.distributed.checkpoint which processes take part."""
        if self.processes.count > 1:
            return {"process_group": self.processes.saving}
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # it warns of one process
        return {"no_dist": True}

    def _then(self) -> str:
        """What happens without the last state."""
        earlier = self.states[:-1]
        return f"to resume from {earlier[-1].name}" if earlier else "to restart this stage"

    def _read_rows(self, name: str, count: int | None = None) -> list[dict]:
        """The rows of a file; `count`: those of so many steps, whatever follows."""
        path, remedy = self.folder / name, f"delete {self.states[-1]} {self._then()}"
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


def _cause(error: dcp.CheckpointException) -> BaseException:
    """What the first process that failed has failed with."""
    exception, _ = next(iter(error.failures.values()))
    return exception


def _remove(path: Path) -> None:
    """Whatever it is, if it is there; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
