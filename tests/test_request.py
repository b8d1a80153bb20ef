"""What a request refuses by itself, before any model is asked."""

import pytest

from engine import Request
from engine.request import MAX_NUM, RequestError

RANGES = {
    "num": (1, MAX_NUM),
    "steps": (1, 1000),
    "resample": (1, 100),
    "jump": (1, 1000),
    "step_cache": (1, 1000),
    "seed": (0, 2**64 - 1),
}


@pytest.mark.parametrize(("argument", "lowest", "highest"), [(key, *span) for key, span in RANGES.items()])
def test_whole_numbers_are_taken_to_both_ends_of_their_range_and_not_beyond(argument, lowest, highest):
    for value in (lowest, highest):
        assert getattr(Request(**{argument: value}), argument) == value
    for value in (lowest - 1, highest + 1, -(2**70), 10**30, 1.0, float("nan"), "1", None, True):
        with pytest.raises(RequestError, match=f"^{argument}: .*use a whole number from {lowest} to {highest}"):
            Request(**{argument: value})


def test_the_last_sample_of_a_request_needs_a_seed_too():
    assert Request(seed=2**64 - 8, num=8).num == 8
    with pytest.raises(RequestError, match=f"^seed: {2**64 - 7} .* to {2**64 - 8}$"):
        Request(seed=2**64 - 7, num=8)


@pytest.mark.parametrize("guidance", [None, 0, -1.5, 1, 7.5, -100, 100])
def test_guidance_of_either_sign_is_taken(guidance):
    assert Request(guidance=guidance).guidance == guidance


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), -float("inf"), 1e30, -100.1, "2", [2]])
def test_guidance_that_is_no_moderate_number_is_refused(guidance):
    with pytest.raises(RequestError, match="^guidance: .*use a number from -100 to 100"):
        Request(guidance=guidance)


@pytest.mark.parametrize("argument", ["task", "solver", "unknown_words"])
@pytest.mark.parametrize("value", ["", "Auto", "dpm", None, 3])
def test_unknown_choices_are_refused_with_the_known_ones(argument, value):
    known = {"task": "auto, joint", "solver": "dpm[+][+], ddim", "unknown_words": "error, fill"}[argument]
    with pytest.raises(RequestError, match=f"^{argument}: {value!r} is not known; use one of {known}"):
        Request(**{argument: value})


@pytest.mark.parametrize("prompt", ["", "  ", "...", "!?", "\n"])
def test_prompts_without_a_word_are_refused(prompt):
    with pytest.raises(RequestError, match="^prompt: .*no word; give words"):
        Request(prompt=prompt)


@pytest.mark.parametrize("prompt", [3, b"red", ["red", "blue"]])
def test_a_prompt_is_one_string(prompt):
    with pytest.raises(RequestError, match="^prompt: .*give a string"):
        Request(prompt=prompt)


@pytest.mark.parametrize("prompt", ["_", "café", "7", "_ _ red!"])
def test_holes_and_words_of_any_script_make_a_prompt(prompt):
    assert Request(prompt=prompt).prompt == prompt


def test_resampling_needs_stretches_shorter_than_the_way():
    assert Request(steps=6, resample=2, jump=5).jump == 5
    assert Request(steps=3, jump=5).jump == 5, "without resampling, jump means nothing"
    with pytest.raises(RequestError, match="^jump: 5 does not work with 5 steps; use fewer"):
        Request(steps=5, resample=2, jump=5)


def test_a_mask_needs_its_image():
    with pytest.raises(RequestError, match="^mask: .*give image too"):
        Request(mask="mask.png")


@pytest.mark.parametrize(
    ("given", "fitting"),
    [
        ({}, {"joint"}),
        ({"prompt": "red"}, {"text-to-image", "infill"}),  # infill if the model finds a hole in it
        ({"image": "a.png"}, {"image-to-text", "infill"}),
        ({"image": "a.png", "mask": "m.png"}, {"infill"}),
        ({"image": "a.png", "prompt": "red _"}, {"infill"}),
        ({"image": "a.png", "mask": "m.png", "prompt": "red"}, {"infill"}),
    ],
)
def test_a_task_only_checks_what_is_given(given, fitting):
    assert Request(**given, task="auto").task == "auto"
    for task in ("joint", "text-to-image", "image-to-text", "infill"):
        if task in fitting:
            assert Request(**given, task=task).task == task
        else:
            with pytest.raises(RequestError, match=f"^task: '{task}' does not fit what is given; .*use auto"):
                Request(**given, task=task)


def test_a_request_cannot_be_changed_after_its_checks():
    with pytest.raises(AttributeError):
        Request().steps = 0


@pytest.mark.parametrize("interval", [None, (0, 1), (0.25, 0.75), [0.0, 0.5]])
def test_a_guidance_interval_is_two_fractions(interval):
    assert Request(guidance_interval=interval).guidance_interval == interval


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.7, 0.2), (-0.1, 1), (0, 1.1), (0,), "01", 0.5, (0, float("nan"))])
def test_any_other_guidance_interval_is_refused(interval):
    with pytest.raises(RequestError, match="^guidance_interval: .*use two numbers, 0 <= start < end <= 1"):
        Request(guidance_interval=interval)
