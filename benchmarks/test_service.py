"""The engine under load: requests that arrive at random times, and the cost of HTTP.

"step-level batching" is this engine: requests enter and leave its batch between steps. "request-level batching" gives
the same engine one batch after another: up to `max_rows` of the waiting requests, which run until the longest is done.
"one at a time" is the same with batches of one. All get the same requests at the same times, in turns. The load is a
share of the capacity, the most requests per second that the engine answers, measured first; latencies are counted from
the times of arrival. A play takes 3 × `--seconds`, and longer where requests still wait; 99th percentiles need
`--seconds 20` or more, and a machine without other work. The ratio of the first two is also predicted from the measured
time of a step, see `benchmarks.queueing`.
"""

import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cache
from queue import SimpleQueue

import numpy as np
import pytest
from PIL import Image

from benchmarks.queueing import STEPS, arrivals, p95_ratio
from benchmarks.race import CLOCK, Contender
from benchmarks.workloads import measured_preset, random_checkpoint
from engine import Engine, Request

STEP_LEVEL, REQUEST_LEVEL, ALONE = "step-level batching", "request-level batching", "one at a time"
CONTENDERS = (STEP_LEVEL, REQUEST_LEVEL, ALONE)
ROUNDS = 3  # every contender is once the first
GIVE_UP = 5  # a play is over after so many times the time in which its requests arrive
GOOD = 4  # an answer is good within so many times what the request takes alone


@dataclass
class Visit:
    """A request on its way; times by `time.perf_counter`."""

    request: Request
    arrived: float
    begun: float | None = None  # step-level: its first step is done; others: its batch begins
    ended: float | None = None

    def begin(self, *_) -> None:
        self.begun = self.begun or time.perf_counter()

    def end(self, future: Future) -> None:
        if not future.cancelled():
            future.result()  # raises what went wrong, which is then logged
            self.ended = time.perf_counter()


@dataclass
class StepLevel:
    """Hands every request to the engine as it arrives."""

    engine: Engine
    futures: list[Future] = field(default_factory=list)

    def take(self, visit: Visit) -> None:
        future = self.engine.submit(visit.request, visit.begin)
        future.add_done_callback(visit.end)
        self.futures.append(future)

    def stop(self) -> None:
        for future in self.futures:
            future.cancel()


class Batches:
    """Hands the engine up to `most` requests of those that wait, and the next once all of them are done."""

    def __init__(self, engine: Engine, most: int):
        self.engine, self.most, self.waiting, self.stopped = engine, most, SimpleQueue(), False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def take(self, visit: Visit) -> None:
        self.waiting.put(visit)

    def stop(self) -> None:
        self.stopped = True
        self.waiting.put(None)
        self.thread.join()

    def _run(self) -> None:
        while (visit := self.waiting.get()) is not None and not self.stopped:
            batch = [visit]
            while len(batch) < self.most and not self.waiting.empty():
                batch.append(self.waiting.get())
            batch = [visit for visit in batch if visit is not None]
            for visit in batch:
                visit.begin()
            self.engine.generate([visit.request for visit in batch])
            for visit in batch:
                visit.ended = time.perf_counter()


def play(server: StepLevel | Batches, requests: list[Request], arrived: list[float], seconds: float) -> list[Visit]:
    """Lets requests arrive at these times, in seconds from now, and waits for their answers `seconds` at most."""
    started = time.perf_counter()
    visits = [Visit(request, started + at) for request, at in zip(requests, arrived, strict=True)]
    for visit in visits:
        time.sleep(max(0.0, visit.arrived - time.perf_counter()))
        server.take(visit)
    while any(visit.ended is None for visit in visits) and time.perf_counter() < started + seconds:
        time.sleep(0.005)
    server.stop()
    for visit in visits:  # of those without an answer, what is known: it would have taken longer
        visit.begin()
    return visits


def mixed(count: int, seed: int) -> list[Request]:
    """Requests of all tasks with several numbers of steps, one sample each."""
    draw = random.Random(seed)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    tasks = [{}, {"prompt": "word1 word2"}, {"image": photo}, {"prompt": "word1 _", "image": photo, "mask": mask}]
    return [Request(seed=draw.randrange(2**32), steps=draw.choice(STEPS), **draw.choice(tasks)) for _ in range(count)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory, device, dtype, full) -> Iterator[Engine]:
    folder = random_checkpoint(measured_preset(full), tmp_path_factory.mktemp("service") / "checkpoint")
    options = {"dtype": str(dtype).removeprefix("torch."), "compile": device.type == "cuda"}
    with Engine.from_pretrained(folder, device=str(device), max_rows=64 if full else 8, **options) as engine:
        engine.warmup(engine.max_rows)
        yield engine


@pytest.fixture(scope="module")
def plays(engine, progress, request) -> Callable[[float], dict[str, dict]]:
    """A function of a share of the capacity: each contender's latencies and what is recorded beside them."""
    seconds = 3 * request.config.getoption("seconds")
    progress("service: measuring the capacity")
    capacity = _capacity(engine)
    alone = {steps: _seconds_alone(engine, steps) for steps in STEPS}
    step = _step_cost(engine)

    @cache
    def at(share: float) -> dict[str, dict]:
        visits, arrived_of = {name: [] for name in CONTENDERS}, []
        for number in range(ROUNDS):
            arrived = arrivals(share * capacity, seconds, random.Random(number))
            requests = mixed(len(arrived), seed=number)
            arrived_of.append((arrived, [request.steps for request in requests]))
            for i in range(len(CONTENDERS)):
                name = CONTENDERS[(number + i) % len(CONTENDERS)]
                progress(f"service, {share:.0%} of capacity: {name} (round {number + 1} of {ROUNDS})")
                server = StepLevel(engine) if name == STEP_LEVEL else Batches(engine, _rows(engine, name))
                visits[name] += play(server, requests, arrived, GIVE_UP * seconds)
        predicted = p95_ratio(arrived_of, *step, engine.max_rows)
        facts = {"capacity": capacity, "seconds": ROUNDS * seconds, "step": step, "predicted_ratio": predicted}
        return {name: facts | recorded(of_name, alone, ROUNDS * seconds) for name, of_name in visits.items()}

    return at


def _rows(engine: Engine, name: str) -> int:
    return engine.max_rows if name == REQUEST_LEVEL else 1


def _capacity(engine: Engine) -> float:
    """Requests per second, with more than the engine computes together; the better of two measurements."""
    requests = mixed(4 * engine.max_rows, seed=0)
    return len(requests) / min(_seconds_of(engine, requests) for _ in range(2))


def _seconds_alone(engine: Engine, steps: int) -> float:
    requests = [request for request in mixed(60, seed=1) if request.steps == steps][:8]
    return statistics.median(_seconds_of(engine, [request]) for request in requests)


def _step_cost(engine: Engine) -> tuple[float, float]:
    """(a, b): a step of n samples of `mixed` takes about a + b·n seconds; what is not steps is left out."""
    seconds = []
    for samples in (1, engine.max_rows):
        few, many = ([replace(r, steps=steps) for r in mixed(samples, seed=2)] for steps in (min(STEPS), max(STEPS)))
        short, long = (min(_seconds_of(engine, requests) for _ in range(3)) for requests in (few, many))
        seconds.append((long - short) / (max(STEPS) - min(STEPS)))
    b = max(0.0, seconds[1] - seconds[0]) / (engine.max_rows - 1)
    return max(0.0, seconds[0] - b), b


def _seconds_of(engine: Engine, requests: list[Request]) -> float:
    started = time.perf_counter()
    engine.generate(requests)
    return time.perf_counter() - started


def recorded(visits: list[Visit], alone: dict[int, float], seconds: float) -> dict:
    """What is stored of all visits of one contender; seconds, and good answers per second."""
    over = time.perf_counter()
    latencies = [(visit.ended or over) - visit.arrived for visit in visits]
    queued = [visit.begun - visit.arrived for visit in visits]
    good = [v.ended is not None and v.ended - v.arrived <= GOOD * alone[v.request.steps] for v in visits]
    percentiles = {f"p{p}": float(np.percentile(latencies, p)) for p in (50, 95, 99)}
    waits = {f"queue_p{p}": float(np.percentile(queued, p)) for p in (50, 95)}
    answered = sum(visit.ended is not None for visit in visits)
    counts = {"requests": len(visits), "answered": answered, "goodput": sum(good) / seconds}
    return {"latencies": latencies, **percentiles, **waits, **counts}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_load(benchmark, plays, dtype, share, contender):
    stored = dict(plays(share)[contender])
    latencies = stored.pop("latencies")
    benchmark.group = f"service, {share:.0%} of capacity"
    benchmark.extra_info |= {"contender": contender, "dtype": str(dtype).removeprefix("torch."), **stored}
    benchmark.pedantic(CLOCK.play(latencies), rounds=len(latencies))


# --------------------------------------------------------------------------------------------------- HTTP

CLIENT = r"""
import asyncio, json, sys
port, bodies = json.loads(sys.stdin.readline())
async def post(body, connection):
    reader, writer = connection
    head = "POST /v1/infill HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    content = json.dumps(body)
    writer.write((head % len(content) + content).encode())
    status, *headers = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    length = next(int(line.split()[1]) for line in headers if line.startswith(b"content-length:"))
    await reader.readexactly(length)
    return b" 200 " in status
async def post_rounds():
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in bodies]
    for _ in sys.stdin:
        print(sum(await asyncio.gather(*map(post, bodies, connections))), flush=True)
asyncio.run(post_rounds())
"""
IN_PROCESS, OVER_HTTP = "Engine.submit", "HTTP"


@pytest.fixture
def http_client(engine) -> Iterator[Callable[[list[dict]], Callable[[], int]]]:
    """`http_client(bodies)` returns a function that has another process post all bodies, and counts the answers.

    That process does little else, as load generators do: it has the same cores.
    """
    uvicorn = pytest.importorskip("uvicorn", reason="the service is not installed: pip install '.[serve]'")
    from engine.serving.app import create_app
    from engine.serving.async_engine import AsyncEngine

    app = create_app(AsyncEngine(engine), model="benchmark")
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="warning", timeout_keep_alive=600))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with subprocess.Popen([sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:

        def send(*lines) -> None:
            client.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            client.stdin.flush()

        def prepared(bodies: list[dict]) -> Callable[[], int]:
            send([port, bodies])

            def post_all() -> int:
                send("go")
                return int(client.stdout.readline())

            return post_all

        yield prepared
        client.stdin.close()
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("contender", [IN_PROCESS, OVER_HTTP])
@pytest.mark.parametrize("steps", [10, Request().steps])
def test_http(compete, engine, http_client, steps, contender):
    """More requests at once than the engine computes together: from this process, and over HTTP from another one.

    What HTTP costs does not depend on the steps; the second number of steps is the default.
    """
    count = 4 * engine.max_rows
    bodies = [{"prompt": "word1 word2", "steps": steps, "seed": seed} for seed in range(count)]

    def build():
        post_all, requests = http_client(bodies), [Request(**body) for body in bodies]

        def submitted() -> int:
            return len([future.result() for future in [engine.submit(request) for request in requests]])

        def over_http() -> int:
            answered = post_all()
            assert answered == count, f"{answered} of {count} were answered"
            return answered

        facts = {"images": count, "facts": {"requests": count}}
        return {IN_PROCESS: Contender(submitted, **facts), OVER_HTTP: Contender(over_http, **facts)}

    compete(f"service, HTTP, {count} requests of {steps} steps at once", contender, build)
