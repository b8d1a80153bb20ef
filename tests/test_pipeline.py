"""The pipeline for diffusers: it makes what the engine makes, and does what diffusers' own testers ask of pipelines.

Those testers are in diffusers' repository, not in its wheel: their cases that apply are here and, for the network, in
test_pipeline_model.py.
"""

import inspect
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
from diffusers.callbacks import PipelineCallback
from engine_cases import left_half, levels, noise
from hub_cases import in_cache

from engine import Engine, InputError, Request, checkpoint
from engine.adapters import WEIGHTS
from engine.pipeline import PSUNetPipeline
from engine.pipeline_components import PSUNetModel, PSUNetScheduler
from engine.pipeline_values import listed_images

TASKS = {
    "joint": {},
    "text-to-image": {"prompt": "red cat"},
    "image-to-text": {"image": noise(1)},
    "infill": {"image": noise(2), "mask_image": left_half()},
    "words with blanks": {"prompt": "big _ dog", "image": noise(3, (48, 40)), "mask_image": left_half((48, 40))},
}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint) -> PSUNetPipeline:
    pipe = PSUNetPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(folder)
    return folder


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(pipe, seed: int = 0, num_inference_steps: int = 2, **given):
    return pipe(**given, num_inference_steps=num_inference_steps, generator=seeded(seed))


def same(a, b) -> bool:
    """Whether two outputs are equal bit for bit."""
    pairs = zip(a.images, b.images, strict=True)
    return a.text == b.text and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


# ---------------------------------------------------------------------------------------------- as the engine


@pytest.fixture(scope="module")
def on_cpu(tiny_checkpoint):
    with Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32") as engine:
        yield engine


@pytest.mark.parametrize("task", TASKS)
def test_images_and_texts_are_the_engines_of_the_same_seed(pipe, on_cpu, task):
    given = {{"mask_image": "mask"}.get(name, name): value for name, value in TASKS[task].items()}
    theirs = on_cpu.generate(Request(**given, steps=3, seed=7, num=2))
    ours = make(pipe, seed=7, num_inference_steps=3, num_images_per_prompt=2, **TASKS[task])
    assert ours.text == [sample.text for sample in theirs.samples]
    for a, b in zip(ours.images, theirs.samples, strict=True):
        assert a.tobytes() == b.image.tobytes()


def test_a_batch_of_tasks_is_the_engines_batch(pipe, on_cpu):
    """Of different numbers of steps: where a word is missing, the text comes first."""
    prompts = ["red cat", "_ dog"]
    theirs = on_cpu.generate([Request(prompt, steps=3, seed=seed) for seed, prompt in enumerate(prompts, 4)])
    ours = pipe(prompts, num_inference_steps=3, generator=[seeded(4), seeded(5)])
    assert [image.tobytes() for image in ours.images] == [result.image.tobytes() for result in theirs]
    assert ours.text == [result.text for result in theirs]


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


def test_generators_give_seeds(pipe):
    alone = [make(pipe, seed=seed, prompt="red cat").images[0] for seed in (5, 6)]
    one = pipe("red cat", num_inference_steps=2, num_images_per_prompt=2, generator=seeded(5)).images
    each = pipe("red cat", num_inference_steps=2, num_images_per_prompt=2, generator=[seeded(5), seeded(6)]).images
    for images in (one, each):
        assert all(abs(levels(a) - levels(b)).max() <= 1 for a, b in zip(images, alone, strict=True))
    assert not np.array_equal(levels(alone[0]), levels(alone[1]))


def test_a_generator_moves_on_and_equal_states_give_equal_images(pipe):
    generator = seeded(5)
    first = pipe(num_inference_steps=1, generator=generator)
    state = generator.get_state()
    second = pipe(num_inference_steps=1, generator=generator)
    assert not same(first, second)
    assert same(second, pipe(num_inference_steps=1, generator=generator.set_state(state)))


def test_without_a_generator_pytorchs_own_is_used(pipe):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = pipe(num_inference_steps=1), pipe(num_inference_steps=1)
        torch.manual_seed(3)
        assert same(first, pipe(num_inference_steps=1)) and not same(first, second)


def test_models_of_more_modalities_generate_them_too(three_modality_checkpoint, tmp_path):
    pipe = PSUNetPipeline.from_pretrained(three_modality_checkpoint)
    out = make(pipe, seed=3)
    with Engine.from_pretrained(three_modality_checkpoint, device="cpu", dtype="float32") as engine:
        assert out.images[0].tobytes() == engine.generate(Request(steps=2, seed=3)).image.tobytes()
    pipe.save_pretrained(tmp_path)
    assert same(make(PSUNetPipeline.from_pretrained(tmp_path), seed=3), out)


@pytest.mark.parametrize("source", ["checkpoint", "pipeline"])
def test_a_name_on_the_hub_is_opened_from_the_cache(pipe, tiny_checkpoint, saved, tmp_path, source):
    folder = {"checkpoint": tiny_checkpoint, "pipeline": saved}[source]
    in_cache(folder, tmp_path, "owner/tiny", refs=["v1"])
    opened = PSUNetPipeline.from_pretrained("owner/tiny", revision="v1", cache_dir=tmp_path)
    assert opened.name_or_path == "owner/tiny" and same(make(opened), make(pipe))


# ---------------------------------------------------------------------------------------------- as diffusers


def test_a_call_has_the_arguments_of_diffusers_pipelines():
    parameters = inspect.signature(PSUNetPipeline.__call__).parameters
    names = ["self", "prompt", "image", "mask_image", "num_inference_steps", "guidance_scale", "generator",
             "num_images_per_prompt", "output_type", "callback_on_step_end", "return_dict"]  # fmt: skip
    assert list(parameters)[: len(names)] == names
    assert all(parameters[name].default is not inspect.Parameter.empty for name in names[1:])


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


def test_the_solver_is_the_schedulers(pipe, on_cpu):
    other = PSUNetPipeline(**pipe.components, **pipe.parameters)
    other.scheduler = PSUNetScheduler.from_config(pipe.scheduler.config, solver="ddim", eta=1.0)
    theirs = on_cpu.generate(Request(prompt="red cat", steps=3, solver="ddim", eta=1.0))
    assert make(other, prompt="red cat", num_inference_steps=3).images[0].tobytes() == theirs.image.tobytes()
    with pytest.raises(InputError, match="^solver: 'euler' is not known"):
        PSUNetScheduler.from_config(pipe.scheduler.config, solver="euler")


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


def test_images_in_a_batch_are_those_made_alone(pipe):
    prompts, given = ["red cat", "blue dog", "sun"], [noise(1), noise(2), noise(3)]
    mask = left_half()
    batch = pipe(prompts, given, mask, num_inference_steps=2, generator=[seeded(i) for i in range(3)])
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, given[i], mask, num_inference_steps=2, generator=seeded(i))
        assert abs(levels(alone.images[0]) - levels(batch.images[i])).max() <= 1


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("prompt", ["red cat", ["red cat", "dog"]])
def test_there_are_as_many_images_as_asked_for_prompt_by_prompt(pipe, num, prompt):
    out = make(pipe, prompt=prompt, num_images_per_prompt=num)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    assert out.text == [text for text in prompts for _ in range(num)] and len(out.images) == len(out.text)


def test_output_types_are_the_same_images(pipe):
    given = {"prompt": "red cat", "num_images_per_prompt": 2}
    pil, array, tensor, latent = (
        make(pipe, **given, output_type=kind).images for kind in ("pil", "np", "pt", "latent")
    )
    assert array.shape == (2, 32, 32, 3) and array.min() >= 0 and array.max() <= 1
    assert np.array_equal((255 * array).round(), np.stack([np.asarray(image) for image in pil]))
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))
    assert latent.shape == (2, 4, 4, 4)


@pytest.mark.parametrize("kind", ["PIL", "file", "array", "tensor", "uint8", "batch"])
def test_images_are_taken_in_every_form(pipe, tmp_path, kind):
    image, mask = noise(1), left_half()
    array = np.asarray(image)
    if kind == "file":
        image.save(tmp_path / "image.png")
        image = tmp_path / "image.png"
    forms = {"array": array / 255, "uint8": array, "batch": [array / 255]}
    tensors = torch.from_numpy(array.copy()).permute(2, 0, 1) / 255, torch.from_numpy(np.asarray(mask) / 255)[None]
    form, mask_form = tensors if kind == "tensor" else (forms.get(kind, image), mask)
    out = make(pipe, image=form, mask_image=mask_form)
    assert same(out, make(pipe, image=noise(1), mask_image=left_half()))


def test_arrays_are_rounded_to_levels():
    (image,) = listed_images(np.full((1, 1, 3), 0.999), "image")
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_without_return_dict_there_is_a_tuple(pipe):
    out = make(pipe)
    images, text = make(pipe, return_dict=False)
    assert text == out.text and images[0].tobytes() == out.images[0].tobytes()
    assert out[0] is out.images and out.to_tuple() == (out.images, out.text)


def test_a_callback_sees_every_step(pipe):
    seen = []

    def callback(pipeline, step, time, inputs):
        seen.append((step, time, inputs["latents"].shape))
        return inputs

    with_callback = make(pipe, prompt="_ cat", callback_on_step_end=callback)
    assert same(with_callback, make(pipe, prompt="_ cat"))
    steps, times, shapes = zip(*seen, strict=True)
    assert steps == tuple(range(pipe.num_timesteps)) and len(steps) == 4  # two for the text, two for the image
    assert times == (1000, 500, 1000, 500)
    assert set(shapes) == {(1, pipe.engine_config.model.size)}


def test_a_callback_gets_only_what_it_asks_for(pipe):
    assert pipe._callback_tensor_inputs == ["latents"]
    seen = []
    arguments = {"callback_on_step_end": lambda *arguments: seen.append(arguments[3])}
    assert same(make(pipe, **arguments, callback_on_step_end_tensor_inputs=[]), make(pipe))
    assert seen and not any(seen)
    with pytest.raises(InputError, match="^callback_on_step_end_tensor_inputs: 'noise' is not known"):
        make(pipe, **arguments, callback_on_step_end_tensor_inputs=["latents", "noise"])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_callback_may_change_the_latents(pipe, in_place):
    def zero(pipeline, step, time, inputs):
        if step == pipeline.num_timesteps - 1:
            if not in_place:
                return {"latents": torch.zeros_like(inputs["latents"])}
            inputs["latents"].zero_()

    out = make(pipe, prompt="red cat", callback_on_step_end=zero, output_type="latent")
    assert out.images.abs().sum() == 0
    assert out.text == ["red cat"]  # what is given stays


def test_latents_changed_on_the_way_are_what_the_next_step_starts_from(pipe):
    """Of DDIM, which keeps nothing else from step to step: what was before the change does not matter."""
    ddim = PSUNetPipeline(**pipe.components, **pipe.parameters)
    ddim.scheduler = PSUNetScheduler.from_config(pipe.scheduler.config, solver="ddim")
    x, y = torch.randn(2, 1, pipe.engine_config.model.size, generator=seeded(1))

    def made(changes):
        def callback(pipeline, step, time, inputs):
            return {"latents": changes[step]} if step in changes else inputs

        given = {"prompt": "red cat", "num_inference_steps": 3, "output_type": "latent"}
        return make(ddim, **given, callback_on_step_end=callback).images

    assert torch.equal(made({1: x}), made({0: y, 1: x}))
    assert not torch.equal(made({1: x}), made({0: y}))


def test_a_callback_has_the_latents_of_images_that_are_done_before_others(pipe):
    """A prompt with a missing word takes twice as many steps."""
    seen = []

    def zero_at_the_end(pipeline, step, time, inputs):
        seen.append(inputs["latents"].clone())
        return {"latents": inputs["latents"] * (step < 3)}

    prompts, generators = ["red cat", "_ dog"], [seeded(4), seeded(5)]
    given = {"num_inference_steps": 2, "generator": generators, "output_type": "latent"}
    out = pipe(prompts, **given, callback_on_step_end=zero_at_the_end)
    assert [len(latents) for latents in seen] == [2] * 4
    assert torch.equal(seen[1][0], seen[3][0]) and not torch.equal(seen[1][1], seen[3][1])
    assert out.images.abs().sum() == 0


def test_latents_of_another_shape_are_refused(pipe):
    with pytest.raises(InputError, match="^latents: .*has another shape"):
        make(pipe, callback_on_step_end=lambda *_: {"latents": torch.zeros(3)})


def test_a_callback_may_interrupt(pipe):
    seen = []

    def callback(pipeline, step, time, inputs):
        seen.append(inputs["latents"])
        pipeline._interrupt = step == 1

    given = {"prompt": "red cat", "image": noise(1), "mask_image": left_half(), "num_inference_steps": 5}
    out = make(pipe, **given, callback_on_step_end=callback)
    assert len(seen) == 2 and pipe.interrupt
    assert np.array_equal(levels(out.images[0])[:, 16:], levels(noise(1))[:, 16:])  # known pixels are put back
    callback = None
    assert len(make(pipe, **given).images) == 1 and not pipe.interrupt


def test_callback_classes_of_diffusers_name_their_inputs(pipe):
    class Recorder(PipelineCallback):
        tensor_inputs = []
        seen = []

        def callback_fn(self, pipeline, step, time, inputs):
            self.seen.append(dict(inputs))
            return inputs

    make(pipe, callback_on_step_end=Recorder(cutoff_step_ratio=None, cutoff_step_index=0))
    assert Recorder.seen and not any(Recorder.seen)


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


def test_inherited_switches_do_no_harm(pipe):
    before = make(pipe)
    pipe.enable_attention_slicing()
    pipe.disable_attention_slicing()
    pipe.disable_xformers_memory_efficient_attention()
    pipe.remove_all_hooks()
    pipe.maybe_free_model_hooks()
    assert same(make(pipe), before)


def test_the_progress_bar_counts_steps_and_can_be_turned_off(tiny_checkpoint, capsys):
    pipe = PSUNetPipeline.from_pretrained(tiny_checkpoint)
    make(pipe, prompt="red cat", num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    make(pipe)
    assert capsys.readouterr().err == ""


def test_guidance_is_that_of_the_call_or_the_checkpoints(pipe, on_cpu):
    for scale in (None, 1.0, 7.5):
        ours = make(pipe, prompt="red cat", guidance_scale=scale)
        theirs = on_cpu.generate(Request(prompt="red cat", guidance=scale, steps=2))
        assert pipe.guidance_scale == scale and ours.images[0].tobytes() == theirs.image.tobytes()


@pytest.mark.parametrize(
    "arguments, argument",
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["red", "blue"], "image": [noise(1)] * 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "unheard"}, "prompt"),
        ({"image": 5}, "image"),
        ({"image": np.zeros((2, 2, 2, 2, 2))}, "image"),
        ({"image": torch.full((3, 32, 32), 2.0)}, "image"),
        ({"mask_image": left_half()}, "mask_image"),
        ({"image": noise(1), "mask_image": left_half((5, 5))}, "mask_image"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": 1e9}, "guidance_scale"),
        ({"generator": 5}, "generator"),
        ({"generator": [seeded(1)] * 2}, "generator"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"output_type": "jpg"}, "output_type"),
        ({"callback_on_step_end": 5}, "callback_on_step_end"),
        ({"callback_on_step_end": lambda *_: 5}, "callback_on_step_end"),
        ({"callback_on_step_end_tensor_inputs": None}, "callback_on_step_end_tensor_inputs"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "callback_on_step_end_tensor_inputs"),
        ({"image": np.array([[None]])}, "image"),
        ({"image": np.array([["red"]])}, "image"),
        ({"image": np.zeros((32, 32, 3), complex)}, "image"),
        ({"image": torch.zeros(3, 32, 32, device="meta")}, "image"),
        ({"image": torch.zeros(3, 32, 32).to_sparse()}, "image"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_what_cannot_be_used_is_refused_by_its_name(pipe, arguments, argument):
    with pytest.raises(InputError) as error:
        pipe(**arguments)
    assert error.value.argument == argument


def test_unknown_arguments_are_refused(pipe, tiny_checkpoint):
    with pytest.raises(TypeError, match="negative_prompt"):
        pipe("red cat", negative_prompt="blue")
    with pytest.raises(InputError, match="^device_map: 'balanced' is not for a checkpoint"):
        PSUNetPipeline.from_pretrained(tiny_checkpoint, device_map="balanced")


def test_images_that_are_not_finite_are_reported(tiny_checkpoint):
    pipe = PSUNetPipeline.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        pipe.transformer.network.branches["image"].head.bias.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match=r"image of image 0 \(seed 3\) is NaN"):
        make(pipe, prompt="red cat", seed=3)


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


def test_a_call_leaves_what_it_was_given_as_it_was(pipe):
    image, prompts = noise(1), ["red cat"]
    make(pipe, prompt=prompts, image=image, mask_image=left_half())
    assert prompts == ["red cat"] and image == noise(1)
    assert all(parameter.requires_grad for parameter in pipe.vae.parameters())


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
