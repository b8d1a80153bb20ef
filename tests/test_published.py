"""Published weights from files: wrappers are taken off, and what is not such a network is refused by what it is."""

import math
import re
from pathlib import Path

import pytest
import torch
from denoisers import drawn
from uvit_cases import DIM, WORDS, published_weights

from engine.errors import InputError
from engine.model.convert import convert_uvit, load_uvit
from engine.presets import PRESETS


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_are_read_from_files_of_either_kind(tmp_path, suffix):
    from safetensors.torch import save_file

    weights, path = published_weights(), tmp_path / f"nnet.{suffix}"
    (torch.save if suffix == "pth" else save_file)(weights, path)
    torch.testing.assert_close(load_uvit(path, WORDS).state_dict(), convert_uvit(weights, WORDS).state_dict())


class Unsafe:
    def __reduce__(self):
        return Path.touch, (Path("ran-code"),)


def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"pos_embed": Unsafe()}, "nnet.pth")
    with pytest.raises(InputError, match="^init: nnet.pth is damaged or holds more than weights; give a file of U-ViT"):
        load_uvit("nnet.pth")
    assert not Path("ran-code").exists()


def test_what_is_not_weights_is_refused_without_advice_to_unpickle_it(tmp_path):
    torch.save({"weights": torch.nn.Linear(1, 1)}, tmp_path / "more.pth")
    (tmp_path / "a.png").write_bytes(bytes(range(255)))
    (tmp_path / "cut.safetensors").write_bytes(b"\x40" + bytes(7) + b"{")
    for name in ("more.pth", "a.png", "cut.safetensors"):
        with pytest.raises(InputError) as error:
            load_uvit(tmp_path / name)
        assert (error.value.argument, error.value.value) == ("init", tmp_path / name)
        assert "weights_only" not in str(error.value) and "; give " in str(error.value)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda w: w.pop("mid_block.mlp.fc1.weight"), "mid_block.mlp.fc1.weight"),
        (lambda w: w.pop("in_blocks.1.attn.proj.bias"), "in_blocks.1.proj.bias"),
        (lambda w: w.update({"time_embed.0.weight": drawn(4, 4)}), "time_embed.0.weight"),
        (lambda w: w.update(pos_embed=drawn(1, 99, DIM)), "93 image tokens"),
        (lambda w: w.clear(), "is missing (there is nothing)"),
        (lambda w: w.pop("context_embed.weight"), "an unconditional U-ViT (no context_embed)"),
        (lambda w: w.update({"label_emb.weight": drawn(9, DIM)}), "a class-conditional U-ViT (label_emb)"),
        (lambda w: w.update({"in_blocks.0.attn.qkv.bias": drawn(3 * DIM)}), "in_blocks.0.attn.qkv.bias"),
        (lambda w: w["norm.bias"].fill_(math.nan), "values that are not finite floats"),
        (lambda w: w.update({"norm.bias": w["norm.bias"].long()}), "values that are not finite floats"),
        (lambda w: w.update({"norm.bias": 3}), "norm.bias is missing"),
        (lambda w: w.update({"pos_embed": drawn(3)}), "are not those of a U-ViT"),
    ],
)
def test_weights_of_another_network_are_named(tmp_path, change, named):
    weights = published_weights()
    change(weights)
    torch.save(weights, tmp_path / "nnet.pth")
    with pytest.raises(InputError, match=re.escape(named)) as error:
        load_uvit(tmp_path / "nnet.pth", WORDS)
    assert (error.value.argument, error.value.value) == ("init", tmp_path / "nnet.pth")
    assert str(error.value).count("\n") == 0
    with pytest.raises(InputError, match=re.escape(named)) as error:
        convert_uvit(weights, WORDS)
    assert error.value.argument == "weights"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^init: .*nowhere.pth does not exist; give "):
        load_uvit(tmp_path / "nowhere.pth")


def test_the_older_unidiffuser_is_named():
    weights = published_weights(joint=True)
    del weights["token_embedding.weight"], weights["pos_embed_token"]
    with pytest.raises(
        InputError, match=r"UniDiffuser v0 \(no token_embedding for the data type\), which does not load"
    ):
        convert_uvit(weights, WORDS)


@pytest.mark.parametrize("preset, depth", [("uvit-t2i-coco256", 12), ("uvit-t2i-deep-coco256", 16)])
def test_presets_have_the_published_shapes(preset, depth):
    shape = {"depth": depth, "dim": 512, "latents": 4, "tokens": 256, "words": 77, "context": 768}
    assert convert_uvit(published_weights(**shape, zero=True)).config == PRESETS[preset].model


def texts(words, tokens, **given):
    """Words that `convert_uvit` finds in weights of so many words and image tokens."""
    return convert_uvit(published_weights(depth=2, words=words, tokens=tokens, zero=True), **given).config.modality(
        "text"
    )


@pytest.mark.parametrize(
    "words, tokens, given",
    [
        (77, 256, {}),
        (77, 256, {"text_tokens": 77}),
        (77, 256, {"image_tokens": 289}),  # which would leave 44 words
        (5, 16, {"image_tokens": 16}),
        (12, 9, {"text_tokens": 12}),
    ],
)
def test_the_number_of_words_is_found_in_the_weights(words, tokens, given):
    assert texts(words, tokens, **given).tokens == words


@pytest.mark.parametrize(
    "words, tokens, given, argument, message",
    [
        (77, 256, {"text_tokens": 44}, "text_tokens", "44 leaves 289 image tokens where 77 leave 256; use 77"),
        (5, 16, {}, "text_tokens", "text_tokens: None does not tell how many of 21 tokens are text"),
        (5, 16, {"text_tokens": 6}, "weights", "of 21 tokens 6 of text and 15 image tokens cannot be"),
        (5, 16, {"image_tokens": 25}, "weights", "of 21 tokens -4 of text"),
        (5, 16, {"text_tokens": 21}, "weights", "0 image tokens cannot be"),
    ],
)
def test_a_number_of_words_that_cannot_be_is_refused(words, tokens, given, argument, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        texts(words, tokens, **given)
    assert error.value.argument == argument


def test_the_number_of_heads_is_an_argument():
    weights = published_weights(depth=2)
    assert [convert_uvit(weights, WORDS, heads).config.head_dim for heads in (None, 1, 4)] == [64, 128, 32]
    for heads in (3, 0, -2, 2.0, 256):
        with pytest.raises(InputError, match="does not divide the width of 128; use a divisor") as error:
            convert_uvit(weights, WORDS, heads)
        assert error.value.argument == "heads"
    with pytest.raises(InputError, match="^heads: None means heads of 64 channels, which do not divide"):
        convert_uvit(published_weights(depth=2, dim=96), WORDS)


def cyclic(weights):
    wrapped = {"model": weights, "epoch": 3}
    wrapped["self"] = wrapped
    return wrapped


def prefixed(prefix):
    return lambda weights: {f"{prefix}{name}": weight for name, weight in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": drawn(2)}}}},
        lambda weights: {"model": {"nnet": weights}},
        prefixed("module."),
        lambda weights: {"state_dict": {**prefixed("model.module.")(weights), "autoencoder.conv.bias": drawn(2)}},
        lambda weights: {"nnet": published_weights(depth=2), "nnet_ema": weights},
        lambda weights: prefixed("model.")(published_weights(depth=2)) | prefixed("ema_model.")(weights),
        cyclic,
    ],
)
def test_what_training_programs_wrap_weights_in_is_taken_off(wrap):
    weights = published_weights()
    torch.testing.assert_close(
        convert_uvit(wrap(weights), WORDS).state_dict(), convert_uvit(weights, WORDS).state_dict()
    )


@pytest.mark.parametrize(
    "wrapped, message",
    [
        ({"a": published_weights(depth=2), "b": published_weights(depth=2)}, "a, b are several networks; save one"),
        ({"ema": {"shadow": [drawn(2)]}, "decay": 1}, "patch_embed.proj.weight is missing (there is ema, decay); give"),
        ([drawn(2)], "list is not a mapping from names to tensors"),
        ({name: drawn(1) for name in "abcdefg"}, "(there is a, b, c, d, e, …)"),
    ],
)
def test_wrappers_that_hold_no_one_network_are_named_by_their_keys(tmp_path, wrapped, message):
    torch.save(wrapped, tmp_path / "nnet.pth")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_uvit(tmp_path / "nnet.pth")
    assert error.value.argument == "init"
