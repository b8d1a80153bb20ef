"""Checkpoint folders: what is saved comes back, and whatever is missing or damaged is named."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import checkpoint
from engine.codecs.codec import CODECS, Decoded, Given, codec_class
from engine.codecs.image import ImageCodec
from engine.codecs.text import TextCodec
from engine.config import CodecConfig, Modality, SamplingConfig
from engine.errors import InputError
from engine.model.denoiser import Denoiser, build
from engine.presets import PRESETS

CONFIG = PRESETS["tiny"]
WORDS = ("</s>", "red", "blue", "car")
AUTOENCODER = {"_class_name": "AutoencoderDC", "latent_channels": 4, "encoder_block_out_channels": [8, 8, 8, 16]}


def random_weights(config=CONFIG):
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(w.shape, generator=generator) for k, w in build(config.model).state_dict().items()}


def save_to(folder, weights, dtype=torch.float32, config=CONFIG):
    """A whole checkpoint but for the autoencoder's weights, which `load` leaves to the image codec."""
    checkpoint.save(folder, config, weights, dtype)
    TextCodec(WORDS, torch.randn(4, 8, generator=torch.Generator().manual_seed(1))).save(folder / "text")
    (folder / "image").mkdir()
    (folder / "image" / "config.json").write_text(json.dumps(AUTOENCODER))


@pytest.fixture
def folder(tmp_path):
    save_to(tmp_path, random_weights())
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_saved_comes_back_in_its_dtype(tmp_path, dtype):
    weights = random_weights()
    save_to(tmp_path, weights, dtype)
    loaded = checkpoint.load(tmp_path)
    assert (loaded.config, loaded.folder) == (CONFIG, tmp_path)
    state = loaded.network.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name].to(dtype)) for name in weights)
    assert not loaded.network.training and not any(p.requires_grad for p in loaded.network.parameters())


def test_large_matrices_are_stored_with_8_bits_and_come_back_as_float16(tmp_path):
    weights = random_weights()
    weights["shared_in.0.fc1.weight"][3] = 0
    weights["shared_in.0.fc1.weight"][4] *= 1e-3  # a row is as exact as its own largest weight allows
    save_to(tmp_path, weights, torch.int8)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["shared_in.0.fc1.weight"].dtype == torch.int8 and stored["time.embed.bias"].dtype == torch.float16
    state = checkpoint.load(tmp_path).network.state_dict()
    assert state.keys() == weights.keys() and {w.dtype for w in state.values()} == {torch.float16}
    for name, weight in weights.items():
        half_a_step = weight.abs().amax(-1, keepdim=True) / 254 if f"{name}.scale" in stored else 0
        assert ((state[name].float() - weight).abs() <= half_a_step + weight.abs() * 2**-10 + 2**-24).all(), name
    assert (tmp_path / "model.safetensors").stat().st_size < 0.3 * sum(4 * w.numel() for w in weights.values())


NAME, BIAS = "shared_in.0.fc1.weight", "time.embed.bias"


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored.pop(NAME),
        lambda stored: stored.pop(f"{NAME}.scale"),
        lambda stored: stored.update({f"{NAME}.scale": torch.ones(3)}),
        lambda stored: stored.update({f"{NAME}.scale": torch.ones(256, dtype=torch.complex64)}),
        lambda stored: stored[f"{NAME}.scale"].fill_(torch.nan),
        lambda stored: stored.update({BIAS: torch.ones(64).char(), f"{BIAS}.scale": torch.ones(())}),
    ],
    ids=["no matrix", "no scale", "shape", "complex", "nan", "vector"],
)
def test_damaged_matrices_of_8_bits_are_named(tmp_path, damage):
    save_to(tmp_path, random_weights(), torch.int8)
    stored = load_file(tmp_path / "model.safetensors")
    damage(stored)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        checkpoint.load(tmp_path)
    assert_names(error, tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0), (torch.float16, 2e-3), (torch.int8, 2e-2)], ids=str)
def test_a_loaded_network_predicts_what_the_saved_one_did(tmp_path, dtype, tolerance):
    network = build(CONFIG.model).eval()
    weights = {name: 0.1 * w for name, w in random_weights().items()}
    network.load_state_dict(weights)
    save_to(tmp_path, weights, dtype)
    loaded = checkpoint.load(str(tmp_path)).network.float()
    inputs = torch.randn(2, CONFIG.model.size, generator=torch.Generator().manual_seed(2))
    times = torch.tensor([0, 400, 1000])[torch.arange(CONFIG.model.tokens).remainder(3)].repeat(2, 1).int()

    def predict(network):
        with torch.inference_mode():
            return Denoiser(network, 1000)(inputs, times)

    expected = predict(network)
    assert (predict(loaded) - expected).norm() <= tolerance * expected.norm()


def test_saving_over_a_checkpoint_replaces_it_and_leaves_nothing_else(folder):
    weights = {name: w + 1 for name, w in random_weights().items()}
    checkpoint.save(folder, CONFIG, weights, torch.float32)
    assert torch.equal(checkpoint.load(folder).network.time.embed.bias, weights["time.embed.bias"])
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "text", "image"}


def test_a_kill_while_saving_leaves_the_old_checkpoint(folder, monkeypatch):
    before = checkpoint.load(folder).network.state_dict()

    def half(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, CONFIG, {}, torch.float32)
    torch.testing.assert_close(checkpoint.load(folder).network.state_dict(), before, rtol=0, atol=0)


def assert_names(error, *parts):
    message = str(error.value)
    assert error.value.argument == "checkpoint"
    assert all(str(part) in message for part in parts), message
    assert "\n" not in message


def test_what_is_not_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file", "x" * 5000):
        with pytest.raises(InputError) as error:
            checkpoint.load(path)
        assert_names(error, str(path)[:40], "engine.train")


def test_an_empty_name_is_not_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match="^checkpoint: '' is not a folder"):
        checkpoint.load("")


FILES = ["config.json", "model.safetensors", "text/vocabulary.json", "text/vectors.safetensors", "image/config.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("keep", [None, 0, 0.4, 0.99], ids=lambda keep: "missing" if keep is None else f"{keep:.0%}")
def test_a_missing_or_truncated_file_is_named(folder, file, keep):
    path = folder / file
    data = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(data[: int(keep * len(data)) - 1 if keep else 0])
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    assert_names(error, path)


def test_a_missing_autoencoder_is_named_before_any_sampling(folder):
    shutil.rmtree(folder / "image")
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    assert_names(error, folder / "image")


@pytest.mark.parametrize("file", FILES)
def test_random_bytes_are_named(folder, file):
    (folder / file).write_bytes(bytes(range(255, -1, -1)) * 9)
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    assert_names(error, folder / file)


@pytest.mark.parametrize("file", ["config.json", "text/vocabulary.json", "image/config.json"])
def test_json_nested_deeper_than_python_reads_is_named(folder, file):
    (folder / file).write_text("[" * 100_000)
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    assert_names(error, folder / file)


def test_weights_of_eight_bits_are_named(folder):
    path = folder / "model.safetensors"
    save_file({name: w.to(torch.float8_e4m3fn) for name, w in load_file(path).items()}, path)
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    assert_names(error, path, "16 bits")


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
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    assert_names(error, path, name, "config.json")


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"model": {"dim": 64}}, ["modalities"]),
        ({"size": 3}, ["size", "not a known setting"]),
        ([], ["config"]),
        ({"model": CONFIG.to_dict()["model"] | {"dim": 63}}, ["dim", "63"]),
    ],
)
def test_a_config_that_cannot_be_used_is_named(folder, values, parts):
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    assert_names(error, folder / "config.json", *parts)


def test_word_vectors_of_another_size_are_named(folder):
    TextCodec(WORDS, torch.zeros(4, 9)).save(folder / "text")
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    assert_names(error, folder / "text", 9, 8)


def write_config(folder, change):
    """Applies a change to config.json's dict."""
    values = CONFIG.to_dict()
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda values: values.pop("codecs"), ["names no codecs"]),
        (lambda values: values["codecs"].pop("text"), ["codecs", "'text'"]),
        (lambda values: values["codecs"]["text"].update(kind="music"), ["kind", "'music'", "use one of image, text"]),
        (lambda values: values["codecs"]["text"].update(size=3), ["codecs.text", "'size'", "leave it out"]),
        (lambda values: values["codecs"]["image"].update(size=7), ["codecs.image.size", "7", "from 8"]),
        (lambda values: values["codecs"]["image"].update(size=36), ["codecs.image.size", "36", "multiple of 8"]),
        (lambda values: values["codecs"]["image"].update(size=64), ["64 tokens of 4", "takes 16 of 4"]),
        (lambda values: values["codecs"]["image"].update(folder="absent"), ["absent is not a folder"]),
    ],
    ids=["none", "one left out", "unknown", "text setting", "size", "multiple", "tokens", "folder"],
)
def test_codecs_that_cannot_be_used_are_named(folder, change, parts):
    write_config(folder, change)
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    assert_names(error, folder, *parts)


def test_a_checkpoint_of_version_0_1_loads(folder):
    values = CONFIG.to_dict()
    values["model"]["time"] = values["model"].pop("time_conditioning")
    values["diffusion"]["times"] = values["diffusion"].pop("time_sampling")
    del values["codecs"], values["sampling"]
    (folder / "config.json").write_text(json.dumps(values | {"image": {"size": 32, "patch": 1}}))
    assert checkpoint.load(folder).config == CONFIG


def test_the_built_in_checkpoint_loads_and_its_codecs_build():
    loaded = checkpoint.load(checkpoint.BUILT_IN)
    assert loaded.config == PRESETS["emoji"]
    image, text = loaded.codec("image"), loaded.codec("text")
    assert isinstance(image, ImageCodec) and isinstance(text, TextCodec)
    for name, codec, channels in (("image", image, 64), ("text", text, 32)):
        codec.build()
        assert (codec.tokens, codec.channels) == (16, channels), name
    assert torch.equal(loaded.network.branches["text"].values, text.vectors.half().float())


def test_the_model_with_sketches_has_the_codecs_of_the_other_one():
    loaded, other = checkpoint.load("emoji-sketch"), checkpoint.load("emoji")
    preset = PRESETS["emoji-sketch"]
    sketch = loaded.config.codecs["sketch"]
    assert sketch.settings["scale"] < 1  # measured
    assert replace(loaded.config, codecs={**loaded.config.codecs, "sketch": preset.codecs["sketch"]}) == preset
    for part in ("image", "text"):
        assert (loaded.folder / part).resolve() == (other.folder / part).resolve()
    files = {path.resolve() for folder in (loaded.folder, other.folder) for path in folder.glob("**/*")}
    assert sum(path.stat().st_size for path in files if path.is_file()) < 25 * 2**20


def test_codecs_are_those_that_were_saved(folder):
    loaded = checkpoint.load(folder)
    text = loaded.codec("text")
    assert text.vocabulary == WORDS and (text.tokens, text.channels) == (6, 8)
    image = loaded.codec("image", "meta")
    assert (image.size, image.patch, image.tokens, image.channels, image.device) == (32, 1, 16, 4, "meta")
    assert loaded.codec("image") is loaded.codec("image") is not image


def test_modalities_may_share_the_files_of_a_codec(three_modality_checkpoint):
    loaded = checkpoint.load(three_modality_checkpoint)
    names = [m.name for m in loaded.config.model.modalities]
    assert names == ["image", "text", "sketch"] and not (three_modality_checkpoint / "sketch").exists()
    assert loaded.codec("sketch") is loaded.codec("image")  # one autoencoder in memory
    for name in names:
        codec, modality = loaded.codec(name), loaded.config.model.modality(name)
        tokens = codec.encode([codec.null(), codec.read(None, name)])
        assert tokens.shape == (2, modality.tokens, modality.channels)
        assert len(codec.decode(tokens, [codec.null(), codec.read(None, name)])) == 2


def test_codecs_of_the_same_files_with_other_settings_are_kept_apart(tmp_path):
    small = CodecConfig("image", folder="image", settings={"size": 16, "patch": 1})
    modalities = (*CONFIG.model.modalities, Modality("icon", 4, 4, depth=0))
    config = replace(
        CONFIG, model=replace(CONFIG.model, modalities=modalities), codecs={**CONFIG.codecs, "icon": small}
    )
    save_to(tmp_path, random_weights(config), config=config)
    loaded = checkpoint.load(tmp_path)
    assert (loaded.codec("icon").size, loaded.codec("image").size) == (16, 32)


class LevelCodec:
    """A codec of another kind: a number from 0 to 1, times a scale, as one token of one channel."""

    tokens = channels = 1

    def __init__(self, zero, scale=1):
        self.zero, self.scale = zero, scale

    @classmethod
    def load(cls, folder, settings, modality, device):
        return cls(float((folder / "zero.txt").read_text()), **settings)

    def save(self, folder, dtype=torch.float32):
        folder.mkdir()
        (folder / "zero.txt").write_text(str(self.zero))

    def build(self):
        pass

    def read(self, value, argument, mask=None, unknown_words="error", feather=0, mask_argument="mask"):
        if value is not None and not 0 <= value <= 1:
            raise InputError(argument, value, "use a number from 0 to 1")
        return Given(torch.full((1, 1), value is None), value)

    def encode(self, given):
        values = [0.0 if one.content is None else one.content * self.scale + self.zero for one in given]
        return torch.tensor(values)[:, None, None]

    def decode(self, tokens, given):
        return [Decoded((value - self.zero) / self.scale) for value in tokens.flatten().tolist()]

    def null(self):
        return self.read(0.5, "level")


def test_a_codec_of_ones_own_is_saved_loaded_and_used(tmp_path, monkeypatch):
    monkeypatch.setitem(CODECS, "level", f"{__name__}:LevelCodec")
    model = replace(CONFIG.model, modalities=(Modality("loudness", 1, 1, depth=1), Modality("pitch", 1, 1, depth=0)))
    codecs = {"loudness": CodecConfig("level"), "pitch": CodecConfig("level", "loudness", {"scale": 4})}
    config = replace(CONFIG, model=model, codecs=codecs, sampling=SamplingConfig())
    checkpoint.save(tmp_path, config, build(model).state_dict(), torch.float32)
    LevelCodec(0.25).save(tmp_path / "loudness")
    loaded = checkpoint.load(tmp_path)
    for name, token in (("loudness", 0.75), ("pitch", 2.25)):  # the same files, but not the same settings
        codec = loaded.codec(name)
        given = [codec.read(0.5, name), codec.read(None, name)]
        assert [one.generate.item() for one in given] == [False, True]
        tokens = codec.encode(given)
        assert tokens.flatten().tolist() == [token, 0.0]
        assert codec.decode(tokens, given)[0].value == 0.5
    with pytest.raises(InputError, match="^pitch: 2 is not valid; use a number from 0 to 1"):
        loaded.codec("pitch").read(2, "pitch")


def test_registered_codecs_have_all_that_a_codec_must_have():
    methods = ("load", "save", "build", "read", "encode", "decode", "null", "tokens", "channels")
    for kind in CODECS:
        assert all(hasattr(codec_class(kind), name) for name in methods), kind
