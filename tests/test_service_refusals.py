"""The HTTP service: what it refuses and how, limits, tokens and other pages."""

import asyncio
import json

import pytest
from engine_cases import left_half, noise
from PIL import Image
from service_cases import (
    CAPTIONS,
    EDITS,
    ENDPOINTS,
    GENERATIONS,
    INFILL,
    LONG,
    MASK,
    MINIMAL,
    PHOTO,
    app_of,
    assert_error,
    asynchronous,
    base64_of,
    client,
    service,
    until,
)

from engine import Engine
from engine.serving.inputs import Limits

PART = '--y\r\nContent-Disposition: form-data; name="steps"\r\n\r\n'  # of a form with boundary y, up to its value

# ------------------------------------------------------------------------------------------------- refusals


WIDE = base64_of(noise(size=(96, 32)))  # of which the middle third is used
WHITE_EDGE = base64_of(left_half((32, 32)).crop((0, 0, 96, 32)))  # white outside of that
FAINT, CLEAR_EDGE = Image.new("RGBA", (32, 32), (0, 0, 0, 128)), Image.new("RGBA", (96, 32), "black")
CLEAR_EDGE.paste((0, 0, 0, 0), (0, 0, 16, 32))
FAINT, CLEAR_EDGE = base64_of(FAINT), base64_of(CLEAR_EDGE)


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
        bad(INFILL, {"steps": 5, "resample": 2}, "jump"),
        bad(INFILL, {"steps": 250, "infill": "langevin", "inner_steps": 10}, "inner_steps"),
        bad(INFILL, {"infill": "langevin"}, "infill"),
        bad(INFILL, {"infill": "lanpaint"}, "infill"),
        bad(INFILL, {"step_size": 0}, "step_size"),
        bad(INFILL, {"spacing": "karras"}, "spacing"),
        bad(INFILL, {"steps": "5"}, "steps"),
        bad(INFILL, {"guidance": 1e3}, "guidance"),
        bad(INFILL, {"guidance_interval": [0.5, 0.2]}, "guidance_interval"),
        bad(INFILL, {"eta": 0.5}, "eta"),
        bad(INFILL, {"order": ["sound"]}, "order"),
        bad(INFILL, {"order": "text"}, "order"),
        bad(INFILL, {"inputs": {"image": 5}}, "inputs['image']"),
        bad(INFILL, {"inputs": {"k" * 10_000: "red"}}, f"inputs['{'k' * 47}...{'k' * 48}']"),
        bad(INFILL, {"image": PHOTO, "masks": {"sound": MASK}}, "masks['sound']"),
        bad(INFILL, {"k" * 10_000: 1}, "k" * 60 + "..." + "k" * 100, "unsupported_field"),
        bad(INFILL, {"task": "image-to-text"}, "task"),
        bad(INFILL, {"deadline": 0}, "deadline"),
        bad(INFILL, {"preview_every": 5}, "preview_every"),
        bad(INFILL, {"output_format": "gif"}, "output_format"),
        bad(INFILL, {"mask": MASK}, "mask", "invalid_image"),
        bad(INFILL, {"image": PHOTO, "mask": base64_of(left_half((16, 16)))}, "mask", "invalid_image"),
        bad(INFILL, {"image": PHOTO, "mask": PHOTO}, "mask", "invalid_image"),
        bad(INFILL, {"image": PHOTO, "prompt": "red"}, "prompt, image"),
        bad(INFILL, {"image": ""}, "image", "invalid_image"),
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
        bad(EDITS, {"mask": FAINT, "mask_image": None}, "mask", "invalid_image"),
        bad(EDITS, {"image": WIDE, "mask": CLEAR_EDGE, "mask_image": None}, "mask", "invalid_image"),
        bad(EDITS, {"image": WIDE, "mask_image": WHITE_EDGE}, "mask_image", "invalid_image"),
        bad(EDITS, {"mask_image": base64_of(Image.new("L", (32, 32)))}, "mask_image", "invalid_image"),
        bad(EDITS, {"mask": MASK}, "mask_image"),
        bad(EDITS, {"image": None}, "image"),
        bad(EDITS, {"mask_image": base64_of(left_half((16, 16)))}, "mask_image", "invalid_image"),
        bad(CAPTIONS, {"image": None}, "image"),
        bad(CAPTIONS, {"prompt": ""}, "prompt, image"),
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


@pytest.mark.parametrize("path", ENDPOINTS)
@asynchronous
async def test_a_query_parameter_is_refused(engine, path):
    async with service(engine) as http:
        answer = await http.post(f"{path}?steps=2&seed=1", json=MINIMAL[path])
        message = assert_error(answer, 400, "unsupported_field", "steps")
    assert message.endswith("send it in the body")


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
        ('{"\\ud800": 1}', "application/json", 400, "invalid_body"),
        ("{}", "text/plain", 415, "unsupported_media_type"),
        ("{}", "", 415, "unsupported_media_type"),
        ("", "multipart/form-data; boundary=y", 400, "invalid_body"),
        (f"{PART}1", "multipart/form-data; boundary=y", 400, "invalid_body"),
        ("x", "multipart/form-data", 400, "invalid_body"),
        ("x", "multipart/form-data; boundary=y", 400, "invalid_body"),
        ("--y\r\n\r\n", "multipart/form-data; boundary=y; charset=no", 400, "invalid_body"),
    ],
    ids=lambda value: str(value)[:30],
)
@asynchronous
async def test_a_malformed_body_is_refused(engine, content, kind, status, code):
    async with service(engine) as http:
        answer = await http.post(INFILL, content=content, headers={"content-type": kind})
        assert "; send " in assert_error(answer, status, code) or "\\ud800" in str(content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"steps": 1,}', "double quotes: line 1, column 13"),
        ('{"steps": NaN}', "a number that cannot be read, NaN"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"prompt": "\xff"}', "not in UTF-8"),
    ],
    ids=lambda value: str(value)[:20],
)
@asynchronous
async def test_what_is_no_json_is_told_apart(engine, content, says):
    async with service(engine) as http:
        answer = await http.post(INFILL, content=content, headers={"content-type": "application/json"})
        assert says in assert_error(answer, 400, "invalid_body")


@asynchronous
async def test_a_name_that_is_there_twice_is_refused_in_json_and_in_forms(engine):
    async with service(engine) as http:
        json_type = {"content-type": "application/json"}
        for param, twice in (("steps", '{"steps": 1, "steps": 1}'), ("text", '{"inputs": {"text": "a", "text": "b"}}')):
            assert_error(await http.post(INFILL, content=twice, headers=json_type), 400, "invalid_value", param)
        form = [("steps", (None, "1")), ("steps", (None, "1"))]
        assert_error(await http.post(INFILL, files=form), 400, "invalid_value", "steps")


@pytest.mark.parametrize("coding", ["gzip", "br", "no\u00efs" * 90])
@asynchronous
async def test_a_compressed_body_is_refused_by_its_coding(engine, coding):
    headers = {"content-type": "application/json", "content-encoding": coding.encode()}
    async with service(engine) as http:
        answer = await http.post(INFILL, content=b'{"steps": 1}', headers=headers)
        message = assert_error(answer, 415, "unsupported_media_type")
        assert answer.headers["accept-encoding"] == "identity" and "uncompressed" in message and len(message) < 300
        headers["content-encoding"] = b"identity"
        assert (await http.post(INFILL, content=b'{"steps": 1}', headers=headers)).status_code == 200


@asynchronous
async def test_a_bound_in_a_refusal_is_that_of_the_service(engine):
    async with service(engine, limits=Limits(num=3, steps=20)) as http:
        for body in ({"num": 4}, {"num": 2000}):
            answer = await http.post(INFILL, json=body)
            assert " 3" in assert_error(answer, 400, "invalid_value", "num")
        for body in ({"num_inference_steps": 21}, {"num_inference_steps": 2000}):
            answer = await http.post(GENERATIONS, json=body)
            assert " 20" in assert_error(answer, 400, "invalid_value", "num_inference_steps")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", "", "a whole number"),
        ("guidance", "NaN", "a number"),
        ("stream", "on", "true or false"),
        ("order", "[", "as in JSON"),
        ("inputs", "{'text': 1}", "as in JSON"),
        ("order", "text,image", "image, text"),
        ("guidance_interval", "0.5", "at least 2"),
    ],
)
@asynchronous
async def test_a_value_in_a_form_is_refused_with_how_to_write_it(engine, name, value, says):
    async with service(engine) as http:
        message = assert_error(await http.post(INFILL, files={name: (None, value)}), 400, "invalid_value", name)
        assert says in message


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (INFILL, {"num": "two"}, "num: 'two' should be a valid integer"),
        (INFILL, {"steps": 5000}, "steps: 5000 should be less than or equal to 250"),
        (INFILL, {"guidance_interval": [0.5]}, "guidance_interval: [0.5] should have at least 2 items, not 1"),
        (INFILL, {"steps": 250, "resample": 100}, "use at most 10, or fewer steps"),
        (INFILL, {"inputs": {"sound": "x"}}, "inputs['sound']: is not a modality of the model; use one of image, text"),
        (GENERATIONS, {"user": "u" * 257}, "user: has 257 characters; use at most 256"),
        (GENERATIONS, {"size": "9x9"}, "size: '9x9' is not that of this model; use 32x32 or auto"),
        (EDITS, {"mask_image": WHITE_EDGE, "image": WIDE}, "mask_image: marks nothing in the middle square"),
        (EDITS, {"mask": FAINT, "mask_image": None}, "mask: is nowhere transparent: its lowest alpha is 128 of 255"),
        (CAPTIONS, {"prompt": "red heart"}, "leave something out, put _ in the prompt"),
    ],
    ids=lambda value: str(value)[:30],
)
@asynchronous
async def test_a_refusal_says_the_value_and_what_to_do(engine, path, body, says):
    async with service(engine) as http:
        answer = await http.post(path, json=MINIMAL[path] | body)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


@asynchronous
async def test_a_form_is_told_what_is_missing_and_what_is_a_file(engine):
    async with service(engine) as http:
        message = assert_error(await http.post(EDITS, files={"prompt": (None, "red")}), 400, "invalid_value", "image")
        assert message == "image: is missing; send it"
        answer = await http.post(GENERATIONS, files={"prompt": ("prompt.txt", b"red")})
        assert assert_error(answer, 400, "invalid_value", "prompt") == "prompt: is a file; send a value"
        many = [(f"field{i}", (None, "1")) for i in range(65)]
        assert "at most 64 fields" in assert_error(await http.post(INFILL, files=many), 400, "invalid_body")


@asynchronous
async def test_all_that_a_value_may_be_is_told(engine):
    async with service(engine) as http:
        message = assert_error(await http.post(INFILL, json={"order": "text"}), 400, "invalid_value", "order")
        assert "list" in message and "'together'" in message
        message = assert_error(await http.post(INFILL, json={"image": 5}), 400, "invalid_value", "image")
        assert "bytes" not in message


@asynchronous
async def test_unknown_paths_and_methods_have_error_objects(engine):
    async with service(engine) as http:
        for path in ("/v1/nothing", f"{INFILL}/", "/health/", "/" + "x" * 10_000):
            message = assert_error(await http.get(path), 404, "not_found")
            assert message.startswith(path[:50]) and "/openapi.json" in message and len(message) < 300
        assert (await http.head(INFILL)).status_code == 405
        for method in ("GET", "PUT", "OPTIONS"):
            answer = await http.request(method, INFILL)
            assert "use POST" in assert_error(answer, 405, "method_not_allowed")
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
            assert not read, "the body was read although the queue is full"
            assert int(answer.headers["retry-after"]) > 0
            assert (await http.get("/ready")).status_code == 503
            for handle in list(served._handles.values()):
                handle.cancel()
            assert_error(await waiting, 409, "cancelled")
            assert (await http.get("/ready")).status_code == 200
            assert_error(await http.post(INFILL, json=LONG | {"deadline": 0.05}), 504, "deadline_exceeded", "deadline")
        async with service(engine, limits=Limits(seconds=0.05)) as http:
            assert_error(await http.post(INFILL, json=LONG), 504, "deadline_exceeded", None)
            assert_error(await http.post(INFILL, json=LONG | {"deadline": 9}), 400, "invalid_value", "deadline")


@asynchronous
async def test_a_client_that_hangs_up_amid_its_body_is_not_a_fault_of_the_service(engine):
    messages = iter([{"type": "http.request", "body": b"{}", "more_body": True}, {"type": "http.disconnect"}])
    headers = [(b"content-type", b"application/json"), (b"content-length", b"20")]
    scope = {"type": "http", "method": "POST", "path": INFILL, "query_string": b"", "headers": headers}

    async def receive():
        return next(messages)

    async def send(message):
        assert message.get("status", 400) == 400

    await app_of(engine)[0](scope, receive, send)  # raises what the server would log


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
                message = assert_error(answer, 401, "unauthorized")
                assert ("no token was sent" in message) == (header in (None, "Bearer"))
                assert answer.headers["www-authenticate"] == "Bearer"
        for token in ("first", "s\u00e9cond"):
            headers = {"authorization": f"bearer {token}".encode()}
            assert (await http.get("/v1/models", headers=headers)).status_code == 200


@asynchronous
async def test_other_pages_may_call_only_where_that_was_asked_for(engine):
    origin = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with service(engine) as http:
        assert "access-control-allow-origin" not in (await http.get("/v1/models", headers=origin)).headers
        assert_error(await http.options(INFILL, headers=origin), 403, "forbidden")
    async with service(engine, origins=["https://a.example"], tokens=["t"]) as http:
        asked = origin | {"access-control-request-headers": "authorization,x-stainless-lang"}  # of OpenAI's client
        allowed = await http.options(INFILL, headers=asked)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == origin["origin"]
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
