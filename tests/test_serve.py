"""The service as a process, the official client against it, and what the command line refuses."""

import asyncio
import base64
import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from engine_cases import difference, left_half, noise
from service_cases import (
    LONG,
    ROOT,
    app_of,
    assert_error,
    asynchronous,
    events_of,
    file_of,
    image_of,
    start,
    until,
)

import engine.serve as command
from engine import Engine, Request
from engine.serving.app import create_app
from engine.serving.async_engine import AsyncEngine
from engine.serving.server import Server

# ------------------------------------------------------------------------------------------------- the process


@asynchronous
async def test_a_process_serves_offline_and_finishes_what_runs_when_it_is_terminated(tiny_checkpoint, tmp_path):
    """Without a network, as for those who set HF_HUB_OFFLINE=1 (a fault of another engine: vllm-omni 11447)."""
    tokens = tmp_path / "tokens"
    tokens.write_bytes("\ufeff# for désks\r\n\r\nsecret\r\n".encode())  # as Windows writes text
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "http_proxy": "", "OMP_NUM_THREADS": "1"}
    process, address = start("--checkpoint", tiny_checkpoint, "--token-file", tokens, "--limit", "num=3", **offline)
    try:
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            while True:
                try:
                    if (await http.get("/ready")).status_code == 200:
                        break
                except httpx.TransportError:  # it does not listen yet
                    assert process.poll() is None
                await asyncio.sleep(0.05)
            for header in ({}, {"authorization": "Bearer #"}, {"authorization": "Bearer # for désks".encode()}):
                assert (await http.get("/v1/models", headers=header)).status_code == 401
            http.headers["authorization"] = "Bearer secret"
            card = (await http.get("/v1/models")).json()["data"][0]
            assert card["id"] == "tiny" and card["limits"]["num"] == 3
            assert "text/html" in (await http.get("/")).headers["content-type"]
            port = int(address.rpartition(":")[2])
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(700)]
            answer = await http.post("/v1/infill", json={"prompt": "red", "seed": 0, "steps": 2})
            assert answer.status_code == 200 and image_of(answer.json()["samples"][0]["image"]).size == (32, 32)
            body = {"steps": 150, "prompt": "red"}
            running = asyncio.ensure_future(http.post("/v1/infill", json=body))
            while "num_requests_running 1.0" not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert (await running).status_code == 200
        for _, writer in idle:
            writer.close()
        assert await asyncio.to_thread(process.wait, 30) == 0
        lines = process.stderr.read().splitlines()
        assert len(lines) == 2 and all("INFO engine.serving: request" in line and ": done, " in line for line in lines)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("drain", "signals"), [(0.1, 1), (600, 2)], ids=["past the drain", "a second signal"])
@asynchronous
async def test_whoever_waits_at_the_end_is_answered_with_503(tiny_checkpoint, caplog, drain, signals):
    served = AsyncEngine(Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32"))
    app = create_app(served, drain=drain)
    server = Server(uvicorn.Config(app, port=0, log_config=None), app.state.drain, drain)
    serving = asyncio.ensure_future(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)  # one whose body never comes
    head = "POST /v1/infill HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    writer.write(head.encode())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        bodies = (LONG, LONG | {"stream": True})
        running = [asyncio.ensure_future(http.post("/v1/infill", json=body)) for body in bodies]
        await until(lambda: served.requests == (2, 0))
        server.handle_exit(signal.SIGTERM, None)
        assert b" 503 " in (await reader.read()).partition(b"\r\n")[0]
        if signals == 2:
            assert (await http.get("/ready")).status_code == 503, "it still answers"
            assert_error(await http.post("/v1/infill", json={"steps": 1}), 503, "closed")
            server.handle_exit(signal.SIGINT, None)
        answer, stream = await asyncio.gather(*running)
    assert_error(answer, 503, "closed")
    assert [(name, data["error"]["code"]) for name, data in events_of(stream.text)[-2:-1]] == [("error", "closed")]
    await serving
    writer.close()
    assert served.engine.closed and not [record for record in caplog.records if record.levelno >= logging.ERROR]


STOPPED_IN_A_DESTRUCTOR = """
import os, signal
import engine.serve as command

class Loaded:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def application(*_):
    Loaded()
    os._exit(3)  # it went on

command._application = application
command.main(["--port", "0"])
"""


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [(["-m", "engine.serve", "--port", "0"], 1), (["-c", STOPPED_IN_A_DESTRUCTOR], None)],
    ids=["import", "destructor"],
)
def test_a_process_that_is_stopped_while_it_loads_exits_at_once(arguments, seconds):
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stderr=subprocess.PIPE) as process:
        if seconds is not None:
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        finally:
            process.kill()
        assert process.returncode in (0, 130) and b"Traceback" not in process.stderr.read()


# ------------------------------------------------------------------------------------------------- the official client


@pytest.fixture(scope="module")
def live(engine):
    """The address of a service of this process, and its AsyncEngine."""
    app, served = app_of(engine)
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", served
    server.should_exit = True
    thread.join(30)


def test_the_official_client_lists_generates_edits_and_streams(engine, live):
    with openai.OpenAI(base_url=f"{live[0]}/v1", api_key="none", max_retries=0) as api:
        assert [model.id for model in api.models.list()] == ["tiny"] and api.models.retrieve("tiny").id == "tiny"
        options = {"model": "tiny", "prompt": "red cat", "n": 2, "size": "32x32",
                   "extra_body": {"seed": 0, "num_inference_steps": 4}}  # fmt: skip
        made = api.images.generate(**options, response_format="b64_json")
        expected = engine.generate(Request("red cat", num=2, seed=0, steps=4))
        for one, sample in zip(made.data, expected.samples, strict=True):
            assert difference(image_of(one.b64_json), sample.image) <= 1
        events = list(api.images.generate(**options, stream=True, partial_images=1))
        assert [event.type for event in events][-2:] == ["image_generation.completed"] * 2
        assert [event.b64_json for event in events[-2:]] == [one.b64_json for one in made.data]

        image = ("image.png", base64.b64decode(made.data[0].b64_json))
        mask = noise().convert("RGBA")
        mask.putalpha(left_half().point(lambda level: 255 - level))
        edited = api.images.edit(**options, image=image, mask=("mask.png", file_of(mask))).data[0]
        kept = (16, 0, 32, 32)
        assert difference(image_of(edited.b64_json).crop(kept), expected.image.crop(kept)) == 0

        with pytest.raises(openai.BadRequestError) as error:
            api.images.generate(prompt="purple", size="auto")
        assert (error.value.param, error.value.code) == ("prompt", "invalid_value")
        with pytest.raises(openai.NotFoundError):
            api.images.generate(prompt="red", model="dall-e-3")


@asynchronous
async def test_leaving_a_connection_ends_its_request(live):
    address, served = live
    async with httpx.AsyncClient(base_url=address) as http:
        for body in (LONG, LONG | {"stream": True}):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(http.post("/v1/infill", json=body, timeout=60), 0.5)
            await until(lambda: served.samples == 0)


@pytest.mark.parametrize(
    "arguments, rows, warmup",
    [
        (["--device", "cpu"], 8, 1),
        (["--device", "cpu", "--max-rows", "20", "--warmup", "20"], 20, 20),
        (["--replicas", "2"], 8, 1),
        (["--replicas", "2", "--replica-gpus", "0.5"], 64, 1),
        (["--replicas", "2", "--replica-gpus", "1", "--compile"], 64, 64),
        (["--replicas", "2", "--replica-gpus", "1", "--compile", "--max-rows", "4"], 4, 4),
    ],
    ids=str,
)
def test_rows_and_warm_up_depend_on_where_the_engine_computes(arguments, rows, warmup):
    options = command._parser().parse_args(arguments)
    command._set_rows(options)
    assert (options.max_rows, options.warmup) == (rows, warmup)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "70000"],
        ["--host", "256.0.0.1"],
        ["--checkpoint", "missing"],
        ["--device", "abacus"],
        ["--dtype", "float8"],
        ["--max-rows", "0"],
        ["--max-queue", "-1"],
        ["--warmup", "-1"],
        ["--warmup", "9", "--device", "cpu"],
        ["--drain", "nan"],
        ["--replicas", "0"],
        ["--max-replicas", "2"],
        ["--max-replicas", "1", "--replicas", "2"],
        ["--replica-gpus", "nan"],
        ["--cors", "example.org"],
        ["--cors", "https://example.org/"],
        ["--token-file", "missing"],
        ["--token-file", "empty"],
        ["--token-file", "UTF-16"],
        ["--token-file", "not ASCII"],
        ["--limit", "speed=5"],
        ["--adapter", "style"],
        ["--limit", "num"],
        ["--limit", "num=0"],
        ["--limit", "num=1.5"],
        ["--limit", "seconds=inf"],
    ],
    ids=" ".join,
)
def test_a_bad_option_is_refused_in_one_line(options, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n# no token\n")
    Path("UTF-16").write_text("secret", encoding="utf-16")
    Path("not ASCII").write_text("sécret", encoding="utf-8")
    try:
        status = command.main(["--port", "0", *options])
    except SystemExit as end:
        status = end.code
    message = capsys.readouterr().err
    assert status == 2 and message.count("\n") == 1
    assert message.replace("argument ", "").startswith(f"python -m engine.serve: {options[0]}: ")


def test_a_name_of_two_adapters_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    assert command.main(["--adapter", "style=a", "--adapter", "style=b"]) == 2
    assert "--adapter: 'style' is given twice; give each adapter another name" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused(live, capsys, monkeypatch):
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    port = live[0].rpartition(":")[2]
    assert command.main(["--port", port]) == 2
    assert capsys.readouterr().err.startswith(f"python -m engine.serve: --port: {port} cannot be used (")


@pytest.mark.parametrize("module", command.NEEDED)
def test_a_missing_package_is_named_with_the_command_that_installs_it(module, capsys, monkeypatch):
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setitem(sys.modules, module, None)
    assert command.main([]) == 2
    expected = f"python -m engine.serve: {module}: not installed; install with pip install 'psunet-engine[serve]'\n"
    assert capsys.readouterr().err == expected


def test_replicas_without_ray_are_refused_with_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command.main(["--replicas", "2"]) == 2
    expected = "python -m engine.serve: ray: not installed; install with pip install 'psunet-engine[ray]'\n"
    assert capsys.readouterr().err == expected
