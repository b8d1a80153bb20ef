"""The HTTP service: what its endpoints answer, events, and the end."""

import asyncio
import base64
import json

import openapi_spec_validator
import pytest
from engine_cases import assert_same, difference, left_half, noise
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
    Connection,
    app_of,
    assert_error,
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
from engine.serving import schemas
from engine.serving.app import SAMPLING
from engine.serving.inputs import Limits
from engine.serving.schemas import InfillBody

# ------------------------------------------------------------------------------------------------- answers


def fields_of(request: Request) -> dict:
    """A request as a client's fields."""
    fields = {name: getattr(request, name) for name in ("prompt", "num", "steps", "solver", "guidance", "seed")}
    fields |= {key: getattr(request, key) for key in ("resample", "jump", "spacing")}
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
        items = [("order", "text"), ("order", "image"), ("guidance_interval[]", "0"), ("guidance_interval[]", "0.5")]
        by_item = [(name, (None, form[name])) for name in ("prompt", "seed", "steps")]
        by_item += [(name, (None, value)) for name, value in items]
        by_item = await http.post(INFILL, files=[*by_item, *files.items()])
    for answer in (by_form, by_item):
        assert answer.status_code == 200, answer.text
    assert by_item.json()["samples"] == by_form.json()["samples"]
    assert by_form.json()["samples"] == by_json.json()["samples"] == by_name.json()["samples"]
    assert_error(twice, 400, "invalid_value", "image")


@asynchronous
async def test_a_file_that_was_not_chosen_in_a_browser_is_not_given(engine):
    disposition = '--y\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n{}\r\n'
    body = disposition.format("mask", '; filename=""', "") + disposition.format("steps", "", 1) + "--y--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=y"}
    async with service(engine) as http:
        answer = await http.post(INFILL, content=body, headers=headers)
        assert answer.status_code == 200 and answer.json()["task"] == "joint"
        assert_error(await http.post(CAPTIONS, content=body, headers=headers), 400, "invalid_value", "image")


@pytest.mark.parametrize(
    "written",
    [
        lambda data: base64.encodebytes(data).decode(),
        lambda data: base64.encodebytes(data).decode().replace("\n", "\r\n"),
        lambda data: "data:image/png;charset=utf-8;base64,\n" + base64.encodebytes(data).decode(),
        lambda data: "data:application/octet-stream;base64," + base64.b64encode(data).decode(),
        lambda data: "DATA:;BASE64," + base64.b64encode(data).decode(),
    ],
    ids=["MIME", "CRLF", "charset", "unknown type", "no type"],
)
@asynchronous
async def test_base64_is_read_as_programs_write_it(engine, written):
    body = {"prompt": "red", "mask": MASK, "seed": 1, "steps": 1}
    async with service(engine) as http:
        found, expected = [
            (await http.post(INFILL, json=body | {"image": image})).json()["samples"]
            for image in (written(file_of(noise())), PHOTO)
        ]
    assert found == expected


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
            short = {"sketch": PHOTO, "sketch_mask": MASK, "steps": 1, "seed": sample["seed"]}
            form = {"sketch": file_of(noise()), "sketch_mask": file_of(left_half())}
            same = [
                (await http.post(INFILL, json=short)).json()["samples"][0],
                (await http.post(INFILL, data={"steps": 1, "seed": sample["seed"]}, files=form)).json()["samples"][0],
            ]
            bad = await http.post(INFILL, json={"inputs": {"sketch": "no"}})
            worse = await http.post(INFILL, json={"sketch": "no"})
            unknown = await http.post(INFILL, json={"inputs": {"sound": PHOTO}})
    assert set(sample["outputs"]) == {"image", "text", "sketch"}
    kept = (16, 0, 32, 32)
    assert difference(image_of(sample["outputs"]["sketch"]).crop(kept), noise().crop(kept)) == 0
    assert [m["name"] for m in card["modalities"]] == ["image", "text", "sketch"]
    assert [other["outputs"] for other in same] == [sample["outputs"]] * 2
    assert_error(bad, 400, "invalid_image", "inputs['sketch']")
    assert_error(worse, 400, "invalid_image", "sketch")
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
        assert_error(await http.get("/v1/models/other"), 404, "model_not_found", "model")
        assert (await http.get("/v1/vocabulary?prefix=Bi&limit=5")).json() == {"words": ["big", "bird"]}
        # In the vocabulary's order, which is that of frequency.
        assert (await http.get("/v1/vocabulary?prefix=ca&limit=5")).json() == {"words": ["cat", "car"]}
        assert len((await http.get("/v1/vocabulary?limit=1000")).json()["words"]) == 31
        for limit in ("0", "x", "", "1001", "-1", "1.5", "9" * 5000):
            answer = await http.get(f"/v1/vocabulary?limit={limit}")
            assert assert_error(answer, 400, "invalid_value", "limit").startswith("limit: ")
        assert_error(await http.get("/v1/vocabulary?start=b"), 400, "unsupported_field", "start")
        assert_error(await http.get("/v1/vocabulary?prefix=a&prefix=b"), 400, "invalid_value", "prefix")


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
        answer = await http.post(INFILL, json=LONG | {"stream": True, "deadline": 3})
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
        assert (await http.get("/health")).status_code == (await http.head("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == (await http.head("/ready")).status_code == 503, "not warmed up"
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


def references(document) -> set[str]:
    """What a part of an OpenAPI document refers to."""
    if isinstance(document, dict):
        return {document["$ref"]} if "$ref" in document else set().union(*map(references, document.values()))
    return set().union(*map(references, document)) if isinstance(document, list) else set()


@asynchronous
async def test_the_openapi_document_keeps_to_its_standard(engine):
    async with service(engine) as http:
        openapi_spec_validator.validate((await http.get("/openapi.json")).json())


@asynchronous
async def test_the_openapi_document_is_enough_to_write_a_client(engine):
    async with service(engine, limits=Limits(num=3, steps=20)) as http:
        document = (await http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert references(document) <= {f"#/components/schemas/{name}" for name in schemas}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert all(content for content in operation["responses"]["200"]["content"].values()), path
            assert ("security" in operation) == path.startswith(("/v1/", "/metrics"))
    for path, num, steps in ((INFILL, "num", "steps"), (GENERATIONS, "n", "num_inference_steps")):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        for body in content.values():
            fields = {name: [f, *f.get("anyOf", ())] for name, f in body["schema"]["properties"].items()}
            most = {name: [kind["maximum"] for kind in f if "maximum" in kind] for name, f in fields.items()}
            assert (most[num], most[steps], most["seed"]) == ([3], [20], [2**64 - 1])
    form = document["paths"][INFILL]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["image"]["format"] == form["properties"]["mask"]["format"] == "binary"


@asynchronous
async def test_answers_and_events_have_the_fields_of_the_openapi_document(engine):
    def check(model, data) -> None:
        assert model.model_validate(data).model_dump(exclude_unset=True) == data

    async with service(engine) as http:
        check(schemas.ModelsAnswer, (await http.get("/v1/models")).json())
        check(schemas.VocabularyAnswer, (await http.get("/v1/vocabulary")).json())
        check(schemas.StatusAnswer, (await http.get("/health")).json())
        check(schemas.ErrorAnswer, (await http.get("/v1/nothing")).json())
        for path, endpoint in SAMPLING.items():
            check(endpoint.answer, (await http.post(path, json=MINIMAL[path])).json())
            if not endpoint.events:
                continue
            more = {"preview_every": 1} if path == INFILL else {"partial_images": 1}
            steps = {name: 4 for name in MINIMAL[path] if "steps" in name}
            answer = await http.post(path, json=MINIMAL[path] | more | steps | {"stream": True})
            events = events_of(answer.text)[:-1]
            assert {name for name, _ in events} == set(endpoint.events) - {"error"}
            for name, data in events:
                check(endpoint.events[name], data)
