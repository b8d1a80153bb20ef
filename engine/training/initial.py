"""What a denoiser's training starts from: the network of a checkpoint, or published U-ViT weights."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from engine import checkpoint
from engine.config import Config, ModelConfig
from engine.errors import InputError, errors_named
from engine.files import is_file
from engine.model.convert import initialise_from, load_uvit, not_copied, require_same_blocks
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT
from engine.presets import with_categories
from engine.training.options import image_and_text, kind_and_settings

REMEDY = "use the preset of its shape; a text-to-image U-ViT can also start a PS-U-Net of its width"


def initial_network(source: Path, config: Config) -> PSUNet | UViT:
    """The network of a checkpoint folder, or of a file of published U-ViT weights, to start from.

    Raises InputError about `init` if it does not fit the config.
    """
    network = _network_of_file(source, config) if is_file(source, "init") else _network_of_folder(source, config)
    # How many words there are is known only once they are read.
    model, found = with_categories(config.model, 1), with_categories(network.config, 1)
    if model.uvit is None and found.uvit is not None:
        try:
            require_same_blocks(model, found)
        except InputError as error:
            raise InputError("init", source, REMEDY, f"does not fit: {error.value} {error.problem}") from None
    elif _with_common_modalities(found, model) != _with_common_modalities(model, found):
        raise InputError("init", source, REMEDY, f"holds a model with {_difference(found, model)}")
    return network


def start_from(init: PSUNet | UViT, network: PSUNet | UViT) -> list[str]:
    """Copies the weights of `initial_network` into a network of the config; returns what is not copied, a line each."""
    if network.config.uvit is not None or init.config.uvit is None:
        weights, own = init.state_dict(), network.state_dict()
        # Vectors of categories are the codec's; a head for another vocabulary does not fit.
        fits = [n for n in own if n in weights and weights[n].shape == own[n].shape and not n.endswith(".values")]
        network.load_state_dict(own | {name: weights[name] for name in fits})
        _copy_lenders(network, [name for name in own if name not in weights])
        theirs, ours = ([m.name for m in of.config.modalities] for of in (init, network))
        new = [network.config.modality(name) for name in ours if name not in theirs]
        copied = {m.name: f"; it starts as a copy of {m.blocks_of}'s" for m in new if m.blocks_of}
        lacking = [f"branch {m.name}: the checkpoint has none{copied.get(m.name, '')}" for m in new]
        lacking += [f"branch {name} of the checkpoint: the model has none" for name in theirs if name not in ours]
        heads = (name for name in own if name in weights and weights[name].shape != own[name].shape)
        return lacking + [f"{name}: the checkpoint has other words" for name in heads if name.endswith("head.weight")]
    return not_copied(network, init, initialise_from(network, init))


@torch.no_grad()
def _copy_lenders(network: PSUNet | UViT, missing: list[str]) -> None:
    """Copies embedding, positions and head of the branches whose blocks others use to these, where shapes are equal.

    missing  names of the weights that the checkpoint lacks; no others are changed
    """
    weights = network.state_dict()
    for m in network.config.modalities:
        branch = f"branches.{m.name}."
        for name in (n for n in missing if m.blocks_of and n.startswith(branch)):
            lent = weights.get(f"branches.{m.blocks_of}.{name.removeprefix(branch)}")
            if lent is not None and lent.shape == weights[name].shape:
                weights[name].copy_(lent)


def _network_of_file(source: Path, config: Config) -> UViT:
    model, (image, _) = config.model, image_and_text(config)
    if image is None:
        raise InputError("init", source, "give the folder of a checkpoint", "is of a model of images")
    try:  # the number of heads is not in the file: it is the config's
        return load_uvit(source, heads=model.dim // model.head_dim, image_tokens=model.modality(image).tokens)
    except InputError as error:
        if error.argument == "init":
            raise
        problem = f"does not fit: {error.argument} {error.value} {error.problem}"
        raise InputError("init", source, REMEDY, problem) from None


def _network_of_folder(folder: Path, config: Config) -> PSUNet | UViT:
    with errors_named("init"):
        loaded = checkpoint.load(folder)
    # Not their folders: those of a checkpoint that `engine.pipeline` has saved have other names.
    ours, theirs = ({name: kind_and_settings(c) for name, c in of.codecs.items()} for of in (config, loaded.config))
    both = ours.keys() & theirs.keys()
    needed = {name for name in image_and_text(config) if name is not None}
    if not needed <= both or any(ours[name] != theirs[name] for name in both):
        raise InputError("init", folder, "use the preset it was trained with", "has other codecs than the preset")
    return loaded.network


def _with_common_modalities(model: ModelConfig, other: ModelConfig) -> ModelConfig:
    """A PS-U-Net without the modalities that another one lacks, whose branches have no part in the others; in order.

    A U-ViT as it is: its weights are those of all modalities together.
    """
    if model.uvit is not None or other.uvit is not None:
        return model
    names = {m.name for m in other.modalities}
    common = sorted((m for m in model.modalities if m.name in names), key=lambda m: m.name)
    return replace(model, modalities=tuple(common)) if common else model


def _difference(found: ModelConfig, needed: ModelConfig) -> str:
    """The settings in which two models differ, with the values of both."""
    models = []
    for config in (found, needed):
        settings = {m.name: f"{m.tokens} × {m.channels}, depth {m.depth}" for m in config.modalities}
        settings |= {f"{m.name} as categories": bool(m.categories) for m in config.modalities}
        settings |= {f"{m.name} in blocks of": m.blocks_of or m.name for m in config.modalities}
        settings |= {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("modalities", "uvit")}
        models.append(settings | (asdict(config.uvit) if config.uvit else {}))
    keys = [key for key in models[0] | models[1] if models[0].get(key) != models[1].get(key)]
    has, wanted = ("; ".join(f"{key} {model.get(key, 'none')}" for key in keys) for model in models)
    return f"{has}, where the preset has {wanted}"
