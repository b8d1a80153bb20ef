"""Configurations: what is refused, in one sentence that names the key and the value, and what comes back from JSON."""

import json
from dataclasses import replace

import pytest

from engine.config import PRESETS, Config, ConfigError, DiffusionConfig, ImageConfig, Modality, ModelConfig, UViTConfig

TINY = PRESETS["tiny"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    config = PRESETS[preset]
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_without_pictures_or_diffusion_settings_takes_the_defaults():
    config = Config.from_dict({"model": TINY.to_dict()["model"]})
    assert (config.model, config.diffusion, config.image) == (TINY.model, DiffusionConfig(), None)
    assert Config.from_dict(config.to_dict()) == config


def test_slices_lie_side_by_side_in_the_order_of_the_modalities():
    model = ModelConfig(tuple(Modality(n, t, c, 0) for n, t, c in (("b", 2, 3), ("a", 4, 5))), shared_depth=1, dim=64)
    assert model.state_slices == {"b": slice(0, 6), "a": slice(6, 26)} and model.size == 26
    assert model.token_slices == {"b": slice(0, 2), "a": slice(2, 6)} and model.tokens == 6
    assert model.modality("a").channels == 5
    with pytest.raises(KeyError):
        model.modality("c")


def assert_one_sentence(error, *parts):
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and len(message) < 250


MODEL = {"modalities": (Modality("image", 16, 4, 1),), "shared_depth": 1, "dim": 64}


@pytest.mark.parametrize(
    "cls, values, key, value",
    [
        (ModelConfig, {**MODEL, "modalities": ()}, "modalities", "[]"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 1, 1, 0),) * 2}, "modalities", "['a', 'a']"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 0, 1, 0),)}, "a.tokens", "0"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 1, -3, 0),)}, "a.channels", "-3"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 1, 1, -1),)}, "a.depth", "-1"),
        (ModelConfig, {**MODEL, "shared_depth": 4}, "shared_depth", "4"),
        (ModelConfig, {**MODEL, "shared_depth": -1}, "shared_depth", "-1"),
        (ModelConfig, {**MODEL, "dim": 65}, "dim", "65"),
        (ModelConfig, {**MODEL, "dim": 0}, "dim", "0"),
        (ModelConfig, {**MODEL, "head_dim": 0}, "head_dim", "0"),
        (ModelConfig, {**MODEL, "mlp_ratio": 0}, "mlp_ratio", "0"),
        (ModelConfig, {**MODEL, "time": "film"}, "time", "'film'"),
        (DiffusionConfig, {"schedule": "linear"}, "schedule", "'linear'"),
        (DiffusionConfig, {"timesteps": 1}, "timesteps", "1"),
        (DiffusionConfig, {"prediction": "x0"}, "prediction", "'x0'"),
        (DiffusionConfig, {"conditioning": "none"}, "conditioning", "'none'"),
        (DiffusionConfig, {"times": "both"}, "times", "'both'"),
        (DiffusionConfig, {"times": "masked", "conditioning": "renoise"}, "conditioning", "'renoise'"),
        (DiffusionConfig, {"times": "shared", "conditioning": "clean"}, "conditioning", "'clean'"),
        (ImageConfig, {"size": 7, "patch": 1}, "image.size", "7"),
        (ImageConfig, {"size": 64, "patch": 0}, "image.patch", "0"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 10**6, 1, 0),)}, "a.tokens", "1000000"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 1, 10**6, 0),)}, "a.channels", "1000000"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 1, 1, 10**6),)}, "a.depth", "1000000"),
        (ModelConfig, {**MODEL, "shared_depth": 10**6 + 1}, "shared_depth", "1000001"),
        (ModelConfig, {**MODEL, "dim": 64 * 10**18}, "dim", "64000000000000000000"),
        (ModelConfig, {**MODEL, "mlp_ratio": 10**12}, "mlp_ratio", "1000000000000"),
        (DiffusionConfig, {"timesteps": 10**13}, "timesteps", "10000000000000"),
        (ImageConfig, {"size": 10**12, "patch": 1}, "image.size", "1000000000000"),
        (ImageConfig, {"size": 64, "patch": 65}, "image.patch", "65"),
        (UViTConfig, {"timed": ("a",), "predicted": ("a",), "extra_tokens": 10**9}, "extra_tokens", "1000000000"),
    ],
)
def test_values_that_do_not_work_are_named(cls, values, key, value):
    with pytest.raises(ConfigError) as error:
        cls(**values)
    assert_one_sentence(error, key, value, ";")


def test_a_time_token_cannot_tell_known_tokens_from_others():
    with pytest.raises(ConfigError) as error:
        Config(replace(TINY.model, time="token"), TINY.diffusion)
    assert_one_sentence(error, "times", "'masked'", "adaln")


def changed(path, value):
    """The tiny preset's dict with one value set, e.g. at "model.modalities.0.depth"; `...` removes it."""
    values = json.loads(json.dumps(TINY.to_dict()))
    *parents, last = path.split(".")
    place = values
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


@pytest.mark.parametrize(
    "path, value, parts",
    [
        ("colour", 1, ["config", "colour", "unknown"]),
        ("model.depth", 1, ["model", "depth", "unknown"]),
        ("model.modalities.1.width", 1, ["modalities", "width", "unknown"]),
        ("diffusion.beta", 1, ["diffusion", "beta", "unknown"]),
        ("image.height", 64, ["image", "height", "unknown"]),
        ("model", ..., ["model", "None"]),
        ("model", 3, ["model", "3"]),
        ("model.dim", ..., ["model", "dim"]),
        ("model.dim", "64", ["model.dim", "'64'", "int"]),
        ("model.dim", True, ["model.dim", "True", "int"]),
        ("model.dim", 64.0, ["model.dim", "64.0", "int"]),
        ("model.dim", None, ["model.dim", "None", "int"]),
        ("model.time", 1, ["model.time", "1", "str"]),
        ("model.modalities", ..., ["model.modalities", "None"]),
        ("model.modalities", "image", ["model.modalities", "'image'"]),
        ("model.modalities", [3], ["model.modalities", "3"]),
        ("model.modalities.0.tokens", "16", ["modalities.tokens", "'16'"]),
        ("model.modalities.0.name", None, ["modalities.name", "None"]),
        ("model.modalities.0.channels", ..., ["modalities", "channels"]),
        ("diffusion.timesteps", 1e3, ["diffusion.timesteps", "1000.0"]),
        ("diffusion", [], ["diffusion", "[]"]),
        ("image", "64", ["image", "'64'"]),
        ("image.patch", ..., ["image", "patch"]),
        ("model.time", json.loads("[" * 900 + "]" * 900), ["model.time", "[[["]),
        ("model.time", [0] * 1000, ["model.time", "[0, 0", "str"]),
    ],
)
def test_json_that_is_no_config_is_refused_by_key(path, value, parts):
    with pytest.raises(ConfigError) as error:
        Config.from_dict(changed(path, value))
    assert_one_sentence(error, *parts)


@pytest.mark.parametrize("values", [None, [], "tiny", {}])
def test_what_is_no_mapping_with_a_model_is_refused(values):
    with pytest.raises(ConfigError):
        Config.from_dict(values)
