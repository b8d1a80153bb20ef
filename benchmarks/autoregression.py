"""Diffusion over word vectors against an autoregressive transformer, trained on the same texts.

Both have a table of V × C word vectors, as many parameters in all, and as many operations of training. The engine's
table is Word2Vec's and stays as it is; the other model's begins as a copy of it and is trained, and is also its last
layer.
"""

import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.options import ExperimentOptions
from benchmarks.workloads import parameters
from engine import Engine, Request, checkpoint
from engine.codecs.text import TextCodec
from engine.codecs.words import shortened
from engine.config import Config, ModelConfig
from engine.data.latents import LatentCache
from engine.data.texts import Texts
from engine.errors import errors_named
from engine.files import write_atomically
from engine.kernels import attention
from engine.metrics.captions import caption_words, distinct, n_grams
from engine.metrics.n_gram import KneserNey
from engine.model.cost import forward_flops
from engine.presets import PRESETS
from engine.training.denoiser import train_denoiser
from engine.training.recipes import RECIPES, StageConfig
from engine.training.stage import Stage, StageOptions

ORDER = 3  # of the n-gram model
KNOWN = 4  # words of the n-grams that are looked up in the training texts
SHOWN = 10  # texts of each kind that are stored
WARMUP = 100  # steps
BATCH = 64  # texts that the transformer generates at a time


class CausalBlock(nn.Module):
    """Pre-norm attention to earlier tokens, and an MLP, as in GPT-2; [B, L, D] → [B, L, D]."""

    def __init__(self, dim: int, head_dim: int, mlp_ratio: int):
        super().__init__()
        self.heads = dim // head_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, mlp_ratio * dim), nn.Linear(mlp_ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, d]
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, L, d]
        x = x + self.proj(h.transpose(1, 2).flatten(2))  # [B, L, D]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))  # [B, L, D]


class CausalTransformer(nn.Module):
    """Words [B, L] int64 → logits [B, L, V] of each one's successor; a text begins after "</s>", word 0."""

    def __init__(self, vectors: Tensor, model: ModelConfig, blocks: int):
        super().__init__()
        (text,) = model.modalities
        self.vectors = nn.Parameter(vectors.clone())  # [V, C]
        self.embed, self.head = nn.Linear(text.channels, model.dim), nn.Linear(model.dim, text.channels)
        self.position = nn.Parameter(0.02 * torch.randn(text.tokens, model.dim))
        self.blocks = nn.ModuleList(CausalBlock(model.dim, model.head_dim, model.mlp_ratio) for _ in range(blocks))
        self.norm = nn.LayerNorm(model.dim)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(self.vectors[words]) + self.position[: words.shape[1]]  # [B, L, D]
        for block in self.blocks:
            x = block(x)  # [B, L, D]
        x = self.head(self.norm(x))  # [B, L, C]
        return x @ self.vectors.T * self.vectors.shape[1] ** -0.5  # [B, L, V]

    def loss(self, words: Tensor) -> Tensor:
        """[B, L]: negative log probabilities in nats, 0 behind each text's first "</s>"."""
        logits = self(torch.cat([torch.zeros_like(words[:, :1]), words[:, :-1]], dim=1))  # [B, L, V]
        nats = F.cross_entropy(logits.float().flatten(0, 1), words.flatten(), reduction="none").view_as(words)
        return nats * counted(words)

    @torch.inference_mode()
    def generate(self, count: int, generator: torch.Generator) -> Tensor:
        """Words [count, L] drawn one after the other from the model's probabilities."""
        words = torch.zeros(count, len(self.position) + 1, dtype=torch.int64, device=self.vectors.device)
        for rows in words.split(BATCH):
            for i in range(len(self.position)):
                probabilities = self(rows[:, : i + 1])[:, -1].float().softmax(-1).cpu()  # [b, V]
                rows[:, i + 1] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return words[:, 1:]


def counted(words: Tensor) -> Tensor:
    """[B, L] bool: the words of each text and its first "</s>"."""
    return (words == 0).cumsum(1) - (words == 0).int() == 0


def equal_blocks(vectors: Tensor, model: ModelConfig) -> int:
    """Blocks of the transformer whose parameters are closest in number to the diffusion model's and its table's."""
    wanted = parameters(model) + vectors.numel()
    one, two = (causal_parameters(vectors, model, blocks) for blocks in (1, 2))
    return max(1, 1 + round((wanted - one) / (two - one)))


def causal_parameters(vectors: Tensor, model: ModelConfig, blocks: int) -> int:
    with torch.device("meta"):
        network = CausalTransformer(torch.empty_like(vectors, device="meta"), model, blocks)
    return sum(p.numel() for p in network.parameters())


def causal_flops(words: int, model: ModelConfig, blocks: int) -> int:
    """Of the products of one text's forward with a vocabulary of `words`, attention to all pairs of tokens."""
    (text,) = model.modalities
    products, _ = attention.cost(1, text.tokens, model.dim // model.head_dim, model.head_dim, 2)
    per_token = blocks * 2 * model.dim**2 * (4 + 2 * model.mlp_ratio)
    per_token += 2 * 2 * text.channels * model.dim + 2 * text.channels * words
    return text.tokens * per_token + blocks * products


def scores(texts: list[str], model: KneserNey, known: set[tuple[str, ...]]) -> dict[str, float]:
    """Of texts with words: perplexity under the n-gram model, and how much of them is different and in `known`."""
    listed = [caption_words(text) for text in texts]
    nats, words = map(sum, zip(*map(model.surprise, listed), strict=True))
    grams: Counter = Counter()
    for of_text in listed:
        grams.update(n_grams(of_text, KNOWN))
    return {
        f"perplexity of {ORDER}-grams": math.exp(nats / words),
        **{f"distinct-{n}": distinct(texts, n) for n in (1, 2, 4)},
        f"% known {KNOWN}-grams": 100 * sum(c for g, c in grams.items() if g in known) / max(1, grams.total()),
        "words a text": statistics.mean(map(len, listed)),
    }


def compare(options: ExperimentOptions) -> dict:
    """Trains both models with every seed; scores their texts, held-out ones, and words drawn by their frequency."""
    config = PRESETS[options.preset]
    (text,) = config.model.modalities
    with errors_named("data"):
        train, test = (
            [shortened(line, text.tokens) for line in Texts.open(options.data, split).texts]
            for split in ("train", "test")
        )
    test = test[: options.count]  # how many n-grams are distinct depends on the number of texts
    codec = _codec(train, config, options)
    language = KneserNey(map(caption_words, train), ORDER)
    known = set(chain.from_iterable(n_grams(caption_words(line), KNOWN) for line in train))
    words = [word for line in train for word in line.split()]
    drawn = random.Random(0)
    found = {
        "held out": test,
        "words drawn by frequency": [" ".join(drawn.choices(words, k=len(line.split()))) for line in test],
    }
    rows = [{"texts": name} | scores(texts, language, known) for name, texts in found.items()]

    blocks = equal_blocks(codec.vectors, config.model)
    sizes = parameters(config.model) + codec.vectors.numel(), causal_parameters(codec.vectors, config.model, blocks)
    flops = forward_flops(config.model, 1), causal_flops(len(codec.vocabulary), config.model, blocks)
    steps = options.steps, max(1, round(options.steps * flops[0] / flops[1]))
    makers = {"diffusion": _diffusion, "autoregressive": _autoregressive}
    for (name, make), size, cost, count in zip(makers.items(), sizes, flops, steps, strict=True):
        metrics, minutes = [], []
        for seed in options.seeds:
            stage = _stage(options, count, seed)
            texts, seconds = make(train, codec, config, stage, options)
            found.setdefault(name, texts)
            metrics.append(scores(texts, language, known))
            minutes.append(seconds / 60)
            print(f"{name}, seed {seed}: {metrics[-1]}", flush=True)
        rows.append({
            "texts": name, **{key: statistics.mean(m[key] for m in metrics) for key in metrics[0]},
            "M parameters": size / 1e6, "MFLOP/forward": cost / 1e6, "steps": count, "batch": stage.batch,
            "training PFLOP": 3 * cost * count * stage.batch / 1e15,
            "CPU-minutes of training": statistics.mean(minutes),
        })  # fmt: skip
    return {"rows": rows, "samples": {name: random.Random(0).sample(texts, SHOWN) for name, texts in found.items()}}


def _codec(train: list[str], config: Config, options: ExperimentOptions) -> TextCodec:
    """Word vectors of the training texts, unless an earlier run has trained them."""
    (text,) = config.model.modalities
    folder = options.out / f"autoregression-{options.preset}" / "text"
    if not folder.exists():
        TextCodec.train(train, text.channels).save(folder)
    return TextCodec.load(folder, {}, text)


def _stage(options: ExperimentOptions, steps: int, seed: int) -> StageConfig:
    """The preset's, for both models, at a constant learning rate: more steps continue a run."""
    preset = RECIPES[options.preset].denoiser
    return replace(preset, steps=steps, seed=seed, batch=options.batch or preset.batch, decay=0.0, warmup=WARMUP)


def _diffusion(
    train: list[str], codec: TextCodec, config: Config, stage: StageConfig, options: ExperimentOptions
) -> tuple[list[str], float]:
    """Texts of a diffusion model, and the CPU-seconds of its training."""
    run = options.out / f"autoregression-{options.preset}" / f"diffusion-{stage.seed}"
    recipe = replace(RECIPES[options.preset], denoiser=stage)
    how = StageOptions(options.device, options.dtype, save_every=stage.steps, compile=options.compile)
    if not (run / "checkpoint" / "text").exists():
        codec.save(run / "checkpoint" / "text")
    with _clock(run) as seconds:
        train_denoiser(run, LatentCache([], [[line] for line in train]), codec, config, recipe, how)
    with Engine(checkpoint.load(run / "checkpoint"), options.device, options.dtype) as engine:
        (result,) = engine.generate([Request(num=options.count, steps=options.sampling_steps, seed=stage.seed)])
    return [sample.outputs["text"] for sample in result.samples], seconds()


def _autoregressive(
    train: list[str], codec: TextCodec, config: Config, stage: StageConfig, options: ExperimentOptions
) -> tuple[list[str], float]:
    """Texts of a transformer, drawn at temperature 1, and the CPU-seconds of its training."""
    run = options.out / f"autoregression-{options.preset}" / f"autoregressive-{stage.seed}"
    (text,) = config.model.modalities
    torch.manual_seed(stage.seed)
    network = CausalTransformer(codec.vectors, config.model, equal_blocks(codec.vectors, config.model))
    network.to(options.device)
    words = codec.indices(train, text.tokens).long()  # [n, L]
    with errors_named("out"):
        training = Stage(run, network, stage, len(words), options.dtype)

    def losses(batch: Tensor, part: slice) -> dict[str, Tensor]:
        return {"text": network.loss(batch[part].to(options.device)).sum() / counted(batch).sum()}

    with _clock(run) as seconds:
        training.run(lambda generator, indices: words[indices], losses, save_every=stage.steps)
    made = training.average.generate(options.count, torch.Generator().manual_seed(stage.seed)).tolist()
    lengths = [row.index(0) if 0 in row else len(row) for row in made]
    lines = [[codec.vocabulary[i] for i in row[:n]] for row, n in zip(made, lengths, strict=True)]
    return [" ".join(line) for line in lines], seconds()


@contextmanager
def _clock(run: Path) -> Iterator[Callable[[], float]]:
    """Adds the CPU-seconds of a block to those that RUN/seconds.json has; yields what reads the sum."""
    file, started = run / "seconds.json", time.process_time()

    def total() -> float:
        return json.loads(file.read_text()) if file.exists() else 0.0

    yield total
    seconds = total() + time.process_time() - started
    write_atomically(file, lambda path: path.write_text(json.dumps(seconds)))
