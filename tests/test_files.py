"""Files that are written whole or not at all, in the umask's mode, and errors that tell what cannot be read."""

import os
import stat

import pytest
import torch
from safetensors import SafetensorError

from engine import checkpoint
from engine.codecs.autoencoder import SavedAutoencoder
from engine.data.emoji import read_emoji
from engine.data.sources import open_captioned
from engine.errors import InputError
from engine.files import all_finite, is_file, is_folder, load_tensors, save_tensors, unreadable, write_atomically
from engine.images import open_image
from engine.model.convert import load_uvit
from engine.training.options import TrainOptions


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def dying(temporary):
        temporary.write_text("ne")
        raise error

    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        write_atomically(path, dying)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    left = tmp_path / ".file.writing"
    left.mkdir()
    (left / ".tmpX2b").write_text("of safetensors")
    (left / "file").write_text("half")
    (left / "file").chmod(0o400)
    write_atomically(tmp_path / "file", lambda temporary: temporary.write_text("new"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and mode(tmp_path / "file") != 0o400


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_their_mode_from_the_umask(tmp_path, tiny_checkpoint, umask):
    loaded, before = checkpoint.load(tiny_checkpoint), os.umask(umask)
    try:
        save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)})
        checkpoint.save(tmp_path / "new", loaded.config, loaded.network.state_dict(), torch.float32)
        for name in ("text", "image"):
            loaded.codec(name).save(tmp_path / "new" / name, torch.float32)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 7 and {mode(path) for path in files} == {0o666 & ~umask}


def test_tensors_come_back_with_their_metadata(tmp_path):
    x = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    save_tensors(tmp_path / "x", {"x": x}, {"step": "3"})
    tensors, metadata = load_tensors(tmp_path / "x")
    assert torch.equal(tensors["x"], x) and metadata == {"step": "3"}
    save_tensors(tmp_path / "x", {"x": x})
    assert load_tensors(tmp_path / "x")[1] == {}
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(SafetensorError):
        load_tensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FileNotFoundError(2, "No such file or directory"), "a does not exist; give one"),
        (NotADirectoryError(20, "Not a directory"), "a does not exist; give one"),
        (PermissionError(13, "Permission denied"), "a cannot be read (Permission denied); make it readable"),
        (IsADirectoryError(21, "Is a directory"), "a cannot be read (Is a directory); give one"),
        (OSError("odd"), "a cannot be read (odd); give one"),
    ],
)
def test_why_a_file_cannot_be_opened_is_told_apart(error, says, tmp_path):
    assert str(unreadable("data", tmp_path / "a", error, "give one")) == f"data: {tmp_path}/{says}"


@pytest.mark.parametrize("name", ["missing", "x" * 5000, "a\0b", "file/below"], ids=lambda name: name[:10])
def test_what_is_not_there_is_neither_file_nor_folder(tmp_path, name):
    (tmp_path / "file").touch()
    assert is_file(tmp_path / "file", "data") and is_folder(tmp_path, "data")
    assert not is_file(tmp_path, "data") and not is_folder(tmp_path / "file", "data")
    assert not is_file(tmp_path / name, "data") and not is_folder(tmp_path / name, "data")


PARTS = ["config.json", "model.safetensors", "text/vocabulary.json", "text/vectors.safetensors", "image/config.json"]


@pytest.mark.parametrize("part", [*PARTS, "image/diffusion_pytorch_model.safetensors", "text", "image", ".", ".."])
def test_parts_of_a_checkpoint_that_may_not_be_read_are_not_missing(tmp_path, tiny_checkpoint, forbid, part):
    def load():
        checkpoint.load(folder).codec("image").build()

    folder = tmp_path / "above" / "checkpoint"
    loaded = checkpoint.load(tiny_checkpoint)
    checkpoint.save(folder, loaded.config, loaded.network.state_dict(), torch.float32)
    for name in ("text", "image"):
        loaded.codec(name).save(folder / name, torch.float32)
    load()
    forbid(folder / part if part != ".." else folder.parent)
    with pytest.raises(InputError, match=r"^checkpoint: .* cannot be read \(Permission denied\); make it readable$"):
        load()


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: load_uvit(folder / "nnet.pth"),
        lambda folder: load_uvit(folder / "nnet.safetensors"),
        lambda folder: TrainOptions(folder, folder, "tiny", init=folder / "nnet.pth"),
        lambda folder: SavedAutoencoder.open(folder / "image"),
        lambda folder: open_image(folder / "image.png"),
        open_captioned,
        read_emoji,
    ],
)
def test_other_files_that_may_not_be_read_are_not_missing(tmp_path, forbid, read):
    folder = tmp_path / "folder"
    folder.mkdir()
    forbid(folder)
    with pytest.raises(InputError, match=r" cannot be read \(Permission denied\); make it readable$"):
        read(folder)


def test_only_finite_floats_are_weights_to_compute_with():
    assert all_finite({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.bfloat16)}) and all_finite({})
    for bad in (
        torch.tensor([1.0, torch.nan]),
        torch.tensor([torch.inf]),
        torch.ones(2, dtype=torch.int32),
        torch.ones(2).to(torch.float8_e4m3fn),
    ):
        assert not all_finite({"a": torch.ones(2), "b": bad})
