"""Reading data sets in tar files that are damaged, odd or hostile."""

import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.data.latents import cache_latents
from engine.data.record import differences, record_of
from engine.data.sample_files import SampleFiles
from engine.data.sources import open_captioned
from engine.errors import InputError


def image_bytes(grey: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), grey).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes | tarfile.TarInfo]) -> Path:
    """A tar file with these members; a TarInfo is added without content, under its key if it has no name."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
            else:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def special(kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    entry = tarfile.TarInfo()
    entry.type, entry.linkname = kind, target
    return entry


def read(data) -> list[tuple[str, tuple[str, ...], int]]:
    return [(item.image_id, item.captions, int(image[0, 0, 0])) for item, image in data.read(8)]


@pytest.fixture
def folder(tmp_path):
    """Two tar files of three samples."""
    for shard in range(2):
        files = {}
        for i in range(3):
            grey = 10 * (3 * shard + i)
            files |= {f"{i:04d}.png": image_bytes(grey), f"{i:04d}.txt": f"grey {grey}\n\n a second\n".encode()}
        write_tar(tmp_path / f"{shard:03d}.tar", files)
    return tmp_path


EXPECTED = [(f"{s:03d}/{i:04d}", (f"grey {30 * s + 10 * i}", "a second"), 30 * s + 10 * i)
            for s in range(2) for i in range(3)]  # fmt: skip


def test_samples_of_tar_files_are_read_where_they_are(folder):
    data = open_captioned(folder)
    assert read(data) == EXPECTED and data.summary() == "6 usable images"
    assert data.items[4].path == folder / "001.tar" / "0001.png"


@pytest.mark.parametrize("files", [
    {"a.JPG": b"", "a.json": b'{"caption": " one "}'},
    {"a.webp": b"", "a.json": b'{"captions": ["one", 5, ""], "caption": "not this"}'},
    {"a.txt": "\ufeffone".encode(), "a.json": b'{"caption": "not this"}', "a.png": b"", "a.cls": b"5"},
    {"./a.jpeg": b"", "./a.txt": b"one", "__key__.pickle": b"cos\nsystem\n(S'false'\ntR."},
    {"x/a.txt": b"one", "y/a.txt": b"other", "x/a.jpg": b""},
], ids=lambda files: " ".join(files))  # fmt: skip
def test_captions_and_images_have_several_forms(tmp_path, files):
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}
    files = {n: c or image_bytes(100, kinds[n.rsplit(".")[-1].lower()]) for n, c in files.items()}
    write_tar(tmp_path / "0.tar", files)
    (item,) = read(open_captioned(tmp_path / "0.tar"))
    assert item[1] == ("one",) and abs(item[2] - 100) < 3


PNG = image_bytes(1)


@pytest.mark.parametrize(("files", "reason"), [
    ({"/tmp/x.png": b""}, "outside of the folder"),
    ({"a/../../x.png": b""}, "outside of the folder"),
    ({"..\\x.png": b""}, "outside of the folder"),
    ({"x.png": special(tarfile.SYMTYPE)}, "links"),
    ({"x.png": special(tarfile.LNKTYPE, "good.png")}, "links"),
    ({"x.png": special(tarfile.FIFOTYPE)}, "not a file"),
    ({"x.png": special(tarfile.CHRTYPE)}, "not a file"),
    ({"x.png": PNG}, "no captions"),
    ({"x.png": PNG, "x.json": b"[1]"}, "no captions"),
    ({"x.txt": b"without an image"}, "no image"),
    ({"./good.png": image_bytes(8)}, "name that several files have"),
    ({"x.png": b"<html>404</html>", "x.txt": b"text"}, "damaged"),
    ({"x.png": PNG, "x.txt": b"x" * ((1 << 20) + 1)}, "captions that cannot be read"),
    ({"x.png": PNG, "x.txt": "é".encode("latin-1")}, "captions that cannot be read"),
    ({"x.png": PNG, "x.json": b"[" * 100_000}, "captions that cannot be read"),
], ids=lambda part: " ".join(part) if isinstance(part, dict) else part)  # fmt: skip
def test_members_that_cannot_be_used_are_counted_and_named(tmp_path, files, reason):
    write_tar(tmp_path / "0.tar", {"good.png": image_bytes(7), "good.txt": b"seven"} | files)
    data = open_captioned(tmp_path)
    assert read(data) == [("0/good", ("seven",), 7)]
    assert [r.split(":")[0] for r in data.skipped.values()] == [reason]
    assert f"1 usable images; skipped 1 {reason} (" in data.summary()


@pytest.mark.parametrize("cut", [0, 100, 511, 512, 600, 1024, 1540, 2048, 3000, 5640, 6144])
def test_samples_before_the_damage_of_a_tar_file_are_used(folder, cut):
    file = folder / "001.tar"
    file.write_bytes(file.read_bytes()[:cut])  # a sample takes four blocks
    data = open_captioned(folder)
    assert read(data) == EXPECTED[: 3 + cut // 2048]
    assert (
        data.skipped[file].startswith("damaged tar files: ") and "damaged tar files (001.tar first)" in data.summary()
    )


def test_any_damage_of_a_tar_file_is_survived(folder):
    """Bytes of headers changed at random: what is read is usable or counted."""
    file, generator = folder / "001.tar", random.Random(0)
    whole = file.read_bytes()
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 8)):
            header = 512 * generator.randrange(len(whole) // 512)
            content[header + generator.choice([0, 124, 135, 148, 156, 257, generator.randrange(512)])] = (
                generator.randrange(256)
            )
        file.write_bytes(content)
        data = open_captioned(folder)
        assert [item for item in read(data) if item[0].startswith("000/")] == EXPECTED[:3]


def test_a_tar_file_that_is_none_is_named(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"\x1f\x8b" + b"gzip" * 1000)
    with pytest.raises(InputError, match=r"^folder: .*0 usable images; skipped 1 damaged tar files \(0.tar first\)"):
        open_captioned(tmp_path)


def test_images_of_a_tar_file_that_has_gone_are_damaged(folder):
    data = open_captioned(folder)
    (folder / "001.tar").unlink()
    assert read(data) == EXPECTED[:3] and "skipped 3 damaged (0000.png first)" in data.summary()


def test_patterns_and_splits_choose_tar_files(folder):
    assert read(open_captioned(folder / "*1.tar")) == [("001" + i[3:], *r) for i, *r in EXPECTED[3:]]
    assert read(open_captioned(f"{folder}/{{000..001}}.tar")) == EXPECTED
    (folder / "val").mkdir()
    (folder / "001.tar").rename(folder / "val" / "001.tar")
    assert read(open_captioned(folder)) == EXPECTED[:3] and read(open_captioned(folder, "val")) == EXPECTED[3:]
    with pytest.raises(InputError, match="matches no tar file; give a folder of tar files, or a pattern"):
        open_captioned(folder / "*2.tar")
    with pytest.raises(InputError, match=r"has no captions_test.json, nor .* or tar files"):
        open_captioned(folder, "test")


def test_what_bulk_sampling_writes_is_a_data_set(tmp_path):
    files = SampleFiles(tmp_path / "out", count=5, shards=2)
    files.begin({})
    for shard in range(2):
        with files.shard_writer(shard) as writer:
            for i in files.shard_range(shard):
                sample = {"json": json.dumps({"index": i}).encode(), "txt": b"red", "png": image_bytes(i)}
                writer.write(i, sample if i else {"json": b'{"error": "not finite"}'})
    data = open_captioned(files.folder)
    assert [(captions, grey) for _, captions, grey in read(data)] == [(("red",), i) for i in range(1, 5)]
    assert data.summary() == "4 usable images; skipped 1 no image (000000 first)"


def test_changes_within_tar_files_are_noticed_and_latents_belong_to_their_captions(folder):
    before = record_of(open_captioned(folder))
    cache = cache_latents(
        open_captioned(folder), lambda pixels: pixels.mean(1), folder / "cache", "a", 8, record=before
    )
    assert cache.captions == [list(captions) for _, captions, _ in EXPECTED]
    levels = (cache.latents(list(range(6)), [0] * 6).mean((1, 2)) + 1) * 127.5
    assert torch.allclose(levels, torch.tensor([grey for *_, grey in EXPECTED]).float(), atol=0.2)
    files = {"0000.png": image_bytes(30), "0000.txt": b"grey 30\na second"}
    files |= {"0001.png": image_bytes(41), "0001.txt": b"grey 40\na second", "0002.png": image_bytes(50)}
    write_tar(folder / "001.tar", files | {"0002.txt": b"other"})
    changes = "changed images: 1 (id 001/0001 first), images with other captions: 1 (id 001/0002 first)"
    assert differences(before, record_of(open_captioned(folder), before)) == changes
