"""`python -m engine.evaluate --samples`: what is scored of a folder of samples, with which networks."""

import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.sample_files import SampleFiles
from engine.evaluate import main
from engine.images import open_image

CAPTIONS = ["a red cat", "the blue dog runs", "a red heart", "two green trees", "a car on a road", "the old house"]
CAPTIONS = [f"{caption} {n}" for n in ("", "again", "in the sun", "at night") for caption in CAPTIONS]
NAME = "FD(built-in autoencoder)"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set whose split val has 24 images of smooth colours."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for i in range(len(CAPTIONS)):
        colours = generator.integers(0, 256, (3, 3, 3), np.uint8)
        Image.fromarray(colours).resize((32, 32), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(len(CAPTIONS))],
        "annotations": [{"image_id": i, "caption": c} for i, c in enumerate(CAPTIONS) for c in (c, f"{c} there")],
    }
    (folder / "captions_val.json").write_text(json.dumps(content))
    return folder


def samples(folder: Path, data: Path, generated=("image", "text"), shards=0, change=lambda image: image) -> Path:
    """A run whose samples are the images of the data, changed, and their first captions."""
    files = SampleFiles(folder, len(CAPTIONS), shards)
    files.begin({})

    def sample(i: int) -> dict[str, bytes]:
        facts = {"index": i, "image_id": str(i), "generated": list(generated)}
        change(open_image(data / "images" / f"{i}.png")).save(folder / ".png", "PNG")
        png = (folder / ".png").read_bytes()
        (folder / ".png").unlink()
        return {"json": json.dumps(facts).encode(), "txt": CAPTIONS[i].encode()} | (
            {"png": png} if "image" in generated else {}
        )

    if shards:
        for shard in range(shards):
            with files.shard_writer(shard) as writer:
                for i in files.shard_range(shard):
                    writer.write(i, sample(i))
    else:
        with files.writer(0) as writer:
            for i in range(files.count):
                writer.write(i, sample(i))
    return folder


@pytest.fixture
def run(capsys, data):
    def run(*arguments) -> tuple[int, str, str]:
        given = ["--data", data, "--device", "cpu", "--bootstrap", 10, *arguments]
        return main([str(argument) for argument in given]), *capsys.readouterr()

    return run


@pytest.fixture
def score(run):
    """The report of a run that succeeds."""

    def score(*arguments) -> dict:
        code, out, err = run("--json", *arguments)
        assert code == 0, err
        return json.loads(out)

    return score


@pytest.mark.parametrize("shards", [0, 2])
def test_the_data_itself_has_perfect_scores(score, data, tmp_path, shards):
    report = score("--samples", samples(tmp_path / "run", data, shards=shards))
    scores = report["scores"]
    assert scores[NAME]["value"] == pytest.approx(0, abs=1e-3)
    assert scores["BLEU-4"]["value"] == scores["BLEU-1"]["high"] == scores["ROUGE-L"]["value"] == 1
    assert scores["CIDEr"]["value"] > 5 and scores["distinct-1"]["value"] < scores["distinct-2"]["value"] < 1
    assert scores["perplexity of 3-grams"]["value"] < scores["perplexity of 3-grams, held-out references"]["value"]
    assert 0.5 < scores[f"diversity {NAME}"]["value"] <= 1
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in scores.values())
    assert report["samples"] == {"images": 24, "texts": 24} and report["reference"] == {"split": "val", "images": 24}
    assert report["bootstrap"] == {"replicates": 10, "seed": 0, "interval": 0.95}
    assert report["skipped"] == {"CLIP": "no folder given with --clip"}


def test_spoilt_images_are_further_away_and_alike_ones_less_diverse(score, data, tmp_path):
    changes = {
        "grey": lambda image: image.convert("L").convert("RGB"),
        "noise": lambda image: Image.effect_noise(image.size, 90).convert("RGB"),
        "one": lambda image: open_image(data / "images" / "0.png"),
    }
    found = {
        name: score("--samples", samples(tmp_path / name, data, ("image",), change=change))["scores"]
        for name, change in changes.items()
    }
    assert all(scores[NAME]["value"] > 1 for scores in found.values())
    assert found["one"][f"diversity {NAME}"]["value"] == 0 < found["grey"][f"diversity {NAME}"]["value"]
    assert "BLEU-4" not in found["grey"], "the texts of these are prompts"


def test_statistics_of_the_data_are_kept_by_content(score, data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = samples(tmp_path / "run", data, ("image",), change=lambda image: image.convert("L").convert("RGB"))
    first = score("--samples", folder)
    (kept,) = (tmp_path / "cache" / "psunet-engine" / "references").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("engine.data.captioned.CaptionedImages.images", lambda *_: pytest.fail("computed them again"))
        assert score("--samples", folder) == first
    kept.write_bytes(kept.read_bytes()[:-9])
    assert score("--samples", folder) == first, "a damaged file is computed again"
    Image.new("RGB", (32, 32)).save(data / "images" / "24.png")  # not listed
    image = (data / "images" / "3.png").read_bytes()
    Image.new("RGB", (32, 32)).save(data / "images" / "3.png")
    changed = score("--samples", folder)["scores"][NAME]
    (data / "images" / "3.png").write_bytes(image)
    assert changed != first["scores"][NAME] and score("--samples", folder, "--no-cache") == first


def test_features_are_a_torchscript_file_s_or_those_of_an_autoencoder(score, run, data, tmp_path, tiny_checkpoint):
    folder = samples(tmp_path / "run", data, ("image",), change=lambda image: Image.new("RGB", image.size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.script(Mean()).save(tmp_path / "mean.pt")
        torch.jit.script(torch.nn.Identity()).save(tmp_path / "identity.pt")
    scores = score("--samples", folder, "--features", tmp_path / "mean.pt")["scores"]
    pixels = np.stack([np.asarray(open_image(data / "images" / f"{i}.png")) for i in range(24)]).mean((1, 2))  # [n, 3]
    expected = (pixels.mean(0) ** 2).sum() + np.trace(np.cov(pixels.T))
    assert scores["FD(mean.pt)"]["value"] == pytest.approx(expected, rel=1e-5)
    assert score("--samples", folder, "--features", tiny_checkpoint / "image")["scores"]["FD(image)"]["value"] > 0
    (tmp_path / "text.pt").write_text("no network")
    for name, problem in (
        ("identity.pt", r"gives \(24, 3, 32, 32\) for images"),
        ("text.pt", "is not a TorchScript file"),
        ("none.pt", "does not exist"),
    ):
        code, out, err = run("--samples", folder, "--features", tmp_path / name)
        assert (code, out, err.count("\n")) == (2, "", 1) and "--features: " in err and name in err
        assert re.search(problem, err), err


class Mean(torch.nn.Module):
    """Features as NVIDIA's Inception gives them, or something else."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean((2, 3)) if return_features else torch.zeros(1)


def test_a_table_says_what_was_compared_and_what_was_skipped(run, data, tmp_path):
    folder = samples(tmp_path / "run", data, ("text",))
    code, out, _ = run("--samples", folder)
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["value", "95", "%", "interval", "count"]
    assert lines[4].split()[:2] == ["BLEU-4", "1"] and lines[4].split()[-1] == "24"
    assert lines[-3:] == [
        "against the 24 images of val and their captions",
        "images skipped: fewer than two samples have a generated image",
        "CLIP skipped: no folder given with --clip",
    ]


def test_images_of_another_program_are_scored_with_their_texts_as_prompts(score, data, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes((data / "images" / f"{i}.png").read_bytes())
    report = score("--samples", tmp_path / "images")
    assert report["samples"] == {"images": 4, "texts": 0} and report["scores"][NAME]["count"] == 4


def test_incomplete_and_damaged_samples_are_refused(run, data, tmp_path):
    def refused(folder, problem, *options):
        code, out, err = run("--samples", folder, *options)
        assert (code, out, err.count("\n")) == (2, "", 1) and problem in err, err

    folder = samples(tmp_path / "run", data)
    (folder / "000003.json").write_text("{")
    refused(folder, f"--samples: {folder}/000003.json is damaged")
    for extension in ("json", "txt", "png"):
        (folder / f"000003.{extension}").unlink()
    refused(folder, f"--samples: {folder} has 23 of 24 samples; repeat the command")
    refused(tmp_path / "none", "--samples: ")
    folder = samples(tmp_path / "sizes", data)
    Image.new("RGB", (32, 30)).save(folder / "000007.png")
    refused(folder, "000007 is of 32x30 pixels, the first is 32 wide; give square images of one size")
    (folder / "000007.png").write_bytes(b"no image")
    refused(folder, "--samples: ")
    refused(folder, "--checkpoint: ", "--checkpoint", folder)
    refused(folder, "--bootstrap: -1 is out of range", "--bootstrap", -1)
    refused(folder, "--data: ", "--split", "train")


def test_packages_and_weights_that_are_missing_are_named(run, data, tmp_path, monkeypatch):
    folder = samples(tmp_path / "run", data)
    for package in ("transformers", "torchmetrics"):
        monkeypatch.setitem(sys.modules, package, None)
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pth")
    for option, value, problem in (
        ("--clip", tmp_path, "needs transformers, which cannot be imported"),
        ("--clip", tmp_path / "none", "is not a folder"),
        ("--language-model", tmp_path, "needs transformers, which cannot be imported"),
        ("--inception", tmp_path / "weights.pth", "needs a package that cannot be imported"),
        ("--inception", tmp_path / "none.pth", "does not exist"),
        ("--inception", data / "captions_val.json", "does not hold weights"),
    ):
        code, out, err = run("--samples", folder, option, value)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert f"{option}: {value} {problem}" in err


@pytest.mark.slow
def test_fid_is_of_torchmetrics_network_with_the_weights_given(score, data, tmp_path, monkeypatch):
    """With random weights; torch-fidelity's own cannot be downloaded here."""
    pytest.importorskip("torch_fidelity")
    fid = pytest.importorskip("torchmetrics.image.fid")
    with monkeypatch.context() as patch:
        patch.setattr("torch.load", lambda *_, **__: {})
        patch.setattr("torch.nn.Module.load_state_dict", lambda *_, **__: None)
        weights = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], "none").state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    folder = samples(tmp_path / "run", data, ("image",))
    report = score("--samples", folder, "--inception", tmp_path / "weights.pth", "--bootstrap", 0)
    assert report["scores"]["FID"]["value"] == pytest.approx(0, abs=1e-3) and NAME not in report["scores"]


def words_of(folder: Path, extra: dict[str, int]) -> Path:
    """A tokenizer of letters for CLIP."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: i for i, token in enumerate([*letters, *(f"{c}</w>" for c in letters), *extra])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def test_clip_and_a_causal_model_are_read_from_folders(score, data, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 60, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = transformers.CLIPConfig(
        text_config=sizes | tokens, vision_config=sizes | {"image_size": 32, "patch_size": 16}, projection_dim=8
    )
    clip, causal = tmp_path / "clip", tmp_path / "causal"
    transformers.CLIPModel(config).save_pretrained(clip)
    words_of(clip, {"<|startoftext|>": 52, "<|endoftext|>": 53})
    tokenizer = transformers.CLIPTokenizer(str(clip / "vocab.json"), str(clip / "merges.txt"))
    image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(image_processor, tokenizer).save_pretrained(clip)
    gpt = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, **tokens)
    model = transformers.GPT2LMHeadModel(gpt)
    torch.nn.init.zeros_(model.transformer.wte.weight)  # tied: all words are equally likely
    model.save_pretrained(causal)
    tokenizer.save_pretrained(causal)
    folder = samples(tmp_path / "run", data)
    scores = score("--samples", folder, "--clip", clip, "--language-model", causal)["scores"]
    assert scores["perplexity of the language model"]["value"] == pytest.approx(60, rel=1e-4)
    assert 0 <= scores["CLIP score"]["value"] <= 100
    for direction in ("text-to-image", "image-to-text"):
        recalls = [scores[f"{direction} R@{k}"]["value"] for k in (1, 5, 10)]
        assert 0 <= recalls[0] <= recalls[1] <= recalls[2] <= 1
