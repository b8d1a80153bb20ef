"""`InputError`: its one sentence, its fields, and what becomes of them on the way to a user."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.errors import InputError, errors_named, shown


def fields(error: InputError) -> tuple:
    return error.argument, error.value, error.remedy, error.problem


def test_an_error_is_one_sentence_of_its_fields():
    error = InputError("steps", 0, "use 1 or more", "is out of range")
    assert isinstance(error, ValueError)
    assert fields(error) == ("steps", 0, "use 1 or more", "is out of range")
    assert str(error) == "steps: 0 is out of range; use 1 or more"
    assert str(InputError("steps", "x", "use 1")) == "steps: 'x' is not valid; use 1"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_travel_between_processes(duplicate):
    error = InputError("model.dim", [1, 2], "use a number", "is a list")
    assert fields(duplicate(error)) == fields(error) and str(duplicate(error)) == str(error)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("red", "'red'"),
        ("", "''"),
        ("two\nlines", r"'two\nlines'"),
        (Path("a folder/file.png"), "a folder/file.png"),
        (None, "None"),
        (Image.new("LA", (7, 5)), "<image of 7x5 pixels, mode LA>"),
        (1e30, "1e+30"),
        (2**64, str(2**64)),
    ],
)
def test_values_are_shown_quoted_and_paths_as_they_are(value, expected):
    assert shown(value) == expected


def nested(depth: int) -> list:
    found = []
    for _ in range(depth):
        found = [found]
    return found


ENDLESS = ["x" * 10_000, Path("x" * 10_000), nested(100_000), [0] * 10_000, 10**3000, 10**9000, np.zeros((999, 999))]


@pytest.mark.parametrize("value", ENDLESS, ids=lambda _: "")
def test_a_value_without_end_is_cut(value):
    """Also where `repr` itself would give up: a nested list is refused with an InputError, not a RecursionError."""
    message = str(InputError("prompt", value, "give less"))
    assert len(message) < 250 and "\n" not in message


def test_an_error_can_be_given_the_name_of_the_option_that_led_to_it():
    with pytest.raises(InputError) as renamed, errors_named("--config"):
        raise InputError("model.dim", 0, "use 1 or more", "is out of range")
    assert fields(renamed.value) == ("--config", 0, "use 1 or more", "is out of range")
    assert renamed.value.__cause__ is None


def test_a_renamed_error_keeps_what_it_was_raised_from():
    cause = OSError(2, "No such file")
    with pytest.raises(InputError) as renamed, errors_named("--config"):
        raise InputError("file", "a.json", "give another") from cause
    assert renamed.value.__cause__ is cause


def test_other_errors_keep_their_name():
    with pytest.raises(ZeroDivisionError), errors_named("--config"):
        _ = 1 / 0
    with errors_named("--config"):
        pass
