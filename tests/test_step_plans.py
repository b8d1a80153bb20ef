"""What the scheduler says each step has to compute: passes, outputs, features, inner blocks, and what has arrived."""

from collections import Counter

import torch
from denoisers import table

from engine.config import Modality, ModelConfig
from engine.diffusion.solver_table import GuidanceOptions
from engine.sampling.batch import SampleSpec
from engine.sampling.scheduler import CacheMode, Scheduler, StepPlan

MODEL = ModelConfig((Modality("image", 3, 2, depth=2), Modality("text", 2, 1, depth=1)), shared_depth=3, dim=64)


def spec(steps, task="image text", config=MODEL, on_arrival=None, **options):
    generate = torch.zeros(config.size, dtype=torch.bool)
    for name, part in config.state_slices.items():
        generate[part] = name in task
    lines = table(steps, len(config.modalities), **options)
    return SampleSpec(0, lines, generate, torch.zeros(config.size), on_arrival=on_arrival or {})


def scheduler_of(*specs):
    """A scheduler in which these samples wait, and their jobs."""
    scheduler = Scheduler(MODEL, (1, 2, 4, 8))
    jobs = [scheduler.job(spec) for spec in specs]
    scheduler.add(jobs)
    return scheduler, jobs


def plans(scheduler):
    """The plans of all steps until nothing is left to do."""
    found = []
    while not scheduler.idle:
        scheduler.arrange()
        found.append(scheduler.plan())
        scheduler.advance()
    return found


def test_a_plan_has_the_passes_and_outputs_that_some_sample_needs():
    interval = spec(4, "image", guidance=GuidanceOptions("masked", 2.0, interval=(300, 600)))  # 1000, 750, 500, 250
    scheduler, _ = scheduler_of(interval)
    assert [(plan.passes, plan.outputs) for plan in plans(scheduler)] == [(p, ("image",)) for p in (1, 1, 2, 1)]
    scheduler, _ = scheduler_of(interval, spec(2, "text"))
    outputs = [("image", "text"), ("image", "text"), ("image",), ("image",)]
    assert [(plan.passes, plan.outputs) for plan in plans(scheduler)] == list(zip((1, 1, 2, 1), outputs, strict=True))


def test_only_modalities_that_move_and_are_generated_are_predicted():
    scheduler, _ = scheduler_of(spec(2, order=((1,), (0,))))
    assert [plan.outputs for plan in plans(scheduler)] == [("text",)] * 2 + [("image",)] * 2
    scheduler, _ = scheduler_of(spec(2, "text", order=((1,), (0,))))
    assert [plan.outputs for plan in plans(scheduler)] == [("text",)] * 2 + [()] * 2


def test_features_are_read_where_all_samples_enter_alike():
    scheduler, _ = scheduler_of(spec(3, "text"))
    assert [plan.cached for plan in plans(scheduler)] == [("image",)] * 3
    scheduler, _ = scheduler_of(spec(3, "text"), spec(2, "image"))
    assert [plan.cached for plan in plans(scheduler)] == [(), (), ("image",)]
    scheduler, _ = scheduler_of(spec(2, order=((1,), (0,))))
    # The image waits at the time of its first step, so that still finds it as it was.
    assert [plan.cached for plan in plans(scheduler)] == [("image",), ("image",), ("image", "text"), ("text",)]


def test_a_modality_without_in_blocks_has_no_features():
    config = ModelConfig((Modality("image", 3, 2, depth=0), Modality("text", 2, 1, depth=1)), shared_depth=1, dim=64)
    scheduler = Scheduler(config, (1,))
    for task in ("text", "image"):
        scheduler.add([scheduler.job(spec(2, task, config))])
    assert [plan.cached for plan in plans(scheduler)] == [()] * 2 + [("text",)] * 2


def test_the_inner_blocks_run_where_some_sample_needs_them():
    off, refresh, reuse = CacheMode.OFF, CacheMode.REFRESH, CacheMode.REUSE
    scheduler, _ = scheduler_of(spec(5, step_cache=3))
    assert [plan.cache_mode for plan in plans(scheduler)] == [refresh, reuse, reuse, refresh, reuse]
    scheduler, _ = scheduler_of(spec(5, step_cache=3), spec(2))
    assert [plan.cache_mode for plan in plans(scheduler)] == [refresh, refresh, reuse, refresh, reuse]
    scheduler, _ = scheduler_of(spec(5))
    assert {plan.cache_mode for plan in plans(scheduler)} == {off}


def test_equal_steps_have_equal_plans():
    scheduler, _ = scheduler_of(spec(3, "text"))
    assert Counter(plans(scheduler)) == {StepPlan(1, 1, ("text",), ("image",), CacheMode.OFF): 3}


def missing(scheduler):
    scheduler.arrange()
    found = scheduler.missing_features(scheduler.plan())
    scheduler.advance()
    return found


def test_features_are_computed_once_for_each_sample_that_enters():
    scheduler, _ = scheduler_of(spec(6, "text"), spec(5, "text"))
    assert missing(scheduler) == {"image": [0, 1]}
    assert missing(scheduler) == {}
    scheduler.add([scheduler.job(spec(2, "text"))])
    assert missing(scheduler) == {"image": [2]}
    assert missing(scheduler) == missing(scheduler) == {}, "also in a smaller batch, which they are copied to"
    assert scheduler.plan().slots == 2


def test_features_are_computed_anew_when_a_modality_enters_otherwise_and_after_a_restart():
    late = GuidanceOptions("masked", 2.0, interval=(0, 500))
    scheduler, (job,) = scheduler_of(spec([900, 600, 400, 300], "text", guidance=late))
    assert [missing(scheduler) for _ in range(3)] == [{"image": [0]}, {}, {"image": [0]}]
    scheduler.restart()
    assert [missing(scheduler) for _ in range(4)] == [{"image": [0]}, {}, {"image": [0]}, {}]
    scheduler, _ = scheduler_of(spec(4, "text"))
    assert [missing(scheduler) for _ in range(2)] == [{"image": [0]}, {}]
    scheduler.restart()
    assert missing(scheduler) == {"image": [0]}, "they were lost with the slot"


def test_features_that_a_step_cannot_use_are_computed_when_one_can():
    scheduler, _ = scheduler_of(spec(4, "text"), spec(2, "image"))
    assert [missing(scheduler) for _ in range(4)] == [{}, {}, {"image": [0]}, {}]


def test_modalities_arrive_with_the_last_step_that_moves_them_where_others_are_to_come():
    nearest, rounded = torch.round, torch.floor
    order = ((1,), (0,))
    specs = [
        spec(2, order=order, on_arrival={"text": nearest, "image": nearest}),
        spec(2, order=order, on_arrival={"text": nearest}),
        spec(2, order=order, on_arrival={"text": rounded}),
        spec(3, order=order[::-1], on_arrival={"image": nearest}),
        spec(4, on_arrival={"text": nearest}),
        spec(2, "image", order=order, on_arrival={"text": nearest, "image": nearest}),
        spec(2, order=order),
    ]
    scheduler, jobs = scheduler_of(*specs)
    found = {}
    for n in range(6):
        scheduler.arrange()
        slots = {key: [jobs.index(scheduler.slots[i]) for i in slots] for key, slots in scheduler.arriving().items()}
        found |= {n: slots} if slots else {}
        scheduler.advance()
    # All but the last of an order, where something of it is generated; samples with the same function together.
    assert found == {1: {("text", nearest): [0, 1], ("text", rounded): [2]}, 2: {("image", nearest): [3]}}
