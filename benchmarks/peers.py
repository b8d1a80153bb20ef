"""The same network, with the same weights, in other runtimes: OpenVINO, ONNX Runtime, diffusers' UniDiffuserModel.

Nothing of them is imported before it is used: whoever calls gets ImportError where the package is missing.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from importlib import import_module

import torch
from torch import Tensor, nn

from benchmarks.workloads import equal_parameters
from engine.codecs.image import patchify, unpatchify
from engine.config import Modality, ModelConfig, UViTConfig
from engine.model.denoiser import Denoiser
from engine.model.uvit import UViT


class Forward(nn.Module):
    """A denoiser's call as a module of two inputs, which is what exporters take."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.network = denoiser.network
        self.register_buffer("table", denoiser.table)

    def forward(self, inputs: Tensor, times: Tensor) -> Tensor:
        """inputs [R, N], times [R, L] int32 → [R, N]."""
        return self.network(inputs, self.table, times)


class Exported:
    """A denoiser's call on a CPU, float32 and for the shapes of `inputs` only; exported when it is first needed.

    inputs  (packed inputs [R, N], times [R, L] int32), the ones that every call computes with
    """

    def __init__(self, denoiser: Denoiser, inputs: tuple[Tensor, Tensor]):
        self.forward, self.inputs = Forward(denoiser).eval(), inputs
        self.arrays = [x.numpy() for x in inputs]

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        with torch.no_grad():
            return torch.export.export(self.forward, self.inputs)

    @cached_property
    def onnx(self) -> bytes:
        """The ONNX model; raises ImportError without onnx and onnxscript."""
        for package in ("onnx", "onnxscript"):
            import_module(package)
        return torch.onnx.export(self.program, dynamo=True, verbose=False).model_proto.SerializeToString()

    def openvino(self, threads: int, precision: str = "f32") -> Callable[[], Tensor]:
        """A call of OpenVINO's compiled model; precision "f32" or "bf16"."""
        import openvino

        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        model = openvino.Core().compile_model(openvino.convert_model(self.program), "CPU", options)
        request = model.create_infer_request()
        return lambda: torch.from_numpy(request.infer(self.arrays, share_inputs=True, share_outputs=True)[0])

    def onnx_runtime(self, threads: int) -> Callable[[], Tensor]:
        """A call of ONNX Runtime's session."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Its threads would go on spinning after a call, while the next contender is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(self.onnx, options, providers=["CPUExecutionProvider"])
        named = dict(zip((x.name for x in session.get_inputs()), self.arrays, strict=True))
        return lambda: torch.from_numpy(session.run(None, named)[0])


# ------------------------------------------------------------------------------------ diffusers' UniDiffuserModel


def unidiffuser_shape(model: ModelConfig) -> ModelConfig:
    """UniDiffuser's network with a model's width, image and text tokens, and about as many parameters."""
    blocks = equal_parameters(model).shared_depth
    text = model.modality("text")
    clip = Modality("clip_image", 1, text.channels, depth=0)
    modalities = (*(replace(model.modality(name), depth=0) for name in ("image", "text")), clip)
    names = tuple(m.name for m in modalities)
    uvit = UViTConfig(timed=("image", "text"), predicted=names, norm="post", extra_tokens=1)
    return replace(model, modalities=modalities, shared_depth=blocks, time_conditioning="token", uvit=uvit)


def unidiffuser_class() -> type[nn.Module]:
    """diffusers' class, not through its package: that needs transformers, for pipelines that are not used here."""
    for folder in ("deprecated.unidiffuser", "unidiffuser"):  # it is in one or the other, by diffusers' version
        try:
            return import_module(f"diffusers.pipelines.{folder}.modeling_uvit").UniDiffuserModel
        except ImportError as error:
            reason = error
    raise reason


def as_unidiffuser(network: UViT, patch: int) -> nn.Module:
    """diffusers' model with the weights of a network of `unidiffuser_shape`; image tokens are patch² latents."""
    config = network.config
    image, text, clip = (config.modality(name) for name in ("image", "text", "clip_image"))
    channels = image.channels // patch**2
    model = unidiffuser_class()(
        text_dim=text.channels, clip_img_dim=clip.channels, num_text_tokens=text.tokens, patch_size=patch,
        sample_size=round(image.tokens**0.5) * patch, in_channels=channels, out_channels=channels,
        num_attention_heads=config.dim // config.head_dim, attention_head_dim=config.head_dim,
        num_layers=config.shared_depth - 1, activation_fn="gelu", norm_num_groups=1, use_data_type_embedding=True,
    )  # fmt: skip
    del model.transformer.pos_embed  # an embedding of patches that the model does not use
    model.load_state_dict(_unidiffuser_weights(network, patch, channels))
    return model.to(network.position).eval()


def _unidiffuser_weights(network: UViT, patch: int, channels: int) -> dict[str, Tensor]:
    """Under diffusers' names: the reverse of what `engine.model.convert` does with published weights."""
    image, text, clip = (network.config.token_slices[name] for name in ("image", "text", "clip_image"))
    times, tokens = network.position[:2], network.position[network.prefix :]
    position = torch.cat([times, *(tokens[part] for part in (text, clip, image))])
    data_type = network.position[2:3]  # both embeddings of data type 1
    weights = {
        "pos_embed": position[None],
        "data_type_token_embedding.weight": torch.cat([torch.zeros_like(data_type), data_type]),
        "data_type_pos_embed_token": torch.zeros_like(data_type)[None],
    }
    modules = {f"{end}_in": network.embed[name] for end, name in (("text", "text"), ("clip_img", "clip_image"))}
    for end, name in (("vae_img", "image"), ("text", "text"), ("clip_img", "clip_image")):
        modules[f"{end}_out"] = network.head[name]
    modules["transformer.norm_out"] = network.norm
    blocks = {f"in_blocks.{i}": block for i, block in enumerate(network.in_blocks)} | {"mid_block": network.middle}
    blocks |= {f"out_blocks.{i}.block": block for i, block in enumerate(network.out_blocks)}
    for name, block in blocks.items():
        name = f"transformer.transformer_{name}"
        for ours, theirs in (("proj", "attn1.to_out.0"), ("norm1", "norm1"), ("norm2", "norm3"),
                             ("fc1", "ff.net.0.proj"), ("fc2", "ff.net.2")):  # fmt: skip
            modules[f"{name}.{theirs}"] = getattr(block, ours)
        for theirs, weight in zip("qkv", block.qkv.weight.chunk(3), strict=True):
            weights[f"{name}.attn1.to_{theirs}.weight"] = weight
        if block.skip is not None:
            skip = name.removesuffix("block") + "skip"
            modules |= {f"{skip}.skip_linear": block.skip, f"{skip}.norm": block.skip_norm}
    for name, module in modules.items():
        weights |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    patches = network.embed["image"].weight.unflatten(1, (patch, patch, channels))  # [D, p, p, c]
    weights["vae_img_in.proj.weight"] = patches.permute(0, 3, 1, 2)
    weights["vae_img_in.proj.bias"] = network.embed["image"].bias
    return weights


def diffusers_call(denoiser: Denoiser, inputs: Tensor, times: Tensor, patch: int) -> Callable[[], Tensor]:
    """A call of diffusers' model with a denoiser's weights, on what the denoiser would get; returns [R, N]."""
    config, model = denoiser.config, as_unidiffuser(denoiser.network, patch)
    parts = {
        m.name: inputs[:, config.state_slices[m.name]].unflatten(1, (m.tokens, m.channels)).to(model.dtype)
        for m in config.modalities
    }
    latents = unpatchify(parts["image"], patch)  # [R, c, h, w]
    t = {name: times[:, config.token_slices[name].start] for name in config.uvit.timed}  # [R] each
    call = partial(model, latents, parts["clip_image"], parts["text"], t["image"], t["text"])

    def run() -> Tensor:
        image, clip, text = call()
        return torch.cat([patchify(image, patch).flatten(1), text.flatten(1), clip.flatten(1)], dim=1)  # [R, N]

    return run
