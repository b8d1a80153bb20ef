"""A call of the pipeline for diffusers: it makes what the engine makes, with the arguments of diffusers' pipelines.

diffusers' own testers are in its repository, not in its wheel: their cases that apply are here, in the other files
test_pipeline_*.py and, for the network, in test_pipeline_model.py.
"""

import inspect

import numpy as np
import pytest
import torch
from engine_cases import left_half, levels, noise
from pipeline_cases import make, same, seeded

from engine import Engine, InputError, Request
from engine.pipeline import PSUNetPipeline
from engine.pipeline_components import PSUNetScheduler
from engine.pipeline_values import listed_images

TASKS = {
    "joint": {},
    "text-to-image": {"prompt": "red cat"},
    "image-to-text": {"image": noise(1)},
    "infill": {"image": noise(2), "mask_image": left_half()},
    "words with blanks": {"prompt": "big _ dog", "image": noise(3, (48, 40)), "mask_image": left_half((48, 40))},
}


def assert_same_images(found, expected):
    """To rounding: an engine's products use weights in another layout."""
    assert all(abs(levels(a) - levels(b)).max() <= 1 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_images_and_texts_are_the_engines_of_the_same_seed(pipe, on_cpu, task):
    given = {{"mask_image": "mask"}.get(name, name): value for name, value in TASKS[task].items()}
    theirs = on_cpu.generate(Request(**given, steps=3, seed=7, num=2))
    ours = make(pipe, seed=7, num_inference_steps=3, num_images_per_prompt=2, **TASKS[task])
    assert ours.text == [sample.text for sample in theirs.samples]
    assert_same_images(ours.images, [sample.image for sample in theirs.samples])


def test_a_batch_of_tasks_is_the_engines_batch(pipe, on_cpu):
    """Of different numbers of steps: where a word is missing, the text comes first."""
    prompts = ["red cat", "_ dog"]
    theirs = on_cpu.generate([Request(prompt, steps=3, seed=seed) for seed, prompt in enumerate(prompts, 4)])
    ours = pipe(prompts, num_inference_steps=3, generator=[seeded(4), seeded(5)])
    assert_same_images(ours.images, [result.image for result in theirs])
    assert ours.text == [result.text for result in theirs]


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
        assert_same_images(out.images, [engine.generate(Request(steps=2, seed=3)).image])
    pipe.save_pretrained(tmp_path)
    assert same(make(PSUNetPipeline.from_pretrained(tmp_path), seed=3), out)


def test_a_call_has_the_arguments_of_diffusers_pipelines():
    parameters = inspect.signature(PSUNetPipeline.__call__).parameters
    names = ["self", "prompt", "image", "mask_image", "num_inference_steps", "guidance_scale", "generator",
             "num_images_per_prompt", "output_type", "callback_on_step_end", "return_dict"]  # fmt: skip
    assert list(parameters)[: len(names)] == names
    assert all(parameters[name].default is not inspect.Parameter.empty for name in names[1:])


def test_the_solver_is_the_schedulers(pipe, on_cpu):
    other = PSUNetPipeline(**pipe.components, **pipe.parameters)
    other.scheduler = PSUNetScheduler.from_config(pipe.scheduler.config, solver="ddim", eta=1.0)
    theirs = on_cpu.generate(Request(prompt="red cat", steps=3, solver="ddim", eta=1.0))
    assert_same_images(make(other, prompt="red cat", num_inference_steps=3).images, [theirs.image])
    with pytest.raises(InputError, match="^solver: 'euler' is not known"):
        PSUNetScheduler.from_config(pipe.scheduler.config, solver="euler")


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
        assert pipe.guidance_scale == scale
        assert_same_images(ours.images, [theirs.image])


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


def test_a_call_leaves_what_it_was_given_as_it_was(pipe):
    image, prompts = noise(1), ["red cat"]
    make(pipe, prompt=prompts, image=image, mask_image=left_half())
    assert prompts == ["red cat"] and image == noise(1)
    assert all(parameter.requires_grad for parameter in pipe.vae.parameters())
