"""What a caller asks for and what it gets: `Request`, `Result`, and every check that needs no model."""

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

TASKS = ("auto", "joint", "text-to-image", "image-to-text", "infill")
ATTENTIONS = ("auto", "sdpa", "triton", "xformers")
SOLVERS = ("dpm++", "ddim", "ddpm")
MAX_NUM = 1024


class RequestError(ValueError):
    """A request that cannot be served; the message names the argument, the value and the remedy."""


@dataclass(frozen=True)
class Request:
    """One task, `num` samples of it. What is given is known, everything else is generated.

    prompt    words; `_` is one word to be filled in; None: the whole text is generated
    image     a PIL image or a file, centre-cropped and resized to the model's size; None: all of it is generated
    mask      a PIL image or a file, white where `image` is to be regenerated, black where it is kept
    task      "auto" is told from what is given; another value only checks that the request is that task
    num       samples, with seeds seed, seed + 1, …
    steps     steps of the solver
    solver    "dpm++" (DPM-Solver++(2M)), "ddim" or "ddpm"
    guidance  scale w of classifier-free guidance, 1 is none; None: the task's default
    guidance_interval  (start, end) of the steps that are guided, as fractions 0 … 1 of the way; None: all
    seed      0 … 2⁶⁴ − num
    resample  how often each stretch of `jump` steps is done (RePaint); 1: once, no resampling
    jump      steps of such a stretch
    step_cache  an approximation: run the inner shared blocks at every so many steps only, 1: at all; they also run
              whenever the passes change, which in guided joint generation is at every step
    unknown_words  "error": words outside the vocabulary are refused; "fill": they are filled in like `_`
    """

    prompt: str | None = None
    image: "Image | str | PathLike | None" = None
    mask: "Image | str | PathLike | None" = None
    task: str = "auto"
    num: int = 1
    steps: int = 25
    solver: str = "dpm++"
    guidance: float | None = None
    seed: int = 0
    resample: int = 1
    jump: int = 5
    unknown_words: str = "error"
    guidance_interval: tuple[float, float] | None = None
    step_cache: int = 1

    def __post_init__(self):
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise RequestError(f"prompt: {self.prompt!r} is no text; give a string, one request per prompt")
        if self.prompt is not None and not any(c.isalnum() or c == "_" for c in self.prompt):
            raise RequestError(
                f"prompt: {self.prompt!r} has no word; give words, or leave it out to have them generated"
            )
        if self.prompt is not None and any(0xD800 <= ord(c) <= 0xDFFF for c in self.prompt):
            raise RequestError(f"prompt: {self.prompt!r} holds bytes that are no text; give it in UTF-8")
        for key, allowed in (("task", TASKS), ("solver", SOLVERS), ("unknown_words", ("error", "fill"))):
            if getattr(self, key) not in allowed:
                raise RequestError(f"{key}: {getattr(self, key)!r} is not known; use one of {', '.join(allowed)}")
        for key, lowest, highest in (
            ("num", 1, MAX_NUM), ("steps", 1, 1000), ("resample", 1, 100), ("jump", 1, 1000), ("step_cache", 1, 1000),
            ("seed", 0, 2**64 - (self.num if isinstance(self.num, int) else 1)),
        ):  # fmt: skip
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
                raise RequestError(f"{key}: {value!r} does not work; use a whole number from {lowest} to {highest}")
        if self.resample > 1 and self.jump >= self.steps:
            raise RequestError(f"jump: {self.jump} does not work with {self.steps} steps; use fewer than the steps")
        if self.guidance is not None and not (
            isinstance(self.guidance, int | float) and -100 <= self.guidance <= 100
        ):  # also NaN
            raise RequestError(f"guidance: {self.guidance!r} does not work; use a number from -100 to 100")
        if self.guidance_interval is not None and not _is_interval(self.guidance_interval):
            raise RequestError(
                f"guidance_interval: {self.guidance_interval!r} does not work; use two numbers, 0 <= start < end <= 1"
            )
        if self.mask is not None and self.image is None:
            raise RequestError("mask: a mask needs the image it belongs to; give image too")
        self._check_task()

    def _check_task(self) -> None:
        wanted = {
            "joint": self.prompt is None and self.image is None,
            "text-to-image": self.prompt is not None and self.image is None,
            "image-to-text": self.prompt is None and self.image is not None and self.mask is None,
            "infill": self.prompt is not None or self.image is not None,
        }
        remedy = {
            "joint": "leave out prompt and image",
            "text-to-image": "give a prompt and no image",
            "image-to-text": "give an image, no mask and no prompt",
            "infill": "give a prompt with _, or an image with a mask",
        }
        if self.task != "auto" and not wanted[self.task]:
            raise RequestError(f"task: {self.task!r} does not fit what is given; {remedy[self.task]}, or use auto")


def _is_interval(value) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(x, int | float) for x in value)
    return pair and 0 <= value[0] < value[1] <= 1


@dataclass(frozen=True)
class Sample:
    """One picture and its text."""

    image: "Image"
    text: str
    seed: int
    confidence: float  # mean certainty of the words' decoding, 0…1; known words are certain


@dataclass(frozen=True)
class Result:
    """The samples of one request, in the order of their seeds; `image` and `text` are the first's."""

    request: Request
    task: str  # what the request was: joint, text-to-image, image-to-text or infill
    guidance: float  # the scale that was used
    samples: tuple[Sample, ...]

    @property
    def image(self) -> "Image":
        return self.samples[0].image

    @property
    def text(self) -> str:
        return self.samples[0].text
