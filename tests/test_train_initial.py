"""What training starts from: checkpoints, published U-ViT weights, given autoencoders, codecs of another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_cases import SHORT, refusal, train_main
from uvit_cases import published_weights

from engine import checkpoint, train
from engine.config import Modality, UViTConfig
from engine.data.latents import LatentCache
from engine.presets import PRESETS
from engine.training import denoiser, stages
from engine.training.files import CURVE
from engine.training.options import TrainOptions
from engine.training.recipes import TINY
from engine.training.stage import StageOptions

pytestmark = pytest.mark.usefixtures("short_sheets")


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train_main(images, folder) == 0
    return folder


def test_a_u_vit_is_trained_and_a_ps_u_net_starts_from_it(images, tmp_path):
    options = [*SHORT, "--data", str(images), "--out"]
    assert train.main([*options, str(tmp_path / "u-vit"), "--preset", "uvit-tiny"]) == 0
    source = checkpoint.load(tmp_path / "u-vit" / "checkpoint")
    assert source.config == PRESETS["uvit-tiny"]
    init = ["--init", str(tmp_path / "u-vit" / "checkpoint"), "--steps", "1", "--learning-rate", "1e-9"]
    assert train.main([*options, str(tmp_path / "run"), *init]) == 0
    loaded = checkpoint.load(tmp_path / "run" / "checkpoint")
    assert loaded.config == PRESETS["tiny"]
    # tiny has one block before the shared ones, so that one of the shared pairs stays as initialised
    torch.testing.assert_close(loaded.network.shared_middle[0].fc1.weight, source.network.middle.fc1.weight)


T2I = UViTConfig(timed=("image",), predicted=("image",))  # U-ViT for text-to-image, without a last convolution


def t2i_config():
    """A preset's config with the model of a published text-to-image U-ViT, whose text is of other size."""
    tiny, text = PRESETS["uvit-tiny"], Modality("text", 77, 8, depth=0)
    model = replace(tiny.model, modalities=(tiny.model.modality("image"), text), uvit=T2I)
    diffusion = replace(tiny.diffusion, time_sampling="conditional")
    return replace(tiny, model=model, diffusion=diffusion, sampling=replace(tiny.sampling, order=()))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of the published names: 64 wide, 16 image tokens of 4 channels, 77 words of 8."""
    file = tmp_path_factory.mktemp("published") / "nnet_ema.pth"
    shape = {"dim": 64, "latents": 4, "patch": 1, "tokens": 16, "words": 77, "context": 8}
    torch.save(published_weights(depth=2, conv=False, **shape), file)
    return file


@pytest.mark.parametrize("heads", [None, 2])
def test_a_u_vit_starts_from_published_weights(images, run, published, tmp_path, heads):
    given = {"autoencoder": str(run / "checkpoint" / "image"), "init": published, "init_heads": heads}
    options = TrainOptions(images, tmp_path, "uvit-tiny", **given, steps=1, learning_rate=1e-9, config=t2i_config())
    stages.train(options)
    network = checkpoint.load(tmp_path / "checkpoint").network
    assert network.config.head_dim == 64 // (heads or 1)
    torch.testing.assert_close(network.embed["text"].weight, torch.load(published)["context_embed.weight"])


def test_a_ps_u_net_starts_from_published_weights_as_far_as_they_fit(images, published, tmp_path, capsys):
    options = ["--init", str(published), "--steps", "1", "--learning-rate", "1e-9"]
    assert train_main(images, tmp_path, *options) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("init:")] == [
        "init: not copied: blocks shared_in.0, shared_out.0: the U-ViT has 3 blocks",
        "init: not copied: positions of text (6 × 8): the U-ViT has 77 × 8",
        "init: not copied: head of text (6 × 8): the U-ViT has 77 × 8 and predicts image",
    ]
    network, weights = checkpoint.load(tmp_path / "checkpoint").network, torch.load(published)
    torch.testing.assert_close(network.shared_middle[0].fc1.weight, weights["mid_block.mlp.fc1.weight"])
    torch.testing.assert_close(network.branches["image"].head.weight, weights["decoder_pred.weight"])


def test_published_weights_that_do_not_fit_are_refused_before_any_work(images, published, tmp_path, capsys):
    folder, options = tmp_path / "run", ["--data", str(images), "--out", str(tmp_path / "run")]
    for preset, message in (
        ("uvit-tiny", "text 77 × 8, depth 0; timed ('image',); predicted ('image',), where the preset has text 6 × 8"),
        ("emoji", f"--init: {published} does not fit: heads 3 does not divide the width of 64; use the preset"),
    ):
        line = refusal(capsys, *SHORT, *options, "--preset", preset, "--init", str(published))
        assert message in line and not folder.exists()


def test_a_folder_of_another_program_is_refused_by_the_files_it_has(images, tmp_path, capsys):
    for name in ("nnet.pth", "optimizer.pth", "nnet_ema.pth", "log.txt"):
        (tmp_path / name).touch()
    options = ["--data", str(images), "--out", str(tmp_path / "run"), "--init", str(tmp_path)]
    line = refusal(capsys, *SHORT, *options)
    assert "give one of its files of weights (nnet.pth, nnet_ema.pth, optimizer.pth)" in line


def test_words_that_the_initial_checkpoint_does_not_know_are_named(images, run, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    captions = tmp_path / "images" / "captions.json"
    captions.write_text(captions.read_text().replace("night", "noon"))
    options = ["--out", str(tmp_path / "new"), "--init", str(run / "checkpoint")]
    line = refusal(capsys, *SHORT, "--data", str(tmp_path / "images"), *options)
    assert "--data: 'noon' is not in the vocabulary; give" in line


def test_an_autoencoder_that_does_not_fit_is_refused(images, run, tmp_path, capsys):
    options = ["--preset", "emoji", "--autoencoder", str(run / "checkpoint" / "image")]
    line = refusal(capsys, *SHORT, "--data", str(images), "--out", str(tmp_path), *options)
    assert "--autoencoder" in line and "tokens" in line


def test_a_given_autoencoder_is_used(images, run, tmp_path):
    given = run / "checkpoint" / "image"
    assert train_main(images, tmp_path, "--autoencoder", str(given)) == 0
    name = Path("checkpoint", "image", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    weights = [(folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (run, tmp_path)]
    assert not (tmp_path / "autoencoder").exists() and weights[1] == weights[0]


def test_a_run_starts_from_a_checkpoint(images, run, tmp_path):
    source, new = run / "checkpoint", tmp_path / "new"
    assert train_main(images, new, "--init", str(source), "--learning-rate", "1e-9") == 0
    for part in ("image", "text"):
        for file in (source / part).iterdir():
            assert (new / "checkpoint" / part / file.name).read_bytes() == file.read_bytes()
    before, after = (checkpoint.load(folder).network.state_dict() for folder in (source, new / "checkpoint"))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-5, rtol=0)


def test_a_third_modality_is_added_to_a_checkpoint_and_taken_away(images, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(denoiser, "SKETCHES", 1)
    caches, train_denoiser = [], stages.train_denoiser
    monkeypatch.setattr(stages, "train_denoiser", lambda *a: caches.append(a[1]) or train_denoiser(*a))
    source, new, back = run / "checkpoint", tmp_path / "new", tmp_path / "back"
    options = ["--preset", "tiny-sketch", "--learning-rate", "1e-9", "--steps", "2", "--init"]
    assert train_main(images, new, *options, str(source)) == 0
    assert (
        "init: not copied: branch sketch: the checkpoint has none; it starts as a copy of image's\n"
        in capsys.readouterr().out
    )
    loaded = checkpoint.load(new / "checkpoint")
    codecs, preset = loaded.config.codecs, PRESETS["tiny-sketch"]
    scale = codecs["sketch"].settings["scale"]
    assert [cache.sketch_scale for cache in caches] == [scale] and scale != 1
    assert loaded.codec("sketch").latents.scale == scale * loaded.codec("image").latents.scale
    assert replace(loaded.config, codecs={**codecs, "sketch": preset.codecs["sketch"]}) == preset
    assert stages.initial_network(new / "checkpoint", preset).config == preset.model, "whatever its scale"
    assert not (new / "checkpoint" / "sketch").exists() and (new / "denoiser" / "samples-0000002.png").exists()
    rows = [json.loads(line) for line in (new / "denoiser" / CURVE).read_text().splitlines()]
    assert all(row["sketch"] > 0 for row in rows)
    before, after = (checkpoint.load(folder).network.state_dict() for folder in (source, new / "checkpoint"))
    assert len(after) > len(before)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-5, rtol=0)
    for part in ("embed.weight", "position", "head.weight"):
        theirs = after[f"branches.image.{part}"]
        torch.testing.assert_close(after[f"branches.sketch.{part}"], theirs, atol=1e-5, rtol=0)

    options[1] = "tiny"
    assert train_main(images, back, *options, str(new / "checkpoint")) == 0
    assert "init: not copied: branch sketch of the checkpoint: the model has none\n" in capsys.readouterr().out
    for name, weight in checkpoint.load(back / "checkpoint").network.state_dict().items():
        torch.testing.assert_close(weight, before[name], atol=1e-5, rtol=0)


def test_a_checkpoint_of_another_shape_is_refused_as_a_start(images, run, tmp_path, capsys):
    options = ["--preset", "emoji", "--data", str(images), "--out", str(tmp_path / "new")]
    assert train.main([*options, "--init", str(run / "checkpoint")]) == 2
    assert "--init" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_model_of_images_given_text_is_trained(images, run, tmp_path):
    config = t2i_config()
    autoencoder = str(run / "checkpoint" / "image")
    options = TrainOptions(images, tmp_path, "uvit-tiny", autoencoder, steps=1, dtype="float32", config=config)
    stages.train(options)
    assert checkpoint.load(tmp_path / "checkpoint").config == config
    assert (tmp_path / "denoiser" / "samples-0000001.png").exists()  # of prompts only


def test_the_denoiser_is_trained_alone_with_the_codecs_of_another_run(run, tmp_path):
    config, source = PRESETS["uvit-tiny"], checkpoint.load(run / "checkpoint")
    stages.copy_codecs(run / "checkpoint", tmp_path, config)
    cache = LatentCache([torch.randn(5, 1, 16, 4)], [["red car", "night"]] * 5)
    recipe = replace(TINY, denoiser=replace(TINY.denoiser, steps=3))
    how = StageOptions(torch.device("cpu"), save_every=3)
    denoiser.train_denoiser(tmp_path, cache, source.codec("text"), config, recipe, how)
    assert checkpoint.load(tmp_path / "checkpoint").config == config
    assert len((tmp_path / "denoiser" / CURVE).read_text().splitlines()) == 3
