"""A new modality in one page: colours, beside the words that name them.

    python examples/new_modality.py

trains a joint model of one colour and two words in less than a minute, saves it, and asks it in both directions: it
prints a colour for each name ("dark red → #821815") and a name for each of two colours. A modality is a codec, which
maps its values to tokens and back, and a line in the model's config. The engine takes it by its name.
"""

import argparse
from pathlib import Path

import torch
from PIL import ImageColor
from torch import Tensor

from engine import Engine, InputError, Request
from engine.checkpoint import save
from engine.codecs.codec import CODECS, Codec, Decoded, Given
from engine.codecs.text import TextCodec
from engine.config import CodecConfig, Config, DiffusionConfig, Modality, ModelConfig, SamplingConfig
from engine.diffusion.loss import DenoisingLoss, distinct_times
from engine.model.denoiser import build

HUES = {"red": "#d02020", "green": "#20a020", "blue": "#2040d0", "yellow": "#d0c020", "grey": "#808080"}
SHADES = {"dark": 0.6, "plain": 1.0}


class ColourCodec(Codec):
    """A colour, as "#rrggbb", is one token of three channels in −1.7 … 1.7, of about unit variance."""

    tokens, channels = 1, 3

    @classmethod
    def load(cls, folder, settings, modality, device) -> "ColourCodec":
        return cls()

    def save(self, folder, dtype=torch.float32) -> None:
        Path(folder).mkdir(parents=True)  # nothing to keep

    def build(self, compile: bool = False) -> None:
        pass

    def read(self, value, argument, mask=None, unknown_words="error", feather=0, mask_argument="mask") -> Given:
        if mask is not None:
            raise InputError(mask_argument, mask, "leave it out", "cannot be the mask of a colour")
        if value is None:
            return Given(torch.ones(1, 3, dtype=torch.bool), None)
        try:
            levels = ImageColor.getrgb(value)[:3]
        except (ValueError, AttributeError):
            raise InputError(argument, value, "give one such as #8b0000", "is not a colour") from None
        return Given(torch.zeros(1, 3, dtype=torch.bool), torch.tensor([levels]) / 75 - 1.7)

    def encode(self, given) -> Tensor:
        return torch.stack([torch.zeros(1, 3) if one.content is None else one.content for one in given])  # [B, 1, 3]

    def decode(self, tokens, given) -> list[Decoded]:
        levels = ((tokens.float().cpu() + 1.7) * 75).round().clamp(0, 255)  # [B, 1, 3]
        return [Decoded("#" + bytes(row[0].byte().tolist()).hex() if row.isfinite().all() else None) for row in levels]

    def project(self, tokens, given) -> Tensor:
        return tokens  # any are those of a colour

    def null(self) -> Given:
        return self.read("#808080", "colour")


CODECS["colour"] = f"{Path(__file__).stem}:ColourCodec"
CONFIG = Config(
    ModelConfig((Modality("colour", 1, 3, depth=1), Modality("text", 2, 8, depth=1)), shared_depth=3, dim=64),
    DiffusionConfig("cosine", 1000, "v_prediction", "clean", "masked"),
    {"colour": CodecConfig("colour"), "text": CodecConfig("text")},
    SamplingConfig({"joint": 2.0}, order=("text", "colour")),
)


def examples(count: int, generator: torch.Generator) -> tuple[list[str], list[str]]:
    """Names, and colours that vary a little around their shade of the hue."""
    names, colours = [], []
    for i in range(count):
        (hue, colour), (shade, factor) = [*HUES.items()][i % 5], [*SHADES.items()][i // 5 % 2]
        levels = torch.tensor(ImageColor.getrgb(colour)) * factor + 8 * torch.randn(3, generator=generator)
        names.append(f"{shade} {hue}")
        colours.append("#" + bytes(levels.clamp(0, 255).byte().tolist()).hex())
    return names, colours


def train(folder: Path, steps: int) -> None:
    """Trains the network on 500 examples, and writes a checkpoint folder."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    names, colours = examples(500, generator)
    words = TextCodec.train(names, channels=8)
    text, colour = TextCodec(words.vocabulary, words.vectors, tokens=2), ColourCodec()
    colour_tokens = colour.encode([colour.read(value, "colour") for value in colours])  # [500, 1, 3]
    text_tokens = text.encode([text.read(name, "text") for name in names])  # [500, 2, 8]
    data = torch.cat([colour_tokens.flatten(1), text_tokens.flatten(1)], dim=1)  # [500, N], in the config's order

    network, loss = build(CONFIG.model), DenoisingLoss(CONFIG)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)

    def denoise(inputs: Tensor, times: Tensor) -> Tensor:
        distinct, index = distinct_times(times, times.numel())
        return network(inputs, network.time_table(distinct), index)

    for step in range(steps):
        x0 = data[torch.randint(len(data), (64,), generator=generator)]  # [B, N]
        noise = torch.randn(x0.shape, generator=generator)  # [B, N]
        losses = loss(denoise, x0, noise, loss.draw(len(x0), generator))
        torch.stack([*losses.values()]).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 100 == 0:
            print(step, {name: round(value.item(), 3) for name, value in losses.items()})
    save(folder, CONFIG, network.state_dict(), torch.float32)
    colour.save(folder / "colour")
    text.save(folder / "text")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/colours"), help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args(arguments)

    if not options.out.exists():
        train(options.out, options.steps)
    with Engine.from_pretrained(options.out, dtype="float32") as engine:
        for result in engine.generate([Request(f"{shade} {hue}") for shade in SHADES for hue in HUES]):
            print(result.text, "→", result.samples[0].outputs["colour"])
        for result in engine.generate([Request(inputs={"colour": value}) for value in ("#7d1414", "#20a020")]):
            print(result.request.given["colour"], "→", result.text)


if __name__ == "__main__":
    main()
