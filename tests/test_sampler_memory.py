"""What a sampler holds: nothing of samples that are done, nothing once it is closed."""

import gc

import pytest
import torch
from denoisers import CountingDenoiser, table

from engine.config import Modality, ModelConfig
from engine.diffusion.solver_table import GuidanceOptions
from engine.kernels.step_table import Coefficient, StepColumn
from engine.sampling.batch import SampleSpec
from engine.sampling.sampler import Sampler
from engine.sampling.scheduler import LINES

MODEL = ModelConfig((Modality("image", 6, 4, depth=2), Modality("text", 5, 2, depth=1)), shared_depth=3, dim=64)
POWERS = (1, 2, 4, 8)


def spec(seed, steps, **options):
    return SampleSpec(seed, table(steps, **options), torch.ones(MODEL.size, dtype=torch.bool), torch.zeros(MODEL.size))


def mixed_specs():
    """With features, inner blocks' results and extra passes to keep."""
    guided = GuidanceOptions("masked", 2.0, first_stage=1)
    return [
        spec(1, 4, order=((1,), (0,)), guidance=guided),
        spec(2, 5, step_cache=2),
        spec(3, 3, guidance=GuidanceOptions("unidiffuser", 2.0, modalities=(0, 1))),
        spec(4, 2),
        spec(5, 6, order=((0,), (1,)), step_cache=3),
    ]


@pytest.fixture
def tensors():
    """A function that tells how many tensors of this test are alive once a sampler is idle, and their bytes."""
    gc.collect()
    gc.freeze()  # so that only what is made from now on is looked at

    def alive(sampler=None):
        if sampler is not None:
            sampler.call(list, []).result()  # after the turn that its last run was done in
        gc.collect()
        found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        return len(found), sum(tensor.untyped_storage().nbytes() for tensor in found)

    yield alive
    gc.unfreeze()


def test_a_long_table_takes_memory_only_as_long_as_it_is_there(tensors):
    sampler, short = Sampler(CountingDenoiser(MODEL), MODEL, buckets=(1,)), spec(2, 3)
    sampler.run([short])
    before = tensors(sampler)
    sampler.run([spec(1, LINES + 1)])
    long = tensors(sampler)
    sampler.run([short])
    line = len(MODEL.modalities) * (len(Coefficient) + StepColumn.PASS + 1) * 4
    assert long[1] - before[1] == LINES * line and tensors(sampler) == before


def test_only_the_batch_in_use_takes_memory(tensors):
    sampler, specs = Sampler(CountingDenoiser(MODEL), MODEL, buckets=POWERS), mixed_specs()
    sampler.run(specs[3:4])
    before = tensors(sampler)
    sampler.run([specs[3]] * 8)
    assert tensors(sampler) > before
    sampler.run(specs[3:4])
    assert tensors(sampler) == before


def test_nothing_is_kept_of_samples_that_are_done(tensors):
    sampler, specs = Sampler(CountingDenoiser(MODEL), MODEL, buckets=POWERS), mixed_specs()
    sampler.run(specs)
    sampler.run(specs[::2])
    before = tensors(sampler)
    for _ in range(3):
        sampler.run(specs[:3])
        sampler.run(specs[::2])
    assert tensors(sampler) <= before


def test_closing_frees_all_memory(tensors):
    denoiser, specs = CountingDenoiser(MODEL), mixed_specs()
    before = tensors()
    sampler = Sampler(denoiser, MODEL, buckets=POWERS)
    sampler.run(specs)
    assert tensors(sampler) > before
    sampler.close()
    assert tensors() == before
