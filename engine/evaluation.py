"""Scores of a checkpoint on captioned images; `engine.evaluate`, the command line, defines them."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.codecs.words import shortened, tokenize
from engine.config import Config
from engine.data.captioned import CaptionedImage
from engine.data.disturb import DISTURBANCES
from engine.data.emoji import base_name, name_class
from engine.data.sketch import draw_sketch
from engine.errors import InputError
from engine.images import from_levels, to_levels
from engine.request import Request, Sample
from engine.runtime import Engine
from engine.training.options import sketch_of

JOINT_SAMPLES = 64
CHUNK = 256  # samples requested at a time, for the progress bar
Pairs = list[tuple[CaptionedImage, Tensor]]  # images uint8 [3, S, S]


@dataclass(frozen=True)
class NameScores:
    """Means over names; higher is better. None: the model cannot do this."""

    count: int
    retrieval_base: float | None
    retrieval_exact: float | None
    reordered_exact: float | None
    keyword_retrieval: float | None
    word_f1: float | None
    caption_exact: float | None


@dataclass(frozen=True)
class Scores(NameScores):
    """The scores of one split."""

    infill_rmse: float | None  # lower is better
    autoencoder_psnr: float
    classes: dict[str, NameScores]  # by class of name


@dataclass(frozen=True)
class SketchScores:
    """The scores of one split's sketches; higher is better."""

    count: int
    retrieval_base: float
    retrieval_exact: float
    word_f1: float
    edge_f1: float
    edge_f1_drawn: float


@dataclass(frozen=True)
class JointScores:
    """How well the image and the text of joint samples fit each other, and how near they are to the data."""

    count: int
    seed: int
    order: tuple[str, ...]
    word_f1: float
    distinct_images: int
    nearest_rmse: float


@dataclass(frozen=True)
class Gallery:
    """All images of a data set with their captions, among which the nearest one is searched."""

    captions: list[tuple[str, ...]]
    images: Tensor  # [n, 3·S·S] float32 in −1..1

    @classmethod
    def of(cls, pairs: Pairs) -> "Gallery":
        images = torch.stack([image for _, image in pairs]).flatten(1).float() / 127.5 - 1
        return cls([tuple(item.captions) for item, _ in pairs], images)

    def nearest(self, images: Tensor) -> list[str]:
        """The names of the images nearest in L2 to images [m, 3·S·S]."""
        return [self.captions[i][0] for i in self.nearest_with_distances(images)[0]]

    def nearest_with_distances(self, images: Tensor) -> tuple[list[int], list[float]]:
        """Of images [m, 3·S·S], the index of the nearest in L2 and its root mean square distance in levels."""
        distances, indices = torch.cdist(images, self.images).min(1)
        return indices.tolist(), (distances * (127.5 / images.shape[1] ** 0.5)).tolist()


def word_f1(text: str, reference: str) -> float:
    """Harmonic mean of the precision and the recall of words, counted with repetitions."""
    words, wanted = Counter(tokenize(text)), Counter(tokenize(reference))
    common = (words & wanted).total()
    return 2 * common / (words.total() + wanted.total()) if common else 0.0


def evaluated_modalities(config: Config) -> tuple[str, str]:
    """Names of the modalities to evaluate: of several images or texts the one named so, else the first.

    Raises InputError for a checkpoint without an image or without a text.
    """
    names = []
    for kind in ("image", "text"):
        candidates = [name for name, codec in config.codecs.items() if codec.kind == kind]
        if not candidates:
            remedy = "give a model of images and texts"
            raise InputError("checkpoint", sorted(config.codecs), remedy, f"has no modality with codec {kind!r}")
        names.append(kind if kind in candidates else candidates[0])
    return names[0], names[1]


def skipped_tasks(config: Config) -> dict[str, str]:
    """What the model cannot do, and why: by task, a sentence."""
    image, text = evaluated_modalities(config)
    conditions = {m.name for m in config.model.modalities} - set(config.model.predicted)
    tasks = {"text-to-image": ({text}, image), "image-to-text": ({image}, text), "infill": ({text}, image)}
    skipped = {}
    for task, (given, wanted) in tasks.items():
        if wanted in conditions:
            skipped[task] = f"the model does not predict {wanted}"
        elif conditions - given:
            skipped[task] = f"the model needs {', '.join(sorted(conditions - given))} to be given"
    if conditions:
        skipped["joint"] = f"the model does not predict {', '.join(sorted(conditions))}"
    return skipped


def evaluate(engine: Engine, pairs: Pairs, gallery: Gallery, how: Request) -> Scores:
    """Scores of images and their names, against a gallery that contains them.

    how  steps, solver and spacing; sample i has the seed how.seed + i
    """
    (image, text), skipped = evaluated_modalities(engine.config), skipped_tasks(engine.config)
    size = engine.config.codecs[image].settings["size"]
    names = [item.captions[0] for item, _ in pairs]
    words = engine.config.model.modality(text).tokens
    prompts = [shortened(name, words) for name in names]
    images = [from_levels(pixels) for _, pixels in pairs]
    flat = torch.stack([pixels for _, pixels in pairs]).float() / 127.5 - 1  # [n, 3, S, S]
    values: dict[str, list[float | None]] = {}  # by score, one of each name; None: it does not count

    def nearest_to_drawn(prompts: list[str]) -> list[tuple[str, ...]]:
        drawn = drawn_images(engine, prompts, how)
        indices, _ = gallery.nearest_with_distances(torch.stack([pixels_of(i) for i in drawn]).flatten(1))
        return [gallery.captions[i] for i in indices]

    if "text-to-image" not in skipped:
        nearest = nearest_to_drawn(prompts)
        values["retrieval_base"] = [base_name(a[0]) == base_name(b) for a, b in zip(nearest, names, strict=True)]
        values["retrieval_exact"] = [a[0] == b for a, b in zip(nearest, names, strict=True)]
        nearest = nearest_to_drawn([_reordered(prompt) for prompt in prompts])
        values["reordered_exact"] = [a[0] == b for a, b in zip(nearest, names, strict=True)]
        keywords = {i: keyword for i, (item, _) in enumerate(pairs) if (keyword := _keyword(item))}
        if keywords:
            nearest = nearest_to_drawn([shortened(keyword, words) for keyword in keywords.values()])
            hits = {i: keywords[i] in captions for i, captions in zip(keywords, nearest, strict=True)}
            values["keyword_retrieval"] = [hits.get(i) for i in range(len(names))]
    if "image-to-text" not in skipped:
        values |= _described(engine, "image-to-text", images, names, how)
    infill_rmse = None
    if "infill" not in skipped:
        left = np.where(np.arange(size) < size // 2, 255, 0).astype(np.uint8)[None].repeat(size, 0)  # [S, S]
        masks = {image: Image.fromarray(left)}
        inputs = ({text: p, image: i} for p, i in zip(prompts, images, strict=True))
        requests = ({"inputs": i, "masks": masks, "unknown_words": "fill"} for i in inputs)
        samples = _samples(engine, "infill", requests, how)
        filled = torch.stack([pixels_of(s.outputs[image]) for s in samples])  # [n, 3, S, S]
        infill_rmse = float((filled - flat)[..., : size // 2].square().mean().sqrt() * 127.5)

    kinds = [name_class(name) for name in names]
    classes = {
        kind: _means(values, [i for i, other in enumerate(kinds) if other == kind]) for kind in sorted(set(kinds))
    }
    means = vars(_means(values, range(len(names))))
    return Scores(**means, infill_rmse=infill_rmse, autoencoder_psnr=_psnr(engine, image, flat), classes=classes)


def drawn_images(engine: Engine, prompts: list[str], how: Request) -> list[Image.Image]:
    """An image of each prompt; words that the model does not know are filled in, as held-out captions may have some."""
    image, text = evaluated_modalities(engine.config)
    requests = ({"inputs": {text: prompt}, "unknown_words": "fill"} for prompt in prompts)
    return [sample.outputs[image] for sample in _samples(engine, "text-to-image", requests, how)]


def described_images(engine: Engine, label: str, images: list[Image.Image], how: Request) -> list[str]:
    """A text of each image."""
    image, text = evaluated_modalities(engine.config)
    return [s.outputs[text] for s in _samples(engine, label, ({"inputs": {image: i}} for i in images), how)]


def evaluate_disturbed(
    engine: Engine, images: list[tuple[CaptionedImage, Image.Image]], how: Request
) -> dict[str, dict[str, float]] | None:
    """word_f1 and caption_exact of images changed by each of `DISTURBANCES`; None for a model that describes none.

    images  as `open_image` gives them
    how     as for `evaluate`
    """
    if "image-to-text" in skipped_tasks(engine.config):
        return None
    size = engine.config.codecs[evaluated_modalities(engine.config)[0]].settings["size"]
    names = [item.captions[0] for item, _ in images]
    scores = {}
    for label, change in DISTURBANCES.items():
        values = _described(engine, label, [change(image, size) for _, image in images], names, how)
        scores[label] = {key: _mean(of_names) for key, of_names in values.items()}
    return scores


def evaluate_sketches(engine: Engine, pairs: Pairs, gallery: Gallery, how: Request) -> SketchScores | None:
    """Scores of sketches, two of each image; None for a model that has or predicts none.

    how  as for `evaluate`; the drawings are decided by its seed too
    """
    (image, text), sketch = evaluated_modalities(engine.config), sketch_of(engine.config)
    if sketch is None or not {image, text, sketch} <= set(engine.config.model.predicted):
        return None
    names = [item.captions[0] for item, _ in pairs]
    images = [from_levels(pixels) for _, pixels in pairs]
    given, other = (
        [draw_sketch(x, np.random.default_rng((how.seed, i, k))) for i, x in enumerate(images)] for k in range(2)
    )
    made = _samples(engine, "sketch-to-image+text", ({"inputs": {sketch: drawing}} for drawing in given), how)
    nearest = gallery.nearest(torch.stack([pixels_of(s.outputs[image]) for s in made]).flatten(1))
    drawn = _samples(engine, "image-to-sketch", ({"inputs": {image: i}} for i in images), how)
    return SketchScores(
        len(pairs),
        retrieval_base=_mean(base_name(a) == base_name(b) for a, b in zip(nearest, names, strict=True)),
        retrieval_exact=_mean(a == b for a, b in zip(nearest, names, strict=True)),
        word_f1=_mean(word_f1(s.outputs[text], name) for s, name in zip(made, names, strict=True)),
        edge_f1=_mean(edge_f1(s.outputs[sketch], b) for s, b in zip(drawn, other, strict=True)),
        edge_f1_drawn=_mean(edge_f1(a, b) for a, b in zip(given, other, strict=True)),
    )


def edge_f1(drawing: Image.Image, reference: Image.Image) -> float:
    """How well the dark pixels of two drawings of one size agree: F1, where one may lie a pixel beside the other.

    The harmonic mean of the parts of each drawing's dark pixels that have one of the other's among their 9 neighbours;
    1 if neither has any.
    """
    from scipy.ndimage import binary_dilation

    dark = [np.asarray(x.convert("L")) < 128 for x in (drawing, reference)]  # [S, S] each
    if not (dark[0].any() and dark[1].any()):
        return float(dark[0].any() == dark[1].any())
    near = [binary_dilation(x, np.ones((3, 3))) for x in dark]
    precision, recall = near[1][dark[0]].mean(), near[0][dark[1]].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def evaluate_joint(engine: Engine, gallery: Gallery, how: Request, count: int = JOINT_SAMPLES) -> JointScores | None:
    """Scores of `count` ≥ 1 joint samples with seeds how.seed, …; None for a model that has no joint samples."""
    if "joint" in skipped_tasks(engine.config):
        return None
    image, text = evaluated_modalities(engine.config)
    firsts = range(0, count, CHUNK)
    requests = [replace(how, num=min(CHUNK, count - i), seed=how.seed + i) for i in firsts]
    results = _generate(engine, "joint", requests, chunk=1)
    samples = [sample for result in results for sample in result.samples]
    nearest, distances = gallery.nearest_with_distances(
        torch.stack([pixels_of(s.outputs[image]) for s in samples]).flatten(1)
    )
    f1 = _mean(word_f1(s.outputs[text], gallery.captions[i][0]) for s, i in zip(samples, nearest, strict=True))
    return JointScores(count, how.seed, results[0].order, f1, len(set(nearest)), _mean(distances))


def _described(
    engine: Engine, label: str, images: list[Image.Image], names: list[str], how: Request
) -> dict[str, list[float]]:
    """By score, one value of each image: how its generated text compares with its name."""
    pairs = list(zip(described_images(engine, label, images, how), names, strict=True))
    return {
        "word_f1": [word_f1(text, name) for text, name in pairs],
        "caption_exact": [text == " ".join(tokenize(name)) for text, name in pairs],
    }


def _samples(engine: Engine, label: str, requests: Iterable[dict], how: Request) -> list[Sample]:
    """One sample of each request; sample i has the seed how.seed + i."""
    numbered = [replace(how, **r, seed=how.seed + i) for i, r in enumerate(requests)]
    return [result.samples[0] for result in _generate(engine, label, numbered)]


def _generate(engine: Engine, label: str, requests: list[Request], chunk: int = CHUNK) -> list:
    """Results of requests, some at a time, with a progress bar."""
    results = []
    for i in tqdm(range(0, len(requests), chunk), desc=label, disable=None):
        results += engine.generate(requests[i : i + chunk])
    return results


def _psnr(engine: Engine, image: str, pixels: Tensor) -> float:
    """Mean PSNR in dB of encoding and decoding pixels [n, 3, S, S] in −1..1."""
    codec = engine.codecs[image]
    codec.build()
    decoded = [codec.decode_pixels(codec.encode_pixels(p.to(engine.device))).cpu() for p in pixels.split(64)]
    error = ((torch.cat(decoded) - pixels) / 2).square().mean((1, 2, 3))  # [n], of levels 0..1
    return float(-10 * error.log10().mean())


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB image as [3, S, S] float32 in −1..1."""
    return to_levels(image).float() / 127.5 - 1


def spread(items: list, count: int) -> list:
    """`count` of the items, evenly spaced, or all."""
    step = max(1.0, len(items) / count)
    return [items[int(i * step)] for i in range(min(count, len(items)))]


def _keyword(item: CaptionedImage) -> str | None:
    """A random caption after the first, the same at every call; None if the image has one caption only."""
    return random.Random(item.captions[0]).choice(item.captions[1:]) if item.captions[1:] else None


def _reordered(text: str) -> str:
    """Its words in an order that the text alone decides."""
    words = text.split()
    random.Random(text).shuffle(words)
    return " ".join(words)


def _means(values: dict[str, list[float | None]], indices: Iterable[int]) -> NameScores:
    """Means over the names of these indices."""
    indices = list(indices)
    keys = [field.name for field in fields(NameScores) if field.name != "count"]
    counted = {key: [values[key][i] for i in indices if values[key][i] is not None] for key in keys if key in values}
    return NameScores(len(indices), **{key: _mean(counted[key]) if counted.get(key) else None for key in keys})


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
