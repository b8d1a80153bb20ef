"""The bill of the paper's run: the arithmetic of its exchange and of its steps; its page is what the command writes."""

import pytest

from benchmarks import bill
from benchmarks.bill import BUCKET, HOP, LINKS, NVLINK, SHARE
from engine.presets import PRESETS

MODEL = PRESETS["coco256"].model
FAST, SLOW = LINKS
VALUES = 10 * BUCKET // 4  # of ten buckets


@pytest.fixture
def plain(monkeypatch):
    """A sample takes 1 ms forward and 2 ms backward, a step 4 ms besides, whatever its size."""
    monkeypatch.setattr(bill, "compute_seconds", lambda model, batch, at: (1e-3 * batch, 2e-3 * batch + 4e-3))
    monkeypatch.setattr(bill, "parameters", lambda model: VALUES)


def test_a_ring_sends_each_part_twice_and_sharding_gathers_weights_twice():
    assert bill.exchange_bytes(1, 1000) == 0
    assert bill.exchange_bytes(2, 1000) == 4000  # half of it in each of two rounds
    assert bill.exchange_bytes(8, 1000) == pytest.approx(2 * 7 / 8 * 4000)
    assert bill.exchange_bytes(8, 1000, sharded=True) == pytest.approx(7 / 8 * (2000 + 2000 + 4000))


def test_an_exchange_is_as_slow_as_its_slowest_link():
    for count, bandwidth in ((8, NVLINK), (16, SLOW.between)):
        seconds = bill.exchange_bytes(count, VALUES) / (SHARE * bandwidth) + 10 * 2 * HOP * {8: 3, 16: 4}[count]
        assert bill.exchange_seconds(count, VALUES, SLOW) == pytest.approx(seconds)
    assert bill.exchange_seconds(1, VALUES, SLOW) == 0


def test_an_exchange_costs_what_the_backward_pass_does_not_cover(plain):
    assert bill.step_seconds(MODEL, 64, 1, FAST, 1.0) == pytest.approx(64 * 3e-3 + 4e-3)
    hidden, shown = (bill.exchange_seconds(count, VALUES, SLOW) for count in (8, 64))
    assert bill.step_seconds(MODEL, 64, 8, SLOW, 2.0) == pytest.approx(2 * (8 * 3e-3 + 4e-3) + hidden / 10)
    assert shown > 6e-3  # than the backward pass of the one sample that is left to each
    assert bill.step_seconds(MODEL, 64, 64, SLOW, 1.0) == pytest.approx(7e-3 + shown - 6e-3)


def test_scaling_stops_where_a_gpu_does_less_than_half(plain):
    count = bill.stops_at(MODEL, 64, FAST, 1.0)
    alone = bill.step_seconds(MODEL, 64, 1, FAST, 1.0)
    shares = [alone / n / bill.step_seconds(MODEL, 64, n, FAST, 1.0) for n in (count // 2, count)]
    assert shares[0] > 0.5 >= shares[1]


def test_memory_is_the_state_and_the_samples(plain, monkeypatch):
    monkeypatch.setattr(bill, "saved_bytes", lambda model: 1000)
    assert bill.memory_bytes(MODEL, 3) == 22 * VALUES + 3000
    assert bill.memory_bytes(MODEL, 3, 11, sharded=True) == 2 * VALUES + 3000


def test_gloo_times_lie_on_a_line():
    measured = {"bytes": [100, 300], "seconds": [1.0, 2.0]}
    assert [bill.gloo_seconds(measured, size) for size in (100, 200, 500)] == [1.0, 1.5, 3.0]
