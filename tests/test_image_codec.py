"""Pictures to tokens and back with each of the autoencoders, and folders that are none."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.codecs.image import ImageCodec, patchify, unpatchify
from engine.config import ConfigError
from engine.data.coco import load_image

SIZE = 32


def autoencoder_of(kind):
    """A tiny diffusers autoencoder with random weights and a scaling that is not 1."""
    import diffusers

    torch.manual_seed(0)
    if kind == "AutoencoderTiny":
        widths, layers = (8, 8, 8), (1, 1, 1)
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=layers,
            num_decoder_blocks=layers, latent_channels=4, scaling_factor=2.0,
        )  # fmt: skip
    if kind == "AutoencoderKL":
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, sample_size=SIZE,
            scaling_factor=0.5, shift_factor=0.25,
        )  # fmt: skip
    return diffusers.AutoencoderDC(
        latent_channels=8, scaling_factor=0.5,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(0, 1, 1), decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
    )  # fmt: skip


KINDS = {
    "AutoencoderTiny": (4, 4),
    "AutoencoderKL": (2, 3),
    "AutoencoderDC": (4, 8),
}  # pixels a latent, latent channels


def latents_of(autoencoder, pixels):
    """The autoencoder's own latents, without scaling: of KL the mean."""
    out = autoencoder.encode(pixels)
    return out.latent_dist.mean if hasattr(out, "latent_dist") else out[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Autoencoder folders as diffusers writes them."""
    paths = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, path in paths.items():
        autoencoder_of(kind).save_pretrained(path)
    return paths


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the DC autoencoder's folder, to be damaged."""
    for file in folders["AutoencoderDC"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def pixels(batch=2):
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


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
    codec = ImageCodec.load(folders[kind], SIZE, patch)
    factor, channels = KINDS[kind]
    tokens = codec.encode(pixels())
    assert tokens.shape == (2, codec.tokens, codec.channels) == (2, (SIZE // factor // patch) ** 2, channels * patch**2)
    with torch.no_grad():
        latents = latents_of(autoencoder_of(kind), pixels())
    shift, scale = {"AutoencoderTiny": (0, 2.0), "AutoencoderKL": (0.25, 0.5), "AutoencoderDC": (0, 0.5)}[kind]
    torch.testing.assert_close(unpatchify(tokens, patch), (latents - shift) * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_each_autoencoder_decodes_what_it_encoded(folders, kind):
    codec = ImageCodec.load(folders[kind], SIZE, 2)
    decoded = codec.decode(codec.encode(pixels()))
    autoencoder = autoencoder_of(kind).eval()
    with torch.no_grad():
        expected = autoencoder.decode(latents_of(autoencoder, pixels())).sample.clamp(-1, 1)
    assert decoded.dtype == torch.float32 and decoded.shape == (2, 3, SIZE, SIZE)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


def test_decoded_pixels_stay_in_range(folders):
    codec = ImageCodec.load(folders["AutoencoderDC"], SIZE, 1)
    decoded = codec.decode(1e4 * torch.randn(1, codec.tokens, codec.channels))
    assert decoded.isfinite().all() and decoded.abs().max() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_codec_comes_back(folders, tmp_path, kind, dtype):
    codec = ImageCodec.load(folders[kind], SIZE, 1)
    codec.save(tmp_path / "a" / "b", dtype)
    assert {w.dtype for w in load_file(tmp_path / "a" / "b" / "diffusion_pytorch_model.safetensors").values()} == {
        dtype
    }
    again = ImageCodec.load(str(tmp_path / "a" / "b"), SIZE, 1)
    tokens, expected = again.encode(pixels()), codec.encode(pixels())
    assert (tokens - expected).norm() <= (0 if dtype == torch.float32 else 0.01) * expected.norm()
    assert not any(p.requires_grad for p in again.autoencoder.parameters())


@pytest.mark.parametrize("size, patch", [(30, 1), (36, 2), (32, 16)])
def test_sizes_that_leave_part_of_a_token_are_refused(folders, size, patch):
    with pytest.raises(ConfigError, match=rf"image.size: {size} .*multiple of {4 * patch}"):
        ImageCodec.load(folders["AutoencoderDC"], size, patch)


def refusal(folder):
    with pytest.raises(ValueError) as error:
        ImageCodec.load(folder, SIZE, 1)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("keep", [None, 0, 100, -1], ids=str)
def test_missing_and_truncated_files_are_named(folder, file, keep):
    data = (folder / file).read_bytes()
    (folder / file).unlink()
    if keep is not None:
        (folder / file).write_bytes(data.rstrip()[:keep])
    assert str(folder / file) in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"_class_name": "UNet2DModel"}', '{"_class_name": "os"}', "3"])
def test_a_config_of_something_else_is_named(folder, content):
    (folder / "config.json").write_text(content)
    message = refusal(folder)
    assert str(folder / "config.json") in message and "AutoencoderKL" in message


@pytest.mark.parametrize("damage", ["other shape", "left out", "added"])
def test_weights_of_another_autoencoder_are_named(folder, damage):
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "decoder.conv_in.weight"
    if damage == "other shape":
        weights[name] = weights[name][:1].clone()
    elif damage == "left out":
        del weights[name]
    else:
        name = "added"
        weights[name] = torch.zeros(1)
    save_file(weights, path)
    message = refusal(folder)
    assert str(folder) in message and name in message


@pytest.mark.parametrize("key", ["latent_channels", "encoder_block_out_channels"])
def test_a_config_that_builds_another_autoencoder_is_refused(folder, key):
    config = json.loads((folder / "config.json").read_text())
    config[key] = 5 if key == "latent_channels" else [8, 8, 32]
    (folder / "config.json").write_text(json.dumps(config))
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("key", ["scaling_factor", "shift_factor"])
@pytest.mark.parametrize("value", ["x", float("nan"), float("inf"), 10**400, []], ids=lambda value: str(value)[:9])
def test_scales_that_are_no_moderate_numbers_are_named(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    message = refusal(folder)
    assert str(folder / "config.json") in message and key in message and "; use a number" in message


@pytest.mark.parametrize("value", [0, -0.5])
def test_a_scale_that_leaves_nothing_of_the_latents_is_refused(folder, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": value}))
    assert f"scaling_factor {value} does not work" in refusal(folder)


def test_a_config_nested_deeper_than_python_reads_is_named(folder):
    (folder / "config.json").write_text("[" * 100_000)
    assert str(folder / "config.json") in refusal(folder)


def test_weights_of_eight_bits_are_named(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: w.to(torch.float8_e5m2) for name, w in load_file(path).items()}, path)
    assert str(path) in refusal(folder)


def test_published_weights_rebuild_a_photo(shared):
    codec = ImageCodec.load(shared / "weights" / "taesd", 256, 2)
    assert (codec.tokens, codec.channels) == (256, 16)
    photo = load_image(sorted((shared / "data" / "coco" / "images").glob("*.jpg"))[0], 256).float()[None] / 127.5 - 1
    tokens = codec.encode(photo)
    assert 0.5 < tokens.std() < 1.5
    error = (codec.decode(tokens) - photo).square().mean() / 4  # of pixels in 0..1
    assert -10 * error.log10() > 20
