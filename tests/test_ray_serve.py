"""Two replicas on this machine through Ray Serve: requests spread, one is killed under load, and an orderly end."""

import asyncio
import os
import re
import signal
import tempfile
from pathlib import Path

import httpx
import pytest
from service_cases import LONG, asynchronous, events_of
from test_serve import start

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
BODY = {"prompt": "red", "steps": 100}


def replicas_of(process: int) -> list[int]:
    """Numbers of the processes of replicas among the descendants of this one."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int(re.search(r"PPid:\s*(\d+)", (folder / "status").read_text())[1])
                titles[int(folder.name)] = (folder / "cmdline").read_text()
            except (OSError, TypeError):  # it has ended
                continue

    def descends(one: int) -> bool:
        return one == process or (one in parents and descends(parents[one]))

    return [one for one, title in titles.items() if "ServeReplica" in title and descends(one)]


def served(metrics: str) -> list[float]:
    """Requests that each replica has answered."""
    return [float(count) for count in re.findall(r"^psunet:requests_success_total\{.*\} (\S+)$", metrics, re.MULTILINE)]


def running(metrics: str) -> list[float]:
    return [float(count) for count in re.findall(r"^psunet:num_requests_running\{.*\} (\S+)$", metrics, re.MULTILINE)]


@pytest.fixture
def cluster(tiny_checkpoint):
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short path: sockets lie in it
        own = {"RAY_TMPDIR": folder, "HOME": folder, "OMP_NUM_THREADS": "1"}
        process, address = start("--replicas", 2, "--replica-cpus", 0.5, "--checkpoint", tiny_checkpoint, **own)
        yield process, address
        process.kill()
        process.communicate()


@pytest.mark.slow
@asynchronous
async def test_two_replicas_share_requests_and_lose_none_when_one_is_killed(cluster):
    process, address = cluster
    async with httpx.AsyncClient(base_url=address, timeout=120) as http:
        await shared(http)
        await survived(http, process.pid)
        await left(http)
        await drained(http, process)
    assert await asyncio.to_thread(process.wait, 60) == 0


async def shared(http: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(http.post("/v1/infill", json=BODY) for _ in range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    counts = served((await http.get("/metrics")).text)
    assert len(counts) == 2 and sum(counts) == 8 and min(counts) > 0


async def survived(http: httpx.AsyncClient, process: int) -> None:
    stream = asyncio.ensure_future(http.post("/v1/infill", json=BODY | {"stream": True}))
    others = [asyncio.ensure_future(http.post("/v1/infill", json=BODY)) for _ in range(8)]
    while min(running((await http.get("/metrics")).text)) == 0:
        await asyncio.sleep(0.01)
    os.kill(replicas_of(process)[0], signal.SIGKILL)
    answers = await asyncio.gather(*others)
    assert [answer.status_code for answer in answers] == [200] * 8
    assert [name for name, _ in events_of((await stream).text)][-2:] == ["result", None]
    one = answers[0].json()["samples"][0]
    again = await http.post("/v1/infill", json=BODY | {"seed": one["seed"]})
    assert again.json()["samples"][0]["text"] == one["text"]


async def left(http: httpx.AsyncClient) -> None:
    """Cancelled by its id, and by leaving."""
    for leave in (False, True):
        async with http.stream("POST", "/v1/infill", json=LONG | {"stream": True}) as answer:
            chunks = answer.aiter_text()
            text = ""
            while "event: progress" not in text:
                text += await anext(chunks)
            if not leave:
                id = events_of(text)[0][1]["id"]
                assert (await http.delete(f"/v1/requests/{id}")).json() == {"id": id, "cancelled": True}
                assert '"code":"cancelled"' in "".join([chunk async for chunk in chunks])
        while any(running((await http.get("/metrics")).text)):
            await asyncio.sleep(0.05)


async def drained(http: httpx.AsyncClient, process) -> None:
    last = asyncio.ensure_future(http.post("/v1/infill", json=BODY | {"steps": 150}))
    while not any(running((await http.get("/metrics")).text)):
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert (await last).status_code == 200
