"""Folders of diffusers autoencoders: described by their config.json alone, built when they are needed.

diffusers is imported when an autoencoder is built, never before: its import takes longer than a short sampling run. A
decoder that was compiled (`engine.packages`) does not need it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.codecs.diffusers_import import import_diffusers
from engine.compiled import entry
from engine.config import MAX_BLOCKS, MAX_CHANNELS
from engine.errors import InputError, shown
from engine.files import all_finite, is_folder, read_json, save_tensors, shape_difference, unreadable
from engine.packages import Source

# The classes that can be used, with diffusers' defaults of what `LatentSpace` reads: a config.json may leave these out.
AUTOENCODERS: dict[str, dict] = {
    "AutoencoderTiny": {
        "latent_channels": 4, "encoder_block_out_channels": (64,) * 4, "scaling_factor": 1.0, "shift_factor": 0.0,
    },
    "AutoencoderKL": {
        "latent_channels": 4, "block_out_channels": (64,), "scaling_factor": 0.18215, "shift_factor": None,
    },
    "AutoencoderDC": {
        "latent_channels": 32, "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024), "scaling_factor": 1.0,
    },
}  # fmt: skip
MAX_LEVELS = 16  # of an autoencoder's resolutions, far above all that exist
# The keys of the three classes that size their layers, and those that count layers: of all levels alike, or of each.
SIZES = (
    "in_channels", "out_channels", "latent_channels", "block_out_channels", "encoder_block_out_channels",
    "decoder_block_out_channels", "norm_num_groups", "attention_head_dim", "upsampling_scaling_factor",
    "encoder_qkv_multiscales", "decoder_qkv_multiscales",
)  # fmt: skip
LAYERS = (
    "layers_per_block", "num_encoder_blocks", "num_decoder_blocks", "encoder_layers_per_block",
    "decoder_layers_per_block",
)  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"
REMEDY = "copy the autoencoder folder again"


@dataclass(frozen=True)
class LatentSpace:
    """What must be known of an autoencoder to count tokens and to scale latents to about unit variance."""

    channels: int
    factor: int  # pixels a side of one latent
    scale: float
    shift: float

    @classmethod
    def of(cls, config: Mapping, kind: str) -> "LatentSpace":
        """From the config of a diffusers class; raises InputError about the key that cannot be used."""
        config = {**AUTOENCODERS[kind], **config}
        for key, lowest in (("scaling_factor", 1e-6), ("shift_factor", -1e6)):
            value = config.get(key)
            # None is diffusers' for neither; a scale of 0 would undo all latents. NaN is refused too.
            if value is not None and not (_is_number(value) and lowest <= value <= 1e6):
                raise InputError(key, value, f"use a number from {lowest:g} to {1e6:g}")
        # AutoencoderDC and AutoencoderTiny name the encoder's widths, AutoencoderKL has one list for both sides.
        key = "encoder_block_out_channels" if "encoder_block_out_channels" in config else "block_out_channels"
        widths, channels = config[key], config["latent_channels"]
        if not (isinstance(widths, list | tuple) and 1 <= len(widths) <= MAX_LEVELS):
            raise InputError(key, widths, f"give a list of 1 to {MAX_LEVELS} widths")
        if not (isinstance(channels, int) and _is_number(channels) and 1 <= channels <= MAX_CHANNELS):
            raise InputError("latent_channels", channels, f"use a whole number from 1 to {MAX_CHANNELS}")
        factor = 2 ** (len(widths) - 1)  # every level but one halves the resolution
        return cls(channels, factor, config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0)


@dataclass(frozen=True)
class SavedAutoencoder:
    """An autoencoder in a folder, or on the Hugging Face hub, that is not built yet."""

    source: Path | str  # a folder, or a hub id
    config: Mapping  # its config.json
    latents: LatentSpace

    @classmethod
    def open(cls, source: str | Path) -> "SavedAutoencoder":
        """Reads config.json of a local folder or, if that does not exist, of a model on the hub.

        Raises InputError about "checkpoint", naming the file.
        """
        if is_folder(source, "checkpoint"):
            source = Path(source)
            file = source / "config.json"
            config = read_json(file, "checkpoint", "give the folder of a diffusers autoencoder", REMEDY)
        else:
            file, config = source, _hub_config(str(source))
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if not isinstance(kind, str) or kind not in AUTOENCODERS:
            remedy = f"use one of {', '.join(AUTOENCODERS)}"
            raise InputError("checkpoint", file, remedy, f"describes a {shown(kind)}")
        try:
            latents = LatentSpace.of(config, kind)
            _check_sizes(config)
        except InputError as error:
            problem = f"has {error.argument} {shown(error.value)}, which cannot be used"
            raise InputError("checkpoint", file, error.remedy, problem) from None
        return cls(source, config, latents)

    def build(self) -> nn.Module:
        """The autoencoder in float32 on the CPU; raises InputError about "checkpoint" naming a damaged file."""
        name = self.config["_class_name"]
        kind = autoencoder_class(name)
        if isinstance(self.source, str):
            try:
                return kind.from_pretrained(self.source, use_safetensors=True, low_cpu_mem_usage=False).float()
            except (OSError, ValueError) as error:
                remedy = "give the folder of a diffusers autoencoder"
                raise InputError("checkpoint", self.source, remedy, f"cannot be downloaded ({error})") from None
        path = self.source / WEIGHTS
        try:
            # Only known parameters: some diffusers classes save more than these, and then warn about it.
            known = inspect.signature(kind.__init__).parameters
            with torch.device("meta"):  # no memory is taken until the file is known to have these weights
                autoencoder = kind.from_config({key: value for key, value in self.config.items() if key in known})
        except Exception as error:  # diffusers and PyTorch raise nearly all kinds
            problem = f"does not describe a working {name} ({error})"
            raise InputError("checkpoint", self.source / "config.json", REMEDY, problem) from None
        with _open_weights(path) as file:
            names = list(file.keys())
            shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
            difference = shape_difference(autoencoder.state_dict(), shapes)
            if difference:
                problem = f"has weights that do not fit its config.json: {difference}"
                raise InputError("checkpoint", self.source, REMEDY, problem)
        autoencoder.load_state_dict(_finite_weights(path), assign=True)
        return autoencoder.float()

    def packaged_decoder(self, side: int, build: bool = False) -> Callable[[Tensor], Tensor] | None:
        """The decoder of latents [B, c, side, side] float32 → [B, 3, S, S], as a package, without diffusers.

        None where there is no package and none is to be built (`build`), or none can be kept. Raises as `self.build`.
        """
        if isinstance(self.source, str):
            return None
        with _open_weights(self.source / WEIGHTS) as file:
            names = [name for name in file.keys() if not name.startswith(("encoder.", "quant_"))]  # noqa: SIM118
            shapes = {name: file.get_slice(name).get_shape() for name in names}
        source = Source(
            name="decoder",
            module=lambda: _Decoder(self.build().eval().requires_grad_(False)),
            weights={f"autoencoder.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()},
            inputs=(torch.zeros(2, self.latents.channels, side, side),),
            dynamic=({0: "images"},),
            settings={"config": dict(self.config), "diffusers": version("diffusers")},
        )
        package = entry(source, build)
        if package is None:
            return None
        weights = _finite_weights(self.source / WEIGHTS)
        return package.bind({f"autoencoder.{name}": weights[name].float() for name in names})


class _Decoder(nn.Module):
    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents).sample


def autoencoder_class(name: str):
    """A class of diffusers; see `import_diffusers`."""
    return getattr(import_diffusers(name), name)


def save_autoencoder(autoencoder: nn.Module, folder: str | Path, dtype) -> None:
    """Writes a diffusers folder (`config.json`, `diffusion_pytorch_model.safetensors`), weights in `dtype`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder.save_config(folder)
    save_tensors(folder / WEIGHTS, {name: w.to(dtype) for name, w in autoencoder.state_dict().items()})


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hub_config(name: str) -> dict:
    kind = autoencoder_class("AutoencoderKL")  # outside the try: a failed import is not a failed download
    try:
        return kind.load_config(name)
    except (OSError, ValueError) as error:
        problem = "is neither a folder nor a model that can be downloaded"
        raise InputError("checkpoint", name, "give the folder of a diffusers autoencoder", problem) from error


def _check_sizes(config: Mapping) -> None:
    """Raises InputError about the key of a config that describes what cannot be built, or only in hours.

    Keys that are left out have diffusers' defaults. Values of other types are left for diffusers to refuse.
    """
    for key in SIZES + LAYERS:
        _check_numbers(key, config.get(key, 0))
    for key, only in (("in_channels", 3), ("out_channels", 3), ("upsampling_scaling_factor", 2)):
        if config.get(key, only) != only:
            raise InputError(key, config[key], f"use {only}")
    encoder, decoder = (_length(config.get(f"{side}_block_out_channels")) for side in ("encoder", "decoder"))
    if encoder != decoder and decoder:
        key = "decoder_block_out_channels"
        raise InputError(key, config[key], "use as many as encoder_block_out_channels has")
    layers = 0  # of both sides
    for key in LAYERS:
        value = config.get(key, 0)
        if isinstance(value, list):
            layers += sum(n for n in value if isinstance(n, int))
        elif isinstance(value, int):
            layers += 2 * value * _length(config.get("block_out_channels"))
        if layers > MAX_BLOCKS:
            raise InputError(key, value, f"use at most {MAX_BLOCKS} layers in all")


def _check_numbers(key: str, value) -> None:
    """Raises InputError for a whole number, or one in a list or a list of lists, that cannot be the size of a layer."""
    if isinstance(value, list):
        if len(value) > MAX_LEVELS:
            raise InputError(key, value, f"give at most {MAX_LEVELS} values")
        for part in value:
            _check_numbers(key, part)
    elif isinstance(value, int) and not 0 <= value <= MAX_CHANNELS:
        raise InputError(key, value, f"use whole numbers from 0 to {MAX_CHANNELS}")


def _length(value) -> int:
    return len(value) if isinstance(value, list) else 0


def _finite_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file; raises InputError about "checkpoint" where it is damaged or they are not finite."""
    with _open_weights(path) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if not all_finite(weights):
        raise InputError("checkpoint", path, REMEDY, "holds values that are not finite floats of 16 bits or more")
    return weights


@contextmanager
def _open_weights(path: Path) -> Iterator[safe_open]:
    """A safetensors file; raises InputError about "checkpoint" where it cannot be opened or read."""
    try:
        with open(path, "rb"), safe_open(path, "pt") as file:  # open tells why a file cannot be opened
            yield file
    except OSError as error:
        raise unreadable("checkpoint", path, error, "give the folder of a diffusers autoencoder") from None
    except SafetensorError as error:
        raise InputError("checkpoint", path, REMEDY, f"is damaged or truncated ({error})") from None
