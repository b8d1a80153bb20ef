"""`AsyncEngine`: events, priorities, deadlines, a bounded queue, cancelling and the end."""

import asyncio
import threading
import time

import pytest
from engine_cases import ENDLESS, assert_same, noise
from service_cases import asynchronous, until

from engine import Engine, Request
from engine.errors import EngineClosed, InputError
from engine.serving import async_engine
from engine.serving.async_engine import (
    READERS,
    AsyncEngine,
    Cancelled,
    DeadlineExceeded,
    Preview,
    Progress,
    Queued,
    QueueFull,
)


@pytest.fixture(scope="module")
def narrow(tiny_checkpoint):
    """An engine of one slot."""
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=1) as engine:
        yield engine


async def running(served: AsyncEngine, request: Request = ENDLESS, **options):
    """A handle of a request whose first step is done."""
    handle = await served.submit(request, **options)
    await until(lambda: handle.started is not None)
    return handle


# ------------------------------------------------------------------------------------------------- results and events


@asynchronous
async def test_concurrent_requests_get_what_generate_gives(engine, mixed, alone):
    served = AsyncEngine(engine)
    for found, expected in zip(await asyncio.gather(*map(served.generate, mixed)), alone, strict=True):
        assert_same(found, expected)
    assert served.samples == 0 and not served.ready, "it is not warm"


@pytest.fixture
def heard(monkeypatch) -> list[int]:
    """How many things the loop is told at each of its wake-ups."""
    heard, hear = [], AsyncEngine._hear
    monkeypatch.setattr(AsyncEngine, "_hear", lambda self: (heard.append(len(self._told)), hear(self)))
    return heard


@asynchronous
async def test_the_loop_is_woken_once_for_what_samples_of_a_step_tell(engine, heard):
    served = AsyncEngine(engine)

    async def read(seed: int) -> None:
        handle = await served.submit(Request("red", steps=60, seed=seed))
        assert [event async for event in handle.events()][-1] == Progress(60, 60)

    await asyncio.gather(*map(read, range(4)))
    assert sum(heard) >= 4 * 60 and len(heard) <= 1.5 * 60 + 4


@asynchronous
async def test_the_loop_is_not_woken_by_steps_that_nobody_reads_of(engine, heard):
    served = AsyncEngine(engine)
    await asyncio.gather(*(served.generate(Request("red", steps=60, seed=seed)) for seed in range(4)))
    assert sum(heard) == 4 * 2, "the first step and the end of each"


@asynchronous
async def test_the_last_step_is_counted_before_the_result_is_there(engine, monkeypatch):
    monkeypatch.setattr(async_engine, "GATHER", 60.0)
    served, heard, hear = AsyncEngine(engine), [], AsyncEngine._hear
    monkeypatch.setattr(AsyncEngine, "_hear", lambda self: (heard.append(time.perf_counter()), hear(self)))
    handle = await served.submit(Request("red", steps=3))
    await handle.result()
    assert handle.steps == 3 and served.requests == (0, 0)
    assert handle.submitted < handle.started < heard[0], "it is the time of the first step, not of hearing of it"


@asynchronous
async def test_events_tell_the_position_then_every_kind_of_news_then_end(engine):
    served = AsyncEngine(engine)
    handle = await served.submit(Request("red _", num=2, steps=6), preview_every=2)
    events = [event async for event in handle.events()]
    assert events[0] == Queued(0)
    counts = [event.done for event in events if isinstance(event, Progress)]
    assert counts == sorted(set(counts)) and counts[-1] == 24, "six steps of two modalities of two samples"
    previews = [event for event in events if isinstance(event, Preview)]
    assert previews and set(previews[-1].samples) == {0, 1}
    assert handle.done and len((await handle.result()).samples) == 2


@asynchronous
async def test_previews_tell_the_step_that_they_show_however_late_they_are_heard(engine, monkeypatch):
    monkeypatch.setattr(async_engine, "GATHER", 0.05)
    handle = await AsyncEngine(engine).submit(Request("red", steps=100), preview_every=10)
    done = [event.done async for event in handle.events() if isinstance(event, Preview)]
    assert done and all(steps % 10 == 0 for steps in done)


def test_a_request_whose_loop_has_ended_gives_its_slots_back(engine, monkeypatch):
    futures, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda *a, **o: futures.append(submit(*a, **o)) or futures[-1])
    loop = asyncio.new_event_loop()
    loop.run_until_complete(running(AsyncEngine(engine)))
    loop.close()
    with pytest.raises(RuntimeError, match="loop"):
        futures[0].result(60)


@asynchronous
async def test_a_reader_that_comes_late_gets_the_latest_only(engine):
    handle = await AsyncEngine(engine).submit(Request(prompt="red", steps=50))
    await handle.result()
    assert [event async for event in handle.events()] == [Queued(0), Progress(50, 50)]
    assert [event async for event in handle.events()] == []


@asynchronous
async def test_a_reader_that_comes_meanwhile_gets_the_latest_and_what_follows(engine):
    handle = await running(AsyncEngine(engine), Request(prompt="red", steps=400))
    done = handle.steps
    counts = [event.done async for event in handle.events() if isinstance(event, Progress)]
    assert counts == sorted(set(counts)) and 0 < done <= counts[0] < counts[-1] == 400 and len(counts) > 10


def test_previews_come_in_the_order_of_generation_and_change_no_result(engine, mixed):
    shown = []
    requests = [*mixed[:3], Request(image=noise(4), num=2, steps=5)]
    expected = engine.generate(requests)
    future = engine.submit(requests, preview=shown.append, preview_every=1)
    for found, other in zip(future.result(60), expected, strict=True):
        assert_same(found, other, rounding=0)
    joint = [preview[0].outputs for preview in shown if 0 in preview]
    assert [set(outputs) for outputs in joint[:4]] == [{"text"}] * 4, "the text first, its arrival included"
    assert joint[4:] and all(set(outputs) == {"image", "text"} for outputs in joint[4:])
    assert {i for preview in shown for i in preview} == set(range(8))
    assert all(set(preview[6].outputs) == {"text"} for preview in shown if 6 in preview), "the image is given"


def test_the_last_preview_comes_near_the_result_and_keeps_known_pixels(engine):
    import numpy as np

    given = noise(2)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    from PIL import Image

    shown = []
    request = Request(prompt="red", image=given, mask=Image.fromarray(mask), steps=40)
    result = engine.submit(request, preview=shown.append, preview_every=39).result(60)
    (preview,) = shown
    found, expected = (np.asarray(sample.image).astype(int) for sample in (preview[0], result.samples[0]))
    assert (found[:, 16:] == np.asarray(given)[:, 16:]).all(), "kept pixels are as given"
    assert abs(found - expected).mean() < 8


# ------------------------------------------------------------------------------------------------- queue


@asynchronous
async def test_a_higher_priority_enters_first_and_does_not_interrupt(narrow):
    served, order = AsyncEngine(narrow), []
    first = await running(served, Request(prompt="red", steps=60))
    rest = [await served.submit(Request(prompt="cat", steps=3), priority=p) for p in (0, 5, 0, 9)]
    for name, handle in zip(("first", "a", "b", "c", "d"), (first, *rest), strict=True):
        handle.add_done_callback(lambda _, name=name: order.append(name))
    await asyncio.gather(*(handle.result() for handle in (first, *rest)))
    await asyncio.sleep(0)
    assert order == ["first", "d", "b", "a", "c"]


@asynchronous
async def test_the_position_counts_the_samples_in_front(narrow):
    served = AsyncEngine(narrow)
    first = await running(served)
    second = await served.submit(Request(num=3, steps=1))
    third = await served.submit(Request(num=1, steps=1))
    assert (second.position, third.position, served.waiting) == (0, 3, 4)
    fourth = await served.submit(Request(num=2, steps=1), priority=1)
    assert (fourth.position, second.position, third.position) == (0, 2, 5)
    second.cancel()
    await until(lambda: third.position == 2)
    first.cancel()
    await asyncio.gather(third.result(), fourth.result())
    assert served.waiting == served.samples == 0


@asynchronous
async def test_the_queue_is_bounded_in_samples(narrow):
    served = AsyncEngine(narrow, max_queue=3)
    served.warm = True
    first = await running(served, Request(num=2, steps=1000, resample=5))
    with pytest.raises(QueueFull) as error:
        await served.submit(Request(num=3, steps=1))
    assert (error.value.waiting, error.value.limit) == (1, 3) and served.samples == 2
    second = await served.submit(Request(num=2, steps=1))
    assert not served.ready, "the queue is full"
    with pytest.raises(QueueFull):
        await served.submit(Request(steps=1))
    with pytest.raises(InputError, match="^num: 5 is more than the queue holds"):
        await served.submit(Request(num=5, steps=1))
    first.cancel()
    await second.result()
    assert served.ready and len((await served.generate(Request(num=4, steps=1))).samples) == 4


@pytest.mark.parametrize(
    "options",
    [{"deadline": 0}, {"deadline": float("nan")}, {"preview_every": -1}, {"preview_every": 0.5}, {"priority": "high"}],
    ids=str,
)
@asynchronous
async def test_bad_options_are_refused_and_take_no_place(engine, options):
    served = AsyncEngine(engine)
    with pytest.raises(InputError, match=f"^{next(iter(options))}: "):
        await served.submit(Request(), **options)
    with pytest.raises(InputError, match="^prompt: 'purple'"):
        await served.submit(Request(prompt="purple"))
    assert served.samples == served.waiting == 0
    if "deadline" not in options:
        with pytest.raises(InputError, match=f"^{next(iter(options))}: "):
            engine.submit(Request(), preview=print, **options)
    with pytest.raises(InputError, match="^max_queue: -1"):
        AsyncEngine(engine, -1)


# ------------------------------------------------------------------------------------- deadlines and cancelling


@asynchronous
async def test_a_deadline_ends_a_request_that_runs_and_one_that_waits(narrow):
    served = AsyncEngine(narrow)
    first, second = await running(served, deadline=1.5), await served.submit(Request(steps=1), deadline=0.8)
    for handle, seconds in ((second, 0.8), (first, 1.5)):
        with pytest.raises(DeadlineExceeded) as error:
            await handle.result()
        assert error.value.seconds == seconds
    assert len((await served.generate(Request(steps=1), deadline=30)).samples) == 1
    assert served.samples == 0


@asynchronous
async def test_a_cancelled_request_frees_its_slots_and_no_other_request(narrow, mixed, alone):
    served = AsyncEngine(narrow)
    first, waiting = await running(served), await served.submit(ENDLESS)
    other = await served.submit(mixed[1])
    assert waiting.cancel() and first.cancel() and not first.cancel()
    assert_same(await other.result(), alone[1])
    for handle in (first, waiting):
        with pytest.raises(Cancelled):
            await handle.result()
    assert not other.cancel() and served.samples == 0
    assert_same(await served.generate(mixed[1]), alone[1])


@asynchronous
async def test_cancelling_the_task_that_generates_cancels_the_request_and_waiting_for_a_result_does_not(engine):
    served = AsyncEngine(engine)
    generating = asyncio.ensure_future(served.generate(ENDLESS))
    await until(lambda: served.requests == (1, 0))
    generating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await generating
    await until(lambda: served.samples == 0)
    handle = await running(served)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(handle.result(), 0.01)
    assert not handle.done
    async with handle:
        pass
    assert isinstance(handle.error, Cancelled)


@asynchronous
async def test_reading_a_request_blocks_neither_the_loop_nor_its_cancelling(own, monkeypatch):
    engine, _ = own
    served, read = AsyncEngine(engine), engine.codecs["image"].read

    def slow(*arguments, **named):
        time.sleep(0.5)
        return read(*arguments, **named)

    monkeypatch.setattr(engine.codecs["image"], "read", slow)
    submitting = asyncio.ensure_future(served.submit(Request(image=noise(), steps=1)))
    turns = 0
    while not submitting.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 20, "the loop went on"
    await (await submitting).result()
    submitting = asyncio.ensure_future(served.submit(ENDLESS))
    await asyncio.sleep(0.1)
    submitting.cancel()
    await until(lambda: served.samples == 0)
    await until(lambda: not any(engine._sampler.scheduler.slots))  # it does not run on


@asynchronous
async def test_a_request_that_is_cancelled_before_it_is_read_is_not_read(engine, monkeypatch):
    served, submit, calls, leave = AsyncEngine(engine), engine.submit, [], threading.Event()

    def slow(*arguments, **named):
        calls.append(arguments)
        assert leave.wait(60)
        return submit(*arguments, **named)

    monkeypatch.setattr(engine, "submit", slow)
    busy = [asyncio.ensure_future(served.generate(Request(steps=1))) for _ in range(READERS)]
    await until(lambda: len(calls) == READERS)
    waiting = asyncio.ensure_future(served.submit(Request(steps=1)))
    await until(lambda: served.samples == READERS + 1)
    waiting.cancel()
    await until(lambda: served.samples == READERS)
    leave.set()
    await asyncio.gather(*busy)
    await until(lambda: not served._tasks)
    assert len(calls) == READERS


# ------------------------------------------------------------------------------------------------- the end


@asynchronous
async def test_draining_ends_what_runs_refuses_what_is_new_and_then_closes(tiny_checkpoint, mixed, alone):
    served = AsyncEngine(Engine.from_pretrained(tiny_checkpoint, dtype="float32"))
    await served.warmup(1)
    assert served.alive and served.ready
    handle = await served.submit(mixed[0])
    draining = asyncio.ensure_future(served.drain(30))
    await asyncio.sleep(0)
    assert served.alive and not served.ready
    with pytest.raises(EngineClosed):
        await served.submit(mixed[0])
    assert_same(await handle.result(), alone[0])
    await draining
    assert not served.alive and served.engine.closed


@asynchronous
async def test_what_is_not_done_when_draining_ends_is_told_so(tiny_checkpoint):
    served = AsyncEngine(Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=2))
    handles = [await running(served), await served.submit(ENDLESS)]
    await served.drain(0.1)
    for handle in handles:
        with pytest.raises(EngineClosed):
            await handle.result()


@asynchronous
async def test_requests_of_an_engine_that_someone_closes_end(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, dtype="float32")
    served = AsyncEngine(engine)
    handle = await running(served)
    await asyncio.to_thread(engine.close)
    with pytest.raises(EngineClosed):
        await handle.result()
    with pytest.raises(EngineClosed):
        await served.submit(Request())
    assert not served.alive and not served.ready
