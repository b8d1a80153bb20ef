"""The coefficients of one step from time t to s, in float64:

    x̂0 = p·x + q·f
    x  ← a·x + b·x̂0 + c·x̂0_prev + d·z + e·x̂0_prev2

x̂0_prev and x̂0_prev2 are the estimates of one and two steps before, z ~ N(0, 1), λ = log(α / σ) and h = λ_s − λ_t.
"""

import numpy as np

from engine.diffusion.schedule import NoiseSchedule

Update = tuple[float, float, float, float, float]  # a, b, c, d, e


def clean_estimate(schedule: NoiseSchedule, prediction: str, t: int) -> tuple[float, float]:
    """(p, q) of x̂0 = p·x + q·f. v-prediction: v = α·ε − σ·x0 (Salimans & Ho 2022, arXiv 2202.00512)."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return (1 / alpha, -sigma / alpha) if prediction == "epsilon" else (alpha, -sigma)


def update(schedule: NoiseSchedule, solver: str, eta: float, earlier: tuple[int, ...], t: int, s: int) -> Update:
    """The step from t to s < t.

    earlier  the times of x̂0_prev and x̂0_prev2, as far as there are any
    """
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    ratio = schedule.alpha_bar[t] / schedule.alpha_bar[s]
    posterior = sigma_s / sigma_t * np.sqrt(1 - ratio)  # standard deviation of q(x_s | x_t, x0); 0 for s = 0

    if solver == "ddim":  # Song et al. 2021 (arXiv 2010.02502), eq. 12, with ε = (x − α_t·x̂0) / σ_t
        d = eta * posterior
        a = np.sqrt(sigma_s**2 - d**2) / sigma_t
        return a, alpha_s - a * alpha_t, 0.0, d, 0.0
    if solver == "ddpm":  # Ho et al. 2020 (arXiv 2006.11239), eq. 7, fixed small variance
        return np.sqrt(ratio) * sigma_s**2 / sigma_t**2, alpha_s * (1 - ratio) / sigma_t**2, 0.0, posterior, 0.0
    if s == 0:  # λ is infinite there: the other solvers take a step of first order, which ends in x̂0
        return 0.0, 1.0, 0.0, 0.0, 0.0
    if solver == "unipc":
        return _unipc(schedule, earlier, t, s)

    # DPM-Solver++(2M) and SDE-DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2 and eq. 19
    assert solver in ("dpm++", "sde-dpm++"), solver
    h = schedule.half_log_snr(s) - schedule.half_log_snr(t)
    a, b, d = sigma_s / sigma_t, -alpha_s * np.expm1(-h), 0.0
    if solver == "sde-dpm++":
        a, b, d = a * np.exp(-h), -alpha_s * np.expm1(-2 * h), sigma_s * np.sqrt(-np.expm1(-2 * h))
    if not earlier:
        return a, b, 0.0, d, 0.0
    r = (schedule.half_log_snr(t) - schedule.half_log_snr(earlier[0])) / h
    return a, b * (1 + 1 / (2 * r)), -b / (2 * r), d, 0.0


def _unipc(schedule: NoiseSchedule, earlier: tuple[int, ...], t: int, s: int) -> Update:
    """UniPC-2 with x̂0 prediction, Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 and 6; diffusers' "bh2".

    The state x is the predicted one. It and the corrected one start from the same state before, so their difference is
    that of the last three x̂0: corrected − x = α_t·B·(ρ·(x̂0 − x̂0_prev) + κ·(x̂0_prev2 − x̂0_prev)). The predictor is
    linear in the corrected state, so both make one update.
    """
    lambda_t = schedule.half_log_snr(t)
    h = schedule.half_log_snr(s) - lambda_t
    a, b = schedule.sigma(s) / schedule.sigma(t), -schedule.alpha(s) * np.expm1(-h)
    if not earlier:
        return a, b, 0.0, 0.0, 0.0
    h_prev = lambda_t - schedule.half_log_snr(earlier[0])
    c = -b * h / (2 * h_prev)
    B = -np.expm1(-h_prev)  # B(h) = 1 − e^−h, of the step before
    rho, kappa = 0.5, 0.0  # where the step before was the first
    if len(earlier) == 2:
        # ρ_0 + ρ = b_1 and r·ρ_0 + ρ = b_2; the predictor has ½ in place of ρ_0, and no ρ
        r = (schedule.half_log_snr(earlier[1]) - schedule.half_log_snr(earlier[0])) / h_prev
        b_1 = 1 / B - 1 / h_prev
        b_2 = 1 / B - 2 * b_1 / h_prev
        rho_0 = (b_1 - b_2) / (1 - r)
        rho, kappa = b_1 - rho_0, (rho_0 - 0.5) / r
    w = a * schedule.alpha(t) * B
    return a, b - c + w * rho, c - w * (rho + kappa), 0.0, w * kappa


def langevin(schedule: NoiseSchedule, step_size: float, t: int) -> Update:
    """A step of Langevin dynamics at time t, whose score is (α_t·x̂0 − x) / σ_t²; its step size is in units of σ_t².

    Exact for a constant x̂0 (Ornstein–Uhlenbeck), so that no step size diverges. x̂0 does change with x, so large steps
    settle on a distribution that is too narrow: for data of variance v, where λ = 0, a step of size h on
    σ²·(1 − e^−2h) / (1 − m²) with m = e^−h + (1 − e^−h)·v/(v + 1), which is v·α² + σ² only for h → 0. DDPM's step to s
    followed by RePaint's jump back to t is the step of size 2·(λ_s − λ_t).
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return np.exp(-step_size), -np.expm1(-step_size) * alpha, 0.0, sigma * np.sqrt(-np.expm1(-2 * step_size)), 0.0
