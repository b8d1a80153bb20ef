"""`Engine`: the whole flow of a request, from words, pictures and masks through the sampler and back."""

import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
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
from engine.graphs import StepGraphs, compile_blocks
from engine.kernels import backend
from engine.model import InnerCache, PSUNet
from engine.pictures import to_image
from engine.request import ATTENTIONS, MAX_NUM, Request, RequestError, Result, Sample
from engine.sampler import Row, Sampler
from engine.schedule import NoiseSchedule, spaced_table
from engine.uvit import UViT

# Guidance where a request names none: for text-to-image and image-to-text the best of 1, 2, 3 and 5 on an early state
# of the built-in model (benchmarks/RESULTS.md sweeps it as it is); joint runs unguided, in one pass; infill was not
# swept.
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


@dataclass(frozen=True)
class Stats:
    """What an engine has done since it was made."""

    forwards: int  # calls of the model
    replays: int  # of these, from a CUDA graph
    rows: int  # samples finished
    prepare_seconds: float  # of all calls together: requests into the model's terms, given pictures encoded
    sample_seconds: float  # the steps; where calls share them, each counts them
    decode_seconds: float  # pictures and words
    memory: int  # bytes, the peak: allocated by this process on the CUDA device, or resident on a CPU


class Engine:
    """A loaded model that samples; make one with `Engine.from_pretrained` and close it, or use it in a `with`.

    Several threads may call it: their samples share the slots of one batch.
    """

    def __init__(
        self,
        loaded: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        max_rows: int = 64,
        attention: str = "auto",
        compile: bool = False,
        graphs: bool = True,
    ):
        self.config, self.text = loaded.config, loaded.text
        self.model = loaded.model.to(device, dtype)
        self.device, self.dtype, self.max_rows = device, dtype, max_rows
        self.schedule = NoiseSchedule(self.config.diffusion.schedule, self.config.diffusion.timesteps)
        self._image_folder = loaded.image_folder
        self._encode_text = lru_cache(maxsize=256)(self.text.encode)
        self._lock = threading.Lock()  # guards the two that follow
        self._codec: ImageCodec | None = None
        self._seconds = [0.0, 0.0, 0.0]
        for block in self.model.blocks():
            block.attention = attention
        if compile:
            compile_blocks(self.model.blocks())
        with torch.inference_mode():
            # All times at once: the loop only changes indices into this table.
            self._table = self.model.time_table(torch.arange(self.schedule.timesteps + 1, device=device))
        cuda = device.type == "cuda"
        captured = StepGraphs(device) if cuda and graphs else None
        if captured is not None and isinstance(self.model, PSUNet):
            self.model.side_by_side = captured.side_by_side
        # Where every size of batch is compiled or captured for itself there are few, else there is one for any number.
        few = [2**i for i in range(max_rows.bit_length()) if 2**i < max_rows] + [max_rows]
        own = cuda and (compile or graphs)
        self._apart = few if own else [1] if compile else []  # one row is always compiled for itself
        self._sampler = Sampler(
            self._denoise, self.config.model, device,
            # A U-ViT's modalities meet at once, and it has no blocks outside of its stack.
            encode=self._encode if isinstance(self.model, PSUNet) else None,
            keep=self._keep if isinstance(self.model, PSUNet) and len(self.model.shared_in) else None,
            buckets=few if own else range(1, max_rows + 1),
            graphs=captured,
        )  # fmt: skip

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
        attention  "auto" (the fastest measured), "sdpa", "triton" or "xformers", the last two on CUDA only
        compile    torch.compile of the transformer blocks, at the first forward of each shape
        graphs     on CUDA, captures each kind of step in a CUDA graph when it first comes, and replays it from then on
        max_rows   samples computed together
        Raises ValueError (of several kinds) that name the argument or the damaged file.
        """
        if attention not in ATTENTIONS:
            raise ValueError(f"attention: {attention!r} is not known; use one of {', '.join(ATTENTIONS)}")
        if max_rows < 1:
            raise ValueError(f"max_rows: {max_rows} does not work; use 1 or more")
        where, what = resolve(device, dtype)
        backend.check("attention", attention, where.type)
        loaded = load(BUILT_IN if checkpoint is None else checkpoint)
        return cls(loaded, where, what, max_rows, attention, compile, graphs)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model, between two steps of whatever is running; the engine cannot be used afterwards.

        Calls that are not done raise RuntimeError in their own threads.
        """
        with self._sampler.paused(), self._lock:
            vars(self.model or self).pop("side_by_side", None)  # the model is the caller's again
            self.model = self._table = self._codec = None
            self._sampler.close()

    def warmup(self, batch: int = 1) -> None:
        """Runs a step of every task with and without guidance, so that nothing is loaded, compiled or captured later.

        batch  samples that will come together; sizes that are compiled or captured apart are all done up to this one
        Shows its progress on a terminal. Steps that use a step cache are captured when they first come, and all steps
        again when a request has 64 or more of them, since the memory of all tables then grows. Raises ValueError if the
        batch is more than `max_rows`.
        """
        from tqdm import tqdm

        if not 1 <= batch <= self.max_rows:
            raise ValueError(f"batch: {batch} does not work; use 1 to max_rows, {self.max_rows}")
        size, words = self.config.image.size, self.text.vocabulary[1:2]
        # By what is generated; a model that takes a modality as given cannot have it in there.
        asked = {("image", "text"): [Request()], ("text",): [Request(image=Image.new("RGB", (size, size)))],
                 ("image",): [Request(prompt=word) for word in words]}  # fmt: skip
        tasks = [
            task for made, several in asked.items() if {*made} <= {*self.config.model.predicted} for task in several
        ]
        # The largest first: the smaller ones fit into its memory.
        sizes = [batch, *(rows for rows in reversed(self._apart) if rows < batch)]
        kinds = [(rows, task, w) for rows in sizes for task in tasks for w in (1.0, 2.0)]
        for rows, task, w in tqdm(kinds, desc="warm-up", unit="kind of step", disable=None):
            parts = [min(MAX_NUM, rows - i) for i in range(0, rows, MAX_NUM)]
            self.generate([replace(task, num=num, steps=1, guidance=w) for num in parts])

    def stats(self) -> Stats:
        sampler = self._sampler
        replays = sampler.graphs.replays if sampler.graphs else 0
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Stats(sampler.forwards, replays, sampler.finished, *self._seconds, memory)

    def generate(
        self, requests: Request | Sequence[Request], callback: Callable[[int, int], None] | None = None
    ) -> Result | list[Result]:
        """Samples one request, or several of any tasks together.

        callback  called in this thread as `callback(steps done, steps in all)` after every step that some of the
                  samples took part in, the steps of all samples counted; raise from it to cancel
        Returns a Result, or a list of them in the requests' order. Raises ValueError before anything is computed if
        one of the requests cannot be served, torch.OutOfMemoryError where half of the rows are still too many.
        """
        several = [requests] if isinstance(requests, Request) else list(requests)
        for other in several:
            if not isinstance(other, Request):
                raise RequestError(f"requests: {other!r} is no Request; give a Request or a list of them")
        if not several:
            return []
        self._open_model()
        with torch.inference_mode():
            with self._timed(0):
                prepared = [self._prepare(request) for request in several]
                rows = [row for p in prepared for row in self._rows(p)]
                self.image  # noqa: B018 - loaded now: a damaged one is told of before the sampling, not after
            with self._timed(1):
                states = self._sampler.run(rows, callback).cpu()
            results = []
            with self._timed(2):
                for p in prepared:
                    results.append(self._result(p, states[: p.request.num]))
                    states = states[p.request.num :]
        return results[0] if isinstance(requests, Request) else results

    @contextmanager
    def _timed(self, stage: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        with self._lock:
            self._seconds[stage] += time.perf_counter() - start

    @property
    def image(self) -> ImageCodec:
        """The picture codec, loaded when first needed: importing its library takes longer than many a sampling run."""
        with self._lock:
            self._open_model()
            if self._codec is None:
                self._codec = self._load_image()
            return self._codec

    def _load_image(self) -> ImageCodec:
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
        if request.step_cache > 1 and self._sampler.keep is None:
            raise RequestError(f"step_cache: {request.step_cache} needs a PS-U-Net of 3 or more shared blocks; use 1")
        words = model.modality("text")
        text, unknown = self._encode_text(request.prompt, words.tokens, request.unknown_words)  # [L, C], [L]
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
            pixels = masks.painted_over(pixels, mask)
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
        request, diffusion, joint = p.request, self.config.diffusion, p.task == "joint"
        # From fractions of the way to times, which run from N down.
        start, end = (round(diffusion.timesteps * (1 - x)) for x in request.guidance_interval or (0, 1))
        table = spaced_table(
            self.schedule, request.steps, prediction=diffusion.prediction, conditioning=diffusion.conditioning,
            solver=request.solver, resample=request.resample, jump=request.jump,
            # With nothing known there is nothing to drop: the modalities guide each other in turn.
            guidance="alternate" if joint else "masked", guidance_scale=p.guidance, guidance_interval=(end, start),
            guided_modalities=tuple(range(len(self.config.model.modalities))) if joint else (),
            step_cache=request.step_cache,
        )  # fmt: skip
        return [Row(request.seed + i, table, p.generate, p.known) for i in range(request.num)]

    def _denoise(
        self,
        inputs: Tensor,
        times: Tensor,
        outputs: tuple[str, ...],
        kept: Tensor | None = None,
        refresh: Tensor | None = None,
        **encoded: dict[str, Tensor],
    ) -> Tensor:
        inner = {} if kept is None else {"inner": InnerCache(kept, refresh)}
        return self._open_model()(inputs, self._table, times, outputs, **encoded, **inner)

    def _keep(self, rows: int) -> Tensor:
        return self._open_model().keep(rows)

    def _encode(self, name: str, inputs: Tensor, times: Tensor) -> Tensor:
        return self._open_model().encode(name, inputs, self._table, times)

    def _open_model(self) -> PSUNet | UViT:
        if self.model is None:
            raise RuntimeError("this engine is closed; make another with Engine.from_pretrained")
        return self.model

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
            parts = tokens.split(self.max_rows)  # as many at a time as memory was said to have room for
            pixels = torch.cat([self.image.decode(part.to(self.device)).cpu() for part in parts])  # [num, 3, S, S]
            if p.mask is not None:
                pixels = masks.laid_into(p.pixels, pixels, p.mask, FEATHER)
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
