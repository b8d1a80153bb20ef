"""Convolutions on a CPU with weights in oneDNN's own layout, into which it else brings them at every call.

For a small autoencoder and single images that is a large part of the time (benchmarks/NOTES.md).
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


def packed(module: nn.Module, run: Callable[[Any], object]) -> nn.Module:
    """A module that computes the same, up to rounding, with copies of a module's convolution weights in that layout.

    module  float32, on a CPU, for inference; its other weights are shared, not copied
    run     calls a module of this kind on an example; the layout depends on the size of images, not on their number.
            The example costs nothing: it is on the device "meta"
    """
    inputs: dict[str, list[int]] = {}  # shapes by the layer's name
    traced = _copy(module, lambda weight: weight.to("meta"))
    for name, layer in _convolutions(traced).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, list(args[0].shape)))
    with torch.no_grad(), torch.device("meta"):
        run(traced)
    copy = _copy(module, lambda weight: weight)
    for name, layer in _convolutions(copy).items():
        if name in inputs:
            layer.forward = _packed_convolution(layer, inputs[name])
    return copy


def _copy(module: nn.Module, weight: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a module with other weights, those that a function makes of its own."""
    return deepcopy(module, {id(w): weight(w) for w in (*module.parameters(), *module.buffers())})


def _convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)}
    return {name: layer for name, layer in layers.items() if layer.padding_mode == "zeros"}


def _packed_convolution(layer: nn.Conv2d, shape: list[int]) -> Callable[[Tensor], Tensor]:
    how = layer.padding, layer.stride, layer.dilation, layer.groups
    with torch.no_grad():
        weight = torch.ops.mkldnn._reorder_convolution_weight(layer.weight, *how, shape)

    def convolution(x: Tensor) -> Tensor:  # [B, C, H, W] → [B, C′, H′, W′]
        return torch.ops.mkldnn._convolution_pointwise(x, weight, layer.bias, *how, "none", [], "")

    return convolution
