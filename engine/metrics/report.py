"""`measure`: the scores of a folder of samples against a data set."""

import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.data.captioned import CaptionedImages
from engine.data.sample_files import RUN, read_run, read_samples
from engine.data.sources import open_captioned
from engine.errors import InputError, errors_named
from engine.files import cache_folder
from engine.images import images_up_to_the_limit, open_image, to_levels
from engine.metrics.captions import bleu, bleu_counts, caption_words, cider, distinct_share, n_grams, rouge_l
from engine.metrics.features import (
    FeatureNetwork,
    feature_network,
    features_of,
    inception_features,
    reference_statistics,
)
from engine.metrics.frechet import Statistics, frechet_distance, pair_distances
from engine.metrics.language_models import causal_surprise, clip_scores
from engine.metrics.n_gram import KneserNey
from engine.metrics.scores import Bootstrap, Score

BIASED_REPLICATES = 20  # for standard errors; of a Fréchet distance each takes an eigendecomposition
PAIRS = 8  # partners of each sample, for the mean distance of pairs
RECALLS = (1, 5, 10)
HELD_OUT = 10  # the references of each 10th image are not for the n-gram model to learn
N = 3
IMAGES = ("png", "jpg", "jpeg", "webp")  # extensions


@dataclass(frozen=True)
class MeasureOptions:
    """What `python -m engine.evaluate --samples` is given; it has an option for each field."""

    samples: Path
    data: Path
    split: str = "val"
    features: Path | None = None
    inception: Path | None = None
    clip: Path | None = None
    language_model: Path | None = None
    bootstrap: int = 200
    seed: int = 0
    cache: bool = True


@dataclass(frozen=True)
class Samples:
    """What a folder of samples holds, without those that could not be made. Images are read when they are needed."""

    folder: Path
    captions: dict[str, str | None]  # of the samples with a generated image, their texts by key
    texts: list[str]  # generated
    image_ids: list[str]  # of the images that these describe

    def images(self) -> Iterator[Image.Image]:
        """The generated images in the order of `captions`; InputError about "samples" for damaged or unequal ones."""
        size = None
        for key, files in read_samples(self.folder):
            if key in self.captions:
                with images_up_to_the_limit():
                    image = open_image(io.BytesIO(_image(files)), "samples").convert("RGB")
                size = size or (image.width, image.width)
                if image.size != size:
                    problem = f"is of {image.width}x{image.height} pixels, the first is {size[0]} wide"
                    raise InputError("samples", self.folder / key, "give square images of one size", problem)
                yield image


def measure(options: MeasureOptions, device: torch.device) -> dict:
    """Scores by name with their intervals and counts, the settings, and what was skipped and why: what JSON keeps.

    Raises InputError about an option.
    """
    samples = load_samples(options.samples)
    with errors_named("data"):
        data = open_captioned(options.data, options.split)
    bootstrap, skipped, scores = Bootstrap(options.bootstrap, options.seed), {}, {}
    cache = cache_folder() if options.cache else None  # None without a home, too
    if len(samples.captions) > 1:
        for network in _networks(options, device):
            scores |= image_scores(network, samples.images, data, bootstrap, cache and cache / "references")
    else:
        skipped["images"] = "fewer than two samples have a generated image"
    scores |= _clip(options, samples, bootstrap, device, skipped)
    if samples.texts:
        references = {item.image_id: item.captions for item in data.items}
        scores |= text_scores(samples.texts, samples.image_ids, references, bootstrap, skipped)
        if options.language_model:
            surprise = causal_surprise(options.language_model, samples.texts, device)
            scores["perplexity of the language model"] = _perplexity(surprise, bootstrap)
    else:
        skipped["captions"] = "no sample has a generated text"
    return {
        "samples": {"images": len(samples.captions), "texts": len(samples.texts)},
        "reference": {"split": options.split, "images": len(data.items)},
        "bootstrap": {"replicates": options.bootstrap, "seed": options.seed, "interval": 0.95},
        "scores": {name: asdict(score) for name, score in scores.items()},
        "skipped": skipped,
    }


def load_samples(folder: Path) -> Samples:
    """Reads a folder of a bulk run, or any folder or tar shards of images with .txt and .json.

    Raises InputError about "samples": for a run that is not complete, and for files that cannot be read.
    """
    samples, count = Samples(folder, {}, [], []), 0
    for key, files in read_samples(folder):
        count += 1
        facts = _facts(folder, key, files.get("json"))
        if "error" in facts:
            continue
        text = files["txt"].decode("utf-8", "replace").strip() if "txt" in files else None
        generated = facts["generated"]
        if "image" in generated and _image(files) is not None:
            samples.captions[key] = text
        if text is not None and "text" in generated:
            samples.texts.append(text)
            samples.image_ids.append(str(facts.get("image_id")))
    wanted = read_run(folder, "samples").get("count") if (folder / RUN).is_file() else count
    if count != wanted:
        remedy = "repeat the command of engine.sample, which makes the others"
        raise InputError("samples", folder, remedy, f"has {count} of {wanted} samples")
    if not count:
        raise InputError("samples", folder, "give a folder of images", "has no sample")
    return samples


def _image(files: dict[str, bytes]) -> bytes | None:
    return next((files[extension] for extension in IMAGES if extension in files), None)


def _facts(folder: Path, key: str, content: bytes | None) -> dict:
    """What a sample's .json records, with "generated"; InputError about "samples" for a damaged one."""
    try:
        facts = json.loads(content or b"{}")
    except (ValueError, RecursionError) as error:
        raise InputError("samples", folder / f"{key}.json", "make it again", f"is damaged ({error})") from None
    facts = facts if isinstance(facts, dict) else {}
    generated = facts.get("generated")  # another program's need not say it
    return facts | {"generated": generated if isinstance(generated, list) else ["image"]}


def _networks(options: MeasureOptions, device: torch.device) -> list[FeatureNetwork]:
    networks = [] if options.inception is None else [inception_features(options.inception, device)]
    if options.features is not None or not networks:
        networks.append(feature_network(options.features, device))
    return networks


def image_scores(
    network: FeatureNetwork,
    images: Callable[[], Iterator[Image.Image]],
    data: CaptionedImages,
    bootstrap: Bootstrap,
    cache: Path | None,
) -> dict[str, Score]:
    """The Fréchet distance of images to a data set's, and the mean distance of pairs of them.

    images  gives them from the first one on at every call
    """
    reference = reference_statistics(network, data, next(images()).width, cache)
    root = reference.root()
    features = torch.cat(list(features_of(network, map(to_levels, images()))))  # [n, d]

    def distance(indices: np.ndarray) -> float:
        return frechet_distance(reference, Statistics.of(features[torch.from_numpy(indices)]), root)

    apart = pair_distances(features, PAIRS, torch.Generator().manual_seed(bootstrap.seed)).mean(1)  # [n]
    of_reference = math.sqrt(2 * reference.covariance.trace().item())  # √E‖x − y‖² of two reference images
    return {
        network.name: bootstrap.score(len(features), distance, BIASED_REPLICATES, biased=True),
        f"diversity {network.name}": bootstrap.mean(apart.numpy() / of_reference),
    }


def _clip(
    options: MeasureOptions, samples: Samples, bootstrap: Bootstrap, device: torch.device, skipped: dict[str, str]
) -> dict[str, Score]:
    texts = [text for text in samples.captions.values() if text]
    if options.clip is None or not texts:
        skipped["CLIP"] = "no folder given with --clip" if options.clip is None else "no generated image has a text"
        return {}
    images = (i for i, text in zip(samples.images(), samples.captions.values(), strict=True) if text)
    found = clip_scores(options.clip, images, texts, device)
    scores = {"CLIP score": bootstrap.mean(found.agreement)}
    for k in RECALLS:
        scores[f"text-to-image R@{k}"] = bootstrap.mean(found.image_rank < k)
        scores[f"image-to-text R@{k}"] = bootstrap.mean(found.text_rank < k)
    return scores


def text_scores(
    texts: list[str],
    image_ids: list[str],
    references: dict[str, tuple[str, ...]],
    bootstrap: Bootstrap,
    skipped: dict[str, str],
) -> dict[str, Score]:
    """BLEU, ROUGE-L and CIDEr where references are known, perplexity under the references' n-grams, distinct n-grams.

    image_ids   of the images that the texts describe
    references  captions by image id
    """
    scores = {}
    described = [(t, references[i]) for t, i in zip(texts, image_ids, strict=True) if i in references]
    if described:
        captions, wanted = zip(*described, strict=True)
        counts = bleu_counts(captions, wanted)
        for n in (1, 2, 3, 4):
            scores[f"BLEU-{n}"] = bootstrap.score(len(counts), lambda indices, n=n: bleu(counts[indices], n))
        scores["ROUGE-L"] = bootstrap.mean(rouge_l(captions, wanted))
        scores["CIDEr"] = bootstrap.mean(cider(captions, wanted))
    else:
        skipped["BLEU, ROUGE-L, CIDEr"] = "no generated text is of an image of the data"
    held_out = [captions for i, captions in enumerate(references.values()) if i % HELD_OUT == 0]
    learned = [captions for i, captions in enumerate(references.values()) if i % HELD_OUT]
    if learned:
        model = KneserNey((caption_words(c) for captions in learned for c in captions), N)
        of_name = {"": texts, ", held-out references": [c for captions in held_out for c in captions]}
        for name, listed in of_name.items():
            surprise = np.array([model.surprise(caption_words(text)) for text in listed])
            scores[f"perplexity of {N}-grams{name}"] = _perplexity(surprise, bootstrap)
    words = [caption_words(text) for text in texts]
    for n in (1, 2):
        grams = [n_grams(of_text, n) for of_text in words]
        scores[f"distinct-{n}"] = bootstrap.score(
            len(texts), lambda indices, g=grams: distinct_share(g[i] for i in indices), BIASED_REPLICATES, biased=True
        )
    return scores


def _perplexity(surprise: np.ndarray, bootstrap: Bootstrap) -> Score:
    """exp of the mean over all words, of rows (nats, words)."""
    return bootstrap.score(
        len(surprise), lambda i: math.exp(min(700, surprise[i, 0].sum() / max(1, surprise[i, 1].sum())))
    )
