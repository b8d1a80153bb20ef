"""Masks of the packed state, and the tasks they are."""

import pytest
import torch

from engine.config import Modality, ModelConfig
from engine.diffusion.masks import pack, task_of, token_mask, whole_tokens

MODEL = ModelConfig((Modality("image", 4, 8, depth=0), Modality("text", 3, 2, depth=0)), shared_depth=1, dim=64)
ALL, NONE = torch.ones(4, 8, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.bool)


def mask_of(image, holes):
    """Packed mask of image elements [4, 8] and of which of the three words are generated."""
    return pack({"image": image, "text": torch.tensor(holes).bool()[:, None].expand(3, 2)}, MODEL)


def test_packed_mask_lies_as_the_packed_state_does():
    assert mask_of(NONE, [1, 0, 0]).nonzero().flatten().tolist() == [32, 33]


def test_masks_of_another_shape_are_refused():
    with pytest.raises(AssertionError):
        pack({"image": ALL, "text": torch.ones(4, 2)}, MODEL)


def test_a_partly_generated_token_is_widened_to_a_whole_one():
    image = NONE.clone()
    image[2, 5] = True
    mask = mask_of(image, [0, 0, 1])
    assert token_mask(mask, MODEL).tolist() == [False, False, True, False, False, False, True]
    whole = whole_tokens(mask, MODEL)
    assert whole.nonzero().flatten().tolist() == [*range(16, 24), 36, 37]
    assert torch.equal(token_mask(torch.stack([mask, whole]), MODEL)[0], token_mask(whole, MODEL))


@pytest.mark.parametrize(
    "image, text, task",
    [
        (ALL, [1, 1, 1], "joint"),
        (ALL, [0, 0, 0], "text-to-image"),
        (NONE, [1, 1, 1], "image-to-text"),
        (ALL, [0, 1, 0], "infill"),
        (NONE, [0, 1, 0], "infill"),
        (NONE, [0, 0, 0], "infill"),
    ],
)
def test_task_is_the_pattern_of_the_mask(image, text, task):
    assert task_of(mask_of(image, text), MODEL) == task


def test_task_of_one_modality_is_joint_or_infill():
    alone = ModelConfig((Modality("sound", 4, 1, depth=0),), shared_depth=1, dim=64)
    assert task_of(torch.ones(4, dtype=torch.bool), alone) == "joint"
    assert task_of(torch.tensor([True, False, True, True]), alone) == "infill"


THREE = ModelConfig(tuple(Modality(n, 2, 2, depth=0) for n in ("image", "text", "sketch")), shared_depth=1, dim=64)


@pytest.mark.parametrize(
    "generated, task",
    [
        ("image text sketch", "joint"),
        ("image", "text+sketch-to-image"),
        ("text", "image+sketch-to-text"),
        ("image sketch", "text-to-image+sketch"),
        ("text sketch", "image-to-text+sketch"),
        ("", "infill"),
    ],
)
def test_task_of_three_modalities_names_all_of_them_in_the_order_of_the_config(generated, task):
    parts = {m.name: torch.full((2, 2), m.name in generated.split()) for m in THREE.modalities}
    assert task_of(pack(parts, THREE), THREE) == task


def test_a_partly_known_modality_among_three_makes_the_task_infill():
    parts = {name: torch.full((2, 2), name == "image") for name in ("image", "text", "sketch")}
    parts["sketch"][1] = True
    assert task_of(pack(parts, THREE), THREE) == "infill"
