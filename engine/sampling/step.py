"""One sampling step of a batch: what is captured in a CUDA graph."""

from collections.abc import Mapping

from torch import Tensor

from engine.kernels.cfg_step import at_step, cfg_step
from engine.kernels.step_table import Coefficient, StepColumn
from engine.model.denoiser import Denoiser
from engine.sampling.batch import Batch
from engine.sampling.scheduler import CacheMode, StepPlan


def denoise_step(
    denoiser: Denoiser, batch: Batch, plan: StepPlan, output_rows: Mapping[str, Tensor] | None = None
) -> None:
    """All passes' forward, then guidance, the solver's update and the next inputs, in place.

    output_rows  as in a call of the denoiser
    Reads and writes the batch's memory only, and never waits for the device.
    """
    state, rows = batch.state, plan.passes * plan.slots  # rows of the passes that are on
    features = {name: batch.features[name][:, :rows] for name in plan.cached}  # [depth, R, L, D] each
    cache = None if plan.cache_mode is CacheMode.OFF else batch.cache[:rows]  # [R, L, D]
    refresh = temperature = None
    if plan.tempered or plan.cache_mode is CacheMode.REFRESH:
        coefficients, indices = at_step(batch.constants, state)
        if plan.tempered:
            temperature = coefficients[..., Coefficient.TEMPERATURE].repeat(plan.passes, 1)  # [R, M]
        if plan.cache_mode is CacheMode.REFRESH:
            refresh = (indices[:, 0, StepColumn.REFRESH] != 0).repeat(plan.passes)  # [R]
    adapted = batch.adapted_rows(plan.passes) if plan.adapted else None
    inputs = state.inputs[:rows], state.times[:rows]
    some = {"output_rows": output_rows} if output_rows else {}
    prediction = denoiser(
        *inputs, plan.outputs, features, cache, refresh, adapted, temperature=temperature, **some
    )  # [R, N]
    cfg_step(prediction, batch.constants, state)
