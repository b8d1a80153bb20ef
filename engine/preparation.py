"""From a request to what the sampler takes: reads and encodes what is given, settles what the request leaves open."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.codecs.codec import Codec, Given
from engine.config import Config, Modality
from engine.diffusion import masks
from engine.diffusion.schedule import default_spacing, way_to_time
from engine.diffusion.solver_table import GuidanceOptions, SolverOptions, StepTable, spaced_table
from engine.errors import InputError, shown
from engine.model.lora import Adapter
from engine.request import INPUTS, MASKS, Request, Result, Sample
from engine.sampling.batch import SampleSpec
from engine.sampling.sampler import Sampler

GUIDANCE = 3.0  # the scale of tasks for which a checkpoint's config names none

Stages = tuple[tuple[int, ...], ...]  # modalities, by position, that move together, one stage after the other


@dataclass(frozen=True)
class PreparedRequest:
    """A request in the model's terms; its samples differ in their seeds only."""

    request: Request
    task: str
    guidance: float
    order: tuple[str, ...]
    solver: str
    spacing: str
    given: dict[str, Given]  # by modality
    generate: Tensor  # [N] bool
    table: StepTable
    adapter: Adapter | None = None

    @property
    def seeds(self) -> range:
        return range(self.request.seed, self.request.seed + self.request.num)

    def spec(self, seed: int, known: Tensor, null: Tensor | None, on_arrival: Mapping) -> SampleSpec:
        """One of its samples, `known` [N] being what is given as encoded; other arguments as there."""
        adapted = self.adapter, self.request.adapter_scale
        return SampleSpec(seed, self.table, self.generate, known, null, on_arrival, *adapted)

    def result(self, samples: tuple[Sample, ...]) -> Result:
        return Result(self.request, self.task, self.guidance, self.order, self.solver, self.spacing, samples)


def prepare(
    request: Request,
    config: Config,
    codecs: Mapping[str, Codec],
    can_cache: bool,
    adapters: Mapping[str, Adapter] | None = None,
) -> PreparedRequest:
    """Reads and checks a request; raises InputError if it cannot be served.

    can_cache  whether the model has inner blocks that step caching can leave out
    adapters   by the names that requests may ask for
    """
    _check_names(request, config)
    adapter = None if request.adapter is None else (adapters or {}).get(request.adapter)
    if request.adapter is not None and adapter is None:
        names = ", ".join(sorted(adapters or {})) or "none"
        raise InputError("adapter", request.adapter, f"use one that is loaded ({names}), or load it", "is not loaded")
    if request.step_cache > 1 and not can_cache:
        raise InputError("step_cache", request.step_cache, "use 1", "needs a model of 3 or more shared blocks")
    given = {
        m.name: codecs[m.name].read(
            request.given.get(m.name),
            argument_of(request, m.name),
            mask=request.given_masks.get(m.name),
            unknown_words=request.unknown_words,
            feather=config.sampling.feather,
            mask_argument=mask_argument_of(request, m.name),
        )
        for m in config.model.modalities
    }
    return replace(settle(request, given, config), adapter=adapter)


def settle(request: Request, given: dict[str, Given], config: Config) -> PreparedRequest:
    """Task, guidance, order and step table of a request whose given values are read, by modality."""
    model = config.model
    generate = masks.pack({name: g.generate for name, g in given.items()}, model)  # [N]
    if config.diffusion.conditioning == "clean":
        generate = masks.whole_tokens(generate, model)
    _check_generated(request, generate, config)
    task = masks.task_of(generate, model)
    if request.task not in ("auto", task):
        raise InputError("task", request.task, "use auto", f"does not fit what is given, which is {task}")

    stages = _stages(request, generate, config)
    guidance = request.guidance
    if guidance is None:  # all together with nothing known: a second pass would have nothing to drop
        guidance = 1.0 if task == "joint" and not stages else float(config.sampling.guidance.get(task, GUIDANCE))
    renoised = config.diffusion.conditioning == "renoise"
    if request.infill == "langevin" and not renoised:
        remedy = "leave it out: known parts of this model need no fitting in"
        raise InputError("infill", request.infill, remedy, "is for models with renoise conditioning")
    solver = request.solver or ("ddpm" if renoised and task != "joint" else "dpm++")
    spacing = request.spacing or default_spacing(config.diffusion.schedule)
    if request.temperature is not None and not model.categorical:
        raise InputError("temperature", request.temperature, "leave it out", "is for models that give probabilities")
    temperature = request.temperature or float(config.sampling.temperature.get(task, 1))
    table = _table(request, guidance, temperature, stages, generate, config, solver, spacing)
    order = tuple(model.modalities[i].name for stage in stages for i in stage)
    return PreparedRequest(request, task, guidance, order, solver, spacing, given, generate, table)


def known_patterns(config: Config, codecs: Mapping[str, Codec]) -> list[tuple[dict[str, Given], str | None]]:
    """What is given and the order of every task in which each modality is wholly known or wholly generated."""
    names = set(codecs)
    known = [()] if len(names) == 1 else [(), *((name,) for name in sorted(names))]
    patterns = []
    for some in known:
        if names - {*some} <= {*config.model.predicted}:
            given = {n: c.null() if n in some else c.read(None, n) for n, c in codecs.items()}
            patterns += [(given, order) for order in ((None,) if some else (None, "together"))]
    return patterns


def encoded(sampler: Sampler, modality: Modality, codec: Codec, given: list[Given]):
    """Known values of a modality, [n, L·C] float32, zero where nothing is given; a generator that waits in `yield`."""
    values = torch.zeros(len(given), modality.tokens, modality.channels)
    partly = [i for i, g in enumerate(given) if not g.generate.all()]
    if partly:
        rows = yield sampler.call(codec.encode, [given[i] for i in partly])
        for i, row in zip(partly, rows, strict=True):
            values[i] = row
    return values.flatten(1)


def encoded_null(sampler: Sampler, prepared: list[PreparedRequest], config: Config, codecs: Mapping[str, Codec]):
    """What "empty" guidance knows of every modality, [N] float32, or None where no request uses it; as `encoded`."""
    if not any(p.request.guidance_kind == "empty" for p in prepared):
        return None
    parts = []
    for m in config.model.modalities:
        parts.append((yield from encoded(sampler, m, codecs[m.name], [codecs[m.name].null()]))[0])
    return torch.cat(parts)


def argument_of(request: Request, modality: str) -> str:
    """The argument that gives this modality, or could."""
    return _argument("inputs", request.inputs, INPUTS, modality)


def mask_argument_of(request: Request, modality: str) -> str:
    """The argument that gives this modality's mask, or could."""
    return _argument("masks", request.masks, MASKS, modality)


def _argument(key: str, named: Mapping[str, object], shorthands: Mapping[str, str], modality: str) -> str:
    short = {name: argument for argument, name in shorthands.items()}
    full = f"{key}[{shown(modality)}]"
    return full if named.get(modality) is not None else short.get(modality, full)


def _check_names(request: Request, config: Config) -> None:
    names = [m.name for m in config.model.modalities]
    remedy = f"use one of {', '.join(names)}"
    for name in (*request.given, *request.given_masks):
        if name not in names:
            remedy = f"{remedy}, or the checkpoint emoji-sketch" if name == "sketch" else remedy
            raise InputError(argument_of(request, name), name, remedy, "is not a modality of the model")
    unknown = [name for name in request.order or () if name not in names] if request.order != "together" else []
    if unknown:
        raise InputError("order", unknown[0], remedy, "is not a modality of the model")


def _check_generated(request: Request, generate: Tensor, config: Config) -> None:
    if not generate.any():
        masks = [mask_argument_of(request, name) for name in request.given_masks]
        if masks:
            problem = "marks nothing in the middle square of the image, and all else is given"
            remedy = "give one that marks what is to be generated, or put _ in the prompt"
            raise InputError(", ".join(masks), next(iter(request.given_masks.values())), remedy, problem)
        arguments = ", ".join(argument_of(request, name) for name in request.given)
        remedy = "leave something out, put _ in the prompt, or give a mask with white in it"
        raise InputError(arguments, "all of it", remedy, "is given, nothing is left to generate")
    model = config.model
    for m in model.modalities:
        if generate[model.state_slices[m.name]].any() and m.name not in model.predicted:
            remedy = f"give all of {m.name}: this model generates {', '.join(model.predicted)} only"
            argument = argument_of(request, m.name)
            raise InputError(argument, request.given.get(m.name), remedy, "leaves something to generate")


def _stages(request: Request, generate: Tensor, config: Config) -> Stages:
    """The order in which modalities are generated; () where all that are generated move at once."""
    model, order = config.model, request.order
    if order is None:
        order = config.sampling.order if request.guidance_kind in (None, "masked") else "together"
    elif order != "together" and config.diffusion.conditioning != "clean":
        remedy = "use together: this model was trained with renoise conditioning"
        raise InputError("order", order, remedy, "needs a model with clean conditioning")
    if order in ("together", ()):
        return ()
    names = [m.name for m in model.modalities]
    made = [name for name in names if generate[model.state_slices[name]].any()]
    stages: list[tuple[int, ...]] = [(names.index(name),) for name in order if name in made]
    last = tuple(names.index(name) for name in made if name not in order)
    stages += [last] if last else []
    return tuple(stages) if len(stages) > 1 else ()


def _table(
    request: Request,
    guidance: float,
    temperature: float,
    stages: Stages,
    generate: Tensor,
    config: Config,
    solver: str,
    spacing: str,
) -> StepTable:
    N, model, anything_known = config.diffusion.timesteps, config.model, not generate.all()
    options: dict[str, Any] = {"eta": request.eta, "step_cache": request.step_cache, "order": stages}
    options |= {"categorical": model.categorical, "temperature": temperature if model.categorical else 1.0}
    if request.infill == "langevin":
        options |= {"inner_steps": request.inner_steps, "step_size": request.step_size}
    elif request.resample > 1:
        options |= {"resample": request.resample, "jump": request.jump}
    # With nothing known there is nothing to drop: modalities that move together guide each other in turn.
    kind = request.guidance_kind or ("masked" if anything_known or stages else "alternate")
    made = tuple(i for i, part in enumerate(model.state_slices.values()) if generate[part].any())
    guided = made if kind in ("alternate", "unidiffuser") else ()
    start, end = (way_to_time(N, x, spacing) for x in request.guidance_interval or (0, 1))
    first_stage = 1 if stages and not anything_known else 0
    return spaced_table(
        config.diffusion,
        request.steps,
        len(model.modalities),
        SolverOptions(solver, **options),
        GuidanceOptions(kind, guidance, (end, start), guided, first_stage),
        spacing,
    )
