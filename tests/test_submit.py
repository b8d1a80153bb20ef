"""Several callers of one `Engine`: futures, progress, threads and cancelling."""

import asyncio
import random
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed, wait

import pytest
from engine_cases import ENDLESS, STEPS, assert_same, noise

from engine import Engine, Request
from engine.errors import InputError


def started(engine: Engine, request: Request = ENDLESS):
    """A future of a request whose first step is done."""
    under_way = threading.Event()
    future = engine.submit(request, lambda *_: under_way.set())
    assert under_way.wait(30)
    return future


# ------------------------------------------------------------------------------------------------- results


def test_a_future_has_the_result_of_generate(engine, mixed, alone):
    futures = [engine.submit(request) for request in mixed]
    for future, expected in zip(futures, alone, strict=True):
        assert_same(future.result(60), expected)
        assert future.done() and not future.cancelled() and future.exception() is None
    for found, expected in zip(engine.submit(mixed).result(60), alone, strict=True):
        assert_same(found, expected)
    assert engine.submit([]).result(60) == []


def test_a_done_callback_gets_the_result(engine, mixed, alone):
    arrived = threading.Event()
    future = engine.submit(mixed[1])
    future.add_done_callback(lambda _: arrived.set())
    assert arrived.wait(60)
    assert_same(future.result(), alone[1])


def test_asyncio_waits_for_many_and_cancels_some(engine, mixed, alone):
    async def gather():
        endless = asyncio.wrap_future(started(engine))
        results = await asyncio.gather(*(asyncio.wrap_future(engine.submit(request)) for request in mixed))
        assert not endless.done()
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(engine.submit(ENDLESS)), 0.05)
        return results

    for found, expected in zip(asyncio.run(gather()), alone, strict=True):
        assert_same(found, expected)
    assert_same(engine.generate(mixed[0]), alone[0])


@pytest.mark.parametrize("bad", [{"prompt": "purple"}, {"image": "missing.png"}, {"order": ("sound",)}], ids=str)
def test_a_bad_request_is_refused_by_submit_itself(engine, bad):
    before, calls = engine.stats().forwards, []
    with pytest.raises(InputError):
        engine.submit([Request(), Request(**bad)], lambda *progress: calls.append(progress))
    assert engine.generate(Request(steps=1, order="together")) and engine.stats().forwards == before + 1 and not calls


# ------------------------------------------------------------------------------------------------- progress


def test_progress_counts_every_step_to_the_end(tiny_checkpoint):
    calls = []
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=2) as engine:
        requests = [Request(num=3, steps=2, order="together"), Request(prompt="red", steps=5)]
        engine.generate(requests, lambda done, total: calls.append((done, total)))
    assert calls == [(done, 11) for done in (2, 4, 6, 8, 10, 11)], "5 steps and 2 + 2 + 2 beside them"


def test_each_modality_of_an_order_takes_all_steps(engine):
    calls = []
    engine.generate(Request(num=2, steps=3), lambda *progress: calls.append(progress))
    assert calls == [(done, 12) for done in (2, 4, 6, 8, 10, 12)]


def test_a_slow_callback_sees_every_count_in_its_own_thread(engine):
    counts, threads = [], set()

    def slow(done: int, total: int) -> None:
        counts.append(done)
        threads.add(threading.current_thread())
        time.sleep(0.002)

    engine.generate(Request(prompt="red", steps=50), slow)
    assert counts == list(range(1, 51)) and threads == {threading.current_thread()}


def test_a_slow_callback_holds_nobody_up(engine, mixed, alone):
    """`generate` waits for its caller's callback; the engine does not."""
    entered, leave = threading.Event(), threading.Event()

    def stuck(done: int, total: int) -> None:
        entered.set()
        assert leave.wait(60)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.generate, mixed[0], stuck)
        assert entered.wait(60)
        assert_same(engine.generate(mixed[1]), alone[1])
        leave.set()
        assert_same(waiting.result(60), alone[0])


def test_raising_from_the_callback_cancels_and_leaves_the_engine_usable(engine, mixed, alone):
    class Cancelled(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        if done >= 20:
            raise Cancelled

    with pytest.raises(Cancelled):
        engine.generate(mixed, cancel)
    assert_same(engine.generate(mixed[0]), alone[0], rounding=0)


def test_what_progress_raises_the_future_raises_and_no_other(engine, mixed, alone):
    def fail(done: int, total: int) -> None:
        raise LookupError("mine")

    failing, other = engine.submit(ENDLESS, fail), engine.submit(mixed[0])
    with pytest.raises(LookupError, match="mine"):
        failing.result(60)
    assert_same(other.result(60), alone[0])


# ------------------------------------------------------------------------------------------------- threads


def test_threads_share_the_slots_and_get_what_they_get_alone(engine, mixed, alone):
    start, before = threading.Barrier(4), engine.stats()

    def generate(i: int):
        calls = []
        start.wait()
        result = engine.generate(mixed[i], lambda *progress: calls.append(progress))
        return result, calls

    with ThreadPoolExecutor(4) as pool:
        for i, (found, calls) in enumerate(pool.map(generate, range(4))):
            assert_same(found, alone[i])
            assert calls == sorted(set(calls)) and calls[-1][0] == calls[-1][1]
    after = engine.stats()
    assert after.samples - before.samples == 7
    assert 8 <= after.forwards - before.forwards <= 8 + 2 + 5 + STEPS


def test_a_thread_that_cancels_leaves_the_others_alone(engine, mixed, alone):
    entered = threading.Event()

    def cancel(done: int, total: int) -> None:
        entered.set()
        raise KeyboardInterrupt

    def cancelled() -> None:
        with pytest.raises(KeyboardInterrupt):
            engine.generate(mixed[2], cancel)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cancelled)
        entered.wait()
        assert_same(engine.generate(mixed[0]), alone[0])
        waiting.result()


def test_engines_made_in_threads_work_side_by_side(tiny_checkpoint, mixed, alone):
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: Engine.from_pretrained(tiny_checkpoint, dtype="float32"), range(2)))
        for found in pool.map(lambda engine: engine.generate(mixed), made):
            for result, expected in zip(found, alone, strict=True):
                assert_same(result, expected)
    first, second = made
    first.close()
    assert_same(second.generate(mixed[1]), alone[1], rounding=0)
    second.close()


# ------------------------------------------------------------------------------------------------- cancelling


def test_a_cancelled_future_is_done_at_once_and_frees_its_slots(engine, mixed, alone):
    future = started(engine)
    assert future.cancel() and future.cancelled() and future.done()
    with pytest.raises(CancelledError):
        future.result(60)
    assert wait([future], 60).done == {future}, "those who wait are told"
    assert [*as_completed([future], 60)] == [future]
    before = engine.stats().forwards
    assert_same(engine.generate(mixed[0]), alone[0], rounding=0)
    assert engine.stats().forwards <= before + 8 + 1, "nothing else is computed, but for the step that was under way"


def test_a_future_that_is_done_cannot_be_cancelled(engine, mixed, alone):
    future = engine.submit(mixed[1])
    future.result(60)
    assert not future.cancel() and not future.cancelled()
    assert_same(future.result(), alone[1])


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_cancelling_while_a_codec_works_affects_no_other_request(own, alone, mixed, monkeypatch, kind):
    engine, _ = own
    codec, entered, leave = engine.codecs["image"], threading.Event(), threading.Event()
    work = getattr(codec, kind)

    def slow(*arguments):
        entered.set()
        assert leave.wait(60)
        return work(*arguments)

    monkeypatch.setattr(codec, kind, slow)
    first, second = engine.submit(mixed[4]), engine.submit(mixed[2])
    assert entered.wait(60) and first.cancel() and first.cancelled()
    leave.set()
    assert_same(second.result(60), alone[2])


def test_a_thousand_cancels_at_random_moments_disturb_nobody(engine, mixed, alone):
    moments, began = random.Random(0), time.perf_counter()
    kinds = [Request(num=2, steps=3), Request("red _", noise(), steps=2), Request(image=noise(1), num=3, steps=1)]
    stop, results = threading.Event(), []

    def generate_undisturbed() -> None:
        while not stop.is_set():
            results.append((i := len(results) % 3, engine.generate(mixed[i])))

    def cancel_250() -> None:
        cancelled = 0
        while cancelled < 250:
            future = engine.submit(kinds[cancelled % 3])
            time.sleep(moments.choice([0, 0, 0.001, 0.005, 0.02]))
            cancelled += future.cancel()  # not counted where it came too late

    with ThreadPoolExecutor(5) as pool:
        undisturbed = pool.submit(generate_undisturbed)
        for cancelling in [pool.submit(cancel_250) for _ in range(4)]:
            cancelling.result(60)
        stop.set()
        undisturbed.result(60)
    assert len(results) > 3
    for i, result in results:
        assert_same(result, alone[i])
    before = engine.stats().forwards
    assert_same(engine.generate(mixed[0]), alone[0], rounding=0)
    assert engine.stats().forwards <= before + 9, "no sample of a cancelled request is left"
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize("where", ["progress", "callback"])
@pytest.mark.parametrize("wait", ["generate", "warmup"])
def test_waiting_for_the_engine_on_its_own_thread_is_refused_and_submitting_is_not(engine, mixed, alone, where, wait):
    errors, later = [], []

    def misuse(*_):
        try:
            engine.generate(mixed[0]) if wait == "generate" else engine.warmup()
        except RuntimeError as error:
            errors.append(str(error))
        if not later:
            later.append(engine.submit(mixed[1]))

    future = engine.submit(mixed[1], misuse if where == "progress" else None)
    if where == "callback":
        future.add_done_callback(misuse)
    assert_same(future.result(60), alone[1])
    for _ in range(600):  # a future's result is there before its callbacks have run
        if later:
            break
        time.sleep(0.1)
    assert_same(later[0].result(60), alone[1])
    assert errors and "cannot wait for the engine" in errors[0]


def test_a_future_that_its_caller_has_touched_does_not_stop_the_others(engine, mixed, alone):
    touched = engine.submit(mixed[1])
    touched.set_running_or_notify_cancel()
    ended = engine.submit(mixed[1])
    ended.set_result("mine")
    assert_same(engine.generate(mixed[1]), alone[1])
    assert_same(touched.result(60), alone[1])
    assert ended.result(0) == "mine"


@pytest.mark.parametrize("wrong", [None, 5, b"red cat"])
def test_what_is_not_a_request_is_refused(engine, wrong):
    with pytest.raises(InputError, match="^requests: .*; give a Request or a list of them"):
        engine.submit(wrong)
