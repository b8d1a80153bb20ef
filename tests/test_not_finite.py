"""Results that are NaN or infinite: named by request and seed, whatever made them so, and no others are lost."""

import numpy as np
import pytest
import torch
from engine_cases import assert_same, left_half, noise
from PIL import Image
from sample_cases import assert_refused, sample_runner

from engine import Request
from engine.codecs.image import ImageCodec
from engine.request import NotFiniteSamplesError

BAD = noise(5)
run = pytest.fixture(sample_runner)


def broken(monkeypatch, method, value, rows):
    """Makes an image codec's method give this value in rows that `rows(argument)` selects."""
    plain = getattr(ImageCodec, method)

    def patched(codec, argument):
        result = plain(codec, argument).clone()
        result[rows(argument)] = value
        return result

    monkeypatch.setattr(ImageCodec, method, patched)


def failure(engine, requests):
    with pytest.raises(NotFiniteSamplesError) as error:
        engine.generate(requests)
    assert isinstance(error.value, FloatingPointError) and "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_image_that_is_given_and_encoded_as_nan_fails_its_own_request(engine, monkeypatch, value):
    requests = [Request(image=noise(1), steps=2), Request(image=BAD, steps=2, seed=4), Request(prompt="red", steps=2)]
    expected = engine.generate(requests)
    known = torch.from_numpy(np.array(BAD)).permute(2, 0, 1) / 127.5 - 1
    broken(monkeypatch, "encode_pixels", value, lambda pixels: (pixels - known).abs().amax((1, 2, 3)) < 0.01)
    error = failure(engine, requests)
    assert str(error).startswith("requests[1], seed 4: what is given is encoded as NaN or infinity; use ")
    assert error.results[1].samples == ()
    for i in (0, 2):
        assert_same(error.results[i], expected[i])


@pytest.mark.parametrize(
    "given", [{}, {"image": noise(1), "mask": left_half()}, {"prompt": "red"}], ids=lambda g: "+".join(g)
)
def test_an_image_that_is_decoded_as_nan_fails_its_sample(engine, monkeypatch, given):
    request = Request(**given, num=4, steps=2, seed=7)
    expected = engine.generate(request)
    broken(monkeypatch, "decode_pixels", float("nan"), lambda tokens: [1, 2])
    error = failure(engine, request)
    assert str(error).startswith("requests[0], seed 8: the image is decoded as NaN or infinity; use ")
    assert str(error).endswith("(1 other sample failed too)")
    (result,) = error.results
    assert [sample.seed for sample in result.samples] == [7, 10]
    assert_same(result, expected.__class__(**vars(expected) | {"samples": expected.samples[::3]}))


def test_words_of_vectors_that_overflow_fail_their_sample(own, monkeypatch):
    engine, _ = own
    monkeypatch.setitem(engine.codecs["text"].__dict__, "vectors", engine.codecs["text"].vectors * 1e30)
    assert str(failure(engine, Request(image=noise(1), steps=2))).startswith("requests[0], seed 0: the text is decoded")


def test_empty_guidance_that_is_encoded_as_nan_is_told(engine, monkeypatch):
    broken(monkeypatch, "encode_pixels", float("nan"), lambda pixels: pixels.abs().amax((1, 2, 3)) == 0)
    error = failure(engine, Request(image=noise(1), guidance_kind="empty", guidance=2.0, steps=2))
    assert "requests[0], seed 0: the result is NaN or infinite" in str(error) and error.results[0].samples == ()


def test_the_command_line_writes_the_other_samples_and_fails(run, monkeypatch):
    expected = run("--prompt", "red", "--num", 3, out="whole")
    broken(monkeypatch, "decode_pixels", float("nan"), lambda tokens: [1])
    done = run("--prompt", "red", "--num", 3)
    assert done.code == 2 and done.err.count("\n") == 1 and "requests[0], seed 1: the image is decoded" in done.err
    assert done.report[0] == expected.report[0] and done.report[1]["seed"] == 2 and len(done.images()) == 2
    assert np.array_equal(done.images()[1], Image.open(expected.folder / "0002.png"))


def test_the_command_line_writes_nothing_where_no_sample_is_left(run, monkeypatch):
    broken(monkeypatch, "decode_pixels", float("nan"), lambda tokens: slice(None))
    assert_refused(run("--prompt", "red", "--num", 3), "requests[0], seed 0", "(2 other samples failed too)")
