"""What `engine.pipeline.PSUNetPipeline` consists of, as components that diffusers saves and loads.

transformer  PSUNetModel, the network
scheduler    PSUNetScheduler, the diffusion that it was trained to undo, and the solver
tokenizer    WordTokenizer, words and their vectors
vae          an autoencoder of diffusers
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from engine.adapters import CONFIG, fingerprint, read_adapter
from engine.checkpoint import PIPELINE_PREFIX
from engine.codecs.autoencoder import AUTOENCODERS
from engine.codecs.diffusers_import import import_diffusers
from engine.codecs.text import TextCodec, read_vocabulary
from engine.config import DiffusionConfig, ModelConfig
from engine.errors import InputError
from engine.model.denoiser import build
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT
from engine.request import Request

import_diffusers("DiffusionPipeline", "SchedulerMixin", *AUTOENCODERS)  # so that the next lines print no warnings

from diffusers import ConfigMixin, ModelMixin, SchedulerMixin  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.loaders import PeftAdapterMixin  # noqa: E402
from diffusers.loaders.lora_base import LoraBaseMixin  # noqa: E402
from diffusers.utils import BaseOutput  # noqa: E402


@dataclass
class PSUNetModelOutput(BaseOutput):
    """What `PSUNetModel` returns."""

    sample: Tensor  # [R, N] the prediction: noise or v, as the scheduler's config says, of categories x̂0


class PSUNetModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A PS-U-Net, or with `uvit` a U-ViT, as a model of diffusers; its config is that of `engine.config.ModelConfig`.

    The network itself is `network`, under whose names, after "network.", the weights are saved.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["Block"]
    _no_split_modules = ["Block"]
    # These layers' weights are read outside the layers' own forward, where no hook casts them.
    _skip_layerwise_casting_patterns = ["time", "embed", "norm"]

    @register_to_config
    def __init__(
        self,
        modalities: Sequence[Mapping],
        shared_depth: int,
        dim: int,
        head_dim: int = 64,
        mlp_ratio: int = 4,
        time_conditioning: str = "adaln",
        uvit: Mapping | None = None,
    ):
        super().__init__()
        self.network = build(self.model_config)

    @classmethod
    def from_network(cls, network: PSUNet | UViT) -> "PSUNetModel":
        """Around a network of the engine, whose weights it shares."""
        with torch.device("meta"):
            model = cls(**asdict(network.config))
        model.network = network.requires_grad_(True)
        return model.eval()

    @property
    def model_config(self) -> ModelConfig:
        """The config as the engine has it; raises InputError."""
        return ModelConfig.from_dict({key: value for key, value in self.config.items() if not key.startswith("_")})

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True
    ) -> PSUNetModelOutput | tuple[Tensor]:
        """Predicts the noise (or v) of every element.

        sample    [R, N] packed state of all modalities
        timestep  0, clean, to N, pure noise: of all, of each row [R] or of each token [R, L]
        """
        times = torch.as_tensor(timestep, device=sample.device)
        times = times[:, None] if times.ndim == 1 else times
        times = times.expand(len(sample), self.network.config.tokens)  # [R, L]
        values, index = times.unique(return_inverse=True)  # [T] ascending, [R, L]
        prediction = self.network(sample, self.network.time_table(values), index.int())  # [R, N]
        return PSUNetModelOutput(prediction) if return_dict else (prediction,)


class PSUNetScheduler(SchedulerMixin, ConfigMixin):
    """The diffusion that the network was trained to undo, as `engine.config.DiffusionConfig`, and how it is solved.

    solver, eta  as in `Request`: `PSUNetScheduler.from_config(pipe.scheduler.config, solver="ddim", eta=1.0)`
    Raises InputError.
    """

    @register_to_config
    def __init__(
        self,
        schedule: str = "scaled_linear",
        timesteps: int = 1000,
        prediction: str = "epsilon",
        conditioning: str = "renoise",
        time_sampling: str = "shared",
        solver: str = "dpm++",
        eta: float = 0.0,
    ):
        self.diffusion = DiffusionConfig(schedule, timesteps, prediction, conditioning, time_sampling)
        Request(solver=solver, eta=eta)  # checks both


class WordTokenizer(SchedulerMixin):
    """A vocabulary and its word vectors, in the files of `engine.codecs.text.TextCodec`.

    diffusers saves and loads components of a few base classes only. This one is a scheduler because it must not be a
    network: the vectors stay float32 on the CPU wherever the pipeline is moved.

    vocabulary  V distinct words; the first is "</s>"
    vectors     [V, C] float32
    """

    def __init__(self, vocabulary: Sequence[str], vectors: Tensor):
        self.vocabulary, self.vectors = tuple(vocabulary), vectors

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, subfolder: str | None = None, **kwargs
    ) -> "WordTokenizer":
        """From a folder; other arguments are not used. Raises InputError about "checkpoint", naming the file."""
        return cls(*read_vocabulary(Path(pretrained_model_name_or_path, subfolder or "")))

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes what `from_pretrained` reads; a pipeline pushes the whole folder."""
        TextCodec(self.vocabulary, self.vectors).save(save_directory)


class PSUNetLoraMixin(LoraBaseMixin):
    """LoRA layers of a pipeline's transformer; all of it needs peft. Only safetensors are read."""

    _lora_loadable_modules = ["transformer"]

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | PathLike | dict, adapter_name: str | None = None, **kwargs
    ) -> None:
        """Adds layers that `save_lora_weights` wrote, from a folder, a file, the hub or a state dict.

        A folder that engine.train --lora or peft wrote is taken too; raises InputError if it does not fit the model, or
        says that it is of other weights than the transformer's (compared in float32 and float16).
        kwargs  of `PeftAdapterMixin.load_lora_adapter`
        """
        source, kwargs = pretrained_model_name_or_path_or_dict, {**kwargs, "use_safetensors": True, "_pipeline": self}
        if not isinstance(source, str | PathLike | dict):
            raise InputError("adapter", source, "give a folder, a file or a state dict", "does not hold LoRA layers")
        before = {*getattr(self.transformer, "peft_config", ())}
        if isinstance(source, str | PathLike) and (Path(source) / CONFIG).is_file():
            layers = read_adapter(source, self.transformer.model_config, self._fingerprint()).layers
            source = {}
            for name, pair in layers.items():
                for part, tensor in zip("AB", pair, strict=True):
                    source[f"transformer.{PIPELINE_PREFIX}{name}.lora_{part}.weight"] = tensor
        self.transformer.load_lora_adapter(source, adapter_name=adapter_name, **kwargs)
        if {*getattr(self.transformer, "peft_config", ())} == before:  # diffusers only logs it
            remedy = "give a folder of engine.train --lora or peft, or what save_lora_weights wrote"
            raise InputError(
                "adapter", pretrained_model_name_or_path_or_dict, remedy, "has no layers of the transformer"
            )

    def fuse_lora(self, components: Sequence[str] = ("transformer",), *args, **kwargs) -> None:
        """As in diffusers: adds the layers to the weights."""
        super().fuse_lora([*components], *args, **kwargs)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",), **kwargs) -> None:
        """As in diffusers: undoes `fuse_lora`."""
        super().unfuse_lora([*components], **kwargs)

    def _fingerprint(self) -> str | None:
        """Of the transformer's weights without LoRA layers; None where they are not those of a checkpoint."""
        named = self.transformer.network.state_dict().items()
        weights = {name.replace(".base_layer.", "."): weight for name, weight in named if ".lora_" not in name}
        rounded = {weight.dtype for weight in weights.values()} - {torch.float32, torch.float16}
        offloaded = any(weight.is_meta for weight in weights.values())
        return None if rounded or offloaded or self.num_fused_loras else fingerprint(weights)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | PathLike,
        transformer_lora_layers: Mapping[str, Tensor],
        weight_name: str | None = None,
    ) -> None:
        """Writes layers, by name as `peft.get_peft_model_state_dict` gives them."""
        cls._save_lora_weights(save_directory, {"transformer": transformer_lora_layers}, {}, weight_name=weight_name)
