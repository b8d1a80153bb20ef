"""What callers of a diffusers pipeline give and get, in the engine's terms: images, batches of values, and seeds."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from engine.errors import InputError
from engine.images import to_image
from engine.request import MAX_NUM, is_whole

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TENSOR_INPUTS = ("latents",)  # that a callback may ask for
Images = Image.Image | str | PathLike | np.ndarray | Tensor


def listed_images(value: Images | Sequence[Images] | None, argument: str) -> list | None:
    """One image, or a batch of them, as a list of PIL images and files; None stays None.

    Arrays are [H, W, C], [B, H, W, C] or [H, W], tensors [C, H, W], [B, C, H, W] or [H, W]; both of 1, 3 or 4 channels,
    floats in 0…1 or uint8. Raises InputError about `argument`.
    """
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [image for part in value for image in (listed_images(part, argument) or [None])]
    if isinstance(value, Tensor):
        if value.is_meta or value.layout != torch.strided:
            raise InputError(argument, value.layout, "give a dense tensor with values", "is not that of an image")
        value = value.detach().cpu()
        value = (value if value.dtype == torch.uint8 else value.float()).numpy()
        value = np.moveaxis(value, -3, -1) if value.ndim >= 3 else value
    if not isinstance(value, np.ndarray):
        return [value]
    array = value[..., None] if value.ndim == 2 else value
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4):
        remedy = "give [H, W, C] or [B, H, W, C], or a tensor of [C, H, W] or [B, C, H, W], of 1, 3 or 4 channels"
        raise InputError(argument, list(value.shape), remedy, "is not the shape of images")
    if array.dtype != np.uint8:
        if array.dtype.kind not in "buif":
            raise InputError(argument, f"{array.dtype} array", "give floats or uint8", "does not hold numbers")
        if not ((array >= 0) & (array <= 1)).all():  # also NaN
            raise InputError(argument, f"{array.dtype} array", "scale it to 0…1", "has values outside of 0…1")
        array = (array * 255).round().astype(np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in array]


def images_as(pixels: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Pixels [B, 3, S, S] in about −1..1 as "pil" images, "np" [B, S, S, 3] or "pt" [B, 3, S, S] in 0…1."""
    if output_type == "pil":
        return [to_image(image) for image in pixels]
    pixels = (pixels / 2 + 0.5).clamp(0, 1)
    return pixels.permute(0, 2, 3, 1).numpy() if output_type == "np" else pixels


def broadcast(values: Mapping[str, list | None]) -> list[dict]:
    """Arguments of one value or of a batch of B, as B mappings, at least one; raises InputError if lengths differ."""
    lengths = {name: len(listed) for name, listed in values.items() if listed is not None}
    for name, length in lengths.items():
        if length not in (1, max(lengths.values())) or length == 0:
            remedy = f"give 1 or {max(lengths.values())}, as many as the longest" if length else "give at least one"
            raise InputError(name, length, remedy, "is the number of values")
    count = max(lengths.values(), default=1)
    return [
        {name: listed and listed[0 if len(listed) == 1 else i] for name, listed in values.items()} for i in range(count)
    ]


def seeds_of(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """Seeds of `count` images from a generator, one for each of them, or PyTorch's own.

    A generator fresh from `manual_seed(s)` gives s, s + 1, …, so that its images are those of `Request(seed=s)`; later
    seeds, and those of PyTorch's own generator, are drawn. Either way the generator moves on: the same state gives the
    same seeds, and the next call others. Raises InputError.
    """
    if isinstance(generator, list | tuple):
        if len(generator) != count:
            raise InputError("generator", len(generator), f"give one for each of the {count} images", "is the number")
        return [seed for one in generator for seed in seeds_of(one, 1)]
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError("generator", generator, "give a torch.Generator, or a list of them", "is not one")
    fresh = False
    if generator is not None:
        like = torch.Generator(generator.device).manual_seed(generator.initial_seed())
        fresh = torch.equal(like.get_state(), generator.get_state())
    device = "cpu" if generator is None else generator.device
    drawn = torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()
    return [(generator.initial_seed() + i) % 2**64 for i in range(count)] if fresh else drawn


@contextmanager
def refused(argument: str, value: object, remedy: str, problem: str) -> Iterator[None]:
    """Makes what diffusers raises about a folder an InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(argument, value, remedy, f"{problem} ({error})") from error


def check_call(num_images_per_prompt, output_type, callback, tensor_inputs) -> None:
    """Raises InputError about an argument of a call that is checked nowhere else."""
    if not is_whole(num_images_per_prompt) or not 1 <= num_images_per_prompt <= MAX_NUM:
        remedy = f"use a whole number from 1 to {MAX_NUM}"
        raise InputError("num_images_per_prompt", num_images_per_prompt, remedy)
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise InputError("output_type", output_type, f"use one of {', '.join(OUTPUT_TYPES)}", "is not known")
    if callback is not None and not callable(callback):
        raise InputError("callback_on_step_end", callback, "give a function", "cannot be called")
    listed = isinstance(tensor_inputs, list | tuple)
    unknown = [name for name in tensor_inputs if name not in TENSOR_INPUTS] if listed else [tensor_inputs]
    if unknown:
        remedy = f"give a list of some of {', '.join(TENSOR_INPUTS)}"
        raise InputError("callback_on_step_end_tensor_inputs", unknown[0], remedy, "is not known")


def changed_latents(returned: object, offered: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """The states that a callback, to which tensors were offered, has returned or changed; raises InputError."""
    if returned is not None and not isinstance(returned, Mapping):
        raise InputError("callback_on_step_end", returned, "return a dict of latents, or None", "is what it returned")
    changed = {**offered, **(returned or {})}.get("latents", states)
    if not isinstance(changed, Tensor) or changed.shape != states.shape:
        shape = getattr(changed, "shape", changed)
        raise InputError("latents", shape, f"give a tensor of {list(states.shape)}", "has another shape")
    return changed
