import numpy as np
import pytest
import torch

from engine.config import Modality, ModelConfig
from engine.kernels.cfg_step import STATE_STREAM, Coefficient, Guided, Index, normals
from engine.sampler import Row, sample
from engine.schedule import NoiseSchedule, solver_table, timesteps

N = 1000
BETAS = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
MODEL = ModelConfig((Modality("image", 32, 4, depth=0),), shared_depth=1, dim=64)


def table(times, schedule="cosine", prediction="v_prediction", conditioning="clean", **options):
    return solver_table(NoiseSchedule(schedule, N), times, prediction=prediction, conditioning=conditioning, **options)


def column(table, name):
    return table.coefficients[:, Coefficient[name]]


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


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps: {steps} .*1 to 1000"):
        timesteps(N, steps)


# --- The trajectories of diffusers' schedulers ---------------------------------------------------------------------


def denoiser_of(schedule, prediction):
    """Any bounded estimate of x̂0, in the form that the prediction type asks for."""
    ours = NoiseSchedule(schedule, N)

    def denoiser(x, times, outputs):
        t = times[:, :1].long().numpy()
        alpha, sigma = torch.from_numpy(ours.alpha(t)), torch.from_numpy(ours.sigma(t))
        x0 = torch.tanh(x.double() + 0.5 * x.double().roll(1, dims=1))
        epsilon = (x - alpha * x0) / sigma
        return (epsilon if prediction == "epsilon" else alpha * epsilon - sigma * x0).float()

    return denoiser


def our_trajectory(denoiser, solver_table, seed):
    states = []

    def recording(x, times, outputs):
        states.append(x.clone())
        return denoiser(x, times, outputs)

    everything, nothing = torch.ones(MODEL.size, dtype=torch.bool), torch.zeros(MODEL.size)
    states.append(sample(recording, [Row(seed, solver_table, everything, nothing)], MODEL))
    return torch.cat(states)


def their_trajectory(denoiser, scheduler, steps, first, seed, monkeypatch, options):
    scheduler.set_timesteps(steps)
    x = normals(torch.tensor([seed]), torch.tensor([0]), STATE_STREAM, MODEL.size)[0]
    states = [x]
    for step, k in enumerate(scheduler.timesteps[first:]):
        z = normals(torch.tensor([seed]), torch.tensor([step + 1]), STATE_STREAM, MODEL.size)[0]
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z)
        if options.get("eta"):
            options = {**options, "variance_noise": z}
        f = denoiser(x, torch.full((1, MODEL.tokens), int(k) + 1), ("image",))
        x = scheduler.step(f, k, x, **options).prev_sample
        states.append(x)
    return torch.cat(states)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize(
    "solver, eta, steps",  # diffusers' DDIM is only right where the steps divide N
    [("ddim", 0.0, 8), ("ddim", 0.0, 25), ("ddim", 0.7, 25), ("ddpm", 0.0, 33), ("dpm++", 0.0, 8), ("dpm++", 0.0, 33)],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers against NumPy 2
def test_solvers_reproduce_the_trajectories_of_diffusers(solver, eta, schedule, prediction, steps, monkeypatch):
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    common = {"num_train_timesteps": N, "timestep_spacing": "trailing", **BETAS[schedule]}
    common["prediction_type"] = prediction
    theirs = {
        "ddim": lambda: DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **common),
        "ddpm": lambda: DDPMScheduler(clip_sample=False, variance_type="fixed_small", **common),
        "dpm++": lambda: DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero", **common
        ),
    }[solver]()
    denoiser = denoiser_of(schedule, prediction)
    # At the cosine schedule's time N, x̂0 = (x − σ·ε) / α is 20,000 times float32's rounding off in any implementation.
    first = 1 if (schedule, prediction) == ("cosine", "epsilon") else 0
    ours = table(timesteps(N, steps)[first:], schedule, prediction, solver=solver, eta=eta)
    options = {"eta": eta} if solver == "ddim" else {}
    expected = their_trajectory(denoiser, theirs, steps, first, 11, monkeypatch, options)
    torch.testing.assert_close(our_trajectory(denoiser, ours, 11), expected, atol=1e-4, rtol=1e-4)


# --- RePaint, guidance, conditioning -------------------------------------------------------------------------------


@pytest.mark.parametrize("resample, calls", [(1, 50), (2, 95), (5, 230), (10, 455)])
def test_resampling_calls_the_model_as_often_as_repaint_says(resample, calls):
    assert table(timesteps(N, 50), resample=resample, jump=5).steps == calls


def test_resampling_repeats_every_stretch_but_the_noisiest():
    times = table(timesteps(N, 4), solver="ddim", resample=2, jump=2).indices[:, Index.TIME]
    assert times.tolist() == [1000, 750, 500, 250, 500, 250]


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++"])
def test_a_jump_keeps_the_marginal_of_the_time_it_jumps_to(solver):
    """Where x̂0 is right, x_s = α_s·x0 + σ_s·ε; after the jump mean and variance must be those of x_u."""
    schedule = NoiseSchedule("cosine", N)
    lines = table(timesteps(N, 10), solver=solver, resample=2, jump=3)
    times = lines.indices[:, Index.TIME]
    for step in range(1, lines.steps):
        if times[step] > times[step - 1]:
            a, b, c, d = (column(lines, name)[step - 1].astype(float) for name in "ABCD")
            t, u = times[step - 1], times[step]
            np.testing.assert_allclose(a * schedule.alpha(t) + b + c, schedule.alpha(u), rtol=1e-5)
            np.testing.assert_allclose((a * schedule.sigma(t)) ** 2 + d**2, schedule.sigma(u) ** 2, rtol=1e-5)


def test_dpm_solver_is_first_order_at_the_start_at_the_end_and_after_a_jump():
    lines = table(timesteps(N, 6), resample=2, jump=2)
    times = lines.indices[:, Index.TIME].tolist()
    assert times == [1000, 833, 667, 500, 667, 500, 333, 167, 333, 167]
    first_order = [True, False, False, False, True, False, False, True, True, True]
    assert (column(lines, "C") == 0).tolist() == first_order


def test_outside_the_guidance_interval_there_is_no_guidance_and_no_extra_pass():
    lines = table([900, 500, 100, 50], guidance_scale=4.0, guidance_interval=(100, 500))
    assert column(lines, "W").tolist() == [1, 4, 4, 1]
    assert lines.guided[:, 0].tolist() == [Guided.OFF, Guided.MASKED, Guided.MASKED, Guided.OFF]


@pytest.mark.parametrize(
    "kind, codes",
    [
        ("masked", [[Guided.MASKED]] * 3),
        ("empty", [[Guided.EMPTY]] * 3),
        ("alternate", [[0], [2], [0]]),
        ("unidiffuser", [[0, 2]] * 3),
    ],
)
def test_extra_passes_of_each_kind_of_guidance(kind, codes):
    guided = table([900, 500, 100], guidance=kind, guidance_scale=2.0, guided_modalities=(0, 2)).guided
    assert guided.tolist() == codes
    unguided = table([900, 500, 100], guidance=kind, guided_modalities=(0, 2)).guided
    assert (unguided == Guided.OFF).all()


def test_known_values_enter_at_their_scheduled_noise_or_clean():
    schedule = NoiseSchedule("scaled_linear", N)
    times = [900, 500, 100]
    renoise = table(times, "scaled_linear", conditioning="renoise")
    np.testing.assert_allclose(column(renoise, "KNOWN_ALPHA"), schedule.alpha(times), rtol=1e-6)
    np.testing.assert_allclose(column(renoise, "KNOWN_SIGMA"), schedule.sigma(times), rtol=1e-6)
    assert renoise.indices[:, : Index.GUIDED].tolist() == [[t, t, t, draw, 1] for draw, t in enumerate((900, 500, 100))]
    clean = table(times, conditioning="clean")
    assert (column(clean, "KNOWN_ALPHA") == 1).all() and (column(clean, "KNOWN_SIGMA") == 0).all()
    assert clean.indices[:, : Index.GUIDED].tolist() == [[t, 0, N, 0, 1] for t in (900, 500, 100)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": "euler"}, "solver: 'euler'"),
        ({"prediction": "x0"}, "prediction: 'x0'"),
        ({"conditioning": "none"}, "conditioning: 'none'"),
        ({"guidance": "most"}, "guidance kind: 'most'"),
        ({"guidance_scale": float("nan")}, "guidance: nan"),
        ({"solver": "ddim", "eta": 1.5}, "eta: 1.5"),
        ({"solver": "ddpm", "eta": 0.5}, "eta: 0.5 .*only solver 'ddim'"),
        ({"resample": 0}, "resample: 0"),
        ({"jump": 0}, "jump: 0"),
        ({"resample": 2, "jump": 3}, "jump: 3 .*fewer than the 3 steps"),
        ({"guidance": "alternate", "guidance_scale": 2.0}, "guided_modalities"),
        ({"times": []}, "times"),
        ({"times": [100, 500]}, "times"),
        ({"times": [1001, 5]}, "times"),
        ({"times": [5, 0]}, "times"),
        ({"times": [5.5]}, "times"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        table(**{"times": [900, 500, 100], **options})


@pytest.mark.parametrize("name, timesteps, message", [("linear", N, "'linear'"), ("cosine", 1, "timesteps: 1")])
def test_unknown_schedules_are_refused(name, timesteps, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(name, timesteps)


def test_inner_blocks_run_at_every_kth_step_after_a_jump_back_and_when_the_passes_change():
    times = [800, 700, 600, 500, 400, 300, 200, 100]
    assert table(times).refresh.all()
    assert table(times, step_cache=3).refresh.tolist() == [True, False, False] * 2 + [True, False]
    late = table(times, step_cache=3, guidance_scale=2.0, guidance_interval=(0, 700)).refresh.tolist()
    assert late == [True, True, False, False, True, False, False, True]
    jumps = table(times[:4], step_cache=9, resample=2, jump=2)
    assert jumps.indices[:, Index.TIME].tolist() == [800, 700, 600, 500, 600, 500]
    assert jumps.refresh.tolist() == [True, False, False, False, True, False]
    turns = table(times, step_cache=3, guidance="alternate", guidance_scale=2.0, guided_modalities=(0, 1))
    assert turns.refresh.all()
    with pytest.raises(ValueError, match="^step_cache: 0 does not work; use 1 or more"):
        table(times, step_cache=0)
