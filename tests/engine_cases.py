"""Example images, masks and requests, and comparisons of results, for the tests of `Engine`."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine import Request
from engine.checkpoint import save
from engine.codecs.image import ImageCodec
from engine.codecs.text import TextCodec
from engine.codecs.words import END
from engine.config import Config
from engine.model.denoiser import build
from engine.training.recipes import RECIPES

STEPS = 3
ENDLESS = Request(num=2, steps=1000, resample=5)  # 10,000 steps, half a minute at least


def noise(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """An image in which every pixel has a value of its own to be kept or lost."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def left_half(size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A mask that is white on the left."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)  # [H, W, 3]


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest, in levels."""
    return abs(levels(a) - levels(b)).max()


def assert_same(found, expected, rounding: int = 1):
    """Texts, seeds and tasks are equal, images to one level: sums of floats depend on the batch's size."""
    assert (found.task, found.guidance, found.order) == (expected.task, expected.guidance, expected.order)
    assert len(found.samples) == len(expected.samples)
    for a, b in zip(found.samples, expected.samples, strict=True):
        assert a.seed == b.seed and a.outputs.keys() == b.outputs.keys()
        for name, value in a.outputs.items():
            if isinstance(value, str):
                assert value == b.outputs[name]
            else:
                assert difference(value, b.outputs[name]) <= rounding


def mixed_requests() -> list[Request]:
    """Every task, with different solvers, steps, guidance and numbers."""
    return [
        Request(num=2, steps=4, seed=7),
        Request(prompt="red cat", steps=2, solver="ddim", guidance=3.0),
        Request(image=noise(1), num=3, steps=5, solver="ddpm", seed=7),
        Request(prompt="big _ dog", steps=STEPS, guidance=1.0),
        Request(image=noise(2), mask=left_half(), steps=6, resample=2, jump=2),
        Request(prompt="_ sun", image=noise(3), mask=left_half(), steps=1, seed=2**64 - 1),
    ]


def random_network(folder: Path, config: Config) -> None:
    """Writes the config and random weights of a checkpoint; codecs are not written."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: w.shape for name, w in build(config.model).state_dict().items()}
    weights = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save(folder, config, weights, torch.float32)


def random_checkpoint(folder: Path, config) -> Path:
    """Writes a checkpoint of random weights; its codecs are those of `image`, of 32 px, and `text`, of 8 channels."""
    from diffusers import AutoencoderDC  # late: it takes seconds

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(config.model)
        # All of them random: as initialised, gates and heads are zero and no sample would depend on anything.
        weights = {name: 0.1 * torch.randn_like(w) for name, w in network.state_dict().items()}
        vectors = torch.nn.functional.normalize(torch.randn(32, 8)) * 8**0.5
        autoencoder = AutoencoderDC(**RECIPES["tiny"].autoencoder_config)
    save(folder, config, weights, torch.float32)
    words = "red green blue big small old new cat dog bird fish tree sun moon star car house man woman child face hand "
    words += "heart flag of with and in on the running"
    if "text" in config.codecs:
        TextCodec((END, *words.split()), vectors).save(folder / "text")
    if "image" in config.codecs:
        ImageCodec(autoencoder, **config.codecs["image"].settings).save(folder / "image")
    return folder
