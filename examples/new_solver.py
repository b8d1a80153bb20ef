"""A new solver in one page: Heun's method, of second order with two evaluations of the model a step.

    python examples/new_solver.py --prompt "red heart"

writes `heun.png`: four samples of Heun's method at a few steps beside four of DDIM at as many evaluations, from the
same noise. A solver is a function of a denoiser, a state and a schedule. One that needs no more than the last three x̂0
is a row of coefficients instead (`engine.diffusion.solvers`), and then shares its steps with all other requests.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from engine.checkpoint import BUILT_IN, load
from engine.config import Config
from engine.diffusion.schedule import NoiseSchedule, timesteps
from engine.images import grid
from engine.model.denoiser import Denoiser

Estimate = Callable[[Tensor, int], Tensor]  # x [B, N] at time t → x̂0 [B, N]


def ddim(estimate: Estimate, x: Tensor, schedule: NoiseSchedule, times: list[int]) -> Tensor:
    """First order (arXiv 2010.02502, eq. 12): x_s = σ_s/σ_t·x + (α_s − σ_s/σ_t·α_t)·x̂0."""
    for t, s in zip(times, [*times[1:], 0], strict=True):
        x = moved(x, estimate(x, t), schedule, t, s)
    return x


def heun(estimate: Estimate, x: Tensor, schedule: NoiseSchedule, times: list[int]) -> Tensor:
    """Second order: the same step with the mean of x̂0 before and after a first try of it; plain DDIM to time 0."""
    for t, s in zip(times, [*times[1:], 0], strict=True):
        x0 = estimate(x, t)
        if s > 0:
            x0 = (x0 + estimate(moved(x, x0, schedule, t, s), s)) / 2
        x = moved(x, x0, schedule, t, s)
    return x


def moved(x: Tensor, x0: Tensor, schedule: NoiseSchedule, t: int, s: int) -> Tensor:
    a = float(schedule.sigma(s) / schedule.sigma(t))
    return a * x + (float(schedule.alpha(s)) - a * float(schedule.alpha(t))) * x0


def guided(denoiser: Denoiser, config: Config, schedule: NoiseSchedule, text: Tensor, w: float) -> Estimate:
    """x̂0 of the image by masked classifier-free guidance: the text [B, N_text] clean, or noise at time N."""
    model, N = config.model, schedule.timesteps
    image, tokens = model.state_slices["image"], model.token_slices
    noise = torch.randn(text.shape, generator=torch.Generator().manual_seed(1))

    def predict(x: Tensor, t: int, words: Tensor, words_time: int) -> Tensor:
        times = torch.full((len(x), model.tokens), words_time, dtype=torch.int32)  # [B, L]
        times[:, tokens["image"]] = t
        inputs = torch.cat([x if m.name == "image" else words for m in model.modalities], dim=1)  # [B, N]
        return denoiser(inputs, times, outputs=("image",))[:, image]

    def estimate(x: Tensor, t: int) -> Tensor:
        unconditional, conditional = predict(x, t, noise, N), predict(x, t, text, 0)
        v = unconditional + w * (conditional - unconditional)
        return float(schedule.alpha(t)) * x - float(schedule.sigma(t)) * v  # the built-in model predicts v

    return estimate


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", default="red heart")
    parser.add_argument("--num", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="of Heun's method")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--out", default="heun.png")
    options = parser.parse_args(arguments)

    checkpoint = load(BUILT_IN)
    config, schedule = checkpoint.config, NoiseSchedule(checkpoint.config.diffusion.schedule, 1000)
    denoiser = Denoiser(checkpoint.network.float(), schedule.timesteps)
    words, pixels = checkpoint.codec("text"), checkpoint.codec("image")
    text = words.encode([words.read(options.prompt, "prompt")]).flatten(1).repeat(options.num, 1)  # [B, N_text]
    estimate = guided(denoiser, config, schedule, text, options.guidance)

    size = config.model.modality("image").size
    start = torch.randn(options.num, size, generator=torch.Generator().manual_seed(0))  # [B, N_image]
    images, captions = [], []
    for name, solver, steps in (("Heun", heun, options.steps), ("DDIM", ddim, 2 * options.steps - 1)):
        x = solver(estimate, start, schedule, timesteps(schedule.timesteps, steps))
        tokens = x.unflatten(1, (pixels.tokens, pixels.channels))  # [B, L, C]
        nothing = [pixels.read(None, "image")] * options.num
        images += [decoded.value for decoded in pixels.decode(tokens, nothing)]
        captions += [f"{name}, {steps} steps"] * options.num
    grid(images, captions, columns=options.num).save(options.out)


if __name__ == "__main__":
    main()
