"""Callbacks between the steps of a pipeline: what they see, change and stop."""

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from engine_cases import left_half, levels, noise
from pipeline_cases import make, same, seeded

from engine import InputError
from engine.pipeline import PSUNetPipeline
from engine.pipeline_components import PSUNetScheduler


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
