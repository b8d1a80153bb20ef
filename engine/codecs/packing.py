"""Convolutions on a CPU with weights in oneDNN's own layout, into which it otherwise brings them at every call.

For a small autoencoder and single images that is a large part of the time (benchmarks/NOTES.md).
"""

import torch
from torch import Tensor, nn


def pack_convolutions(module: nn.Module) -> None:
    """Makes the convolutions in a module `PackedConv2d`; it computes the same up to rounding."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
            layer.__class__ = PackedConv2d


class PackedConv2d(nn.Conv2d):
    """A convolution that, in float32 on a CPU and without gradients, uses a copy of its weight in oneDNN's layout."""

    _packed: tuple[tuple[int, int], Tensor] | None = None  # what of the weight was copied, and the copy

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] → [B, C′, H′, W′]
        weight, packed = self.weight, self._packed
        in_float32 = x.is_cpu and weight.is_cpu and x.dtype == weight.dtype == torch.float32
        if torch.is_grad_enabled() or not in_float32 or weight.is_inference() or torch.compiler.is_compiling():
            return super().forward(x)
        how, state = (self.padding, self.stride, self.dilation, self.groups), (weight.data_ptr(), weight._version)
        if packed is None or packed[0] != state:
            one = [1, *x.shape[1:]]  # the layout depends on the size of images
            packed = state, torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *how, one)
            self._packed = packed
        return torch.ops.mkldnn._convolution_pointwise(x, packed[1], self.bias, *how, "none", [], "")

    def __getstate__(self):  # the copy can be neither copied nor pickled
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}
