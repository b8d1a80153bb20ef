"""Configurations: what is refused, in one sentence that names the key and the value, and what comes back from JSON."""

import json
from dataclasses import replace

import pytest

from engine.config import (
    CodecConfig,
    Config,
    DiffusionConfig,
    Modality,
    ModelConfig,
    SamplingConfig,
    UViTConfig,
)
from engine.errors import InputError
from engine.presets import PRESETS

TINY = PRESETS["tiny"]
# config.json of the built-in model as version 0.1 wrote it.
VERSION_0_1 = {
    "model": {
        "modalities": [
            {"name": "image", "tokens": 16, "channels": 32, "depth": 2},
            {"name": "text", "tokens": 16, "channels": 32, "depth": 2},
        ],
        "shared_depth": 7,
        "dim": 192,
        "head_dim": 64,
        "mlp_ratio": 4,
        "time": "adaln",
    },
    "diffusion": {
        "schedule": "cosine",
        "timesteps": 1000,
        "prediction": "v_prediction",
        "conditioning": "clean",
        "times": "masked",
    },
    "image": {"size": 64, "patch": 2},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    config = PRESETS[preset]
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_of_a_bare_network_takes_the_defaults():
    config = Config.from_dict({"model": TINY.to_dict()["model"]})
    assert config == Config(TINY.model, DiffusionConfig(), {}, SamplingConfig())
    assert Config.from_dict(config.to_dict()) == config


def test_a_config_of_version_0_1_means_that_versions_built_in_model():
    config = Config.from_dict(VERSION_0_1)
    modalities = Modality("image", 16, 32, depth=2), Modality("text", 16, 32, depth=2)
    emoji = PRESETS["emoji"]
    expected = replace(emoji, model=replace(emoji.model, modalities=modalities), sampling=PRESETS["tiny"].sampling)
    assert config == expected
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_of_version_0_1_that_knows_no_clean_parts_moves_all_modalities_together():
    values = json.loads(json.dumps(VERSION_0_1))
    values["diffusion"] |= {"conditioning": "renoise", "times": "shared"}
    config = Config.from_dict(values)
    assert config.sampling.order == () and config.sampling.guidance["text-to-image"] == 5.0


def test_a_bare_network_of_version_0_1_has_no_codecs():
    config = Config.from_dict(VERSION_0_1 | {"image": None})
    assert (dict(config.codecs), config.model) == ({}, Config.from_dict(VERSION_0_1).model)


def test_reading_a_config_of_version_0_1_leaves_it_as_it_was():
    values = json.loads(json.dumps(VERSION_0_1))
    Config.from_dict(values)
    assert values == VERSION_0_1


def test_any_modalities_survive_json_with_their_codecs():
    model = replace(TINY.model, modalities=(*TINY.model.modalities, Modality("sketch", 16, 4, 0)))
    codecs = {**TINY.codecs, "sketch": CodecConfig("image", folder="image", settings={"size": 32, "patch": 1})}
    config = replace(TINY, model=model, codecs=codecs)
    assert config.to_dict()["codecs"]["sketch"] == {"kind": "image", "folder": "image", "size": 32, "patch": 1}
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


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
LENT = Modality("a", 1, 1, 1, blocks_of="b")


@pytest.mark.parametrize(
    "cls, values, key, value",
    [
        (ModelConfig, {**MODEL, "modalities": ()}, "modalities", "[]"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 1, 1, 0),) * 2}, "modalities", "['a', 'a']"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 0, 1, 0),)}, "a.tokens", "0"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 1, -3, 0),)}, "a.channels", "-3"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 1, 1, -1),)}, "a.depth", "-1"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 1, 1, 1, blocks_of="a"),)}, "a.blocks_of", "'a'"),
        (ModelConfig, {**MODEL, "modalities": (LENT, Modality("b", 1, 1, 2))}, "a.blocks_of", "'b'"),
        (ModelConfig, {**MODEL, "modalities": (LENT, replace(LENT, name="b"))}, "a.blocks_of", "'b'"),
        (ModelConfig, {**MODEL, "modalities": (LENT,)}, "a.blocks_of", "'b'"),
        (ModelConfig, {**MODEL, "shared_depth": 4}, "shared_depth", "4"),
        (ModelConfig, {**MODEL, "shared_depth": -1}, "shared_depth", "-1"),
        (ModelConfig, {**MODEL, "dim": 65}, "dim", "65"),
        (ModelConfig, {**MODEL, "dim": 0}, "dim", "0"),
        (ModelConfig, {**MODEL, "head_dim": 0}, "head_dim", "0"),
        (ModelConfig, {**MODEL, "mlp_ratio": 0}, "mlp_ratio", "0"),
        (ModelConfig, {**MODEL, "time_conditioning": "film"}, "time_conditioning", "'film'"),
        (DiffusionConfig, {"schedule": "linear"}, "schedule", "'linear'"),
        (DiffusionConfig, {"timesteps": 1}, "timesteps", "1"),
        (DiffusionConfig, {"prediction": "x0"}, "prediction", "'x0'"),
        (DiffusionConfig, {"conditioning": "none"}, "conditioning", "'none'"),
        (DiffusionConfig, {"time_sampling": "both"}, "time_sampling", "'both'"),
        (DiffusionConfig, {"time_sampling": "masked", "conditioning": "renoise"}, "conditioning", "'renoise'"),
        (DiffusionConfig, {"time_sampling": "shared", "conditioning": "clean"}, "conditioning", "'clean'"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 10**6, 1, 0),)}, "a.tokens", "1000000"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 1, 10**6, 0),)}, "a.channels", "1000000"),
        (ModelConfig, {**MODEL, "modalities": (Modality("a", 1, 1, 10**6),)}, "a.depth", "1000000"),
        (ModelConfig, {**MODEL, "shared_depth": 10**6 + 1}, "shared_depth", "1000001"),
        (ModelConfig, {**MODEL, "dim": 64 * 10**18}, "dim", "64000000000000000000"),
        (ModelConfig, {**MODEL, "mlp_ratio": 10**12}, "mlp_ratio", "1000000000000"),
        (DiffusionConfig, {"timesteps": 10**13}, "timesteps", "10000000000000"),
        (SamplingConfig, {"guidance": {"joint": float("nan")}}, "sampling.guidance.joint", "nan"),
        (SamplingConfig, {"guidance": {"joint": "3"}}, "sampling.guidance.joint", "'3'"),
        (SamplingConfig, {"guidance": 3.0}, "sampling.guidance", "3.0"),
        (SamplingConfig, {"order": ("text", "text")}, "sampling.order", "text"),
        (SamplingConfig, {"order": "text"}, "sampling.order", "'text'"),
        (SamplingConfig, {"feather": -1}, "sampling.feather", "-1"),
        (UViTConfig, {"timed": ("a",), "predicted": ("a",), "extra_tokens": 10**9}, "extra_tokens", "1000000000"),
    ],
)
def test_values_that_do_not_work_are_named(cls, values, key, value):
    with pytest.raises(InputError) as error:
        cls(**values)
    assert_one_sentence(error, key, value, ";")


def test_a_time_token_cannot_tell_known_tokens_from_others():
    with pytest.raises(InputError) as error:
        Config(replace(TINY.model, time_conditioning="token"), TINY.diffusion)
    assert_one_sentence(error, "time_sampling", "'masked'", "adaln")


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"codecs": {"image": TINY.codecs["image"]}}, ["codecs", "['image']", "'text'"]),
        ({"codecs": {**TINY.codecs, "sound": CodecConfig("text")}}, ["codecs", "sound"]),
        ({"sampling": SamplingConfig(order=("sound",))}, ["sampling.order", "sound", "image, text"]),
        ({"diffusion": DiffusionConfig()}, ["sampling.order", "clean"]),
    ],
    ids=["a modality without a codec", "a codec without a modality", "order of another", "order of renoised parts"],
)
def test_settings_that_do_not_fit_each_other_are_named(changes, parts):
    with pytest.raises(InputError) as error:
        replace(TINY, **changes)
    assert_one_sentence(error, *parts)


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
        ("colour", 1, ["config", "colour", "not a known"]),
        ("model.depth", 1, ["model", "depth", "not a known"]),
        ("model.modalities.1.width", 1, ["modalities", "width", "not a known"]),
        ("diffusion.beta", 1, ["diffusion", "beta", "not a known"]),
        ("sampling.steps", 1, ["sampling", "steps", "not a known"]),
        ("model", ..., ["model", "None"]),
        ("model", 3, ["model", "3"]),
        ("model.dim", ..., ["model", "dim"]),
        ("model.dim", "64", ["model.dim", "'64'", "whole number"]),
        ("model.dim", True, ["model.dim", "True", "whole number"]),
        ("model.dim", 64.0, ["model.dim", "64.0", "whole number"]),
        ("model.dim", None, ["model.dim", "None", "whole number"]),
        ("model.time_conditioning", 1, ["model.time_conditioning", "1", "str"]),
        ("model.modalities", ..., ["model.modalities", "None"]),
        ("model.modalities", "image", ["model.modalities", "'image'"]),
        ("model.modalities", [3], ["model.modalities", "3"]),
        ("model.modalities.0.tokens", "16", ["modalities.tokens", "'16'"]),
        ("model.modalities.0.name", None, ["modalities.name", "None"]),
        ("model.modalities.0.channels", ..., ["modalities", "channels"]),
        ("diffusion.timesteps", 1e3, ["diffusion.timesteps", "1000.0"]),
        ("diffusion", [], ["diffusion", "[]"]),
        ("codecs", [], ["codecs", "[]"]),
        ("codecs.image", "64", ["codecs.image", "'64'"]),
        ("codecs.image.kind", ..., ["codecs.image.kind", "None"]),
        ("codecs.image.kind", 3, ["codecs.image.kind", "3"]),
        ("codecs.image.size", None, ["codecs.image.size", "None"]),
        ("codecs.image.size", True, ["codecs.image.size", "True"]),
        ("codecs.image.folder", "../image", ["codecs.image.folder", "'../image'"]),
        ("codecs.image.folder", "..", ["codecs.image.folder", "'..'"]),
        ("codecs.image.folder", 1, ["codecs.image.folder", "1"]),
        ("sampling", 3, ["sampling", "3"]),
        ("model.time_conditioning", json.loads("[" * 900 + "]" * 900), ["model.time_conditioning", "[[["]),
        ("model.time_conditioning", [0] * 1000, ["model.time_conditioning", "[0, 0", "str"]),
    ],
)
def test_json_of_another_kind_than_a_config_is_refused_by_key(path, value, parts):
    with pytest.raises(InputError) as error:
        Config.from_dict(changed(path, value))
    assert_one_sentence(error, *parts)


@pytest.mark.parametrize("values", [None, [], "tiny", {}])
def test_values_other_than_a_mapping_with_a_model_are_refused(values):
    with pytest.raises(InputError):
        Config.from_dict(values)
