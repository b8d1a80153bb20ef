"""LoRA adapters of a network's blocks, several of them in one batch: each row takes that of its own sample, or none.

    y = x·Wᵀ + s_r·(x·A_rᵀ)·B_rᵀ      A_r, B_r of the adapter of row r, s_r its scale

The adapters in use lie side by side in one pair of tensors for each layer, so a layer takes two batched products more,
whatever the number of adapters.

Shapes: R rows, L tokens, r rank, P places.
Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685); several in one batch as in S-LoRA, Sheng et al. 2023
(arXiv 2311.03285).
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.model.blocks import Block
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT

LAYERS = ("qkv", "proj", "fc1", "fc2", "skip")  # of a block, those that an adapter may change
PLACES = 4  # adapters that there is memory for at first


@dataclass(frozen=True, eq=False)
class Adapter:
    """layers  by the layer's name in the network: A [r, in] and B [out, r], B times alpha / r"""

    layers: Mapping[str, tuple[Tensor, Tensor]]


class AdapterRows(NamedTuple):
    """What each row of a forward is adapted with."""

    place: Tensor  # [R] int64, of its adapter; 0: none
    scale: Tensor  # [R] float32


def layer_names(network: nn.Module) -> list[str]:
    """Names of the layers that adapters may change."""
    blocks = ((name, block) for name, block in network.named_modules() if isinstance(block, Block))
    return [f"{name}.{layer}" for name, block in blocks for layer in LAYERS if getattr(block, layer) is not None]


def layer_shapes(network: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of these layers, by name, in a network that is not quantised."""
    return {name: tuple(network.get_submodule(name).weight.shape) for name in layer_names(network)}


def merged(weights: Mapping[str, Tensor], adapter: Adapter, scale: float = 1.0) -> dict[str, Tensor]:
    """A network's weights, by name, plus `scale` times the adapter; the sum is made in float32."""
    changed = dict(weights)
    for name, (a, b) in adapter.layers.items():
        weight = weights[f"{name}.weight"]
        delta = b.to(weight.device).float() @ a.to(weight.device).float()  # [out, in]
        changed[f"{name}.weight"] = (weight.float() + scale * delta).to(weight.dtype)
    return changed


class _Current:
    """The rows of the forward that runs, for all layers of a network."""

    rows: AdapterRows


class AdaptedLinear(nn.Module):
    """A linear layer, also a quantised one, with the adapters of several places; place 0 changes nothing."""

    def __init__(self, layer: nn.Module, current: _Current):
        super().__init__()
        self.layer, self.current = layer, current
        self.a: Tensor | None = None  # [P, r, in]
        self.b: Tensor | None = None  # [P, out, r]

    def forward(self, x: Tensor) -> Tensor:  # [R, L, in] → [R, L, out]
        y = self.layer(x)  # [R, L, out]
        if self.a is None or self.b is None:
            return y
        place, scale = self.current.rows
        h = torch.bmm(x, self.a[place].mT) * scale[:, None, None].to(x.dtype)  # [R, L, r]
        return torch.baddbmm(y, h, self.b[place].mT)  # [R, L, out]

    def put(self, place: int, places: int, a: Tensor, b: Tensor) -> bool:
        """Sets A [r, in] and B [out, r] of one of so many places; returns whether that took other memory."""
        old_a, old_b = self.a, self.b
        moved = old_a is None or old_b is None or len(old_a) < places or old_a.shape[1] < len(a)
        if moved:
            rank = max(len(a), 0 if old_a is None else old_a.shape[1])
            self.a, self.b = a.new_zeros(places, rank, a.shape[1]), b.new_zeros(places, len(b), rank)
            if old_a is not None and old_b is not None:
                self.a[: len(old_a), : old_a.shape[1]] = old_a
                self.b[: len(old_b), :, : old_b.shape[2]] = old_b
        for values, new in ((self.a[place], a), (self.b[place].mT, b.mT)):  # [r, in], [r, out]
            values.zero_()  # the adapter that was here may have had a larger rank
            values[: len(new)] = new
        return moved


class Adapters:
    """The adapters that a network computes with at present.

    network  shares the given one's weights. Its blocks run neither compiled nor in packages, and their layers' products
             are not joined with what follows them, so that the given network's own speed and results stay as they are
    """

    def __init__(self, network: PSUNet | UViT):
        shared = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
        self.network, self._current = deepcopy(network, shared), _Current()
        self._places: list[Adapter | None] = [None]
        self._layers: dict[str, AdaptedLinear] = {}
        weight = next(network.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        for name in layer_names(self.network):
            path, _, layer = name.rpartition(".")
            block = self.network.get_submodule(path)
            for replaced in ("forward", "_hidden"):  # by a package; by a product of packed weights, joined with GELU
                block.__dict__.pop(replaced, None)
            self._layers[name] = AdaptedLinear(getattr(block, layer), self._current)
            setattr(block, layer, self._layers[name])

    def of_rows(self, rows: AdapterRows) -> PSUNet | UViT:
        """The network for a forward of these rows."""
        self._current.rows = rows
        return self.network

    def place(self, wanted: Sequence[Adapter | None]) -> tuple[list[int], bool]:
        """The places of these adapters, which are put there where needed in place of others; None has place 0.

        Returns also whether memory has moved: graphs that were captured with it cannot be replayed.
        """
        needed, moved = {adapter for adapter in wanted if adapter is not None}, False
        for adapter in needed - {*self._places}:
            free = [i for i, other in enumerate(self._places) if i and other not in needed]
            place = free[0] if free else len(self._places)
            if not free:
                self._places += [None] * max(PLACES, len(self._places))
            for name, layer in self._layers.items():
                if name in adapter.layers:
                    a, b = (x.to(self._device, self._dtype) for x in adapter.layers[name])
                    moved |= layer.put(place, len(self._places), a, b)
                elif layer.a is not None and layer.b is not None:
                    moved |= layer.put(place, len(self._places), layer.a[0], layer.b[0])  # zeros
            self._places[place] = adapter
        return [0 if adapter is None else self._places.index(adapter) for adapter in wanted], moved

    def clear(self) -> None:
        """Frees the memory of all places."""
        self._places = [None]
        for layer in self._layers.values():
            layer.a = layer.b = None
