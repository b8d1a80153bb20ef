"""Calls: work of others, such as codecs, which the sampler's worker does between the steps of samples."""

import concurrent.futures

import pytest
import torch
from denoisers import SECONDS, gated, table

from engine.config import Modality, ModelConfig
from engine.sampling.batch import SampleSpec

MODEL = ModelConfig((Modality("image", 3, 2, depth=0),), shared_depth=1, dim=64)


def predict(inputs, times, outputs):
    return inputs * 0.5


def spec(steps):
    return SampleSpec(1, table(steps, 1), torch.ones(MODEL.size, dtype=torch.bool), torch.zeros(MODEL.size))


class Doubling:
    """Doubles numbers, refuses 13, has memory for so many at a time, and remembers its calls."""

    def __init__(self, most=100):
        self.most, self.calls = most, []

    def __call__(self, items):
        self.calls.append(list(items))
        if len(items) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if 13 in items:
            raise ZeroDivisionError("13")
        return [2 * item for item in items]


def calls_at_once(buckets, *posts):
    """The futures of (function, items), all of them posted while the worker is in a step."""
    with gated(predict, MODEL, *buckets) as (denoiser, sampler):
        run = sampler.submit([spec(2)])
        denoiser.wait()
        futures = [sampler.call(*post) for post in posts]
        denoiser.release()
        concurrent.futures.wait([*futures, run], SECONDS)
        assert all(future.done() for future in [*futures, run])
        assert len(denoiser.rows) == 2, "calls come between the steps of samples"
    return futures


def test_items_of_several_callers_go_into_one_call_and_each_gets_its_own():
    double, other = Doubling(), Doubling()
    posts = [(double, [1]), (other, [7]), (double, [2, 3]), (double, []), (double, (4,))]
    assert [f.result() for f in calls_at_once((1, 8), *posts)] == [[2], [14], [4, 6], [], [8]]
    assert double.calls == [[1, 2, 3, 4]] and other.calls == [[7]]


def test_a_call_takes_as_many_items_as_there_are_slots():
    double = Doubling()
    futures = calls_at_once((1, 3), (double, [1, 2]), (double, [3, 4, 5, 6, 7]))
    assert [f.result() for f in futures] == [[2, 4], [6, 8, 10, 12, 14]]
    assert double.calls == [[1, 2, 3], [4, 5, 6], [7]]


def test_an_error_hits_only_the_callers_whose_items_are_at_fault():
    double = Doubling()
    futures = calls_at_once((8,), (double, [1]), (double, [2, 13]), (double, [3]), (double, [13]))
    assert (futures[0].result(), futures[2].result()) == ([2], [6])
    for i in (1, 3):
        with pytest.raises(ZeroDivisionError, match="13"):
            futures[i].result()
    assert double.calls == [[1, 2, 13, 3, 13], [1], [2, 13], [3], [13]]


def test_a_call_that_runs_out_of_memory_takes_half_as_many_items():
    double = Doubling(most=2)
    (future,) = calls_at_once((8,), (double, [1, 2, 3, 4, 5, 6, 7]))
    assert future.result() == [2, 4, 6, 8, 10, 12, 14]
    assert [len(items) for items in double.calls] == [7, 3, 1, 1, 1, 1, 1, 1, 1]


def test_a_call_that_runs_out_of_memory_with_one_item_raises():
    (future,) = calls_at_once((8,), (Doubling(most=0), [1, 2]))
    with pytest.raises(torch.OutOfMemoryError):
        future.result()


def test_a_cancelled_call_is_not_made():
    double = Doubling()
    with gated(predict, MODEL, 1) as (denoiser, sampler):
        run = sampler.submit([spec(3)])
        denoiser.wait()
        cancelled, kept = sampler.call(double, [1]), sampler.call(double, [2])
        assert cancelled.cancel()
        denoiser.release()
        assert kept.result(SECONDS) == [4] and double.calls == [[2]]
        run.result(SECONDS)


def test_a_function_that_loses_items_fails_its_callers_and_nobody_else():
    short, double = (lambda items: items[1:]), Doubling()
    futures = calls_at_once((8,), (short, [1, 2]), (double, [3]), (lambda items: [], [4]))
    assert futures[1].result() == [6]
    for i in (0, 2):
        with pytest.raises(AssertionError, match="items"):
            futures[i].result()
