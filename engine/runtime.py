"""`Engine`: the whole flow of a request, from words, pictures and masks through the sampler and back."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from engine import masks
from engine.checkpoint import BUILT_IN, Checkpoint, CheckpointError, load
from engine.codecs.image import ImageCodec
from engine.data.coco import DAMAGED, fit_image
from engine.device import resolve
from engine.graphs import compile_blocks
from engine.pictures import to_image
from engine.request import ATTENTIONS, Request, RequestError, Result, Sample
from engine.sampler import Row, sample
from engine.schedule import NoiseSchedule, solver_table, timesteps

# Guidance where a request names none: for text-to-image and image-to-text the best of 1, 2, 3 and 5 on the built-in
# model (its card has the sweep); joint runs unguided, in one pass, and infill was not swept.
GUIDANCE = {"joint": 1.0, "text-to-image": 5.0, "image-to-text": 3.0, "infill": 3.0}
FEATHER = 2  # pixels over which a regenerated region blends into the kept one, on its own side


@dataclass(frozen=True)
class Prepared:
    """A request in the model's terms; all of its samples share it but for their seeds."""

    request: Request
    task: str
    guidance: float
    generate: Tensor  # [N] bool
    known: Tensor  # [N] float32
    holes: Tensor  # [L] bool, words of the prompt to be filled in
    pixels: Tensor | None  # [3, S, S] in −1..1, the given picture
    mask: np.ndarray | None  # [S, S] bool, its pixels to regenerate


class Engine:
    """A loaded model that samples; make one with `Engine.from_pretrained` and close it, or use it in a `with`.

    Calls from several threads are served one after the other.
    """

    def __init__(self, loaded: Checkpoint, device: torch.device, dtype: torch.dtype, max_rows: int = 64):
        self.config, self.text = loaded.config, loaded.text
        self.model = loaded.model.to(device, dtype)
        self.device, self.dtype, self.max_rows = device, dtype, max_rows
        self.schedule = NoiseSchedule(self.config.diffusion.schedule, self.config.diffusion.timesteps)
        self._image_folder = loaded.image_folder
        self._lock = threading.Lock()
        with torch.inference_mode():
            # All times at once: the loop only changes indices into this table.
            self._table = self.model.time_table(torch.arange(self.schedule.timesteps + 1, device=device))

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | PathLike | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        compile: bool = False,
        graphs: bool = True,
        max_rows: int = 64,
    ) -> "Engine":
        """Loads a checkpoint folder, default the built-in one.

        device     "auto", "cpu", "cuda" or "cuda:N"
        dtype      "auto" (bfloat16 where native), "float32", "bfloat16", "float16"; the sampler's state stays float32
        attention  "auto" or "sdpa"
        compile    torch.compile of the transformer blocks, at the first forward of each shape
        graphs     allows CUDA-graph capture; this version never captures, so that it changes nothing yet
        max_rows   samples computed together
        Raises ValueError (of several kinds) that name the argument or the damaged file.
        """
        if attention not in ATTENTIONS:
            raise ValueError(f"attention: {attention!r} is not known; use one of {', '.join(ATTENTIONS)}")
        if attention not in ("auto", "sdpa"):
            raise ValueError(f"attention: {attention!r} is not available in this version; use auto or sdpa")
        if max_rows < 1:
            raise ValueError(f"max_rows: {max_rows} does not work; use 1 or more")
        where, what = resolve(device, dtype)
        engine = cls(load(BUILT_IN if checkpoint is None else checkpoint), where, what, max_rows)
        if compile:
            compile_blocks(engine.model.blocks())
        return engine

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model; the engine cannot be used afterwards."""
        with self._lock:
            self.model = None
            self.__dict__.pop("image", None)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def warmup(self, batch: int = 1) -> None:
        """Runs one step of `batch` samples with and without guidance, so that nothing is loaded or compiled later."""
        for guidance in (1.0, 2.0):
            self.generate(Request(num=batch, steps=1, guidance=guidance))

    def generate(
        self, requests: Request | Sequence[Request], callback: Callable[[int, int], None] | None = None
    ) -> Result | list[Result]:
        """Samples one request, or several of any tasks together.

        callback  called as `callback(steps done, steps in all)` after every step; raise from it to cancel
        Returns a Result, or a list of them in the requests' order. Raises ValueError before anything is computed if
        one of the requests cannot be served.
        """
        several = [requests] if isinstance(requests, Request) else list(requests)
        if not several:
            return []
        with self._lock, torch.inference_mode():
            if self.model is None:
                raise RuntimeError("this engine is closed; make another with Engine.from_pretrained")
            prepared = [self._prepare(request) for request in several]
            rows = [row for p in prepared for row in self._rows(p)]
            self.image  # noqa: B018 - loaded now, so that a damaged one is told of before the sampling, not after
            states = self._sample(rows, callback)
            results = []
            for p in prepared:
                results.append(self._result(p, states[: p.request.num]))
                states = states[p.request.num :]
        return results[0] if isinstance(requests, Request) else results

    @cached_property
    def image(self) -> ImageCodec:
        """The picture codec, loaded when first needed: importing its library takes longer than many a sampling run."""
        size, patch, wanted = self.config.image.size, self.config.image.patch, self.config.model.modality("image")
        try:
            codec = ImageCodec.load(self._image_folder, size, patch, self.device)
        except ValueError as error:
            raise CheckpointError(f"checkpoint: {error}") from None
        if (codec.tokens, codec.channels) != (wanted.tokens, wanted.channels):
            raise CheckpointError(
                f"checkpoint: {self._image_folder} makes {codec.tokens} tokens of {codec.channels} channels, "
                f"config.json says {wanted.tokens} of {wanted.channels}; copy the folder again"
            )
        return codec

    def _prepare(self, request: Request) -> Prepared:
        """Request → packed known values and generate mask."""
        model, size = self.config.model, self.config.image.size
        words = model.modality("text")
        text, unknown = self.text.encode(request.prompt, words.tokens, request.unknown_words)  # [L, C], [L]
        generate = {"text": masks.text_elements(unknown, words.channels)}
        holes = unknown if request.prompt is not None else torch.zeros_like(unknown)  # [L]; else its length is free too
        known = {"text": text}

        pixels = mask = None
        picture = model.modality("image")
        if request.image is None:
            known["image"] = torch.zeros(picture.tokens, picture.channels)
            generate["image"] = torch.ones(picture.tokens, picture.channels, dtype=torch.bool)
        else:
            given = _opened("image", request.image)
            try:
                pixels = fit_image(given, size).float() / 127.5 - 1  # [3, S, S]
            except DAMAGED as error:
                raise RequestError(f"image: mode {given.mode} cannot be used ({error}); give RGB") from None
            mask = np.zeros((size, size), bool) if request.mask is None else _mask(request.mask, given.size, size)
            known["image"] = self.image.encode(pixels[None].to(self.device))[0].cpu()
            generate["image"] = masks.image_elements(
                mask, self.image.factor, self.image.patch, self.image.latent_channels
            )
        packed = masks.pack(generate, model)  # [N]
        if self.config.diffusion.conditioning == "clean":
            packed = masks.whole_tokens(packed, model)
        if not packed.any():
            raise RequestError("prompt, image: everything is given, nothing is left to generate; "
                               "put _ in the prompt or give a mask with white in it")  # fmt: skip
        for name, part in model.state_slices.items():
            if packed[part].any() and name not in model.predicted:
                raise RequestError(f"{'prompt' if name == 'text' else name}: this model takes {name} as given and "
                                   f"generates {', '.join(model.predicted)} only; give all of it")  # fmt: skip
        task = masks.task_of(packed, model)
        if request.task not in ("auto", task):
            raise RequestError(f"task: {request.task!r} does not fit what is given, which is {task}; use auto")
        guidance = GUIDANCE[task] if request.guidance is None else float(request.guidance)
        values = torch.cat([known[m.name].flatten() for m in model.modalities])  # [N]
        return Prepared(request, task, guidance, packed, values, holes, pixels, mask)

    def _rows(self, p: Prepared) -> list[Row]:
        """One row per sample, which differ in their seeds."""
        diffusion, request = self.config.diffusion, p.request
        table = solver_table(
            self.schedule,
            timesteps(diffusion.timesteps, request.steps),
            prediction=diffusion.prediction,
            conditioning=diffusion.conditioning,
            solver=request.solver,
            resample=request.resample,
            jump=request.jump,
            # With nothing known there is nothing to drop: the modalities guide each other in turn.
            guidance="alternate" if p.task == "joint" else "masked",
            guidance_scale=p.guidance,
            guided_modalities=tuple(range(len(self.config.model.modalities))) if p.task == "joint" else (),
        )
        return [Row(request.seed + i, table, p.generate, p.known) for i in range(request.num)]

    def _sample(self, rows: list[Row], callback: Callable[[int, int], None] | None) -> Tensor:
        """Packed samples [B, N] float32 on the CPU, computed `max_rows` at a time."""
        parts = [rows[i : i + self.max_rows] for i in range(0, len(rows), self.max_rows)]
        lengths = [max(row.table.steps for row in part) for part in parts]
        states = []
        for i, part in enumerate(parts):
            before = sum(lengths[:i])

            def report(done: int, _, before=before) -> None:
                if callback is not None:
                    callback(before + done, sum(lengths))

            states.append(sample(self._denoise, part, self.config.model, self.device, report).cpu())
        return torch.cat(states)

    def _denoise(self, inputs: Tensor, times: Tensor, outputs: tuple[str, ...]) -> Tensor:
        return self.model(inputs, self._table, times, outputs)

    def _result(self, p: Prepared, states: Tensor) -> Result:
        """Packed samples [num, N] → pictures and texts; what was given comes back as it was."""
        model = self.config.model
        picture, words = model.modality("image"), model.modality("text")
        tokens = states[:, model.state_slices["text"]].unflatten(1, (words.tokens, words.channels))
        texts = self.text.decode(tokens, p.holes)
        if p.mask is not None and not p.mask.any():
            pixels = p.pixels.expand(len(states), -1, -1, -1)  # [num, 3, S, S]
        else:
            tokens = states[:, model.state_slices["image"]].unflatten(1, (picture.tokens, picture.channels))
            pixels = self.image.decode(tokens.to(self.device)).cpu()  # [num, 3, S, S]
            if p.mask is not None:
                weight = torch.from_numpy(masks.feather(p.mask, FEATHER))  # [S, S]
                pixels = torch.where(weight > 0, p.pixels + weight * (pixels - p.pixels), p.pixels)
        samples = (
            Sample(to_image(image), text.text, p.request.seed + i, text.confidence)
            for i, (image, text) in enumerate(zip(pixels, texts, strict=True))
        )
        return Result(p.request, p.task, p.guidance, tuple(samples))


def _opened(argument: str, image) -> Image.Image:
    """A PIL image or a file → an upright PIL image in memory."""
    try:
        if not isinstance(image, Image.Image):
            with Image.open(image) as file:
                file.load()
                image = file
        return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise RequestError(f"{argument}: {image} does not exist; give a picture's file") from None
    except DAMAGED as error:
        raise RequestError(f"{argument}: {image} is no readable picture ({error}); give a whole one") from None
    except (TypeError, AttributeError):
        raise RequestError(f"{argument}: a {type(image).__name__} is no picture; give a PIL image or a file") from None


def _mask(mask, picture: tuple[int, int], size: int) -> np.ndarray:
    """A PIL image or a file of the picture's size → [size, size] bool, True where any pixel below is white."""
    mask = _opened("mask", mask)
    if mask.size != picture:
        raise RequestError(f"mask: {mask.width}x{mask.height} does not fit the image's {picture[0]}x{picture[1]}; "
                           "give a mask of the image's size")  # fmt: skip
    # As floats: in bytes, a lone white pixel of a large mask would round to black.
    white = mask.convert("L").point(lambda grey: 255 * (grey > 127)).convert("F")
    return np.asarray(ImageOps.fit(white, (size, size), Image.Resampling.BOX)) > 0
