"""`Engine` from requests to images and words, on a tiny model of random weights in float32."""

import shutil
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from engine_cases import (
    STEPS,
    assert_same,
    difference,
    left_half,
    levels,
    noise,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine import Engine, Request
from engine.checkpoint import load
from engine.errors import InputError
from engine.images import fit_image

CPU = torch.device("cpu")


def test_the_task_is_told_from_what_is_given(alone):
    tasks = ["joint", "text-to-image", "image-to-text", "infill", "infill", "infill"]
    assert [result.task for result in alone] == tasks
    assert [len(result.samples) for result in alone] == [2, 1, 3, 1, 1, 1]
    for result in alone:
        assert [s.seed for s in result.samples] == [result.request.seed + i for i in range(result.request.num)]
        assert all(s.image.size == (32, 32) and s.image.mode == "RGB" for s in result.samples)
        assert all(0 <= s.confidence <= 1 for s in result.samples)
        assert (result.image, result.text) == (result.samples[0].image, result.samples[0].text)
        assert all(s.outputs == {"image": s.image, "text": s.text} for s in result.samples)


def test_every_word_has_a_confidence_and_their_mean_is_the_sample_s(alone):
    for sample in (sample for result in alone for sample in result.samples):
        assert len(sample.word_confidence) == len(sample.text.split())
        assert all(0 <= c <= 1 for c in sample.word_confidence)
        assert sample.confidence == pytest.approx(np.mean(sample.word_confidence or [1]))
    assert alone[1].samples[0].word_confidence == pytest.approx((1, 1), abs=1e-3), "given words are certain"


def test_a_result_is_the_same_alone_and_among_other_tasks(engine, mixed, alone):
    for found, expected in zip(engine.generate(mixed), alone, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("max_rows", [1, 2, 4, 100])
def test_a_result_is_the_same_in_any_order_and_batch_size(tiny_checkpoint, mixed, alone, max_rows):
    order = [4, 0, 5, 2, 1, 3]
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=max_rows) as engine:
        found = engine.generate([mixed[i] for i in order])
    for i, result in zip(order, found, strict=True):
        assert result.request is mixed[i]
        assert_same(result, alone[i])


def test_samples_count_up_in_seed(engine):
    several = engine.generate(Request(num=3, seed=5, steps=STEPS))
    for i, sample in enumerate(several.samples):
        single = engine.generate(Request(seed=5 + i, steps=STEPS))
        assert (single.text, single.samples[0].seed) == (sample.text, sample.seed)
        assert difference(single.image, sample.image) <= 1
    for a, b in pairwise(several.samples):
        assert difference(a.image, b.image) > 10, "other seeds give other images"


@pytest.mark.parametrize(
    "change",
    [{"prompt": "blue dog"}, {"seed": 1}, {"steps": 5}, {"solver": "ddpm"}, {"guidance": 9.0}, {"step_cache": 2}],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_matters(engine, change):
    base = {"prompt": "red cat", "steps": STEPS}
    before, after = engine.generate(Request(**base)), engine.generate(Request(**base | change))
    assert difference(before.image, after.image) > 0


def test_resampling_goes_other_ways_than_plain_steps(engine):
    given = {"prompt": "red _", "steps": 6, "jump": 2}
    plain, resampled = (engine.generate(Request(**given, resample=n)) for n in (1, 3))
    assert difference(plain.image, resampled.image) > 1


def test_known_words_come_back_and_every_hole_becomes_a_word(engine):
    requests = [Request(prompt="Red, _ cat _!", steps=1, num=32), Request(prompt="_ _ _ _ _ dog", steps=1, num=32)]
    first, second = engine.generate(requests)
    for sample in first.samples:
        words = sample.text.split()
        assert (len(words), words[0], words[2]) == (4, "red", "cat")
    assert all(len(s.text.split()) == 6 and s.text.endswith(" dog") for s in second.samples)
    assert len({sample.text for sample in first.samples}) > 1, "the holes are sampled"


def test_a_fully_given_image_and_text_come_back_as_they_were(engine):
    given = noise(4)
    captioned = engine.generate(Request(image=given, steps=STEPS))
    completed = engine.generate(Request(image=given, prompt="red _", steps=STEPS))
    assert np.array_equal(captioned.image, given) and np.array_equal(completed.image, given)
    assert engine.generate(Request(prompt="red cat", steps=STEPS)).text == "red cat"


def test_unknown_words_are_named_or_filled_in(engine):
    with pytest.raises(InputError, match="^prompt: 'purple, catt' are not in the vocabulary; .*'catt' .near: cat"):
        engine.generate(Request(prompt="purple catt dog"))
    words = engine.generate(Request(prompt="purple catt dog", unknown_words="fill", steps=STEPS)).text.split()
    assert len(words) == 3 and words[2] == "dog" and "purple" not in words


rectangles = st.lists(st.tuples(*[st.integers(0, 32)] * 4), max_size=3)
dots = st.lists(st.tuples(st.integers(0, 31), st.integers(0, 31)), min_size=1, max_size=5)


@given(rectangles, dots, st.integers(0, 99), st.sampled_from([None, "red cat", "red _"]))
@settings(max_examples=15)
def test_known_pixels_survive_infilling(engine, rectangles, dots, seed, prompt):
    mask = np.zeros((32, 32), np.uint8)
    for top, bottom, left, right in rectangles:
        mask[top:bottom, left:right] = 255
    for row, column in dots:
        mask[row, column] = 255
    before = noise(seed)
    request = Request(prompt=prompt, image=before, mask=Image.fromarray(mask), steps=1, seed=seed)
    after, before = levels(engine.generate(request).image), levels(before)
    assert np.array_equal(after[mask == 0], before[mask == 0])
    assert not np.array_equal(after[mask > 0], before[mask > 0])


def test_known_pixels_of_a_large_image_survive_as_the_model_sees_them(engine):
    before, mask = noise(5, (150, 101)), left_half((150, 101))
    after = engine.generate(Request(image=before, mask=mask, steps=STEPS)).image
    seen = fit_image(before, 32).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(after)[:, 19:], seen[:, 19:]) and not np.array_equal(after, seen)


def test_a_lone_white_pixel_of_a_large_mask_counts(engine):
    before, mask = noise(6, (960, 960)), Image.new("L", (960, 960))
    mask.putpixel((485, 7), 255)
    after = engine.generate(Request(image=before, mask=mask, prompt="red cat", steps=STEPS)).image
    changed = (np.asarray(after) != fit_image(before, 32).permute(1, 2, 0).numpy()).any(2)
    made_from_it = np.zeros((32, 32), bool)
    made_from_it[:3, 13:19] = True  # Lanczos reads 90 pixels each way
    assert np.array_equal(changed, made_from_it)


def with_settings(checkpoint, folder, change):
    """A copy of a checkpoint folder with another config."""
    import json

    folder = shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("feather", "blended"), [(2, [170, 85]), (0, [255, 255])])
def test_feathering_is_on_the_generated_side_only(tiny_checkpoint, tmp_path, monkeypatch, feather, blended):
    folder = with_settings(tiny_checkpoint, tmp_path / "c", lambda config: config["sampling"].update(feather=feather))
    request = Request(image=Image.new("RGB", (32, 32)), mask=left_half(), prompt="red", steps=1)
    with Engine.from_pretrained(folder, dtype="float32") as engine:
        monkeypatch.setattr(engine.codecs["image"], "decode_pixels", lambda tokens: torch.ones(len(tokens), 3, 32, 32))
        columns = levels(engine.generate(request).image)[:, :, 0]
    assert (columns[:, :14] == 255).all() and (columns[:, 16:] == 0).all()
    assert np.array_equal(columns[:, 14:16], np.tile(blended, (32, 1)))


def test_what_lies_under_the_mask_changes_nothing(engine):
    mask, before = left_half(), noise(5)
    other = Image.composite(noise(6), before, mask)
    assert not np.array_equal(np.asarray(other), np.asarray(before))
    results = [engine.generate(Request(image=i, mask=mask, prompt="red cat", steps=STEPS)) for i in (before, other)]
    assert_same(*results, rounding=0)


def test_a_black_mask_leaves_nothing_of_the_image_to_generate(engine):
    black = Image.new("L", (32, 32))
    assert engine.generate(Request(image=noise(), mask=black, steps=STEPS)).task == "image-to-text"
    with pytest.raises(InputError, match="^mask: .* marks nothing .*, and all else is given; give one"):
        engine.generate(Request(image=noise(), mask=black, prompt="red cat"))


@pytest.mark.parametrize(
    ("bad", "argument"),
    [
        ({"prompt": "purple"}, "prompt"),
        ({"prompt": "red " * 7}, "prompt"),
        ({"inputs": {"text": "purple"}}, "inputs['text']"),
        ({"image": "missing.png"}, "image"),
        ({"image": 7}, "image"),
        ({"inputs": {"image": 7}}, "inputs['image']"),
        ({"image": noise(), "prompt": "red"}, "prompt, image"),
        ({"image": noise(), "mask": left_half((16, 16))}, "mask"),
        ({"image": noise(), "masks": {"image": left_half((16, 16))}}, "masks['image']"),
        ({"prompt": "red", "masks": {"text": left_half()}}, "masks['text']"),
        ({"prompt": "red _", "task": "text-to-image"}, "task"),
        ({"inputs": {"sound": "a.wav"}}, "inputs['sound']"),
        ({"steps": 1000, "step_cache": 2, "num": 1, "order": ("sound",)}, "order"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_is_refused_before_anything_is_computed(engine, bad, argument):
    calls = []
    with pytest.raises(InputError) as refused:
        engine.generate([Request(steps=1), Request(**bad)], lambda *progress: calls.append(progress))
    assert refused.value.argument == argument
    assert calls == []


def test_no_requests_give_no_results(engine):
    assert engine.generate([]) == []


@pytest.mark.parametrize("wrong", ["red cat", ["red"], [Request(), None]], ids=str)
def test_values_other_than_requests_are_refused_by_name(engine, wrong):
    with pytest.raises(InputError, match="^requests: .* is not a Request; give a Request or a list of them"):
        engine.generate(wrong)


def test_guidance_outside_its_interval_takes_one_pass_and_gives_another_image(tiny_checkpoint):
    base, checkpoint, passes = {"prompt": "red cat", "steps": 8, "guidance": 9.0}, load(tiny_checkpoint), []
    with Engine(checkpoint, CPU, torch.float32) as engine:
        always, unguided = engine.generate([Request(**base), Request(**base | {"guidance": 1.0})])
        whole, late = (engine.generate(Request(**base, guidance_interval=i)) for i in ((0, 1), (0.5, 1)))
        checkpoint.network.shared_middle[0].register_forward_hook(lambda _, args, out: passes.append(len(out)))
        engine.generate(Request(**base, guidance_interval=(0.5, 1)))
    assert_same(whole, always)
    assert difference(late.image, always.image) > 1 and difference(late.image, unguided.image) > 1
    assert passes == [1] * 4 + [2] * 4


def test_more_samples_than_slots_take_full_slots(tiny_checkpoint):
    requests = [
        Request(num=4, steps=4 + 2 * i, prompt=("red _", "cat", None)[i % 3], seed=i, order="together")
        for i in range(8)
    ]
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=8) as engine:
        engine.generate(requests)
        stats = engine.stats()
    full = -(-sum(request.num * request.steps for request in requests) // 8)
    assert stats.samples == sum(request.num for request in requests) and full <= stats.forwards <= 1.1 * full


def test_stats_count_what_was_done(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32") as engine:
        assert (engine.stats().forwards, engine.stats().samples, engine.stats().flops) == (0, 0, 0)
        engine.generate([Request(num=2, steps=4, order="together"), Request(prompt="red", steps=3)])
        stats = engine.stats()
        engine.generate(Request(prompt="red", steps=3, guidance=1.0))
        unguided = engine.stats()
        engine.generate(Request(prompt="red", steps=3, guidance=2.0))
        guided = engine.stats()
    assert (stats.forwards, stats.replays, stats.samples) == (4, 0, 3)
    assert min(stats.prepare_seconds, stats.sample_seconds, stats.decode_seconds, stats.bytes) > 0
    assert stats.memory > 1e6
    first, second = unguided.flops - stats.flops, guided.flops - unguided.flops
    assert first > 0 and 1.9 * first < second <= 2 * first, "two passes, which share the in-blocks of given words"


def test_warmup_leaves_no_kind_of_step_for_later(tiny_checkpoint):
    checkpoint, kinds = load(tiny_checkpoint), set()
    with Engine(checkpoint, CPU, torch.float32) as engine:
        for name in ("image", "text"):
            head = checkpoint.network.branches[name].head
            head.register_forward_hook(lambda _, args, out, n=name: kinds.add((n, len(out))))
        engine.warmup(batch=2)
        warm = set(kinds)
        engine.generate([Request(steps=2, order="together"), Request(prompt="red", steps=2)])
        engine.generate(Request(image=noise(), num=2, steps=2, guidance=1.0))
        engine.generate(Request(num=2, steps=2))
        assert kinds == warm == {(name, rows) for name in ("image", "text") for rows in (2, 4)}
        with pytest.raises(InputError, match="^batch: 65 is out of range; use 1 to max_rows, 64"):
            engine.warmup(batch=65)
        with pytest.raises(InputError, match="^batch: "):
            engine.warmup(batch=0)


def test_images_are_decoded_no_more_at_a_time_than_samples_are_computed(tiny_checkpoint, monkeypatch):
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=3) as engine:
        codec, sizes = engine.codecs["image"], []
        decode = codec.decode
        monkeypatch.setattr(codec, "decode", lambda tokens, given: sizes.append(len(tokens)) or decode(tokens, given))
        assert len(engine.generate(Request(num=8, steps=1)).samples) == 8
    assert sizes == [3, 3, 2]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("device", "gpu"), ("device", "cuda:99"), ("device", "meta"), ("dtype", "float64"), ("attention", "flash"),
        ("attention", "xformers"), ("max_rows", 0), ("max_rows", 1.5), ("max_rows", True), ("checkpoint", "no/such"),
        ("checkpoint", ""), ("checkpoint", 5), ("checkpoint", b"x"), ("device", None), ("dtype", None),
        ("dtype", torch.float64), ("dtype", ["float32"]), ("max_rows", None),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_be_made_says_which_argument_is_wrong(tiny_checkpoint, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: ") as refused:
        Engine.from_pretrained(**{"checkpoint": tiny_checkpoint, "dtype": "float32"} | {argument: value})
    assert refused.value.argument == argument and refused.value.remedy


def test_a_damaged_autoencoder_is_told_of_before_the_sampling(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    (folder / "image" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    calls = []
    with (
        Engine.from_pretrained(folder, dtype="float32") as engine,
        pytest.raises(InputError, match="^checkpoint: .*safetensors is damaged"),
    ):
        engine.generate(Request(prompt="red"), lambda *progress: calls.append(progress))
    assert calls == []


def test_half_precision_gives_much_the_same_image(tiny_checkpoint, alone, mixed):
    with Engine.from_pretrained(tiny_checkpoint, dtype="bfloat16") as engine:
        found = levels(engine.generate(mixed[1]).image)
    assert abs(found - levels(alone[1].image)).mean() < 4


@pytest.mark.parametrize("argument", ["callback", "progress"])
def test_what_cannot_be_called_back_is_refused_before_anything_is_computed(engine, argument):
    call = engine.generate if argument == "callback" else engine.submit
    before = engine.stats().forwards
    with pytest.raises(InputError, match=f"^{argument}: 5 cannot be called; give a function"):
        call(Request(steps=1), 5)
    assert engine.stats().forwards == before


def test_dtypes_and_numbers_of_torch_and_numpy_are_taken(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16, max_rows=np.int64(2)) as engine:
        assert (engine.dtype, engine.max_rows) == (torch.bfloat16, 2)
        engine.warmup(np.int64(1))


def test_a_slow_callback_sees_every_step(engine):
    seen = []
    engine.generate(Request(num=2, steps=3), lambda *count: time.sleep(0.01) or seen.append(count))
    total = seen[-1][1]
    assert seen == [(done, total) for done in range(2, total + 1, 2)], (
        "two samples a step, the last of which is the end"
    )
