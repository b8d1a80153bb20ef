"""Checkpoint folders: what is saved comes back, and whatever is missing or damaged is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import checkpoint
from engine.checkpoint import CheckpointError
from engine.codecs.text import TextCodec
from engine.config import PRESETS, ConfigError
from engine.model import PSUNet

CONFIG = PRESETS["tiny"]
WORDS = ("</s>", "red", "blue", "car")


def random_weights():
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(w.shape, generator=generator) for k, w in PSUNet(CONFIG.model).state_dict().items()}


def save_to(folder, weights, dtype=torch.float32):
    """A whole checkpoint but for what is in `image/`, which `load` leaves to the image codec."""
    checkpoint.save(folder, CONFIG, weights, dtype)
    TextCodec(WORDS, torch.randn(4, 8, generator=torch.Generator().manual_seed(1))).save(folder / "text")
    (folder / "image").mkdir()


@pytest.fixture
def folder(tmp_path):
    save_to(tmp_path, random_weights())
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_saved_comes_back_in_its_dtype(tmp_path, dtype):
    weights = random_weights()
    save_to(tmp_path, weights, dtype)
    loaded = checkpoint.load(tmp_path)
    assert loaded.config == CONFIG and loaded.text.vocabulary == WORDS and loaded.image_folder == tmp_path / "image"
    state = loaded.model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name].to(dtype)) for name in weights)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0), (torch.float16, 2e-3)], ids=str)
def test_a_loaded_model_predicts_what_the_saved_one_did(tmp_path, dtype, tolerance):
    model = PSUNet(CONFIG.model).eval()
    weights = {name: 0.1 * w for name, w in random_weights().items()}
    model.load_state_dict(weights)
    save_to(tmp_path, weights, dtype)
    loaded = checkpoint.load(str(tmp_path)).model.float()
    inputs = torch.randn(2, CONFIG.model.size, generator=torch.Generator().manual_seed(2))
    index = torch.arange(CONFIG.model.tokens).remainder(3).repeat(2, 1).int()

    def predict(m):
        with torch.inference_mode():
            return m(inputs, m.time_table(torch.tensor([0, 400, 1000])), index)

    expected = predict(model)
    assert (predict(loaded) - expected).norm() <= tolerance * expected.norm()


def test_saving_over_a_checkpoint_replaces_it_and_leaves_nothing_else(folder):
    weights = {name: w + 1 for name, w in random_weights().items()}
    checkpoint.save(folder, CONFIG, weights, torch.float32)
    assert torch.equal(checkpoint.load(folder).model.time.embed.bias, weights["time.embed.bias"])
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "text", "image"}


def test_a_kill_while_saving_leaves_the_old_checkpoint(folder, monkeypatch):
    before = checkpoint.load(folder).model.state_dict()

    def half(tensors, path):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, CONFIG, {}, torch.float32)
    torch.testing.assert_close(checkpoint.load(folder).model.state_dict(), before, rtol=0, atol=0)


def assert_names(error, *parts):
    message = str(error.value)
    assert all(str(part) in message for part in parts), message
    assert "\n" not in message


def test_what_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file", "x" * 5000):
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(path)
        assert_names(error, path, "engine.train")


def test_an_empty_name_is_not_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match="^checkpoint: '' is no folder"):
        checkpoint.load("")


FILES = ["config.json", "model.safetensors", "text/vocabulary.json", "text/vectors.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("keep", [None, 0, 0.4, 0.99], ids=lambda keep: "missing" if keep is None else f"{keep:.0%}")
def test_a_missing_or_truncated_file_is_named(folder, file, keep):
    path = folder / file
    data = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(data[: int(keep * len(data)) - 1 if keep else 0])
    with pytest.raises(ValueError) as error:
        checkpoint.load(folder)
    assert_names(error, path)


def test_a_missing_autoencoder_is_named_before_any_sampling(folder):
    (folder / "image").rmdir()
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    assert_names(error, folder / "image")


@pytest.mark.parametrize("file", FILES)
def test_random_bytes_are_named(folder, file):
    (folder / file).write_bytes(bytes(range(255, -1, -1)) * 9)
    with pytest.raises(ValueError) as error:
        checkpoint.load(folder)
    assert_names(error, folder / file)


@pytest.mark.parametrize("file", ["config.json", "text/vocabulary.json"])
def test_json_nested_deeper_than_python_reads_is_named(folder, file):
    (folder / file).write_text("[" * 100_000)
    with pytest.raises(ValueError) as error:
        checkpoint.load(folder)
    assert_names(error, folder / file)


def test_weights_of_eight_bits_are_named(folder):
    path = folder / "model.safetensors"
    save_file({name: w.to(torch.float8_e4m3fn) for name, w in load_file(path).items()}, path)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    assert_names(error, path, "16 bits")


def test_a_pickle_of_more_than_weights_is_refused_without_advice_to_run_it(tmp_path):
    torch.save({"weights": torch.nn.Linear(1, 1)}, tmp_path / "more.pth")
    (tmp_path / "a.png").write_bytes(bytes(range(255)))
    for name in ("more.pth", "a.png"):
        with pytest.raises(CheckpointError) as error:
            checkpoint.load_uvit(tmp_path / name)
        assert_names(error, tmp_path / name, "; give ")
        assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("damage", ["other shape", "left out", "added"])
def test_weights_of_another_model_are_named(folder, damage):
    path = folder / "model.safetensors"
    weights = load_file(path)
    if damage == "other shape":
        name, weights["shared_in.0.fc1.bias"] = "shared_in.0.fc1.bias", torch.zeros(3)
    elif damage == "left out":
        name = "branches.text.head.weight"
        del weights[name]
    else:
        name, weights["extra"] = "extra", torch.zeros(1)
    save_file(weights, path)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    assert_names(error, path, name, "config.json")


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"model": {"dim": 64}}, ["modalities"]),
        ({"size": 3}, ["size", "unknown"]),
        ([], ["config"]),
        ({"model": CONFIG.to_dict()["model"] | {"dim": 63}}, ["dim", "63"]),
    ],
)
def test_a_config_that_is_none_is_named(folder, values, parts):
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as error:
        checkpoint.load(folder)
    assert_names(error, folder / "config.json", *parts)


def test_word_vectors_of_another_size_are_named(folder):
    TextCodec(WORDS, torch.zeros(4, 9)).save(folder / "text")
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    assert_names(error, folder / "text", 9, 8)


@pytest.mark.parametrize("lack", ["text", "image settings"])
def test_a_model_that_is_not_of_pictures_and_texts_is_refused(folder, lack):
    values = CONFIG.to_dict()
    if lack == "text":
        values["model"]["modalities"] = values["model"]["modalities"][:1]
    else:
        values["image"] = None
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    assert_names(error, folder / "config.json", lack)
