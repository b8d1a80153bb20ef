"""What a caller asks for and what it gets: `Request`, `Watch`, `Result`, and every check that needs no model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias
from unicodedata import normalize

from engine.errors import InputError, shown

if TYPE_CHECKING:
    from PIL.Image import Image

TASKS = ("auto", "joint", "text-to-image", "image-to-text", "infill")
ATTENTIONS = ("auto", "sdpa", "triton", "xformers")
QUANTIZATIONS = ("none", "fp8")  # of the large products of each block
ADAPTER = "adapter"  # what command lines that take one adapter call it
MAX_NAME = 256  # characters of an adapter's name
MAX_ALPHA = 1_000_000  # of an adapter, also of its rank
SOLVERS = ("dpm++", "unipc", "sde-dpm++", "ddim", "ddpm")
SPACINGS = ("even", "power")
INFILLS = ("repaint", "langevin")
GUIDANCE_KINDS = ("masked", "alternate", "unidiffuser", "empty")
# The modalities that these arguments stand for.
INPUTS = {"prompt": "text", "image": "image", "sketch": "sketch"}
MASKS = {"mask": "image", "sketch_mask": "sketch"}
NO_WORD = "give words, or leave it out to have them generated"
MAX_NUM = 1024
MAX_STEPS = 20_000  # calls of the model for a sample, see `most_repeats`
MAX_SEED = 2**64 - 1
WHOLE_NUMBERS = {"num": (1, MAX_NUM), "steps": (1, 1000), "resample": (1, 100), "jump": (1, 1000),
                 "inner_steps": (1, 100), "step_cache": (1, 1000), "seed": (0, MAX_SEED)}  # fmt: skip
NUMBERS = {"guidance": (-100, 100), "eta": (0, 1), "step_size": (0.001, 100), "adapter_scale": (-100, 100),
           "temperature": (0.01, 100)}  # fmt: skip

OnStep: TypeAlias = Callable[[int, int], None] | None  # called with the steps that are done and those in all
OnPreview: TypeAlias = "Callable[[dict[int, Sample]], None] | None"  # with samples in progress by number


@dataclass(frozen=True)
class Request:
    """One task, `num` samples of it. What is given is known, everything else is generated.

    prompt    words; `_` is one word to be filled in; None: the whole text is generated
    image     a PIL image or a file, centre-cropped and resized to the model's size; None: all of it is generated
    mask      a PIL image or a file, white where `image` is to be regenerated, black where it is kept
    task      "auto": follows from what is given; another value only checks that the request is that task
    num       samples, with seeds seed, seed + 1, …
    steps     steps of the solver; where modalities are generated in an order, each takes as many
    solver    "dpm++" (DPM-Solver++(2M)), "unipc" (UniPC-2), "sde-dpm++" (SDE-DPM-Solver++(2M)), "ddim" or "ddpm"; None:
              dpm++, or ddpm where known parts are renoised
    guidance  scale w of classifier-free guidance, 1 means none; None: the checkpoint's default for the task, or 1 if
              nothing is given and all is generated together
    temperature  of words, for models that give words' probabilities: below 1 likelier words more often, and less
              variety; None: the checkpoint's default for the task
    seed      0 … 2⁶⁴ − num
    resample  how often each stretch of `jump` steps is done (RePaint); 1: once, no resampling
    jump      steps of such a stretch
    infill    how known parts that are renoised are fitted in: "repaint" by `resample` and `jump`; "langevin" by
              `inner_steps` Langevin steps at every time but the first, each a call of the model
    inner_steps, step_size  of "langevin"; the size is in units of the noise's variance; above 0.1 it narrows results
    spacing   of the times: "even", or "power", shorter towards the end; None: the better one for the model's schedule
    unknown_words  "error": words outside the vocabulary are refused; "fill": they are filled in like `_`
    guidance_interval  (start, end) of the steps that are guided, as fractions 0 … 1 of the way; None: all
    step_cache  an approximation: run the inner shared blocks at every `step_cache`-th step only, 1: at every step; they
              also run whenever the passes change, which in alternately guided joint generation is at every step
    order     "together": all modalities are denoised at once, as in the paper; or their names in the order in which
              they are generated, each guided by the earlier ones; others follow together; None: the checkpoint's
    eta       η of solver "ddim": 0 deterministic, 1 as noisy as DDPM
    guidance_kind  "masked" drops the known part (the paper's); "alternate" guides one modality a step by dropping the
              others; "unidiffuser" has an extra pass for each modality; "empty" replaces the known part by the empty
              text and a grey image; None: masked, or alternate where nothing is known and all are generated together
    adapter   the name of a LoRA adapter of `Engine.load_adapter`; None: the checkpoint's own weights
    adapter_scale  how much of it is added to the weights
    inputs    what is given of any modality, by its name: `prompt` is inputs["text"], `image` inputs["image"]
    masks     for given images by modality: `mask` is masks["image"]
    sketch    for models that have sketches: inputs["sketch"], black lines on white, like `image`
    sketch_mask  masks["sketch"]

    Raises InputError on values out of range.
    """

    prompt: str | None = None
    image: "Image | str | PathLike | None" = None
    mask: "Image | str | PathLike | None" = None
    task: str = "auto"
    num: int = 1
    steps: int = 25
    solver: str | None = None
    guidance: float | None = None
    seed: int = 0
    resample: int = 1
    jump: int = 5
    unknown_words: str = "error"
    guidance_interval: tuple[float, float] | None = None
    step_cache: int = 1
    order: str | tuple[str, ...] | None = None
    eta: float = 0.0
    guidance_kind: str | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    masks: Mapping[str, Any] = field(default_factory=dict, hash=False)
    spacing: str | None = None
    infill: str = "repaint"
    inner_steps: int = 7
    step_size: float = 2.0
    adapter: str | None = None
    adapter_scale: float = 1.0
    sketch: "Image | str | PathLike | None" = None
    sketch_mask: "Image | str | PathLike | None" = None
    temperature: float | None = None

    def __post_init__(self):
        self._check_choices()
        self._check_numbers()
        for key, shorthands in (("inputs", INPUTS), ("masks", MASKS)):
            names = getattr(self, key)
            if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names):
                raise InputError(key, names, "give a mapping from names of modalities", "is not a mapping of names")
            object.__setattr__(self, key, dict(names))  # a copy: the caller may change its own
            for shorthand, name in shorthands.items():
                if getattr(self, shorthand) is not None and name in names:
                    raise InputError(shorthand, name, f"leave it out of {key}", "is given twice")
        text = self.inputs.get("text")
        if not isinstance(text, str) or text:  # "" is known to be empty
            _check_text(self.given.get("text"), "prompt" if self.prompt is not None else "inputs['text']")
        unmasked = sorted(self.given_masks.keys() - self.given.keys())
        if unmasked:
            name = unmasked[0]
            shorthands = [short for short, of in MASKS.items() if of == name and getattr(self, short) is not None]
            argument = shorthands[0] if shorthands else f"masks[{shown(name)}]"
            raise InputError(
                argument, self.given_masks[name], f"give {name} too", f"needs the {name} that it belongs to"
            )
        self._check_task()

    @property
    def given(self) -> dict[str, Any]:
        """What is given, by modality."""
        return self._with_shorthands(self.inputs, INPUTS)

    @property
    def given_masks(self) -> dict[str, Any]:
        """The masks that are given, by modality."""
        return self._with_shorthands(self.masks, MASKS)

    def _with_shorthands(self, named: Mapping[str, Any], shorthands: Mapping[str, str]) -> dict[str, Any]:
        short = {name: getattr(self, argument) for argument, name in shorthands.items()}
        return {name: value for name, value in [*named.items(), *short.items()] if value is not None}

    def _check_choices(self) -> None:
        choices: dict[str, tuple[str, ...]] = {"task": TASKS, "infill": INFILLS, "unknown_words": ("error", "fill")}
        optional: dict[str, tuple[str, ...]] = {"solver": SOLVERS, "guidance_kind": GUIDANCE_KINDS, "spacing": SPACINGS}
        choices |= {key: allowed for key, allowed in optional.items() if getattr(self, key) is not None}
        for key, allowed in choices.items():
            value = getattr(self, key)
            if not isinstance(value, str) or value not in allowed:  # an array is compared element by element
                raise InputError(key, value, f"use one of {', '.join(allowed)}", "is not known")
        order = self.order
        if isinstance(order, str) and order != "together":
            raise InputError("order", order, 'use "together", or a list of names of modalities', "is not known")
        if order is not None and not isinstance(order, str):
            names = list(order) if isinstance(order, list | tuple) else []
            if not names or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
                raise InputError("order", order, "give distinct names of modalities, or together")
            object.__setattr__(self, "order", tuple(names))

    def _check_numbers(self) -> None:
        for key, (lowest, highest) in WHOLE_NUMBERS.items():
            value = _plain(getattr(self, key))
            if key == "seed" and isinstance(self.num, Integral):
                highest = MAX_SEED + 1 - int(self.num)
            if not is_whole(value) or not lowest <= value <= highest:
                raise InputError(key, value, f"use a whole number from {lowest} to {highest}")
            object.__setattr__(self, key, int(value))
        if self.infill == "langevin" and self.resample > 1:
            raise InputError("resample", self.resample, "use 1, or infill repaint", "is another way than langevin")
        key, most = most_repeats(self.infill, self.steps, MAX_STEPS)
        if getattr(self, key) > most:
            raise InputError(key, getattr(self, key), f"use at most {most}", "makes too many steps")
        if self.resample > 1 and self.jump >= self.steps:
            remedy = f"use a jump below the {self.steps} steps, more steps, or resample 1"
            raise InputError("jump", self.jump, remedy, "is too long")
        for key, (least, greatest) in NUMBERS.items():
            value = _plain(getattr(self, key))
            if key in ("guidance", "temperature") and value is None:
                continue
            if not is_number(value) or not least <= value <= greatest:  # also NaN
                raise InputError(key, value, f"use a number from {least} to {greatest}")
            object.__setattr__(self, key, float(value))
        if self.eta != 0 and self.solver != "ddim":
            raise InputError("eta", self.eta, f"use solver ddim; {self.solver or 'the default'} has no eta")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise InputError("adapter", self.adapter, "give the name that it was loaded under", "is not a string")
        if self.adapter is None and self.adapter_scale != 1:
            raise InputError("adapter_scale", self.adapter_scale, "give adapter too", "needs an adapter")
        if self.guidance_interval is not None:
            pair = self.guidance_interval
            ends = [_plain(x) for x in pair] if isinstance(pair, tuple | list) else []
            if len(ends) != 2 or not all(map(is_number, ends)) or not 0 <= ends[0] < ends[1] <= 1:
                raise InputError("guidance_interval", pair, "use two numbers, 0 <= start < end <= 1")
            object.__setattr__(self, "guidance_interval", (float(ends[0]), float(ends[1])))

    def _check_task(self) -> None:
        given = self.given
        text, image, partial = "text" in given, "image" in given, bool(self.given_masks)
        fits = {
            "joint": not given,
            "text-to-image": text and not image,
            "image-to-text": image and not text and not partial,
            "infill": bool(given),
        }
        remedy = {
            "joint": "leave out prompt and image",
            "text-to-image": "give a prompt and no image",
            "image-to-text": "give an image, no mask and no prompt",
            "infill": "give a prompt with _, or an image with a mask",
        }
        if self.task != "auto" and not fits[self.task]:
            raise InputError("task", self.task, f"{remedy[self.task]}, or use auto", "does not fit what is given")


def most_repeats(infill: str, steps: int, calls: int) -> tuple[str, int]:
    """The argument that repeats steps, and the most that it may be if the model is called so often for a sample."""
    return ("resample", calls // steps) if infill == "repaint" else ("inner_steps", calls // steps - 1)


def _check_text(prompt, argument: str) -> None:
    if prompt is None:
        return
    if not isinstance(prompt, str):
        raise InputError(argument, prompt, "give a string, one request per prompt", "is not a string")
    if not any(c.isalnum() or c == "_" for c in normalize("NFKC", prompt)):
        raise InputError(argument, prompt, NO_WORD, "has no word")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in prompt):
        raise InputError(argument, prompt, "give it in UTF-8", "holds bytes that are not text")


def _plain(value):
    """A number of numpy, or an array or tensor of no dimensions, as Python's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def is_whole(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class Watch:
    """How a call is served, see `Engine.submit`. Raises InputError."""

    progress: OnStep = None
    priority: int = 0
    preview: OnPreview = None
    preview_every: int = 1

    def __post_init__(self):
        for key, arguments in (("progress", "two numbers"), ("preview", "a dict")):
            value = getattr(self, key)
            if value is not None and not callable(value):
                raise InputError(key, value, f"give a function of {arguments}", "cannot be called")
        if not is_whole(self.priority):
            raise InputError("priority", self.priority, "use a whole number")
        if not is_whole(self.preview_every) or self.preview_every < 1:
            raise InputError("preview_every", self.preview_every, "use a whole number from 1")


@dataclass(frozen=True)
class Sample:
    """One joint sample: a value of each modality."""

    outputs: Mapping[str, Any]  # by modality: a PIL image or a string
    seed: int
    confidence: float  # mean certainty of the words' decoding, 0…1; known words are certain
    word_confidence: tuple[float, ...] = ()  # of each word of the text

    @property
    def image(self) -> "Image":
        return self.outputs["image"]

    @property
    def text(self) -> str:
        return self.outputs["text"]


@dataclass(frozen=True)
class Stats:
    """What an engine has done since it was made."""

    forwards: int  # calls of the model
    replays: int  # of these, from a CUDA graph
    samples: int  # finished
    flops: int  # of the forwards' matrix products
    bytes: int  # that the forwards moved at least, see `engine.model.cost`
    prepare_seconds: float  # of all calls together: requests into the model's terms, what is given encoded
    sample_seconds: float  # the steps; where calls share them, each counts them
    decode_seconds: float  # states into images and texts
    memory: int  # bytes, the peak: allocated by this process on the CUDA device, or resident on a CPU


class NotFiniteSamplesError(FloatingPointError):
    """Samples that came out as NaN or infinity; the message names the first by its request and seed.

    results  of all requests in their order, each without those samples
    """

    def __init__(self, message: str, results: "list[Result]"):
        super().__init__(message)
        self.results = results


@dataclass(frozen=True)
class Result:
    """The samples of one request, in the order of their seeds; `image` and `text` are the first's."""

    request: Request
    task: str  # what the request was: joint, text-to-image, image-to-text, …, or infill
    guidance: float  # the scale that was used
    order: tuple[str, ...]  # in which modalities were generated; (): together
    solver: str  # that was used
    spacing: str  # that was used
    samples: tuple[Sample, ...]

    @property
    def image(self) -> "Image":
        return self.samples[0].image

    @property
    def text(self) -> str:
        return self.samples[0].text
