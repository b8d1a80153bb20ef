"""A pipeline's folders and components: saved, opened by the engine too, replaced, moved, with LoRA layers."""

import json
import shutil
import warnings
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapter_cases import write_adapter
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny
from engine_cases import left_half, noise
from hub_cases import in_cache
from pipeline_cases import make, same

from engine import Engine, InputError, Request, checkpoint
from engine.adapters import WEIGHTS
from engine.pipeline import PSUNetPipeline
from engine.pipeline_components import PSUNetModel


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(folder)
    return folder


def test_the_engine_opens_what_the_pipeline_saved(pipe, saved, on_cpu):
    request = Request(prompt="_ sun", steps=2, seed=3)
    with Engine.from_pretrained(saved, device="cpu", dtype="float32") as engine:
        assert engine.config.model == on_cpu.config.model and engine.config.sampling == on_cpu.config.sampling
        assert engine.generate(request).image.tobytes() == on_cpu.generate(request).image.tobytes()


def test_the_engine_opens_weights_in_parts(pipe, saved, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="100KB")
    files = list((tmp_path / "transformer").glob("*-of-*.safetensors"))
    assert len(files) > 1
    whole, parts = (checkpoint.load(folder).network.state_dict() for folder in (saved, tmp_path))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert same(make(PSUNetPipeline.from_pretrained(tmp_path)), make(pipe))
    files[0].unlink()
    with pytest.raises(InputError, match=f"^checkpoint: {files[0]} does not exist"):
        checkpoint.load(tmp_path)
    index = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    for content in (
        {},
        {"weight_map": {}},
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": 1}},
        [],
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"^checkpoint: {index} does not name the files"):
            checkpoint.load(tmp_path)


def test_training_goes_on_from_what_the_pipeline_saved(saved, tmp_path):
    from engine.presets import PRESETS
    from engine.training.initial import initial_network
    from engine.training.stages import copy_codecs

    assert initial_network(saved, PRESETS["tiny"]).config == PRESETS["tiny"].model
    copy_codecs(saved, tmp_path, PRESETS["tiny"])
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"image", "text"}


@pytest.mark.parametrize("source", ["checkpoint", "pipeline"])
def test_a_name_on_the_hub_is_opened_from_the_cache(pipe, tiny_checkpoint, saved, tmp_path, source):
    folder = {"checkpoint": tiny_checkpoint, "pipeline": saved}[source]
    in_cache(folder, tmp_path, "owner/tiny", refs=["v1"])
    opened = PSUNetPipeline.from_pretrained("owner/tiny", revision="v1", cache_dir=tmp_path)
    assert opened.name_or_path == "owner/tiny" and same(make(opened), make(pipe))


def test_what_is_saved_comes_back(pipe, saved):
    assert same(make(PSUNetPipeline.from_pretrained(saved), prompt="red _"), make(pipe, prompt="red _"))


def test_saved_folders_load_with_a_variant(pipe, saved, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert same(make(PSUNetPipeline.from_pretrained(tmp_path, variant="fp16")), make(pipe))
    with pytest.raises(ValueError, match="variant=fp16"):
        PSUNetPipeline.from_pretrained(saved, variant="fp16")
    with pytest.raises(InputError, match="^checkpoint: .*diffusion_pytorch_model.safetensors does not exist"):
        Engine.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(InputError, match="^checkpoint: .*diffusion_pytorch_model.safetensors"):
        PSUNetPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["checkpoint", "pipeline"])
def test_the_dtype_may_be_chosen(tiny_checkpoint, saved, source):
    folder = {"checkpoint": tiny_checkpoint, "pipeline": saved}[source]
    pipe = PSUNetPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert (pipe.dtype, pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16,) * 3
    assert pipe.tokenizer.vectors.dtype == torch.float32
    assert make(pipe, prompt="red cat").text == ["red cat"]
    mixed = PSUNetPipeline.from_pretrained(folder, dtype={"transformer": torch.bfloat16})
    assert (mixed.transformer.dtype, mixed.vae.dtype) == (torch.bfloat16, torch.float32)


def test_moving_and_casting_go_back_and_forth(tiny_checkpoint):
    pipe = PSUNetPipeline.from_pretrained(tiny_checkpoint)
    before = make(pipe)
    assert pipe.to("cpu") is pipe and pipe.device.type == "cpu"
    assert pipe.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert len(make(pipe).images) == 1
    pipe.to(dtype=torch.float32)
    assert len(make(pipe).images) == len(before.images)


def test_components_make_another_pipeline(pipe):
    assert same(make(PSUNetPipeline(**pipe.components, **pipe.parameters)), make(pipe))
    other = PSUNetPipeline.from_pipe(pipe)
    assert other.vae is pipe.vae and same(make(other), make(pipe))


def test_components_may_be_given_and_replaced(pipe, tiny_checkpoint, saved):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = PSUNetModel.from_config(pipe.transformer.config).eval()
        torch.nn.init.normal_(network.network.branches["image"].head.weight)
    for folder in (tiny_checkpoint, saved):
        other = PSUNetPipeline.from_pretrained(folder, transformer=network)
        assert other.transformer is network and not same(make(other), make(pipe))
    other.transformer = pipe.transformer
    assert same(make(other), make(pipe))


def test_a_pipeline_without_a_component_it_needs_is_refused(pipe):
    for name in ("vae", "tokenizer"):
        with pytest.raises(InputError, match="^codecs: .* has no component"):
            PSUNetPipeline(**{**pipe.components, name: None}, **pipe.parameters)
    with pytest.raises(InputError, match="^codecs: None is not valid"):
        PSUNetPipeline(**pipe.components)


def test_an_autoencoder_that_does_not_fit_is_refused(pipe):
    other = PSUNetPipeline(**pipe.components, **pipe.parameters)
    for vae, problem in ((AutoencoderTiny(latent_channels=3), "makes"), (AsymmetricAutoencoderKL(), "is not valid")):
        other.vae = vae
        with pytest.raises(InputError, match=f"^vae: '{type(vae).__name__}' {problem}"):
            make(other)


def test_components_that_no_modality_needs_are_optional(pipe, tmp_path):
    config = pipe.engine_config
    model = replace(config.model, modalities=config.model.modalities[:1])
    transformer = PSUNetModel(**{**pipe.transformer.config, "modalities": [vars(m) for m in model.modalities]})
    codecs = {"image": pipe.config.codecs["image"]}
    only = PSUNetPipeline(transformer, pipe.scheduler, vae=pipe.vae, codecs=codecs)
    out = make(only)
    assert len(out.images) == 1 and out.text is None
    only.save_pretrained(tmp_path)
    again = PSUNetPipeline.from_pretrained(tmp_path)
    assert again.tokenizer is None and np.array_equal(make(again).images[0], out.images[0])


def test_offloaded_components_are_brought_to_their_device_before_they_compute(pipe):
    """As accelerate does when `forward` is called, which the sampler and the codec do not call."""
    other, order = PSUNetPipeline(**pipe.components, **pipe.parameters), []
    for name in ("transformer", "vae"):
        module = getattr(other, name)
        module._hf_hook = SimpleNamespace(execution_device="cpu", pre_forward=lambda _, name=name: order.append(name))
    try:
        make(other, image=noise(1), mask_image=left_half())
        assert [name for name, _ in groupby(order)] == ["vae", "transformer", "vae"]
    finally:
        for name in ("transformer", "vae"):
            del getattr(other, name)._hf_hook


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match=f"^checkpoint: {tmp_path} is not|^checkpoint: .*config.json does not exist"):
        PSUNetPipeline.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="^checkpoint: 'owner/none' is not a folder, is not in the cache of the hub"):
        PSUNetPipeline.from_pretrained("owner/none", local_files_only=True)


@pytest.mark.parametrize(
    "file, content",
    [
        ("model_index.json", "[]"),
        ("model_index.json", "{"),
        ("transformer/config.json", "{}"),
        ("transformer/diffusion_pytorch_model.safetensors", "cut"),
    ],
)
def test_damaged_folders_are_refused_in_one_sentence(saved, tmp_path, file, content):
    shutil.copytree(saved, tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_text(content)
    with pytest.raises(InputError, match=f"^checkpoint: {tmp_path / 'damaged'} cannot be opened .*; save the pipeline"):
        PSUNetPipeline.from_pretrained(tmp_path / "damaged")


def test_folders_that_cannot_be_written_and_dtypes_that_are_none_are_refused(pipe, tiny_checkpoint, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x", None):
        with pytest.raises(InputError, match="^save_directory: .*; give "):
            pipe.save_pretrained(folder)
    for dtype in ("float16", "auto", torch.int8, {"vae": torch.int64}):
        with pytest.raises(InputError, match="^torch_dtype: .*; use torch.float32"):
            PSUNetPipeline.from_pretrained(tiny_checkpoint, torch_dtype=dtype)


def test_lora_weights_change_the_images_and_can_be_unloaded(tiny_checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    pipe, trained = (PSUNetPipeline.from_pretrained(tiny_checkpoint) for _ in range(2))
    before = make(pipe, prompt="red cat")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], init_lora_weights=False))
    PSUNetPipeline.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(trained.transformer))
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert pipe.get_active_adapters() == ["style"]
    with_style = make(pipe, prompt="red cat")
    assert not same(with_style, before)
    with pytest.raises(InputError, match="^transformer: .* has LoRA layers; call unload_lora_weights first"):
        pipe.save_pretrained(tmp_path / "pipeline")
    pipe.fuse_lora(lora_scale=0.0)
    assert same(make(pipe, prompt="red cat"), before)
    pipe.unfuse_lora()
    pipe.set_adapters("style", 0.0)
    assert same(make(pipe, prompt="red cat"), before)
    pipe.unload_lora_weights()
    assert same(make(pipe, prompt="red cat"), before)


def test_lora_weights_of_other_weights_or_of_nothing_are_refused(tiny_checkpoint, tmp_path):
    pytest.importorskip("peft")
    folder = write_adapter(tmp_path / "adapter", tiny_checkpoint)
    pipe = PSUNetPipeline.from_pretrained(tiny_checkpoint)
    for source in (folder / WEIGHTS, {}, 3, None):
        with pytest.raises(InputError, match="^adapter: .*; give a folder"):
            pipe.load_lora_weights(source)
    pipe.load_lora_weights(folder, adapter_name="one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, that there are several
        pipe.load_lora_weights(folder, adapter_name="two")  # the layers of the first are not the weights'
    other = PSUNetPipeline.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        other.transformer.network.branches["image"].head.bias.add_(1.0)
    with pytest.raises(InputError, match="^adapter: .* was trained on other weights than the checkpoint's"):
        other.load_lora_weights(folder)
