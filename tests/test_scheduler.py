"""The scheduler alone: who gets a slot when, how large the batch is, and what happens when samples leave."""

import ast
from collections import Counter
from pathlib import Path

import pytest
import torch
from denoisers import N, table
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import engine.sampling.scheduler as module
from engine.config import Modality, ModelConfig
from engine.diffusion.solver_table import GuidanceOptions
from engine.errors import InputError
from engine.sampling.batch import SampleSpec
from engine.sampling.scheduler import LINES, PATIENCE, Scheduler

MODEL = ModelConfig((Modality("image", 3, 2, depth=2), Modality("text", 2, 1, depth=1)), shared_depth=3, dim=64)
POWERS = (1, 2, 4, 8)
UNIDIFFUSER = GuidanceOptions("unidiffuser", 2.0, modalities=(0, 1))


def spec(steps, **options):
    generate = torch.ones(MODEL.size, dtype=torch.bool)
    return SampleSpec(0, table(steps, **options), generate, torch.zeros(MODEL.size))


def scheduler_of(*specs, buckets=POWERS, **options):
    """A scheduler in which these samples wait, and their jobs."""
    scheduler = Scheduler(MODEL, buckets, **options)
    jobs = [scheduler.job(spec) for spec in specs]
    scheduler.add(jobs)
    return scheduler, jobs


def step(scheduler):
    """One step: how the slots changed, what was planned, and who has finished."""
    arrangement = scheduler.arrange()
    if arrangement.slots == 0:
        return arrangement, None, []
    plan = scheduler.plan()
    missing = scheduler.missing_features(plan)
    assert all(scheduler.slots[i] is not None for slots in missing.values() for i in slots)
    finished = scheduler.finishing()
    scheduler.advance()
    return arrangement, plan, finished


def steps(scheduler, most=10_000):
    """All steps until nothing is left to do."""
    while not scheduler.idle:
        yield step(scheduler)
        most -= 1
        assert most, "it does not end"


# --- Admission, slots and buckets ----------------------------------------------------------------------------------


def finished_in(scheduler):
    return [job for _, _, done in steps(scheduler) for _, job in done]


def test_longer_samples_of_a_call_go_first_and_calls_take_turns():
    scheduler, first = scheduler_of(*map(spec, (2, 5, 3)), buckets=(1,))
    later = [scheduler.job(spec(9)), scheduler.job(spec(4))]
    scheduler.add(later)
    assert finished_in(scheduler) == [first[1], first[2], later[0], first[0], later[1]]


def test_calls_of_one_sample_go_in_their_order():
    scheduler, jobs = scheduler_of(spec(1), buckets=(1,))
    for length in (3, 1, 2):
        jobs.append(scheduler.job(spec(length)))
        scheduler.add(jobs[-1:])
    assert finished_in(scheduler) == jobs


def test_a_call_of_many_samples_keeps_none_out_and_is_not_kept_out():
    scheduler, many = scheduler_of(*[spec(1)] * 8, buckets=(2,))
    step(scheduler)
    order = []
    for _ in range(12):  # each step two slots get free, and two calls of one sample come
        for _ in range(2):
            scheduler.add([scheduler.job(spec(1))])
        order += [job in many for _, job in step(scheduler)[2]]
    assert order[:4] == [False, True, False, True], "the next call waits only for the samples in slots"
    assert order.count(True) == 6, "the others are served meanwhile, though there is never a slot to spare"


def test_the_smallest_bucket_that_holds_the_samples_is_used():
    scheduler, _ = scheduler_of(*map(spec, (1, 2, 3, 4, 4)))
    assert [plan.slots for _, plan, _ in steps(scheduler)] == [8, 4, 4, 2]


@pytest.mark.parametrize("slots", [8, 32])
def test_a_list_of_mixed_samples_takes_the_steps_of_full_slots(slots):
    lengths = [10 + 5 * (seed % 11) for seed in range(32)]
    scheduler, _ = scheduler_of(*map(spec, lengths), buckets=(slots,))
    full, longest = -(-sum(lengths) // slots), max(lengths)
    assert max(full, longest) <= len(list(steps(scheduler))) <= max(1.2 * full, longest)


def test_samples_keep_their_slots_until_the_batch_has_another_size():
    scheduler, (long, short, *_) = scheduler_of(*map(spec, (9, 2, 7, 8)), buckets=(2, 4))
    assert step(scheduler)[0].enter == [(i, job) for i, job in enumerate([long, *scheduler.slots[1:]])]
    assert scheduler.slots[3] is short
    _, _, finished = step(scheduler)
    assert finished == [(3, short)] and scheduler.slots[3] is None
    late = scheduler.job(spec(1))
    scheduler.add([late])
    arrangement, plan, finished = step(scheduler)
    assert (arrangement.stay, arrangement.enter, finished) == ([], [(3, late)], [(3, late)])
    before = scheduler.slots
    for _ in range(4):
        assert step(scheduler)[0].stay == []
    assert scheduler.slots[1].steps == 8 and scheduler.slots[2] is None, "the sample of 7 steps is done"
    arrangement, plan, _ = step(scheduler)
    assert plan.slots == 2 and arrangement.stay == [(0, 0), (1, 1)]
    assert scheduler.slots == before[:1] + [None], "the sample of 8 steps is done"


def test_cancelled_samples_never_enter_and_leave_before_the_next_step():
    scheduler, (gone, kept, waiting, last) = scheduler_of(*map(spec, (9, 8, 7, 6)), buckets=(2,))
    step(scheduler)
    gone.cancelled = waiting.cancelled = True
    arrangement, _, _ = step(scheduler)
    assert arrangement.enter == [(0, last)] and scheduler.slots == [last, kept]
    kept.cancelled = last.cancelled = True
    assert not scheduler.idle
    assert step(scheduler)[0].slots == 0 and scheduler.idle
    assert (gone.step, kept.step, waiting.step, last.step) == (1, 2, 0, 1)


def test_a_sample_that_has_to_be_alone_shares_no_step():
    scheduler, jobs = scheduler_of(*map(spec, (3, 3, 2, 2)), buckets=(2, 4))
    step(scheduler)
    scheduler.restart(alone=True)
    assert [job.step for job in jobs] == [0] * 4
    late = [scheduler.job(spec(5)), scheduler.job(spec(5))]
    scheduler.add(late)
    order, sharing = [], []
    while not scheduler.idle:
        scheduler.arrange()
        sharing.append(len(scheduler.live))
        order += [job for _, job in scheduler.finishing()]
        scheduler.advance()
    assert order == jobs + late
    assert sharing == [1] * 10 + [2] * 5


def test_a_sample_that_has_to_be_alone_waits_until_the_others_are_done():
    scheduler, (together,) = scheduler_of(spec(9))
    beside, alone, last = (scheduler.job(spec(n)) for n in (4, 2, 1))
    alone.alone = True
    step(scheduler)
    scheduler.add([beside, alone, last])
    assert [job for _, _, done in steps(scheduler) for _, job in done] == [beside, together, alone, last]


def test_a_sample_that_has_to_be_alone_stays_so_when_memory_runs_out_too():
    scheduler, jobs = scheduler_of(spec(3))
    step(scheduler)
    scheduler.restart(alone=True)
    step(scheduler)
    scheduler.restart()
    scheduler.add([scheduler.job(spec(3))])
    step(scheduler)
    assert scheduler.live == jobs


def test_samples_that_restart_go_before_those_that_wait_and_from_their_first_step():
    scheduler, jobs = scheduler_of(*map(spec, (9, 8, 7, 6)), buckets=(1, 2))
    for _ in range(3):
        step(scheduler)
    scheduler.restart()
    assert [job.step for job in jobs] == [0] * 4 and scheduler.live == []
    scheduler.arrange()
    assert scheduler.slots == jobs[:2]


# --- Memory --------------------------------------------------------------------------------------------------------


def most_slots(scheduler, number, steps_each=3):
    """The sizes of the batches in which so many samples are computed."""
    scheduler.add([scheduler.job(spec(steps_each)) for _ in range(number)])
    return [plan.slots for _, plan, _ in steps(scheduler)]


def test_slots_are_halved_when_memory_runs_out_and_doubled_again_after_a_while():
    scheduler, _ = scheduler_of()
    assert scheduler.shrink(8)
    assert set(most_slots(scheduler, 8)) == {4}
    assert scheduler.shrink(4)
    patience = 4 * PATIENCE  # doubled each time that memory ran out
    seen = most_slots(scheduler, 8 * patience // 3)
    assert seen[: 2 * patience] == [2] * patience + [4] * patience
    assert set(seen[2 * patience : -2]) == {8}


def test_steps_count_from_the_last_time_that_memory_ran_out():
    scheduler, _ = scheduler_of()
    scheduler.shrink(8)
    assert set(most_slots(scheduler, 4, 2 * PATIENCE - 1)) == {4}
    scheduler.shrink(8)
    assert set(most_slots(scheduler, 8, 2 * PATIENCE - 1)) == {4}


def test_slots_are_those_of_a_bucket_and_cannot_be_fewer_than_the_smallest():
    scheduler, _ = scheduler_of(buckets=(2, 3, 7))
    assert scheduler.shrink(7) and scheduler.capacity == 3
    assert not scheduler.shrink(3) and scheduler.capacity == 3
    assert not Scheduler(MODEL, (16,)).shrink(16)
    most_slots(scheduler, 1, 130)
    assert scheduler.capacity == 7, "never more than the largest bucket"


@pytest.mark.parametrize("keep", [False, True])
def test_memory_grows_to_the_longest_table_and_shrinks_only_between_samples(keep):
    scheduler, _ = scheduler_of(spec(LINES - 1), keep=keep)
    assert step(scheduler)[0].lines == LINES
    scheduler.add([scheduler.job(spec(LINES)), scheduler.job(spec(LINES - 2))])
    assert step(scheduler)[0].lines == 2 * LINES, "one more than steps: each table ends in a line that changes nothing"
    assert {arrangement.lines for arrangement, _, _ in steps(scheduler)} == {2 * LINES}
    scheduler.add([scheduler.job(spec(3))])
    assert step(scheduler)[0].lines == (2 * LINES if keep else LINES)


@pytest.mark.parametrize("keep", [False, True])
def test_passes_grow_while_samples_are_under_way(keep):
    scheduler, (first, second) = scheduler_of(*[spec(5, guidance=GuidanceOptions("masked", 2.0))] * 2, keep=keep)
    arrangement, plan, _ = step(scheduler)
    assert (arrangement.passes, plan.passes, arrangement.stay) == (2, 2, [])
    wide = scheduler.job(spec(2, guidance=UNIDIFFUSER))
    scheduler.add([wide])
    arrangement, plan, _ = step(scheduler)
    assert (arrangement.passes, plan.passes) == (3, 3)
    assert (arrangement.stay, arrangement.enter) == ([(0, 0), (1, 1)], [(2, wide)]), "all of them into larger memory"
    assert (first.step, second.step, wide.step) == (2, 2, 1)
    assert [(a.passes, plan.passes) for a, plan, _ in steps(scheduler)] == [(3, 3), (3, 2), (3, 2)]
    scheduler.add([scheduler.job(spec(1))])
    assert step(scheduler)[0].passes == (3 if keep else 2)


# --- All of it -----------------------------------------------------------------------------------------------------


LONG = torch.zeros(MODEL.size + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"generate": torch.ones(MODEL.size + 1).bool(), "known": torch.zeros(MODEL.size + 1)},
            "generate: .*wrong shape",
        ),
        ({"null": torch.zeros(3)}, "null: .*wrong shape"),
        ({"table": table(3, 3)}, "table: 3 .*model's 2$"),
        ({"generate": torch.arange(MODEL.size) % 2 == 0}, "generate: .*partly known"),
        ({"generate": torch.arange(MODEL.size) % 2 == 0, "table": table(2, order=((0,), (1,)))}, "generate: .*partly"),
    ],
)
def test_samples_that_do_not_fit_the_model_are_refused_by_their_argument(change, message):
    values = {"seed": 1, "table": table(3), "generate": torch.ones(MODEL.size).bool(), "known": torch.zeros(MODEL.size)}
    with pytest.raises(InputError, match=f"^{message}"):
        Scheduler(MODEL, POWERS).job(SampleSpec(**{**values, **change}))


def test_partly_known_tokens_are_renoised():
    generate, renoised = torch.arange(MODEL.size) % 2 == 0, table(3, conditioning="renoise")
    Scheduler(MODEL, POWERS).job(SampleSpec(1, renoised, generate, torch.zeros(MODEL.size)))


class NoOperations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        raise AssertionError(f"{function} on a tensor")


def test_scheduling_uses_neither_tensors_nor_threads():
    late = GuidanceOptions("masked", 2.0, interval=(0, N // 2))
    scheduler, _ = scheduler_of(spec(5), spec(4, order=((1,), (0,)), guidance=late), spec(6, step_cache=2))
    with NoOperations():
        assert len(list(steps(scheduler))) == 8
    nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text())))
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert "collections" in names
    assert not {name.split(".")[0] for name in names} & {"threading", "queue", "concurrent", "torch"}


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(1, 12), min_size=1, max_size=4)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("restart"), st.booleans()),
        st.tuples(st.just("shrink"), st.none()),
        st.tuples(st.just("steps"), st.integers(1, 6)),
    ),
    max_size=25,
)


@given(events=EVENTS, buckets=st.sampled_from([(1,), (3,), (1, 2, 4), (2, 5)]))
def test_whatever_happens_every_sample_is_done_once_and_within_the_slots(events, buckets):
    scheduler, jobs, finished = Scheduler(MODEL, buckets), [], Counter()

    def one_step():
        arrangement = scheduler.arrange()
        live = scheduler.live
        assert len(live) <= scheduler.capacity and arrangement.slots == len(scheduler.slots)
        assert arrangement.slots in (0, *buckets) and not any(job.cancelled for job in live)
        assert len(live) <= 1 or not any(job.alone for job in live)
        if live:
            scheduler.plan()
            finished.update(job for _, job in scheduler.finishing())
            scheduler.advance()

    for what, value in events:
        if what == "add":
            new = [scheduler.job(spec(length)) for length in value]
            scheduler.add(new)
            jobs += new
        elif what == "cancel" and value < len(jobs):
            jobs[value].cancelled = True
        elif what == "restart":
            scheduler.restart(alone=value)
        elif what == "shrink" and scheduler.slots:
            slots = len(scheduler.slots)
            scheduler.restart()
            scheduler.shrink(slots)
        elif what == "steps":
            for _ in range(value):
                one_step()
    for _ in range(12 * len(jobs) + 1):
        one_step()
    assert scheduler.idle and max(finished.values(), default=0) <= 1
    assert all(job in finished or job.cancelled for job in jobs)
