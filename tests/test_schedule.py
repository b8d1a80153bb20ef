"""Noise schedules and the times of a run."""

import numpy as np
import pytest

from engine.diffusion.schedule import NoiseSchedule, timesteps, way_to_time
from engine.errors import InputError
from engine.request import SPACINGS

N = 1000
BETAS = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@pytest.mark.parametrize("name", BETAS)
def test_alpha_bar_is_that_of_diffusers_with_clean_data_put_before(name):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=N, **BETAS[name]).alphas_cumprod.double().numpy()
    ours = NoiseSchedule(name, N)
    assert ours.alpha_bar[0] == 1.0 and ours.sigma(0) == 0.0 and ours.half_log_snr(0) == np.inf
    np.testing.assert_allclose(ours.alpha_bar[1:], theirs, rtol=1e-4)
    t = np.arange(N + 1)
    np.testing.assert_allclose(ours.alpha(t) ** 2 + ours.sigma(t) ** 2, 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 50, 333, 999, 1000])
def test_times_start_at_the_noisiest_and_descend_evenly(steps):
    times = timesteps(N, steps)
    assert len(times) == steps and times[0] == N and times[-1] >= 1
    gaps = -np.diff([*times, 0])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("most", [2, 7, N])
def test_power_spacing_has_as_many_different_times_which_come_closer_towards_0(most):
    for steps in range(1, most + 1):
        times = timesteps(most, steps, "power")
        gaps = -np.diff([*times, 0])
        assert len(times) == steps and times[0] == most and gaps.min() >= 1
        assert (np.diff(gaps) <= 1).all(), "but for rounding"
    assert timesteps(N, 4, "power") == [1000, 650, 354, 125]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_fraction_of_the_way_is_the_time_after_that_fraction_of_the_steps(spacing):
    times = [*timesteps(N, 8, spacing), 0]
    assert [way_to_time(N, i / 8, spacing) for i in range(9)] == times


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(InputError, match=f"^steps: {steps} is out of range; use 1 to 1000$") as refusal:
        timesteps(N, steps)
    assert (refusal.value.argument, refusal.value.value) == ("steps", steps)


@pytest.mark.parametrize(
    "name, timesteps, message", [("linear", N, "^schedule: 'linear' is not known"), ("cosine", 1, "^timesteps: 1 ")]
)
def test_schedules_that_do_not_exist_are_refused(name, timesteps, message):
    with pytest.raises(InputError, match=message):
        NoiseSchedule(name, timesteps)
