"""The denoising loss: noise a batch at training times, predict, and compare what had to be predicted.

    x_t = α_t·x0 + σ_t·ε      target ε ("epsilon") or α_t·ε − σ_t·x0 ("v_prediction")

Training times (`DiffusionConfig.times`)
    shared       one t for all modalities of a sample (arXiv 2311.16488, section 3.2)
    independent  one t per modality (UniDiffuser, arXiv 2303.06555)
    masked       one t for what is to be generated; each sample's known tokens enter clean, labelled time 0, and for
                 some samples as pure noise labelled time N; only generated tokens count
    conditional  as masked, with the modalities that the model does not predict as what is known (U-ViT's text)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.config import Config
from engine.schedule import NoiseSchedule

# Shares of the samples that generate all tokens, and that know one whole modality; the others know random tokens.
JOINT, WHOLE_MODALITY = 0.1, 0.75
DROPPED = 0.1  # share of the samples whose known tokens are pure noise, for the unconditional pass


class DenoisingLoss:
    """Named losses of a denoiser `(inputs [B, N], times [B, L] int64) -> prediction [B, N]` on data x0.

    config   the checkpoint's `Config`
    gamma    min-SNR clipping of the weight of x̂0 (Hang et al. 2023, arXiv 2303.09556); None weighs the prediction
             itself, as the paper does. With v the natural weight SNR + 1 is clipped at γ + 1, which unlike
             min(SNR, γ) keeps the noisiest times, where the content is decided
    weights  of the modalities' losses, default 1
    skew     t = N·(1 − u^skew) with u uniform: 1 draws all times alike; 2 draws t > 0.7·N, where one modality's content
             is decided from the other's, for 55 % of the samples
    """

    def __init__(
        self,
        config: Config,
        gamma: float | None = None,
        weights: dict[str, float] | None = None,
        skew: float = 1.0,
        device="cpu",
    ):
        schedule = NoiseSchedule(config.diffusion.schedule, config.diffusion.timesteps)
        alpha_bar = torch.as_tensor(schedule.alpha_bar, dtype=torch.float64)  # [N + 1]
        snr = alpha_bar[1:] / (1 - alpha_bar[1:])
        self.config, self.weights, self.skew = config, weights or {}, skew
        self.alpha, self.sigma = alpha_bar.sqrt().float().to(device), (1 - alpha_bar).sqrt().float().to(device)
        weight = torch.ones_like(snr)
        if gamma is not None:
            v = config.diffusion.prediction == "v_prediction"
            weight = (snr + 1).clamp_max(gamma + 1) / (snr + 1) if v else snr.clamp_max(gamma) / snr
        self.weight = torch.cat([torch.zeros(1, dtype=torch.float64), weight]).float().to(device)  # [N + 1], by time

    def __call__(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        x0: Tensor,
        generator: torch.Generator,
        token_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{modality: scalar loss} on x0 [B, N] float32; random numbers come from the CPU `generator`.

        token_weights  [B, L] float32, how much each token counts; default: all alike
        """
        model, device, draws = self.config.model, x0.device, self.draw(len(x0), generator)
        noise = torch.randn(x0.shape, generator=generator).to(device)  # [B, N]
        times, generate, dropped = (self._per_element(x).to(device) for x in draws)  # [B, N]
        counted = generate.float() if token_weights is None else generate * self._per_element(token_weights).to(device)

        alpha, sigma = self.alpha[times], self.sigma[times]  # [B, N]
        noisy = alpha * x0 + sigma * noise
        # Dropped tokens are pure noise, whatever little of x0 the schedule leaves at time N.
        inputs = torch.where(dropped, noise, noisy)
        prediction = denoise(inputs, draws[0].to(device))  # [B, N]
        v = self.config.diffusion.prediction == "v_prediction"
        target = alpha * noise - sigma * x0 if v else noise

        error = (prediction.float() - target).square() * self.weight[times] * counted  # [B, N]
        return {
            m.name: self.weights.get(m.name, 1.0)
            * error[:, model.state_slices[m.name]].sum()
            / counted[:, model.state_slices[m.name]].sum().clamp_min(1e-6)
            for m in model.modalities
        }

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Times int64, the generate mask and the dropped mask, each [B, L] on the CPU."""
        config, model, N = self.config, self.config.model, self.config.diffusion.timesteps
        shape = (batch, model.tokens)
        everything, nothing = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        if config.diffusion.times == "independent":
            times = self._draw_times(generator, batch, len(model.modalities))  # [B, M]
            lengths = torch.tensor([m.tokens for m in model.modalities])
            return times.repeat_interleave(lengths, dim=1), everything, nothing
        times = self._draw_times(generator, batch, 1).expand(shape)  # [B, L]
        if config.diffusion.times == "shared":
            return times, everything, nothing
        if config.diffusion.times == "conditional":
            generate = nothing.clone()
            for name in model.predicted:
                generate[:, model.token_slices[name]] = True
        else:
            generate = self._draw_masks(batch, generator)  # [B, L]
        dropped = ~generate & (torch.rand(batch, 1, generator=generator) < DROPPED)  # [B, L]
        times = torch.where(generate, times, torch.where(dropped, N, 0))
        return times, generate, dropped

    def _draw_times(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Times in 1 … N, int64."""
        N = self.config.diffusion.timesteps
        u = torch.rand(shape, generator=generator, dtype=torch.float64)  # in [0, 1)
        return N - (N * u**self.skew).long()

    def _draw_masks(self, batch: int, generator: torch.Generator) -> Tensor:
        """Generate masks [B, L]: everything, all modalities but one, or random tokens, single ones or runs of them."""

        def uniform(*shape):
            return torch.rand(*shape, generator=generator)

        model, kind = self.config.model, uniform(batch, 1)
        known = torch.randint(len(model.modalities), (batch, 1), generator=generator)  # the modality that is known
        whole, scattered = [], []
        for i, m in enumerate(model.modalities):
            whole.append((known != i).expand(batch, m.tokens))
            single = uniform(batch, m.tokens) < uniform(batch, 1)
            position, length = torch.arange(m.tokens), uniform(batch, 1) * m.tokens
            start = uniform(batch, 1) * (m.tokens - length)
            run = (position >= start.floor()) & (position < start + length)
            scattered.append(torch.where(uniform(batch, 1) < 0.5, single, run))
        generate = torch.where(kind < JOINT + WHOLE_MODALITY, torch.cat(whole, 1), torch.cat(scattered, 1))
        # A sample that knows all of its tokens would teach nothing.
        return generate | (kind < JOINT) | ~generate.any(1, keepdim=True)

    def _per_element(self, x: Tensor) -> Tensor:
        """[B, L] → [B, N]."""
        model = self.config.model
        parts = [x[:, model.token_slices[m.name]].repeat_interleave(m.channels, dim=1) for m in model.modalities]
        return torch.cat(parts, dim=1)


def distinct_times(times: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(sorted distinct times, index [B, L] int32 of each token's): what a training step needs of the time table.

    The times are padded to `rows` with the largest, so that compiled blocks see one shape at every step.
    """
    distinct, index = times.unique(return_inverse=True)
    return torch.cat([distinct, distinct[-1:].expand(rows - len(distinct))]), index.int()
