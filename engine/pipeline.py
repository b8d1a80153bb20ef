"""`PSUNetPipeline`: the engine's sampling as a pipeline of diffusers.

A pipeline's folder is also a checkpoint of the engine, and a checkpoint of images and texts opens as a pipeline. It
computes in the thread that calls it, step by step; `Engine` captures steps on a GPU, and shares them between callers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from engine.checkpoint import BUILT_IN, Checkpoint, load
from engine.codecs.autoencoder import AUTOENCODERS
from engine.codecs.codec import Codec
from engine.codecs.image import ImageCodec, unpatchify
from engine.codecs.text import TextCodec
from engine.config import Config
from engine.decoding import on_arrival
from engine.errors import InputError
from engine.files import write_atomically
from engine.hub import local_folder
from engine.model.denoiser import Denoiser
from engine.pipeline_components import PSUNetLoraMixin, PSUNetModel, PSUNetScheduler, WordTokenizer
from engine.pipeline_values import (
    TENSOR_INPUTS,
    Images,
    broadcast,
    changed_latents,
    check_call,
    images_as,
    listed_images,
    refused,
    seeds_of,
)
from engine.preparation import PreparedRequest, prepare
from engine.request import Request
from engine.sampling.batch import SampleSpec
from engine.sampling.stepper import SampleSteps, Stepper

# After the components, which import diffusers without warnings.
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, DiffusionPipeline  # isort: skip
from diffusers.utils import BaseOutput  # isort: skip

FOLDERS = {"image": "vae", "text": "tokenizer"}  # of a codec's kind: the component, whose name is that of its folder
OF_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
ARGUMENTS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "mask": "mask_image"}  # by Request's name


@dataclass
class PSUNetPipelineOutput(BaseOutput):
    """What a call returns, one of each for every image, prompt by prompt; None for a modality that the model lacks."""

    images: list[Image] | np.ndarray | Tensor | None  # PIL, [B, S, S, 3] or [B, 3, S, S] in 0…1, latents [B, c, h, w]
    text: list[str] | None


class PSUNetPipeline(DiffusionPipeline, PSUNetLoraMixin):
    """Joint, text-to-image and image-to-text generation and infilling, by what is given in a call.

    transformer, scheduler, vae, tokenizer  see `engine.pipeline_components`
    codecs    of each modality its kind ("image" or "text") and settings, as in a checkpoint's config
    sampling  `engine.config.SamplingConfig` as a mapping
    Raises InputError if they do not fit each other.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "tokenizer"]
    _callback_tensor_inputs = [*TENSOR_INPUTS]

    def __init__(
        self,
        transformer: PSUNetModel,
        scheduler: PSUNetScheduler,
        vae: AutoencoderDC | AutoencoderKL | AutoencoderTiny | None = None,
        tokenizer: WordTokenizer | None = None,
        codecs: dict | None = None,
        sampling: dict | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, tokenizer=tokenizer)
        self.register_to_config(codecs=codecs, sampling=sampling)
        self._interrupt, self._num_timesteps, self._guidance_scale = False, 0, None
        if not codecs:
            raise InputError("codecs", codecs, "give the kind and the settings of each modality's codec")
        for name, codec in self.engine_config.codecs.items():
            if codec.kind not in FOLDERS or getattr(self, FOLDERS[codec.kind]) is None:
                remedy = f"give codecs of {', '.join(FOLDERS)}, and their vae and tokenizer"
                raise InputError("codecs", name, remedy, "has no component")

    # ------------------------------------------------------------------------------------------ folders

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike | None = None, **kwargs) -> "PSUNetPipeline":
        """Opens a pipeline's folder or a checkpoint of the engine, a path or "owner/name" on the hub.

        None    the built-in checkpoint
        kwargs  of a pipeline's folder those of `DiffusionPipeline.from_pretrained`; of a checkpoint components to use
                instead, dtype (or torch_dtype, default float32), and those of the download
        Raises InputError.
        """
        hub = {key: value for key in OF_HUB if (value := kwargs.pop(key, None)) is not None}
        source = BUILT_IN if pretrained_model_name_or_path is None else pretrained_model_name_or_path
        folder = local_folder(source, variants=kwargs.get("variant") is not None, **hub)
        if (folder / cls.config_name).is_file():
            with refused("checkpoint", source, "save the pipeline again", "cannot be opened"):
                pipe = super().from_pretrained(folder, **{**kwargs, "use_safetensors": True})
        else:
            pipe = cls._from_checkpoint(load(folder), **kwargs)
        pipe.register_to_config(_name_or_path=str(source))
        return pipe

    @classmethod
    def _from_checkpoint(cls, loaded: Checkpoint, **kwargs) -> "PSUNetPipeline":
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or torch.float32
        if not isinstance(dtype, Mapping):
            dtype = {"default": dtype}
        dtypes = {name: dtype.get(name, dtype.get("default", torch.float32)) for name in ("transformer", "vae")}
        for value in dtypes.values():
            if not isinstance(value, torch.dtype) or not value.is_floating_point:
                raise InputError("torch_dtype", value, "use torch.float32, torch.bfloat16 or torch.float16")
        config = loaded.config
        components = {
            "transformer": PSUNetModel.from_network(loaded.network.to(dtypes["transformer"])),
            "scheduler": PSUNetScheduler(**asdict(config.diffusion)),
        }
        for name, saved in config.codecs.items():
            component, folders = FOLDERS.get(saved.kind), {_folder(config, n) for n in _named(config, saved.kind)}
            if component is None or len(folders) > 1:
                remedy = "use Engine.from_pretrained; a pipeline has one vae and one tokenizer"
                raise InputError("checkpoint", loaded.folder, remedy, f"has another codec for {name}")
            if component not in components and component not in kwargs:
                codec = loaded.codec(name)
                if component == "tokenizer":
                    components[component] = WordTokenizer(codec.vocabulary, codec.vectors)
                else:  # not its own `to`, which warns about layers that it does not have
                    autoencoder = torch.nn.Module.to(codec.autoencoder, dtypes[component])
                    components[component] = autoencoder.requires_grad_(True)
        for key in [key for key in kwargs if key in ("transformer", "scheduler", *FOLDERS.values())]:
            components[key] = kwargs.pop(key)
        for key in ("use_safetensors", "low_cpu_mem_usage"):  # both always apply
            kwargs.pop(key, None)
        if kwargs:
            key, value = next(iter(kwargs.items()))
            remedy = "save the pipeline with save_pretrained, and give it with that folder"
            raise InputError(key, value, remedy, "is not for a checkpoint of engine.train")
        codecs = {name: {"kind": codec.kind, **codec.settings} for name, codec in config.codecs.items()}
        return cls(**components, codecs=codecs, sampling=asdict(config.sampling))

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs) -> None:
        """Writes the pipeline's folder, and a config.json with which it is a checkpoint of the engine too.

        Arguments are those of `DiffusionPipeline.save_pretrained`; the engine reads weights without a `variant` only.
        Raises InputError about "save_directory".
        """
        if any(".lora_" in name for name in self.transformer.state_dict()):
            remedy = "call unload_lora_weights first; save_lora_weights writes them"
            raise InputError("transformer", type(self.transformer).__name__, remedy, "has LoRA layers")
        config = self.engine_config
        codecs = {name: replace(codec, folder=FOLDERS[codec.kind]) for name, codec in config.codecs.items()}
        text = json.dumps(replace(config, codecs=codecs).to_dict(), indent=2) + "\n"
        with refused("save_directory", save_directory, "give another folder", "cannot be written"):
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.json", lambda path: path.write_text(text))
            super().save_pretrained(str(folder), *args, **kwargs)

    @property
    def engine_config(self) -> Config:
        """The components' configs as that of a checkpoint; raises InputError."""
        model = {key: value for key, value in self.transformer.config.items() if not key.startswith("_")}
        diffusion = asdict(self.scheduler.diffusion)
        codecs, sampling = self.config.codecs or {}, self.config.sampling or {}
        return Config.from_dict({"model": model, "diffusion": diffusion, "codecs": codecs, "sampling": sampling})

    # ------------------------------------------------------------------------------------------ sampling

    @property
    def guidance_scale(self) -> float | None:
        """Of the present call, or the last one; None: the checkpoint's default for the task."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the present call, or the last one: `num_inference_steps` for each modality of an order."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which ends the call after this step, with its states."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Images | Sequence[Images] | None = None,
        mask_image: Images | Sequence[Images] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        callback_on_step_end: Callable[["PSUNetPipeline", int, int, dict], dict | None] | None = None,
        return_dict: bool = True,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PSUNetPipelineOutput | tuple:
        """Generates what is not given.

        prompt, image, mask_image  one or a batch of each; `_` in a prompt is one word to be filled in, white in a mask
            what is regenerated, see `Request`. Arrays and tensors as in `engine.pipeline_values.listed_images`
        num_inference_steps        of the solver, for each modality where one is generated after the other
        guidance_scale             1 disables guidance; None: the checkpoint's default for the task
        generator                  one for all images or a list of one for each, see `engine.pipeline_values.seeds_of`:
            one fresh from `manual_seed(s)` gives the images of `Request(seed=s)` with the scheduler's solver
        output_type                of images: "pil", "np", "pt" or "latent"
        callback_on_step_end       called as (pipeline, step, time, {"latents": [B, N]}) with the packed states of all
            images; states that it returns, or changes, take their place. It may set `pipeline._interrupt`
        return_dict                False: the tuple (images, text)
        Raises InputError about an argument, and FloatingPointError if an image comes out as NaN or infinity.
        """
        check_call(num_images_per_prompt, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        config, codecs = self.engine_config, self._codecs()
        prompts = prompt if prompt is None or isinstance(prompt, list | tuple) else [prompt]
        given = {"prompt": prompts, "image": listed_images(image, "image")}
        given["mask"] = listed_images(mask_image, "mask_image")
        how = {"steps": num_inference_steps, "guidance": guidance_scale, "solver": self.scheduler.config.solver}
        try:
            requests = [Request(**of_one, **how, eta=self.scheduler.config.eta) for of_one in broadcast(given)]
            prepared = [prepare(request, config, codecs, can_cache=False) for request in requests]
        except InputError as error:
            argument = ARGUMENTS.get(error.argument, error.argument)
            raise InputError(argument, error.value, error.remedy, error.problem) from None
        of_images = [p for p in prepared for _ in range(num_images_per_prompt)]
        seeds = seeds_of(generator, len(of_images))
        known = self._encode(prepared, codecs).repeat_interleave(num_images_per_prompt, 0)  # [B, N]
        arrivals = {id(p): on_arrival(p, codecs) for p in prepared}
        specs = [
            SampleSpec(seed, p.table, p.generate, values, on_arrival=arrivals[id(p)])
            for seed, p, values in zip(seeds, of_images, known, strict=True)
        ]
        self._guidance_scale, self._interrupt = guidance_scale, False
        inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        states = self._denoise(specs, callback_on_step_end, inputs)  # [B, N]
        images, text = self._decode(states, of_images, seeds, codecs, output_type)
        self.maybe_free_model_hooks()
        return PSUNetPipelineOutput(images, text) if return_dict else (images, text)

    def _codecs(self) -> dict[str, Codec]:
        """The components as codecs, by modality."""
        config, codecs = self.engine_config, {}
        for m in config.model.modalities:
            codec = config.codecs[m.name]
            if codec.kind == "text":
                codecs[m.name] = TextCodec(self.tokenizer.vocabulary, self.tokenizer.vectors, m.tokens)
            elif type(self.vae).__name__ not in AUTOENCODERS:
                raise InputError("vae", type(self.vae).__name__, f"use one of {', '.join(AUTOENCODERS)}")
            else:
                codecs[m.name] = ImageCodec(self.vae, **codec.settings, device=self._execution_device)
            found = codecs[m.name].tokens, codecs[m.name].channels
            if found != (m.tokens, m.channels):
                problem = f"makes {found[0]} tokens of {found[1]} channels of {m.name}"
                remedy = f"use one that fits the transformer, which takes {m.tokens} of {m.channels}"
                raise InputError(FOLDERS[codec.kind], type(self.vae).__name__, remedy, problem)
        return codecs

    def _encode(self, prepared: list[PreparedRequest], codecs: Mapping[str, Codec]) -> Tensor:
        """Known values, packed, [P, N] float32 on the CPU; zero where nothing is given."""
        parts, config = [], self.engine_config
        for m in config.model.modalities:
            values = torch.zeros(len(prepared), m.tokens, m.channels)
            partly = [i for i, p in enumerate(prepared) if not p.given[m.name].generate.all()]
            if partly:
                if config.codecs[m.name].kind == "image":
                    _bring_to_its_device(self.vae)
                values[partly] = codecs[m.name].encode([prepared[i].given[m.name] for i in partly])
            parts.append(values.flatten(1))
        return torch.cat(parts, dim=1)

    def _denoise(self, specs: list[SampleSpec], callback: Callable | None, tensor_inputs: Sequence[str]) -> Tensor:
        """The final states of samples, or after an interrupt those of its step, [B, N] float32 on the CPU."""
        config = self.engine_config
        _bring_to_its_device(self.transformer)
        denoiser = Denoiser(self.transformer.network, config.diffusion.timesteps)
        buckets = range(1, len(specs) + 1)
        steps = SampleSteps(Stepper(denoiser, config.model, self._execution_device, buckets=buckets), specs)
        self._num_timesteps = steps.count
        with self.progress_bar(total=steps.count) as bar:
            for i in range(steps.count):
                time = steps.compute()
                if callback is not None:
                    states = steps.states()
                    offered = {"latents": states.clone()} if "latents" in tensor_inputs else {}
                    changed = changed_latents(callback(self, i, time, offered), offered, states)
                    if not torch.equal(changed, states):
                        steps.change(changed)
                bar.update()
                if self._interrupt:
                    break
                steps.advance()
        generate, known = (torch.stack([getattr(spec, key) for spec in specs]) for key in ("generate", "known"))
        return torch.where(generate, steps.states().cpu(), known)

    def _decode(
        self, states: Tensor, of_images: list[PreparedRequest], seeds: list[int], codecs: Mapping, output_type: str
    ) -> tuple:
        """(images, text) of final states [B, N]; None for a modality that the model lacks."""
        config, outputs = self.engine_config, {}
        for kind in FOLDERS:
            named = _named(config, kind)
            if not named:
                continue
            name = kind if kind in named else named[0]
            m, codec, given = config.model.modality(name), codecs[name], [p.given[name] for p in of_images]
            tokens = states[:, config.model.state_slices[name]].unflatten(1, (m.tokens, m.channels))  # [B, L, C]
            if kind == "text":
                outputs[kind] = [decoded.value for decoded in codec.decode(tokens, given)]
                finite = [text is not None for text in outputs[kind]]
            elif output_type == "latent":
                outputs[kind] = unpatchify(tokens, codec.patch)  # [B, c, h, w]
                finite = outputs[kind].isfinite().flatten(1).all(1).tolist()
            else:
                _bring_to_its_device(self.vae)
                outputs[kind] = torch.stack(codec.decode_images(tokens, given))  # [B, 3, S, S]
                finite = outputs[kind].isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                i = finite.index(False)
                remedy = "use less guidance, or torch.float32"
                raise FloatingPointError(f"the {kind} of image {i} (seed {seeds[i]}) is NaN or infinite; {remedy}")
        if "image" in outputs and output_type != "latent":
            outputs["image"] = images_as(outputs["image"], output_type)
        return outputs.get("image"), outputs.get("text")


def _bring_to_its_device(component: torch.nn.Module) -> None:
    """Of weights that `enable_model_cpu_offload` keeps on the CPU until `forward`, which is not what is called here."""
    hook = getattr(component, "_hf_hook", None)
    if hasattr(hook, "pre_forward"):
        hook.pre_forward(component)


def _named(config: Config, kind: str) -> list[str]:
    """The modalities with a codec of this kind."""
    return [name for name, codec in config.codecs.items() if codec.kind == kind]


def _folder(config: Config, name: str) -> str:
    return config.codecs[name].folder or name
