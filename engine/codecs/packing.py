"""Convolutions on a CPU with weights in oneDNN's own layout, into which it else brings them at every call.

For a small autoencoder and single images that is a large part of the time (benchmarks/NOTES.md).
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn


def packed(module: nn.Module) -> nn.Module:
    """A module that computes the same, up to rounding, with copies of a module's convolution weights in that layout.

    module  float32, on a CPU, for inference; its other weights are shared, not copied
    """
    shared = {id(weight): weight for weight in (*module.parameters(), *module.buffers())}
    copy = deepcopy(module, shared)
    for layer in copy.modules():
        if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
            layer.forward = _packed_convolution(layer)
    return copy


def _packed_convolution(layer: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    how = layer.padding, layer.stride, layer.dilation, layer.groups
    weights: list[Tensor] = []  # packed at the first call: the layout depends on the size of images

    def convolution(x: Tensor) -> Tensor:  # [B, C, H, W] → [B, C′, H′, W′]
        if not weights:
            one = [1, *x.shape[1:]]
            weights.append(torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach(), *how, one))
        return torch.ops.mkldnn._convolution_pointwise(x, weights[0], layer.bias, *how, "none", [], "")

    return convolution
