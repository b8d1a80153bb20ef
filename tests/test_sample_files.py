"""The folder of a bulk run: every sample whole and once, whenever its processes are killed."""

import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from engine.data.prompts import read_prompts
from engine.data.sample_files import SampleFiles, read_samples
from engine.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
COUNT = 20


def sample(i: int) -> dict[str, bytes]:
    return {"json": b'{"index": %d}' % i, "png": bytes([i]) * (600 * i), "txt": b"red heart"}


def write(files: SampleFiles, process: int = 0, processes: int = 1) -> int:
    """Makes what is missing of a process's part; returns how many samples were written."""
    made = 0
    if files.shards:
        for shard in range(process, files.shards, processes):
            if not files.shard_file(shard).is_file():
                with files.shard_writer(shard) as writer:
                    for i in range(writer.next, files.shard_range(shard).stop):
                        writer.write(i, sample(i))
                        made += 1
        return made
    with files.writer(process) as writer:
        for i in sorted(set(range(process, files.count, processes)) - files.finished()):
            writer.write(i, sample(i))
            made += 1
    return made


def assert_complete(files: SampleFiles):
    """Every sample once, whole, and nothing else in the folder."""
    assert list(read_samples(files.folder)) == [(f"{i:06d}", sample(i)) for i in range(files.count)]
    names = {f"{i:06d}.{e}" for i in range(files.count) for e in sample(i)}
    shards = {f"{i:05d}.tar" for i in range(files.shards)}
    assert set(os.listdir(files.folder)) == {"run.json"} | (shards or names)


def begun(folder: Path, shards: int = 0) -> SampleFiles:
    files = SampleFiles(folder, COUNT, shards)
    files.begin({"steps": 5})
    return files


@pytest.mark.parametrize("shards", [0, 1, 3, COUNT])
def test_processes_share_the_samples_and_a_second_run_makes_none(tmp_path, shards):
    files = begun(tmp_path / "a", shards)
    assert sum(write(files, process, 3) for process in range(3)) == COUNT
    assert_complete(files)
    assert write(files) == 0, "with another number of processes"
    if shards == 1:
        with tarfile.open(files.shard_file(0)) as tar:
            assert tar.getnames()[:3] == ["000000.png", "000000.txt", "000000.json"]


@pytest.mark.parametrize("name", ["000007.txt", "000007.png", "000007.json"])
def test_a_sample_whose_files_are_not_all_there_is_made_again(tmp_path, monkeypatch, name):
    files, replace = begun(tmp_path), os.replace

    def killed(source, target):
        if target.name == name:
            raise SystemExit(9)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("os.replace", killed)
        write(files)
    assert write(files) == COUNT - 7
    assert_complete(files)


def test_a_shard_goes_on_behind_its_last_whole_sample_wherever_it_was_cut(tmp_path):
    files = begun(tmp_path, 1)
    write(files)
    whole = files.shard_file(0).read_bytes()
    with tarfile.open(files.shard_file(0)) as tar:
        starts = [entry.offset for entry in tar if entry.name.endswith(".png")]
    generator = random.Random(0)
    for cut in [0, 1, 511, 512, 513, *starts, *(s - 1 for s in starts[1:]), *generator.sample(range(len(whole)), 40)]:
        files.shard_file(0).unlink(missing_ok=True)
        (tmp_path / ".00000.tar.unfinished").write_bytes(whole[:cut])
        made = write(files)
        assert files.shard_file(0).read_bytes() == whole, cut
        assert made == COUNT - sum(cut >= start for start in [*starts[1:], starts[-1] + 512 * 28]), cut


def test_an_unfinished_shard_of_something_else_is_begun_again(tmp_path):
    files = begun(tmp_path, 2)
    other = SampleFiles(tmp_path / "other", COUNT, 2)
    other.begin({})
    write(other)
    for content in (b"not a tar file" * 100, other.shard_file(1).read_bytes()):
        (tmp_path / ".00000.tar.unfinished").write_bytes(content)
        files.shard_file(0).unlink(missing_ok=True)
        write(files)
        assert files.shard_file(0).read_bytes() == other.shard_file(0).read_bytes()


@pytest.mark.parametrize("shards", [0, 2])
def test_a_part_is_written_by_one_process_at_a_time(tmp_path, shards):
    files = begun(tmp_path, shards)
    one, other = (files.shard_writer(0), files.shard_writer(0)) if shards else (files.writer(0), files.writer(0))
    with one, pytest.raises(InputError, match="^out: .* another process"), other:
        pass


@pytest.mark.parametrize(
    "shards, name", [(0, ".writing-0"), (0, "000003.png"), (1, "00000.tar"), (1, ".00000.tar.unfinished")]
)
def test_what_is_in_the_way_of_a_file_is_named_and_nothing_is_taken_for_finished(tmp_path, shards, name):
    files = begun(tmp_path, shards)
    (tmp_path / name).write_text("") if name == ".writing-0" else (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"^out: {tmp_path} cannot be written .*{name}"):
        write(files)
    (tmp_path / name).unlink() if name == ".writing-0" else (tmp_path / name).rmdir()
    write(files)
    assert_complete(files)


def test_a_folder_of_a_run_with_other_settings_is_refused(tmp_path):
    begun(tmp_path)
    with pytest.raises(InputError, match="^out: .* holds a run with steps 5, this one has 6; give another folder"):
        SampleFiles(tmp_path, COUNT).begin({"steps": 6})
    with pytest.raises(InputError, match="shards 0, this one has 2"):
        begun(tmp_path, 2)


def test_nothing_of_a_tar_file_leaves_its_folder(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("../../000000.txt", "/etc/000001.txt"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("000002.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert list(read_samples(tmp_path)) == [("000000", {"txt": b""}), ("000001", {"txt": b""})]
    (tmp_path / "0.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match=r"^samples: .*0.tar is not a whole tar file"):
        list(read_samples(tmp_path))


WRITING = """
import sys, time
sys.path.insert(0, "tests")
from pathlib import Path
from test_sample_files import SampleFiles, begun, sample, write
import test_sample_files
plain = sample
def slow(i):
    time.sleep(0.002)
    return plain(i)
test_sample_files.sample = slow
write(begun(Path(sys.argv[1]), int(sys.argv[2])), int(sys.argv[3]), 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shards", [0, 4])
def test_processes_that_are_killed_and_started_again_leave_every_sample_once(tmp_path, shards):
    generator = random.Random(shards)

    def start(process: int) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", WRITING, tmp_path / "out", str(shards), str(process)], cwd=ROOT)

    running = {process: start(process) for process in range(2)}
    for process in (1, 0, 1):
        time.sleep(generator.uniform(0.2, 0.8))
        running[process].send_signal(signal.SIGKILL)
        running[process].wait()
        running[process] = start(process)
    assert [running[process].wait() for process in range(2)] == [0, 0]
    assert_complete(SampleFiles(tmp_path / "out", COUNT, shards))


def test_prompts_are_the_lines_of_a_file_with_blank_ones_left_out(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfred heart\r\n\r\n \t\r\nblue _\nblack cat")
    prompts = read_prompts(file)
    assert [(p.text, p.line) for p in prompts.items] == [("red heart", 1), ("blue _", 4), ("black cat", 5)]
    assert [p.text for p in prompts.of_run(4, 7)] == ["red heart", "blue _", "black cat", "red heart"]


def test_captions_are_drawn_at_random_each_once_before_any_twice(tmp_path):
    file = tmp_path / "captions.json"
    captions = [f'{{"image_id": {i}, "caption": "cat\\n {i}"}}' for i in range(9)]
    bad = ['{"image_id": 1, "caption": "!?"}', '{"image_id": 1}', "3", '{"image_id": 1, "caption": " _ "}']
    file.write_text('{"annotations": [' + ", ".join(captions + bad) + "]}")
    prompts = read_prompts(file)
    assert (len(prompts.items), prompts.skipped) == (9, 4)
    first, again, other = prompts.of_run(18, 0), prompts.of_run(12, 0), prompts.of_run(9, 1)
    assert {p.text for p in first[:9]} == {p.text for p in first[9:]} == {f"cat {i}" for i in range(9)}
    assert first[:12] == again and first[:9] != other and first[0].image_id == first[0].text[4:]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no prompt"),
        (b"\r\n \n", "holds no prompt"),
        (b"red\n...\n", "'...' .line 2. has no word"),
        (b"\xff\xfered", "is not text in UTF-8"),
        (b"{", "is not readable JSON"),
        (b"[]", 'it has no list "annotations"'),
        (b'{"annotations": [{}]}', "holds no caption with a word"),
        (None, "does not exist"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "prompts").write_bytes(content)
    with pytest.raises(InputError, match=f"^prompts: .*{problem}"):
        read_prompts(tmp_path / "prompts")
