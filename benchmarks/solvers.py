"""Solvers and spacings of times against exact samples, on a mixture of Gaussians whose denoiser is known exactly.

    ode     deterministic solvers: root mean square distance to the samples of 1000 steps from the same noise
    sde     stochastic solvers: energy distance to the data
    infill  the image given the text, renoised: energy distance to the true conditional distribution, at equal calls

    python -m benchmarks.solvers ode

All use the engine's step tables and `cfg_step`, and take minutes. Energy distances (Székely & Rizzo 2013) are 2·E|X −
Y| − E|X − X′| − E|Y − Y′|, without bias; the data have a standard deviation of about 1 in each channel.
"""

import argparse
import statistics
from itertools import product

import torch
from torch import Tensor

from engine.config import SCHEDULES, DiffusionConfig, Modality, ModelConfig
from engine.diffusion.schedule import NoiseSchedule
from engine.diffusion.solver_table import GuidanceOptions, SolverOptions, spaced_table
from engine.kernels.cfg_step import cfg_step
from engine.request import SPACINGS
from engine.sampling.batch import Batch, SampleSpec, batch_constants

N, DRAWS, CHANNELS, WIDTH = 1000, 2000, 3, 0.25  # times; draws of one sample; of each modality; of each Gaussian
# Token i of image and text together is one draw, so one sample holds `DRAWS` independent ones.
MODEL = ModelConfig(tuple(Modality(name, DRAWS, CHANNELS, 0) for name in ("image", "text")), shared_depth=1, dim=64)
CONDITIONS = 10  # texts of which images are made


def means() -> Tensor:
    """Of 8 Gaussians, [8, image and text channels] float64; two each have the same text."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(8, CHANNELS, generator=draw, dtype=torch.float64)
    text = torch.randn(4, CHANNELS, generator=draw, dtype=torch.float64).repeat(2, 1)
    return torch.cat([image, text], dim=1)


def data(count: int, seed: int) -> Tensor:
    """[count, image and text channels]"""
    draw = torch.Generator().manual_seed(seed)
    centres = means()[torch.randint(8, (count,), generator=draw)]
    return centres + WIDTH * torch.randn(centres.shape, generator=draw, dtype=torch.float64)


def conditional(text: Tensor, count: int, seed: int) -> Tensor:
    """Images [count, channels] given one text [channels]."""
    draw, mu = torch.Generator().manual_seed(seed), means()
    weights = torch.softmax(-((text - mu[:, CHANNELS:]) ** 2).sum(1) / (2 * WIDTH**2), dim=0)
    centres = mu[torch.multinomial(weights, count, replacement=True, generator=draw), :CHANNELS]
    return centres + WIDTH * torch.randn(centres.shape, generator=draw, dtype=torch.float64)


def denoise(inputs: Tensor, times: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The exact v-prediction [1, N] of a state [1, N] at its tokens' times [1, L]."""
    x = inputs.double().view(2, DRAWS, CHANNELS).transpose(0, 1).flatten(1)  # [DRAWS, channels of both]
    t = times.view(2, DRAWS).T.repeat_interleave(CHANNELS, dim=1).long().numpy()
    alpha, sigma = torch.from_numpy(schedule.alpha(t)), torch.from_numpy(schedule.sigma(t))
    mu, variance = means(), alpha**2 * WIDTH**2 + sigma**2  # of the noisy Gaussians
    off = x[:, None] - alpha[:, None] * mu  # [DRAWS, 8, channels]
    weights = torch.softmax(-(off**2 / variance[:, None]).sum(-1) / 2, dim=1)[..., None]
    x0 = (weights * (mu + (alpha * WIDTH**2 / variance)[:, None] * off)).sum(1)
    v = (alpha * x - x0) / sigma.clamp(min=1e-9)  # = α·ε − σ·x0
    return v.view(DRAWS, 2, CHANNELS).transpose(0, 1).reshape(1, -1)


def sampled(
    schedule: str,
    conditioning: str,
    steps: int,
    spacing: str,
    solver: SolverOptions,
    seed: int = 0,
    text: Tensor | None = None,  # [DRAWS, channels], known
) -> Tensor:
    """[DRAWS, channels of both]"""
    sampling = "masked" if conditioning == "clean" else "shared"
    diffusion = DiffusionConfig(schedule, N, "v_prediction", conditioning, sampling)
    table = spaced_table(diffusion, steps, 2, solver, GuidanceOptions(), spacing)
    known, generate = torch.zeros(MODEL.size), torch.ones(MODEL.size, dtype=torch.bool)
    if text is not None:
        generate[MODEL.size // 2 :] = False
        known[MODEL.size // 2 :] = text.float().flatten()
    batch = Batch(batch_constants([SampleSpec(seed, table, generate, known)], MODEL, "cpu"))
    noise = NoiseSchedule(schedule, N)
    for _ in range(table.steps):
        cfg_step(denoise(batch.state.inputs[:1], batch.state.times[:1], noise), batch.constants, batch.state)
    return batch.state.state[0].double().view(2, DRAWS, CHANNELS).transpose(0, 1).flatten(1)


def energy_distance(x: Tensor, y: Tensor) -> float:
    def mean(a, b):
        same = a is b
        return torch.cdist(a, b).sum().item() / (len(a) * (len(b) - same))

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def ode() -> list[str]:
    lines = ["| schedule | spacing | solver | 10 calls | 25 | 50 |", "|---|---|---|---|---|---|"]
    for schedule in SCHEDULES:
        exact = sampled(schedule, "clean", 1000, "even", SolverOptions("dpm++"))
        for spacing, solver in product(SPACINGS, ("ddim", "dpm++", "unipc")):
            off = [sampled(schedule, "clean", n, spacing, SolverOptions(solver)) - exact for n in (10, 25, 50)]
            errors = " | ".join(f"{x.square().mean().sqrt():.4f}" for x in off)
            lines.append(f"| {schedule} | {spacing} | {solver} | {errors} |")
    return lines


def sde(seeds: int = 3) -> list[str]:
    lines = ["| schedule | spacing | solver | 5 calls | 10 | 25 |", "|---|---|---|---|---|---|"]
    for schedule, spacing, solver in product(SCHEDULES, SPACINGS, ("ddpm", "sde-dpm++")):
        errors = []
        for n in (5, 10, 25):
            samples = [sampled(schedule, "clean", n, spacing, SolverOptions(solver), seed) for seed in range(seeds)]
            errors.append(statistics.mean(energy_distance(x, data(DRAWS, 9 + i)) for i, x in enumerate(samples)))
        lines.append(f"| {schedule} | {spacing} | {solver} | " + " | ".join(f"{x:.4f}" for x in errors) + " |")
    return lines


INFILLING = {
    "DPM-Solver++(2M)": SolverOptions("dpm++"),
    "DDPM": SolverOptions("ddpm"),
    **{f"DDPM, RePaint {r} × 1": SolverOptions("ddpm", resample=r) for r in (2, 8, 16)},
    **{
        f"DDPM, Langevin {k} × {size:g}": SolverOptions("ddpm", inner_steps=k, step_size=size)
        for k, size in ((5, 0.2), (5, 1.0), (7, 2.0), (15, 2.0))
    },
}


def infill(schedule: str = "scaled_linear", spacing: str = "power") -> list[str]:
    """The steps of each row are as many as the calls allow; they are in brackets."""
    texts, each = data(CONDITIONS, 77)[:, CHANNELS:], DRAWS // CONDITIONS
    truth = [conditional(text, 2000, i) for i, text in enumerate(texts)]

    def error(conditioning: str, steps: int, solver: SolverOptions) -> float:
        x = sampled(schedule, conditioning, steps, spacing, solver, text=texts.repeat_interleave(each, 0))
        images = x[:, :CHANNELS].unflatten(0, (CONDITIONS, each))
        return statistics.mean(energy_distance(a.contiguous(), b) for a, b in zip(images, truth, strict=True))

    lines = ["| infilling | 25 calls | 50 | 100 | 250 |", "|---|---|---|---|---|"]
    for name, solver in INFILLING.items():
        cells = []
        for calls in (25, 50, 100, 250):
            repeats = max(solver.resample, 1 + solver.inner_steps)
            steps = (calls - 1) // repeats + 1  # the first is not repeated
            cells.append(f"{error('renoise', steps, solver):.3f} ({steps})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, f"| clean conditioning, DPM-Solver++(2M) | {error('clean', 25, SolverOptions()):.3f} (25) | | | |"]


COMPARISONS = {"ode": ode, "sde": sde, "infill": infill}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=COMPARISONS)
    print("\n".join(COMPARISONS[parser.parse_args().comparison]()))
