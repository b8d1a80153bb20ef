"""How good a checkpoint is on captioned images: `python -m engine.evaluate --checkpoint DIR --data data/emoji`.

For names that were trained on and for held-out names (a name is an image's first caption), the same number of each:

    retrieval_base    text-to-image: how often the nearest image of all (L2 over pixels at the model's size) has the
                      prompt's base name, the part before ":"
    retrieval_exact   how often it has the prompt's whole name
    word_f1           image-to-text: word F1 of the generated text against the name
    caption_exact     how often the generated text is the name
    infill_rmse       infilling: root mean square error in levels of 0…255 inside the mask, which is the left half of
                      the image; the name is given
    autoencoder_psnr  encoding and decoding alone, in dB

For joint samples, of which nothing is given and everything is generated, image and text:

    word_f1           of each sample's text against the name of the image that is nearest to the sample's image
    distinct_images   how many different images are the nearest of a sample

With --json, one object: "train" and "test" with "count" (images) and the keys above; "joint" with "count" (samples),
"seed", "order" (in which the modalities were generated, the checkpoint's default; [] for all together) and its keys
above; "skipped", what this model cannot do and why. The scores of skipped tasks are null. Modalities other than the
image and its text are generated with them and not looked at.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from engine.codecs.text import tokenize
from engine.command import Parser, path, refuse, run
from engine.config import Config
from engine.data.coco import CaptionedImage, CocoCaptions
from engine.data.emoji import base_name
from engine.errors import InputError, errors_named
from engine.request import Request, Sample
from engine.runtime import Engine

COMMAND = "python -m engine.evaluate"
JOINT_SAMPLES = 64
CHUNK = 256  # samples requested at a time, for the progress bar
Pairs = list[tuple[CaptionedImage, Tensor]]  # images uint8 [3, S, S]


@dataclass(frozen=True)
class Scores:
    """The scores of one split, see above; higher is better except for infill_rmse. None: the model cannot do this."""

    count: int
    retrieval_base: float | None
    retrieval_exact: float | None
    word_f1: float | None
    caption_exact: float | None
    infill_rmse: float | None
    autoencoder_psnr: float


@dataclass(frozen=True)
class JointScores:
    """How well the image and the text of joint samples fit each other, see above."""

    count: int
    seed: int
    order: tuple[str, ...]
    word_f1: float
    distinct_images: int


@dataclass(frozen=True)
class Gallery:
    """All images of a data set with their names, among which the nearest one is searched."""

    names: list[str]
    images: Tensor  # [n, 3·S·S] float32 in −1..1

    @classmethod
    def of(cls, pairs: Pairs) -> "Gallery":
        images = torch.stack([image for _, image in pairs]).flatten(1).float() / 127.5 - 1
        return cls([item.captions[0] for item, _ in pairs], images)

    def nearest(self, images: Tensor) -> list[str]:
        """The names of the images nearest in L2 to images [m, 3·S·S]."""
        return [self.names[i] for i in self.nearest_indices(images)]

    def nearest_indices(self, images: Tensor) -> list[int]:
        """The indices of the images nearest in L2 to images [m, 3·S·S]."""
        return torch.cdist(images, self.images).argmin(1).tolist()


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


def evaluate(engine: Engine, pairs: Pairs, gallery: Gallery, steps: int, seed: int) -> Scores:
    """Scores of images and their names, against a gallery that contains them; sample i has the seed seed + i."""
    (image, text), skipped = evaluated_modalities(engine.config), skipped_tasks(engine.config)
    size = engine.config.codecs[image].settings["size"]
    names = [item.captions[0] for item, _ in pairs]
    prompts = [" ".join(tokenize(name)) for name in names]
    images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for _, pixels in pairs]
    flat = torch.stack([pixels for _, pixels in pairs]).float() / 127.5 - 1  # [n, 3, S, S]
    scores = dict.fromkeys([field.name for field in fields(Scores)])

    def samples_of(task: str, requests: Iterable[dict]) -> list[Sample]:
        numbered = [Request(**r, steps=steps, seed=seed + i) for i, r in enumerate(requests)]
        return [result.samples[0] for result in _generate(engine, task, numbered)]

    if "text-to-image" not in skipped:
        # "fill": a held-out name may have a word that the training set does not.
        samples = samples_of("text-to-image", ({"inputs": {text: p}, "unknown_words": "fill"} for p in prompts))
        nearest = gallery.nearest(torch.stack([pixels_of(s.outputs[image]) for s in samples]).flatten(1))
        scores["retrieval_base"] = _mean(base_name(a) == base_name(b) for a, b in zip(nearest, names, strict=True))
        scores["retrieval_exact"] = _mean(a == b for a, b in zip(nearest, names, strict=True))
    if "image-to-text" not in skipped:
        samples = samples_of("image-to-text", ({"inputs": {image: i}} for i in images))
        texts = [sample.outputs[text] for sample in samples]
        scores["word_f1"] = _mean(word_f1(t, name) for t, name in zip(texts, names, strict=True))
        scores["caption_exact"] = _mean(t == p for t, p in zip(texts, prompts, strict=True))
    if "infill" not in skipped:
        left = np.where(np.arange(size) < size // 2, 255, 0).astype(np.uint8)[None].repeat(size, 0)  # [S, S]
        masks = {image: Image.fromarray(left)}
        inputs = ({text: p, image: i} for p, i in zip(prompts, images, strict=True))
        samples = samples_of("infill", ({"inputs": i, "masks": masks, "unknown_words": "fill"} for i in inputs))
        filled = torch.stack([pixels_of(s.outputs[image]) for s in samples])  # [n, 3, S, S]
        error = (filled - flat)[..., : size // 2].square().mean().sqrt()
        scores["infill_rmse"] = float(error * 127.5)
    return Scores(**scores | {"count": len(pairs), "autoencoder_psnr": _psnr(engine, image, flat)})


def evaluate_joint(
    engine: Engine, gallery: Gallery, steps: int, seed: int, count: int = JOINT_SAMPLES
) -> JointScores | None:
    """Scores of `count` ≥ 1 joint samples with seeds seed, seed + 1, …; None for a model that has no joint samples."""
    if "joint" in skipped_tasks(engine.config):
        return None
    image, text = evaluated_modalities(engine.config)
    firsts = range(0, count, CHUNK)
    requests = [Request(num=min(CHUNK, count - i), steps=steps, seed=seed + i) for i in firsts]
    results = _generate(engine, "joint", requests, chunk=1)
    samples = [sample for result in results for sample in result.samples]
    nearest = gallery.nearest_indices(torch.stack([pixels_of(s.outputs[image]) for s in samples]).flatten(1))
    f1 = _mean(word_f1(s.outputs[text], gallery.names[i]) for s, i in zip(samples, nearest, strict=True))
    return JointScores(count, seed, results[0].order, f1, len(set(nearest)))


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
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def spread(pairs: list, count: int) -> list:
    """`count` of the pairs, evenly spaced, or all."""
    step = max(1.0, len(pairs) / count)
    return [pairs[int(i * step)] for i in range(min(count, len(pairs)))]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _parser() -> Parser:
    parser = Parser(COMMAND, description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=path, help="default: the built-in model")
    add("--data", type=path, required=True, help="folder of images, captions.json and captions_test.json")
    add("--count", type=int, default=0, help="names of each split, evenly spaced (default: as many as are held out)")
    add("--joint-count", type=int, default=JOINT_SAMPLES, help="joint samples, 0 for none (default: %(default)s)")
    add("--steps", type=int, default=25, help="steps of the solver (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first sample of every task (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        splits, joint, skipped = _run(options)
    except (InputError, FloatingPointError) as error:
        return refuse(COMMAND, error, vars(options))
    if options.json:
        report = {split: asdict(scores) for split, scores in splits.items()}
        report |= {"joint": asdict(joint) if joint else None, "skipped": skipped}
        print(json.dumps(report, indent=2))
    else:
        _print_table(splits, joint, skipped)
    return 0


def _run(options: argparse.Namespace) -> tuple[dict[str, Scores], JointScores | None, dict[str, str]]:
    for key in ("count", "joint_count"):
        if getattr(options, key) < 0:
            raise InputError(key, getattr(options, key), "use a whole number from 0", "is out of range")
    Request(steps=options.steps, seed=options.seed)  # checks both before the model is loaded
    with Engine.from_pretrained(options.checkpoint, device=options.device, dtype=options.dtype) as engine:
        size = engine.config.codecs[evaluated_modalities(engine.config)[0]].settings["size"]
        with errors_named("data"):
            splits = {split: list(CocoCaptions.open(options.data, split).read(size)) for split in ("train", "test")}
        for split, pairs in splits.items():
            if not pairs:
                raise InputError("data", options.data, "render or copy it again", f"has no readable {split} image")
        gallery = Gallery.of([pair for pairs in splits.values() for pair in pairs])
        count, steps, seed = options.count or len(splits["test"]), options.steps, options.seed
        scores = {
            split: evaluate(engine, spread(pairs, count), gallery, steps, seed) for split, pairs in splits.items()
        }
        joint = evaluate_joint(engine, gallery, steps, seed, options.joint_count) if options.joint_count else None
        return scores, joint, skipped_tasks(engine.config)


def _print_table(splits: dict[str, Scores], joint: JointScores | None, skipped: dict[str, str]) -> None:
    print(f"{'':18}" + "".join(f"{split:>10}" for split in splits))
    for field in fields(Scores):
        values = [getattr(scores, field.name) for scores in splits.values()]
        print(f"{field.name:18}" + "".join(f"{'-':>10}" if v is None else f"{v:10.4g}" for v in values))
    if joint is not None:
        order = f"order {', '.join(joint.order)}" if joint.order else "all modalities together"
        print(f"{joint.count} joint samples ({order}, seed {joint.seed}): word_f1 {joint.word_f1:.4g}, "
              f"distinct_images {joint.distinct_images}")  # fmt: skip
    for task, reason in skipped.items():
        print(f"{task} skipped: {reason}")


if __name__ == "__main__":
    run(COMMAND, main)
