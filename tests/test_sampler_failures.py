"""Failing steps: each error reaches the samples that it concerns, and all others come out as if nothing had been."""

import gc
import threading
import warnings
import weakref
from collections import Counter

import pytest
import torch
from denoisers import SECONDS, FunctionDenoiser, sample, table
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import Modality, ModelConfig
from engine.errors import InputError
from engine.sampling.batch import SampleSpec
from engine.sampling.sampler import NotFiniteError, Sampler
from engine.sampling.scheduler import PATIENCE

MODEL = ModelConfig((Modality("image", 4, 2, depth=0),), shared_depth=1, dim=64)
POWERS = (1, 2, 4, 8)
BAD = 666.0  # the known value of a sample that makes its denoiser fail


def spec(seed, steps=3, mark=0.0):
    """A sample whose first token is known: `mark`."""
    generate, known = torch.ones(MODEL.size, dtype=torch.bool), torch.zeros(MODEL.size)
    generate[:2], known[:2] = False, mark
    return SampleSpec(seed, table(steps, 1), generate, known)


def predict(inputs, times, outputs):
    return torch.tanh(inputs + 0.7 * inputs.roll(1, 1)) * torch.cos(times[:, -1:] / 300)


def is_bad(inputs, times, below=1001):
    return (inputs[:, 0] == BAD) & (times[:, -1] < below)


def alone(*specs):
    return torch.cat([sample(FunctionDenoiser(predict), [one], MODEL) for one in specs])


def outcomes(function, *runs, buckets=POWERS):
    """What becomes of runs that share their steps, states or errors; and the rows of every forward."""
    rows = []

    def counted(inputs, times, outputs):
        rows.append(len(inputs))
        return function(inputs, times, outputs)

    sampler, found = Sampler(FunctionDenoiser(counted), MODEL, buckets=buckets), []
    try:
        for future in submitted_together(sampler, *runs):
            error = future.exception(SECONDS)
            found.append(future.result() if error is None else error)
    finally:
        sampler.close()
    return found, rows


def submitted_together(sampler, *runs):
    """Futures of runs that are all there before the first step: the worker itself submits them."""
    futures, submitted = [], threading.Event()

    def submit(items):
        futures.extend(sampler.submit(run) for run in runs)
        submitted.set()
        return items

    sampler.call(submit, [None])
    assert submitted.wait(SECONDS)
    return futures


# --- Values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_fails_its_own_run_and_says_which_sample(value):
    def broken(inputs, times, outputs):
        return torch.where(is_bad(inputs, times)[:, None], value, predict(inputs, times, outputs))

    run = [spec(1), spec(2, mark=BAD), spec(3), spec(4, 5, BAD)]
    (failed, other), rows = outcomes(broken, run, [spec(5), spec(6)])
    assert type(failed) is NotFiniteError and failed.positions == [1, 3]
    assert torch.equal(failed.states[[0, 2]], alone(spec(1), spec(3)))
    assert isinstance(failed, FloatingPointError) and "NaN or infinite" in str(failed)
    assert torch.equal(other, alone(spec(5), spec(6)))
    assert len(rows) == 5, "nothing starts again"


def test_a_failure_to_compile_is_told_in_one_line_with_its_remedy():
    kind = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    def broken(*_):
        raise kind("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    (failed,), _ = outcomes(broken, [spec(1)])
    assert type(failed) is InputError and failed.argument == "compile"
    assert str(failed) == (
        "compile: True failed (InvalidCxxCompiler: No working C++ compiler found); "
        "install a C++ compiler such as g++ and Python's headers, or leave it out"
    )


def test_a_prediction_that_is_not_finite_where_it_is_not_used_goes_nowhere():
    def broken(inputs, times, outputs):
        prediction = predict(inputs, times, outputs)
        prediction[:, :2] = float("nan")
        return prediction

    (found,), _ = outcomes(broken, [spec(1), spec(2)])
    assert torch.equal(found, alone(spec(1), spec(2)))


# --- Exceptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [1001, 600], ids=["at the first step", "at a later step"])
def test_an_exception_fails_the_run_whose_sample_raises_it_and_no_other(below):
    def refuse(inputs, times, outputs):
        if is_bad(inputs, times, below).any():
            raise ZeroDivisionError("bad")
        return predict(inputs, times, outputs)

    runs = [spec(1), spec(2, 5)], [spec(3), spec(4, mark=BAD)], [spec(5)], [spec(6, 4)]
    found, rows = outcomes(refuse, *runs)
    assert type(found[1]) is ZeroDivisionError and str(found[1]) == "bad"
    for i in (0, 2, 3):
        assert torch.equal(found[i], alone(*runs[i])), i
    assert Counter(rows)[8] == (1 if below > 1000 else 3) and set(rows) == {8, 1}, "together, then each alone"


def test_samples_that_come_later_share_steps_again():
    def refuse(inputs, times, outputs):
        if is_bad(inputs, times).any():
            raise ZeroDivisionError
        return predict(inputs, times, outputs)

    sampler = Sampler(FunctionDenoiser(refuse), MODEL, buckets=POWERS)
    with pytest.raises(ZeroDivisionError):
        sampler.run([spec(1), spec(2, mark=BAD)])
    before = sampler.forwards
    assert torch.equal(sampler.run([spec(3), spec(4)]), alone(spec(3), spec(4)))
    assert sampler.forwards - before == 3


def test_a_step_that_fails_once_fails_nobody():
    errors = iter([None, ZeroDivisionError()])

    def stumble(inputs, times, outputs):
        if (error := next(errors, None)) is not None:
            raise error
        return predict(inputs, times, outputs)

    (found,), rows = outcomes(stumble, [spec(1), spec(2)])
    assert torch.equal(found, alone(spec(1), spec(2)))
    assert rows == [2, 2] + [1] * 6


def test_an_interrupt_ends_everything_that_was_submitted_but_not_the_sampler():
    errors = iter([None, KeyboardInterrupt()])

    def interrupt(inputs, times, outputs):
        if (error := next(errors, None)) is not None:
            raise error
        return predict(inputs, times, outputs)

    sampler = Sampler(FunctionDenoiser(interrupt), MODEL, buckets=(1,))
    for future in submitted_together(sampler, [spec(1)], [spec(2)]):
        with pytest.raises(KeyboardInterrupt):
            future.result(SECONDS)
    assert torch.equal(sampler.run([spec(3)]), alone(spec(3)))


class Blocked(FunctionDenoiser):
    """Has blocks whose results could be used again, and fails to compute them."""

    can_cache = True

    def __init__(self, fails):
        super().__init__(predict)
        self.fails = fails

    def __call__(self, inputs, times, outputs=None, features=None, cache=None, refresh=None, adapted=None, **tempered):
        return predict(inputs, times, outputs)

    def branch_features(self, name, inputs, times, adapted=None):
        if self.fails == "branch_features":
            raise ZeroDivisionError("branch_features")
        return torch.zeros(1, len(inputs), 4, 64)

    def new_cache(self, rows):
        raise ZeroDivisionError("new_cache")


@pytest.mark.parametrize("fails", ["branch_features", "new_cache"])
def test_what_is_computed_beside_the_forwards_may_fail_too(fails):
    config = ModelConfig((Modality("image", 4, 2, depth=1), Modality("text", 1, 1, depth=0)), shared_depth=3, dim=64)
    generate, known = torch.tensor([False] * 8 + [True]), torch.zeros(9)
    options = {"step_cache": 2} if fails == "new_cache" else {}
    failing, other = (SampleSpec(i, table(4, 2, **o), generate, known) for i, o in enumerate((options, {})))
    sampler = Sampler(Blocked(fails), config, buckets=(2,))
    with pytest.raises(ZeroDivisionError, match=fails):
        sampler.run([failing])
    if fails == "new_cache":
        assert sampler.run([other]).isfinite().all()
    with pytest.raises(ZeroDivisionError, match=fails):
        sampler.run([failing])


def test_a_sample_that_fails_as_a_modality_arrives_fails_alone():
    config = ModelConfig((Modality("image", 4, 2, depth=0), Modality("text", 1, 1, depth=0)), shared_depth=1, dim=64)

    def refuse(tokens):
        raise ZeroDivisionError("arrival")

    everything, nothing = torch.ones(9, dtype=torch.bool), torch.zeros(9)
    lines = table(3, 2, order=((1,), (0,)))
    failing, other = (SampleSpec(1, lines, everything, nothing, None, f) for f in ({"text": refuse}, {}))
    sampler = Sampler(FunctionDenoiser(predict), config, buckets=(4,))
    expected = sampler.run([other])
    first, second = submitted_together(sampler, [failing], [other])
    with pytest.raises(ZeroDivisionError, match="arrival"):
        first.result(SECONDS)
    assert torch.equal(second.result(SECONDS), expected)


# --- Memory --------------------------------------------------------------------------------------------------------


def out_of_memory_beyond(rows):
    def limited(inputs, times, outputs):
        if len(inputs) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(inputs, times, outputs)

    return limited


def test_out_of_memory_halves_the_slots_with_a_warning():
    specs = [spec(seed, 3 + seed % 4) for seed in range(11)]
    with pytest.warns(UserWarning) as warned:
        (found,), rows = outcomes(out_of_memory_beyond(3), specs)
    assert torch.equal(found, alone(*specs))
    assert [str(warning.message) for warning in warned] == [
        "out of memory with 8 samples at a time; continuing with 4",
        "out of memory with 4 samples at a time; continuing with 2",
    ]
    assert rows[:2] == [8, 4] and set(rows[2:]) <= {1, 2}


def test_slots_grow_back_when_memory_allows_and_shrink_again_when_it_does_not():
    limit = [4]

    def limited(inputs, times, outputs):
        return out_of_memory_beyond(limit[0])(inputs, times, outputs)

    sampler = Sampler(FunctionDenoiser(limited), MODEL, buckets=POWERS)
    specs = [spec(seed, PATIENCE // 2) for seed in range(8)]
    expected = alone(*specs)
    for memory, times, sizes in ((4, 1, {4}), (100, 3, {4, 8}), (4, 1, {4}), (100, 1, {4})):
        limit[0], before = memory, Counter(sampler.plans)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(sampler.run(specs * times), expected.repeat(times, 1))
        assert {plan.slots for plan in sampler.plans - before} == sizes, (memory, sizes)


def test_out_of_memory_for_a_single_sample_is_an_error():
    message = "^max_rows: memory does not suffice for 1 samples at a time; use fewer$"
    sampler = Sampler(FunctionDenoiser(out_of_memory_beyond(0)), MODEL, buckets=POWERS)
    with pytest.raises(torch.OutOfMemoryError, match=message):
        sampler.run([spec(1)])
    sampler.denoiser = FunctionDenoiser(predict)
    assert torch.equal(sampler.run([spec(2)]), alone(spec(2)))


def test_out_of_memory_in_the_smallest_batch_fails_those_in_it_and_goes_on_with_the_others():
    errors = iter([torch.OutOfMemoryError("CUDA out of memory")])

    def once(inputs, times, outputs):
        if (error := next(errors, None)) is not None:
            raise error
        return predict(inputs, times, outputs)

    found, _ = outcomes(once, [spec(1)], [spec(2)], [spec(3)], buckets=(2,))
    for error in found[:2]:
        assert isinstance(error, torch.OutOfMemoryError) and "2 samples at a time" in str(error)
    assert torch.equal(found[2], alone(spec(3)))


def test_out_of_memory_frees_what_the_failed_step_held_before_it_goes_on(monkeypatch):
    """The exception's traceback would hold it, and so would whoever keeps the exception."""
    held, freed = [], []

    def limited(inputs, times, outputs):
        work = inputs * 2
        held.append(weakref.ref(work))
        if len(inputs) > 1 or len(held) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work

    sampler = Sampler(FunctionDenoiser(limited), MODEL, buckets=(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *_: freed.append(held[0]() is None))
        error = sampler.submit([spec(1), spec(2)]).exception(SECONDS)
    assert isinstance(error, torch.OutOfMemoryError) and freed == [True]
    gc.collect()
    assert len(held) == 2 and held[1]() is None


class Eager:
    """Stands in for CUDA graphs: counts how often they were dropped."""

    def __init__(self):
        self.cleared = []

    def __call__(self, key, step):
        step()

    def clear(self):
        self.cleared.append(1)


def test_a_failed_step_drops_the_memory_of_all_batches_and_what_was_captured_in_it():
    errors = iter([None, ZeroDivisionError()])

    def stumble(inputs, times, outputs):
        if (error := next(errors, None)) is not None:
            raise error
        return predict(inputs, times, outputs)

    graphs = Eager()
    sampler = Sampler(FunctionDenoiser(stumble), MODEL, buckets=POWERS, graphs=graphs)
    assert torch.equal(sampler.run([spec(1), spec(2)]), alone(spec(1), spec(2)))
    assert len(graphs.cleared) == 2, "where memory was first made, and after the failure"


class NoMemoryToClone(TorchDispatchMode):
    """The first clone of a tensor runs out of memory."""

    failed = False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket.__name__ == "clone" and not self.failed:
            self.failed = True
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*arguments, **keywords or {})


def test_out_of_memory_where_a_finished_state_is_copied_starts_its_samples_again():
    mode, calls = NoMemoryToClone(), []

    def at_the_last_step(inputs, times, outputs):
        calls.append(len(inputs))
        if len(calls) == 3:
            mode.__enter__()
        if len(calls) == 4:
            mode.__exit__(None, None, None)
        return predict(inputs, times, outputs)

    with pytest.warns(UserWarning, match="out of memory with 2 samples at a time; continuing with 1"):
        (found,), rows = outcomes(at_the_last_step, [spec(1), spec(2)], buckets=(1, 2))
    assert torch.equal(found, alone(spec(1), spec(2))) and rows == [2] * 3 + [1] * 6


def test_out_of_memory_where_samples_enter_starts_them_again(monkeypatch):
    import engine.sampling.stepper as module

    make, asked = module.batch_constants, []

    def limited(specs, model, device, slots, *shape):
        asked.append(slots)
        if slots > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(specs, model, device, slots, *shape)

    monkeypatch.setattr(module, "batch_constants", limited)
    with pytest.warns(UserWarning, match="out of memory with 4 samples at a time; continuing with 2"):
        (found,), _ = outcomes(predict, [spec(seed) for seed in range(4)], buckets=(1, 2, 4))
    assert torch.equal(found, alone(*[spec(seed) for seed in range(4)])) and max(asked[1:]) == 2
