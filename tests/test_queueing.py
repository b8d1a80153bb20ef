"""The simulation that predicts what batching between steps gains."""

import random

import pytest

from benchmarks.queueing import STEPS, arrivals, latencies, p95_ratio


@pytest.mark.parametrize(
    ("by_step", "most", "ended"),
    [
        (True, 2, [4.0, 4.0]),  # the second enters at 1 s; two steps of two samples follow
        (False, 2, [3.0, 5.0]),
        (True, 1, [3.0, 5.0]),
    ],
)
def test_requests_enter_between_steps_or_between_batches(by_step, most, ended):
    """Three steps from 0 s and two from 0.5 s; a step takes 1 s for one sample and 1.5 s for two."""
    assert latencies([0.0, 0.5], [3, 2], 0.5, 0.5, most, by_step).tolist() == pytest.approx([ended[0], ended[1] - 0.5])


def test_a_batch_ends_with_its_longest_request():
    assert latencies([0.0, 0.0], [1, 3], 0.5, 0.5, 2, by_step=False).tolist() == pytest.approx([3.5, 3.5])
    assert latencies([0.0, 0.0], [1, 3], 0.5, 0.5, 2, by_step=True).tolist() == pytest.approx([1.5, 3.5])


def test_batching_between_steps_gains_the_more_the_less_a_further_sample_costs():
    plays = []
    for seed in range(4):
        draw = random.Random(seed)
        arrived = arrivals(0.05, 20_000, draw)
        plays.append((arrived, [draw.choice(STEPS) for _ in arrived]))
    ratios = [p95_ratio(plays, a, 1.0 - a, most=8) for a in (0.0, 0.5, 0.9)]
    assert ratios[2] < ratios[1] < ratios[0]


def test_requests_arrive_at_the_given_rate():
    assert len(arrivals(2.0, 5000.0, random.Random(0))) == pytest.approx(10_000, rel=0.05)
