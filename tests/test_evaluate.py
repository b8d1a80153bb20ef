"""Scores of a checkpoint: those of perfect and of spoilt answers, and the command line."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import UViTConfig
from engine.data.captioned import CaptionedImage
from engine.data.disturb import DISTURBANCES
from engine.errors import InputError
from engine.evaluate import main
from engine.evaluation import (
    Gallery,
    JointScores,
    NameScores,
    Pairs,
    Scores,
    SketchScores,
    edge_f1,
    evaluate,
    evaluate_disturbed,
    evaluate_joint,
    evaluated_modalities,
    skipped_tasks,
    word_f1,
)
from engine.presets import PRESETS
from engine.request import Request

NAMES = ["cat: red", "cat: blue", "big dog", "sun and moon", "red heart", "flag"]
KEYWORDS = [("pet",), ("pet",), ("dog", "pet"), ("sky",), ("love",), ()]  # further captions
TINY = PRESETS["tiny"]
SIZE = TINY.codecs["image"].settings["size"]


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("red cat", "red cat", 1.0),
        ("cat red", "Cat: red!", 1.0),  # order, case and punctuation do not count
        ("red", "red cat", 2 / 3),
        ("red cat sun moon", "red cat", 2 / 3),
        ("red red", "red cat", 0.5),  # a repeated word counts once
        ("sun", "red cat", 0.0),
        ("", "red cat", 0.0),
        ("", "", 0.0),
    ],
)
def test_word_f1(text, reference, score):
    assert word_f1(text, reference) == pytest.approx(score)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """Images of noise: each is far from all others."""
    images = np.random.default_rng(0).integers(0, 256, (len(NAMES), 3, SIZE, SIZE), np.uint8)
    items = [CaptionedImage(i, Path(f"{i}.png"), (name, *KEYWORDS[i])) for i, name in enumerate(NAMES)]
    return list(zip(items, map(torch.from_numpy, images), strict=True))


class OracleEngine:
    """Knows every image and its name; `draw` and `describe` spoil its answers. Joint samples are the pairs in turn."""

    config = TINY
    device = torch.device("cpu")
    codecs = {
        "image": SimpleNamespace(
            build=lambda: None, encode_pixels=lambda pixels: pixels, decode_pixels=lambda tokens: tokens + 0.02
        )
    }

    def __init__(
        self, pairs: Pairs, draw: Callable = lambda image, words: image, describe: Callable = lambda words: words
    ):
        self.images = {
            item.captions[0].replace(":", ""): Image.fromarray(pixels.permute(1, 2, 0).numpy())
            for item, pixels in pairs
        }
        self.named = {word: item.captions[0].replace(":", "") for item, _ in pairs for word in item.captions[1:]}
        self.draw, self.describe, self.requests = draw, describe, []

    def generate(self, requests: list[Request]) -> list[SimpleNamespace]:
        self.requests += requests
        order = ("text", "image")
        return [SimpleNamespace(samples=[*map(self.answer, [r] * r.num, range(r.num))], order=order) for r in requests]

    def in_any_order(self, text: str) -> str:
        return next(words for words in self.images if sorted(words.split()) == sorted(text.split()))

    def answer(self, request: Request, i: int) -> SimpleNamespace:
        text, image = request.given.get("text"), request.given.get("image")
        if not request.given:
            words = list(self.images)[(request.seed + i) % len(self.images)]
            outputs = {"image": self.draw(self.images[words], words), "text": self.describe(words)}
        elif text is not None:
            words = self.named.get(text) or (text if text in self.images else self.in_any_order(text))
            outputs = {"image": self.draw(self.images[words], words), "text": text}
        else:
            words = next((words for words, known in self.images.items() if known == image), None)
            outputs = {"image": image, "text": self.describe(words) if words else ""}
        return SimpleNamespace(outputs=outputs)


def test_perfect_answers_have_perfect_scores(pairs):
    engine = OracleEngine(pairs)
    scores = evaluate(engine, pairs, Gallery.of(pairs), Request(steps=3, seed=5))
    assert (scores.count, scores.retrieval_base, scores.retrieval_exact) == (6, 1.0, 1.0)
    assert (scores.word_f1, scores.caption_exact, scores.infill_rmse) == (1.0, 1.0, 0.0)
    assert scores.autoencoder_psnr == pytest.approx(40, abs=1e-3), "an error of 0.02 in −1..1 is 0.01 of the range"
    assert {request.steps for request in engine.requests} == {3}
    seeds = [5, 6, 7, 8, 9, 10]  # of names, of reordered ones, of keywords, which one image lacks, and of two tasks
    assert [request.seed for request in engine.requests] == [*seeds, *seeds, *seeds[:5], *seeds, *seeds]


def test_prompts_whose_words_are_in_another_order_have_a_score_of_their_own(pairs):
    engine = OracleEngine(pairs)
    engine.in_any_order = lambda text: "flag"
    scores = evaluate(engine, pairs, Gallery.of(pairs), Request(steps=1, seed=0))
    same = [name.replace(":", "") for name in NAMES if len(name.split()) == 1]
    assert scores.retrieval_exact == 1.0 and len(same) / len(NAMES) <= scores.reordered_exact < 1.0
    again = evaluate(engine, pairs, Gallery.of(pairs), Request(steps=1, seed=9))
    assert again.reordered_exact == scores.reordered_exact
    assert evaluate(OracleEngine(pairs), pairs, Gallery.of(pairs), Request(steps=1)).reordered_exact == 1.0


def test_prompts_of_keywords_count_if_the_nearest_image_has_the_keyword_too(pairs):
    engine = OracleEngine(pairs)
    engine.named = {"pet": "cat red", "dog": "cat red", "sky": "sun and moon", "love": "flag"}
    scores = evaluate(engine, pairs, Gallery.of(pairs), Request(steps=1, seed=0))
    keywords = [request.inputs["text"] for request in engine.requests[12:17]]
    assert [keywords[i] for i in (0, 1, 3, 4)] == ["pet", "pet", "sky", "love"] and keywords[2] in KEYWORDS[2]
    assert scores.keyword_retrieval == pytest.approx((3 + (keywords[2] == "pet")) / 5)  # "flag" has no keyword
    assert scores.classes["compositions"].keyword_retrieval == 1.0
    flag = [pair for pair in pairs if pair[0].captions == ("flag",)]
    assert evaluate(engine, flag, Gallery.of(pairs), Request(steps=1, seed=0)).keyword_retrieval is None


def test_a_variant_of_the_wanted_image_counts_for_its_base_name_only(pairs):
    def swap(image: Image.Image, words: str) -> Image.Image:
        return engine.images[{"cat red": "cat blue", "big dog": "flag"}.get(words, words)]

    engine = OracleEngine(pairs, swap)
    scores = evaluate(engine, pairs, Gallery.of(pairs), Request(steps=1, seed=0))
    assert (scores.retrieval_base, scores.retrieval_exact) == (pytest.approx(5 / 6), pytest.approx(4 / 6))


def test_the_nearest_image_of_the_gallery_is_found(pairs):
    """The gallery holds more than is evaluated, and the generated images differ a little from those in it."""
    engine = OracleEngine(pairs, lambda image, words: Image.eval(image, lambda level: level // 2 + 60))
    scores = evaluate(engine, pairs[2:4], Gallery.of(pairs), Request(steps=1, seed=0))
    assert (scores.count, scores.retrieval_exact) == (2, 1.0)


def test_scores_are_also_means_over_each_class_of_names(pairs):
    """Of the names, two are compositions; "flag" without a colon is an object."""
    engine = OracleEngine(pairs, describe=lambda words: "cat red" if "cat" in words else "")
    classes = evaluate(engine, pairs, Gallery.of(pairs), Request(steps=1, seed=0)).classes
    assert classes == {
        "compositions": NameScores(2, 1.0, 1.0, 1.0, 1.0, word_f1=0.75, caption_exact=0.5),
        "objects": NameScores(4, 1.0, 1.0, 1.0, 1.0, word_f1=0.0, caption_exact=0.0),
    }


def test_changed_images_are_described_as_often_as_there_are_changes(pairs):
    """The oracle knows an image by its pixels, and says nothing of one that it does not know."""
    images = [(item, Image.fromarray(pixels.permute(1, 2, 0).numpy())) for item, pixels in pairs]
    engine = OracleEngine(pairs)
    scores = evaluate_disturbed(engine, images, Request(steps=3, seed=5))
    assert scores.keys() == DISTURBANCES.keys()
    unchanged = {"grey background", "bicubic"}  # of opaque images of the model's size
    for label, of_images in scores.items():
        expected = float(label in unchanged)
        assert of_images == {"word_f1": expected, "caption_exact": expected}, label
    assert [request.seed for request in engine.requests] == [5, 6, 7, 8, 9, 10] * len(DISTURBANCES)
    engine.config = predicting("image")
    assert evaluate_disturbed(engine, images, Request(steps=1, seed=0)) is None


def test_wrong_words_and_wrong_pixels_lower_the_scores(pairs):
    engine = OracleEngine(pairs, lambda image, _: Image.eval(image, lambda level: level ^ 8), lambda _: "cat")
    scores = evaluate(engine, pairs, Gallery.of(pairs), Request(steps=1, seed=0))
    assert scores.infill_rmse == pytest.approx(8, abs=1e-3), "levels of 0…255"
    assert (scores.word_f1, scores.caption_exact) == (pytest.approx(2 * (2 / 3) / 6), 0.0)


def test_infilling_is_evaluated_inside_the_mask_only(pairs):
    def spoil_the_right(image: Image.Image, _: str) -> Image.Image:
        image = image.copy()
        image.paste("black", (SIZE // 2, 0, SIZE, SIZE))
        return image

    engine = OracleEngine(pairs, spoil_the_right)
    assert evaluate(engine, pairs, Gallery.of(pairs), Request(steps=1, seed=0)).infill_rmse == 0.0
    masks = [np.asarray(request.given_masks["image"]) for request in engine.requests if request.given_masks]
    assert len(masks) == 6
    assert all((mask[:, : SIZE // 2] == 255).all() and not mask[:, SIZE // 2 :].any() for mask in masks)


def test_joint_samples_whose_text_names_their_image_agree(pairs):
    engine = OracleEngine(pairs)
    scores = evaluate_joint(engine, Gallery.of(pairs), Request(steps=3, seed=2), count=4)
    expected = {"count": 4, "seed": 2, "order": ("text", "image"), "word_f1": 1.0, "distinct_images": 4}
    assert vars(scores) == expected | {"nearest_rmse": pytest.approx(0, abs=0.1)}
    assert [(r.num, r.seed, r.steps, r.given) for r in engine.requests] == [(4, 2, 3, {})]


def test_the_distance_of_joint_samples_to_the_nearest_image_is_in_levels(pairs):
    engine = OracleEngine(pairs, lambda image, _: Image.eval(image, lambda level: level ^ 8))
    scores = evaluate_joint(engine, Gallery.of(pairs), Request(steps=1, seed=0), count=6)
    assert scores.nearest_rmse == pytest.approx(8, abs=0.05) and scores.distinct_images == 6


def test_64_joint_samples_are_compared_unless_told_otherwise(pairs):
    assert evaluate_joint(OracleEngine(pairs), Gallery.of(pairs), Request(steps=1, seed=0)).count == 64


def test_many_joint_samples_have_seeds_that_count_up(pairs):
    engine = OracleEngine(pairs)
    scores = evaluate_joint(engine, Gallery.of(pairs), Request(steps=1, seed=7), count=600)
    assert [(r.num, r.seed) for r in engine.requests] == [(256, 7), (256, 263), (88, 519)]
    assert (scores.count, scores.distinct_images) == (600, 6)


def test_joint_samples_whose_text_names_another_image_disagree(pairs):
    """Each image is the first one, each text its own: they share words with "cat: red" by their own F1."""
    engine = OracleEngine(pairs, lambda image, _: next(iter(engine.images.values())))
    scores = evaluate_joint(engine, Gallery.of(pairs), Request(steps=1, seed=0), count=6)
    expected = [word_f1(words, "cat: red") for words in engine.images]
    assert scores.word_f1 == pytest.approx(sum(expected) / 6) and 0 < scores.word_f1 < 0.5
    assert scores.distinct_images == 1


def test_joint_samples_are_compared_with_the_first_caption_of_the_nearest_image(pairs):
    engine = OracleEngine(pairs, describe=lambda _: "another text")
    assert evaluate_joint(engine, Gallery.of(pairs), Request(steps=1, seed=0), count=6).word_f1 == 0.0


def predicting(*predicted: str, modalities: tuple[str, ...] = ("image", "text")):
    """A U-ViT's config that predicts some of its modalities; the others are conditions."""
    base = PRESETS["uvit-tiny"]
    of_name = {m.name: m for m in base.model.modalities}
    model = replace(
        base.model,
        modalities=tuple(replace(of_name.get(name, of_name["image"]), name=name) for name in modalities),
        uvit=UViTConfig(timed=predicted, predicted=predicted),
    )
    codecs = {name: base.codecs.get(name, base.codecs["image"]) for name in modalities}
    times = "conditional" if len(predicted) < len(modalities) else "independent"
    diffusion = replace(base.diffusion, time_sampling=times)
    return replace(base, model=model, codecs=codecs, diffusion=diffusion, sampling=replace(base.sampling, order=()))


@pytest.mark.parametrize(
    ("config", "skipped"),
    [
        (TINY, {}),
        (predicting("image"), {"image-to-text": "not predict text", "joint": "not predict text"}),
        (
            predicting("text"),
            {"text-to-image": "not predict image", "infill": "not predict image", "joint": "not predict image"},
        ),
        (predicting("sketch", "image", "text", modalities=("sketch", "image", "text")), {}),
        (
            predicting("image", "text", modalities=("sketch", "image", "text")),
            {"joint": "not predict sketch"}
            | dict.fromkeys(("text-to-image", "image-to-text", "infill"), "needs sketch to be given"),
        ),
    ],
    ids=["all predicted", "text given", "image given", "a third one predicted", "a third one given"],
)
def test_what_a_model_cannot_do_is_skipped_with_the_reason(config, skipped):
    reasons = skipped_tasks(config)
    assert reasons.keys() == skipped.keys()
    assert all(part in reasons[task] for task, part in skipped.items())


def test_skipped_tasks_are_not_requested_and_have_no_scores(pairs):
    engine = OracleEngine(pairs)
    engine.config = predicting("image")
    scores = evaluate(engine, pairs, Gallery.of(pairs), Request(steps=1, seed=0))
    assert (scores.word_f1, scores.caption_exact) == (None, None)
    assert (scores.retrieval_exact, scores.infill_rmse, round(scores.autoencoder_psnr)) == (1.0, 0.0, 40)
    assert all("text" in request.given for request in engine.requests)
    assert evaluate_joint(engine, Gallery.of(pairs), Request(steps=1, seed=0)) is None
    engine.config = predicting("text")
    scores = evaluate(engine, pairs, Gallery.of(pairs), Request(steps=1, seed=0))
    assert (scores.retrieval_base, scores.retrieval_exact, scores.reordered_exact) == (None, None, None)
    assert scores.keyword_retrieval is None
    assert scores.infill_rmse is None
    assert scores.word_f1 == 1.0


def test_of_several_images_the_one_named_image_is_evaluated_else_the_first():
    config = predicting("image", "text", modalities=("sketch", "image", "text"))
    assert evaluated_modalities(config) == ("image", "text")
    config = predicting("text", "sketch", modalities=("sketch", "photo", "text"))
    assert evaluated_modalities(config) == ("sketch", "text")
    with pytest.raises(InputError, match="^checkpoint: .* has no modality with codec 'text'; give a model"):
        evaluated_modalities(predicting("image", "sketch", modalities=("image", "sketch")))


@pytest.fixture
def data(tmp_path, pairs) -> Path:
    """A data set of four training images and two held-out ones."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for item, pixels in pairs:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / "images" / item.path)
    for file, part in (("captions.json", pairs[:4]), ("captions_test.json", pairs[4:])):
        images = [{"id": item.image_id, "file_name": item.path.name} for item, _ in part]
        annotations = [{"image_id": item.image_id, "caption": text} for item, _ in part for text in item.captions]
        (folder / file).write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize(("count", "counts"), [(0, (2, 2)), (1, (1, 1)), (3, (3, 2)), (99, (4, 2))])
def test_both_splits_are_scored_on_as_many_names_if_they_have_them(capsys, tiny_checkpoint, data, count, counts):
    arguments = ("--checkpoint", tiny_checkpoint, "--data", data, "--count", count, "--steps", 1, "--json")
    code, out, err = run(capsys, *arguments, "--joint-count", 3, "--seed", 4)
    scores = json.loads(out)
    assert (code, err, list(scores)) == (0, "", ["train", "test", "joint", "skipped"])
    assert (scores["train"]["count"], scores["test"]["count"]) == counts
    for split in (scores["train"], scores["test"]):
        assert set(split) == {field.name for field in fields(Scores)} | {"disturbed"}
        assert split["disturbed"].keys() == DISTURBANCES.keys()
        assert 0 <= split["retrieval_exact"] <= split["retrieval_base"] <= 1 and 0 <= split["word_f1"] <= 1
    joint = scores["joint"]
    assert set(joint) == {field.name for field in fields(JointScores)} and scores["skipped"] == {}
    assert (joint["count"], joint["seed"], joint["order"]) == (3, 4, ["text", "image"])
    assert 0 <= joint["word_f1"] <= 1 <= joint["distinct_images"] <= 3


def test_without_json_a_table_is_printed(capsys, tiny_checkpoint, data):
    arguments = ("--checkpoint", tiny_checkpoint, "--data", data, "--steps", 1, "--joint-count", 2)
    code, out, _ = run(capsys, *arguments, "--count", 4)
    tables = [[line.split() for line in table.splitlines()] for table in out.split("\n\n")]
    assert (code, tables[0][0]) == (0, ["train", "test"])
    assert [line[0] for line in tables[0][1:]] == [f.name for f in fields(Scores) if f.name != "classes"]
    assert [" ".join(table[0]) for table in tables[1:-1]] == [
        "train by class of name",
        "train images changed",
        "test images changed",  # both of its names are objects
    ]
    assert [line[:2] for line in tables[1][2:]] == [["compositions", "2"], ["objects", "2"]]
    assert len(tables[2]) == len(tables[3]) == 2 + len(DISTURBANCES)
    assert out.splitlines()[-1].startswith("2 joint samples (order text, image, seed 0): word_f1 ")


def test_joint_samples_can_be_left_out(capsys, tiny_checkpoint, data):
    arguments = ("--checkpoint", tiny_checkpoint, "--data", data, "--steps", 1, "--joint-count", 0)
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0 and json.loads(out)["joint"] is None
    out = run(capsys, *arguments, "--no-disturbed")[1]
    assert "joint" not in out and "changed" not in out


def test_a_model_of_three_modalities_is_evaluated(capsys, three_modality_checkpoint, data):
    arguments = ("--data", data, "--count", 1, "--steps", 1, "--joint-count", 2, "--json")
    code, out, _ = run(capsys, "--checkpoint", three_modality_checkpoint, *arguments)
    scores = json.loads(out)
    assert (code, scores["skipped"], scores["joint"]["order"]) == (0, {}, ["text", "sketch", "image"])
    assert all(value is not None for split in ("train", "test") for value in scores[split].values())
    for split in ("train", "test"):
        sketch = scores[split]["sketch"]
        assert set(sketch) == {field.name for field in fields(SketchScores)} and sketch["count"] == 1
        assert all(0 <= value <= 1 for value in sketch.values())
    out = run(capsys, "--checkpoint", three_modality_checkpoint, *arguments[:-1], "--no-disturbed")[1]
    heads = [line.split() for line in out.splitlines()[out.splitlines().index("train sketches") + 1 :][:2]]
    assert heads[0] == [f.name for f in fields(SketchScores)][1:] and heads[1][:3] == ["of", "1", "images"]


def test_drawings_agree_where_their_lines_are_at_most_a_pixel_apart():
    def drawing(*columns):
        image = Image.new("RGB", (20, 10), "white")
        for column in columns:
            image.paste("black", (column, 0, column + 1, 10))
        return image

    line = drawing(5)
    assert [edge_f1(line, drawing(column)) for column in (4, 5, 6, 7)] == [1, 1, 1, 0]
    assert edge_f1(line, drawing(5, 10)) == edge_f1(drawing(5, 10), line) == pytest.approx(2 / 3)
    assert (edge_f1(drawing(), drawing()), edge_f1(line, drawing()), edge_f1(drawing(), line)) == (1, 0, 0)


def test_what_is_skipped_is_said(capsys, monkeypatch, pairs, data):
    engine = OracleEngine(pairs)
    engine.config = predicting("image")
    monkeypatch.setattr("engine.evaluate.Engine.from_pretrained", lambda *_, **__: nullcontext(engine))
    code, out, _ = run(capsys, "--data", data, "--steps", 1)
    lines = out.splitlines()
    assert code == 0 and lines[6].split() == ["word_f1", "-", "-"]
    assert lines[-2:] == [
        "image-to-text skipped: the model does not predict text",
        "joint skipped: the model does not predict text",
    ]
    code, out, _ = run(capsys, "--data", data, "--steps", 1, "--json")
    report = json.loads(out)
    assert report["test"]["word_f1"] is None and report["joint"] is None
    assert report["skipped"].keys() == {"image-to-text", "joint"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("count", -1),
        ("count", "all"),
        ("joint-count", -1),
        ("steps", 0),
        ("seed", -1),
        ("device", "x"),
        ("dtype", "x"),
        ("checkpoint", "none"),
        ("checkpoint", ""),
        ("checkpoint", "x" * 5000),
        ("data", "no"),
        ("data", ""),
        ("data", "x" * 5000),
        ("ste", 1),
    ],
    ids=lambda part: str(part)[:10],
)
def test_bad_options_are_refused_in_one_line(capsys, tiny_checkpoint, data, option, value):
    options = {"checkpoint": tiny_checkpoint, "data": data, "steps": 1} | {option: value}
    code, out, err = run(capsys, *(word for name, value in options.items() for word in (f"--{name}", value)))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("python -m engine.evaluate: ") and f"--{option}" in err and str(value)[:40] in err
    assert any(f"; {remedy}" in err for remedy in ("use ", "give ", "see --help"))


def test_bad_numbers_are_refused_before_the_model_is_loaded(capsys, monkeypatch, data):
    monkeypatch.setattr("engine.evaluate.Engine.from_pretrained", lambda *_, **__: pytest.fail("loaded the model"))
    assert run(capsys, "--data", data, "--steps", 0)[0] == 2


def test_a_split_without_an_intact_image_is_refused(capsys, tiny_checkpoint, data):
    for name in ("4.png", "5.png"):
        (data / "images" / name).write_bytes(b"")
    code, out, err = run(capsys, "--checkpoint", tiny_checkpoint, "--data", data)
    assert (code, out, err.count("\n")) == (2, "", 1) and f"--data: {data} has no readable test image" in err
