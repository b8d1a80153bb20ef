import numpy as np
import pytest
import torch

from engine.config import Modality, ModelConfig
from engine.kernels.cfg_step import Coefficient
from engine.masks import pack
from engine.sampler import Row, sample
from engine.schedule import NoiseSchedule, solver_table, timesteps

N = 1000
COSINE = NoiseSchedule("cosine", N)
PAIRS = 4000
# Token i of "image" (2 channels) and token i of "text" (1 channel) are one draw of a 3-dimensional Gaussian, so one row
# holds PAIRS independent draws.
MODEL = ModelConfig((Modality("image", PAIRS, 2, depth=0), Modality("text", PAIRS, 1, depth=0)), shared_depth=1, dim=64)
MEAN = torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.3, 0.6], [0.3, 0.5, -0.2], [0.6, -0.2, 0.8]], dtype=torch.float64)


def table(times, conditioning="clean", prediction="v_prediction", **options):
    return solver_table(COSINE, times, prediction=prediction, conditioning=conditioning, **options)


def joined(packed):
    """[R, N] to the draws [R, PAIRS, 3]."""
    return torch.cat([packed[:, : 2 * PAIRS].view(-1, PAIRS, 2), packed[:, 2 * PAIRS :, None]], dim=-1)


def packed(draws):
    return torch.cat([draws[..., :2].flatten(-2), draws[..., 2]], dim=-1)


def alpha_sigma(times):
    """α and σ of each pass's two modalities, [R, 1, 3] over a draw's channels; each modality must have one time."""
    t = times[:, [0, 0, PAIRS]]
    assert (times[:, :PAIRS] == t[:, :1]).all() and (times[:, PAIRS:] == t[:, 2:]).all()
    t = t[:, None].long().numpy()
    return torch.from_numpy(COSINE.alpha(t)), torch.from_numpy(COSINE.sigma(t))


def gaussian_denoiser(prediction="v_prediction"):
    """The exact E[x0 | x] of that Gaussian where every modality has its own time: x = A·x0 + S·ε, A and S diagonal,
    E[x0 | x] = μ + ΣA(AΣA + S²)⁻¹(x − Aμ). A modality at time 0 is a condition, one at time N carries nothing."""

    def denoiser(inputs, times, outputs):
        alpha, sigma = alpha_sigma(times)  # [R, 1, 3]
        x = joined(inputs).double()  # [R, PAIRS, 3]
        prior = COVARIANCE * alpha  # ΣA
        seen = alpha.mT * prior + torch.diag_embed(sigma[:, 0] ** 2)
        x0 = MEAN + (x - alpha * MEAN) @ torch.linalg.solve(seen, prior.mT)
        epsilon = (x - alpha * x0) / sigma.clamp(min=1e-9)
        return packed(epsilon if prediction == "epsilon" else alpha * epsilon - sigma * x0).float()

    return denoiser


def mask(image, text):
    image, text = torch.tensor(image).expand(PAIRS, 2), torch.tensor(text).expand(PAIRS, 1)
    return pack({"image": image, "text": text}, MODEL)


JOINT, TEXT_TO_IMAGE = mask([True, True], [True]), mask([True, True], [False])


def draws_of(generate, known, seed=1, denoiser=None, **options):
    denoiser = denoiser or gaussian_denoiser(options.get("prediction", "v_prediction"))
    return joined(sample(denoiser, [Row(seed, table(**options), generate, known)], MODEL))[0].double()


def true_draws(seed=0):
    noise = torch.randn(PAIRS, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MEAN + noise @ torch.linalg.cholesky(COVARIANCE).T


# --- Distributions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "ddim"},
        {"solver": "ddim", "eta": 1.0, "prediction": "epsilon"},
        {"solver": "ddpm"},
        {"solver": "dpm++"},
        {"solver": "ddpm", "resample": 2, "jump": 5},
        {"solver": "dpm++", "resample": 2, "jump": 10},
    ],
)
def test_joint_samples_have_the_mean_and_covariance_of_the_data(options):
    draws = draws_of(JOINT, torch.zeros(MODEL.size), times=timesteps(N, 100), **options)
    assert (draws.mean(0) - MEAN).abs().max() < 0.06
    assert (draws.T.cov() - COVARIANCE).abs().max() < 0.07


def conditional_fit(draws, known):
    """Slope [2], mean [2] and residual covariance [2, 2] of the generated image given the known text."""
    x, y = known - known.mean(), draws[:, :2] - draws[:, :2].mean(0)
    slope = (x[:, None] * y).sum(0) / (x**2).sum()
    return slope, draws[:, :2].mean(0), (y - x[:, None] * slope).T.cov()


SLOPE = COVARIANCE[:2, 2] / COVARIANCE[2, 2]
RESIDUAL = COVARIANCE[:2, :2] - SLOPE[:, None] * COVARIANCE[2, :2]


def infilled(**options):
    known = true_draws()
    values = packed(known).float()
    draws = draws_of(TEXT_TO_IMAGE, values, **options)
    assert torch.equal(draws[:, 2].float(), known[:, 2].float())
    return conditional_fit(draws, known[:, 2])


def test_clean_conditioning_gives_the_conditional_distribution():
    slope, mean, residual = infilled(times=timesteps(N, 50), solver="ddim", conditioning="clean")
    assert (slope - SLOPE).abs().max() < 0.05
    assert (mean - MEAN[:2]).abs().max() < 0.06
    assert (residual - RESIDUAL).abs().max() < 0.05


def exact_infilling(lines):
    """Slope and residual covariance to which a renoised table leads: with exact denoising every step is linear in the
    state and in the known part's noisy value α·y + σ·ξ, so the distribution can be followed without sampling."""
    slope, residual = np.zeros(2), np.eye(2)
    for line, (t, *_) in zip(lines.coefficients.astype(float), lines.indices, strict=True):
        alpha, sigma = COSINE.alpha(t), COSINE.sigma(t)
        prior = COVARIANCE.numpy() * alpha
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
        lines = table(timesteps(N, steps), "renoise", solver=solver, resample=resample, jump=5)
        slope, residual = exact_infilling(lines)
        errors.append(max((slope - SLOPE).abs().max(), (residual - RESIDUAL).abs().max()).item())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.2 and errors[-1] < 0.04, errors


@pytest.mark.parametrize("resample", [1, 6])
def test_renoised_infilling_samples_the_distribution_that_its_table_leads_to(resample):
    options = {"times": timesteps(N, 40), "solver": "ddpm", "conditioning": "renoise", "resample": resample, "jump": 5}
    slope, mean, residual = infilled(**options)
    exact_slope, exact_residual = exact_infilling(table(**options))
    assert (slope - exact_slope).abs().max() < 0.05
    assert (mean - MEAN[:2]).abs().max() < 0.06
    assert (residual - exact_residual).abs().max() < 0.05


# --- Guidance: data N(shift, 1) given the condition, N(0, 1) without it, whose guided samples are N(w·shift, 1) -----


def shifted_denoiser(inputs, times, outputs):
    """Each modality is shifted by 1 if it sees the other (its tokens are not at time N)."""
    image, text = times[:, :PAIRS, None] == N, times[:, PAIRS:, None] == N
    shift = (~torch.cat([text, text, image], dim=-1)).double()
    alpha, sigma = alpha_sigma(times)
    x = joined(inputs).double()
    x0 = shift + alpha * (x - alpha * shift)
    return packed(alpha * (x - alpha * x0) / sigma.clamp(min=1e-9) - sigma * x0).float()


BELOW_N = [N - 1, *timesteps(N, 50)[1:]]  # at time N itself nobody sees anything


def guided(generate, **options):
    known = torch.full((MODEL.size,), 7.0)
    return draws_of(generate, known, denoiser=shifted_denoiser, times=BELOW_N, solver="ddim", **options)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_masked_guidance_moves_the_mean_as_its_scale_says(w):
    draws = guided(TEXT_TO_IMAGE, guidance_scale=w)
    assert (draws[:, :2].mean(0) - w).abs().max() < 0.1
    assert (draws[:, :2].T.cov() - torch.eye(2)).abs().max() < 0.1


def test_unidiffuser_guidance_of_joint_samples_guides_every_modality():
    draws = guided(JOINT, guidance="unidiffuser", guidance_scale=3.0, guided_modalities=(0, 1))
    assert (draws.mean(0) - 3).abs().max() < 0.1


def test_alternate_guidance_guides_the_modalities_in_turn():
    draws = guided(JOINT, guidance="alternate", guidance_scale=3.0, guided_modalities=(0, 1))
    lines = table(BELOW_N, solver="ddim").coefficients.astype(float)
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

    lines = table(timesteps(N, 5), solver="ddim", guidance="empty", guidance_scale=3.0)
    row = Row(2, lines, TEXT_TO_IMAGE, torch.full((MODEL.size,), 2.0), null=torch.full((MODEL.size,), 0.5))
    draws = joined(sample(echo, [row], MODEL))[0]
    torch.testing.assert_close(draws[:, :2], torch.full((PAIRS, 2), 0.5 + 3 * 1.5), atol=1e-3, rtol=1e-3)
