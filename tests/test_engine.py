"""`Engine` from requests to pictures and words, on a tiny model of random weights in float32."""

import gc
import resource
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine import Engine, Request
from engine.checkpoint import CheckpointError
from engine.data.coco import fit_image

STEPS = 3


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Noise: every pixel has a value of its own to be kept or lost."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def left_half(size: tuple[int, int] = (32, 32)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)  # [H, W, 3]


def assert_same(found, expected, rounding: int = 1):
    """Texts, seeds and tasks are equal, pictures to one level: sums of floats depend on the batch's size."""
    assert (found.task, found.guidance, len(found.samples)) == (expected.task, expected.guidance, len(expected.samples))
    for a, b in zip(found.samples, expected.samples, strict=True):
        assert (a.text, a.seed) == (b.text, b.seed)
        assert abs(levels(a.image) - levels(b.image)).max() <= rounding


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def mixed() -> list[Request]:
    """Every task, with different solvers, steps, guidance and numbers."""
    return [
        Request(num=2, steps=4, seed=7),
        Request(prompt="red cat", steps=2, solver="ddim", guidance=3.0),
        Request(image=picture(1), num=3, steps=5, solver="ddpm", seed=7),
        Request(prompt="big _ dog", steps=STEPS, guidance=1.0),
        Request(image=picture(2), mask=left_half(), steps=6, resample=2, jump=2),
        Request(prompt="_ sun", image=picture(3), mask=left_half(), steps=1, seed=2**64 - 1),
    ]


@pytest.fixture(scope="module")
def alone(engine, mixed):
    return [engine.generate(request) for request in mixed]


def test_the_task_is_told_from_what_is_given(alone):
    tasks = ["joint", "text-to-image", "image-to-text", "infill", "infill", "infill"]
    assert [result.task for result in alone] == tasks
    assert [len(result.samples) for result in alone] == [2, 1, 3, 1, 1, 1]
    for result in alone:
        assert [s.seed for s in result.samples] == [result.request.seed + i for i in range(result.request.num)]
        assert all(s.image.size == (32, 32) and s.image.mode == "RGB" for s in result.samples)
        assert all(0 <= s.confidence <= 1 for s in result.samples)
        assert (result.image, result.text) == (result.samples[0].image, result.samples[0].text)


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
        assert abs(levels(single.image) - levels(sample.image)).max() <= 1
    for a, b in pairwise(several.samples):
        assert abs(levels(a.image) - levels(b.image)).max() > 10, "other seeds give other pictures"


@pytest.mark.parametrize(
    "change",
    [{"prompt": "blue dog"}, {"seed": 1}, {"steps": 5}, {"solver": "ddpm"}, {"guidance": 9.0}, {"step_cache": 2}],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_matters(engine, change):
    base = {"prompt": "red cat", "steps": STEPS}
    before, after = engine.generate(Request(**base)), engine.generate(Request(**base | change))
    assert abs(levels(before.image) - levels(after.image)).max() > 0


def test_resampling_goes_other_ways_than_plain_steps(engine):
    given = {"prompt": "red _", "steps": 6, "jump": 2}
    plain, resampled = (engine.generate(Request(**given, resample=n)) for n in (1, 3))
    assert abs(levels(plain.image) - levels(resampled.image)).max() > 1


def test_known_words_come_back_and_every_hole_becomes_a_word(engine):
    requests = [Request(prompt="Red, _ cat _!", steps=1, num=32), Request(prompt="_ _ _ _ _ dog", steps=1, num=32)]
    first, second = engine.generate(requests)
    for sample in first.samples:
        words = sample.text.split()
        assert (len(words), words[0], words[2]) == (4, "red", "cat")
    assert all(len(s.text.split()) == 6 and s.text.endswith(" dog") for s in second.samples)
    assert len({sample.text for sample in first.samples}) > 1, "the holes are sampled"


def test_a_fully_given_picture_and_text_come_back_as_they_were(engine):
    given = picture(4)
    captioned = engine.generate(Request(image=given, steps=STEPS))
    completed = engine.generate(Request(image=given, prompt="red _", steps=STEPS))
    assert np.array_equal(captioned.image, given) and np.array_equal(completed.image, given)
    assert engine.generate(Request(prompt="red cat", steps=STEPS)).text == "red cat"


def test_unknown_words_are_named_or_filled_in(engine):
    with pytest.raises(ValueError, match="^prompt: unknown words 'purple', 'catt' .near: cat"):
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
    before = picture(seed)
    request = Request(prompt=prompt, image=before, mask=Image.fromarray(mask), steps=1, seed=seed)
    after, before = levels(engine.generate(request).image), levels(before)
    assert np.array_equal(after[mask == 0], before[mask == 0])
    assert not np.array_equal(after[mask > 0], before[mask > 0])


def test_known_pixels_of_a_large_picture_survive_as_the_model_sees_them(engine):
    before, mask = picture(5, (150, 101)), left_half((150, 101))
    after = engine.generate(Request(image=before, mask=mask, steps=STEPS)).image
    seen = fit_image(before, 32).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(after)[:, 17:], seen[:, 17:]) and not np.array_equal(after, seen)


def test_a_lone_white_pixel_of_a_large_mask_counts(engine):
    before, mask = picture(6, (960, 960)), Image.new("L", (960, 960))
    mask.putpixel((485, 7), 255)
    after = engine.generate(Request(image=before, mask=mask, prompt="red cat", steps=STEPS)).image
    changed = (np.asarray(after) != fit_image(before, 32).permute(1, 2, 0).numpy()).any(2)
    assert np.argwhere(changed).tolist() == [[0, 16]]


def test_feathering_is_on_the_generated_side_only(engine, monkeypatch):
    white = torch.ones(1, 3, 32, 32)
    monkeypatch.setattr(engine.image, "decode", lambda tokens: white)
    request = Request(image=Image.new("RGB", (32, 32)), mask=left_half(), prompt="red", steps=1)
    columns = levels(engine.generate(request).image)[:, :, 0]
    assert (columns[:, :14] == 255).all() and (columns[:, 16:] == 0).all()
    assert np.array_equal(columns[:, 14:16], np.tile([170, 85], (32, 1)))


def test_what_lies_under_the_mask_changes_nothing(engine):
    mask, before = left_half(), picture(5)
    other = Image.composite(picture(6), before, mask)
    assert not np.array_equal(np.asarray(other), np.asarray(before))
    results = [engine.generate(Request(image=i, mask=mask, prompt="red cat", steps=STEPS)) for i in (before, other)]
    assert_same(*results, rounding=0)


def test_a_black_mask_leaves_nothing_of_the_picture_to_generate(engine):
    black = Image.new("L", (32, 32))
    assert engine.generate(Request(image=picture(), mask=black, steps=STEPS)).task == "image-to-text"
    with pytest.raises(ValueError, match="^prompt, image: everything is given, .*put _ in the prompt"):
        engine.generate(Request(image=picture(), mask=black, prompt="red cat"))


def test_progress_counts_every_step_to_the_end(tiny_checkpoint):
    calls = []
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=2) as engine:
        requests = [Request(num=3, steps=2), Request(prompt="red", steps=5)]
        engine.generate(requests, lambda done, total: calls.append((done, total)))
    assert calls == [(done, 11) for done in (2, 4, 6, 8, 10, 11)], "5 steps and 2 + 2 + 2 beside them"


def test_raising_from_the_callback_cancels_and_leaves_the_engine_usable(engine, mixed, alone):
    class Cancelled(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        if done >= 20:
            raise Cancelled

    with pytest.raises(Cancelled):
        engine.generate(mixed, cancel)
    assert_same(engine.generate(mixed[0]), alone[0], rounding=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "purple"},
        {"prompt": "red " * 7},
        {"image": "missing.png"},
        {"image": 7},
        {"image": picture(), "prompt": "red"},
        {"image": picture(), "mask": left_half((16, 16))},
        {"prompt": "red _", "task": "text-to-image"},
    ],
    ids=["unknown word", "too long", "no file", "no picture", "all given", "mask size", "task"],
)
def test_a_bad_request_is_refused_before_anything_is_computed(engine, bad):
    calls = []
    with pytest.raises(ValueError):
        engine.generate([Request(steps=1), Request(**bad)], lambda *progress: calls.append(progress))
    assert calls == []


def test_no_requests_give_no_results(engine):
    assert engine.generate([]) == []


@pytest.mark.parametrize("wrong", ["red cat", ["red"], [Request(), None]], ids=str)
def test_what_is_no_request_is_refused_by_name(engine, wrong):
    with pytest.raises(ValueError, match="^requests: .* is no Request; give a Request or a list of them"):
        engine.generate(wrong)


def test_threads_share_the_slots_and_get_what_they_get_alone(engine, mixed, alone):
    start, before = threading.Barrier(4), engine.stats()

    def generate(i: int):
        calls = []
        start.wait()
        result = engine.generate(mixed[i], lambda *progress: calls.append(progress))
        return result, calls

    with ThreadPoolExecutor(4) as pool:
        for i, (found, calls) in enumerate(pool.map(generate, range(4))):
            assert_same(found, alone[i])
            assert calls == sorted(set(calls)) and calls[-1][0] == calls[-1][1]
    after = engine.stats()
    assert after.rows - before.rows == 7
    assert 5 <= after.forwards - before.forwards <= 4 + 2 + 5 + STEPS


def test_a_thread_that_cancels_leaves_the_others_alone(engine, mixed, alone):
    entered = threading.Event()

    def cancel(done: int, total: int) -> None:
        entered.set()
        raise KeyboardInterrupt

    def cancelled() -> None:
        with pytest.raises(KeyboardInterrupt):
            engine.generate(mixed[2], cancel)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cancelled)
        entered.wait()
        assert_same(engine.generate(mixed[0]), alone[0])
        waiting.result()


def test_guidance_outside_its_interval_takes_one_pass_and_another_picture(engine):
    base = {"prompt": "red cat", "steps": 8, "guidance": 9.0}
    always, unguided = engine.generate([Request(**base), Request(**base | {"guidance": 1.0})])
    whole, late = (engine.generate(Request(**base, guidance_interval=i)) for i in ((0, 1), (0.5, 1)))
    assert_same(whole, always)
    assert abs(levels(late.image) - levels(always.image)).max() > 1
    assert abs(levels(late.image) - levels(unguided.image)).max() > 1
    passes = []
    hook = engine.model.shared_middle[0].register_forward_hook(lambda _, args, out: passes.append(len(out)))
    engine.generate(Request(**base, guidance_interval=(0.5, 1)))
    hook.remove()
    assert passes == [1] * 4 + [2] * 4


def test_more_samples_than_slots_take_full_slots(tiny_checkpoint):
    requests = [Request(num=4, steps=10 + 5 * i, prompt=("red _", "cat", None)[i % 3], seed=i) for i in range(8)]
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=8) as engine:
        engine.generate(requests)
        stats = engine.stats()
    rows = sum(request.num for request in requests)
    full = -(-sum(request.num * request.steps for request in requests) // 8)
    assert stats.rows == rows and full <= stats.forwards <= 1.1 * full


def test_stats_count_what_was_done(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint) as engine:
        assert (engine.stats().forwards, engine.stats().rows) == (0, 0)
        engine.generate([Request(num=2, steps=4), Request(prompt="red", steps=3)])
        stats = engine.stats()
    assert (stats.forwards, stats.replays, stats.rows) == (4, 0, 3)
    assert min(stats.prepare_seconds, stats.sample_seconds, stats.decode_seconds) > 0
    assert stats.memory > 1e6


def test_warmup_leaves_no_kind_of_step_for_later(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint) as engine:
        kinds = set()
        for name in ("image", "text"):
            head = engine.model.branches[name].head
            head.register_forward_hook(lambda _, args, out, n=name: kinds.add((n, len(out))))
        engine.warmup(batch=2)
        warm = set(kinds)
        engine.generate([Request(steps=2), Request(prompt="red", steps=2)])
        engine.generate([Request(image=picture(), num=2, steps=2, guidance=1.0)])
        assert kinds == warm == {(name, rows) for name in ("image", "text") for rows in (2, 4)}
        with pytest.raises(ValueError, match="^batch: 65 does not work; use 1 to max_rows, 64"):
            engine.warmup(batch=65)


@pytest.mark.slow
def test_nothing_is_compiled_after_warmup(tiny_checkpoint):
    from torch._dynamo.utils import counters

    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", compile=True) as engine:
        engine.warmup(batch=4)
        counters.clear()
        engine.generate([Request(num=3, steps=2), Request(prompt="red", steps=4)])
        engine.generate(Request(image=picture(), steps=2))
        assert counters["stats"]["unique_graphs"] == 0


def test_engines_made_in_threads_work_side_by_side(tiny_checkpoint, mixed, alone):
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: Engine.from_pretrained(tiny_checkpoint, dtype="float32"), range(2)))
        for found in pool.map(lambda engine: engine.generate(mixed), made):
            for result, expected in zip(found, alone, strict=True):
                assert_same(result, expected)
    first, second = made
    first.close()
    assert_same(second.generate(mixed[1]), alone[1], rounding=0)
    second.close()


@pytest.mark.slow
def test_memory_does_not_grow_over_a_thousand_generations(tiny_checkpoint):
    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    requests = [Request(num=2, steps=1), Request(prompt="red _", steps=2), Request(image=picture(), steps=1)]
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=4) as engine:
        for i in range(200):
            engine.generate(requests[i % 3])
        before = resident()
        for i in range(1000):
            engine.generate(requests[i % 3])
        assert resident() - before < 8 << 20, "a single leaked state or picture a time would be more"


def test_pictures_are_decoded_no_more_at_a_time_than_rows_are_sampled(tiny_checkpoint, monkeypatch):
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", max_rows=3) as engine:
        decode, sizes = engine.image.decode, []
        monkeypatch.setattr(engine.image, "decode", lambda tokens: sizes.append(len(tokens)) or decode(tokens))
        assert len(engine.generate(Request(num=8, steps=1)).samples) == 8
    assert sizes == [3, 3, 2]


def test_closing_ends_what_other_threads_are_generating(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, dtype="float32")
    under_way, model = threading.Event(), weakref.ref(engine.model)

    def endless():
        with pytest.raises(RuntimeError, match="this engine is closed"):
            engine.generate(Request(num=2, steps=1000, resample=50), lambda *_: under_way.set())

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(endless) for _ in range(2)]
        under_way.wait()
        engine.close()
        for thread in running:
            thread.result()
    gc.collect()
    assert model() is None and not engine._sampler._batches and not engine._sampler._waiting
    with pytest.raises(RuntimeError, match="closed"):
        _ = engine.image


def test_a_closed_engine_says_so(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint) as engine:
        engine.warmup()
    with pytest.raises(RuntimeError, match="closed; make another"):
        engine.generate(Request())
    engine.close()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("device", "gpu"), ("device", "cuda:99"), ("device", "meta"), ("dtype", "float64"), ("attention", "flash"),
        ("attention", "xformers"), ("max_rows", 0), ("checkpoint", "no/such/folder"), ("checkpoint", ""),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_be_made_says_which_argument_is_wrong(tiny_checkpoint, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: "):
        Engine.from_pretrained(**{"checkpoint": tiny_checkpoint} | {argument: value})


def test_a_damaged_autoencoder_is_told_of_before_the_sampling(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    (folder / "image" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    calls = []
    with Engine.from_pretrained(folder) as engine, pytest.raises(CheckpointError, match="safetensors: damaged"):
        engine.generate(Request(prompt="red"), lambda *progress: calls.append(progress))
    assert calls == []


def test_half_precision_gives_much_the_same_picture(tiny_checkpoint, alone, mixed):
    with Engine.from_pretrained(tiny_checkpoint, dtype="bfloat16") as engine:
        found = levels(engine.generate(mixed[1]).image)
    assert abs(found - levels(alone[1].image)).mean() < 4
