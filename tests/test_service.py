"""The HTTP service: what its endpoints answer, what they refuse and how, limits, tokens, events and the end."""

import asyncio
import json

import httpx
import pytest
from engine_cases import assert_same, difference, left_half, noise
from PIL import Image
from service_cases import (
    LONG,
    Connection,
    app_of,
    asynchronous,
    base64_of,
    client,
    events_of,
    file_of,
    image_of,
    result_of,
    service,
    until,
)

from engine import Engine, Request
from engine.serving.inputs import Limits
from engine.serving.schemas import InfillBody

INFILL, GENERATIONS, EDITS, CAPTIONS = "/v1/infill", "/v1/images/generations", "/v1/images/edits", "/v1/captions"
ENDPOINTS = [INFILL, GENERATIONS, EDITS, CAPTIONS]
PHOTO, MASK = base64_of(noise()), base64_of(left_half())
MINIMAL = {INFILL: {"steps": 1}, GENERATIONS: {"prompt": "red", "num_inference_steps": 1},
           EDITS: {"prompt": "red", "image": PHOTO, "mask_image": MASK, "num_inference_steps": 1},
           CAPTIONS: {"image": PHOTO, "steps": 1}}  # fmt: skip


def assert_error(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Returns the message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"] and "Traceback" not in error["message"]
    return error["message"]


# ------------------------------------------------------------------------------------------------- answers


def fields_of(request: Request) -> dict:
    """A request as a client's fields."""
    fields = {name: getattr(request, name) for name in ("prompt", "num", "steps", "solver", "guidance", "seed")}
    fields |= {"resample": request.resample, "jump": request.jump}
    return fields | {name: base64_of(getattr(request, name)) for name in ("image", "mask") if getattr(request, name)}


@asynchronous
async def test_infill_answers_what_generate_gives_for_every_task_at_once(engine, mixed, alone):
    async with service(engine) as http:
        answers = await asyncio.gather(*(http.post(INFILL, json=fields_of(request)) for request in mixed))
    for answer, request, expected in zip(answers, mixed, alone, strict=True):
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert_same(result_of(body, request), expected)
        assert [s["index"] for s in body["samples"]] == list(range(request.num)) and body["model"] == "tiny"
        for sample, original in zip(body["samples"], expected.samples, strict=True):
            assert [w["word"] for w in sample["words"]] == original.text.split()
            assert sample["confidence"] == {"text": pytest.approx(original.confidence, abs=1e-3)}
        times = body["timings"]
        assert times["total_s"] >= times["run_s"] >= 0 and times["queue_s"] >= 0


@asynchronous
async def test_a_form_with_files_answers_as_json_does(engine):
    fields = {"prompt": "_ sun", "seed": 3, "steps": 2, "order": ["text", "image"], "guidance_interval": [0, 0.5]}
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    files = {"image": ("a.png", file_of(noise())), "mask": ("b.png", file_of(left_half()))}
    async with service(engine) as http:
        by_form = await http.post(INFILL, data=form, files=files)
        by_name = await http.post(
            INFILL, data=form, files={"inputs[image]": files["image"], "masks[image]": files["mask"]}
        )
        by_json = await http.post(INFILL, json={**fields, "image": f"data:image/png;base64,{PHOTO}", "mask": MASK})
        twice = await http.post(INFILL, data=form, files=[("image", files["image"])] * 2)
    assert by_form.status_code == 200, by_form.text
    assert by_form.json()["samples"] == by_json.json()["samples"] == by_name.json()["samples"]
    assert_error(twice, 400, "invalid_value", "image")


@asynchronous
async def test_infill_has_every_field_of_a_request():
    from dataclasses import fields

    assert {field.name for field in fields(Request)} <= InfillBody.model_fields.keys()


@asynchronous
async def test_another_modality_goes_in_and_out_by_its_name(three_modality_checkpoint):
    with Engine.from_pretrained(three_modality_checkpoint, dtype="float32") as engine:
        async with service(engine) as http:
            body = {"inputs": {"sketch": PHOTO}, "masks": {"sketch": MASK}, "steps": 1}
            sample = (await http.post(INFILL, json=body)).json()["samples"][0]
            card = (await http.get("/v1/models")).json()["data"][0]
            bad = await http.post(INFILL, json={"inputs": {"sketch": "no"}})
            unknown = await http.post(INFILL, json={"inputs": {"sound": PHOTO}})
    assert set(sample["outputs"]) == {"image", "text", "sketch"}
    kept = (16, 0, 32, 32)
    assert difference(image_of(sample["outputs"]["sketch"]).crop(kept), noise().crop(kept)) == 0
    assert [m["name"] for m in card["modalities"]] == ["image", "text", "sketch"]
    assert_error(bad, 400, "invalid_image", "inputs['sketch']")
    assert_error(unknown, 400, "invalid_value", "inputs['sound']")


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@asynchronous
async def test_images_come_in_the_format_that_was_asked_for(engine, format):
    async with service(engine) as http:
        infilled = (await http.post(INFILL, json={"steps": 1, "output_format": format})).json()["samples"][0]["image"]
        body = MINIMAL[GENERATIONS] | {"output_format": format, "seed": 1}
        plain = (await http.post(GENERATIONS, json=body)).json()["data"][0]["b64_json"]
        packed = await http.post(GENERATIONS, json=body | {"output_compression": 5})
    assert image_of(infilled).format == image_of(plain).format == format.upper()
    if format == "png":
        assert_error(packed, 400, "invalid_value", "output_compression")
    else:
        assert len(packed.json()["data"][0]["b64_json"]) < len(plain)


@asynchronous
async def test_generations_edits_and_captions_answer_in_openais_shape(engine):
    body = {"prompt": "red _", "n": 2, "seed": 7, "size": "32x32", "model": "tiny", "user": "me"}
    async with service(engine) as http:
        made = await http.post(GENERATIONS, json=body | {"num_inference_steps": 3, "guidance_scale": 2.0})
        alpha = Image.new("RGBA", (32, 32))
        alpha.paste("black", (16, 0, 32, 32))
        same = {"prompt": "red cat", "seed": 1, "num_inference_steps": 3}
        by_alpha = await http.post(EDITS, data=same, files={"image": file_of(noise()), "mask": file_of(alpha)})
        by_white = await http.post(EDITS, json={**same, "image": PHOTO, "mask_image": MASK})
        transparent = noise().convert("RGBA")
        transparent.putalpha(alpha.getchannel("A"))
        by_image = await http.post(EDITS, json={**same, "image": base64_of(transparent)})
        described = await http.post(CAPTIONS, json={"image": PHOTO, "n": 2, "seed": 5, "steps": 3})
    expected = engine.generate(Request("red _", num=2, seed=7, steps=3, guidance=2.0))
    body = made.json()
    assert body.keys() == {"created", "data", "size", "output_format", "background"} and body["size"] == "32x32"
    for one, sample in zip(body["data"], expected.samples, strict=True):
        assert difference(image_of(one["b64_json"]), sample.image) <= 1
        assert (one["revised_prompt"], one["seed"]) == (sample.text, sample.seed)
    edited = engine.generate(Request("red cat", image=noise(), mask=left_half(), seed=1, steps=3))
    for answer in (by_alpha, by_white, by_image):
        assert answer.status_code == 200, answer.text
        found = image_of(answer.json()["data"][0]["b64_json"])
        assert difference(found.crop((16, 0, 32, 32)), noise().crop((16, 0, 32, 32))) == 0, "kept pixels are as given"
        assert difference(found, edited.image) <= 1
    texts = engine.generate(Request(image=noise(), num=2, seed=5, steps=3)).samples
    for one, sample in zip(described.json()["data"], texts, strict=True):
        assert (one["text"], one["seed"]) == (sample.text, sample.seed)
        assert [w["word"] for w in one["words"]] == sample.text.split()


@asynchronous
async def test_the_model_and_its_words_are_listed(engine):
    async with service(engine, limits=Limits(num=3)) as http:
        listed = (await http.get("/v1/models")).json()
        assert listed["object"] == "list" and listed["data"] == [(await http.get("/v1/models/tiny")).json()]
        card = listed["data"][0]
        assert (card["id"], card["size"], card["words"], card["vocabulary_size"]) == ("tiny", "32x32", 6, 31)
        assert card["limits"]["num"] == 3 and card["defaults"]["order"] == ["text", "image"]
        assert_error(await http.get("/v1/models/other"), 404, "not_found", "model")
        assert (await http.get("/v1/vocabulary?prefix=Bi&limit=5")).json() == {"words": ["big", "bird"]}
        # In the vocabulary's order, which is that of frequency.
        assert (await http.get("/v1/vocabulary?prefix=ca&limit=5")).json() == {"words": ["cat", "car"]}
        assert len((await http.get("/v1/vocabulary?limit=1000")).json()["words"]) == 31
        for limit in ("0", "x", "1001", "-1", "9" * 5000):
            assert_error(await http.get(f"/v1/vocabulary?limit={limit}"), 400, "invalid_value", "limit")


# ------------------------------------------------------------------------------------------------- refusals


def bad(path: str, body: dict, param: str, code: str = "invalid_value", status: int = 400):
    return pytest.param(path, body, param, code, status, id=f"{path.rpartition('/')[2]}-{json.dumps(body)[:60]}")


@pytest.mark.parametrize(
    ("path", "body", "param", "code", "status"),
    [
        *(bad(path, {"sampler": 1}, "sampler", "unsupported_field") for path in ENDPOINTS),
        *(bad(path, {"prompt": "purple"}, "prompt") for path in ENDPOINTS),
        *(bad(path, {"prompt": " ?! "}, "prompt") for path in ENDPOINTS),
        *(bad(path, {"prompt": "red \ud800"}, "prompt") for path in ENDPOINTS),
        *(bad(path, {"prompt": "red " * 7}, "prompt") for path in ENDPOINTS),
        *(bad(path, {"prompt": "red " * 2000}, "prompt") for path in ENDPOINTS),
        *(bad(path, {"prompt": 5}, "prompt") for path in ENDPOINTS),
        *(bad(path, {"seed": 2**64}, "seed") for path in ENDPOINTS),
        *(bad(path, {"seed": 1.5}, "seed") for path in ENDPOINTS),
        *(bad(path, {"n": 0}, "n") for path in ENDPOINTS[1:]),
        *(bad(path, {"n": 65}, "n") for path in ENDPOINTS[1:]),
        *(bad(path, {"model": "gpt-image-1"}, "model", "model_not_found", 404) for path in ENDPOINTS[1:]),
        *(bad(path, {"image": "cat.png"}, "image", "invalid_image") for path in (INFILL, EDITS, CAPTIONS)),
        *(bad(path, {"image": "/etc/passwd"}, "image", "invalid_image") for path in (INFILL, EDITS, CAPTIONS)),
        *(bad(path, {"image": "https://x.org/a.png"}, "image", "invalid_image") for path in (INFILL, EDITS, CAPTIONS)),
        *(bad(path, {"image": base64_of(b"%!PS")}, "image", "invalid_image") for path in (INFILL, EDITS, CAPTIONS)),
        *(bad(path, {"image": PHOTO[:200]}, "image", "invalid_image") for path in (INFILL, EDITS, CAPTIONS)),
        *(bad(path, {"image": {"url": "x"}}, "image") for path in (INFILL, EDITS, CAPTIONS)),
        bad(INFILL, {"num": 65}, "num"),
        bad(INFILL, {"num": True}, "num"),
        bad(INFILL, {"steps": 251}, "steps"),
        bad(INFILL, {"steps": 250, "resample": 11}, "resample"),
        bad(INFILL, {"steps": "5"}, "steps"),
        bad(INFILL, {"guidance": 1e3}, "guidance"),
        bad(INFILL, {"guidance_interval": [0.5, 0.2]}, "guidance_interval"),
        bad(INFILL, {"eta": 0.5}, "eta"),
        bad(INFILL, {"order": ["sound"]}, "order"),
        bad(INFILL, {"order": "text"}, "order"),
        bad(INFILL, {"task": "image-to-text"}, "task"),
        bad(INFILL, {"deadline": 0}, "deadline"),
        bad(INFILL, {"preview_every": 5}, "preview_every"),
        bad(INFILL, {"output_format": "gif"}, "output_format"),
        bad(INFILL, {"mask": MASK}, "mask", "invalid_image"),
        bad(INFILL, {"image": PHOTO, "mask": base64_of(left_half((16, 16)))}, "mask", "invalid_image"),
        bad(INFILL, {"image": PHOTO, "mask": PHOTO}, "mask", "invalid_image"),
        bad(INFILL, {"image": PHOTO, "prompt": "red"}, "prompt, image"),
        bad(INFILL, {"prompt": "red", "inputs": {"text": "red"}}, "prompt"),
        bad(GENERATIONS, {"n": 2.0}, "n"),
        bad(GENERATIONS, {"response_format": "url"}, "response_format"),
        bad(GENERATIONS, {"background": "transparent"}, "background"),
        bad(GENERATIONS, {"quality": "hd"}, "quality"),
        bad(GENERATIONS, {"style": "vivid"}, "style", "unsupported_field"),
        bad(GENERATIONS, {"partial_images": 2}, "partial_images"),
        bad(GENERATIONS, {"num_inference_steps": 251}, "num_inference_steps"),
        bad(GENERATIONS, {"guidance_scale": 101}, "guidance_scale"),
        bad(EDITS, {"mask_image": None}, "image", "invalid_image"),
        bad(EDITS, {"mask": MASK, "mask_image": None}, "mask", "invalid_image"),
        bad(EDITS, {"mask": MASK}, "mask_image"),
        bad(EDITS, {"image": None}, "image"),
        bad(EDITS, {"mask_image": base64_of(left_half((16, 16)))}, "mask_image", "invalid_image"),
        bad(CAPTIONS, {"image": None}, "image"),
        bad(CAPTIONS, {"steps": 251}, "steps"),
        bad(CAPTIONS, {"stream": True}, "stream", "unsupported_field"),
    ],
)  # fmt: skip
@asynchronous
async def test_a_bad_value_is_a_400_that_names_its_field(engine, path, body, param, code, status):
    before = engine.stats().samples
    async with service(engine) as http:
        content = json.dumps(MINIMAL[path] | body)
        answer = await http.post(path, content=content, headers={"content-type": "application/json"})
    message = assert_error(answer, status, code, param)
    assert message.startswith(f"{param}: ") and "object at 0x" not in message
    assert engine.stats().samples == before, "nothing was computed"


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        ("{", "application/json", 400, "invalid_body"),
        ("", "application/json", 400, "invalid_body"),
        ("[]", "application/json", 400, "invalid_body"),
        ('{"steps": NaN}', "application/json", 400, "invalid_body"),
        ("[" * 100_000, "application/json", 400, "invalid_body"),
        ('{"seed": ' + "9" * 5000 + "}", "application/json", 400, "invalid_body"),
        (b'{"prompt": "\xff"}', "application/json", 400, "invalid_body"),
        ("{}", "text/plain", 415, "unsupported_media_type"),
        ("{}", "", 415, "unsupported_media_type"),
        ("x", "multipart/form-data", 400, "invalid_body"),
        ("x", "multipart/form-data; boundary=y", 400, "invalid_body"),
        ("--y\r\n\r\n", "multipart/form-data; boundary=y; charset=no", 400, "invalid_body"),
    ],
    ids=lambda value: str(value)[:30],
)
@asynchronous
async def test_a_malformed_body_is_refused(engine, content, kind, status, code):
    async with service(engine) as http:
        assert_error(await http.post(INFILL, content=content, headers={"content-type": kind}), status, code)


@asynchronous
async def test_unknown_paths_and_methods_have_error_objects(engine):
    async with service(engine) as http:
        assert_error(await http.get("/v1/nothing"), 404, "not_found")
        answer = await http.get(INFILL)
        assert_error(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"
        assert_error(await http.delete("/v1/requests/x"), 404, "not_found", "id")


@asynchronous
async def test_a_body_above_the_limit_is_refused_before_it_is_all_read(engine):
    app, _ = app_of(engine, limits=Limits(body_bytes=1000))
    read = 0

    async def endless():
        nonlocal read
        while True:
            read += 500
            yield b" " * 500

    headers = {"content-type": "application/json"}
    async with client(app) as http:
        assert_error(await http.post(INFILL, json={"image": "A" * 1000}), 413, "too_large")
        assert_error(await http.post(INFILL, files={"image": b"A" * 1000}), 413, "too_large")
        assert_error(await http.post(INFILL, content=endless(), headers=headers), 413, "too_large")
        assert read <= 2000


@asynchronous
async def test_a_body_that_does_not_come_is_given_up(engine):
    async def slow():
        yield b"{"
        await asyncio.sleep(5)

    async with service(engine, limits=Limits(body_seconds=0.05)) as http:
        answer = await http.post(INFILL, content=slow(), headers={"content-type": "application/json"})
        assert_error(answer, 408, "timeout")


@asynchronous
async def test_what_nobody_foresaw_is_a_500_without_details(engine, monkeypatch):
    async with service(engine) as http:
        monkeypatch.setattr(engine, "submit", lambda *_, **__: 1 / 0)
        message = assert_error(await http.post(INFILL, json={}), 500, "internal_error")
        assert "zero" not in message


@asynchronous
async def test_a_full_queue_is_a_429_and_a_deadline_a_504(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=1) as engine:
        app, served, read = *app_of(engine, max_queue=1), []

        async def body():
            read.append(True)
            yield b'{"steps": 1}'

        async with client(app) as http:
            waiting = asyncio.ensure_future(http.post(INFILL, json=LONG))
            await until(lambda: served.samples == 2)
            answer = await http.post(INFILL, content=body(), headers={"content-type": "application/json"})
            assert_error(answer, 429, "queue_full")
            assert not read, "what there is no room for is not read"
            assert int(answer.headers["retry-after"]) > 0
            assert (await http.get("/ready")).status_code == 503
            for handle in list(served._handles.values()):
                handle.cancel()
            assert_error(await waiting, 409, "cancelled")
            assert (await http.get("/ready")).status_code == 200
            assert_error(await http.post(INFILL, json=LONG | {"deadline": 0.05}), 504, "deadline_exceeded", "deadline")
        async with service(engine, limits=Limits(seconds=0.05)) as http:
            assert_error(await http.post(INFILL, json=LONG | {"deadline": 9}), 504, "deadline_exceeded", "deadline")


# ------------------------------------------------------------------------------------------------- tokens, other pages


@asynchronous
async def test_tokens_are_asked_for_where_there_are_some(engine):
    async with service(engine, tokens=["first", "s\u00e9cond"]) as http:
        for path in ("/health", "/ready", "/openapi.json"):
            assert (await http.get(path)).status_code == 200
        for header in (None, "Bearer", "Bearer no", "Basic first", "Bearer first2", b"Bearer \xff"):
            headers = {} if header is None else {"authorization": header}
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                answer = await http.get(path, headers=headers)
                assert_error(answer, 401, "unauthorized")
                assert answer.headers["www-authenticate"] == "Bearer"
        for token in ("first", "s\u00e9cond"):
            headers = {"authorization": f"bearer {token}".encode()}
            assert (await http.get("/v1/models", headers=headers)).status_code == 200


@asynchronous
async def test_other_pages_may_call_only_where_that_was_asked_for(engine):
    origin = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with service(engine) as http:
        assert "access-control-allow-origin" not in (await http.get("/v1/models", headers=origin)).headers
    async with service(engine, origins=["https://a.example"], tokens=["t"]) as http:
        assert (await http.options(INFILL, headers=origin)).headers["access-control-allow-origin"] == origin["origin"]
        refused = await http.get("/v1/models", headers=origin)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == origin["origin"]
        other = await http.get("/v1/models", headers=origin | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


@asynchronous
async def test_a_form_that_another_page_sends_is_refused(engine):
    form = {"files": {"steps": (None, "1")}}
    async with service(engine, origins=["https://a.example"]) as http:
        for site, origin, status in (
            ("cross-site", "https://b.example", 403),
            ("cross-site", "null", 403),
            ("cross-site", "https://a.example", 200),
            ("same-origin", "http://service", 200),
        ):
            answer = await http.post(INFILL, headers={"sec-fetch-site": site, "origin": origin}, **form)
            assert answer.status_code == status


# ------------------------------------------------------------------------------------------------- events


@asynchronous
async def test_a_stream_that_waits_is_not_silent(engine, monkeypatch):
    monkeypatch.setattr("engine.serving.service.SILENCE", 0.0001)
    async with service(engine) as http:
        answer = await http.post(INFILL, json={"steps": 9, "stream": True})
    blocks = answer.text.split("\n\n")
    assert ": nothing new" in blocks and blocks[-2] == "data: [DONE]"


@asynchronous
async def test_a_stream_tells_everything_and_ends_with_the_answer(engine):
    body = {"prompt": "red _", "num": 2, "steps": 4, "seed": 0}
    async with service(engine) as http:
        answer = await http.post(INFILL, json=body | {"stream": True, "preview_every": 2})
        plain = (await http.post(INFILL, json=body)).json()
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    names = [name for name, _ in events]
    assert names[0] == "queued" and names[-2:] == ["result", None] and "progress" in names
    assert answer.text.endswith("data: [DONE]\n\n")
    assert events[-2][1]["samples"] == plain["samples"]
    previews = [data for name, data in events if name == "preview"]
    assert previews and {sample["index"] for sample in previews[-1]["samples"]} == {0, 1}
    assert all(image_of(s["image"]).size == (32, 32) for p in previews for s in p["samples"] if "image" in s)


@asynchronous
async def test_a_stream_of_a_bad_request_is_a_400_and_one_that_fails_later_ends_with_its_error(engine):
    async with service(engine) as http:
        assert_error(await http.post(INFILL, json={"prompt": "purple", "stream": True}), 400, "invalid_value", "prompt")
        answer = await http.post(INFILL, json=LONG | {"stream": True, "deadline": 1})
    assert answer.status_code == 200
    name, data = events_of(answer.text)[-2]
    assert name == "error" and data["error"]["code"] == "deadline_exceeded"


@asynchronous
async def test_a_request_can_be_cancelled_by_its_id(engine):
    app, served = app_of(engine)
    connection = Connection(app, INFILL, LONG | {"stream": True})
    await until(lambda: any(name == "progress" for name, _ in connection.events))
    async with client(app) as http:
        id = connection.events[0][1]["id"]
        assert (await http.delete(f"/v1/requests/{id}")).json() == {"id": id, "cancelled": True}
        await connection.task
        assert_error(await http.delete(f"/v1/requests/{id}"), 404, "not_found", "id")
    name, data = connection.events[-2]
    assert name == "error" and data["error"]["code"] == "cancelled" and served.samples == 0


# ------------------------------------------------------------------------------------------------- the service itself


@asynchronous
async def test_health_readiness_and_metrics(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, dtype="float32")
    app, served = app_of(engine)
    served.warm = False
    async with client(app) as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 503, "not warmed up"
        async with app.router.lifespan_context(app):
            await until(lambda: served.ready)
            assert (await http.get("/ready")).status_code == 200
            await http.post(INFILL, json={"num": 3, "steps": 2})
            await http.post(INFILL, json=LONG | {"deadline": 0.1})
            await http.post(INFILL, json={"prompt": "purple"})
            text = (await http.get("/metrics")).text
        assert (await http.get("/health")).status_code == (await http.get("/ready")).status_code == 503
        assert_error(await http.post(INFILL, json={}), 503, "closed")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    expected = {"num_requests_running": 0, "num_requests_waiting": 0, "image_count_total": 3}
    expected |= {"requests_success_total": 1, "num_inference_steps_sum": 2}
    expected |= {f'requests_failure_total{{reason="{name}"}}': 1 for name in ("InputError", "DeadlineExceeded")}
    expected |= {f"{name}_count": 1 for name in ("e2e_request_latency_s", "request_queue_wait_s", "diffusion_exec_s")}
    assert {name: float(values[f"psunet:{name}"]) for name in expected} == expected


@asynchronous
async def test_a_warm_up_that_fails_is_logged_and_leaves_the_service_unready(own, monkeypatch, caplog):
    engine, _ = own
    app, served = app_of(engine, warmup=1)
    served.warm = False
    monkeypatch.setattr(engine, "warmup", lambda _: 1 / 0)
    async with client(app) as http, app.router.lifespan_context(app):
        await until(lambda: "the warm-up failed" in caplog.text)
        assert (await http.get("/ready")).status_code == 503 and (await http.get("/health")).status_code == 200


@asynchronous
async def test_the_openapi_document_describes_bodies_with_examples_that_work(engine):
    async with service(engine) as http:
        document = (await http.get("/openapi.json")).json()
        for path in ENDPOINTS:
            content = document["paths"][path]["post"]["requestBody"]["content"]
            assert content.keys() == {"application/json", "multipart/form-data"}
            assert content["application/json"]["schema"]["additionalProperties"] is False
            examples = content["application/json"]["examples"]
            assert examples
            for example in examples.values():
                few = {name: 1 for name in ("steps", "num_inference_steps") if name in MINIMAL[path]}
                answer = await http.post(path, json=example["value"] | few)
                assert answer.status_code == 200, (path, answer.text)
            assert {"400", "429", "504"} <= document["paths"][path]["post"]["responses"].keys()
        assert "422" not in json.dumps(document) and "ValidationError" not in json.dumps(document)
