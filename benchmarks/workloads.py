"""The models that are compared, in which sense they are equal, and the loops and inputs that benchmarks share."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.codecs.autoencoder import autoencoder_class
from engine.codecs.image import ImageCodec
from engine.codecs.text import TextCodec
from engine.codecs.words import END
from engine.config import Config, ModelConfig, UViTConfig
from engine.diffusion.schedule import timesteps
from engine.diffusion.solver_table import GuidanceOptions, SolverOptions, StepTable, solver_table
from engine.kernels.attention import attention
from engine.kernels.cfg_step import cfg_step, init_state
from engine.kernels.linear import onednn_computes, packed_product
from engine.model.cost import forward_flops
from engine.model.denoiser import Denoiser, build
from engine.presets import PRESETS, with_categories
from engine.sampling.batch import SampleSpec, batch_constants, new_state
from engine.sampling.graphs import set_up
from engine.training.recipes import RECIPES


def presets(full: bool) -> str:
    """The name of the PS-U-Net preset that is measured: the paper's, or one small enough for a CPU."""
    return "coco256" if full else "emoji"


def measured_preset(full: bool) -> Config:
    """That preset, predicting all modalities alike, as the U-ViTs that it is compared with."""
    return without_categories(PRESETS[presets(full)])


def without_categories(config: Config) -> Config:
    """With heads that predict every modality's values."""
    sampling = replace(config.sampling, temperature={})
    return replace(config, model=with_categories(config.model, 0), sampling=sampling)


# ------------------------------------------------------------------------------------------ models to compare


def u_vit_multi(model: ModelConfig, blocks: int) -> ModelConfig:
    """A U-ViT-multi of `blocks` blocks, with the modalities and the width of another model."""
    names = tuple(m.name for m in model.modalities)
    modalities = tuple(replace(m, depth=0, blocks_of="") for m in model.modalities)
    uvit = UViTConfig(names, names)
    return replace(model, modalities=modalities, shared_depth=blocks, time_conditioning="token", uvit=uvit)


def equal_depth(model: ModelConfig) -> ModelConfig:
    """The U-ViT-multi with as many blocks as the longest path through a PS-U-Net has."""
    return u_vit_multi(model, model.shared_depth + 2 * max(m.depth for m in model.modalities))


def equal_parameters(model: ModelConfig) -> ModelConfig:
    """The U-ViT-multi whose number of parameters is closest to a PS-U-Net's."""
    wanted = parameters(model)
    return min(_depths(model), key=lambda other: abs(parameters(other) - wanted))


def equal_compute(model: ModelConfig) -> ModelConfig:
    """The U-ViT-multi whose FLOPs of a forward are closest to a PS-U-Net's."""
    wanted = forward_flops(model, 1)
    return min(_depths(model), key=lambda other: abs(forward_flops(other, 1) - wanted))


def _depths(model: ModelConfig) -> list[ModelConfig]:
    return [u_vit_multi(model, blocks) for blocks in range(1, 50, 2)]


def parameters(model: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(model).parameters())


def u_vit_config(config: Config, model: ModelConfig) -> Config:
    """A checkpoint config for a U-ViT-multi in place of `config`'s model."""
    trained_for = PRESETS["uvit-emoji"].diffusion
    diffusion = replace(trained_for, schedule=config.diffusion.schedule, prediction=config.diffusion.prediction)
    return replace(config, model=model, diffusion=diffusion)


# ---------------------------------------------------------------------------------------------- random weights


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network whose weights are all random: with the gates and heads of zero it starts with, no error would show."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(config)
        with torch.no_grad():
            for p in network.parameters():
                if not p.any():
                    p.normal_(std=0.02)
    return network.to(device, dtype).eval()


def random_denoiser(config: Config, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> Denoiser:
    """A denoiser with the weights of `random_model`, compiled as an engine does it."""
    network = random_model(config.model, device, dtype)
    if compiled:
        set_up(network, device, compile=True)
    return Denoiser(network, config.diffusion.timesteps)


def random_checkpoint(config: Config, folder: Path) -> Path:
    """Writes a checkpoint of random weights, words word0 … word254 and an autoencoder of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if config.codecs["image"] == PRESETS["emoji"].codecs["image"]:
            autoencoder = autoencoder_class("AutoencoderDC")(**RECIPES["emoji"].autoencoder_config)
        else:
            autoencoder = autoencoder_class("AutoencoderTiny")()
        vectors = torch.randn(256, config.model.modality("text").channels)
    weights = random_model(config.model, torch.device("cpu"), torch.float32).state_dict()
    checkpoint.save(folder, config, weights, torch.float32)
    TextCodec((END, *(f"word{i}" for i in range(255))), vectors).save(folder / "text")
    ImageCodec(autoencoder, **config.codecs["image"].settings).save(folder / "image")
    return folder


# --------------------------------------------------------------------------------------------- inputs and loops


def forward_inputs(config: ModelConfig, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(packed inputs [R, N], times [R, L] int32): each row has its own time."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, config.size, generator=generator)
    times = torch.randint(1, 1001, (rows, 1), generator=generator, dtype=torch.int32).expand(rows, config.tokens)
    return inputs.to(device), times.contiguous().to(device)


def table_of(config: Config, steps: int, guidance: GuidanceOptions) -> StepTable:
    """Evenly spaced times, all modalities together."""
    times = timesteps(config.diffusion.timesteps, steps)
    return solver_table(config.diffusion, times, len(config.model.modalities), SolverOptions(), guidance)


def specs_of(config: Config, table: StepTable, generated: Sequence[str], count: int) -> list[SampleSpec]:
    """Samples with seeds 0, 1, …, of which these modalities are generated; the others are known to be zero."""
    model = config.model
    generate = torch.zeros(model.size, dtype=torch.bool)
    for name in generated:
        generate[model.state_slices[name]] = True
    return [SampleSpec(seed, table, generate, torch.zeros(model.size)) for seed in range(count)]


def plain_loop(
    denoiser: Denoiser, specs: Sequence[SampleSpec], device: torch.device, outputs: Sequence[str], calls: int
) -> Tensor:
    """The samples' final states [B, N], in this thread: every block runs at every step.

    calls  into which the passes of a step are split: 1 for all in one batch, the number of passes for one by one
    """
    constants = batch_constants(specs, denoiser.config, device)
    state = new_state(constants)
    init_state(constants, state)
    for _ in range(specs[0].table.steps):
        parts = zip(state.inputs.chunk(calls), state.times.chunk(calls), strict=True)
        prediction = torch.cat([denoiser(inputs, times, outputs) for inputs, times in parts])  # [P·B, N]
        cfg_step(prediction, constants, state)
    return state.state


def products(
    denoiser: Denoiser,
    inputs: Tensor,
    times: Tensor,
    outputs: Collection[str] | None = None,
    features: Mapping[str, Tensor] | None = None,
) -> Callable[[], None]:
    """Calls every linear layer and every attention of one call of the denoiser, on the inputs that they get there.

    On a CPU the weights are in oneDNN's own layout, as in the packages: its products are faster then.
    """
    calls = []

    def linear(layer, inputs, output):
        (x,) = inputs
        if x.is_cpu and onednn_computes(x.dtype):
            calls.append(partial(packed_product(layer.weight, layer.bias), x))
        else:
            calls.append(partial(layer.forward, x))

    def attention_of(block, qkv, inputs, output):
        packed = output.unflatten(-1, (3, block.heads, -1))  # [R, L, 3, H, d], as the block gives it to attention
        calls.append(partial(attention, packed, block.attention))

    layers = [layer for layer in denoiser.network.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(linear) for layer in layers]
    hooks += [b.qkv.register_forward_hook(partial(attention_of, b)) for b in denoiser.network.blocks()]
    denoiser(inputs, times, outputs, features)
    for hook in hooks:
        hook.remove()

    def call_all():
        for call in calls:
            call()  # its result is freed at once, as in a forward

    return call_all


# -------------------------------------------------------------------------------------------------------- costs


def constant_modalities(config: Config, outputs: Sequence[str]) -> tuple[str, ...]:
    """The modalities that enter every step alike while `outputs` are generated: their in-blocks run once."""
    if config.diffusion.conditioning != "clean":
        return ()
    return tuple(m.name for m in config.model.modalities if m.name not in outputs and m.depth > 0)


def sampling_flops(config: Config, rows: int, steps: int, outputs: Sequence[str]) -> int:
    """FLOPs that `steps` steps of `rows` rows need, passes counted as rows, all modalities of `outputs` together."""
    constant = constant_modalities(config, outputs)
    whole, step = (forward_flops(config.model, rows, outputs, cached) for cached in ((), constant))
    return steps * step + (whole - step)
