"""What the worker thread costs a single request: `Engine.generate` against the same work in the calling thread.

All contenders prepare the same text-to-image request, encode the prompt, do the same steps and decode the image. They
differ in where codecs and steps run and in who waits: on the worker, with continuations (`Engine`) or with a wait for
each of them (`Sampler`), or in the calling thread.
"""

from functools import partial

import pytest
import torch

from benchmarks.race import Contender
from benchmarks.workloads import constant_modalities, measured_preset, random_checkpoint, sampling_flops
from engine import Engine, Request, checkpoint
from engine.evaluation import pixels_of
from engine.model.blocks import one_by_one
from engine.model.denoiser import Denoiser
from engine.preparation import prepare
from engine.sampling.batch import Batch, SampleSpec, batch_constants
from engine.sampling.graphs import StepGraphs, set_up
from engine.sampling.sampler import Sampler
from engine.sampling.scheduler import CacheMode, StepPlan
from engine.sampling.step import denoise_step

IN_THIS_THREAD, SAMPLER, ENGINE = "calling thread", "Sampler.run and Sampler.call", "Engine.generate"


@pytest.mark.parametrize("contender", [IN_THIS_THREAD, SAMPLER, ENGINE])
def test_one_request(compete, tmp_path, device, dtype, full, contender):
    steps, config, cuda = 25 if full else 10, measured_preset(full), device.type == "cuda"
    request = Request(prompt="word1 word2 word3", steps=steps, order="together")

    def build():
        folder = random_checkpoint(config, tmp_path / "checkpoint")
        name = str(dtype).removeprefix("torch.")
        engine = Engine.from_pretrained(folder, device=str(device), dtype=name, compile=cuda, max_rows=1)
        loaded = checkpoint.load(folder)
        network, graphs = loaded.network.to(device, dtype), StepGraphs(device) if cuda else None
        set_up(network, device, compile=cuda)
        denoiser = Denoiser(network, config.diffusion.timesteps, graphs.run_branches if cuda else one_by_one)
        sampler = Sampler(denoiser, config.model, device, buckets=[1], graphs=graphs)
        codecs = {m.name: loaded.codec(m.name, device) for m in config.model.modalities}
        steps_here = StepsInThisThread(denoiser, constant_modalities(config, ("image",)), device)
        serve = partial(pixels_of_request, request, config, codecs)

        facts = {"flops": sampling_flops(config, 2, steps, ("image",)), "images": 1, "facts": {"steps": steps}}
        reference = partial(serve, steps_here, lambda function, items: function(items))
        checked = {"expected": reference, "tolerance": 1e-3 if dtype == torch.float32 else 0.5, **facts}
        return {
            IN_THIS_THREAD: Contender(reference, **facts),
            SAMPLER: Contender(partial(serve, sampler.run, lambda *call: sampler.call(*call).result()), **checked),
            ENGINE: Contender(lambda: pixels_of(engine.generate(request).image), **checked),
        }

    compete(f"hand-over, text-to-image, one request, {steps} steps", contender, build)


def pixels_of_request(request, config, codecs, run, call):
    """Serves a text-to-image request as `Engine` does: the pixels [3, S, S] in −1..1.

    run   makes samples: specs -> final states [B, N]
    call  calls a codec's function: (function, items) -> results
    """
    model = config.model
    prepared = prepare(request, config, codecs, can_cache=True)
    known = {m.name: torch.zeros(1, m.size) for m in model.modalities}
    known["text"] = torch.stack(list(call(codecs["text"].encode, [prepared.given["text"]]))).flatten(1)
    values = torch.cat([known[m.name] for m in model.modalities], dim=1)[0]  # [N]
    states = run([SampleSpec(request.seed, prepared.table, prepared.generate, values)])  # [1, N]
    outputs = {}
    for m in model.modalities:
        tokens = states[0, model.state_slices[m.name]].unflatten(0, (m.tokens, m.channels))  # [L, C]
        (outputs[m.name],) = call(partial(decoded, codecs[m.name]), [(tokens, prepared.given[m.name])])
    return pixels_of(outputs["image"].value)


def decoded(codec, pairs):
    """`Codec.decode` as a function of one list."""
    return codec.decode(torch.stack([tokens for tokens, _ in pairs]), [given for _, given in pairs])


class StepsInThisThread:
    """The steps of one text-to-image sample as `Sampler` does them, without its scheduler and its thread."""

    def __init__(self, denoiser: Denoiser, cached: tuple[str, ...], device: torch.device):
        self.denoiser, self.device = denoiser, device
        self.plan = StepPlan(slots=1, passes=2, outputs=("image",), cached=cached, cache_mode=CacheMode.OFF)
        self.graphs = StepGraphs(device) if device.type == "cuda" else None
        self.batch: Batch | None = None  # graphs use its memory: it stays

    @torch.inference_mode()
    def __call__(self, specs: list[SampleSpec]) -> torch.Tensor:
        entering = Batch(batch_constants(specs, self.denoiser.config, self.device))
        if self.batch is None:
            self.batch = Batch(batch_constants(specs, self.denoiser.config, self.device))
        batch = self.batch
        batch.copy(entering, [(0, 0)])
        for name in self.plan.cached:
            features = self.denoiser.branch_features(name, batch.state.inputs, batch.state.times)
            batch.new_features(name, features)
            batch.features[name].copy_(features)
        for _ in range(specs[0].table.steps):
            if self.graphs is None:
                denoise_step(self.denoiser, batch, self.plan)
            else:
                self.graphs(self.plan, lambda: denoise_step(self.denoiser, batch, self.plan))
        return batch.state.state.cpu()
