"""Previews of samples in progress: x̂0 of what is being generated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.sampling.batch import Batch
from engine.sampling.scheduler import Job


@dataclass(frozen=True, eq=False)
class Preview:
    """A sample in progress, packed like its final state."""

    position: int  # among the samples that were submitted
    x0: Tensor  # [N] float32 on the device: x̂0 of what is generated now, the state of what is known or has arrived
    modalities: frozenset[str]  # generated ones that have begun; the others are noise


def preview(batch: Batch, slot: int, job: Job, position: int, model: ModelConfig) -> Preview:
    """The sample in a slot after the step that was just done, before that step counts as done. Only reads the batch."""
    x0 = batch.state.state[slot].clone()  # [N]
    for name in job.needs.outputs[job.step]:
        part = model.state_slices[name]
        x0[part] = torch.where(batch.constants.generate[slot, part], batch.state.x0_prev[slot, part], x0[part])
    return Preview(position, x0, frozenset().union(*job.needs.outputs[: job.step + 1]))
