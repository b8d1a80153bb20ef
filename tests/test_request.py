"""What a request refuses by itself, before any model is asked."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from engine import Request
from engine.errors import InputError
from engine.request import GUIDANCE_KINDS, MAX_NUM

RANGES = {
    "num": (1, MAX_NUM),
    "steps": (1, 1000),
    "resample": (1, 100),
    "jump": (1, 1000),
    "inner_steps": (1, 100),
    "step_cache": (1, 1000),
    "seed": (0, 2**64 - 1),
}


@pytest.mark.parametrize(("argument", "lowest", "highest"), [(key, *span) for key, span in RANGES.items()])
def test_whole_numbers_are_taken_to_both_ends_of_their_range_and_not_beyond(argument, lowest, highest):
    for value in (lowest, highest):
        assert getattr(Request(**{argument: value}), argument) == value
    others = (1.0, float("nan"), "1", None, True, np.True_, np.array([7]), torch.tensor(7.0), torch.tensor(True))
    for value in (lowest - 1, highest + 1, -(2**70), 10**30, *others):
        with pytest.raises(InputError, match=f"^{argument}: .*use a whole number from {lowest} to {highest}"):
            Request(**{argument: value})


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16, np.array, torch.tensor])
@pytest.mark.parametrize("argument", RANGES)
def test_whole_numbers_of_numpy_become_python_s(argument, kind):
    value = getattr(Request(**{argument: kind(7)}), argument)
    assert (type(value), value) == (int, 7)


def test_the_largest_seed_may_be_one_of_numpy():
    assert Request(seed=np.uint64(2**64 - 1)).seed == 2**64 - 1
    with pytest.raises(InputError, match="^seed: "):
        Request(seed=np.uint64(2**64 - 1), num=np.int64(2))


def test_the_last_sample_of_a_request_needs_a_seed_too():
    assert Request(seed=2**64 - 8, num=8).num == 8
    with pytest.raises(InputError, match=f"^seed: {2**64 - 7} .* to {2**64 - 8}$"):
        Request(seed=2**64 - 7, num=8)


@pytest.mark.parametrize(
    "guidance",
    [None, 0, -1.5, 1, 7.5, -100, 100, np.float32(2.5), np.float64(3), np.int64(4), np.array(1.5), torch.tensor(2.5)],
)
def test_guidance_of_either_sign_is_taken(guidance):
    assert Request(guidance=guidance).guidance == guidance
    assert type(Request(guidance=guidance).guidance) in (float, type(None))


@pytest.mark.parametrize(
    "guidance",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        1e30,
        -100.1,
        "2",
        [2],
        True,
        np.nan,
        np.True_,
        np.ones(2),
        torch.tensor(True),
        torch.ones(2),
        1j,
    ],
)
def test_guidance_other_than_a_moderate_number_is_refused(guidance):
    with pytest.raises(InputError, match="^guidance: .*use a number from -100 to 100"):
        Request(guidance=guidance)


KNOWN = {
    "task": "auto, joint",
    "solver": "dpm[+][+], unipc",
    "spacing": "even, power",
    "infill": "repaint, langevin",
    "unknown_words": "error, fill",
}


@pytest.mark.parametrize("argument", KNOWN)
@pytest.mark.parametrize("value", ["", "Auto", "dpm", 0, 3, [], np.array(["auto", "error"])], ids=str)
def test_unknown_choices_are_refused_with_the_known_ones(argument, value):
    known = KNOWN[argument]
    with pytest.raises(InputError, match=f"^{argument}: .* is not known; use one of {known}"):
        Request(**{argument: value})


@pytest.mark.parametrize("prompt", ["", "  ", "...", "!?", "\n"])
def test_prompts_without_a_word_are_refused(prompt):
    with pytest.raises(InputError, match="^prompt: .*no word; give words"):
        Request(prompt=prompt)


@pytest.mark.parametrize("prompt", [3, b"red", ["red", "blue"]])
def test_a_prompt_is_one_string(prompt):
    with pytest.raises(InputError, match="^prompt: .*give a string"):
        Request(prompt=prompt)


def test_a_prompt_that_is_not_text_is_refused():
    with pytest.raises(InputError, match="^prompt: .* holds bytes that are not text; give it in UTF-8"):
        Request(prompt="red \udcff")  # as a command line in another encoding arrives


@pytest.mark.parametrize("prompt", ["_", "café", "7", "_ _ red!"])
def test_holes_and_words_of_any_script_make_a_prompt(prompt):
    assert Request(prompt=prompt).prompt == prompt


def test_resampling_needs_stretches_shorter_than_the_way():
    assert Request(steps=6, resample=2, jump=5).jump == 5
    assert Request(steps=3, jump=5).jump == 5, "without resampling, jump means nothing"
    with pytest.raises(
        InputError, match="^jump: 5 is too long; use a jump below the 5 steps, more steps, or resample 1"
    ):
        Request(steps=5, resample=2, jump=5)


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({"mask": "mask.png"}, "mask"),
        ({"mask": "mask.png", "prompt": "red"}, "mask"),
        ({"sketch_mask": "mask.png", "image": "a.png", "mask": "m.png"}, "sketch_mask"),
        ({"masks": {"image": "mask.png"}}, "masks['image']"),
        ({"masks": {"sketch": "mask.png"}, "image": "a.png", "mask": "m.png"}, "masks['sketch']"),
        ({"masks": {"sketch": "mask.png"}, "inputs": {"sketch": None}}, "masks['sketch']"),
    ],
)
def test_a_mask_needs_its_image(given, argument):
    name = "sketch" if "sketch" in argument else "image"
    with pytest.raises(InputError) as refused:
        Request(**given)
    assert str(refused.value) == f"{argument}: 'mask.png' needs the {name} that it belongs to; give {name} too"


@pytest.mark.parametrize(
    ("given", "fitting"),
    [
        ({}, {"joint"}),
        ({"prompt": "red"}, {"text-to-image", "infill"}),  # infill if the model finds a hole in it
        ({"image": "a.png"}, {"image-to-text", "infill"}),
        ({"image": "a.png", "mask": "m.png"}, {"infill"}),
        ({"image": "a.png", "prompt": "red _"}, {"infill"}),
        ({"image": "a.png", "mask": "m.png", "prompt": "red"}, {"infill"}),
        ({"inputs": {"text": "red"}}, {"text-to-image", "infill"}),
        ({"inputs": {"image": "a.png"}, "masks": {"image": "m.png"}}, {"infill"}),
        ({"inputs": {"sketch": "a.png"}}, {"infill"}),  # the model may call it otherwise, as task "auto" finds
    ],
)
def test_a_task_only_checks_what_is_given(given, fitting):
    assert Request(**given, task="auto").task == "auto"
    for task in ("joint", "text-to-image", "image-to-text", "infill"):
        if task in fitting:
            assert Request(**given, task=task).task == task
        else:
            with pytest.raises(InputError, match=f"^task: '{task}' does not fit what is given; .*use auto"):
                Request(**given, task=task)


def test_a_request_cannot_be_changed_after_its_checks():
    with pytest.raises(AttributeError):
        Request().steps = 0
    inputs, order = {"sketch": "a.png"}, ["text", "image"]
    request = Request(inputs=inputs, order=order)
    inputs["text"], order[0] = 7, "image"
    assert (request.inputs, request.order) == ({"sketch": "a.png"}, ("text", "image"))


def test_requests_are_values():
    """Equal ones are equal keys, and they travel to other processes."""
    requests = [Request("red", inputs={"sketch": "a.png"}, order=["text", "image"], seed=i % 2) for i in range(4)]
    assert len({*requests}) == 2 and pickle.loads(pickle.dumps(requests)) == requests
    assert dataclasses.replace(requests[0], seed=1) == requests[1]


@pytest.mark.parametrize("interval", [None, (0, 1), (0.25, 0.75), [0.0, 0.5], (np.float32(0), np.float64(0.5))])
def test_a_guidance_interval_is_two_fractions(interval):
    kept = Request(guidance_interval=interval).guidance_interval
    assert kept == (None if interval is None else tuple(interval))


@pytest.mark.parametrize(
    "interval",
    [(0.5, 0.5), (0.7, 0.2), (-0.1, 1), (0, 1.1), (0,), "01", 0.5, (0, float("nan")), (False, True), (0, None)],
)
def test_any_other_guidance_interval_is_refused(interval):
    with pytest.raises(InputError, match="^guidance_interval: .*use two numbers, 0 <= start < end <= 1"):
        Request(guidance_interval=interval)


@pytest.mark.parametrize("order", ["together", ("text",), ("text", "image"), ["sketch", "text", "image"]])
def test_an_order_is_together_or_names(order):
    assert Request(order=order).order == (order if order == "together" else tuple(order))
    assert Request().order is None, "the checkpoint's own"


@pytest.mark.parametrize("order", ["", "text", "text,image", (), [], ("text", "text"), (1, 2), 3, {"text": 1}])
def test_any_other_order_is_refused(order):
    with pytest.raises(InputError, match="^order: .*; .*names of modalities"):
        Request(order=order)


@pytest.mark.parametrize("eta", [0, 1, 0.5, np.float32(0.25), np.int64(1)])
def test_eta_is_a_fraction(eta):
    found = Request(eta=eta, solver="ddim").eta
    assert found == eta and type(found) is float


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), True, "1", None])
def test_any_other_eta_is_refused(eta):
    with pytest.raises(InputError, match="^eta: .*use a number from 0 to 1"):
        Request(eta=eta, solver="ddim")


@pytest.mark.parametrize("solver", ["dpm++", "ddpm"])
def test_only_ddim_has_an_eta(solver):
    assert Request(solver=solver, eta=0).eta == 0
    with pytest.raises(InputError, match="^eta: 0.5 .*; use solver ddim"):
        Request(solver=solver, eta=0.5)


@pytest.mark.parametrize("kind", [None, *GUIDANCE_KINDS])
def test_every_kind_of_guidance_can_be_asked_for(kind):
    assert Request(guidance_kind=kind).guidance_kind == kind


@pytest.mark.parametrize("kind", ["", "Masked", "none", 1])
def test_any_other_kind_of_guidance_is_refused(kind):
    with pytest.raises(InputError, match="^guidance_kind: .* is not known; use one of masked, alternate"):
        Request(guidance_kind=kind)


def test_prompt_image_sketch_and_masks_are_short_for_inputs_and_masks():
    image, mask = Image.new("RGB", (4, 4)), Image.new("L", (4, 4))
    short = Request("red _", image, mask, sketch=image, sketch_mask=mask)
    both = {"image": image, "sketch": image}, {"image": mask, "sketch": mask}
    long = Request(inputs={"text": "red _", **both[0]}, masks=both[1])
    assert short.given == long.given == {"text": "red _", **both[0]}
    assert short.given_masks == long.given_masks == both[1]
    assert Request(inputs={"text": None}, masks={"image": None}).given == {}, "None is not given"


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({"prompt": "red", "inputs": {"text": "blue"}}, "prompt"),
        ({"image": "a.png", "inputs": {"image": "a.png"}}, "image"),
        ({"image": "a.png", "mask": "m.png", "masks": {"image": "m.png"}}, "mask"),
        ({"sketch": "a.png", "inputs": {"sketch": "a.png"}}, "sketch"),
        ({"sketch": "a.png", "sketch_mask": "m.png", "masks": {"sketch": "m.png"}}, "sketch_mask"),
    ],
)
def test_what_is_given_twice_is_refused(given, argument):
    with pytest.raises(InputError, match=f"^{argument}: .* is given twice; leave it out of (inputs|masks)"):
        Request(**given)


@pytest.mark.parametrize("argument", ["inputs", "masks"])
@pytest.mark.parametrize("value", [None, [("text", "red")], "text", {1: "red"}])
def test_inputs_and_masks_are_mappings_from_names(argument, value):
    with pytest.raises(InputError, match=f"^{argument}: .*; give a mapping from names of modalities"):
        Request(**{argument: value})


def test_resampling_does_not_make_more_steps_than_can_be_prepared():
    assert Request(steps=1000, resample=20, jump=10).resample == 20
    with pytest.raises(InputError, match="^resample: 21 makes too many steps; use at most 20"):
        Request(steps=1000, resample=21, jump=10)
    assert Request(steps=1000, infill="langevin", inner_steps=19).inner_steps == 19
    with pytest.raises(InputError, match="^inner_steps: 20 makes too many steps; use at most 19"):
        Request(steps=1000, infill="langevin", inner_steps=20)


def test_langevin_steps_take_the_place_of_resampling():
    with pytest.raises(InputError, match="^resample: 2 .*; use 1, or infill repaint"):
        Request(infill="langevin", resample=2)


@pytest.mark.parametrize("size", [0, -1, 101, float("nan"), True, "1", None])
def test_step_sizes_are_positive_numbers(size):
    with pytest.raises(InputError, match="^step_size: .*use a number from 0.001 to 100"):
        Request(step_size=size)


@pytest.mark.parametrize("text", ["!!!", "\ud800", 5, np.zeros(2)], ids=repr)
def test_a_text_given_by_name_is_checked_as_a_prompt_is(text):
    with pytest.raises(InputError, match=r"^inputs\['text'\]: "):
        Request(inputs={"text": text})
    assert Request(inputs={"text": ""}).given == {"text": ""}, "known to be empty"
