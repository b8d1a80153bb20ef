"""The front of several replicas: in one process, with replicas that die when a test says so, and without Ray."""

import asyncio
import sys
from types import SimpleNamespace

import pytest
from service_cases import LONG, Connection, app_of, asynchronous, client, image_of, until

from engine.serving.inputs import Limits
from engine.serving.ray_serve import Replica, Settings, _front_application, merged_metrics

BODY = {"prompt": "red", "steps": 2}


class Died(Exception):
    """Stands for Ray's error."""


class Gone(Exception):
    """Stands for Ray's error."""


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    names = {"ray.exceptions": SimpleNamespace(RayActorError=Died, TaskCancelledError=Gone)}
    for name, module in ({"ray": SimpleNamespace()} | names).items():
        monkeypatch.setitem(sys.modules, name, module)


class InProcess(Replica):
    def __init__(self, app):
        self._app = app

    def __del__(self) -> None:
        """The application's lifespan has not begun."""


class Cluster:
    """Replicas of one engine that are asked in turns, as Ray's handle asks them."""

    def __init__(self, engine, deaths: list[int | None]):
        """deaths  for each time that a replica is asked, the messages after which it dies, −1: all; None: it lives"""
        self.apps, self.engines = zip(*(app_of(engine) for _ in range(2)), strict=True)
        self.replicas = [InProcess(app) for app in self.apps]
        self.deaths, self.scopes = deaths, []
        self.answer = self

    def options(self, stream: bool):
        return self

    def remote(self, scope: dict, body: bytes) -> "Messages":
        self.scopes.append(scope)
        number = len(self.scopes) - 1
        death = self.deaths[number] if number < len(self.deaths) else None
        return Messages(self.replicas[number % 2].answer(scope, body), death)

    def broadcast(self, method: str, scope: dict):
        async def results_async(timeout_s: float, return_exceptions: bool) -> list:
            assert method == "whole_answer"
            answers = []
            for name, replica in zip("ab", self.replicas, strict=True):
                messages = [message async for message in replica.answer(scope, b"")]
                answers.append((name, messages[0]["status"], b"".join(m.get("body", b"") for m in messages)))
            return [Died(), *answers]

        return SimpleNamespace(results_async=results_async)


class Messages:
    def __init__(self, messages, death: int | None):
        self._messages, self._death, self._cancelled = messages, death, asyncio.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    async def __aiter__(self):
        number = 0
        cancelled = asyncio.ensure_future(self._cancelled.wait())
        try:
            while number != self._death:
                following = asyncio.ensure_future(anext(self._messages, None))
                await asyncio.wait({following, cancelled}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    await asyncio.wait({following})
                    raise Gone
                if following.result() is None:
                    if self._death == -1:
                        break
                    return
                yield following.result()
                number += 1
            raise Died
        finally:
            cancelled.cancel()
            await self._messages.aclose()


def front(engine, *deaths, **settings):
    cluster = Cluster(engine, list(deaths))
    return _front_application(cluster, Settings(**settings)), cluster


@pytest.mark.parametrize("death", [0, 1], ids=["before it answers", "within the answer's head"])
@asynchronous
async def test_a_request_whose_replica_dies_is_answered_by_another_with_the_same_seed(engine, death):
    app, cluster = front(engine, death)
    async with client(app) as http:
        answer = await http.post("/v1/infill", json=BODY)
        assert answer.status_code == 200 and len(cluster.scopes) == 2
        asked = [scope["psunet.seed"] for scope in cluster.scopes]
        sample = answer.json()["samples"][0]
        assert asked[0] == asked[1] == sample["seed"]
        again = await http.post("/v1/infill", json=BODY | {"seed": sample["seed"]})
        assert image_of(again.json()["samples"][0]["image"]).tobytes() == image_of(sample["image"]).tobytes()
        seeds = {
            (await http.post("/v1/captions", json={"image": sample["image"], "steps": 1})).json()["data"][0]["seed"]
        }
        assert asked[0] not in seeds, "each request has a seed of its own"


@asynchronous
async def test_events_go_on_with_those_of_another_replica(engine):
    app, cluster = front(engine, 3)
    connection = Connection(app, "/v1/infill", BODY | {"stream": True, "steps": 20})
    await connection.task
    names = [name for name, _ in connection.events]
    assert connection.status == 200 and len(cluster.scopes) == 2
    assert names.count("queued") == 2 and names[-2:] == ["result", None] and names.count("result") == 1
    assert connection.events[-2][1]["samples"][0]["seed"] == cluster.scopes[0]["psunet.seed"]


@asynchronous
async def test_an_answer_that_is_complete_is_not_asked_for_again(engine):
    for stream in (False, True):
        app, cluster = front(engine, -1)
        connection = Connection(app, "/v1/infill", BODY | {"stream": stream})
        await connection.task
        assert connection.status == 200 and len(cluster.scopes) == 1


@asynchronous
async def test_a_request_is_asked_for_once_more_and_not_again(engine):
    app, cluster = front(engine, 0, 0)
    async with client(app) as http:
        answer = await http.post("/v1/infill", json=BODY)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "closed"
        assert len(cluster.scopes) == 2 and answer.headers["retry-after"]
    app, cluster = front(engine, 2, 0)
    connection = Connection(app, "/v1/infill", BODY | {"stream": True})
    await connection.task
    assert [name for name, _ in connection.events][-2:] == ["error", None]
    assert connection.events[-2][1]["error"]["code"] == "closed"


@asynchronous
async def test_a_client_that_leaves_ends_its_request_at_the_replica(engine):
    app, cluster = front(engine)
    for body in (LONG, LONG | {"stream": True}):
        connection = Connection(app, "/v1/infill", body)
        await until(lambda: any(served.samples for served in cluster.engines))
        connection.gone.set()
        await connection.task
        await until(lambda: not any(served.samples for served in cluster.engines))


@asynchronous
async def test_an_id_is_cancelled_whichever_replica_serves_it(engine):
    app, _ = front(engine)
    async with client(app) as http:
        for _ in range(2):
            connection = Connection(app, "/v1/infill", LONG | {"stream": True})
            await until(lambda: b"queued" in connection.body)  # noqa: B023
            id = connection.events[0][1]["id"]
            assert (await http.delete(f"/v1/requests/{id}")).json() == {"id": id, "cancelled": True}
            await connection.task
            assert connection.events[-2][1]["error"]["code"] == "cancelled"
            gone = await http.delete(f"/v1/requests/{id}")
            assert gone.status_code == 404 and gone.json()["error"]["param"] == "id"


@asynchronous
async def test_the_page_and_probes_are_those_of_a_replica(engine):
    app, cluster = front(engine)
    async with client(app) as http:
        page = await http.get("/")
        assert page.status_code == 200 and "<html" in page.text
        assert (await http.get("/health")).json() == {"status": "ok"}
        assert (await http.get("/ready")).status_code == 200
        assert (await http.get("/v1/vocabulary", params={"prefix": "re"})).json() == {"words": ["red"]}
        missing = await http.get("/nothing")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
        assert len(cluster.scopes) == 5


@asynchronous
async def test_metrics_are_those_of_all_replicas(engine):
    app, _ = front(engine)
    async with client(app) as http:
        for _ in range(3):
            await http.post("/v1/infill", json=BODY)
        lines = (await http.get("/metrics")).text.splitlines()
        assert (await http.post("/metrics")).status_code == 405
    assert 'psunet:requests_success_total{replica="a"} 2.0' in lines
    assert 'psunet:requests_success_total{replica="b"} 1.0' in lines
    assert len([line for line in lines if line.startswith("# TYPE psunet:image_count_total ")]) == 1


def test_metrics_of_a_single_replica_stay_as_they_are_but_for_the_label():
    text = '# HELP a_total A\n# TYPE a_total counter\na_total{x="1"} 2.0\n'
    assert merged_metrics({"r": text}).decode() == text.replace('x="1"', 'replica="r",x="1"')


@asynchronous
async def test_the_front_refuses_before_a_replica_is_asked(engine):
    app, cluster = front(engine, tokens=("secret",), limits=Limits(body_bytes=100), origins=("https://a.example",))
    async with client(app) as http:
        assert (await http.post("/v1/infill", json=BODY)).status_code == 401
        assert (await http.delete("/v1/requests/1")).status_code == 401
        http.headers["authorization"] = "Bearer secret"
        assert (await http.post("/v1/infill", json={"prompt": 200 * "a"})).status_code == 413
        assert not cluster.scopes
        allowed = await http.get("/health", headers={"origin": "https://a.example"})
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://a.example"
