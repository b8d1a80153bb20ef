"""BLEU, ROUGE-L and CIDEr of captions, as pycocoevalcap computes them for MS-COCO, and distinct n-grams.

Every score is computed from numbers of single captions, so that resamples of captions are cheap. Imports no torch.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

MAX_N = 4
CIDER_SIGMA = 6.0  # of the penalty for another length, in words
ROUGE_BETA = 1.2

# As the Penn Treebank tokenizer of pycocoevalcap, lower-case and without punctuation: "man's" is two words, "t-shirt"
# one. Of the 25,014 captions of MS-COCO's val2017 it tokenises 11 in another way (rare abbreviations).
SPLIT = re.compile(r"(?<=\w)(?=n't\b)|(?<=\w)(?='(?:s|re|ve|ll|d|m)\b)|(?<=\bcan)(?=not\b)")
WORD = re.compile(
    r"n't\b|'(?:s|re|ve|ll|d|m)\b|(?:[^\W\d_]\.){2,}|(?:st|mr|mrs|ms|dr|jr|ave|blvd)\.(?!\w)"
    r"|[^\W_]+(?:(?:[-/.:']|(?<=\d),(?=\d))[^\W_]+)*|[#&$%@*+=]"
)


def caption_words(caption: str) -> list[str]:
    """The words of a caption, as the scores count them."""
    return WORD.findall(SPLIT.sub(" ", caption.lower().replace("’", "'")))


def n_grams(words: Sequence[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu_counts(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """[n, 10] of captions with one or more references each: matches and n-grams for n = 1…4, length, reference length.

    Matches are clipped to the most of any one reference; the reference length is the one nearest to the caption's.
    """
    rows = []
    for caption, of_caption in zip(captions, references, strict=True):
        words, others = caption_words(caption), [caption_words(r) for r in of_caption]
        matches, totals = [], []
        for n in range(1, MAX_N + 1):
            grams, allowed = n_grams(words, n), Counter()
            for other in others:
                allowed |= n_grams(other, n)
            matches.append((grams & allowed).total())
            totals.append(grams.total())
        nearest = min((len(other) for other in others), key=lambda m: (abs(m - len(words)), m))
        rows.append([*matches, *totals, len(words), nearest])
    return np.array(rows, np.float64)


def bleu(counts: np.ndarray, n: int = MAX_N) -> float:
    """Corpus BLEU-n without smoothing, 0…1, of rows of `bleu_counts` (Papineni et al. 2002)."""
    total = counts.sum(0)
    matches, grams, length, reference_length = total[:n], total[MAX_N : MAX_N + n], total[-2], total[-1]
    if not matches.all():
        return 0.0
    return math.exp(np.log(matches / grams).mean() + min(0.0, 1 - reference_length / length))


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """ROUGE-L [n], 0…1: F of the highest precision and the highest recall of the references' longest common
    subsequences with a caption, β = 1.2 (Lin 2004)."""
    scores = []
    for caption, of_caption in zip(captions, references, strict=True):
        words, precision, recall = caption_words(caption), 0.0, 0.0
        for other in map(caption_words, of_caption):
            common = _common_subsequence(words, other)
            precision = max(precision, common / max(1, len(words)))
            recall = max(recall, common / max(1, len(other)))
        both = recall + ROUGE_BETA**2 * precision
        scores.append((1 + ROUGE_BETA**2) * precision * recall / both if both else 0.0)
    return np.array(scores)


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D [n], 0…10, which MS-COCO calls CIDEr (Vedantam et al. 2015); document frequencies of the references."""
    frequencies: Counter = Counter()  # in how many captions' references an n-gram is
    wanted = [[_all_n_grams(reference) for reference in of_caption] for of_caption in references]
    for of_caption in wanted:
        frequencies.update(set().union(*of_caption))
    log_count = math.log(len(captions))

    def vector(grams: Counter) -> tuple[list[dict], list[float], int]:
        """TF-IDF weights and their norm for each n, and the length in bigrams."""
        weights: list[dict] = [{} for _ in range(MAX_N)]
        for gram, number in grams.items():
            weights[len(gram) - 1][gram] = number * (log_count - math.log(max(1, frequencies[gram])))
        norms = [math.sqrt(sum(w * w for w in of_n.values())) for of_n in weights]
        return weights, norms, sum(number for gram, number in grams.items() if len(gram) == 2)

    scores = []
    for caption, of_caption in zip(captions, wanted, strict=True):
        weights, norms, length = vector(_all_n_grams(caption))
        total = 0.0
        for reference in of_caption:
            others, other_norms, other_length = vector(reference)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * CIDER_SIGMA**2))
            for n in range(MAX_N):
                product = sum(min(w, others[n].get(g, 0.0)) * others[n].get(g, 0.0) for g, w in weights[n].items())
                scale = norms[n] * other_norms[n]
                total += penalty * (product / scale if scale else product)
        scores.append(10 * total / MAX_N / len(of_caption))
    return np.array(scores)


def _all_n_grams(caption: str) -> Counter:
    words = caption_words(caption)
    return sum((n_grams(words, n) for n in range(1, MAX_N + 1)), Counter())


def distinct(captions: Sequence[str], n: int) -> float:
    """Different n-grams as a part of all, 0…1 (Li et al. 2016, 1510.03055); 0 without any."""
    return distinct_share(n_grams(caption_words(caption), n) for caption in captions)


def distinct_share(grams: Iterable[Counter]) -> float:
    """`distinct` of the n-grams of each caption."""
    together: Counter = Counter()
    for of_caption in grams:
        together.update(of_caption)  # in place: `sum` would copy all n-grams for every caption
    return len(together) / together.total() if together else 0.0
