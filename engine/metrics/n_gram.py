"""An n-gram language model, interpolated Kneser-Ney, for the perplexity of generated captions. Imports no torch."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

START, END = "<s>", "</s>"


class KneserNey:
    """Interpolated Kneser-Ney with one discount an order (Ney et al. 1994; Chen and Goodman 1999).

    sentences  lists of words, at least one
    order      n of the n-grams

    Of the words that no sentence has, each has the same probability as any other: the uniform one of one word more than
    the vocabulary, which unigrams are interpolated with.
    """

    def __init__(self, sentences: Iterable[Sequence[str]], order: int = 3):
        self.order = order
        counts: list[Counter] = [Counter() for _ in range(order)]  # by n − 1
        for words in sentences:
            padded = [START] * (order - 1) + [*words, END]
            counts[-1].update(tuple(padded[i : i + order]) for i in range(len(padded) - order + 1))
        for n in range(order - 1, 0, -1):  # of lower orders: how many words an n-gram follows
            counts[n - 1] = Counter(gram[1:] for gram in counts[n])
        self.vocabulary = {gram[0] for gram in counts[0]}  # with END
        self._counts = counts
        self._totals: list[dict] = []  # by n − 1 and context: occurrences, and different words that follow
        self._types: list[dict] = []
        for of_n in counts:
            totals, types = defaultdict(int), defaultdict(int)
            for gram, number in of_n.items():
                totals[gram[:-1]] += number
                types[gram[:-1]] += 1
            self._totals.append(totals)
            self._types.append(types)
        self._discounts = [_discount(of_n) for of_n in counts]

    def probability(self, word: str, context: Sequence[str]) -> float:
        """P(word | the last words before it), `order` − 1 or fewer; START stands before a sentence's first."""
        p = 1 / (len(self.vocabulary) + 1)
        for n in range(1, min(self.order, len(context) + 1) + 1):
            before = tuple(context[len(context) - n + 1 :])
            total = self._totals[n - 1].get(before)
            if not total:  # the longer ones do not occur either
                break
            discount = self._discounts[n - 1]
            own = max(self._counts[n - 1][(*before, word)] - discount, 0) / total
            p = own + discount * self._types[n - 1][before] / total * p
        return p

    def surprise(self, words: Sequence[str]) -> tuple[float, int]:
        """Negative log probability of a sentence in nats, and its words with the end."""
        padded = [START] * (self.order - 1) + [*words, END]
        total = 0.0
        for i in range(self.order - 1, len(padded)):
            total -= math.log(self.probability(padded[i], padded[i - self.order + 1 : i]))
        return total, len(words) + 1


def _discount(counts: Counter) -> float:
    """n₁ / (n₁ + 2·n₂) of the n-grams that occur once and twice, at least 0.1 where all are frequent."""
    of_count = Counter(counts.values())
    once, twice = of_count[1], of_count[2]
    return max(0.1, once / (once + 2 * twice)) if once else 0.1
