"""Images to tokens and back with each of the autoencoders, and what is known of a masked image."""

import copy
import pickle

import numpy as np
import pytest
import torch
from autoencoder_cases import KINDS, SIZE, autoencoder_of, latents_of, load, save_autoencoders, some_pixels
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from image_cases import load_image
from PIL import Image
from safetensors.torch import load_file

from engine.codecs.image import ImageCodec, image_elements, patchify, unpatchify
from engine.config import Modality
from engine.errors import InputError
from engine.images import composite, fill_masked, fit_image, to_image


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_autoencoders(tmp_path_factory)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_unpatchify_undoes_patchify(patch):
    latents = torch.randn(2, 5, 6, 6)
    tokens = patchify(latents, patch)
    assert tokens.shape == (2, (6 // patch) ** 2, 5 * patch**2)
    assert torch.equal(unpatchify(tokens, patch), latents)


def test_a_token_holds_its_square_by_row_column_and_channel():
    latents = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)  # [1, c, h, w]: 24·c + 6·y + x
    tokens = patchify(latents, 2)
    assert tokens.shape == (1, 6, 8)
    # The sixth square: rows 2 and 3, columns 4 and 5.
    assert tokens[0, 5].tolist() == [16, 40, 17, 41, 22, 46, 23, 47]
    assert tokens[0, 1, 0] == 2 and tokens[0, 3, 0] == 12  # squares go by rows


def test_tokens_of_no_square_grid_are_refused():
    with pytest.raises(AssertionError, match="square"):
        unpatchify(torch.zeros(1, 6, 4), 2)
    with pytest.raises(AssertionError, match="patch 2"):
        unpatchify(torch.zeros(1, 9, 6), 2)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_each_autoencoder_gives_scaled_latents_as_tokens(folders, kind, patch):
    codec = load(folders[kind], patch=patch)
    factor, channels = KINDS[kind]
    tokens = codec.encode_pixels(some_pixels())
    assert tokens.shape == (2, codec.tokens, codec.channels) == (2, (SIZE // factor // patch) ** 2, channels * patch**2)
    with torch.no_grad():
        latents = latents_of(autoencoder_of(kind), some_pixels())
    shift, scale = {"AutoencoderTiny": (0, 2.0), "AutoencoderKL": (0.25, 0.5), "AutoencoderDC": (0, 0.5)}[kind]
    torch.testing.assert_close(unpatchify(tokens, patch), (latents - shift) * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_each_autoencoder_decodes_what_it_encoded(folders, kind):
    codec = load(folders[kind], patch=2)
    decoded = codec.decode_pixels(codec.encode_pixels(some_pixels()))
    autoencoder = autoencoder_of(kind).eval()
    with torch.no_grad():
        expected = autoencoder.decode(latents_of(autoencoder, some_pixels())).sample.clamp(-1, 1)
    assert decoded.dtype == torch.float32 and decoded.shape == (2, 3, SIZE, SIZE)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_of_a_saved_autoencoder_use_packed_weights_and_leave_it_as_it_is(folders, kind, monkeypatch):
    codec = load(folders[kind])
    before = {name: weight.clone() for name, weight in codec.autoencoder.state_dict().items()}
    tokens = codec.encode_pixels(some_pixels())
    monkeypatch.setattr(torch.nn.Conv2d, "forward", None)
    assert torch.equal(codec.encode_pixels(some_pixels()), tokens)
    pixels = codec.decode_pixels(tokens)
    monkeypatch.undo()
    after = codec.autoencoder.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(weight, before[name]) for name, weight in after.items())
    with torch.no_grad():
        expected = autoencoder_of(kind).eval().decode(latents_of(codec.autoencoder, some_pixels())).sample.clamp(-1, 1)
    torch.testing.assert_close(pixels, expected, rtol=1e-4, atol=1e-5)


def test_packed_weights_follow_the_autoencoder_and_are_not_copied_with_it(folders):
    codec = load(folders["AutoencoderDC"])
    tokens = codec.encode_pixels(some_pixels())
    again = ImageCodec(pickle.loads(pickle.dumps(copy.deepcopy(codec.autoencoder))), SIZE, 1)
    torch.testing.assert_close(again.encode_pixels(some_pixels()), tokens)
    codec.autoencoder.double()
    torch.testing.assert_close(codec.encode_pixels(some_pixels()), tokens)
    codec.autoencoder.float().load_state_dict(
        {k: torch.zeros_like(w) for k, w in again.autoencoder.state_dict().items()}
    )
    assert not codec.encode_pixels(some_pixels()).any()
    with torch.enable_grad():
        pixels = some_pixels().requires_grad_()
        again.autoencoder.encode(pixels).latent.sum().backward()
    assert pixels.grad.any()


def test_decoded_pixels_stay_in_range(folders):
    codec = load(folders["AutoencoderDC"])
    decoded = codec.decode_pixels(1e4 * torch.randn(1, codec.tokens, codec.channels))
    assert decoded.isfinite().all() and decoded.abs().max() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_codec_comes_back(folders, tmp_path, kind, dtype):
    codec = load(folders[kind])
    codec.save(tmp_path / "a" / "b", dtype)
    assert {w.dtype for w in load_file(tmp_path / "a" / "b" / "diffusion_pytorch_model.safetensors").values()} == {
        dtype
    }
    again = load(str(tmp_path / "a" / "b"))
    tokens, expected = again.encode_pixels(some_pixels()), codec.encode_pixels(some_pixels())
    assert (tokens - expected).norm() <= (0 if dtype == torch.float32 else 0.01) * expected.norm()
    assert not any(p.requires_grad for p in again.autoencoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_is_of_the_latents_and_not_of_the_pixels(folders, kind):
    plain, scaled = load(folders[kind]), load(folders[kind], scale=0.75)
    tokens = plain.encode_pixels(some_pixels())
    torch.testing.assert_close(scaled.encode_pixels(some_pixels()), 0.75 * tokens)
    torch.testing.assert_close(scaled.decode_pixels(0.75 * tokens), plain.decode_pixels(tokens))


@pytest.mark.parametrize("size, patch", [(30, 1), (36, 2), (32, 16)])
def test_sizes_that_leave_part_of_a_token_are_refused(folders, size, patch):
    with pytest.raises(InputError, match=rf"^codecs.sketch.size: {size} .*multiple of {4 * patch}"):
        load(folders["AutoencoderDC"], size, patch)
    with pytest.raises(InputError, match=rf"^size: {size} .*multiple of {4 * patch}"):
        ImageCodec(autoencoder_of("AutoencoderDC"), size, patch)


@pytest.mark.parametrize(
    "settings, argument",
    [
        ({"size": 7}, "codecs.sketch.size"),
        ({"size": 10**12}, "codecs.sketch.size"),
        ({"size": 32.0}, "codecs.sketch.size"),
        ({"size": True}, "codecs.sketch.size"),
        ({"size": "32"}, "codecs.sketch.size"),
        ({"size": None}, "codecs.sketch.size"),
        ({"patch": 0}, "codecs.sketch.patch"),
        ({"patch": 33}, "codecs.sketch.patch"),
        ({"patch": None}, "codecs.sketch.patch"),
        ({"scale": 0}, "codecs.sketch.scale"),
        ({"scale": float("nan")}, "codecs.sketch.scale"),
        ({"scale": True}, "codecs.sketch.scale"),
        ({"scale": "1"}, "codecs.sketch.scale"),
        ({"colour": 1}, "codecs.sketch"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used_are_named(folders, settings, argument):
    with pytest.raises(InputError) as error:
        load(folders["AutoencoderDC"], **settings)
    assert error.value.argument == argument and "; use " in str(error.value)


def test_tokens_and_channels_other_than_the_modalitys_are_refused(folders):
    folder = folders["AutoencoderDC"]
    for modality in (Modality("image", 16, 8, depth=0), Modality("image", 64, 4, depth=0)):
        with pytest.raises(InputError) as error:
            ImageCodec.load(folder, {"size": SIZE, "patch": 1}, modality)
        expected = f"64 tokens of 8 channels from images of 32 pixels, the model takes {modality.tokens} of "
        assert str(folder) in str(error.value) and expected in str(error.value)


@pytest.fixture(scope="module")
def codec(folders):
    return load(folders["AutoencoderKL"], patch=2)


def photo(seed, size=(SIZE, SIZE)):
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


def left(size=(SIZE, SIZE), columns=10):
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, columns, size[1]))
    return mask


def noise(codec, batch):
    return torch.randn(batch, codec.tokens, codec.channels, generator=torch.Generator().manual_seed(7))


def test_a_known_image_is_encoded_whole_and_comes_back_undecoded(codec, monkeypatch):
    known = codec.read(photo(1), "image")
    assert not known.generate.any()
    pixels = fit_image(photo(1), SIZE)[None].float() / 127.5 - 1
    torch.testing.assert_close(codec.encode([known]), codec.encode_pixels(pixels))
    monkeypatch.setattr(codec, "decode_pixels", None)
    decoded = codec.decode(noise(codec, 2), [known, known])
    assert [np.array_equal(one.value, photo(1)) for one in decoded] == [True, True]
    assert (decoded[0].confidence, decoded[0].part_confidence) == (1.0, ())


def test_no_image_is_generated_whole(codec, monkeypatch):
    none = codec.read(None, "image")
    assert none.generate.shape == (codec.tokens, codec.channels) and none.generate.all()
    tokens = noise(codec, 2)
    for one, pixels in zip(codec.decode(tokens, [none, none]), codec.decode_pixels(tokens), strict=True):
        assert np.array_equal(one.value, to_image(pixels))
    monkeypatch.setattr(codec, "encode_pixels", None)
    assert not codec.encode([none]).any()


def test_a_masked_image_is_encoded_without_what_lies_under_the_mask(codec):
    other = Image.composite(photo(2), photo(1), left())
    one, two = (codec.read(image, "image", left()) for image in (photo(1), other))
    assert torch.equal(codec.encode([one]), codec.encode([two]))
    mask = np.array(left()) > 0
    filled = fill_masked(fit_image(photo(1), SIZE).float() / 127.5 - 1, mask)
    generate = image_elements(mask, codec.factor, codec.patch, codec.latent_channels)
    assert torch.equal(one.generate, generate) and generate.any() and not generate.all()
    torch.testing.assert_close(codec.encode([one])[0], codec.encode_pixels(filled[None])[0].masked_fill(generate, 0))


def test_a_wholly_masked_image_is_generated_whole(codec):
    given = codec.read(photo(1), "image", left(columns=SIZE), feather=2)
    assert given.generate.all() and not codec.encode([given]).any()
    tokens = noise(codec, 1)
    assert np.array_equal(codec.decode(tokens, [given])[0].value, to_image(codec.decode_pixels(tokens)[0]))


@pytest.mark.parametrize("feather", [0, 2])
def test_decoded_pixels_are_composited_into_the_known_ones(codec, feather):
    given, tokens = codec.read(photo(1), "image", left(), feather=feather), noise(codec, 2)
    mask = np.array(left()) > 0
    expected = composite(fit_image(photo(1), SIZE).float() / 127.5 - 1, codec.decode_pixels(tokens), mask, feather)
    for one, pixels in zip(codec.decode(tokens, [given, given]), expected, strict=True):
        assert np.array_equal(one.value, to_image(pixels))
        assert np.array_equal(np.array(one.value)[~mask], np.array(photo(1))[~mask])


def test_what_is_decoded_together_is_as_if_alone(codec):
    given = [
        codec.read(None, "image"),
        codec.read(photo(1), "image", left(), feather=2),
        codec.read(photo(2), "image"),
        codec.read(photo(3), "image", left(columns=20)),
    ]
    given, tokens = [*given, given[1], given[0]], noise(codec, 6)
    for i, one in enumerate(codec.decode(tokens, given)):
        alone = codec.decode(tokens[i : i + 1], given[i : i + 1])[0].value
        assert np.abs(np.array(one.value).astype(int) - alone).max() <= 1
    together = codec.encode(given)
    for i, one in enumerate(given):
        torch.testing.assert_close(together[i : i + 1], codec.encode([one]))


def test_nothing_is_encoded_of_nothing(codec):
    assert codec.encode([]).shape == (0, codec.tokens, codec.channels)
    assert codec.decode(noise(codec, 0), []) == []


def test_null_is_a_mid_grey_image_that_is_known(codec):
    null = codec.null()
    assert not null.generate.any()
    grey = codec.encode_pixels(torch.zeros(1, 3, SIZE, SIZE))
    torch.testing.assert_close(codec.encode([null]), grey)


def test_images_and_masks_of_other_sizes_are_cropped_alike(codec):
    given = codec.read(photo(1, (90, 50)), "image", left((90, 50), 45))
    generated = given.content.mask.sum(1)  # the half, and the pixels that Lanczos makes from both sides
    assert given.content.mask[:, : SIZE // 2].all() and (generated == SIZE // 2 + 3).all()


@pytest.mark.parametrize(
    "value, mask, argument",
    [
        ("absent.png", None, "inputs.sketch"),
        (7, None, "inputs.sketch"),
        (photo(1), "absent.png", "masks.sketch"),
        (photo(1), left((16, 16)), "masks.sketch"),
        (None, left(), "masks.sketch"),
    ],
    ids=["no file", "no image", "no mask", "another size", "a mask alone"],
)
def test_errors_name_the_argument_they_are_about(codec, value, mask, argument):
    with pytest.raises(InputError) as error:
        codec.read(value, "inputs.sketch", mask, mask_argument="masks.sketch")
    assert error.value.argument == argument


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


def test_published_weights_rebuild_a_photo(shared):
    codec = load(shared / "weights" / "taesd", 256, 2)
    assert (codec.tokens, codec.channels) == (256, 16)
    photo = load_image(sorted((shared / "data" / "coco" / "images").glob("*.jpg"))[0], 256).float()[None] / 127.5 - 1
    tokens = codec.encode_pixels(photo)
    assert 0.5 < tokens.std() < 1.5
    error = (codec.decode_pixels(tokens) - photo).square().mean() / 4  # of pixels in 0..1
    assert -10 * error.log10() > 20
