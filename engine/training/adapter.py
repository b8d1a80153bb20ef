"""LoRA training: peft puts adapters around the linear layers of a network's blocks, and they alone are trained."""

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from engine.adapters import save_tensors_of
from engine.model.lora import Adapter, layer_names, merged
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT

INSTALL = "pip install 'psunet-engine[lora]'"


def require_peft() -> None:
    """Raises ModuleNotFoundError, saying what to install."""
    if find_spec("peft") is None:
        raise ModuleNotFoundError(f"peft, which makes the adapters, is not installed; use {INSTALL}")


@dataclass(frozen=True)
class Lora:
    """The adapters of a run."""

    rank: int
    alpha: float
    base: str  # the checkpoint that they are for
    fingerprint: str  # of its weights


class TrainedAdapter:
    """The adapter of a network in training.

    network  becomes the adapted network, in place; its own weights are no longer trained
    """

    def __init__(self, network: PSUNet | UViT, lora: Lora):
        import peft

        self._weights, self._scaling = network.state_dict(), lora.alpha / lora.rank  # before layers are renamed
        self._base = lora.fingerprint
        self._config = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=layer_names(network), base_model_name_or_path=lora.base
        )
        network.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the network, whose class is not one of transformers
            peft.inject_adapter_in_model(self._config, network)
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._names = [name.replace(".default.", ".") for name in named]  # of A and B of each layer
        self.parameters = nn.ParameterList(named.values())

    def save(self, folder: Path, values: nn.ParameterList) -> dict[str, Tensor]:
        """Writes a folder that `engine.adapters` and peft read; values of `parameters`, such as their average.

        Returns the network's weights with them added, under the names that they have without adapters.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._config.save_pretrained(str(folder))
        named, layers = dict(zip(self._names, (value.detach() for value in values), strict=True)), {}
        save_tensors_of(folder, named, self._base)
        for name in sorted({name.rpartition(".lora_")[0] for name in named}):
            a, b = (named[f"{name}.lora_{part}.weight"] for part in "AB")
            layers[name] = a, self._scaling * b
        return merged(self._weights, Adapter(layers))
