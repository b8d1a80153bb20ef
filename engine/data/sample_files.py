"""The folder of a bulk run of `engine.sample`: which samples it holds, how they are added and read. Imports no torch.

    run.json                                 the number of samples, and all that they depend on
    000000.png 000000.txt 000000.json …      each sample: its image, its text, and how it was made
    00000.tar 00001.tar …                    or such files in tar shards, the layout of WebDataset

Nothing is written under a name of the folder before it is whole, and a sample's .json comes last: one that has it is
finished. A shard grows as `.00000.tar.unfinished`; what a killed process has appended in part is cut off by the next.
"""

import fcntl
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InputError
from engine.files import read_json, unreadable

RUN = "run.json"
LAST = "json"  # the file of a sample that is written last
Files = Mapping[str, bytes]  # of a sample, by extension


@dataclass(frozen=True)
class SampleFiles:
    """The samples 0 … count − 1 of a run, in `shards` tar files or, with 0 shards, in files of their own."""

    folder: Path
    count: int
    shards: int = 0

    def key(self, i: int) -> str:
        return f"{i:0{max(6, len(str(self.count - 1)))}d}"

    def shard_file(self, shard: int) -> Path:
        return self.folder / f"{shard:0{max(5, len(str(self.shards - 1)))}d}.tar"

    def shard_range(self, shard: int) -> range:
        """The samples of a shard: shards differ by one sample at most."""
        return range(shard * self.count // self.shards, (shard + 1) * self.count // self.shards)

    def begin(self, settings: dict) -> None:
        """Makes the folder and run.json, unless another process or an earlier run of the same settings has.

        Raises InputError about "out" where the folder holds another run, naming the first difference.
        """
        wanted = json.loads(json.dumps({"count": self.count, "shards": self.shards, **settings}))
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self.folder / f".{RUN}.{os.getpid()}"
            try:
                unfinished.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", "utf-8")
                with suppress(FileExistsError):
                    os.link(unfinished, self.folder / RUN)  # of several processes one makes it
            finally:
                unfinished.unlink(missing_ok=True)
        found = read_run(self.folder, "out")
        for key in wanted | found:
            if wanted.get(key) != found.get(key):
                problem = f"holds a run with {key} {found.get(key)!r}, this one has {wanted.get(key)!r}"
                raise InputError("out", self.folder, "give another folder, or the same options", problem)

    def finished(self) -> set[int]:
        """The samples that have files of their own, all of them."""
        found = set()
        for entry in os.scandir(self.folder):
            stem, _, extension = entry.name.partition(".")
            if extension == LAST and stem.isdecimal() and stem == self.key(int(stem)):
                found.add(int(stem))
        return found

    @contextmanager
    def writer(self, process: int) -> Iterator["FileWriter"]:
        """Writes samples as files of their own; one process of each number at a time."""
        folder = self.folder / f".writing-{process}"
        with ExitStack() as stack:
            stack.enter_context(_writing(self.folder))
            folder.mkdir(exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            _lock(descriptor, self.folder, f"is being written by another process {process}")
            for left in os.scandir(folder):
                os.unlink(left.path)
            yield FileWriter(self, folder)
            folder.rmdir()

    @contextmanager
    def shard_writer(self, shard: int) -> Iterator["ShardWriter"]:
        """Appends samples to a shard that is not finished; gives it its name when the block ends with all of them."""
        unfinished = self.folder / f".{self.shard_file(shard).name}.unfinished"
        with _writing(self.folder), open(unfinished, "ab") as stream, open(unfinished, "r+b") as file:
            _lock(stream.fileno(), self.folder, f"has a shard {shard} that another process is writing")
            if self.shard_file(shard).is_file():  # finished meanwhile
                raise InputError("out", self.folder, "repeat the command", f"has got shard {shard} of another process")
            begin = self.shard_range(shard).start
            keys, end = _whole_samples(file)
            if keys != [self.key(begin + i) for i in range(len(keys))]:  # not written by a run
                keys, end = [], 0
            file.truncate(end)
            file.seek(end)
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                writer = ShardWriter(self, tar, begin + len(keys))
                yield writer
            if writer.next == self.shard_range(shard).stop:
                file.flush()
                os.fsync(file.fileno())
                os.replace(unfinished, self.shard_file(shard))


@dataclass(frozen=True)
class FileWriter:
    files: SampleFiles
    folder: Path  # where files are until they are whole

    def write(self, i: int, files: Files) -> None:
        for extension in sorted(files, key=lambda e: e == LAST):
            name = f"{self.files.key(i)}.{extension}"
            with open(self.folder / name, "wb") as file:
                file.write(files[extension])
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.folder / name, self.files.folder / name)


@dataclass
class ShardWriter:
    files: SampleFiles
    tar: tarfile.TarFile
    next: int  # the sample to be appended next

    def write(self, i: int, files: Files) -> None:
        assert i == self.next, (i, self.next)
        for extension in sorted(files, key=lambda e: e == LAST):
            entry = tarfile.TarInfo(f"{self.files.key(i)}.{extension}")
            entry.size = len(files[extension])
            self.tar.addfile(entry, io.BytesIO(files[extension]))
        self.tar.fileobj.flush()
        self.next += 1


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes what the operating system refuses an InputError about "out": a full disk, a file in the way."""
    try:
        yield
    except OSError as error:
        remedy = "mend that, or give another folder; the same command makes what is missing"
        raise InputError("out", folder, remedy, f"cannot be written ({error})") from error


def _lock(descriptor: int, folder: Path, problem: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError("out", folder, "wait for it, or end it", problem) from error
    except OSError:  # a file system without locks
        pass


def _whole_samples(file: io.BufferedRandom) -> tuple[list[str], int]:
    """Keys of the samples that are wholly in a shard, and where the last of them ends in bytes."""
    size, keys, end = os.fstat(file.fileno()).st_size, [], 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (entry := tar.next()) is not None:
                after = entry.offset_data + -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if after > size:
                    break
                key, _, extension = entry.name.partition(".")
                if extension == LAST:
                    keys.append(key)
                    end = after
    except tarfile.TarError:  # empty, or cut within a header
        pass
    return keys, end


def read_run(folder: Path, argument: str) -> dict:
    """What run.json holds; InputError about `argument` if that is not a run's."""
    remedy = "give the folder of a bulk run of engine.sample"
    found = read_json(folder / RUN, argument, remedy, remedy)
    if not isinstance(found, dict):
        raise InputError(argument, folder / RUN, remedy, "is not written by engine.sample")
    return found


def read_samples(folder: Path, argument: str = "samples") -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files of each sample of a folder, in the order of the keys: files of their own, then tar shards.

    Takes any folder of such files, also without run.json. Raises InputError about `argument`, naming what cannot be
    read.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and entry.name[0] != ".")
    except OSError as error:
        raise unreadable(argument, folder, error, "give a folder of samples") from None
    plain: dict[str, list[str]] = {}
    for name in names:
        key, _, extension = name.partition(".")
        if extension and extension != "tar" and name != RUN:
            plain.setdefault(key, []).append(extension)
    for key, extensions in plain.items():
        try:
            yield key, {extension: (folder / f"{key}.{extension}").read_bytes() for extension in extensions}
        except OSError as error:
            raise unreadable(argument, folder / key, error, "restore the file") from None
    for name in names:
        if name.endswith(".tar"):
            yield from _read_shard(folder / name, argument)


def _read_shard(file: Path, argument: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar file, whose files stand side by side; nothing is unpacked to disk."""
    key, files = None, {}
    try:
        with tarfile.open(file, "r:") as tar:
            for entry in tar:
                if not entry.isreg():
                    continue
                found, _, extension = entry.name.rpartition("/")[2].partition(".")
                if found != key and files:
                    yield key, files
                    files = {}
                key = found
                files[extension] = tar.extractfile(entry).read()
    except (OSError, tarfile.TarError) as error:
        raise InputError(argument, file, "make it again", f"is not a whole tar file ({error})") from None
    if files:
        yield key, files
