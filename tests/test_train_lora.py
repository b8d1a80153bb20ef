"""`engine.train --lora`: adapters of a checkpoint, which change only what asks for them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from engine_cases import assert_same, difference
from safetensors.torch import load_file, save_file
from train_cases import captioned_images, small_sample_sheets, trained

from engine import Engine, Request, train
from engine.adapters import CONFIG, WEIGHTS, merge_adapter
from engine.checkpoint import load
from engine.training import adapter

SHORT = ["--preset", "tiny", "--steps", "2", "--save-every", "2", "--dtype", "float32"]
LORA = ["--lora", "2", "--lora-alpha", "4", "--learning-rate", "0.5"]


@pytest.fixture(scope="module", autouse=True)
def short_sheets():
    with small_sample_sheets(1):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of all weights, and one of an adapter of its checkpoint."""
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("runs")
    (root / "data").mkdir()
    data = captioned_images(root / "data")
    common = [*SHORT, "--data", str(data), "--out"]
    assert train.main([*common, str(root / "base"), "--autoencoder-steps", "1", "--learning-rate", "0.3"]) == 0
    lora = [*common, str(root / "style"), "--init", str(root / "base" / "checkpoint"), *LORA]
    assert train.main(lora) == 0
    before = load_file(root / "style" / "adapter" / WEIGHTS)
    assert train.main(lora) == 0  # again, which finds it done
    torch.testing.assert_close(load_file(root / "style" / "adapter" / WEIGHTS), before, rtol=0, atol=0)
    return root


def command(runs, out, *options) -> list[str]:
    base = str(runs / "base" / "checkpoint")
    return [*SHORT, *LORA, "--data", str(runs / "data"), "--init", base, "--out", str(out), *options]


def train_lora(runs, out, *options) -> int:
    return train.main(command(runs, out, *options))


def assert_same_adapter(run, other, **tolerance):
    found, expected = (load_file(folder / "adapter" / WEIGHTS) for folder in (run, other))
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("options", [[], ["--grad-checkpointing"]], ids=str)
def test_a_run_that_is_interrupted_ends_in_the_same_adapter(runs, tmp_path, options):
    for steps in ("1", "2"):
        assert train_lora(runs, tmp_path / "run", "--steps", steps, *options) == 0
    assert_same_adapter(tmp_path / "run", runs / "style", rtol=0, atol=0 if not options else 1e-6)


def test_two_processes_train_the_adapter_of_one(runs, tmp_path):
    pytest.importorskip("accelerate")
    assert trained(2, command(runs, tmp_path / "run"), tmp_path / "log") == [0, 0]
    assert_same_adapter(tmp_path / "run", runs / "style", rtol=1e-3, atol=1e-3)


def test_a_run_is_not_resumed_on_another_checkpoint_of_the_same_name(runs, tmp_path, capsys):
    base = shutil.copytree(runs / "base" / "checkpoint", tmp_path / "base")
    assert train_lora(runs, tmp_path / "run", "--steps", "1", "--init", str(base)) == 0
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, base / "model.safetensors")
    assert train_lora(runs, tmp_path / "run", "--init", str(base)) == 2
    assert "--out: " in capsys.readouterr().err


def test_a_trained_adapter_changes_its_requests_alone_and_equals_the_merged_checkpoint(runs, tmp_path):
    base, style = runs / "base" / "checkpoint", runs / "style"
    merge_adapter(base, style / "adapter", tmp_path / "merged")
    plain = Request(prompt="red car", steps=3)
    with Engine.from_pretrained(base, dtype="float32") as engine:
        before = engine.generate(plain)
        engine.load_adapter("style", style / "adapter")
        adapted, after = engine.generate([replace(plain, adapter="style"), plain])
    assert_same(after, before)
    assert difference(adapted.image, before.image) > 2
    for folder in (style / "checkpoint", tmp_path / "merged"):
        with Engine.from_pretrained(folder, dtype="float32") as engine:
            assert_same(engine.generate(plain), adapted)


def test_only_linear_layers_of_blocks_are_trained_and_peft_reads_them(runs, tmp_path):
    peft = pytest.importorskip("peft")
    base, style = runs / "base" / "checkpoint", runs / "style"
    before, after = (load(folder).network.state_dict() for folder in (base, style / "checkpoint"))
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"qkv", "proj", "fc1", "fc2", "skip"}
    assert all(name.endswith(".weight") for name in before if not torch.equal(before[name], after[name]))
    config = json.loads((style / "adapter" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 4, str(base))

    network = load(base).network
    model = peft.PeftModel.from_pretrained(network, style / "adapter").merge_and_unload()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, after[name], rtol=0, atol=1e-6)


def test_the_pipeline_reads_the_adapter(runs):
    from engine.pipeline import PSUNetPipeline

    images = []
    for folder in ("base", "style"):
        pipe = PSUNetPipeline.from_pretrained(runs / folder / "checkpoint")
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe("red car", num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images[0])
        if folder == "base":
            pipe.load_lora_weights(runs / "style" / "adapter", adapter_name="style")
            images.append(pipe("red car", num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images[0])
    plain, loaded, merged = images
    assert difference(loaded, merged) <= 1 < difference(loaded, plain)


def test_training_without_peft_is_refused_in_one_line(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(adapter, "find_spec", lambda _: None)
    captioned_images(tmp_path)
    options = [*SHORT, *LORA, "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--init", str(tiny_checkpoint)]
    assert train.main(options) == 2
    line = capsys.readouterr().err
    assert "peft, which makes the adapters, is not installed; use pip install 'psunet-engine[lora]'" in line
    assert line.count("\n") == 1 and not (tmp_path / "run").exists()
