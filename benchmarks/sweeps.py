"""What one model is asked over and over: infilling under growing masks, and guidance of every kind and scale."""

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.metrics import diversity, frechet_distance
from engine import Engine, Request
from engine.codecs.text import tokenize
from engine.data.coco import CaptionedImage
from engine.data.emoji import base_name
from engine.evaluate import Gallery, pixels_of, word_f1
from engine.pictures import to_image
from engine.sampler import Row, sample
from engine.schedule import NoiseSchedule, solver_table, timesteps
from engine.train import shortened

Pairs = list[tuple[CaptionedImage, Tensor]]  # pictures uint8 [3, S, S]
TOGETHER = 64  # rows sampled at a time
SAMPLES = 2  # of each name, for the diversity


@torch.inference_mode()
def denoising_errors(engine: Engine, pairs: Pairs, seed: int, levels: int = 8) -> dict[str, float]:
    """{"image error": …, "text error": …}: mean square errors of the prediction of one modality, the other known.

    Over all pairs at `levels` evenly spaced times; the known modality enters as the model's conditioning has it. The
    noise depends on the seed alone, so it is the same for every model.
    """
    config, model = engine.config, engine.config.model
    schedule = NoiseSchedule(config.diffusion.schedule, config.diffusion.timesteps)
    words = model.modality("text").tokens
    texts = [engine.text.encode(shortened(item.captions[0], words), words, "fill")[0] for item, _ in pairs]
    pictures = torch.stack([picture for _, picture in pairs]).float() / 127.5 - 1
    known = {"image": engine.image.encode(pictures.to(engine.device)).flatten(1), "text": torch.stack(texts).flatten(1)}
    x0 = torch.cat([known[m.name].to(engine.device).float() for m in model.modalities], dim=1)  # [n, N]
    table = engine.model.time_table(torch.arange(schedule.timesteps + 1, device=engine.device))
    renoise = config.diffusion.conditioning == "renoise"
    found = {}
    for name in ("image", "text"):
        part, tokens = model.state_slices[name], model.token_slices[name]
        generator, total = torch.Generator().manual_seed(seed), 0.0
        for level in range(levels):
            t = round(schedule.timesteps * (level + 0.5) / levels)
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            noise = torch.randn(x0.shape, generator=generator).to(engine.device)
            noisy = alpha * x0 + sigma * noise
            inputs = noisy if renoise else x0.clone()
            inputs[:, part] = noisy[:, part]
            times = torch.full((len(x0), model.tokens), t if renoise else 0, dtype=torch.int32, device=engine.device)
            times[:, tokens] = t
            prediction = engine.model(inputs, table, times, (name,))[:, part].float()
            v = config.diffusion.prediction == "v_prediction"
            target = (alpha * noise - sigma * x0 if v else noise)[:, part]
            total += (prediction - target).square().mean().item() / levels
        found[f"{name} error"] = total
    return found


def masking_sweep(engine: Engine, pairs: Pairs, ratios: Sequence[float], steps: int, seed: int) -> list[dict]:
    """Errors inside the masks: RMSE of pixels in levels, and the share of masked words that come back."""
    model, size = engine.config.model, engine.config.image.size
    side = round(model.modality("image").tokens ** 0.5)
    captions = [tokenize(shortened(item.captions[0], model.modality("text").tokens)) for item, _ in pairs]
    rows = []
    for masked in ("image", "text", "both"):
        for ratio in ratios:
            generator = np.random.default_rng(seed)  # the same masks, growing, for every model and kind
            requests, wanted = [], []
            for i, ((_, picture), words) in enumerate(zip(pairs, captions, strict=True)):
                cells = _chosen(generator, side * side, ratio).reshape(side, side)
                holes = _chosen(generator, len(words), ratio)
                pixels = cells.repeat(size // side, 0).repeat(size // side, 1)  # [S, S]
                given = {"image": to_image(picture / 127.5 - 1), "prompt": " ".join(words)}
                if masked != "text":
                    given["mask"] = Image.fromarray(pixels.astype(np.uint8) * 255)
                if masked != "image":
                    given["prompt"] = " ".join("_" if h else w for h, w in zip(holes, words, strict=True))
                requests.append(Request(**given, steps=steps, seed=_first(seed) + i, unknown_words="fill"))
                wanted.append((picture, torch.from_numpy(pixels), words, holes))
            results = engine.generate(requests)
            row = {"masked": masked, "ratio": ratio}
            if masked != "text":
                errors = [(pixels_of(r.image) - p / 127.5 + 1)[:, m].square() for r, (p, m, _, _) in
                          zip(results, wanted, strict=True)]  # fmt: skip
                row["RMSE"] = torch.cat([e.flatten() for e in errors]).mean().sqrt().item() * 127.5
            if masked != "image":
                row["word accuracy"] = _word_accuracy([r.text for r in results], [w[2:] for w in wanted])
            rows.append(row)
    return rows


def _first(seed: int) -> int:
    """The seed of the first sample: those of one sweep are not those of the next."""
    return seed * 1_000_000


def _chosen(generator: np.random.Generator, count: int, ratio: float) -> np.ndarray:
    """At least one of `count`, [count] bool; a larger ratio chooses the same and more."""
    order = generator.permutation(count)
    return order < max(1, round(ratio * count))


def _word_accuracy(texts: list[str], wanted: list[tuple[list[str], np.ndarray]]) -> float:
    right = []
    for text, (words, holes) in zip(texts, wanted, strict=True):
        found = tokenize(text)
        right += [i < len(found) and found[i] == words[i] for i in np.flatnonzero(holes)]
    return statistics.mean(map(float, right))


def guidance_sweep(
    engine: Engine,
    pairs: Pairs,
    gallery: Gallery,
    features: Callable[[Tensor], Tensor] | None,
    scales: Sequence[float],
    steps: int,
    seed: int,
) -> list[dict]:
    """Quality and diversity of text-to-image and joint samples, by kind of guidance, conditioning and scale."""
    model, rows = engine.config.model, []
    words = model.modality("text").tokens
    names = [item.captions[0] for item, _ in pairs]
    prompts = [engine.text.encode(shortened(name, words), words, "fill")[0] for name in names]
    nothing = torch.zeros(model.modality("image").size)
    part = model.state_slices["image"]
    drawn = torch.zeros(model.size, dtype=torch.bool)
    drawn[part] = True
    everything = torch.ones_like(drawn)
    real = features(torch.stack([p for _, p in pairs]) / 127.5 - 1) if features else None

    def packed(text: Tensor) -> Tensor:
        values = {"image": nothing, "text": text.flatten()}
        return torch.cat([values[m.name] for m in model.modalities])  # [N]

    empty = packed(engine.text.encode("", words)[0])
    kinds = [("text-to-image", kind, known) for known in ("clean", "renoise") for kind in ("masked", "empty")]
    kinds += [("joint", "alternate", "clean"), ("joint", "unidiffuser", "clean")]
    for task, kind, conditioning in kinds:
        generate = drawn if task == "text-to-image" else everything
        for scale in scales:
            table = solver_table(
                NoiseSchedule(engine.config.diffusion.schedule, engine.config.diffusion.timesteps),
                timesteps(engine.config.diffusion.timesteps, steps), conditioning=conditioning, guidance=kind,
                prediction=engine.config.diffusion.prediction, guidance_scale=scale,
                guided_modalities=tuple(range(len(model.modalities))) if task == "joint" else (),
            )  # fmt: skip
            several = SAMPLES if task == "text-to-image" else 1
            made = [Row(_first(seed) + SAMPLES * i + k, table, generate, packed(prompt), empty)
                    for i, prompt in enumerate(prompts) for k in range(several)]  # fmt: skip
            pictures, texts = _sampled(engine, made)
            if features:  # as many samples as there are real pictures, which the distance depends on
                quality = frechet_distance(features(pictures[::several]), real)
            elif task == "text-to-image":
                found = gallery.nearest(pictures.flatten(1))
                wanted = [name for name in names for _ in range(several)]
                quality = statistics.mean(base_name(f) == base_name(n) for f, n in zip(found, wanted, strict=True))
            else:
                found = gallery.nearest(pictures.flatten(1))
                quality = statistics.mean(word_f1(t, f) for t, f in zip(texts, found, strict=True))
            if task == "text-to-image":
                spread = statistics.mean(diversity(p) for p in pictures.split(several))
            else:
                spread = diversity(pictures)
            learned = kind == "masked" and conditioning == engine.config.diffusion.conditioning
            label = f"{kind}, {conditioning}" if task == "text-to-image" else kind
            label += " (as trained)" if learned else ""
            rows.append({"task": task, "guidance": label, "scale": scale, "quality": float(quality),
                         "diversity": spread})  # fmt: skip
    return rows


APPROXIMATIONS = {
    "none": {},
    "step cache 2": {"step_cache": 2},
    "step cache 3": {"step_cache": 3},
    "guidance from 0 to 0.5": {"guidance_interval": (0.0, 0.5)},
    "guidance from 0.2 to 0.8": {"guidance_interval": (0.2, 0.8)},
}


def approximation_sweep(engine: Engine, pairs: Pairs, gallery: Gallery, seed: int) -> list[dict]:
    """Retrieval@1 of names and word F1 of pictures, and the seconds a sample takes, by approximation and steps."""
    rows, names = [], [item.captions[0] for item, _ in pairs]
    prompts = [" ".join(tokenize(name)) for name in names]
    pictures = [to_image(picture / 127.5 - 1) for _, picture in pairs]
    several = {"num": len(pairs), "steps": 3, "step_cache": 2}
    engine.generate([Request(prompt=prompts[0], **several), Request(image=pictures[0], **several)])  # warm-up

    def timed(requests: list[Request]) -> tuple[list, float]:
        before = engine.stats().sample_seconds
        results = engine.generate(requests)
        return results, (engine.stats().sample_seconds - before) / len(requests)

    for name, options in APPROXIMATIONS.items():
        for steps in (4, 8, 16):  # the built-in model gains little from more
            both = {"steps": steps, **options}
            drawn, drawing = timed([Request(prompt=p, seed=_first(seed) + i, unknown_words="fill", **both)
                                    for i, p in enumerate(prompts)])  # fmt: skip
            told, telling = timed([Request(image=p, seed=_first(seed) + i, **both) for i, p in enumerate(pictures)])
            found = gallery.nearest(torch.stack([pixels_of(r.image) for r in drawn]).flatten(1))
            right = [base_name(f) == base_name(n) for f, n in zip(found, names, strict=True)]
            f1 = [word_f1(r.text, n) for r, n in zip(told, names, strict=True)]
            rows.append({
                "approximation": name, "steps": steps, "retrieval@1": statistics.mean(map(float, right)),
                "word F1": statistics.mean(f1), "seconds drawing": drawing, "seconds telling": telling,
            })  # fmt: skip
    return rows


@torch.inference_mode()
def _sampled(engine: Engine, rows: list[Row]) -> tuple[Tensor, list[str]]:
    """Pictures [B, 3, S, S] in −1..1 and texts of rows, past `Engine`, which has one way of guidance for each task."""
    model, pictures, texts = engine.config.model, [], []
    image, words = model.modality("image"), model.modality("text")
    table = engine.model.time_table(torch.arange(engine.config.diffusion.timesteps + 1, device=engine.device))

    def denoise(inputs: Tensor, times: Tensor, outputs: tuple[str, ...]) -> Tensor:
        return engine.model(inputs, table, times, outputs)

    for i in range(0, len(rows), TOGETHER):
        states = sample(denoise, rows[i : i + TOGETHER], model, engine.device)  # [B, N]
        tokens = states[:, model.state_slices["image"]].unflatten(1, (image.tokens, image.channels))
        pictures.append(engine.image.decode(tokens).cpu())
        tokens = states[:, model.state_slices["text"]].unflatten(1, (words.tokens, words.channels))
        texts += [decoded.text for decoded in engine.text.decode(tokens.cpu())]
    return torch.cat(pictures), texts
