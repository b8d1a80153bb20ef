"""Networks from local folders, through transformers: CLIP's agreement of images and texts, a causal model's perplexity.

transformers is imported when one of them is used; nothing is downloaded.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.errors import InputError
from engine.files import is_folder

BATCH = 32


@dataclass(frozen=True)
class ClipScores:
    """Of n images, each with its text."""

    agreement: np.ndarray  # [n], 100 · max(cos, 0), the CLIP score of Hessel et al. 2021 as torchmetrics has it
    image_rank: np.ndarray  # [n], of the own image among all for a text, 0: the nearest
    text_rank: np.ndarray  # [n], of the own text among all for an image


def clip_scores(folder: Path, images: Iterable[Image.Image], texts: Sequence[str], device: torch.device) -> ClipScores:
    """Raises InputError about "clip" where transformers is missing or the folder is not of a CLIP model.

    Texts that several images share are one text: each of them is a right answer.
    """
    model, processor = _load("clip", folder, "CLIPModel", "CLIPProcessor", device)
    places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    with torch.inference_mode():
        image_features, text_features, distinct = [], [], list(places)
        images = iter(images)
        while batch := list(islice(images, BATCH)):
            pixels = processor(images=batch, return_tensors="pt").to(device)
            image_features.append(_normalized(model.get_image_features(**pixels)))
        for i in range(0, len(distinct), BATCH):
            words = processor(text=distinct[i : i + BATCH], return_tensors="pt", padding=True, truncation=True)
            text_features.append(_normalized(model.get_text_features(**words.to(device))))
        x, y = torch.cat(image_features), torch.cat(text_features)  # [n, d], [m, d]
    return ranked(x, y, torch.tensor([places[text] for text in texts]))


def ranked(images: Tensor, texts: Tensor, text_of: Tensor) -> ClipScores:
    """Scores of unit features [n, d] of images and [m, d] of distinct texts; text_of [n]: the text of each image."""
    own = (images * texts[text_of]).sum(1)  # [n]
    image_rank, text_rank = [], []
    for part in torch.arange(len(images)).split(1024):
        to_texts, to_images = images[part] @ texts.T, texts[text_of[part]] @ images.T  # [b, m], [b, n]
        text_rank.append((to_texts > own[part, None]).sum(1))
        # The best image of those that have this text.
        same = text_of == text_of[part, None]  # [b, n]
        best = to_images.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        image_rank.append((to_images.masked_fill(same, -torch.inf) > best).sum(1))
    return ClipScores(
        (100 * own.clamp_min(0)).double().numpy(), torch.cat(image_rank).numpy(), torch.cat(text_rank).numpy()
    )


def _normalized(features) -> Tensor:
    features = getattr(features, "pooler_output", features)  # transformers 5 gives a structure
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def causal_surprise(folder: Path, texts: Sequence[str], device: torch.device) -> np.ndarray:
    """[n, 2]: negative log probability of each text in nats under a causal language model, and its tokens.

    A text's first token is predicted from the beginning-of-text token, or not counted where the model has none.
    Raises InputError about "language_model".
    """
    model, tokenizer = _load("language_model", folder, "AutoModelForCausalLM", "AutoTokenizer", device)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = []
    with torch.inference_mode():
        for text in texts:
            tokens = torch.tensor([start + tokenizer(text, add_special_tokens=False)["input_ids"]], device=device)
            if tokens.shape[1] < 2:
                rows.append((0.0, 0))
                continue
            logits = model(tokens).logits[0, :-1].float()  # [L − 1, V]
            rows.append((torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item(), len(logits)))
    return np.array(rows, np.float64)


def _load(argument: str, folder: Path, model: str, processor: str, device: torch.device) -> tuple:
    """A model in evaluation mode and what prepares its inputs."""
    if not is_folder(folder, argument):
        raise InputError(argument, folder, "give the folder of a transformers model", "is not a folder")
    try:
        import transformers
    except ImportError as error:
        remedy = "install the extra [evaluate]"
        raise InputError(argument, folder, remedy, f"needs transformers, which cannot be imported ({error})") from None
    try:
        loaded = getattr(transformers, model).from_pretrained(folder, local_files_only=True, use_safetensors=True)
        return loaded.to(device).eval(), getattr(transformers, processor).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        problem = f"cannot be loaded as {model} ({str(error).splitlines()[0][:200]})"
        raise InputError(argument, folder, "give a folder with safetensors and tokenizer", problem) from None
