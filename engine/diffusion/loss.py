"""The denoising loss: noise a batch at random times, predict, compare with the target.

    x_t = α_t·x0 + σ_t·ε      target ε ("epsilon") or α_t·ε − σ_t·x0 ("v_prediction")

Training times (`DiffusionConfig.time_sampling`)
    shared       one t for all modalities of a sample (arXiv 2311.16488, section 3.2)
    independent  one t per modality (UniDiffuser, arXiv 2303.06555)
    masked       one t for the tokens to generate; a sample's known tokens enter clean at time 0, or, in some samples,
                 as pure noise at time N; the loss is over the generated tokens only. Known are no tokens, random
                 ones, or some whole modalities. With more than two modalities, some that are to be generated wait
                 at time N, as when one is generated after the other
    conditional  like masked; the known tokens are those of modalities that the model does not predict (U-ViT's text)
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.config import Config
from engine.diffusion.schedule import NoiseSchedule
from engine.errors import InputError

# Masked times: the fraction of samples in which every token is generated, and in which whole modalities are known. In
# the rest random tokens are known.
JOINT, WHOLE_MODALITY = 0.1, 0.75
UNKNOWN = 1 / 3  # of the rest: how often a modality has no known token, where there are more than two
DROPPED = 0.1  # fraction of samples whose known tokens are pure noise: trains the unconditional pass
NAT = 0.2  # how much a nat of cross-entropy counts beside squared errors


class Draws(NamedTuple):
    """What is drawn for a batch before its data are chosen, on the CPU."""

    times: Tensor  # [B, L] int64
    generate: Tensor  # [B, L] bool, the tokens that the loss counts
    dropped: Tensor  # [B, L] bool, tokens that are noise and not counted


class DenoisingLoss:
    """The losses of a denoiser `(inputs [B, N], times [B, L] int64) -> prediction [B, N]`, one per modality.

    Of categorical modalities it returns logits, packed as `ModelConfig.head_slices` says, and their loss is the
    cross-entropy of the tokens' categories (CDCD, arXiv 2211.15089), at all times alike.

    config   the checkpoint's `Config`
    gamma    min-SNR weighting (Hang et al. 2023, arXiv 2303.09556): the loss weight of x̂0 is at most γ. None: the
             prediction's error is not weighted, as in the paper. With v_prediction the weight SNR + 1 is clipped at
             γ + 1 instead of min(SNR, γ), which would nearly ignore the noisiest times, where content is decided
    weights  of the modalities' losses, default 1
    skew     t = N·(1 − u^skew) with u uniform: 1 draws all times equally; with 2, t > 0.7·N for 55 % of the samples.
             At these times a modality's content is decided from the other's
    odds     of modalities to be known where whole ones are, default 1, which makes all choices equally frequent: each
             is drawn in proportion to the product of its modalities' odds
    device   of the data and of the predictions
    Raises InputError about `odds` of other modalities, or that are not positive.
    """

    def __init__(
        self,
        config: Config,
        gamma: float | None = None,
        weights: dict[str, float] | None = None,
        skew: float = 1.0,
        odds: Mapping[str, float] | None = None,
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
        self._by_time: Tensor | None = None
        odds, names = odds or {}, [m.name for m in config.model.modalities]
        if not (odds.keys() <= set(names) and all(0 < o < math.inf for o in odds.values())):
            raise InputError("odds", dict(odds), f"give positive numbers of {' or '.join(names)}", "cannot be used")
        self._choices = _choices([odds.get(name, 1.0) for name in names])
        self.weight = torch.cat([torch.zeros(1, dtype=torch.float64), weight]).float().to(device)  # [N + 1], by time

    def __call__(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        x0: Tensor,
        noise: Tensor,
        draws: Draws,
        token_weights: Tensor | None = None,
        part: slice = slice(None),
        categories: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """{modality: scalar loss} of the samples of `part`; the losses of a batch's parts add up to the batch's.

        x0             [b, N] float32, clean data of these samples
        noise          [b, N] float32, standard normal
        draws          what `draw` returned, of the whole batch, as are the others
        token_weights  [B, L] float32, each token's weight in the mean; default 1
        categories     of categorical modalities, those of the tokens, [B, L] int64
        """
        model, device = self.config.model, x0.device
        counted = draws.generate.to(device).float()  # [B, L]
        if token_weights is not None:
            counted = counted * token_weights.to(device)
        # Of the whole batch: the losses of its parts then add up.
        totals = {
            m.name: (counted[:, model.token_slices[m.name]].sum() * m.channels).clamp_min(1e-6)
            for m in model.modalities
        }
        token_times = draws.times[part].to(device)  # [b, L]
        times, dropped = self._per_element(token_times), self._per_element(draws.dropped[part].to(device))  # [b, N]
        counted, noise = self._per_element(counted[part]), noise.to(device)  # [b, N]

        alpha, sigma = self.alpha[times], self.sigma[times]  # [b, N]
        noisy = alpha * x0 + sigma * noise
        # Dropped tokens are pure noise: at time N the scaled-linear schedule still has 7 % of x0 in x_t.
        inputs = torch.where(dropped, noise, noisy)
        prediction = denoise(inputs, token_times)  # [b, N]
        v = self.config.diffusion.prediction == "v_prediction"
        target = alpha * noise - sigma * x0 if v else noise

        error = self._errors(prediction.float(), target, self.weight[times], categories or {}, part) * counted  # [b, N]
        if self._by_time is not None:
            self._by_time += self._quartiles(error.detach(), counted, times)
        return {
            name: self.weights.get(name, 1.0) * error[:, columns].sum() / totals[name]
            for name, columns in model.state_slices.items()
        }

    def _errors(
        self, prediction: Tensor, target: Tensor, weight: Tensor, categories: Mapping[str, Tensor], part: slice
    ) -> Tensor:
        """[b, N] of every element, for categories of every token, repeated for its channels."""
        model = self.config.model
        if not model.categorical:
            return (prediction - target).square() * weight
        errors = []
        for m in model.modalities:
            given, columns = prediction[:, model.head_slices[m.name]], model.state_slices[m.name]
            if m.categories:
                logits, wanted = given.unflatten(1, (m.tokens, m.categories)), categories[m.name][part].to(given.device)
                entropy = cross_entropy(logits.transpose(1, 2), wanted, reduction="none")  # [b, L]
                errors.append(NAT * entropy.repeat_interleave(m.channels, dim=1))  # [b, L·C]
            else:
                errors.append((given - target[:, columns]).square() * weight[:, columns])  # [b, L·C]
        return torch.cat(errors, dim=1)

    def record_times(self) -> None:
        """From now on the losses are also added up by quartile of time."""
        self._by_time = torch.zeros(len(self.config.model.modalities), 2, 4, device=self.weight.device)

    def taken_by_time(self) -> Tensor:
        """[M, 2, 4] float32: by modality and quartile, sums of squared errors and of what they are divided by.

        Over the calls since `record_times` or this was called; the first quartile has the least noise.
        """
        taken = self._by_time
        assert taken is not None, "record_times comes first"
        self._by_time = torch.zeros_like(taken)
        return taken

    def _quartiles(self, error: Tensor, counted: Tensor, times: Tensor) -> Tensor:
        """[M, 2, 4] of errors, their weights and times [b, N]."""
        quartile = (times - 1).clamp_min(0) * 4 // self.config.diffusion.timesteps  # of known tokens, which weigh 0
        sums = []
        for columns in self.config.model.state_slices.values():
            chosen = [quartile[:, columns] == k for k in range(4)]
            sums += [(x[:, columns] * c).sum() for x in (error, counted) for c in chosen]
        return torch.stack(sums).view(-1, 2, 4)

    def draw(self, batch: int, generator: torch.Generator) -> Draws:
        """Times and masks of a batch from a generator on the CPU."""
        config, model, N = self.config, self.config.model, self.config.diffusion.timesteps
        shape = (batch, model.tokens)
        everything, nothing = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        if config.diffusion.time_sampling == "independent":
            times = self._draw_times(generator, batch, len(model.modalities))  # [B, M]
            lengths = torch.tensor([m.tokens for m in model.modalities])
            return Draws(times.repeat_interleave(lengths, dim=1), everything, nothing)
        times = self._draw_times(generator, batch, 1).expand(shape)  # [B, L]
        if config.diffusion.time_sampling == "shared":
            return Draws(times, everything, nothing)
        if config.diffusion.time_sampling == "conditional":
            generate = nothing.clone()
            for name in model.predicted:
                generate[:, model.token_slices[name]] = True
        else:
            generate = self._draw_masks(batch, generator)  # [B, L]
        dropped = ~generate & (torch.rand(batch, 1, generator=generator) < DROPPED)  # [B, L]
        if config.diffusion.time_sampling == "masked" and len(model.modalities) > 2:  # of two, one waits when dropped
            waiting = self._draw_waiting(generate, generator)
            generate, dropped = generate & ~waiting, dropped | waiting
        times = torch.where(generate, times, torch.where(dropped, N, 0))
        return Draws(times, generate, dropped)

    def known(self, draws: Draws, modality: str) -> Tensor:
        """[B] bool on the CPU: whether the model sees a modality as a whole, without noise."""
        return (draws.times[:, self.config.model.token_slices[modality]] == 0).all(1)

    def _draw_times(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Times in 1 … N, int64."""
        N = self.config.diffusion.timesteps
        u = torch.rand(shape, generator=generator, dtype=torch.float64)  # in [0, 1)
        return N - (N * u**self.skew).long()

    def _draw_masks(self, batch: int, generator: torch.Generator) -> Tensor:
        """Generate masks [B, L] bool: all tokens, some whole modalities, or random tokens (single ones or runs)."""

        def uniform(*shape):
            return torch.rand(*shape, generator=generator)

        model, kind = self.config.model, uniform(batch, 1)
        count = len(model.modalities)
        known = 1 + torch.multinomial(self._choices, batch, replacement=True, generator=generator)[:, None]  # [B, 1]
        whole, scattered = [], []
        for i, m in enumerate(model.modalities):
            whole.append((known >> i & 1 == 0).expand(batch, m.tokens))
            single = uniform(batch, m.tokens) < uniform(batch, 1)
            position, length = torch.arange(m.tokens), uniform(batch, 1) * m.tokens
            start = uniform(batch, 1) * (m.tokens - length)
            run = (position >= start.floor()) & (position < start + length)
            random = torch.where(uniform(batch, 1) < 0.5, single, run)
            if count > 2:  # as when half a sketch is given and nothing else
                random = random | (uniform(batch, 1) < UNKNOWN)
            scattered.append(random)
        generate = torch.where(kind < JOINT + WHOLE_MODALITY, torch.cat(whole, 1), torch.cat(scattered, 1))
        # A sample in which every token is known has no loss, so it generates all of them instead.
        return generate | (kind < JOINT) | ~generate.any(1, keepdim=True)

    def _draw_waiting(self, generate: Tensor, generator: torch.Generator) -> Tensor:
        """[B, L] bool: the tokens to generate of modalities that wait, as noise, until others have been generated.

        As when sampling goes by an order: each waits in half of the samples, unless all that are generated would.
        """
        slices = self.config.model.token_slices.values()
        generated = torch.stack([generate[:, tokens].any(1) for tokens in slices], 1)  # [B, M]
        waits = torch.rand(generated.shape, generator=generator) < 0.5
        waits &= (generated & ~waits).any(1, keepdim=True)
        lengths = torch.tensor([m.tokens for m in self.config.model.modalities])
        return generate & waits.repeat_interleave(lengths, dim=1)

    def _per_element(self, x: Tensor) -> Tensor:
        """[B, L] → [B, N]."""
        model = self.config.model
        parts = [x[:, model.token_slices[m.name]].repeat_interleave(m.channels, dim=1) for m in model.modalities]
        return torch.cat(parts, dim=1)


def _choices(odds: list[float]) -> Tensor:
    """Relative frequencies of the choices of known modalities: bit i of 1 + the index says that modality i is known.

    At least one is known; not all are, unless there is only one.
    """
    choices = range(1, max(2, 2 ** len(odds) - 1))
    products = [math.prod(o for i, o in enumerate(odds) if known >> i & 1) for known in choices]
    return torch.tensor(products, dtype=torch.float64)


def distinct_times(times: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(distinct times [rows] sorted, index [B, L] int32 of each token's time): the rows of the time table in a batch.

    The times are padded to `rows` with the largest one, so that compiled blocks see the same shape at every step.
    """
    distinct, index = times.unique(return_inverse=True)
    return torch.cat([distinct, distinct[-1:].expand(rows - len(distinct))]), index.int()
