"""LoRA adapters of random weights, written as peft writes them, without peft."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine import checkpoint
from engine.adapters import BASE, CONFIG, PREFIX, WEIGHTS, fingerprint
from engine.model.lora import layer_shapes


def write_adapter(folder: Path, source: Path, rank: int = 2, seed: int = 0, layers=("qkv", "fc1", "skip"), **config):
    """An adapter of a checkpoint, strong enough to change every sample."""
    network, generator, tensors = checkpoint.load(source).network, torch.Generator().manual_seed(seed), {}
    for name, (out, width) in layer_shapes(network).items():
        if name.rpartition(".")[2] in layers:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = 0.2 * torch.randn(rank, width, generator=generator)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = 0.2 * torch.randn(out, rank, generator=generator)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **config}))
    save_file(tensors, folder / WEIGHTS, {BASE: fingerprint(network.state_dict())})
    return folder
