import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engine.config import Modality, ModelConfig
from engine.masks import (
    feather,
    image_elements,
    laid_into,
    pack,
    painted_over,
    task_of,
    text_elements,
    token_mask,
    whole_tokens,
)

MODEL = ModelConfig((Modality("image", 4, 8, depth=0), Modality("text", 3, 2, depth=0)), shared_depth=1, dim=64)


def mask_of(image, text):
    return pack({"image": image, "text": text}, MODEL)


ALL, NONE = torch.ones(4, 8, dtype=torch.bool), torch.zeros(4, 8, dtype=torch.bool)


def test_one_masked_pixel_regenerates_its_latent_and_no_other():
    pixels = np.zeros((16, 8), bool)
    pixels[9, 3] = True  # latent (4, 1) of 8 × 4, so patch (2, 0), row 0, column 1 in it
    elements = image_elements(pixels, factor=2, patch=2, channels=3)
    assert elements.shape == (8, 12)
    expected = torch.zeros(4, 2, 2, 2, 3, dtype=torch.bool)  # patch row, patch column, row, column, channel
    expected[2, 0, 0, 1] = True
    assert torch.equal(elements, expected.reshape(8, 12))


@given(arrays(bool, (16, 32)), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_every_masked_pixel_lies_in_a_generated_latent_and_every_generated_latent_holds_one(pixels, factor, patch):
    elements = image_elements(pixels, factor, patch, channels=2)
    h, w = 16 // (factor * patch), 32 // (factor * patch)
    cells = elements.reshape(h, w, patch, patch, 2)[..., 0].permute(0, 2, 1, 3).reshape(h * patch, w * patch).numpy()
    covered = cells.repeat(factor, 0).repeat(factor, 1)
    assert covered[pixels].all()
    for y, x in np.argwhere(cells):
        assert pixels[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].any()


def test_holes_of_words_become_whole_word_vectors():
    elements = text_elements(torch.tensor([False, True, False]), 2)
    assert elements.tolist() == [[False, False], [True, True], [False, False]]


def test_packed_mask_lies_as_the_packed_state_does():
    mask = mask_of(NONE, text_elements(torch.tensor([True, False, False]), 2))
    assert mask.nonzero().flatten().tolist() == [32, 33]


def test_a_partly_generated_token_is_widened_to_a_whole_one():
    image = NONE.clone()
    image[2, 5] = True
    mask = mask_of(image, text_elements(torch.tensor([False, False, True]), 2))
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
    assert task_of(mask_of(image, text_elements(torch.tensor(text), 2)), MODEL) == task


def test_task_of_one_modality_is_joint_or_infill():
    alone = ModelConfig((Modality("sound", 4, 1, depth=0),), shared_depth=1, dim=64)
    assert task_of(torch.ones(4, dtype=torch.bool), alone) == "joint"
    assert task_of(torch.tensor([True, False, True, True]), alone) == "infill"


def test_task_between_two_of_three_modalities_is_infill():
    names = ("image", "text", "sound")
    three = ModelConfig(tuple(Modality(name, 1, 2, depth=0) for name in names), shared_depth=1, dim=64)
    assert task_of(torch.tensor([True, True, False, False, True, False]), three) == "infill"


@given(arrays(bool, (9, 7)), st.integers(0, 4))
def test_feather_is_zero_on_known_pixels_and_never_reaches_out_of_the_generated_side(pixels, radius):
    weights = feather(pixels, radius)
    assert (weights[~pixels] == 0).all()
    assert (weights[pixels] > 0).all() and (weights <= 1).all()
    for (y, x), weight in np.ndenumerate(weights):
        near = pixels[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        assert (weight == 1) == (near.all() and pixels[y, x])


def test_feather_rises_linearly_from_a_straight_edge():
    pixels = np.zeros((4, 8), bool)
    pixels[:, 3:] = True
    np.testing.assert_allclose(feather(pixels, 3)[1], [0, 0, 0, 0.25, 0.5, 0.75, 1, 1])


def test_feather_of_a_wholly_generated_picture_is_one_everywhere():
    assert (feather(np.ones((5, 5), bool), 3) == 1).all()


HOLES = arrays(bool, (9, 7)).filter(lambda mask: mask.any() and not mask.all())


def random_picture(seed, *count):
    return torch.rand(*count, 3, 9, 7, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@given(HOLES, st.integers(0, 3))
def test_known_pixels_come_back_and_nothing_under_the_mask_shows(mask, radius):
    given_picture, generated = random_picture(0), random_picture(1, 2)
    other = torch.where(torch.from_numpy(mask), random_picture(2), given_picture)
    result = laid_into(given_picture, generated, mask, radius)
    assert torch.equal(result[:, :, ~mask], given_picture[:, ~mask].expand(2, -1, -1))
    assert torch.equal(result, laid_into(other, generated, mask, radius))
    far = torch.from_numpy(feather(mask, radius) == 1)
    assert torch.equal(result[:, :, far], generated[:, :, far])


def test_a_seam_fades_out_inside_the_hole():
    mask = np.zeros((4, 8), bool)
    mask[:, 3:] = True
    result = laid_into(torch.full((3, 4, 8), 0.4), torch.zeros(1, 3, 4, 8), mask, 2)
    expected = torch.tensor([0.4, 0.4, 0.4, 0.4 * 2 / 3, 0.4 / 3, 0, 0, 0])
    torch.testing.assert_close(result, expected.expand(1, 3, 4, 8))


@given(HOLES)
def test_a_hole_is_painted_like_the_nearest_known_pixels(mask):
    given_picture = random_picture(0)
    painted = painted_over(given_picture, mask)
    assert torch.equal(painted[:, ~mask], given_picture[:, ~mask])
    known = np.argwhere(~mask)
    for y, x in np.argwhere(mask):
        distance = ((known - (y, x)) ** 2).sum(1)
        nearest = known[distance == distance.min()]
        assert any(torch.equal(painted[:, y, x], given_picture[:, i, j]) for i, j in nearest)


def test_a_picture_without_known_pixels_is_painted_grey():
    assert not painted_over(random_picture(0), np.ones((9, 7), bool)).any()
