"""Scores of a checkpoint: what perfect and spoilt answers get, and the command line around it."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import PRESETS
from engine.data.coco import CaptionedImage
from engine.evaluate import Gallery, Scores, evaluate, main, word_f1
from engine.request import Request

NAMES = ["cat: red", "cat: blue", "big dog", "sun and moon", "flag", "red heart"]
SIZE = PRESETS["tiny"].image.size

Pairs = list[tuple[CaptionedImage, torch.Tensor]]


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("red cat", "red cat", 1.0),
        ("cat red", "Cat: red!", 1.0),  # order, case and punctuation do not count
        ("red", "red cat", 2 / 3),
        ("red cat sun moon", "red cat", 2 / 3),
        ("red red", "red cat", 0.5),  # a word said twice is right once
        ("sun", "red cat", 0.0),
        ("", "red cat", 0.0),
        ("", "", 0.0),
    ],
)
def test_word_f1(text, reference, score):
    assert word_f1(text, reference) == pytest.approx(score)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """Pictures of noise: each is far from all others."""
    pictures = np.random.default_rng(0).integers(0, 256, (len(NAMES), 3, SIZE, SIZE), np.uint8)
    items = [CaptionedImage(i, Path(f"{i}.png"), (name, "another caption")) for i, name in enumerate(NAMES)]
    return list(zip(items, map(torch.from_numpy, pictures), strict=True))


class KnowingEngine:
    """Knows every picture and its name; `draw` and `tell` spoil its answers."""

    config = PRESETS["tiny"]
    device = torch.device("cpu")
    image = SimpleNamespace(encode=lambda pixels: pixels, decode=lambda tokens: tokens + 0.02)

    def __init__(self, pairs: Pairs, draw: Callable = lambda image, words: image, tell: Callable = lambda words: words):
        self.pictures = {
            item.captions[0].replace(":", ""): Image.fromarray(picture.permute(1, 2, 0).numpy())
            for item, picture in pairs
        }
        self.draw, self.tell, self.requests = draw, tell, []

    def generate(self, requests: list[Request]) -> list[SimpleNamespace]:
        self.requests += requests
        return [SimpleNamespace(samples=[self.answer(request)]) for request in requests]

    def answer(self, request: Request) -> SimpleNamespace:
        if request.prompt is not None:
            picture = self.draw(self.pictures[request.prompt], request.prompt)
            return SimpleNamespace(image=picture, text=request.prompt)
        words = next(words for words, picture in self.pictures.items() if picture == request.image)
        return SimpleNamespace(image=request.image, text=self.tell(words))


def test_perfect_answers_score_full_marks(pairs):
    engine = KnowingEngine(pairs)
    scores = evaluate(engine, pairs, Gallery.of(pairs), steps=3, seed=5)
    assert (scores.count, scores.retrieval_base, scores.retrieval_exact) == (6, 1.0, 1.0)
    assert (scores.word_f1, scores.caption_exact, scores.infill_rmse) == (1.0, 1.0, 0.0)
    assert scores.autoencoder_psnr == pytest.approx(40, abs=1e-3), "an error of 0.02 in −1..1 is 0.01 of the range"
    assert {request.steps for request in engine.requests} == {3}
    assert [request.seed for request in engine.requests] == [5, 6, 7, 8, 9, 10] * 3


def test_a_variant_of_the_wanted_picture_counts_for_its_base_name_only(pairs):
    def swap(image: Image.Image, words: str) -> Image.Image:
        return engine.pictures[{"cat red": "cat blue", "big dog": "flag"}.get(words, words)]

    engine = KnowingEngine(pairs, swap)
    scores = evaluate(engine, pairs, Gallery.of(pairs), steps=1, seed=0)
    assert (scores.retrieval_base, scores.retrieval_exact) == (pytest.approx(5 / 6), pytest.approx(4 / 6))


def test_pictures_are_found_by_their_nearest_of_the_gallery(pairs):
    """The gallery holds more than is asked for, and what is drawn is in it only nearly."""
    engine = KnowingEngine(pairs, lambda image, words: Image.eval(image, lambda level: level // 2 + 60))
    scores = evaluate(engine, pairs[2:4], Gallery.of(pairs), steps=1, seed=0)
    assert (scores.count, scores.retrieval_exact) == (2, 1.0)


def test_wrong_words_and_wrong_pixels_cost(pairs):
    engine = KnowingEngine(pairs, lambda image, _: Image.eval(image, lambda level: level ^ 8), lambda _: "cat")
    scores = evaluate(engine, pairs, Gallery.of(pairs), steps=1, seed=0)
    assert scores.infill_rmse == pytest.approx(8, abs=1e-3), "levels of 0…255"
    assert (scores.word_f1, scores.caption_exact) == (pytest.approx(2 * (2 / 3) / 6), 0.0)


def test_infilling_is_judged_inside_the_mask_only(pairs):
    def spoil_the_right(image: Image.Image, _: str) -> Image.Image:
        image = image.copy()
        image.paste("black", (SIZE // 2, 0, SIZE, SIZE))
        return image

    engine = KnowingEngine(pairs, spoil_the_right)
    assert evaluate(engine, pairs, Gallery.of(pairs), steps=1, seed=0).infill_rmse == 0.0
    masks = [np.asarray(request.mask) for request in engine.requests if request.mask is not None]
    assert len(masks) == 6
    assert all((mask[:, : SIZE // 2] == 255).all() and not mask[:, SIZE // 2 :].any() for mask in masks)


@pytest.fixture
def data(tmp_path, pairs) -> Path:
    """A data set of four pictures to train on and two held out."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for item, picture in pairs:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / "images" / item.path)
    for file, part in (("captions.json", pairs[:4]), ("captions_test.json", pairs[4:])):
        images = [{"id": item.image_id, "file_name": item.path.name} for item, _ in part]
        annotations = [{"image_id": item.image_id, "caption": item.captions[0]} for item, _ in part]
        (folder / file).write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize(("count", "counts"), [(0, (2, 2)), (1, (1, 1)), (3, (3, 2)), (99, (4, 2))])
def test_both_splits_are_scored_at_equal_counts_as_far_as_they_reach(capsys, tiny_checkpoint, data, count, counts):
    arguments = ("--checkpoint", tiny_checkpoint, "--data", data, "--count", count, "--steps", 1, "--json")
    code, out, err = run(capsys, *arguments)
    scores = json.loads(out)
    assert (code, err, list(scores)) == (0, "", ["train", "test"])
    assert (scores["train"]["count"], scores["test"]["count"]) == counts
    for split in scores.values():
        assert set(split) == {field.name for field in fields(Scores)}
        assert 0 <= split["retrieval_exact"] <= split["retrieval_base"] <= 1 and 0 <= split["word_f1"] <= 1


def test_without_json_a_table_is_printed(capsys, tiny_checkpoint, data):
    code, out, _ = run(capsys, "--checkpoint", tiny_checkpoint, "--data", data, "--steps", 1)
    lines = [line.split() for line in out.splitlines()]
    assert (code, lines[0]) == (0, ["train", "test"])
    assert [line[0] for line in lines[1:]] == [field.name for field in fields(Scores)]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("count", -1),
        ("count", "all"),
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
    assert err.startswith("python -m engine.evaluate: ") and f"--{option}" in err and str(value) in err
    assert any(f"; {remedy}" in err for remedy in ("use ", "give ", "see --help"))


def test_bad_numbers_are_refused_before_the_model_is_loaded(capsys, monkeypatch, data):
    monkeypatch.setattr("engine.evaluate.Engine.from_pretrained", lambda *_, **__: pytest.fail("worked in vain"))
    assert run(capsys, "--data", data, "--steps", 0)[0] == 2


def test_a_split_of_damaged_pictures_only_is_refused(capsys, tiny_checkpoint, data):
    for name in ("4.png", "5.png"):
        (data / "images" / name).write_bytes(b"")
    code, out, err = run(capsys, "--checkpoint", tiny_checkpoint, "--data", data)
    assert (code, out, err.count("\n")) == (2, "", 1) and "--data: no test picture" in err
