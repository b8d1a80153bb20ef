"""Masks of tasks: from pixels and words to elements of the packed state.

A mask is True where the engine must generate. Masks of pictures are numpy arrays [H, W] (they come from and go to
pictures), masks of the state are torch tensors (they go to the sampler). A task is nothing but such a pattern.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from engine.config import ModelConfig


def image_elements(pixels: np.ndarray, factor: int, patch: int, channels: int) -> Tensor:
    """Pixel mask [H, W] bool to elements of patchified latents, [tokens, patch·patch·channels] bool.

    A latent covers factor × factor pixels and is generated if any of them is: no masked pixel may keep its old
    content. (Known pixels it covers are put back in the picture, see `laid_into`.) Tokens are row-major over patches;
    within a token: row in patch, column in patch, channel.
    """
    height, width = pixels.shape
    assert height % (factor * patch) == 0 and width % (factor * patch) == 0, (pixels.shape, factor, patch)
    rows, columns = height // (factor * patch), width // (factor * patch)
    cells = np.asarray(pixels, bool).reshape(rows * patch, factor, columns * patch, factor).any(axis=(1, 3))
    tokens = cells.reshape(rows, patch, columns, patch).transpose(0, 2, 1, 3).reshape(rows * columns, patch * patch)
    return torch.from_numpy(np.repeat(tokens, channels, axis=1))  # [L, patch·patch·channels]


def text_elements(holes: Tensor, channels: int) -> Tensor:
    """Hole mask of words [L] bool to elements [L, channels] bool."""
    return holes.bool()[:, None].repeat(1, channels)


def pack(masks: Mapping[str, Tensor], model: ModelConfig) -> Tensor:
    """Masks [L, C] by modality, one for each of the model's, to the generate mask [N] of the packed state."""
    for m in model.modalities:
        assert masks[m.name].shape == (m.tokens, m.channels), (m, masks[m.name].shape)
    return torch.cat([masks[m.name].bool().reshape(-1) for m in model.modalities])


def token_mask(generate: Tensor, model: ModelConfig) -> Tensor:
    """Mask [..., N] of elements to mask [..., L] of tokens: True where any element of the token is."""
    parts = []
    for m in model.modalities:
        elements = generate[..., model.state_slices[m.name]].unflatten(-1, (m.tokens, m.channels))  # [..., L, C]
        parts.append(elements.any(-1))
    return torch.cat(parts, dim=-1)


def whole_tokens(generate: Tensor, model: ModelConfig) -> Tensor:
    """Mask [N] widened so that no token is partly known, as clean conditioning needs: a token has one time."""
    tokens = token_mask(generate, model)
    parts = [tokens[model.token_slices[m.name]].repeat_interleave(m.channels) for m in model.modalities]
    return torch.cat(parts)


def task_of(generate: Tensor, model: ModelConfig) -> str:
    """The word for a mask [N]: "joint", "text-to-image", "image-to-text" (or other modalities' names), or "infill"."""
    parts = {name: generate[part] for name, part in model.state_slices.items()}
    wanted = [name for name, part in parts.items() if part.all()]
    given = [name for name, part in parts.items() if not part.any()]
    if len(wanted) == len(parts):
        return "joint"
    if len(given) == len(wanted) == 1 and len(parts) == 2:
        return f"{given[0]}-to-{wanted[0]}"
    return "infill"


def painted_over(given: Tensor, mask: np.ndarray) -> Tensor:
    """A picture [3, H, W] whose masked pixels [H, W] bool are each as the nearest known one; grey if none is known.

    An autoencoder's latents of known pixels see beyond them; what lies under the mask must not reach the model so.
    """
    if mask.all():
        return torch.zeros_like(given)
    if not mask.any():
        return given
    from scipy.ndimage import distance_transform_edt  # a third of a second, which only masks are to pay

    rows, columns = distance_transform_edt(mask, return_distances=False, return_indices=True)  # [H, W] each
    return given[:, torch.from_numpy(rows), torch.from_numpy(columns)]


def laid_into(given: Tensor, generated: Tensor, mask: np.ndarray, radius: int) -> Tensor:
    """Generated pictures [n, 3, H, W] in the masked pixels [H, W] bool of a given one [3, H, W], without a seam.

    Known pixels are the given ones. How the two differ there is carried on into the hole, a mean over the known pixels
    at most `radius` away, and fades out over as many: nothing of what lay under the mask shows.
    """
    weights, hole = torch.from_numpy(feather(mask, radius)), torch.from_numpy(mask)  # [H, W]

    def summed(x: Tensor) -> Tensor:
        """Sums over the window around each pixel, but for a common factor."""
        return avg_pool2d(x, 2 * radius + 1, stride=1, padding=radius)

    known = (~hole).float()[None]  # [1, H, W]
    carried = summed((given - generated) * known) / summed(known).clamp_min(1e-6)  # [n, 3, H, W]
    return torch.where(hole, generated + (1 - weights) * carried, given)


def feather(pixels: np.ndarray, radius: int) -> np.ndarray:
    """How generated each pixel is, [H, W] float32.

    Exactly 0 on known pixels (pixels False), rising linearly inside the generated side to 1 at a distance of
    radius + 1 pixels from the nearest known one (chessboard distance). The border of the picture is no known pixel.
    """
    assert radius >= 0, radius
    inside = np.asarray(pixels, bool)
    weights = inside.astype(np.float32)
    for _ in range(radius):
        inside = _eroded(_eroded(inside).T).T
        weights += inside
    return weights / np.float32(radius + 1)


def _eroded(inside: np.ndarray) -> np.ndarray:
    """Along columns: True where a pixel and its upper and lower neighbours are."""
    padded = np.pad(inside, ((1, 1), (0, 0)), constant_values=True)
    return padded[:-2] & padded[1:-1] & padded[2:]
