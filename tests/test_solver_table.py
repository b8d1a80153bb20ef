"""Step tables: solvers against diffusers, RePaint, guidance, conditioning, and a path through time per modality."""

import numpy as np
import pytest
import torch
from denoisers import FunctionDenoiser, N, sample, table

from engine.config import Modality, ModelConfig
from engine.diffusion.schedule import NoiseSchedule, timesteps
from engine.diffusion.solver_table import GuidanceOptions, constant_since
from engine.errors import InputError
from engine.kernels.philox import STATE_STREAM, normals
from engine.kernels.step_table import NOOP_STEP, Coefficient, PassKind, StepColumn
from engine.request import SOLVERS, SPACINGS
from engine.sampling.batch import SampleSpec

BETAS = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
MODEL = ModelConfig((Modality("image", 32, 4, depth=0),), shared_depth=1, dim=64)
MASKED = PassKind.GUIDES | PassKind.DROPS_KNOWN
DROPPED = PassKind.DROPS_KNOWN | PassKind.DROPS_STATE


def column(table, name, modality=0):
    """[S], of coefficients or indices."""
    if name in Coefficient.__members__:
        return table.coefficients[:, modality, Coefficient[name]]
    return table.indices[:, modality, StepColumn[name]]


# --- The trajectories of diffusers' schedulers ---------------------------------------------------------------------


def denoiser_of(schedule, prediction):
    """Any bounded estimate of x̂0, in the form that the prediction type asks for."""
    ours = NoiseSchedule(schedule, N)

    def predict(x, times, outputs):
        t = times[:, :1].long().numpy()
        alpha, sigma = torch.from_numpy(ours.alpha(t)), torch.from_numpy(ours.sigma(t))
        x0 = torch.tanh(x.double() + 0.5 * x.double().roll(1, dims=1))
        epsilon = (x - alpha * x0) / sigma
        return (epsilon if prediction == "epsilon" else alpha * epsilon - sigma * x0).to(x.dtype)

    return predict


def our_trajectory(predict, table, seed):
    states = []

    def recording(x, times, outputs):
        states.append(x.clone())
        return predict(x, times, outputs)

    everything, nothing = torch.ones(MODEL.size, dtype=torch.bool), torch.zeros(MODEL.size)
    states.append(sample(FunctionDenoiser(recording), [SampleSpec(seed, table, everything, nothing)], MODEL))
    return torch.cat(states)


def scheduler_of(solver, schedule, prediction, times):
    """Diffusers' scheduler of these times, with ᾱ in float64."""
    import diffusers

    common = {"num_train_timesteps": N, "timestep_spacing": "trailing", **BETAS[schedule]}
    name, options = {
        "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
        "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
        "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        "unipc": ("UniPCMultistepScheduler", {"solver_type": "bh2"}),
    }[solver]
    scheduler = getattr(diffusers, name)(prediction_type=prediction, **common, **options)
    scheduler.set_timesteps(len(times))
    scheduler.timesteps = torch.tensor(times) - 1
    scheduler.alphas_cumprod = torch.from_numpy(NoiseSchedule(schedule, N).alpha_bar[1:])
    if solver == "ddim":
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    elif solver == "ddpm":
        scheduler.custom_timesteps, scheduler.one = True, scheduler.one.double()
    else:
        seen = scheduler.alphas_cumprod[scheduler.timesteps]
        scheduler.sigmas = torch.cat([(1 / seen - 1).sqrt(), torch.zeros(1, dtype=torch.float64)])
    return scheduler


def their_trajectory(predict, scheduler, seed, monkeypatch, options):
    def noise(draw):
        return normals(torch.tensor([seed]), torch.tensor([draw]), STATE_STREAM, MODEL.size)[0].double()

    x = noise(0)
    states = [x]
    for step, k in enumerate(scheduler.timesteps):
        z = noise(step + 1)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z)
        if "variance_noise" in options:
            options = {**options, "variance_noise": z}
        f = predict(x, torch.full((1, MODEL.tokens), int(k) + 1), ("image",))
        x = scheduler.step(f, k, x, **options).prev_sample
        states.append(x)
    return torch.cat(states)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize(
    "solver, steps, spacing, options",  # diffusers' DDIM is only right where the steps divide N
    [
        ("ddim", 8, "even", {"eta": 0.0}),
        ("ddim", 25, "even", {"eta": 0.0}),
        ("ddim", 25, "even", {"eta": 0.7, "variance_noise": None}),
        *((solver, 33, spacing, {}) for solver in ("ddpm", "dpm++", "unipc") for spacing in SPACINGS),
        *((solver, 8, spacing, {}) for solver in ("dpm++", "unipc") for spacing in SPACINGS),
        *(("sde-dpm++", steps, spacing, {"variance_noise": None}) for steps in (8, 33) for spacing in SPACINGS),
        ("unipc", 2, "even", {}),
        ("unipc", 3, "power", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers against NumPy 2
def test_solvers_reproduce_the_trajectories_of_diffusers(
    solver, steps, spacing, options, schedule, prediction, monkeypatch
):
    predict = denoiser_of(schedule, prediction)
    # At the cosine schedule's time N, x̂0 = (x − σ·ε) / α is 20,000 times float32's rounding off in any implementation.
    first = 1 if (schedule, prediction) == ("cosine", "epsilon") else 0
    times = timesteps(N, steps, spacing)[first:]
    ours = table(times, 1, "clean", schedule, prediction, solver=solver, eta=options.get("eta", 0.0))
    theirs = scheduler_of(solver, schedule, prediction, times)
    if solver == "ddim":
        theirs.num_inference_steps = steps  # their step's length, also where the first is left out
    expected = their_trajectory(predict, theirs, 11, monkeypatch, options)
    torch.testing.assert_close(our_trajectory(predict, ours, 11).double(), expected, atol=1e-5, rtol=1e-5)


# --- RePaint, guidance, conditioning -------------------------------------------------------------------------------


@pytest.mark.parametrize("resample, calls", [(1, 50), (2, 95), (5, 230), (10, 455)])
def test_resampling_calls_the_model_as_often_as_repaint_says(resample, calls):
    assert table(50, resample=resample, jump=5).steps == calls


def test_resampling_repeats_every_stretch_but_the_noisiest():
    times = column(table(4, solver="ddim", resample=2, jump=2), "TIME")
    assert times.tolist() == [1000, 750, 500, 250, 500, 250]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("repeats", [{"resample": 2, "jump": 3}, {"inner_steps": 2, "step_size": 0.3}], ids=str)
def test_every_step_keeps_the_marginal_of_the_time_it_leads_to(solver, repeats):
    """Where x̂0 is right, x_s = α_s·x0 + σ_s·ε; also after a jump mean and variance must be those of x_u."""
    schedule = NoiseSchedule("cosine", N)
    lines = table(10, solver=solver, **repeats)
    times = [*column(lines, "TIME"), 0]
    assert (np.diff(times) > 0).any() == ("resample" in repeats)
    for step, (t, u) in enumerate(zip(times, times[1:], strict=False)):
        a, b, c, d, e = (column(lines, name)[step].astype(float) for name in "ABCDE")
        np.testing.assert_allclose(a * schedule.alpha(t) + b + c + e, schedule.alpha(u), rtol=1e-5)
        np.testing.assert_allclose((a * schedule.sigma(t)) ** 2 + d**2, schedule.sigma(u) ** 2, rtol=1e-5, atol=1e-9)


def test_langevin_steps_stay_at_every_time_but_the_noisiest():
    lines = table([800, 500, 100], inner_steps=2, step_size=0.5, solver="unipc")
    assert column(lines, "TIME").tolist() == [800, 500, 500, 500, 100, 100, 100]
    np.testing.assert_allclose(column(lines, "A")[[1, 2, 4, 5]], np.exp(-0.5), rtol=1e-6)
    assert not column(lines, "C").any() and not column(lines, "E").any(), "x̂0 of another state is of no use"
    cached = table([800, 500, 100], inner_steps=2, step_cache=3)
    assert cached.refresh.tolist() == [True, False, False, True, False, False, True]


def test_ddpm_and_a_jump_back_of_one_step_are_a_langevin_step_of_twice_the_way():
    schedule = NoiseSchedule("cosine", N)
    repaint = table([800, 500, 100], solver="ddpm", resample=2, jump=1).coefficients[1, 0]
    assert column(table([800, 500, 100], solver="ddpm", resample=2, jump=1), "TIME").tolist()[1:3] == [500, 500]
    size = 2 * (schedule.half_log_snr(100) - schedule.half_log_snr(500))
    inner = table([800, 500, 100], solver="ddpm", inner_steps=1, step_size=size).coefficients[1, 0]
    np.testing.assert_allclose(repaint, inner, rtol=1e-5)


def test_dpm_solver_is_first_order_at_the_start_at_the_end_and_after_a_jump():
    lines = table(6, resample=2, jump=2)
    assert column(lines, "TIME").tolist() == [1000, 833, 667, 500, 667, 500, 333, 167, 333, 167]
    first_order = [True, False, False, False, True, False, False, True, True, True]
    assert (column(lines, "C") == 0).tolist() == first_order


def test_outside_the_guidance_interval_there_is_no_guidance_and_no_extra_pass():
    lines = table([900, 500, 100, 50], guidance=GuidanceOptions("masked", 4.0, interval=(100, 500)))
    assert column(lines, "W").tolist() == [1, 4, 4, 1]
    assert lines.kinds[:, :, 0].tolist() == [[PassKind.OFF] * 2, [MASKED] * 2, [MASKED] * 2, [PassKind.OFF] * 2]
    assert lines.passes.tolist() == [1, 2, 2, 1]


OF_0, OF_2 = ([MASKED, DROPPED, DROPPED], [DROPPED, DROPPED, MASKED])  # a pass that guides one of three modalities


@pytest.mark.parametrize(
    "kind, passes",
    [
        ("masked", [[[MASKED] * 3]] * 3),
        ("empty", [[[PassKind.GUIDES | PassKind.NULLS_KNOWN] * 3]] * 3),
        ("alternate", [[OF_0], [OF_2], [OF_0]]),
        ("unidiffuser", [[OF_0, OF_2]] * 3),
    ],
)
def test_extra_passes_of_each_kind_of_guidance(kind, passes):
    guided = table([900, 500, 100], 3, guidance=GuidanceOptions(kind, 2.0, modalities=(0, 2)))
    assert guided.kinds.transpose(0, 2, 1).tolist() == passes  # [S, P − 1, M]
    assert guided.passes.tolist() == [1 + len(several) for several in passes]
    unguided = table([900, 500, 100], 3, guidance=GuidanceOptions(kind, 1.0, modalities=(0, 2)))
    assert (unguided.kinds == PassKind.OFF).all() and (unguided.passes == 1).all()


@pytest.mark.parametrize("modalities", [1, 3])
def test_known_values_enter_at_their_scheduled_noise_or_clean(modalities):
    schedule, times = NoiseSchedule("scaled_linear", N), [900, 500, 100]
    renoise = table(times, modalities, "renoise", "scaled_linear")
    clean = table(times, modalities, "clean", "scaled_linear")
    assert renoise.indices.shape == clean.indices.shape == (3, modalities, StepColumn.PASS + 1)
    for m in range(modalities):
        np.testing.assert_allclose(column(renoise, "KNOWN_ALPHA", m), schedule.alpha(times), rtol=1e-6)
        np.testing.assert_allclose(column(renoise, "KNOWN_SIGMA", m), schedule.sigma(times), rtol=1e-6)
        assert (column(clean, "KNOWN_ALPHA", m) == 1).all() and (column(clean, "KNOWN_SIGMA", m) == 0).all()
        assert renoise.indices[:, m, : StepColumn.PASS].tolist() == [[t, t, t, n, 1] for n, t in enumerate(times)]
        assert clean.indices[:, m, : StepColumn.PASS].tolist() == [[t, 0, N, 0, 1] for t in times]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": "euler"}, "solver: 'euler' is not known"),
        ({"prediction": "x0"}, "prediction: 'x0'"),
        ({"conditioning": "none"}, "conditioning: 'none'"),
        ({"guidance": GuidanceOptions("most")}, "guidance_kind: 'most' is not known"),
        ({"guidance": GuidanceOptions(scale=float("nan"))}, "guidance: nan"),
        ({"solver": "ddim", "eta": 1.5}, "eta: 1.5"),
        ({"solver": "ddpm", "eta": 0.5}, "eta: 0.5 .*solver ddim"),
        ({"resample": 0}, "resample: 0"),
        ({"jump": 0}, "jump: 0"),
        ({"step_cache": 0}, "step_cache: 0 is out of range; use 1 or more"),
        ({"inner_steps": -1}, "inner_steps: -1 is out of range; use 0 or more"),
        ({"step_size": 0.0}, "step_size: 0.0 is out of range; use more than 0"),
        ({"inner_steps": 1, "resample": 2}, "resample: 2 .*use 1 with Langevin steps"),
        ({"resample": 2, "jump": 3}, "jump: 3 .*fewer than the 3 steps"),
        ({"guidance": GuidanceOptions("alternate", 2.0)}, "guided_modalities: "),
        ({"guidance": GuidanceOptions("alternate", 2.0, modalities=(0, 2))}, "guided_modalities: .*the 2 modalities"),
        ({"times": []}, "times: "),
        ({"times": [100, 500]}, "times: "),
        ({"times": [1001, 5]}, "times: "),
        ({"times": [5, 0]}, "times: "),
        ({"times": [5.5]}, "times: "),
        ({"order": ((0,), (0,))}, "order: "),
        ({"order": ((0, 2),)}, "order: .*the 2 modalities"),
        ({"order": ((0,), ())}, "order: "),
        ({"order": ((0,), (1,)), "conditioning": "renoise"}, "order: .*renoise"),
        ({"order": ((0,), (1,)), "guidance": GuidanceOptions("empty", 2.0)}, "guidance_kind: 'empty' .*masked"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_its_argument(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        table(**{"times": [900, 500, 100], **options})


def test_inner_blocks_run_at_every_kth_step_after_a_jump_back_and_when_the_passes_change():
    times = [800, 700, 600, 500, 400, 300, 200, 100]
    assert table(times).refresh.all()
    assert table(times, step_cache=3).refresh.tolist() == [True, False, False] * 2 + [True, False]
    late = table(times, step_cache=3, guidance=GuidanceOptions("masked", 2.0, interval=(0, 700)))
    assert late.refresh.tolist() == [True, True, False, False, True, False, False, True]
    jumps = table(times[:4], step_cache=9, resample=2, jump=2)
    assert column(jumps, "TIME").tolist() == [800, 700, 600, 500, 600, 500]
    assert jumps.refresh.tolist() == [True, False, False, False, True, False]
    turns = table(times, step_cache=3, guidance=GuidanceOptions("alternate", 2.0, modalities=(0, 1)))
    assert turns.refresh.all()


# --- Orders of modalities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_entry_of_an_order_takes_all_times_while_the_others_wait_or_have_arrived(solver):
    times = [900, 600, 300, 50]
    together = table(times, 3, solver=solver)
    lines = table(times, 3, solver=solver, order=((1,), (2, 0)))
    assert lines.steps == 8 and together.steps == 4
    for m, moves in ((1, slice(0, 4)), (0, slice(4, 8)), (2, slice(4, 8))):
        np.testing.assert_array_equal(lines.coefficients[moves, m], together.coefficients[:, m])
        rest = np.delete(lines.coefficients[:, m], moves, axis=0)
        np.testing.assert_array_equal(rest, np.tile(np.float32(NOOP_STEP), (4, 1)))
    assert [column(lines, "TIME", m).tolist() for m in range(3)] == [[N] * 4 + times, times + [0] * 4, [N] * 4 + times]
    assert lines.moving.tolist() == [[False, True, False]] * 4 + [[True, False, True]] * 4
    clean = lines.indices[:, :, StepColumn.KNOWN_TIME : StepColumn.REFRESH + 1]
    assert (clean == [0, N, 0, 1]).all()


def test_an_order_of_one_entry_is_the_table_of_all_together():
    for options in ({"guidance": GuidanceOptions("alternate", 2.0, modalities=(0, 1))}, {"conditioning": "renoise"}):
        one, together = table(5, order=((0, 1),), **options), table(5, **options)
        np.testing.assert_array_equal(one.coefficients, together.coefficients)
        np.testing.assert_array_equal(one.indices, together.indices)


def test_a_modality_outside_the_order_stays_as_it_is_and_is_dropped_where_it_is_known():
    lines = table([900, 400], 3, order=((2,), (0,)), guidance=GuidanceOptions("masked", 2.0))
    assert (lines.coefficients[:, 1] == np.float32(NOOP_STEP)).all()
    assert (column(lines, "TIME", 1) == N).all() and (lines.kinds[:, 1] == PassKind.DROPS_KNOWN).all()


def test_the_unconditional_pass_of_a_stage_drops_what_has_arrived_and_leaves_what_waits():
    lines = table([900, 400], 3, order=((1,), (2,), (0,)), guidance=GuidanceOptions("masked", 3.0))
    waits = PassKind.DROPS_KNOWN  # of a modality that waits, what is known all the same
    stages = [[waits, MASKED, waits], [waits, DROPPED, MASKED], [MASKED, DROPPED, DROPPED]]
    assert lines.kinds[:, :, 0].tolist() == [kinds for kinds in stages for _ in range(2)]
    w = [[1, 3, 1], [1, 1, 3], [3, 1, 1]]  # of the modality that moves
    assert lines.coefficients[:, :, Coefficient.W].tolist() == [scales for scales in w for _ in range(2)]


@pytest.mark.parametrize("first_stage", [0, 1, 2, 3])
def test_stages_before_the_first_guided_one_have_no_extra_pass(first_stage):
    lines = table(
        [900, 400], 3, order=((1,), (2,), (0,)), guidance=GuidanceOptions("masked", 3.0, None, (), first_stage)
    )
    guided = np.repeat(np.arange(3) >= first_stage, 2)
    np.testing.assert_array_equal(lines.passes, 1 + guided)
    np.testing.assert_array_equal(lines.coefficients[:, :, Coefficient.W].max(axis=1), np.where(guided, 3.0, 1.0))
    assert (lines.kinds[~guided] == PassKind.OFF).all() and (lines.kinds[guided] != PassKind.OFF).all()


def test_the_guidance_interval_holds_in_every_stage():
    guidance = GuidanceOptions("masked", 3.0, interval=(100, 500))
    assert table([900, 500, 50], order=((0,), (1,)), guidance=guidance).passes.tolist() == [1, 2, 1] * 2


def test_solvers_and_inner_blocks_start_anew_with_every_stage():
    lines = table([800, 600, 400, 200], order=((0,), (1,)), step_cache=3, resample=2, jump=3)
    assert column(lines, "TIME", 0).tolist()[:7] == column(lines, "TIME", 1).tolist()[7:]
    assert column(lines, "TIME", 0).tolist()[:7] == [800, 600, 400, 200, 600, 400, 200]
    assert lines.refresh.tolist() == [True, False, False, True, True, False, False] * 2
    assert column(lines, "C", 1)[7] == 0 != column(lines, "C", 1)[8], "there is no earlier x̂0 at a stage's first step"


# --- Steps at which a modality enters the model alike ---------------------------------------------------------------


def test_a_known_modality_enters_alike_as_long_as_it_is_clean_and_the_passes_stay():
    since = constant_since(table(4), 0, generated=False, known=True)
    assert since == (0, 0, 0, 0)
    late = table([900, 600, 400, 300], guidance=GuidanceOptions("masked", 2.0, interval=(0, 500)))
    assert constant_since(late, 0, False, True) == (0, 0, 2, 2)
    assert constant_since(table(4, conditioning="renoise"), 0, False, True) == (-1,) * 4
    turns = table(4, guidance=GuidanceOptions("alternate", 2.0, modalities=(0, 1)))
    assert constant_since(turns, 0, False, True) == (0,) * 4, "whichever is guided, what is known is dropped"


def test_a_modality_that_moves_never_enters_alike():
    for known in (False, True):
        assert constant_since(table(4), 0, generated=True, known=known) == (-1,) * 4


def test_a_modality_enters_alike_while_it_waits_and_from_its_arrival_on():
    lines = table(3, order=((1,), (0,)))
    assert constant_since(lines, 0, True, False) == (0, 0, 0, 0, -1, -1), "its first move starts from what waited"
    assert constant_since(lines, 1, True, False) == (-1, -1, -1, 3, 3, 3)
    assert constant_since(lines, 0, False, True) == (0,) * 6
    assert constant_since(lines, 0, True, True) == (0, 0, 0, 0, -1, -1)


def test_a_modality_enters_anew_when_an_extra_pass_starts_to_drop_it():
    lines = table(3, order=((1,), (0,)), guidance=GuidanceOptions("masked", 2.0))
    assert constant_since(lines, 1, True, False) == (-1, -1, -1, 3, 3, 3)
    assert constant_since(lines, 0, True, False) == (0, 0, 0, 0, -1, -1), "nothing of it is known that could be dropped"
    assert constant_since(lines, 0, True, True) == (0, 0, 0, 0, -1, -1), "what is known of it is dropped all along"
    late = table(3, order=((1,), (0,)), guidance=GuidanceOptions("masked", 2.0, first_stage=1))
    assert constant_since(late, 0, True, True) == (0, 0, 0, -1, -1, -1)
    interval = GuidanceOptions("masked", 2.0, interval=(0, 500), first_stage=1)
    lines = table([900, 600, 400, 300], order=((1,), (0,)), guidance=interval)
    assert constant_since(lines, 1, True, False) == (-1, -1, -1, -1, 4, 4, 6, 6), "what has arrived is dropped later on"
    fresh = table(4, conditioning="renoise", guidance=GuidanceOptions("masked", 2.0))
    assert constant_since(fresh, 0, False, True) == (-1,) * 4


def test_a_jump_back_moves_a_modality_and_leaves_those_that_rest():
    lines = table(4, order=((0,), (1,)), resample=2, jump=2)
    assert lines.steps == 12
    assert constant_since(lines, 1, True, False)[:7] == (0,) * 7
    assert constant_since(lines, 0, True, False) == (-1,) * 6 + (6,) * 6
