"""The sampler's random numbers: published answers, moments, independence, and which draw is used where."""

import pytest
import torch
from denoisers import initial_noise

from engine.kernels import philox
from engine.kernels.philox import DROP_STREAM, normals, philox_4x32

# Random123's published known-answer vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, result):
    assert philox_4x32(words(counter), words(key)) == words(result)


def many(seed=3, draw=0, stream=0, size=200_000):
    return normals(torch.tensor([seed]), torch.tensor([draw]), stream, size)


def test_normals_have_the_moments_of_a_standard_normal():
    for values in many():
        values = values[0].double()
        assert abs(values.mean()) < 0.01
        assert abs(values.var() - 1) < 0.02
        assert abs((values**3).mean()) < 0.03
        assert abs((values**4).mean() - 3) < 0.1
        assert values.isfinite().all()


def test_normals_are_independent_across_element_draw_stream_seed_and_each_other():
    first, second = many()
    others = [
        second, first.roll(1, 1), many(seed=4)[0], many(seed=3 + 2**32)[0], many(draw=1)[0], many(stream=1)[0],
        many(draw=1, stream=1)[0],
    ]  # fmt: skip
    for other in others:
        correlation = (first * other).mean()
        assert abs(correlation) < 0.01, correlation
        assert not torch.equal(first, other)


def test_all_64_bits_of_a_seed_count_and_its_sign_bit_is_a_bit():
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**32, 2**40])
    noise = initial_noise(seeds, 64)
    assert noise.isfinite().all()
    assert len({tuple(row) for row in noise.tolist()}) == len(seeds)


def test_extreme_random_bits_give_finite_normals(monkeypatch):
    for word in (0, 0xFFFFFFFF):
        monkeypatch.setattr(philox, "philox_4x32", lambda *_, word=word: (torch.tensor([[word]]),) * 4)
        for values in many(size=1):
            assert values.isfinite().all()


def test_samples_draw_the_same_noise_alone_as_together():
    seeds, draw = torch.tensor([5, -8]), torch.tensor([0, 4])
    together = normals(seeds, draw, DROP_STREAM + 1, 9)
    for i in range(2):
        alone = normals(seeds[i : i + 1], draw[i : i + 1], DROP_STREAM + 1, 9)
        assert all(torch.equal(one, both[i : i + 1]) for one, both in zip(alone, together, strict=True))
