"""`TrainOptions`: what it fills in and refuses; `Examples`: which images and captions the denoiser is trained on."""

import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.codecs.text import TextCodec
from engine.codecs.words import END, shortened
from engine.config import CodecConfig, Modality
from engine.data.latents import LatentCache
from engine.errors import InputError
from engine.presets import PRESETS
from engine.training.examples import Examples, with_repeats
from engine.training.options import TrainOptions, image_and_text, sketch_of
from engine.training.recipes import RECIPES, TINY

ROOT = Path(__file__).parents[1]
TINY_CONFIG = PRESETS["tiny"]


def options(**given) -> TrainOptions:
    return TrainOptions(**{"data": "data", "out": "run", "preset": "tiny"} | given)


def test_what_is_not_given_is_the_presets():
    assert (options().config, options().recipe) == (TINY_CONFIG, TINY)
    assert options().data == Path("data") and options().out == Path("run") and options().init is None


def test_what_is_given_replaces_the_recipes_settings():
    recipe = options(
        steps=7, batch=6, learning_rate=0.5, accumulate=3, autoencoder_steps=2, autoencoder_learning_rate=0.25, seed=9
    ).recipe
    given = {"steps": 7, "batch": 6, "learning_rate": 0.5, "accumulate": 3, "seed": 9}
    assert recipe.denoiser == replace(TINY.denoiser, **given)
    assert recipe.autoencoder == replace(TINY.autoencoder, steps=2, learning_rate=0.25, seed=9)
    assert replace(recipe, denoiser=TINY.denoiser, autoencoder=TINY.autoencoder) == TINY


def test_a_config_and_a_recipe_can_be_given_instead_of_a_preset():
    config, recipe = PRESETS["uvit-tiny"], replace(TINY, repeats=3)
    made = options(config=config, recipe=recipe, steps=5)
    assert made.config == config and made.recipe == replace(recipe, denoiser=replace(TINY.denoiser, steps=5))


def test_every_preset_has_a_recipe():
    assert PRESETS.keys() == RECIPES.keys()
    for preset in PRESETS:
        autoencoder = "folder" if "image" in PRESETS[preset].codecs else None
        assert options(preset=preset, autoencoder=autoencoder).recipe.denoiser == RECIPES[preset].denoiser


def test_a_model_of_text_alone_needs_no_autoencoder_and_takes_none():
    assert options(preset="text").recipe.autoencoder is None
    with pytest.raises(InputError, match="^autoencoder: 'folder' is of no use to a model of text alone; leave it out"):
        options(preset="text", autoencoder="folder")


@pytest.mark.parametrize(
    ("argument", "value", "remedy"),
    [
        ("preset", "huge", "use one of coco256"),
        ("steps", 0, "from 1 to 1000000000"),
        ("steps", 10**9 + 1, "from 1 to 1000000000"),
        ("steps", 2.0, "whole number"),
        ("steps", True, "whole number"),
        ("batch", 65_537, "from 1 to 65536"),
        ("accumulate", -1, "from 1 to 65536"),
        ("accumulate", 3, "divisor of the batch of 8"),
        ("autoencoder_steps", 0, "whole number"),
        ("save_every", 0, "whole number"),
        ("save_every", None, "whole number"),
        ("keep", 0, "from 1 to 1000000000"),
        ("evaluate_every", 0, "from 1 to 1000000000"),
        ("evaluate_every", 300, "use a multiple of 250"),
        ("evaluate_samples", 100, "needs evaluate_every; give both"),
        ("lora", 0, "from 1 to 1024"),
        ("lora", 8, "give the checkpoint to adapt as init"),
        ("lora_alpha", 8.0, "give lora, the rank, too"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", math.nan, "above 0"),
        ("learning_rate", math.inf, "above 0"),
        ("learning_rate", "fast", "above 0"),
        ("autoencoder_learning_rate", 0.0, "above 0"),
        ("known_images", "folder", "give a list of them"),
        ("known_images", None, "give a list of them"),
        ("known_images", [5], "give a list of them"),
        ("seed", -1, "from 0 to 4294967295"),
        ("seed", 1 << 32, "from 0 to 4294967295"),
        ("dtype", "int8", "use one of auto"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_with_a_remedy(argument, value, remedy):
    with pytest.raises(InputError, match=remedy) as error:
        options(**{argument: value})
    assert error.value.argument == argument and repr(error.value.value) == repr(value)


def test_a_model_of_text_alone_has_no_scores_to_follow():
    with pytest.raises(InputError, match="^evaluate_every: 250 needs a model of images and texts; leave it out"):
        options(preset="text", evaluate_every=250)


@pytest.mark.parametrize("preset", ["text", "uvit-tiny", "uvit-emoji"])
def test_presets_that_never_know_a_whole_image_take_no_known_images(preset):
    with pytest.raises(InputError, match=f"^known_images: folder is of no use to {preset}.*; leave it out"):
        options(preset=preset, known_images=[Path("folder")])


def test_adapters_are_not_shared_among_processes(tmp_path):
    with pytest.raises(InputError, match="^fsdp: True conflicts with lora; leave out one of them"):
        options(init=tmp_path, lora=8, fsdp=True)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf, 1e300, True])
def test_alphas_that_no_adapter_may_have_are_refused(tmp_path, alpha):
    with pytest.raises(InputError, match="^lora_alpha: .* is out of range; use a number above 0, at most 1000000"):
        options(init=tmp_path, lora=8, lora_alpha=alpha)


def test_a_preset_without_an_autoencoder_needs_a_trained_one(tmp_path):
    with pytest.raises(InputError, match="^preset: 'coco256' needs a trained autoencoder; give autoencoder"):
        options(preset="coco256")
    weights = tmp_path / "nnet.pth"
    weights.touch()
    with pytest.raises(InputError, match="needs a trained autoencoder"):
        options(preset="coco256", init=weights)  # a file of U-ViT weights has no codecs
    assert options(preset="coco256", init=weights, autoencoder="hub/id").recipe.autoencoder is None
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    assert options(preset="coco256", init=checkpoint).init_has_codecs


def test_an_autoencoder_beside_a_checkpoint_to_start_from_is_refused(tmp_path):
    with pytest.raises(InputError, match="^autoencoder: 'other' conflicts with init, .*; leave out one"):
        options(init=tmp_path, autoencoder="other")


@pytest.mark.parametrize("autoencoder", [None, "hub/id"])
def test_what_a_run_cannot_start_from_is_refused_as_such_with_and_without_an_autoencoder(tmp_path, autoencoder):
    (tmp_path / "nnet_ema.pth").touch()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").touch()
    (adapter / "adapter_model.safetensors").touch()
    for init, says in (
        (tmp_path / "nnet.pth", "does not exist; give the folder of a checkpoint, or a file of U-ViT weights"),
        (Path("/dev/null"), "is neither a file nor a folder"),
        (adapter, "is a LoRA adapter; give the checkpoint it belongs to"),
        (tmp_path, r"is not a checkpoint of engine.train; give one of its files of weights \(nnet_ema.pth\)"),
    ):
        with pytest.raises(InputError, match=f"^init: {init} {says}"):
            options(preset="coco256", init=init, autoencoder=autoencoder)


def test_heads_are_for_a_file_of_weights_and_divide_the_width(tmp_path):
    weights, checkpoint = tmp_path / "nnet.pth", tmp_path / "checkpoint"
    weights.touch()
    checkpoint.mkdir()
    assert options(init=weights, init_heads=2).config.model.head_dim == 32  # tiny is 64 wide
    for init, heads, message in (
        (weights, 7, "7 does not divide the width; use a divisor of 64"),
        (weights, 0, "0 is out of range; use a whole number from 1 to 64"),
        (weights, 6.0, "6.0 is out of range"),
        (None, 3, "3 is for files of weights only; leave it out"),
        (checkpoint, 3, "3 is for files of weights only; leave it out"),
    ):
        with pytest.raises(InputError, match=f"^init_heads: {message}"):
            options(init=init, init_heads=heads)


def with_codecs(**kinds: str):
    """The tiny config with modalities of these names and kinds of codec."""
    modalities = tuple(Modality(name, 16, 4, depth=1) for name in kinds)
    codecs = {name: CodecConfig(kind) for name, kind in kinds.items()}
    model, sampling = replace(TINY_CONFIG.model, modalities=modalities), replace(TINY_CONFIG.sampling, order=())
    return replace(TINY_CONFIG, model=model, codecs=codecs, sampling=sampling)


def test_the_image_and_the_text_are_found_by_their_codecs():
    assert image_and_text(TINY_CONFIG) == ("image", "text")
    assert image_and_text(with_codecs(words="text", photo="image")) == ("photo", "words")
    assert image_and_text(with_codecs(words="text")) == (None, "words")


@pytest.mark.parametrize(
    "kinds",
    [
        {"image": "image"},
        {"text": "text", "title": "text"},
        {"image": "image", "text": "text", "sketch": "image"},
        {"image": "image", "sketch": "image"},
        {"image": "image", "text": "sound"},
    ],
    ids=str,
)
def test_a_model_of_other_modalities_is_refused(kinds):
    with pytest.raises(InputError, match="cannot be trained on images with captions; use a model with exactly one"):
        options(config=with_codecs(**kinds))


@pytest.mark.parametrize(
    ("codec", "is_sketch"),
    [
        (CodecConfig("image", "photo", {"size": 32}), True),
        (CodecConfig("image", "photo", {"size": 32, "scale": 0.7}), True),
        (CodecConfig("image", "photo", {"size": 64}), False),
        (CodecConfig("image", "", {"size": 32}), False),
        (CodecConfig("text", "words"), False),
    ],
)
def test_a_sketch_is_what_has_the_codec_of_the_image(codec, is_sketch):
    config = with_codecs(sketch="image", words="text", photo="image")
    codecs = {"sketch": codec, "words": CodecConfig("text"), "photo": CodecConfig("image", "", {"size": 32})}
    config = replace(config, codecs=codecs)
    assert sketch_of(config) == ("sketch" if is_sketch else None) and sketch_of(TINY_CONFIG) is None
    if is_sketch:
        assert image_and_text(config) == ("photo", "words")
    else:
        with pytest.raises(InputError, match="cannot be trained"):
            image_and_text(config)


def test_help_and_bad_options_import_no_torch():
    program = """if True:
        import sys
        from engine import train
        for arguments in (["--help"], ["--data", "data", "--out", "run", "--steps", "0"]):
            try:
                assert train.main(arguments) == 2
            except SystemExit as stop:
                assert stop.code == 0
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--steps: 0 is out of range" in done.stderr, done.stderr


WORDS = ("red", "blue", "car", "dog")
CAPTIONS = [["red car", "car"], ["blue dog"], ["dog"], ["red _ dog", "blue"]]


def codec() -> TextCodec:
    return TextCodec((END, *WORDS), torch.arange(5.0)[:, None].repeat(1, 8))  # a word's vector is its index


def examples(only_known: int = 0, **recipe) -> Examples:
    latents = torch.arange(10, 14).half()[:, None, None].expand(4, 16, 4).contiguous()  # of image i: 10 + i
    cache = LatentCache([latents[:, None]], CAPTIONS, only_known)
    return Examples(cache, codec(), TINY_CONFIG, replace(TINY, **recipe))


def batch_of(made: Examples, indices: list[int], seed: int = 0, known: torch.Tensor | None = None):
    """Clean data and token weights."""
    choice = made.choose(indices, torch.Generator().manual_seed(seed), known)
    return made.read(choice), made.token_weights(choice)


def drawn(made: Examples, seed: int = 0, times: int = 50) -> tuple[list[int], list[str], torch.Tensor | None]:
    """Images, captions and token weights of an epoch, drawn several times."""
    indices = list(range(len(made))) * times
    x0, weights = batch_of(made, indices, seed)
    image, text = (x0[:, part] for part in TINY_CONFIG.model.state_slices.values())
    assert x0.dtype == torch.float32 and (image == image[:, :1]).all()
    words = [[(END, *WORDS)[int(v)] for v in row[::8]] for row in text]
    return [int(v) - 10 for v in image[:, 0]], [" ".join(w for w in row if w != END) for row in words], weights


def test_an_image_comes_with_each_of_its_captions():
    images, captions, weights = drawn(examples())
    pairs = Counter(zip(images, captions, strict=True))
    assert set(pairs) == {(0, "red car"), (0, "car"), (1, "blue dog"), (2, "dog"), (3, "red dog"), (3, "blue")}
    assert 10 < pairs[0, "car"] < 40 and 10 < pairs[3, "blue"] < 40 and weights is None


def test_first_captions_are_drawn_as_often_as_the_recipe_says():
    assert set(drawn(examples(first_caption=1.0))[1]) == {"red car", "blue dog", "dog", "red dog"}
    pairs = Counter(drawn(examples(first_caption=0.5), times=400)[1])
    assert 0.65 < pairs["red car"] / (pairs["red car"] + pairs["car"]) < 0.85  # 0.5 + 0.5/2


def test_the_generator_decides_which_captions_are_drawn():
    assert drawn(examples(), seed=1)[1] == drawn(examples(), seed=1)[1] != drawn(examples(), seed=2)[1]


def test_most_known_images_are_taken_in_a_changed_version():
    own = torch.arange(10, 14).half()[:, None, None, None].expand(4, 1, 16, 4)  # of image i: 10 + i
    versions = torch.cat([own, own + 10, own + 20], dim=1)  # and its two changed versions, 20 + i and 30 + i
    made = Examples(LatentCache([versions[:3], versions[3:]], CAPTIONS), codec(), TINY_CONFIG, TINY)
    indices, known = [0, 1, 2, 3] * 100, torch.arange(400) % 8 < 4
    x0, _ = batch_of(made, indices, known=known)
    tens, image = (x0[:, 0] / 10).long(), (x0[:, 0] % 10).long()
    assert image.tolist() == indices
    assert (tens[~known] == 1).all()  # what is generated is never changed
    assert 100 < (tens[known] > 1).sum() < 190 and {2, 3} <= set(tens.tolist())
    choice = made.choose(indices, torch.Generator().manual_seed(0), known)
    assert torch.equal(torch.cat([made.read(choice, part) for part in (slice(0, 7), slice(7, 400))]), x0)
    assert (batch_of(made, indices)[0][:, 0] < 20).all()


def test_half_of_the_known_images_are_replaced_by_such_as_are_only_known():
    made = examples(only_known=2, repeats=3)
    assert set(made.epoch) == {0, 1} and set(made.only_known) == {2, 3} and len(made) == len(made.epoch)
    indices, known = list(range(len(made))) * 100, torch.arange(100 * len(made)) % 2 == 0
    choice = made.choose(indices, torch.Generator().manual_seed(0), known)
    chosen = torch.tensor(choice.images)
    assert (chosen[~known] < 2).all()  # what is generated is never one of them
    assert 0.4 < (chosen[known] >= 2).float().mean() < 0.6 and {2, 3} <= set(choice.images)
    for image, words in zip(choice.images, choice.words, strict=True):
        assert (made.captions[made.first_of[image] : made.first_of[image + 1]] == words).all(1).any()  # one of its own
    assert max(made.choose(indices, torch.Generator().manual_seed(0)).images) < 2


def texts(made: Examples, known: torch.Tensor) -> dict[bool, Counter]:
    """How often each text was chosen for images in turn, apart for known captions and for others."""
    choice = made.choose([0, 1, 2, 3] * (len(known) // 4), torch.Generator().manual_seed(0), known_texts=known)
    rows = made.read(choice)[:, TINY_CONFIG.model.state_slices["text"]]
    read = [" ".join((END, *WORDS)[int(v)] for v in row[::8] if v) for row in rows]
    return {flag: Counter(t for t, k in zip(read, known.tolist(), strict=True) if k == flag) for flag in (False, True)}


def test_the_words_of_known_captions_come_in_another_order_as_often_as_the_recipe_says():
    known = torch.arange(800) % 8 < 4
    found = texts(examples(reordered=0.5), known)
    assert set(found[False]) == {"red car", "car", "blue dog", "dog", "red dog", "blue"}  # generated: as they are
    assert set(found[True]) == set(found[False]) | {"car red", "dog blue", "dog red"}
    assert 10 < found[True]["dog blue"] < 40  # of about 100, half are drawn anew, half of these in the same order
    assert set(texts(examples(), known)[True]) == set(found[False])


def test_several_captions_of_an_image_are_joined_where_they_are_known():
    known = torch.arange(800) % 8 < 4
    found = texts(examples(joined=0.5), known)
    one = {"red car", "car", "blue dog", "dog", "red dog", "blue"}
    assert set(found[False]) == one
    assert one < set(found[True]) and {"red car car", "car red car", "red dog blue"} < set(found[True])
    assert 40 < found[True].total() - sum(found[True][text] for text in one) < 95  # two thirds of half of 200
    assert max(len(text.split()) for text in found[True]) <= 6


def test_captions_have_equal_weights_if_the_recipe_says_so():
    _, captions, weights = drawn(examples(captions_alike=True))
    image, text = weights[:, :16], weights[:, 16:]
    assert (image == 1).all() and torch.allclose(text.sum(1), torch.tensor(6.0))
    one, two = captions.index("car"), captions.index("red car")
    assert text[one, 0] == text[one, 1] > text[one, 2] and text[two, 2] > text[two, 3]


def test_images_of_rare_words_are_repeated_and_none_is_left_out():
    captions = ["ghost", *["person, tall"] * 3, *["person, short"] * 30, "", "Ghost house"]
    shown = Counter(with_repeats(captions, 4))
    assert set(shown) == set(range(len(captions)))
    assert shown[0] == 3 and shown[35] == 4  # two captions have "ghost", one has "house": 4/√2, 4/√1
    assert [shown[i] for i in (1, 4, 34)] == [2, 1, 1]  # 4/√3, 4/√30
    assert with_repeats(captions, 1) == list(range(len(captions)))


def test_the_repeats_are_the_recipes():
    images, _, _ = drawn(examples(repeats=4), times=1)
    # In first captions "car" and "blue" are once, "red" is twice, "dog" three times: 4/√1, 4/√1, 4/√3, 4/√2.
    assert Counter(images) == {0: 4, 1: 4, 2: 2, 3: 3}


def test_captions_are_shortened_to_what_the_model_takes():
    assert shortened("Red car, blue dog", 3) == "red car blue"
    assert shortened("red _ dog", 6) == "red dog" and shortened("?!", 6) == ""


def test_words_outside_the_vocabulary_are_refused():
    cache = LatentCache([torch.zeros(1, 1, 16, 4)], [["green"]])
    with pytest.raises(InputError, match="^data: 'green' is not in the vocabulary"):
        Examples(cache, TextCodec((END, *WORDS), torch.zeros(5, 8)), TINY_CONFIG, TINY)
