"""Scores of captions and of features: against pycocoevalcap's and torchmetrics' numbers, and on cases done by hand."""

import json
import math
from itertools import product

import numpy as np
import pytest
import torch

from engine.errors import InputError
from engine.metrics.captions import bleu, bleu_counts, caption_words, cider, distinct, rouge_l
from engine.metrics.frechet import Statistics, frechet_distance, pair_distances
from engine.metrics.language_models import ranked
from engine.metrics.n_gram import END, START, KneserNey
from engine.metrics.scores import Bootstrap

CAPTIONS = [
    "A man's dog runs across the snow-covered field.",
    "two people on a bench, eating ice cream",
    "The red bus doesn't stop at the corner",
    "a cat",
    "A kitchen with a stove and a sink and a stove and a sink",
    "purple bicycles hang from the ceiling of a shop",
]
REFERENCES = [
    ["A dog runs through a snow-covered field.", "The man's dog is running in the snow.", "A brown dog outside"],
    ["Two people are sitting on a bench eating ice cream.", "A couple eats ice cream on a park bench"],
    ["A red bus that doesn't stop at a corner.", "The double-decker bus drives past the corner of Main St."],
    ["A cat sleeps on a chair.", "A small cat lying on top of a wooden chair", "The cat's asleep!"],
    ["A kitchen with a stove, a sink and a window", "A small kitchen has a sink and a stove."],
    ["Bicycles hanging from the ceiling in a shop", "Several bikes on display at a store"],
]


def caption_scores(captions, references) -> list[float]:
    counts = bleu_counts(captions, references)
    others = [rouge_l(captions, references).mean(), cider(captions, references).mean()]
    return [*(bleu(counts, n) for n in (1, 2, 3, 4)), *others]


def test_caption_scores_are_those_of_pycocoevalcap():
    """Computed by pycocoevalcap 1.2: PTBTokenizer on both sides, then Bleu(4), Rouge and Cider."""
    expected = [0.8235294117, 0.6897948923, 0.5548400375, 0.4477428010, 0.6976820741, 2.3279123945]
    assert caption_scores(CAPTIONS, REFERENCES) == pytest.approx(expected, rel=1e-9)


def test_caption_scores_of_coco_are_those_of_pycocoevalcap(shared):
    """The first caption against the other four, of the 500 images with the lowest ids; the tokenizers differ in two."""
    captions: dict[int, list[str]] = {}
    for entry in json.loads((shared / "data/coco/captions_val2017.json").read_text())["annotations"]:
        captions.setdefault(entry["image_id"], []).append(entry["caption"])
    chosen = [captions[i] for i in sorted(captions)][:500]
    expected = [0.6494586234, 0.4535813450, 0.3099804725, 0.2059981535, 0.4820678705, 0.9499887377]
    found = caption_scores([first for first, *_ in chosen], [others for _, *others in chosen])
    assert found == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("The man's T-shirt, (red).", "the man 's t-shirt red"),
        ("They don’t, can't and cannot; they're", "they do n't ca n't and can not they 're"),
        ("at 12:43 for 1,000 people & dogs... ", "at 12:43 for 1,000 people & dogs"),
        ("U.S. flag on Main St.", "u.s. flag on main st."),
        ("...!?", ""),
    ],
)
def test_words_are_those_of_the_penn_treebank(caption, words):
    assert caption_words(caption) == words.split()


def test_bleu_counts_clipped_n_grams_and_punishes_brevity():
    def bleu4(captions, references):
        return bleu(bleu_counts(captions, references))

    assert bleu4(["a red car on a road"], [["a red car on a road", "something else"]]) == pytest.approx(1)
    assert bleu4(["the the the the the"], [["the cat sat on the mat"]]) == 0
    # 1-grams 6/6, 2-grams 4/5, 3-grams 3/4, 4-grams 2/3; as long as the nearest reference
    expected = (4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert bleu4(["a b c d e a"], [["a b c d e", "x a a y z w"]]) == pytest.approx(expected, rel=1e-6)
    assert bleu4(["a b c d"], [["a b c d e f"]]) == pytest.approx(math.exp(1 - 6 / 4))


def test_empty_captions_score_nothing():
    assert caption_scores(["", ""], [["a cat"], ["the dog", "a dog"]]) == [0] * 6
    assert distinct([""], 1) == 0
    assert distinct(["a cat", "a dog"], 1) == 3 / 4 and distinct(["a cat", "a dog"], 2) == 1


def test_an_n_gram_model_gives_probabilities_that_add_up_to_one():
    sentences = [line.split() for line in ("a red cat sat", "a red dog sat", "the cat ran", "a red cat ran", "a cat")]
    for order in (1, 2, 3):
        model = KneserNey(sentences, order)
        words = [*sorted(model.vocabulary), "unseen"]
        for context in product([START, "a", "red", "cat", "unseen"], repeat=2):
            assert math.fsum(model.probability(word, context) for word in words) == pytest.approx(1), (order, context)


def test_an_n_gram_model_is_less_surprised_by_what_it_has_learned():
    model = KneserNey([line.split() for line in ("a red cat sat", "a red dog sat", "the cat ran", "the dog ran")])
    assert model.probability(END, ["cat", "sat"]) > 0.5 > model.probability("red", ["cat", "sat"]) > 0

    def perplexity(sentence):
        nats, words = model.surprise(sentence.split())
        assert words == len(sentence.split()) + 1
        return math.exp(nats / words)

    assert perplexity("a red cat sat") < perplexity("the red dog ran") < perplexity("ran ran a a") < perplexity("x y z")


def test_the_frechet_distance_is_that_of_the_fitted_gaussians():
    def distance(x, y):
        return frechet_distance(Statistics.of(x), Statistics.of(y))

    x = torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 2]])  # mean 1, covariance 4/3
    assert distance(x, x) == pytest.approx(0, abs=1e-9)
    assert distance(x, x + 3) == pytest.approx(18)
    assert distance(x, 2 * x) == pytest.approx(2 + 2 * (2 - 1) ** 2 * 4 / 3)
    skew = torch.tensor([[1.0, 2], [3, 1], [0, 5], [2, 2], [7, 1]])
    assert distance(x, skew) == pytest.approx(distance(skew, x))
    with pytest.raises(InputError, match="count"):
        distance(x[:1], x)


def test_the_frechet_distance_is_that_of_torchmetrics():
    """Of torchmetrics 1.9's FrechetInceptionDistance with a network that flattens [n, 3, 2, 2] of uint8."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (100, 12), generator=generator)
    y = (torch.randint(0, 200, (80, 12), generator=generator) + x[:80].flip(1)) // 2
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(12306.45595, rel=1e-8)


def test_statistics_of_parts_are_those_of_all():
    x = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    for parts in (x.split(300), x.split(999), [x]):
        found = Statistics.of(iter(parts))
        assert found.count == 1000
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.covariance, x.T.cov(), rtol=1e-9, atol=1e-9)


def test_pairs_are_never_of_a_sample_with_itself():
    x = torch.arange(5.0)[:, None]
    distances = pair_distances(x, 50, torch.Generator().manual_seed(0))
    assert distances.shape == (5, 50) and distances.min() == 1
    assert set(distances[0].tolist()) == {1, 2, 3, 4}


def test_ranks_count_the_images_and_texts_that_fit_better():
    unit = torch.eye(3)
    images = torch.stack([unit[0], unit[2], unit[1], unit[2]])
    found = ranked(images, torch.stack([unit[0], unit[2], unit[1]]), torch.tensor([0, 1, 1, 2]))
    assert found.agreement.tolist() == [100, 100, 0, 0]
    assert found.text_rank.tolist() == [0, 0, 1, 1], "images 2 and 3 fit each other's text"
    assert found.image_rank.tolist() == [0, 0, 0, 1], "either image of text 1 is a right answer"


def test_an_interval_holds_the_mean_as_often_as_it_says():
    generator, held = np.random.default_rng(0), 0
    for seed in range(100):
        score = Bootstrap(100, seed).mean(generator.normal(3, 1, 50))
        held += score.low <= 3 <= score.high
    assert 88 <= held <= 98


def test_the_interval_of_a_biased_statistic_is_around_its_value():
    values = np.arange(100)
    score = Bootstrap(50).score(100, lambda indices: len(set(values[indices])), biased=True)
    assert (score.value, score.count) == (100, 100) and score.high - 100 == pytest.approx(100 - score.low)
    assert (
        Bootstrap(50, 1).score(100, np.mean)
        == Bootstrap(50, 1).score(100, np.mean)
        != Bootstrap(50).score(100, np.mean)
    )
    assert Bootstrap(0).mean(values) == Bootstrap(200).score(100, lambda _: 49.5)
