"""What the tests of networks and sampling share: denoisers that count their calls, step tables, short runs."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import torch

from engine.config import DiffusionConfig, ModelConfig
from engine.diffusion.schedule import timesteps
from engine.diffusion.solver_table import GuidanceOptions, SolverOptions, solver_table
from engine.kernels.philox import STATE_STREAM, normals
from engine.model.denoiser import Denoiser, build
from engine.sampling.sampler import Sampler

N = 1000
SECONDS = 30  # far more than any future takes: one that is lost fails a test and does not hang it


class FunctionDenoiser:
    """`function(inputs, times, outputs)` as a denoiser; it has no blocks, so there is nothing to use again."""

    can_cache = False

    def __init__(self, function):
        self.function = function

    def __call__(
        self, inputs, times, outputs=None, features=None, cache=None, refresh=None, adapted=None, temperature=None
    ):
        assert not features and cache is None and refresh is None
        return self.function(inputs, times, outputs)

    def branch_features(self, name, inputs, times, adapted=None):
        raise AssertionError(f"{name} has no in-blocks")

    def new_cache(self, rows):
        raise AssertionError("there are no inner blocks")


class Gated(FunctionDenoiser):
    """Each of its calls waits for `go`, and says in `began` that one waits."""

    def __init__(self, function):
        super().__init__(function)
        self.go, self.began, self.rows = threading.Semaphore(0), threading.Semaphore(0), []

    def __call__(self, inputs, *arguments, **more):
        self.rows.append(len(inputs))
        self.began.release()
        assert self.go.acquire(timeout=SECONDS)
        return super().__call__(inputs, *arguments, **more)

    def wait(self):
        """Until the next call is there."""
        assert self.began.acquire(timeout=SECONDS)

    def release(self, calls=1000):
        self.go.release(calls)


class CountingDenoiser(Denoiser):
    """A small network of random weights in float32."""

    def __init__(self, config: ModelConfig):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = build(config).eval().requires_grad_(False)
            for weight in network.parameters():
                weight.normal_(std=0.2)
        super().__init__(network, N)
        self.rows, self.features = [], []  # R of every forward; modality and R of every call of `branch_features`

    def __call__(self, inputs, *arguments, **more):
        self.rows.append(len(inputs))
        return super().__call__(inputs, *arguments, **more)

    def branch_features(self, name, inputs, times, adapted=None):
        self.features.append((name, len(inputs)))
        return super().branch_features(name, inputs, times, adapted)

    def new_cache(self, rows):
        return super().new_cache(rows).fill_(torch.nan)


def count_blocks(denoiser: CountingDenoiser, of=lambda x: 1) -> dict[str, int]:
    """How often the blocks of each stack have run from now on; the result is filled in as they do.

    of  counts more than 1 for a call with the tokens x [R, L, D]
    """
    count: dict[str, int] = {}
    for name, module in denoiser.network.named_modules():
        if hasattr(module, "qkv"):
            stack = name.rpartition(".")[0]
            module.register_forward_hook(lambda _, x, __, s=stack: count.update({s: count.get(s, 0) + of(x[0])}))
    return count


def without_reuse(config: ModelConfig) -> ModelConfig:
    """The same state without in-blocks: with it a sampler has no branch features to keep."""
    return replace(config, modalities=tuple(replace(m, depth=0) for m in config.modalities))


def diffusion(conditioning="clean", schedule="cosine", prediction="v_prediction") -> DiffusionConfig:
    return DiffusionConfig(schedule, N, prediction, conditioning, "masked" if conditioning == "clean" else "shared")


def table(
    times, modalities=2, conditioning="clean", schedule="cosine", prediction="v_prediction", guidance=None, **options
):
    """A step table; `times` are a list, or how many evenly spaced ones; options are those of `SolverOptions`."""
    times = timesteps(N, times) if isinstance(times, int) else times
    config = diffusion(conditioning, schedule, prediction)
    return solver_table(config, times, modalities, SolverOptions(**options), guidance or GuidanceOptions())


def masked(scale, interval=None, first_stage=0) -> GuidanceOptions:
    """Options of masked guidance."""
    return GuidanceOptions("masked", scale, interval, first_stage=first_stage)


def predict(model, parts, times):
    """Predictions by modality; parts [B, L, C] and times [B] by modality."""
    config = model.config
    inputs = torch.cat([parts[m.name].flatten(1) for m in config.modalities], 1)
    index = torch.cat([times[m.name][:, None].expand(-1, m.tokens) for m in config.modalities], 1).int()
    with torch.inference_mode():
        out = model(inputs, model.time_table(torch.arange(1001)), index)
    return {m.name: out[:, config.state_slices[m.name]].unflatten(1, (m.tokens, m.channels)) for m in config.modalities}


def drawn(*shape, seed=3):
    """Normal random numbers that are the same whenever they are drawn."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def initial_noise(seeds: torch.Tensor, size: int) -> torch.Tensor:
    """The state [B, size] from which samples with these seeds [B] start."""
    return normals(seeds, torch.zeros_like(seeds), STATE_STREAM, size)[0]


def sample(denoiser, specs, model, progress=None, **options) -> torch.Tensor:
    """The final states [B, N] of these samples, in a sampler of their own."""
    sampler = Sampler(denoiser, model, **{"buckets": range(1, len(specs) + 1), **options})
    try:
        return sampler.run(specs, progress)
    finally:
        sampler.close()


@contextmanager
def gated(function, model, *buckets):
    """A gated denoiser and a sampler with it; all its calls may go on in the end."""
    denoiser = Gated(function)
    sampler = Sampler(denoiser, model, buckets=buckets)
    try:
        yield denoiser, sampler
    finally:
        denoiser.release()
        sampler.close()
