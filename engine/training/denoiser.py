"""Trains the denoiser on latents and captions, and writes its averaged weights to a checkpoint that has the codecs."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from engine import checkpoint
from engine.codecs.text import TextCodec
from engine.codecs.words import shortened
from engine.config import Config
from engine.data.latents import LatentCache
from engine.device import DTYPES
from engine.diffusion.loss import DenoisingLoss, distinct_times
from engine.errors import errors_named
from engine.files import write_atomically
from engine.images import grid
from engine.model.denoiser import build
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT
from engine.request import Request
from engine.runtime import Engine
from engine.sampling.graphs import compile_blocks
from engine.training.adapter import Lora, TrainedAdapter
from engine.training.curve import plot_curve
from engine.training.evaluations import Evaluations
from engine.training.examples import Examples
from engine.training.initial import start_from
from engine.training.options import image_and_text, sketch_of
from engine.training.recipes import Recipe
from engine.training.stage import Draw, Losses, Read, Stage, StageOptions, noise_of
from engine.training.tracking import Report

PROMPTS, JOINT_SAMPLES, SKETCHES = 24, 16, 8  # in the sample sheets


def train_denoiser(
    run: Path,
    cache: LatentCache,
    text: TextCodec,
    config: Config,
    recipe: Recipe,
    options: StageOptions,
    init: PSUNet | UViT | None = None,
    lora: Lora | None = None,
    evaluations: Evaluations | None = None,
) -> None:
    """Trains the denoiser in RUN/denoiser and writes its averaged weights to RUN/checkpoint, which has the codecs.

    cache  latents and captions of the images; captions alone for a model of text
    text   the codec of the captions
    init   a network of the same config, or a U-ViT for a PS-U-Net, to start from
    lora   adapters are trained, and written to RUN/adapter; RUN/checkpoint has the weights with them
    evaluations  of RUN/checkpoint, in the first process
    Raises InputError about `data` for captions with unknown words, about `out` if the stage cannot be resumed.
    """
    text_name = image_and_text(config)[1]
    torch.manual_seed(recipe.denoiser.seed)
    network = build(config.model)
    if config.model.modality(text_name).categories:
        network.branches[text_name].values.copy_(text.vectors)
    network.to(options.device)
    not_copied = start_from(init, network) if init is not None else []
    adapter = None if lora is None else TrainedAdapter(network, lora)
    examples = Examples(cache, text, config, recipe)
    with errors_named("out"):
        how = {"processes": options.processes, "keep": options.keep, "blocks": () if adapter else network.blocks()}
        trained = adapter.parameters if adapter else network
        stage = Stage(run / "denoiser", trained, recipe.denoiser, len(examples), options.dtype, **how)
    if stage.step == 0 and options.processes.is_main:
        for line in not_copied:
            print(f"init: not copied: {line}")
    for block in network.blocks():
        block.gradient_checkpointing = options.grad_checkpointing
    if options.compile:
        compile_blocks(network.blocks())
    loss = DenoisingLoss(config, recipe.gamma, skew=recipe.skew, odds=recipe.odds, device=options.device)
    draw, read, losses = _draw_read_and_losses(network, loss, examples, options.device)
    prompts, report = _prompts(cache, config.model.modality(text_name).tokens), None
    if options.tracker is not None:
        batch = recipe.denoiser.batch
        report = Report(options.tracker, loss, batch, options.processes, options.device, options.dtype).step

    def export(step: int, weights: dict[str, Tensor]) -> None:
        if adapter is not None:
            weights = adapter.save(run / "adapter", stage.average)
        checkpoint.save(run / "checkpoint", config, weights, DTYPES[recipe.weights_dtype])
        plot_curve(stage.curve, stage.folder / "curve.png")
        _sample(run, step, prompts, cache, config, recipe.denoiser.seed, options)
        if evaluations is not None and evaluations.is_due(step, stage.done):
            evaluations.run(step, run / "checkpoint", options.device, options.dtype, options.tracker)

    if evaluations is not None:
        evaluations.begin(stage.step)
    missing = evaluations is not None and evaluations.is_due(stage.step, stage.done)  # the run was killed before it
    if stage.done or options.processes.from_main(missing):
        weights = stage.averaged()
        options.processes.on_main(lambda: export(stage.step, weights))
    stage.run(draw, losses, options.save_every, export, report, read)


def _draw_read_and_losses(
    network: PSUNet | UViT, loss: DenoisingLoss, examples: Examples, device: torch.device
) -> tuple[Draw, Read, Losses]:
    """What `Stage` calls at every step."""
    config, (image_name, text_name) = loss.config, image_and_text(loss.config)
    logits = {"logits": True} if config.model.categorical else {}  # U-ViTs have none

    def denoise(inputs: Tensor, times: Tensor) -> Tensor:
        # A sample has at most one time for each modality, or one beside the times 0 and N of its known tokens.
        distinct, index = distinct_times(times, len(times) * len(config.model.modalities) + 2)
        return network(inputs, network.time_table(distinct), index, **logits)

    def draw(generator: torch.Generator, indices: list[int]) -> tuple:
        draws = loss.draw(len(indices), generator)
        known = None if image_name is None else loss.known(draws, image_name)
        choice = examples.choose(indices, generator, known, loss.known(draws, text_name))
        seed = torch.randint(2**62, (1,), generator=generator).item()
        return choice, seed, draws, examples.token_weights(choice), examples.categories(choice)

    def read(batch: tuple, part: slice) -> tuple:
        choice, seed, *others = batch
        return examples.read(choice, part), noise_of(seed, part, config.model.size), *others, part

    def losses(x0: Tensor, noise: Tensor, draws, weights, categories, part: slice) -> dict[str, Tensor]:
        return loss(denoise, x0.to(device), noise, draws, weights, part, categories)

    return draw, read, losses


def _prompts(cache: LatentCache, words: int) -> list[str]:
    """First captions of some images, at most `words` words long."""
    spread = range(0, cache.drawn, max(1, cache.drawn // PROMPTS))[:PROMPTS]
    return [prompt for i in spread if (prompt := shortened(cache.captions[i][0], words))]


def _drawings(cache: LatentCache, engine: Engine, sketch: str) -> list[Image.Image]:
    """Sketches of some images."""
    codec, chosen = engine.codecs[sketch], list(range(0, cache.drawn, max(1, cache.drawn // SKETCHES))[:SKETCHES])
    codec.build()
    first = [0] * len(chosen)
    given = [codec.read(None, sketch)] * len(chosen)
    return [decoded.value for decoded in codec.decode(cache.sketch_latents(chosen, first, first), given)]


def _sample(
    run: Path, step: int, prompts: list[str], cache: LatentCache, config: Config, seed: int, options: StageOptions
) -> None:
    """Writes what RUN/checkpoint generates: from prompts, jointly and from sketches of the data, as far as it can;
    texts where it is of text alone, else a grid of images, each beside its sketch if it has one."""
    (image, text), sketch = image_and_text(config), sketch_of(config)
    names = {m.name for m in config.model.modalities}
    conditions = names - set(config.model.predicted)
    requests = [Request(inputs={text: prompt}, seed=seed) for prompt in prompts if conditions <= {text} < names]
    if not conditions:
        requests.append(Request(num=JOINT_SAMPLES))
    from_sketches = sketch is not None and conditions <= {sketch}
    if not (requests or from_sketches):
        return
    dtype = str(options.dtype).removeprefix("torch.")
    with Engine.from_pretrained(run / "checkpoint", device=str(options.device), dtype=dtype) as engine:
        if from_sketches:
            requests += [Request(inputs={sketch: drawing}, seed=seed) for drawing in _drawings(cache, engine, sketch)]
        outputs = [sample.outputs for result in engine.generate(requests) for sample in result.samples]
    captions = [values[text] for values in outputs]
    file, sheet = run / "denoiser" / f"samples-{step:07d}", None
    if image is None:
        write_atomically(file.with_suffix(".txt"), lambda p: p.write_text("\n".join(captions) + "\n", "utf-8"))
    else:
        images = [image] if sketch is None else [image, sketch]
        titles = [title for caption in captions for title in (caption, "")[: len(images)]]
        sheet = grid([values[name] for values in outputs for name in images], titles, columns=8)
        write_atomically(file.with_suffix(".png"), lambda p: sheet.save(p, "PNG"))
    if options.tracker is not None:
        options.tracker.log_samples(step, sheet, captions)
