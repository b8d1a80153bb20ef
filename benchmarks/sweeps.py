"""Sweeps over one model: infilling with growing masks, guidance of every kind and scale, approximations.

All of them expect a model with an image modality named `image` and a text modality named `text`.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.metrics import diversity
from engine import Engine, Request
from engine.checkpoint import Checkpoint
from engine.codecs.words import shortened, tokenize
from engine.config import Config
from engine.data.captioned import CaptionedImage
from engine.data.emoji import base_name
from engine.diffusion.schedule import NoiseSchedule
from engine.evaluation import Gallery, pixels_of, word_f1
from engine.images import to_image
from engine.metrics.frechet import Statistics, frechet_distance
from engine.model.denoiser import Denoiser
from engine.request import Sample

Pairs = list[tuple[CaptionedImage, Tensor]]  # images uint8 [3, S, S]
SAMPLES = 2  # of each name, for the diversity


# ---------------------------------------------------------------------------------------------------- prediction


@torch.inference_mode()
def denoising_errors(
    loaded: Checkpoint, device: torch.device, dtype: torch.dtype, pairs: Pairs, seed: int, levels: int = 8
) -> dict[str, float]:
    """{"image error": …, "text error": …}: mean squared errors of the prediction of one modality, the other known.

    Over all pairs at `levels` evenly spaced times; the known modality enters as the model's conditioning says, any
    others as pure noise. The noise depends on the seed alone, so it is the same for every model.
    """
    diffusion, model = loaded.config.diffusion, loaded.config.model
    schedule = NoiseSchedule(diffusion.schedule, diffusion.timesteps)
    denoiser = Denoiser(loaded.network.to(device, dtype), diffusion.timesteps)
    x0 = _clean_states(loaded, device, pairs)  # [n, N] without the others, which come last
    others = torch.randn(len(x0), model.size - x0.shape[1], generator=torch.Generator().manual_seed(seed)).to(device)
    renoise, v = diffusion.conditioning == "renoise", diffusion.prediction == "v_prediction"
    errors = {}
    for name in ("image", "text"):
        part, tokens = model.state_slices[name], model.token_slices[name]
        generator, total = torch.Generator().manual_seed(seed), 0.0
        for level in range(levels):
            t = round(schedule.timesteps * (level + 0.5) / levels)
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            noise = torch.randn(x0.shape, generator=generator).to(device)
            noisy = alpha * x0 + sigma * noise
            inputs = noisy if renoise else x0.clone()
            inputs[:, part] = noisy[:, part]
            times = torch.full((len(x0), model.tokens), schedule.timesteps, dtype=torch.int32, device=device)
            for given in ("image", "text"):
                times[:, model.token_slices[given]] = t if renoise else 0
            times[:, tokens] = t
            prediction = denoiser(torch.cat([inputs, others], dim=1), times, (name,))[:, part].float()
            target = alpha * noise - sigma * x0 if v else noise
            target = (x0 if model.modality(name).categories else target)[:, part]
            total += (prediction - target).square().mean().item() / levels
        errors[f"{name} error"] = total
    return errors


def _clean_states(loaded: Checkpoint, device: torch.device, pairs: Pairs) -> Tensor:
    """The packed states of images with their first captions, [n, N] float32, without any other modality."""
    model, image, text = loaded.config.model, loaded.codec("image", device), loaded.codec("text")
    pixels = torch.stack([pixels for _, pixels in pairs]).float() / 127.5 - 1  # [n, 3, S, S]
    captions = [shortened(item.captions[0], text.tokens) for item, _ in pairs]
    given = [text.read(caption, "data", unknown_words="fill") for caption in captions]
    tokens = {"image": image.encode_pixels(pixels.to(device)), "text": text.encode(given)}  # [n, L, C] each
    order = [m.name for m in model.modalities if m.name in tokens]
    return torch.cat([tokens[name].to(device).float().flatten(1) for name in order], dim=1)


# ------------------------------------------------------------------------------------------------------- masking


def masking_sweep(engine: Engine, pairs: Pairs, ratios: Sequence[float], steps: int, seed: int) -> list[dict]:
    """Errors inside the masks: RMSE of pixels in levels, and the share of masked words that are restored."""
    model, size = engine.config.model, engine.config.codecs["image"].settings["size"]
    side = round(model.modality("image").tokens ** 0.5)
    captions = [tokenize(shortened(item.captions[0], model.modality("text").tokens)) for item, _ in pairs]
    rows = []
    for masked in ("image", "text", "both"):
        for ratio in ratios:
            generator = np.random.default_rng(seed)  # the same masks, growing, for every model and kind
            requests, originals = [], []
            for i, ((_, image), words) in enumerate(zip(pairs, captions, strict=True)):
                cells = _chosen(generator, side * side, ratio).reshape(side, side)
                holes = _chosen(generator, len(words), ratio)
                pixels = cells.repeat(size // side, 0).repeat(size // side, 1)  # [S, S]
                given = {"image": to_image(image / 127.5 - 1), "prompt": " ".join(words)}
                if masked != "text":
                    given["mask"] = Image.fromarray(pixels.astype(np.uint8) * 255)
                if masked != "image":
                    given["prompt"] = " ".join("_" if h else w for h, w in zip(holes, words, strict=True))
                options = {"steps": steps, "seed": _first(seed) + i, "unknown_words": "fill", "order": "together"}
                requests.append(Request(**given, **options))
                originals.append((image, torch.from_numpy(pixels), words, holes))
            results = engine.generate(requests)
            row = {"masked": masked, "ratio": ratio}
            if masked != "text":
                errors = [
                    (pixels_of(result.image) - image / 127.5 + 1)[:, mask].square().flatten()
                    for result, (image, mask, _, _) in zip(results, originals, strict=True)
                ]
                row["RMSE"] = torch.cat(errors).mean().sqrt().item() * 127.5
            if masked != "image":
                row["word accuracy"] = _word_accuracy([r.text for r in results], [o[2:] for o in originals])
            rows.append(row)
    return rows


def _first(seed: int) -> int:
    """The seed of a sweep's first sample: no sweep uses the seeds of another."""
    return seed * 1_000_000


def _chosen(generator: np.random.Generator, count: int, ratio: float) -> np.ndarray:
    """At least one of `count`, [count] bool; a larger ratio chooses the same and more."""
    order = generator.permutation(count)
    return order < max(1, round(ratio * count))


def _word_accuracy(texts: list[str], originals: list[tuple[list[str], np.ndarray]]) -> float:
    restored = []
    for text, (words, holes) in zip(texts, originals, strict=True):
        generated = tokenize(text)
        restored += [i < len(generated) and generated[i] == words[i] for i in np.flatnonzero(holes)]
    return statistics.mean(map(float, restored))


# ------------------------------------------------------------------------------------------------------ guidance


def reconditioned(loaded: Checkpoint) -> Checkpoint:
    """The same network with the other conditioning, which it was not trained for."""
    config = loaded.config
    conditioning = "renoise" if config.diffusion.conditioning == "clean" else "clean"
    # Training times with which either conditioning is valid; sampling does not read them.
    diffusion = replace(config.diffusion, conditioning=conditioning, time_sampling="independent")
    other = Config(config.model, diffusion, config.codecs, replace(config.sampling, order=()))
    return replace(loaded, config=other)


def guidance_sweep(
    engine: Engine,
    other: Engine,  # of the `reconditioned` checkpoint
    pairs: Pairs,
    gallery: Gallery,
    features: Callable[[Tensor], Tensor] | None,
    scales: Sequence[float],
    steps: int,
    seed: int,
) -> list[dict]:
    """Quality and diversity of text-to-image and joint samples, by kind of guidance, conditioning and scale."""
    rows, trained_for = [], engine.config.diffusion.conditioning
    engines = {e.config.diffusion.conditioning: e for e in (engine, other)}
    names = [item.captions[0] for item, _ in pairs]
    real = features(torch.stack([image for _, image in pairs]) / 127.5 - 1) if features else None
    kinds = [("text-to-image", kind, known) for known in ("clean", "renoise") for kind in ("masked", "empty")]
    kinds += [("joint", "alternate", trained_for), ("joint", "unidiffuser", trained_for)]
    for task, kind, conditioning in kinds:
        label = f"{kind}, {conditioning}" if task == "text-to-image" else kind
        label += " (as trained)" if kind == "masked" and conditioning == trained_for else ""
        for scale in scales:
            options = {"steps": steps, "guidance": scale, "guidance_kind": kind}
            samples = _samples_of(engines[conditioning], task, names, options, seed)
            quality, spread = _quality_and_diversity(task, samples, names, gallery, features, real)
            rows.append({"task": task, "guidance": label, "scale": scale, "quality": quality, "diversity": spread})
    return rows


def _samples_of(engine: Engine, task: str, names: list[str], options: dict, seed: int) -> list[Sample]:
    """`SAMPLES` for each name, or as many joint samples as there are names."""
    words, requests = engine.config.model.modality("text").tokens, []
    for i, name in enumerate(names):
        given = {"prompt": shortened(name, words), "unknown_words": "fill", "num": SAMPLES}
        first = {"seed": _first(seed) + SAMPLES * i, "order": "together"}
        requests.append(Request(**(given if task == "text-to-image" else {}), **first, **options))
    return [sample for result in engine.generate(requests) for sample in result.samples]


def _quality_and_diversity(
    task: str,
    samples: list[Sample],
    names: list[str],
    gallery: Gallery,
    features: Callable[[Tensor], Tensor] | None,
    real: Tensor | None,  # features of the real images
) -> tuple[float, float]:
    per_name = len(samples) // len(names)
    images = torch.stack([pixels_of(sample.image) for sample in samples])  # [n, 3, S, S]
    nearest = gallery.nearest(images.flatten(1))
    if features:  # of as many samples as there are real images: the distance depends on their number
        quality = frechet_distance(Statistics.of(features(images[::per_name])), Statistics.of(real))
    elif task == "text-to-image":
        prompts = [name for name in names for _ in range(per_name)]
        quality = statistics.mean(float(base_name(a) == base_name(b)) for a, b in zip(nearest, prompts, strict=True))
    else:
        quality = statistics.mean(word_f1(s.text, name) for s, name in zip(samples, nearest, strict=True))
    if task == "text-to-image":
        return quality, statistics.mean(diversity(of_name) for of_name in images.split(per_name))
    return quality, diversity(images)


# ------------------------------------------------------------------------------------------------ approximations

APPROXIMATIONS = {
    "none": {},
    "step cache 2": {"step_cache": 2},
    "step cache 3": {"step_cache": 3},
    "guidance from 0 to 0.5": {"guidance_interval": (0.0, 0.5)},
    "guidance from 0.2 to 0.8": {"guidance_interval": (0.2, 0.8)},
}


def approximation_sweep(engine: Engine, pairs: Pairs, gallery: Gallery, seed: int) -> list[dict]:
    """Retrieval@1 of names, word F1 of images, and seconds per sample, by approximation and number of steps."""
    rows, names = [], [item.captions[0] for item, _ in pairs]
    prompts = [" ".join(tokenize(name)) for name in names]
    images = [to_image(image / 127.5 - 1) for _, image in pairs]
    warmup = {"num": len(pairs), "steps": 3, "step_cache": 2, "unknown_words": "fill"}
    engine.generate([Request(prompt=prompts[0], **warmup), Request(image=images[0], **warmup)])

    def timed(inputs: list[dict], options: dict) -> tuple[list, float]:
        requests = [Request(**given, **options, seed=_first(seed) + i) for i, given in enumerate(inputs)]
        before = engine.stats().sample_seconds
        results = engine.generate(requests)
        return results, (engine.stats().sample_seconds - before) / len(requests)

    for name, approximation in APPROXIMATIONS.items():
        for steps in (4, 8, 16):  # the built-in model gains little from more
            options = {"steps": steps, **approximation}
            drawn, drawing = timed([{"prompt": prompt, "unknown_words": "fill"} for prompt in prompts], options)
            captioned, captioning = timed([{"image": image} for image in images], options)
            nearest = gallery.nearest(torch.stack([pixels_of(r.image) for r in drawn]).flatten(1))
            right = [float(base_name(a) == base_name(b)) for a, b in zip(nearest, names, strict=True)]
            f1 = [word_f1(r.text, n) for r, n in zip(captioned, names, strict=True)]
            rows.append({
                "approximation": name, "steps": steps, "retrieval@1": statistics.mean(right),
                "word F1": statistics.mean(f1), "seconds text-to-image": drawing, "seconds image-to-text": captioning,
            })  # fmt: skip
    return rows
