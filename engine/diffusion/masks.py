"""Masks of the packed state: True where the engine must generate. A task is nothing but such a pattern.

Masks of a modality's elements [L, C] come from its codec.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.config import ModelConfig


def pack(masks: Mapping[str, Tensor], model: ModelConfig) -> Tensor:
    """Masks [L, C] by modality, one for each of the model's, to the generate mask [N] of the packed state."""
    for m in model.modalities:
        assert masks[m.name].shape == (m.tokens, m.channels), (m, masks[m.name].shape)
    return torch.cat([masks[m.name].bool().reshape(-1) for m in model.modalities])


def token_mask(generate: Tensor, model: ModelConfig) -> Tensor:
    """Mask [..., N] of elements to mask [..., L] of tokens: True where any element of the token is."""
    parts = []
    for m in model.modalities:
        elements = generate[..., model.state_slices[m.name]].unflatten(-1, (m.tokens, m.channels))  # [..., L, C]
        parts.append(elements.any(-1))
    return torch.cat(parts, dim=-1)


def whole_tokens(generate: Tensor, model: ModelConfig) -> Tensor:
    """Mask [N] widened so that no token is partly known, as clean conditioning needs: a token has one time."""
    tokens = token_mask(generate, model)
    parts = [tokens[model.token_slices[m.name]].repeat_interleave(m.channels) for m in model.modalities]
    return torch.cat(parts)


def task_of(generate: Tensor, model: ModelConfig) -> str:
    """The name of a mask's [N] task.

    "joint" where nothing is known; "text-to-image", "image+sketch-to-text" and so on where every modality is either
    wholly known or wholly generated, in the order of the config; else, also where nothing is generated, "infill".
    """
    parts = {name: generate[part] for name, part in model.state_slices.items()}
    generated = [name for name, part in parts.items() if part.all()]
    known = [name for name, part in parts.items() if not part.any()]
    if len(generated) == len(parts):
        return "joint"
    if generated and len(known) + len(generated) == len(parts):
        return f"{'+'.join(known)}-to-{'+'.join(generated)}"
    return "infill"
