"""The denoiser's training data: the images of an epoch, captions and sketches drawn at random, and their clean data."""

import math
from collections import Counter
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from engine.codecs.text import TextCodec, token_weights
from engine.codecs.words import caption_words, shortened
from engine.config import Config
from engine.data.latents import LatentCache
from engine.errors import errors_named
from engine.training.options import image_and_text, sketch_of
from engine.training.recipes import Recipe

# Fraction of the known images that are taken in a changed version, if the cache has such versions.
CHANGED = 0.75
# Fraction of the known images that are `only_known` ones, if there are such.
ONLY_KNOWN = 0.5
# Most captions of an image that `Recipe.joined` joins.
MOST_JOINED = 3


class Choice(NamedTuple):
    """What a batch is made of."""

    images: list[int]  # [B] of the cache
    words: Tensor  # [B, L] integers, indices of `Examples.vectors`, 0: the end of the text
    versions: list[int]  # [B] of the images, 0: as they are
    sketches: list[int]  # [B] of the drawings of images as they are


class Examples:
    """Captioned images, or texts alone, as training data of the denoiser: latents on disk, captions in memory.

    cache   latents and captions of the images; of texts alone, captions without latents
    text    the codec of the captions
    config  the checkpoint's `Config`, of a text and perhaps an image, and of sketches if the cache has them
    recipe  tells how often images and captions are used and how captions are weighted
    Raises InputError about `data` if a caption has a word outside the codec's vocabulary.
    """

    def __init__(self, cache: LatentCache, text: TextCodec, config: Config, recipe: Recipe):
        self.model, self.recipe, self.vectors, self.cache = config.model, recipe, text.vectors, cache
        (self.image_name, self.text_name), self.sketch_name = image_and_text(config), sketch_of(config)
        words = config.model.modality(self.text_name).tokens
        # Indices into the table of word vectors: as vectors, the captions of MS-COCO would take 10 GB.
        rows = []
        for argument, part in (
            ("data", cache.captions[: cache.drawn]),
            ("known_images", cache.captions[cache.drawn :]),
        ):
            with errors_named(argument):
                if part:
                    rows.append(text.indices((shortened(c, words) for captions in part for c in captions), words))
        self.captions = torch.cat(rows)
        self.counts = [len(captions) for captions in cache.captions]  # by image
        self.first_of = [0, *accumulate(self.counts)]  # index of each image's first caption in `captions` [n, L]
        first = [captions[0] for captions in cache.captions]
        self.epoch = with_repeats(first[: cache.drawn], recipe.repeats)
        self.only_known = [cache.drawn + i for i in with_repeats(first[cache.drawn :], recipe.repeats)]

    def __len__(self) -> int:
        """Images of an epoch, repeated ones counted as often as they are shown."""
        return len(self.epoch)

    def choose(
        self,
        indices: list[int],
        generator: torch.Generator,
        known: Tensor | None = None,
        known_texts: Tensor | None = None,
    ) -> Choice:
        """Draws captions and versions for images of the epoch.

        known  [B] bool, images that are known as a whole: some of these are replaced by such as are only known, and
               most are taken in a version that `engine.data.augment` changed. None: none are known
        known_texts  [B] bool, texts that are known as a whole: some become one to three captions of the image, joined,
                     and the words of some are put into another order. None: none are known
        """
        images = [self.epoch[i] for i in indices]
        if known is not None and self.only_known:
            replaced = known & (torch.rand(len(images), generator=generator) < ONLY_KNOWN)
            others = torch.randint(len(self.only_known), (len(images),), generator=generator).tolist()
            images = [self.only_known[o] if r else i for i, o, r in zip(images, others, replaced.tolist(), strict=True)]
        draws = torch.rand(len(images), 2, generator=generator).tolist()
        captions = [
            self.first_of[i] + (0 if a < self.recipe.first_caption else int(b * self.counts[i]))
            for i, (a, b) in zip(images, draws, strict=True)
        ]
        versions = torch.zeros(len(images), dtype=torch.int64)
        if known is not None and self.cache.versions > 1:
            changed = known & (torch.rand(len(images), generator=generator) < CHANGED)
            drawn = torch.randint(1, self.cache.versions, (len(images),), generator=generator)
            versions = torch.where(changed, drawn, 0)
        sketches = [0] * len(images)
        if self.sketch_name is not None:
            sketches = torch.randint(self.cache.sketches, (len(images),), generator=generator).tolist()
        words = self.captions[captions]
        if known_texts is not None:
            words = self._joined_captions(words, images, known_texts, generator)
            words = self._reordered(words, known_texts, generator)
        return Choice(images, words, versions.tolist(), sketches)

    def read(self, choice: Choice, part: slice = slice(None)) -> Tensor:
        """x0 [b, N] float32 of the samples of `part`, on the CPU."""
        images, versions = choice.images[part], choice.versions[part]
        parts = {self.text_name: self.vectors[choice.words[part]]}  # [b, L, C]
        if self.image_name is not None:
            parts[self.image_name] = self.cache.latents(images, versions)  # [b, L, C]
        if self.sketch_name is not None:
            parts[self.sketch_name] = self.cache.sketch_latents(images, versions, choice.sketches[part])  # [b, L, C]
        return self._joined({name: tokens.flatten(1) for name, tokens in parts.items()})  # [b, N]

    def token_weights(self, choice: Choice) -> Tensor | None:
        """[B, L] float32 on the CPU; None: the recipe weights all tokens alike."""
        if not self.recipe.captions_alike:
            return None
        weights = {m.name: torch.ones(len(choice.images), m.tokens) for m in self.model.modalities}
        return self._joined(weights | {self.text_name: token_weights(choice.words)})

    def categories(self, choice: Choice) -> dict[str, Tensor]:
        """By categorical modality those of its tokens, [B, L] int64 on the CPU."""
        if not self.model.modality(self.text_name).categories:
            return {}
        return {self.text_name: choice.words.long()}

    def _joined_captions(self, words: Tensor, images: list[int], known: Tensor, generator: torch.Generator) -> Tensor:
        """The words [B, L], some of the known captions replaced by up to `MOST_JOINED` of the image's, one by one."""
        if not self.recipe.joined:
            return words
        changed = known & (torch.rand(len(images), generator=generator) < self.recipe.joined)  # [B]
        numbers = torch.randint(1, MOST_JOINED + 1, (len(images),), generator=generator).tolist()
        words = words.clone()
        for b in changed.nonzero().flatten().tolist():
            drawn = torch.randperm(self.counts[images[b]], generator=generator)[: numbers[b]]
            row = self.captions[self.first_of[images[b]] + drawn].flatten()
            row = row[row != 0][: words.shape[1]]
            words[b] = 0
            words[b, : len(row)] = row
        return words

    def _reordered(self, words: Tensor, known: Tensor, generator: torch.Generator) -> Tensor:
        """The words [B, L], those of some known captions in another order."""
        if not self.recipe.reordered:
            return words
        places = torch.arange(words.shape[1]).repeat(len(words), 1)  # [B, L]
        changed = known & (torch.rand(len(words), generator=generator) < self.recipe.reordered)  # [B]
        drawn = torch.rand(places.shape, generator=generator)  # [B, L]
        mixed = torch.where(words == 0, places + 1.0, drawn).argsort(1)  # what follows the last word stays there
        return words.gather(1, torch.where(changed[:, None], mixed, places))

    def _joined(self, parts: dict[str, Tensor]) -> Tensor:
        """[B, ·] of each modality side by side, in the model's order."""
        return torch.cat([parts[m.name] for m in self.model.modalities], dim=1)


def with_repeats(captions: list[str], repeats: int) -> list[int]:
    """Indices of the images of an epoch: i is repeated round(repeats/√n) times, at least once.

    n is the number of captions that contain the rarest word of captions[i]. So an image whose name has a word of its
    own ("ghost") is shown `repeats` times, and one of hundreds of "firefighter" images once. The square root, as in
    sampling languages for translation, is a compromise between showing all images and all words equally often.
    """
    # Split into words twice: sets of the words of a million captions would take a gigabyte.
    captions_with = Counter(word for caption in captions for word in set(caption_words(caption)))
    rarest = (min(map(captions_with.get, caption_words(c)), default=len(captions)) for c in captions)
    return [i for i, n in enumerate(rarest) for _ in range(max(1, round(repeats / math.sqrt(n))))]
