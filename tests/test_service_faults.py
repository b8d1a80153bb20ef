"""Faults that users of other engines have reported, each as the behaviour that this service has instead.

Where a fault was reported stands beside its test, for who wants to read about it.
"""

import asyncio
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from engine_cases import difference, left_half, levels, noise
from PIL import Image
from service_cases import (
    EDITS,
    GENERATIONS,
    INFILL,
    LONG,
    Connection,
    app_of,
    asynchronous,
    base64_of,
    client,
    events_of,
    image_of,
    memory,
    service,
    until,
)

from engine import Engine, Request
from engine.images import open_mask

KEPT = (16, 0, 32, 32)  # of `left_half`


async def infill(http, **body) -> dict:
    answer = await http.post(INFILL, json={"steps": 3, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def images(answer: dict) -> list[Image.Image]:
    return [image_of(sample["image"]) for sample in answer["samples"]]


# ------------------------------------------------------------------------------------------------- batches


@asynchronous
async def test_a_seed_has_one_image_whatever_shares_its_batch(engine):  # sglang 28502
    bodies = [
        {"prompt": "red cat", "seed": 5},
        {"seed": 5},
        {"image": base64_of(noise()), "seed": 9, "steps": 7},
        {"prompt": "big _", "solver": "ddpm", "seed": 5},
        {"prompt": "sun", "num": 5, "guidance": 1.0, "seed": 1},
    ]
    async with service(engine) as http:
        alone = [await infill(http, **body) for body in bodies]
        together = await asyncio.gather(*(infill(http, **body) for body in reversed(bodies)))
    for a, b in zip(alone, reversed(together), strict=True):
        assert max(map(difference, images(a), images(b))) <= 1, "one level of rounding"
        assert [s["text"] for s in a["samples"]] == [s["text"] for s in b["samples"]]


@asynchronous
async def test_longer_texts_beside_it_do_not_shift_a_text(engine):  # vllm-omni 4443
    prompts = ["red", "red cat", "_ dog", "big bird on the tree _", "_ _ _ _ _ _", ""]
    async with service(engine) as http:
        alone = [await infill(http, prompt=prompt, seed=2) for prompt in prompts]
        together = await asyncio.gather(*(infill(http, prompt=prompt, seed=2) for prompt in prompts))
    for prompt, a, b in zip(prompts, alone, together, strict=True):
        assert a["samples"][0]["text"] == b["samples"][0]["text"]
        words = b["samples"][0]["text"].split()
        assert [w for w, given in zip(words, prompt.split(), strict=True) if given != "_"] == prompt.replace(
            "_", ""
        ).split()
        assert difference(*images(a), *images(b)) <= 1


@asynchronous
async def test_an_abort_aborts_nothing_that_comes_later(engine, alone):  # vllm-omni 3167
    app, served = app_of(engine)
    async with client(app) as http:
        for _ in range(3):
            connection = Connection(app, INFILL, LONG)
            await until(lambda: served.requests == (1, 0))
            connection.gone.set()
            answer = await infill(http, prompt="red cat", steps=2, solver="ddim", guidance=3.0, seed=0)
            assert difference(images(answer)[0], alone[1].image) <= 1
    await until(lambda: served.samples == 0)


@asynchronous
async def test_all_of_many_concurrent_calls_are_answered_each_with_its_own(engine):  # vllm-omni 1080
    async with service(engine) as http:
        answers = await asyncio.gather(*(infill(http, prompt="red", seed=seed, num=1 + seed % 3) for seed in range(24)))
    for seed, answer in enumerate(answers):
        assert [sample["seed"] for sample in answer["samples"]] == list(range(seed, seed + 1 + seed % 3))


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_a_request_ends_when_its_client_leaves_and_blocks_no_other(engine, stream):  # docker/model-runner 1041
    app, served = app_of(engine)
    connection = Connection(app, INFILL, LONG | {"stream": stream})
    await until(lambda: served.requests == (1, 0))
    async with client(app) as http:
        turns, ended = 0, time.perf_counter() + 0.3
        while time.perf_counter() < ended:
            assert (await http.get("/health")).status_code == 200
            turns += 1
        assert turns > 10, "the loop answers while the engine computes"
        before = engine.stats().forwards
        connection.gone.set()
        await connection.task
        await until(lambda: served.samples == 0)
        assert engine.stats().forwards <= before + 200, "of 2,500"
        before = engine.stats().forwards
        await infill(http, prompt="red")
        assert engine.stats().forwards <= before + 3 + 50, "its own 3, and few until the worker has seen the cancelling"


@asynchronous
async def test_every_sample_of_n_is_answered(engine):  # vllm-omni 1969
    async with service(engine) as http:
        answer = (await http.post(GENERATIONS, json={"prompt": "red", "n": 4, "num_inference_steps": 2})).json()
        found = [image_of(one["b64_json"]).tobytes() for one in answer["data"]]
        assert len(set(found)) == 4 and len({one["seed"] for one in answer["data"]}) == 4
        assert len({image.tobytes() for image in images(await infill(http, num=3))}) == 3


@pytest.mark.parametrize("path", [INFILL, GENERATIONS])
@asynchronous
async def test_seed_0_is_a_seed_and_no_seed_is_a_random_one(engine, path):  # gladia 968
    few = {"steps": 2} if path == INFILL else {"num_inference_steps": 2}
    async with service(engine) as http:
        answers = [(await http.post(path, json={"prompt": "red", **few, **seed})).json()
                   for seed in ({"seed": 0}, {"seed": 0}, {}, {}, {"seed": None})]  # fmt: skip
    zero, again, *random = [(answer.get("samples") or answer["data"])[0] for answer in answers]
    assert zero == again and zero["seed"] == 0
    assert len({one["seed"] for one in random}) == 3
    text = zero.get("image") or zero["b64_json"]
    assert difference(image_of(text), engine.generate(Request("red", steps=2, seed=0)).image) == 0


@asynchronous
async def test_a_stream_has_the_image_and_every_partial_image(engine):  # sglang 24240
    body = {"prompt": "red", "n": 2, "seed": 3, "num_inference_steps": 9}
    async with service(engine) as http:
        plain = (await http.post(GENERATIONS, json=body)).json()["data"]
        for path, kind, more in (
            (GENERATIONS, "image_generation", {}),
            (EDITS, "image_edit", {"image": base64_of(noise()), "mask_image": base64_of(left_half())}),
        ):
            answer = await http.post(path, json=body | more | {"stream": True, "partial_images": 2})
            events = events_of(answer.text)
            partial = [data for name, data in events if name == f"{kind}.partial_image"]
            done = [data for name, data in events if name == f"{kind}.completed"]
            assert len(partial) + len(done) + 1 == len(events) and len(partial) == 4
            assert all(image_of(data["b64_json"]).size == (32, 32) for data in partial + done)
            assert [data["seed"] for data in done] == [3, 4] and all(
                data["type"] == f"{kind}.completed" for data in done
            )
            if path == GENERATIONS:
                assert [data["b64_json"] for data in done] == [one["b64_json"] for one in plain]
        few = {"prompt": "red", "num_inference_steps": 5, "stream": True, "partial_images": 3}
        names = [name for name, _ in events_of((await http.post(GENERATIONS, json=few)).text)]
        assert names.count("image_generation.partial_image") == 3


# ------------------------------------------------------------------------------------------------- images


@asynchronous
async def test_exif_turns_an_image_and_trns_makes_it_transparent(engine):  # vllm pull request 44974
    upright = noise().resize((48, 32), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    turned = base64_of(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    palette = upright.quantize(16)
    with_trns = base64_of(palette, transparency=3)
    white = palette.convert("RGB")
    white.paste("white", mask=Image.fromarray((np.asarray(palette) == 3).astype(np.uint8) * 255))
    async with service(engine) as http:
        for sent, plain in ((turned, upright), (with_trns, white)):
            mask = base64_of(Image.new("L", plain.size))
            body = {"mask": mask, "prompt": "_", "seed": 0}
            found, expected = [await infill(http, image=image, **body) for image in (sent, base64_of(plain))]
            assert images(found)[0].tobytes() == images(expected)[0].tobytes()
            assert found["samples"] == expected["samples"]
        clear = Image.new("RGBA", (48, 32))
        clear.paste("black", (0, 0, 20, 32))  # right of it the image is edited
        edit = {"prompt": "red", "mask": base64_of(clear), "num_inference_steps": 1, "seed": 0}
        edited = [await http.post(EDITS, json=edit | {"image": sent}) for sent in (turned, base64_of(upright))]
        assert edited[0].json()["data"] == edited[1].json()["data"]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16", "1"])
@asynchronous
async def test_an_image_of_any_mode_gives_a_jpeg(engine, mode):  # vllm-omni pull request 2297
    image = noise().convert("L" if mode == "I;16" else "RGB").convert(mode)
    sent = base64_of(image, format="JPEG" if mode == "CMYK" else "PNG")
    async with service(engine) as http:
        body = {"image": sent, "prompt": "_ cat", "mask": base64_of(left_half()), "output_format": "jpeg"}
        (found,) = images(await infill(http, **body))
    assert (found.format, found.mode, found.size) == ("JPEG", "RGB", (32, 32))


def faint(alpha: int) -> Image.Image:
    """White on the left, and on the right of so much opacity."""
    mask = Image.new("LA", (32, 32), (255, 255))
    mask.paste((255, alpha), KEPT)
    return mask


@asynchronous
async def test_faint_parts_and_noise_of_a_mask_are_kept(engine):  # A1111 16854, pull request 10644
    rng = np.random.default_rng(0)
    grain = rng.integers(0, 30, (32, 32))
    grainy = Image.fromarray(np.where(np.asarray(left_half()) > 0, 255 - grain, grain).astype(np.uint8))
    async with service(engine) as http:
        same = {"image": base64_of(noise()), "prompt": "red", "seed": 1}
        (expected,) = images(await infill(http, mask=base64_of(left_half()), **same))
        for mask in (faint(100), grainy):
            (found,) = images(await infill(http, mask=base64_of(mask), **same))
            assert found.tobytes() == expected.tobytes()
        alpha = Image.new("RGBA", (32, 32))
        alpha.paste((0, 0, 0, 200), KEPT)  # OpenAI's: what is not quite opaque is kept, too
        body = {"prompt": "red", "seed": 1, "num_inference_steps": 3, "image": same["image"], "mask": base64_of(alpha)}
        answer = await http.post(EDITS, json=body)
        assert image_of(answer.json()["data"][0]["b64_json"]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (7, 300), (64, 64)], ids=str)
@asynchronous
async def test_images_of_any_size_keep_what_the_mask_keeps(engine, size):  # A1111 15921
    image, mask = noise(1, size), left_half(size) if size != (1, 1) else Image.new("L", size)
    whole = Request("_", image=image, steps=1)
    expected = levels(engine.generate(whole).image)
    async with service(engine) as http:
        body = {"image": base64_of(image), "mask": base64_of(mask), "prompt": "_ cat", "steps": 1}
        found = levels(images(await infill(http, **body))[0])
    assert found.shape == (32, 32, 3)
    kept = ~open_mask(mask, size, 32)
    assert kept.any() and (found[kept] == expected[kept]).all()


@pytest.mark.parametrize("size", ["33x32", "63x65", "31x31", "0x0", "-32x32", "100000x10000", "32", "x", ""])
@asynchronous
async def test_another_size_is_refused(engine, size):  # sglang 32996, vllm-omni 3274
    async with service(engine) as http:
        for path, more in ((GENERATIONS, {}), (EDITS, {"image": base64_of(noise())})):
            answer = await http.post(path, json={"prompt": "red", "size": size, **more})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "size"
            assert "32x32" in answer.json()["error"]["message"]


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it is this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(100_000, 10_000), (10_000, 10_000), (5000, 4000), (2**31 - 1, 1)], ids=str)
@asynchronous
async def test_a_small_file_of_a_huge_image_is_refused_unread(engine, size):  # vllm-omni 3274
    file = base64_of(bomb(*size))
    assert len(file) < 1000
    async with service(engine) as http:
        for param, body in (("image", {"image": file}), ("mask", {"image": base64_of(noise()), "mask": file})):
            answer = await http.post(INFILL, json=body)
            assert answer.status_code == 413 and answer.json()["error"]["param"] == param
        assert await infill(http, prompt="red", steps=1)


@asynchronous
async def test_what_lies_under_the_mask_is_of_no_account_and_the_rest_unchanged(engine):  # ComfyUI_frontend 13713
    blackened = noise()
    blackened.paste("black", (0, 0, 16, 32))
    same = {"mask": base64_of(left_half()), "prompt": "red", "seed": 4}
    async with service(engine) as http:
        first, second = [images(await infill(http, image=base64_of(i), **same))[0] for i in (noise(), blackened)]
    assert first.tobytes() == second.tobytes()
    assert first.crop(KEPT).tobytes() == noise().crop(KEPT).tobytes()


@asynchronous
async def test_an_edit_with_the_seed_of_the_image_differs_from_it(engine):  # diffusers 14824
    async with service(engine) as http:
        (made,) = images(await infill(http, prompt="red", seed=3, steps=10))
        edit = {"image": base64_of(made), "mask": base64_of(left_half()), "prompt": "big dog", "steps": 10}
        found = [images(await infill(http, seed=seed, **edit))[0] for seed in (3, 100, 200, 300, 400)]
    changed = [np.abs(levels(image) - levels(made))[:, :16].mean() for image in found]
    assert changed[0] > 0.5 * min(changed[1:]), "as far from the image as with other seeds"
    assert all(difference(image.crop(KEPT), made.crop(KEPT)) == 0 for image in found)


# ------------------------------------------------------------------------------------------------- status, failures


@asynchronous
async def test_an_empty_prompt_is_an_empty_text_and_no_error_has_status_200(engine):  # vllm-omni 3649
    async with service(engine) as http:
        empty = (await infill(http, prompt="", seed=1))["samples"][0]
        missing = (await infill(http, seed=1))["samples"][0]
        assert empty["text"] == "" and empty["words"] == [] and missing["text"] != ""
        expected = engine.generate(Request(inputs={"text": ""}, seed=1, steps=3))
        assert difference(image_of(empty["image"]), expected.image) == 0
        for prompt in (" ", "\n", "...", "purple"):
            answer = await http.post(INFILL, json={"prompt": prompt})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


@asynchronous
async def test_a_result_that_is_not_finite_is_an_error_and_no_black_image(own):  # vllm-omni 6815
    engine, network = own
    weights = {name: w.clone() for name, w in network.state_dict().items()}
    async with service(engine) as http:
        network.load_state_dict({name: torch.full_like(w, torch.nan) for name, w in weights.items()})
        for body in ({"steps": 2}, {"steps": 4, "stream": True, "preview_every": 1}):
            answer = await http.post(INFILL, json=body)
            error = events_of(answer.text)[-2][1] if "stream" in body else answer.json()
            assert error["error"]["code"] == "not_finite"
            assert answer.status_code == (200 if "stream" in body else 500)
            assert "preview" not in answer.text
        network.load_state_dict(weights)
        assert await infill(http)


@pytest.mark.slow
@asynchronous
async def test_memory_does_not_grow_with_requests_when_compiled(cached, tiny_checkpoint):  # vllm-omni 4674
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", compile=True, max_rows=4) as engine:
        engine.warmup(4)
        async with service(engine) as http:

            async def some(seed: int) -> None:
                bodies = [
                    {"num": 1 + seed % 3, "prompt": "red"},
                    {"image": base64_of(noise(seed, (20 + seed, 31)))},
                    {},
                ]
                await asyncio.gather(*(infill(http, seed=seed, steps=1 + seed % 5, **body) for body in bodies))

            for seed in range(20):
                await some(seed)
            resident = memory()
            for seed in range(100):
                await some(seed % 50)
            assert memory() < 1.05 * resident
