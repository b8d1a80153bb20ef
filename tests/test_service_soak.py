"""The service under many requests, good and bad, and when its process is killed.

The same in larger numbers, which takes minutes, is run with `-m endurance`.
"""

import asyncio
import base64
import json
import random
from collections import Counter
from dataclasses import replace

import httpx
import pytest
import schemathesis
from engine_cases import assert_same, noise
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance
from service_cases import (
    CAPTIONS,
    EDITS,
    GENERATIONS,
    INFILL,
    MASK,
    PHOTO,
    Connection,
    app_of,
    asynchronous,
    base64_of,
    client,
    events_of,
    file_of,
    image_of,
    memory,
    result_of,
    start,
    until,
)

from engine import Engine, Request
from engine.serving.inputs import Limits
from engine.serving.schemas import CaptionBody, EditBody, GenerationBody, InfillBody

SMALL = Limits(num=2, steps=25, calls=25, seconds=10)  # a generated body asks for little work at most

# ------------------------------------------------------------------------------------------------- soak

CLIENTS = 24
ENDLESS = {"num": 2, "steps": 250, "resample": 3}  # not done before it is cancelled
BODIES = [
    {"seed": 1, "steps": 2},
    {"prompt": "red cat", "seed": 2, "steps": 3},
    {"prompt": "big _ dog", "seed": 3, "steps": 1, "guidance": 1.0},
    {"image": PHOTO, "seed": 4, "steps": 2, "num": 3},
    {"image": PHOTO, "mask": MASK, "seed": 5, "steps": 2, "resample": 2, "jump": 1},
    {"prompt": "_ sun", "image": PHOTO, "mask": MASK, "seed": 6, "steps": 3, "priority": 1},
    {"prompt": "blue car", "seed": 7, "steps": 2, "solver": "ddpm", "num": 2, "stream": True, "preview_every": 1},
]
MALFORMED = [
    b"",
    b'{"steps": 2',
    b'{"steps": NaN}',
    b"[]",
    b'{"prompt": "purple"}',
    b'{"image": "/etc/passwd"}',
    b'{"sampler": 1}',
    b'{"num": 65}',
]


def request_of(body: dict) -> Request:
    """The engine's request for a body of /v1/infill."""
    own = {name: value for name, value in body.items() if name not in ("stream", "preview_every", "priority")}
    return Request(**{name: image_of(v) if name in ("image", "mask") else v for name, v in own.items()})


class Soak:
    """Requests of every kind by several clients at once: one in a hundred each is cancelled, malformed, or left."""

    def __init__(self, engine: Engine):
        self.app, self.served = app_of(engine)
        self.http, self.resident = client(self.app), []
        self.requests = [request_of(body) for body in BODIES]
        self.expected = [engine.generate(request) for request in self.requests]

    async def run(self, count: int) -> Counter:
        """Makes so many requests and returns how many there were of each kind, each of which ended as it should."""
        numbers, ended = iter(range(count)), Counter()

        async def one_client() -> None:
            for number in numbers:
                kind = {7: self.cancelled, 41: self.malformed, 83: self.left}.get(number % 100, self.answered)
                await kind(number)
                ended[kind.__name__] += 1
                if number % 1000 == 999:
                    self.resident.append(memory())

        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
        await until(lambda: self.served.samples == 0)
        return ended

    async def answered(self, number: int) -> None:
        which = number % len(BODIES)
        answer = await self.http.post(INFILL, json=BODIES[which])
        assert answer.status_code == 200, answer.text
        streamed = BODIES[which].get("stream")
        found = events_of(answer.text)[-2][1] if streamed else answer.json()
        assert_same(result_of(found, self.requests[which]), self.expected[which])

    async def cancelled(self, number: int) -> None:
        connection = Connection(self.app, INFILL, ENDLESS | {"stream": True})
        await until(lambda: connection.events)
        answer = await self.http.delete(f"/v1/requests/{connection.events[0][1]['id']}")
        assert answer.status_code == 200
        await connection.task
        (name, data), end = connection.events[-2:]
        assert (name, data["error"]["code"], end) == ("error", "cancelled", (None, {}))

    async def malformed(self, number: int) -> None:
        body = MALFORMED[number // 100 % len(MALFORMED)]
        answer = await self.http.post(INFILL, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"]

    async def left(self, number: int) -> None:
        connection = Connection(self.app, INFILL, ENDLESS | {"stream": number // 100 % 2 == 0})
        await asyncio.sleep(random.Random(number).random() / 20)
        connection.gone.set()
        await connection.task


def counted(metrics: str) -> dict[str, float]:
    lines = (line for line in metrics.splitlines() if line.startswith("psunet:requests_"))
    values = dict(line.removeprefix("psunet:requests_").rsplit(" ", 1) for line in lines if "_created" not in line)
    return {name: float(value) for name, value in values.items()}


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.endurance)])
@asynchronous
async def test_each_of_many_requests_is_answered_with_its_own_and_memory_stays(engine, count):
    soak = Soak(engine)
    async with soak.http as http:
        ended = await soak.run(count)
        few = count // 100
        assert ended == {"answered": count - 3 * few, "cancelled": few, "malformed": few, "left": few}
        known = counted((await http.get("/metrics")).text)
        assert known["success_total"] == ended["answered"]
        assert known['failure_total{reason="Cancelled"}'] == ended["cancelled"] + ended["left"]
        if count >= 10_000:
            assert max(soak.resident[-3:]) < 1.05 * soak.resident[1], "after 2,000 requests everything is warm"
        for body, request, expected in zip(BODIES, soak.requests, soak.expected, strict=True):
            answer = await http.post(INFILL, json=body | {"stream": False, "preview_every": 0})
            files = [base64.b64decode(sample["image"]) for sample in answer.json()["samples"]]
            assert files == [file_of(sample.image) for sample in expected.samples], request


# ------------------------------------------------------------------------------------------------- killed


async def insisting(http: httpx.AsyncClient, body: dict, failures: Counter) -> dict:
    """The answer to a request, which is made again when there is none."""
    while True:
        try:
            answer = await http.post(INFILL, json=body)
        except httpx.TransportError as error:
            failures[type(error).__name__] += 1
        else:
            if answer.status_code not in (429, 503):
                assert answer.status_code == 200, answer.text
                return answer.json()
        await asyncio.sleep(0.2)


@pytest.mark.slow
@asynchronous
async def test_clients_that_ask_again_get_all_answers_from_a_service_that_was_killed(engine, tiny_checkpoint):
    process, address = await asyncio.to_thread(start, "--checkpoint", tiny_checkpoint, "--max-rows", 4)
    failures, bodies = Counter(), [{"prompt": "red cat", "seed": seed, "steps": 20} for seed in range(40)]
    expected = engine.generate([Request(**body) for body in bodies])
    async with httpx.AsyncClient(base_url=address, timeout=60) as http:
        try:
            await insisting(http, {"steps": 1}, Counter())
            answers = [asyncio.ensure_future(insisting(http, body, failures)) for body in bodies]
            await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
            process.kill()
            await asyncio.to_thread(process.communicate)
            assert not all(answer.done() for answer in answers)
            port = address.rpartition(":")[2]
            process, _ = await asyncio.to_thread(start, "--checkpoint", tiny_checkpoint, "--port", port)
            for answer, result in zip(await asyncio.gather(*answers), expected, strict=True):
                assert_same(result_of(answer, result.request), result)
            assert failures, "some had no answer from the service that was killed"
        finally:
            process.kill()
            process.communicate()


# ------------------------------------------------------------------------------------------------- fuzz


def corrupted(files: list[bytes]) -> st.SearchStrategy[bytes]:
    """Files of which some bytes are other ones, or which end too early."""

    def corrupt(file: bytes, changes: list[tuple[float, int]], length: float) -> bytes:
        data = bytearray(file)
        for place, value in changes:
            data[int(place * len(data))] = value
        return bytes(data[: 1 + int(length * len(data))])

    places = st.floats(0, 1, exclude_max=True)
    changes = st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)
    return st.builds(corrupt, st.sampled_from(files), changes, st.just(1.0) | places)


def fuzzed() -> st.SearchStrategy[tuple[str, bytes, str]]:
    """(path, body, content type) of requests nearly all of which are wrong."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    keys = st.text(max_size=8) | st.sampled_from(["image", "text", "sketch"])
    anything = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=6
    )
    files = corrupted([file_of(noise(size=(9, 7)), format) for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP")])
    values = anything | st.integers(-2, 70) | st.sampled_from(["", "red", "_", "red\x00", "\ud800", "1e999", PHOTO])
    values |= files.map(base64_of) | st.dictionaries(keys, files.map(base64_of), max_size=3)
    few = {INFILL: {"steps": 1}, CAPTIONS: {"steps": 1, "image": PHOTO}}
    few |= {GENERATIONS: {"num_inference_steps": 1}, EDITS: {"num_inference_steps": 1, "image": PHOTO, "mask": PHOTO}}
    models = {INFILL: InfillBody, GENERATIONS: GenerationBody, EDITS: EditBody, CAPTIONS: CaptionBody}

    def of(path: str) -> st.SearchStrategy[tuple[bytes, str]]:
        names = st.sampled_from([*models[path].model_fields, "sampler"])
        fields = st.dictionaries(names, values, min_size=1, max_size=4).map(lambda wrong: few[path] | wrong)
        as_json = fields.map(lambda body: json.dumps(body).encode())
        parts = st.lists(st.tuples(names | keys, files | st.binary(max_size=40) | scalars.map(ascii_of)), max_size=5)
        forms = parts.map(form_of)
        bodies = st.one_of(as_json, corrupted([json.dumps(few[path]).encode()]), st.binary(max_size=60))
        kinds = st.sampled_from(["multipart/form-data", "text/plain", "application/json; charset=utf-16", ""])
        odd = st.tuples(st.one_of(bodies, forms), kinds | st.text(st.characters(min_codepoint=32, max_codepoint=126)))
        form = st.tuples(forms, st.just("multipart/form-data; boundary=b"))
        return st.one_of(st.tuples(bodies, st.just("application/json")), form, odd)

    return st.sampled_from(sorted(models)).flatmap(lambda path: of(path).map(lambda pair: (path, *pair)))


def ascii_of(value) -> bytes:
    return json.dumps(value).encode()


def form_of(parts: list[tuple[str, bytes]]) -> bytes:
    """A form whose parts are fields and files in turns; what the parts hold may break it."""
    blocks = []
    for number, (name, value) in enumerate(parts):
        file = '; filename="x"' if number % 2 else ""
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        blocks.append(head.encode("utf-8", "surrogatepass") + value + b"\r\n")
    return b"".join(blocks) + b"--b--\r\n"


FUZZ = settings(
    database=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck), print_blob=False
)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.endurance)])
def test_no_body_makes_the_service_fail(engine, count):
    app, served = app_of(engine, limits=SMALL)
    loop, statuses = asyncio.new_event_loop(), Counter()
    http = client(app)

    @settings(FUZZ, max_examples=count)
    @given(fuzzed())
    def check(request: tuple[str, bytes, str]) -> None:
        path, body, kind = request
        answer = loop.run_until_complete(http.post(path, content=body, headers={"content-type": kind}))
        statuses[answer.status_code] += 1
        assert answer.status_code in (200, 400, 404, 413, 415), answer.text
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"} and error["message"] and error["code"]

    try:
        check()
        assert served.samples == 0 and {200, 400, 415} <= statuses.keys(), "the bodies are of every kind"
    finally:
        loop.run_until_complete(http.aclose())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.mark.parametrize("count", [4, pytest.param(300, marks=pytest.mark.endurance)])
def test_the_service_is_what_its_openapi_document_says(engine, count):
    """But that what the document allows may be refused with 400: what words are known, it does not say."""
    app, _ = app_of(engine, limits=replace(SMALL, num=1))
    load_all_checks()
    for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        operation = found.ok()
        modes = [GenerationMode.POSITIVE] + [GenerationMode.NEGATIVE] * (operation.method == "post")
        for mode in modes:

            @settings(FUZZ, max_examples=count)
            @given(operation.as_strategy(generation_mode=mode))
            def check(case) -> None:
                case.call_and_validate(excluded_checks=[positive_data_acceptance])

            check()
