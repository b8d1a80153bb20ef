"""Flows: generators that wait for futures of the worker without holding a thread."""

import concurrent.futures
import threading
from concurrent.futures import Future

import pytest
from denoisers import SECONDS

from engine.sampling.worker import drive, finish_future


def test_settling_a_cancelled_future_tells_who_waits():
    future = Future()
    future.cancel()
    finish_future(future, 1)
    assert future.cancelled() and concurrent.futures.wait([future], SECONDS).done == {future}


def test_a_flow_goes_on_with_the_results_it_waits_for():
    first, second, seen = Future(), Future(), []

    def flow():
        seen.append((yield first))
        seen.append((yield second))
        return seen + ["end"]

    future = drive(flow())
    second.set_result(2)
    assert not future.done() and seen == []
    first.set_result(1)
    assert future.result(0) == [1, 2, "end"]


def test_what_a_flow_waits_for_raises_in_it_and_what_it_raises_ends_its_future():
    waited, caught = Future(), []

    def flow():
        try:
            yield waited
        except ZeroDivisionError as error:
            caught.append(error)
        raise KeyError("flow")

    future = drive(flow())
    waited.set_exception(ZeroDivisionError())
    assert len(caught) == 1
    with pytest.raises(KeyError, match="flow"):
        future.result(0)


def test_a_flow_that_fails_or_returns_at_once_ends_its_future():
    def fails():
        raise KeyError("at once")
        yield

    def returns():
        return 5
        yield

    assert drive(returns()).result(0) == 5
    with pytest.raises(KeyError, match="at once"):
        drive(fails()).result(0)


def test_cancelling_a_flow_cancels_what_it_waits_for_and_closes_it():
    first, second, events = Future(), Future(), []

    def flow():
        try:
            yield first
            events.append("first")
            yield second
            events.append("second")
        finally:
            events.append("closed")

    future = drive(flow())
    first.set_result(None)
    assert future.cancel() and second.cancelled() and events == ["first", "closed"]
    assert concurrent.futures.wait([future], SECONDS).done == {future}


def test_a_flow_whose_future_is_cancelled_while_it_works_stops_at_what_it_would_wait_for():
    first, second, events = Future(), Future(), []

    def flow():
        yield first
        future.cancel()
        events.append("works on")
        yield second
        events.append("never")

    future = drive(flow())
    first.set_result(None)
    assert future.cancelled() and second.cancelled() and events == ["works on"]


def test_a_flow_is_cancelled_with_what_it_waits_for():
    waited = Future()

    def flow():
        yield waited

    future = drive(flow())
    waited.cancel()
    assert future.cancelled() and concurrent.futures.wait([future], SECONDS).done == {future}


@pytest.mark.parametrize("error", [None, KeyError("late")])
def test_a_flow_that_ends_after_it_was_cancelled_stays_cancelled(error):
    waited = Future()

    def flow():
        yield waited
        future.cancel()
        if error is not None:
            raise error

    future = drive(flow())
    waited.set_result(None)
    assert future.cancelled() and concurrent.futures.wait([future], SECONDS).done == {future}


def test_flows_go_on_in_the_thread_that_ends_what_they_wait_for():
    threads = []

    def flow(waited):
        yield waited
        threads.append(threading.current_thread())

    first, second = Future(), Future()
    futures = drive(flow(first)), drive(flow(second))
    other = threading.Thread(target=second.set_result, args=(None,))
    other.start()
    other.join()
    first.set_result(None)
    assert [future.result(0) for future in futures] == [None, None]
    assert threads == [other, threading.current_thread()]
