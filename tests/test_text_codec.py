"""Words to vectors and back."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.codecs.text import (
    END,
    CodecFileError,
    TextCodec,
    UnknownWordError,
    separate,
    spread,
    token_weights,
    tokenize,
)

CAPTIONS = [
    f"{who} {what}: {colour} skin tone"
    for who in ("man", "woman", "person")
    for what in ("running", "sleeping", "with o'clock hat", "in mid-air")
    for colour in ("dark", "medium-dark", "light")
]
TRAIN = """
import hashlib, sys
from engine.codecs.text import TextCodec
codec = TextCodec.train(sys.stdin.read().splitlines(), channels=8, seed=3)
print(hashlib.sha256(repr(codec.vocabulary).encode() + codec.vectors.numpy().tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def codec():
    return TextCodec.train(CAPTIONS, channels=8, seed=3)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Woman running: medium-dark skin tone!", ["woman", "running", "medium-dark", "skin", "tone"]),
        ("flag: Côte d’Ivoire", ["flag", "côte", "d'ivoire"]),
        ("flag: Co\u0302te d'Ivoire", ["flag", "côte", "d'ivoire"]),
        ("red _ car, __ (_)", ["red", "_", "car", "_", "_"]),
        ("snake_case _private 4_2", ["snake", "case", "private", "4", "2"]),
        ("1–2 -x- 'quoted' </s> A.M.", ["1", "2", "x", "quoted", "s", "a", "m"]),
        ("?! …", []),
        ("", []),
    ],
)
def test_words_are_lower_case_without_punctuation(caption, words):
    assert tokenize(caption) == words


@given(st.text(max_size=60))
def test_words_of_any_text_are_their_own_words(text):
    words = tokenize(text)
    assert END not in words and tokenize(" ".join(words)) == words


def test_training_is_the_same_in_every_process(codec):
    digests = set()
    for salt in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": salt}
        run = subprocess.run(
            [sys.executable, "-c", TRAIN], input="\n".join(CAPTIONS), text=True, capture_output=True, env=environment
        )
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout)
    assert len(digests) == 1
    assert not torch.equal(codec.vectors, TextCodec.train(CAPTIONS, channels=8, seed=4).vectors)


def test_vectors_have_unit_scale_and_keep_apart(codec):
    assert codec.vocabulary[0] == END and len(set(codec.vocabulary)) == len(codec.vocabulary)
    assert set(codec.vocabulary[1:]) == {word for caption in CAPTIONS for word in tokenize(caption)}
    assert codec.vectors.dtype == torch.float32
    assert torch.allclose(codec.vectors.square().mean(1), torch.ones(len(codec.vectors)), atol=1e-5)
    distance = torch.cdist(codec.vectors, codec.vectors).fill_diagonal_(torch.inf)
    assert distance.min() >= 0.49 * 8**0.5
    assert codec.vectors.mean(0).abs().max() < 0.6 and codec.vectors.std(0).min() > 0.5


def test_common_part_and_strong_directions_are_removed():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    even, skewed = spread(x + 5), spread(x * torch.linspace(1, 10, 16))
    assert torch.allclose(even, spread(x), atol=1e-3)
    assert (skewed.T @ skewed / 200 - torch.eye(16)).abs().max() < 0.3


def test_near_vectors_are_parted_and_far_ones_stay():
    x = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0))) * 4
    x[1] = x[0] + 0.01 * x[2]
    parted = separate(x)
    distance = torch.cdist(parted, parted).fill_diagonal_(torch.inf)
    assert distance.min() >= 1.99
    far = torch.cdist(x, x).fill_diagonal_(torch.inf).min(1).values > 2.2
    assert far.sum() > 20 and torch.allclose(parted[far], x[far], atol=1e-5)


def test_captions_without_words_cannot_be_trained_on():
    with pytest.raises(ValueError, match="2 captions without a single word"):
        TextCodec.train(["?!", "_"], channels=8)


@pytest.mark.parametrize("caption", [*CAPTIONS[:5], "", "tone"])
def test_captions_survive_encoding_noise_and_decoding(codec, caption):
    values, generate = codec.encode(caption, tokens=8)
    assert (values.shape, values.dtype, generate.any()) == ((8, 8), torch.float32, False)
    noise = 0.15 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    for decoded in codec.decode(values + noise):
        assert decoded.text == " ".join(tokenize(caption))
        assert decoded.confidence > 0.9
        assert len(decoded.word_confidence) == len(tokenize(caption))


def test_text_ends_at_the_first_end_token(codec):
    words = [codec.encode(word, 1)[0] for word in ("man", "", "woman")]
    assert codec.decode(torch.cat(words)[None])[0].text == "man"
    assert codec.decode(torch.cat(words[::2])[None])[0].text == "man woman"  # none at all: all tokens are words


def test_confidence_is_the_posterior_under_noise(codec):
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(2))
    weights = (-(x[0, 0] - codec.vectors).square().sum(1) / (2 * 0.5**2)).softmax(0)
    decoded = codec.decode(x)[0]
    best = codec.vocabulary[int(weights.argmax())]
    assert decoded.text == ("" if best == END else best)
    between = (codec.vectors[1] + codec.vectors[2]) / 2
    decoded = codec.decode(torch.stack([between, codec.vectors[1], codec.vectors[0]])[None])[0]
    weights = (-(between - codec.vectors).square().sum(1) / (2 * 0.5**2)).softmax(0)
    assert decoded.word_confidence[0] == pytest.approx(weights.max().item(), abs=1e-5)
    assert decoded.confidence == pytest.approx(sum(decoded.word_confidence) / 2)
    assert decoded.word_confidence[1] > decoded.word_confidence[0]


def test_nearest_is_by_distance_even_among_vectors_of_other_lengths():
    codec = TextCodec((END, "near", "long"), torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]]))
    assert codec.decode(torch.tensor([[[1.2, 0.0]]]))[0].text == "near"


def test_empty_text_is_certain(codec):
    assert codec.decode(codec.encode("", 4)[0][None])[0].confidence == 1.0


def test_batches_decode_as_single_texts_do(codec):
    values = torch.randn(300, 5, 8, generator=torch.Generator().manual_seed(3))
    together = codec.decode(values)
    assert [d.text for d in together] == [codec.decode(v[None])[0].text for v in values]
    assert codec.decode(values.bfloat16()[:2])[0].text


def test_holes_are_generated_and_the_rest_is_known(codec):
    values, generate = codec.encode("man _ : dark __ tone", tokens=8)
    assert generate.tolist() == [False, True, False, True, False, False, False, False]
    assert values[generate].eq(0).all()
    assert torch.equal(values[5], codec.vectors[0]) and torch.equal(values[0], codec.vectors[codec.index["man"]])


def test_indices_are_the_rows_that_captions_are_encoded_as(codec):
    indices = codec.indices(["man running", "", "tone " * 6], tokens=6)
    assert (indices.dtype, indices.shape) == (torch.int32, (3, 6))
    for row, caption in zip(indices, ["man running", "", "tone " * 6], strict=True):
        assert torch.equal(codec.vectors[row], codec.encode(caption, 6)[0])


def test_indices_of_unknown_words_and_holes_are_refused(codec):
    for word in ("xyzzy", "_"):
        with pytest.raises(UnknownWordError, match=f"^captions: '{word}' is not in the vocabulary; give "):
            codec.indices(["man", f"man {word}"], tokens=6)


def test_no_caption_is_generated_whole_and_an_empty_one_is_known(codec):
    values, generate = codec.encode(None, tokens=4)
    assert generate.all() and values.shape == (4, 8)
    values, generate = codec.encode("", tokens=4)
    assert not generate.any() and torch.equal(values, codec.vectors[0].expand(4, 8))


def test_words_fill_the_tokens_and_no_more(codec):
    assert not codec.encode("man " * 4, tokens=4)[1].any()
    with pytest.raises(ValueError, match="has 5 words; use at most 4"):
        codec.encode("man " * 5, tokens=4)


def test_unknown_words_are_named_with_their_nearest(codec):
    with pytest.raises(UnknownWordError) as error:
        codec.encode("womann runing xyzzy womann", tokens=8)
    message = str(error.value)
    assert "'womann' (near: woman" in message and "'runing' (near: running" in message and "'xyzzy';" in message
    assert message.count("womann") == 1


def test_unknown_words_become_holes_on_request(codec):
    values, generate = codec.encode("man xyzzy light", tokens=4, unknown="fill")
    assert generate.tolist() == [False, True, False, False] and values[1].eq(0).all()


def test_captions_count_alike_and_their_filling_as_one_token():
    lengths = torch.tensor([0, 1, 5, 14, 15, 16])
    indices = torch.where(torch.arange(16) < lengths[:, None], 3, 0)
    weights = token_weights(indices)
    torch.testing.assert_close(weights.sum(1), torch.full((6,), 16.0))
    for row, length in zip(weights, lengths.tolist(), strict=True):
        read, further = row[: length + 1], row[length + 1 :]  # the words with their end, and what follows it
        assert (read == read[0]).all()
        if len(further):
            assert (further == further[0]).all() and further.sum().item() == pytest.approx(read[0].item())


def test_saved_codec_is_the_same(codec, tmp_path):
    codec.save(tmp_path / "text")
    loaded = TextCodec.load(tmp_path / "text")
    assert loaded.vocabulary == codec.vocabulary and torch.equal(loaded.vectors, codec.vectors)


def damage_nothing_there(folder):
    (folder / "vocabulary.json").unlink()
    return "vocabulary.json"


def damage_cut_vocabulary(folder):
    (folder / "vocabulary.json").write_bytes((folder / "vocabulary.json").read_bytes()[:-9])
    return "vocabulary.json"


def damage_deep_vocabulary(folder):
    (folder / "vocabulary.json").write_text("[" * 100_000)
    return "vocabulary.json"


def damage_repeated_word(folder):
    (folder / "vocabulary.json").write_text('["</s>", "man", "man"]')
    return "vocabulary.json"


def damage_no_vectors(folder):
    (folder / "vectors.safetensors").unlink()
    return "vectors.safetensors"


def damage_cut_vectors(folder):
    (folder / "vectors.safetensors").write_bytes((folder / "vectors.safetensors").read_bytes()[:-9])
    return "vectors.safetensors"


def damage_empty_vectors(folder):
    (folder / "vectors.safetensors").write_bytes(b"")
    return "vectors.safetensors"


def damage_too_few_words(folder):
    (folder / "vocabulary.json").write_text('["</s>", "man"]')
    return "vectors.safetensors"


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(codec, tmp_path, damage):
    codec.save(tmp_path)
    name = damage(tmp_path)
    with pytest.raises(CodecFileError) as error:
        TextCodec.load(tmp_path)
    assert str(error.value).startswith(str(tmp_path / name))


def test_vectors_that_are_not_finite_are_refused(codec, tmp_path):
    TextCodec(codec.vocabulary, codec.vectors * torch.inf).save(tmp_path)
    with pytest.raises(CodecFileError, match=r"vectors\.safetensors: does not hold one finite"):
        TextCodec.load(tmp_path)


def test_the_codec_does_not_import_gensim():
    code = "import sys, engine.codecs.text; sys.exit('gensim' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
