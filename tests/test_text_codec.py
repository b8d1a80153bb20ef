"""Words to vectors and back."""

import os
import subprocess
import sys
import unicodedata
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.codecs import word_vectors
from engine.codecs.text import TextCodec, token_weights
from engine.codecs.word_vectors import separate, spread
from engine.codecs.words import END, tokenize
from engine.config import Modality
from engine.errors import InputError

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


def with_tokens(codec, tokens):
    return replace(codec, tokens=tokens)


def encoded(codec, text, tokens, **options):
    """The read text, and its values [L, C]."""
    codec = with_tokens(codec, tokens)
    read = codec.read(text, "prompt", **options)
    return read, codec.encode([read])[0]


def decoded(codec, values, text=None):
    """Values [B, L, C] of samples that were given one text."""
    codec = with_tokens(codec, values.shape[1])
    return codec.decode(values, [codec.read(text, "prompt")] * len(values))


def load(folder, channels=8, tokens=6):
    return TextCodec.load(folder, {}, Modality("text", tokens, channels, depth=0))


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Woman running: medium-dark skin tone!", ["woman", "running", "medium-dark", "skin", "tone"]),
        ("flag: Côte d’Ivoire", ["flag", "côte", "d'ivoire"]),
        ("flag: Co\u0302te d'Ivoire", ["flag", "côte", "d'ivoire"]),
        ("red _ car, __ (_)", ["red", "_", "car", "_", "_"]),
        ("snake_case _private 4_2", ["snake", "case", "private", "4", "2"]),
        ("1–2 -x- 'quoted' </s> A.M.", ["1", "2", "x", "quoted", "s", "a", "m"]),
        ("हिन्दी में कुत्ता", ["हिन्दी", "में", "कुत्ता"]),
        ("ภาษาไทย กิน น้ำ", ["ภาษาไทย", "กิน", "น้\u0e4d\u0e32"]),
        ("كِتَاب", ["كِتَاب"]),
        ("Vie\u0323\u0302t", ["việt"]),
        ("ＲＥＤ\u3000ｃａｔ ＿ ﬁsh Ⅳ", ["red", "cat", "_", "fish", "iv"]),
        ("red\u00addish می\u200cخواهم \ufeffcat", ["reddish", "میخواهم", "cat"]),
        (
            "well\u2011known mid\u2010air rock‘n’roll Hawaiʻi it´s",
            ["well-known", "mid-air", "rock'n'roll", "hawai'i", "it's"],
        ),
        ("keycap 1\ufe0f\u20e3 👩\u200d🚀 Lego™ İzmir J\u030c", ["keycap", "1", "lego", "izmir", "ǰ"]),
        ("कि_ _ि a\u200bb", ["कि", "_", "a", "b"]),
        ("中文 词语 日本語のテキスト", ["中文", "词语", "日本語のテキスト"]),  # words are what spaces part
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
    for form in ("NFC", "NFD"):  # however accents are typed
        assert tokenize(unicodedata.normalize(form, text)) == words


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


def parted_by_comparing_all(x, steps):
    """`separate` with every pair of vectors compared in every round."""
    radius = x.shape[1] ** 0.5
    x = torch.nn.functional.normalize(x) * radius
    for _ in range(steps):
        apart = x - x[(x @ x.T).topk(2).indices[:, 1]]
        distance = apart.norm(dim=1, keepdim=True)
        if (distance >= 0.5 * radius).all():
            break
        x = torch.nn.functional.normalize(x + (1.05 * 0.5 * radius / distance - 1).clamp_min(0) / 2 * apart) * radius
    return x


@pytest.mark.parametrize("steps", [1, 2, 100])
@pytest.mark.parametrize(("clusters", "words", "channels"), [(30, 300, 32), (1, 300, 8), (60, 240, 16), (2, 2, 4)])
def test_parting_only_near_vectors_is_as_good_as_comparing_all(monkeypatch, clusters, words, channels, steps):
    monkeypatch.setattr("engine.codecs.word_vectors.PRODUCTS", 1000)  # a few vectors at a time
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(clusters, channels, generator=generator)
    x = centres.repeat(words // clusters, 1) + 0.3 * torch.randn(words, channels, generator=generator)
    assert torch.equal(separate(x, steps=steps), parted_by_comparing_all(x, steps))


def test_vectors_far_from_all_others_are_searched_once(monkeypatch):
    searched = []
    search = word_vectors._nearest_others
    monkeypatch.setattr(
        word_vectors, "_nearest_others", lambda x, rows, *a: searched.append(len(rows)) or search(x, rows, *a)
    )
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    x[::50] = x[1::50] + 0.1 * x[2::50]
    separate(x)
    assert len(searched) > 1 and searched[0] == 500 and max(searched[1:]) <= 20


def test_captions_without_words_cannot_be_trained_on():
    with pytest.raises(InputError, match="^captions: 2 captions without a single word; give "):
        TextCodec.train(["?!", "_"], channels=8)


@pytest.mark.parametrize("caption", [*CAPTIONS[:5], "", "tone"])
def test_captions_survive_encoding_noise_and_decoding(codec, caption):
    read, values = encoded(codec, caption, tokens=8)
    assert (values.shape, values.dtype, read.generate.any()) == ((8, 8), torch.float32, False)
    noise = 0.15 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    for one in decoded(codec, values + noise, caption):
        assert one.value == " ".join(tokenize(caption))
        assert one.confidence > 0.9
        assert len(one.part_confidence) == len(tokenize(caption))


def test_text_ends_at_the_first_end_token(codec):
    words = [encoded(codec, word, 1)[1] for word in ("man", "", "woman")]
    assert decoded(codec, torch.cat(words)[None])[0].value == "man"
    assert decoded(codec, torch.cat(words[::2])[None])[0].value == "man woman"  # none at all: all tokens are words


def test_an_end_token_is_not_read_in_a_hole(codec):
    end = codec.vectors[0].expand(1, 3, 8).clone()
    end[0, 1] = codec.vectors[codec.index["man"]]
    one = decoded(codec, end, "_ man")[0]
    assert one.value.split()[1] == "man" and len(one.value.split()) == 2
    assert decoded(codec, end)[0].value == ""  # where the whole text was generated, its length was too


def test_each_text_of_a_batch_has_its_own_holes(codec):
    codec = with_tokens(codec, 2)
    values = codec.vectors[0].expand(3, 2, 8)
    texts = codec.decode(values, [codec.read(text, "prompt") for text in (None, "_ man", "man _")])
    assert [len(one.value.split()) for one in texts] == [0, 1, 0]


def test_confidence_is_the_posterior_under_noise(codec):
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(2))
    weights = (-(x[0, 0] - codec.vectors).square().sum(1) / (2 * 0.5**2)).softmax(0)
    one = decoded(codec, x)[0]
    best = codec.vocabulary[int(weights.argmax())]
    assert one.value == ("" if best == END else best)
    between = (codec.vectors[1] + codec.vectors[2]) / 2
    one = decoded(codec, torch.stack([between, codec.vectors[1], codec.vectors[0]])[None])[0]
    weights = (-(between - codec.vectors).square().sum(1) / (2 * 0.5**2)).softmax(0)
    assert one.part_confidence[0] == pytest.approx(weights.max().item(), abs=1e-5)
    assert one.confidence == pytest.approx(sum(one.part_confidence) / 2)
    assert one.part_confidence[1] > one.part_confidence[0]


def test_nearest_is_by_distance_even_among_vectors_of_other_lengths():
    codec = TextCodec((END, "near", "long"), torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]]))
    assert decoded(codec, torch.tensor([[[1.2, 0.0]]]))[0].value == "near"


def test_empty_text_is_certain(codec):
    assert decoded(codec, encoded(codec, "", 4)[1][None])[0].confidence == 1.0


def test_batches_decode_as_single_texts_do(codec):
    values = torch.randn(300, 5, 8, generator=torch.Generator().manual_seed(3))
    together = decoded(codec, values)
    assert [one.value for one in together] == [decoded(codec, v[None])[0].value for v in values]
    assert decoded(codec, values.bfloat16()[:2])[0].value


def test_texts_encode_together_as_alone(codec):
    codec = with_tokens(codec, 4)
    given = [codec.read(text, "prompt") for text in ("man _", None, "", "woman running")]
    values = codec.encode(given)
    assert values.shape == (4, 4, 8)
    assert all(torch.equal(codec.encode([one])[0], together) for one, together in zip(given, values, strict=True))


def test_holes_are_generated_and_the_rest_is_known(codec):
    read, values = encoded(codec, "man _ : dark __ tone", tokens=8)
    assert read.generate[:, 0].tolist() == [False, True, False, True, False, False, False, False]
    assert read.generate.shape == (8, 8) and torch.equal(read.generate.any(1), read.generate.all(1))
    assert values[read.generate].eq(0).all()
    assert torch.equal(values[5], codec.vectors[0]) and torch.equal(values[0], codec.vectors[codec.index["man"]])


def test_indices_are_the_rows_that_captions_are_encoded_as(codec):
    indices = codec.indices(["man running", "", "tone " * 6], tokens=6)
    assert (indices.dtype, indices.shape) == (torch.int32, (3, 6))
    for row, caption in zip(indices, ["man running", "", "tone " * 6], strict=True):
        assert torch.equal(codec.vectors[row], encoded(codec, caption, 6)[1])


def test_indices_of_unknown_words_and_holes_are_refused(codec):
    for word in ("xyzzy", "_"):
        with pytest.raises(InputError, match=f"^captions: '{word}' is not in the vocabulary; give "):
            codec.indices(["man", f"man {word}"], tokens=6)
    with pytest.raises(InputError, match="^captions: 'man man man ' has 3 words; use at most 2"):
        codec.indices(["man " * 3], tokens=2)


def test_no_caption_is_generated_whole_and_an_empty_one_is_known(codec):
    read, values = encoded(codec, None, tokens=4)
    assert read.generate.all() and values.shape == read.generate.shape == (4, 8) and values.eq(0).all()
    read, values = encoded(codec, "", tokens=4)
    assert not read.generate.any() and torch.equal(values, codec.vectors[0].expand(4, 8))


def test_null_is_the_empty_text_that_is_known(codec):
    codec = with_tokens(codec, 4)
    assert not codec.null().generate.any()
    assert torch.equal(codec.encode([codec.null()])[0], codec.vectors[0].expand(4, 8))


def test_words_fill_the_tokens_and_no_more(codec):
    assert not encoded(codec, "man " * 4, tokens=4)[0].generate.any()
    with pytest.raises(InputError, match="^prompt: 'man man man man man ' has 5 words; use at most 4"):
        encoded(codec, "man " * 5, tokens=4)


@pytest.mark.parametrize("value", ["™", "\u0301", "\u200b", "?"])
def test_a_text_without_a_word_is_not_taken_for_the_empty_one(codec, value):
    with pytest.raises(InputError, match="^prompt: .* has no word; give words, or leave it out"):
        codec.read(value, "prompt")


@pytest.mark.parametrize("value", [7, b"man", ["man"]], ids=str)
def test_what_is_not_a_string_is_refused(codec, value):
    with pytest.raises(InputError, match="^prompt: .* is not a string; give a string"):
        codec.read(value, "prompt")


def test_a_text_takes_no_mask(codec):
    with pytest.raises(InputError, match="^masks.text: .*; put _ in the text"):
        codec.read("man", "prompt", mask="mask.png", mask_argument="masks.text")


def test_unknown_words_are_named_with_their_nearest(codec):
    with pytest.raises(InputError) as error:
        codec.read("womann runing man xyzzy womann", "inputs.text")
    assert (error.value.argument, error.value.value) == ("inputs.text", "womann, runing, xyzzy")
    assert "'womann' (near: woman" in error.value.remedy and "'runing' (near: running" in error.value.remedy
    assert "xyzzy" not in error.value.remedy and "unknown_words=fill" in error.value.remedy
    with pytest.raises(InputError, match="^prompt: 'xyzzy' is not in the vocabulary; use known words, or "):
        codec.read("xyzzy", "prompt")


def test_many_and_long_unknown_words_are_refused_in_a_short_message(codec, monkeypatch):
    searched = []  # each search takes a pass over the vocabulary
    monkeypatch.setattr("difflib.get_close_matches", lambda word, *_, **__: searched.append(word) or ["man"] * 3)
    with pytest.raises(InputError) as error:
        codec.read("x" * 100_000 + " " + " ".join(f"wrod{i}" for i in range(60)), "prompt")
    assert len(str(error.value)) < 1000 and len(searched) == 5


def test_unknown_words_become_holes_on_request(codec):
    read, values = encoded(codec, "man xyzzy light", tokens=4, unknown_words="fill")
    assert read.generate[:, 0].tolist() == [False, True, False, False] and values[1].eq(0).all()


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
    codec.save(tmp_path / "text", torch.float16)  # of the weights of networks, which vectors are not
    loaded = load(tmp_path / "text", tokens=5)
    assert loaded.vocabulary == codec.vocabulary and torch.equal(loaded.vectors, codec.vectors)
    assert (loaded.tokens, loaded.channels) == (5, 8)
    loaded.build()


def test_vectors_of_other_channels_than_the_models_are_refused(codec, tmp_path):
    codec.save(tmp_path)
    with pytest.raises(InputError, match="has word vectors of 8 channels, the model takes 9") as error:
        load(tmp_path, channels=9)
    assert error.value.value == tmp_path


def test_settings_are_refused(codec, tmp_path):
    codec.save(tmp_path)
    with pytest.raises(InputError, match="^codecs.text: 'size' is not a setting of the text codec; leave it out"):
        TextCodec.load(tmp_path, {"size": 3}, Modality("text", 6, 8, depth=0))


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
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert (error.value.argument, error.value.value) == ("checkpoint", tmp_path / name)


def test_vectors_that_are_not_finite_are_refused(codec, tmp_path):
    TextCodec(codec.vocabulary, codec.vectors * torch.inf).save(tmp_path)
    with pytest.raises(InputError, match=r"vectors\.safetensors does not hold one finite"):
        load(tmp_path)


def test_the_codec_does_not_import_gensim():
    code = "import sys, engine.codecs.text; sys.exit('gensim' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
