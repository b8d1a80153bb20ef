"""The models that are compared, how they are made equal, and what a forward of them costs."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import Engine, checkpoint
from engine.codecs.image import ImageCodec, autoencoder_class
from engine.codecs.text import END, TextCodec
from engine.config import PRESETS, Config, ModelConfig, UViTConfig
from engine.kernels import attention
from engine.loss import distinct_times
from engine.recipes import RECIPES


def presets(full: bool) -> str:
    """The name of the PS-U-Net that is measured: the paper's, or one small enough for a CPU."""
    return "coco256" if full else "emoji"


def u_vit_multi(model: ModelConfig, blocks: int) -> ModelConfig:
    """A U-ViT-multi of so many blocks on the modalities and at the width of another model."""
    names = tuple(m.name for m in model.modalities)
    modalities = tuple(replace(m, depth=0) for m in model.modalities)
    return replace(model, modalities=modalities, shared_depth=blocks, time="token", uvit=UViTConfig(names, names))


def equal_depth(model: ModelConfig) -> ModelConfig:
    """The U-ViT-multi with as many blocks as the longest path through a PS-U-Net has."""
    return u_vit_multi(model, model.shared_depth + 2 * max(m.depth for m in model.modalities))


def equal_parameters(model: ModelConfig) -> ModelConfig:
    """The U-ViT-multi whose parameters are nearest in number to a PS-U-Net's."""
    return min(_depths(model), key=lambda other: abs(parameters(other) - parameters(model)))


def equal_compute(model: ModelConfig) -> ModelConfig:
    """The U-ViT-multi whose forward costs most nearly what a PS-U-Net's does."""
    return min(_depths(model), key=lambda other: abs(forward_flops(other, 1) - forward_flops(model, 1)))


def _depths(model: ModelConfig) -> list[ModelConfig]:
    return [u_vit_multi(model, blocks) for blocks in range(1, 50, 2)]


def parameters(model: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in checkpoint.build(model).parameters())


def forward_flops(
    model: ModelConfig, rows: int, outputs: tuple[str, ...] | None = None, encoded: tuple[str, ...] = ()
) -> int:
    """Multiplications and additions of the matrix products of one forward; what is elementwise is left out.

    `outputs` and `encoded` as in the models' forward: out-blocks and heads of modalities that are not in `outputs` do
    not run, nor embeddings and in-blocks of those in `encoded`.
    """
    wanted = model.predicted if outputs is None else outputs
    prefix = 0 if model.uvit is None else len(model.uvit.timed) + model.uvit.extra_tokens
    time = int(model.uvit is None and model.time == "token")  # a PS-U-Net's modality carries its own time token
    tokens = prefix + model.tokens + time * len(model.modalities)
    total = _stack_flops(model, tokens, model.shared_depth, model.shared_depth // 2)
    for m in model.modalities:
        before, after = m.name not in encoded, m.name in wanted
        total += _stack_flops(model, m.tokens + time, (before + after) * m.depth, after * m.depth)
        total += (before + after) * 2 * m.tokens * m.channels * model.dim  # embedding, and head
    return rows * total


def constant_modalities(config: Config, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """The modalities that enter every step alike while `outputs` are generated: encoded once by `Sampler`."""
    if config.diffusion.conditioning != "clean":
        return ()
    return tuple(m.name for m in config.model.modalities if m.name not in outputs and m.depth > 0)


def sampling_flops(config: Config, rows: int, steps: int, outputs: tuple[str, ...]) -> int:
    """`forward_flops` of `steps` steps of `rows` rows, passes counted as rows, as the sampler does them."""
    constant = constant_modalities(config, outputs)
    whole, step = (forward_flops(config.model, rows, outputs, encoded) for encoded in ((), constant))
    return steps * step + (whole - step)


def _stack_flops(model: ModelConfig, tokens: int, blocks: int, skips: int) -> int:
    dim = model.dim
    layers = 2 * tokens * dim * dim * (4 + 2 * model.mlp_ratio)  # QKV, projection, MLP
    flops, _ = attention.cost(1, tokens, dim // model.head_dim, model.head_dim, 2)
    return blocks * (layers + flops) + skips * 2 * tokens * 2 * dim * dim


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model with random weights throughout: as initialised, gates and heads of zero would hide every error."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = checkpoint.build(config)
        with torch.no_grad():
            for p in model.parameters():
                if not p.any():
                    p.normal_(std=0.02)
    return model.to(device, dtype).eval()


def forward_inputs(config: ModelConfig, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(packed inputs [R, N], times [T], index [R, L]): each row at a time of its own."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, config.size, generator=generator)
    times = torch.randint(1, 1001, (rows, 1), generator=generator).expand(rows, config.tokens)
    distinct, index = distinct_times(times, rows)
    return inputs.to(device), distinct.to(device), index.to(device)


def u_vit_config(config: Config, model: ModelConfig) -> Config:
    """A checkpoint config for a U-ViT-multi in place of `config`'s model."""
    return replace(config, model=model, diffusion=replace(PRESETS["uvit-emoji"].diffusion,
                   schedule=config.diffusion.schedule, prediction=config.diffusion.prediction))  # fmt: skip


def engine_of(config: Config, folder: Path, device: str, dtype: str, **options) -> Engine:
    """An engine with random weights, words word0 … word255 and an autoencoder of random weights, saved in `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if config.image == PRESETS["emoji"].image:
            autoencoder = autoencoder_class("AutoencoderDC")(**RECIPES["emoji"].autoencoder_config)
        else:
            autoencoder = autoencoder_class("AutoencoderTiny")()
        vectors = torch.randn(256, config.model.modality("text").channels)
    weights = random_model(config.model, torch.device("cpu"), torch.float32).state_dict()
    checkpoint.save(folder, config, weights, torch.float32)
    TextCodec((END, *(f"word{i}" for i in range(255))), vectors).save(folder / "text")
    ImageCodec(autoencoder, config.image.size, config.image.patch).save(folder / "image")
    return Engine.from_pretrained(folder, device=device, dtype=dtype, **options)
