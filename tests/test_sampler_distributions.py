"""Whether samples have the distribution that they should, on Gaussians whose denoisers are known exactly."""

import numpy as np
import pytest
import torch
from denoisers import FunctionDenoiser, N, sample, table

from engine.config import Modality, ModelConfig
from engine.diffusion.masks import pack
from engine.diffusion.schedule import NoiseSchedule, timesteps
from engine.diffusion.solver_table import GuidanceOptions
from engine.kernels.step_table import Coefficient, StepColumn
from engine.sampling.batch import SampleSpec

COSINE = NoiseSchedule("cosine", N)
PAIRS = 4000


def model_of(**channels):
    """Token i of all modalities is one draw of a Gaussian, so one sample holds PAIRS independent draws."""
    modalities = tuple(Modality(name, PAIRS, several, depth=0) for name, several in channels.items())
    return ModelConfig(modalities, shared_depth=1, dim=64)


MODEL, THREE = model_of(image=2, text=1), model_of(image=2, text=1, sketch=1)
MEAN = torch.tensor([0.5, -1.0, 1.5, 0.3], dtype=torch.float64)  # without the last of a draw for MODEL
COVARIANCE = torch.tensor(
    [[1.0, 0.3, 0.6, 0.2], [0.3, 0.5, -0.2, 0.3], [0.6, -0.2, 0.8, 0.1], [0.2, 0.3, 0.1, 0.9]], dtype=torch.float64
)


def joined(packed, model=MODEL):
    """[R, N] to the draws [R, PAIRS, channels of all modalities]."""
    parts = [packed[:, model.state_slices[m.name]].unflatten(1, (PAIRS, m.channels)) for m in model.modalities]
    return torch.cat(parts, dim=-1)


def packed(draws, model=MODEL):
    """The inverse of `joined`."""
    return torch.cat([part.flatten(-2) for part in draws.split([m.channels for m in model.modalities], -1)], dim=-1)


def alpha_sigma(times, model=MODEL):
    """α and σ of each row's modalities, [R, 1, channels of a draw]; each modality must have one time."""
    channels = torch.tensor([m.channels for m in model.modalities])
    t = times.unflatten(1, (-1, PAIRS))  # [R, M, PAIRS]
    assert (t == t[:, :, :1]).all()
    t = t[:, :, 0].repeat_interleave(channels, 1)[:, None].long().numpy()
    return torch.from_numpy(COSINE.alpha(t)), torch.from_numpy(COSINE.sigma(t))


def gaussian_denoiser(model=MODEL, prediction="v_prediction"):
    """The exact E[x0 | x] of that Gaussian where every modality has its own time: x = A·x0 + S·ε, A and S diagonal,
    E[x0 | x] = μ + ΣA(AΣA + S²)⁻¹(x − Aμ). A modality at time 0 is a condition, one at time N carries nothing."""
    size = sum(m.channels for m in model.modalities)
    mean, covariance = MEAN[:size], COVARIANCE[:size, :size]

    def predict(inputs, times, outputs):
        alpha, sigma = alpha_sigma(times, model)  # [R, 1, channels]
        x = joined(inputs, model).double()  # [R, PAIRS, channels]
        prior = covariance * alpha  # ΣA
        seen = alpha.mT * prior + torch.diag_embed(sigma[:, 0] ** 2)
        x0 = mean + (x - alpha * mean) @ torch.linalg.solve(seen, prior.mT)
        epsilon = (x - alpha * x0) / sigma.clamp(min=1e-9)
        return packed(epsilon if prediction == "epsilon" else alpha * epsilon - sigma * x0, model).float()

    return FunctionDenoiser(predict)


def mask(model=MODEL, **generate):
    return pack({m.name: torch.full((PAIRS, m.channels), generate[m.name]) for m in model.modalities}, model)


JOINT, TEXT_TO_IMAGE = mask(image=True, text=True), mask(image=True, text=False)


def draws_of(generate, known, times, seed=1, denoiser=None, model=MODEL, **options):
    """The draws [PAIRS, channels] of one sample."""
    denoiser = denoiser or gaussian_denoiser(model, options.get("prediction", "v_prediction"))
    lines = table(times, len(model.modalities), **options)
    return joined(sample(denoiser, [SampleSpec(seed, lines, generate, known)], model), model)[0].double()


def true_draws(seed=0, size=3):
    noise = torch.randn(PAIRS, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MEAN[:size] + noise @ torch.linalg.cholesky(COVARIANCE[:size, :size]).T


# --- Distributions -------------------------------------------------------------------------------------------------


def assert_distributed(draws, mean, covariance):
    assert (draws.mean(0) - mean).abs().max() < 0.06
    assert (draws.T.cov() - covariance).abs().max() < 0.07


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "ddim"},
        {"solver": "ddim", "eta": 1.0, "prediction": "epsilon"},
        {"solver": "ddpm"},
        {"solver": "dpm++"},
        {"solver": "unipc"},
        {"solver": "sde-dpm++"},
        {"solver": "ddpm", "inner_steps": 1, "step_size": 0.05},  # larger ones narrow the distribution
        {"solver": "ddpm", "resample": 2, "jump": 5},
        {"solver": "dpm++", "resample": 2, "jump": 10},
    ],
)
def test_joint_samples_have_the_mean_and_covariance_of_the_data(options):
    assert_distributed(draws_of(JOINT, torch.zeros(MODEL.size), 100, **options), MEAN[:3], COVARIANCE[:3, :3])


@pytest.mark.parametrize("order", [((1,), (0,)), ((0,), (1,))], ids=["text first", "image first"])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "ddim", "times": 50},
        {"solver": "ddpm", "times": 100},
        {"solver": "dpm++", "times": 30},
        {"solver": "unipc", "times": 20},
        {"solver": "dpm++", "times": 40, "resample": 2, "jump": 10},
    ],
)
def test_both_orders_give_the_joint_mean_and_covariance(options, order):
    draws = draws_of(JOINT, torch.zeros(MODEL.size), order=order, **options)
    assert_distributed(draws, MEAN[:3], COVARIANCE[:3, :3])


@pytest.mark.parametrize("order", [((1,), (2,), (0,)), ((0, 2), (1,)), ((2,), (0, 1))], ids=str)
def test_orders_of_three_modalities_give_the_joint_mean_and_covariance(order):
    everything = torch.ones(THREE.size, dtype=torch.bool)
    draws = draws_of(everything, torch.zeros(THREE.size), 30, model=THREE, solver="dpm++", order=order)
    assert_distributed(draws, MEAN, COVARIANCE)


@pytest.mark.parametrize("order", [((2,), (0,)), ((0,), (2,)), ((0, 2),)], ids=str)
def test_what_is_known_conditions_every_stage_of_an_order(order):
    """Image and sketch given the text, in either order and together, have the conditional distribution."""
    known, others = true_draws(size=4), [0, 1, 3]
    generate = mask(THREE, image=True, text=False, sketch=True)
    draws = draws_of(generate, packed(known, THREE).float(), 30, model=THREE, solver="dpm++", order=order)
    slope = COVARIANCE[others, 2] / COVARIANCE[2, 2]
    found, mean, residual = conditional_fit(draws[:, others], known[:, 2])
    assert (found - slope).abs().max() < 0.05
    assert (mean - MEAN[others]).abs().max() < 0.06
    assert (residual - (COVARIANCE[others][:, others] - slope[:, None] * COVARIANCE[2, others])).abs().max() < 0.06


def conditional_fit(draws, known):
    """Slope [c], mean [c] and residual covariance [c, c] of the generated draws given the known values."""
    x, y = known - known.mean(), draws - draws.mean(0)
    slope = (x[:, None] * y).sum(0) / (x**2).sum()
    return slope, draws.mean(0), (y - x[:, None] * slope).T.cov()


SLOPE = COVARIANCE[:2, 2] / COVARIANCE[2, 2]
RESIDUAL = COVARIANCE[:2, :2] - SLOPE[:, None] * COVARIANCE[2, :2]


def infilled(**options):
    known = true_draws()
    draws = draws_of(TEXT_TO_IMAGE, packed(known).float(), **options)
    assert torch.equal(draws[:, 2].float(), known[:, 2].float())
    return conditional_fit(draws[:, :2], known[:, 2])


def test_clean_conditioning_gives_the_conditional_distribution():
    slope, mean, residual = infilled(times=50, solver="ddim", conditioning="clean")
    assert (slope - SLOPE).abs().max() < 0.05
    assert (mean - MEAN[:2]).abs().max() < 0.06
    assert (residual - RESIDUAL).abs().max() < 0.05


def exact_infilling(lines):
    """Slope and residual covariance to which a renoised table leads: with exact denoising every step is linear in the
    state and in the known part's noisy value α·y + σ·ξ, so the distribution can be followed without sampling."""
    slope, residual = np.zeros(2), np.eye(2)
    coefficients, times = lines.coefficients[:, 0].astype(float), lines.indices[:, 0, StepColumn.TIME]
    for line, t in zip(coefficients, times, strict=True):
        alpha, sigma = COSINE.alpha(t), COSINE.sigma(t)
        prior = COVARIANCE[:3, :3].numpy() * alpha
        gain = np.linalg.solve(alpha * prior + sigma**2 * np.eye(3), prior).T  # x̂0 = μ + gain·(x − α·μ)
        a, b, c, d = line[Coefficient.A : Coefficient.D + 1]
        assert c == 0  # a one-step solver
        step, seen = a * np.eye(2) + b * gain[:2, :2], b * gain[:2, 2]
        slope = step @ slope + alpha * seen
        residual = step @ residual @ step.T + sigma**2 * np.outer(seen, seen) + d**2 * np.eye(2)
    return torch.from_numpy(slope), torch.from_numpy(residual)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_renoised_infilling_with_resampling_converges_to_the_conditional_distribution(solver):
    """The known part's noise is fresh at every step, so one sweep half forgets what it saw, however many steps it has;
    repeating makes it right, in the limit of small steps and many repetitions."""
    errors = []
    for steps, resample in ((400, 1), (40, 10), (100, 20), (400, 40)):
        lines = table(steps, conditioning="renoise", solver=solver, resample=resample, jump=5)
        slope, residual = exact_infilling(lines)
        errors.append(max((slope - SLOPE).abs().max(), (residual - RESIDUAL).abs().max()).item())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.2 and errors[-1] < 0.04, errors


@pytest.mark.parametrize("resample", [1, 6])
def test_renoised_infilling_samples_the_distribution_that_its_table_leads_to(resample):
    options = {"times": 40, "solver": "ddpm", "conditioning": "renoise", "resample": resample, "jump": 5}
    slope, mean, residual = infilled(**options)
    exact_slope, exact_residual = exact_infilling(table(**options))
    assert (slope - exact_slope).abs().max() < 0.05
    assert (mean - MEAN[:2]).abs().max() < 0.06
    assert (residual - exact_residual).abs().max() < 0.05


# --- Guidance: data N(shift, 1) given the condition, N(0, 1) without it, whose guided samples are N(w·shift, 1) -----


def shifted(inputs, times, outputs):
    """Each modality is shifted by 1 if it sees the other (its tokens are not at time N)."""
    image, text = times[:, :PAIRS, None] == N, times[:, PAIRS:, None] == N
    shift = (~torch.cat([text, text, image], dim=-1)).double()
    alpha, sigma = alpha_sigma(times)
    x = joined(inputs).double()
    x0 = shift + alpha * (x - alpha * shift)
    return packed(alpha * (x - alpha * x0) / sigma.clamp(min=1e-9) - sigma * x0).float()


BELOW_N = [N - 1, *timesteps(N, 50)[1:]]  # at time N itself nobody sees anything


def guided(generate, kind, scale, first_stage=0, **options):
    known, modalities = torch.full((MODEL.size,), 7.0), () if kind == "masked" else (0, 1)
    guidance = GuidanceOptions(kind, scale, None, modalities, first_stage)
    options |= {"denoiser": FunctionDenoiser(shifted), "solver": "ddim", "guidance": guidance}
    return draws_of(generate, known, BELOW_N, **options)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_masked_guidance_moves_the_mean_as_its_scale_says(w):
    draws = guided(TEXT_TO_IMAGE, "masked", w)
    assert (draws[:, :2].mean(0) - w).abs().max() < 0.1
    assert (draws[:, :2].T.cov() - torch.eye(2)).abs().max() < 0.1


@pytest.mark.parametrize("w", [0.0, 2.5])
@pytest.mark.parametrize("first_stage", [0, 1])
@pytest.mark.parametrize("later", [0, 1], ids=["text first", "image first"])
def test_masked_guidance_of_a_later_stage_drops_the_earlier_modality(later, first_stage, w):
    """The earlier one saw nothing and is N(0, 1), guided or not; the later one is N(w, 1)."""
    draws = guided(JOINT, "masked", w, first_stage, order=((1 - later,), (later,)))
    expected = torch.tensor([w, w, 0.0] if later == 0 else [0.0, 0.0, w], dtype=torch.float64)
    assert (draws.mean(0) - expected).abs().max() < 0.1
    assert (draws.T.cov() - torch.eye(3)).abs().max() < 0.1


def test_unidiffuser_guidance_of_joint_samples_guides_every_modality():
    draws = guided(JOINT, "unidiffuser", 3.0)
    assert (draws.mean(0) - 3).abs().max() < 0.1


def test_alternate_guidance_guides_the_modalities_in_turn():
    draws = guided(JOINT, "alternate", 3.0)
    lines = table(BELOW_N, solver="ddim").coefficients[:, 0].astype(float)
    means = np.zeros(2)
    for step, line in enumerate(lines):  # the mean of x̂0 is shift + α·(mean − α·shift), here with the guided shift
        shift = np.where(np.arange(2) == step % 2, 3.0, 1.0)
        alpha = COSINE.alpha(BELOW_N[step])
        x0 = shift + alpha * (means - alpha * shift)
        means = line[Coefficient.A] * means + line[Coefficient.B] * x0
    assert abs(means - 2).max() < 0.3  # half the steps at 3, half at 1
    assert (draws.mean(0) - torch.tensor(means[[0, 0, 1]])).abs().max() < 0.07


def test_empty_guidance_contrasts_with_the_null_values():
    """x̂0 is the known value, whatever it is: guidance must give null + w·(known − null)."""

    def echo(inputs, times, outputs):
        value = inputs[:, 2 * PAIRS :]
        t = times[:, :1].long().numpy()
        x0 = torch.cat([value, value, value], dim=-1)
        alpha, sigma = (torch.from_numpy(f(t)).float() for f in (COSINE.alpha, COSINE.sigma))
        return (alpha * inputs - x0) / sigma  # v, from x and x̂0

    lines = table(5, solver="ddim", guidance=GuidanceOptions("empty", 3.0))
    known, null = torch.full((MODEL.size,), 2.0), torch.full((MODEL.size,), 0.5)
    draws = joined(sample(FunctionDenoiser(echo), [SampleSpec(2, lines, TEXT_TO_IMAGE, known, null)], MODEL))[0]
    torch.testing.assert_close(draws[:, :2], torch.full((PAIRS, 2), 0.5 + 3 * 1.5), atol=1e-3, rtol=1e-3)
