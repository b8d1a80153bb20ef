"""Saved autoencoders: damaged folders, configs that cannot be, and building the network when it is first needed."""

import importlib.util
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from autoencoder_cases import load, save_autoencoders
from safetensors.torch import load_file, save_file

from engine.codecs import diffusers_import
from engine.codecs.autoencoder import AUTOENCODERS, LatentSpace, SavedAutoencoder, autoencoder_class
from engine.codecs.diffusers_import import _not_found, _refused
from engine.errors import InputError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_autoencoders(tmp_path_factory)


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the DC autoencoder's folder, to be damaged."""
    for file in folders["AutoencoderDC"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refusal(folder):
    """Why a folder's codec is not loaded, or not built."""
    with pytest.raises(InputError) as error:
        load(folder).build()
    assert error.value.argument == "checkpoint" and "\n" not in str(error.value)
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
def test_scales_that_are_not_moderate_numbers_are_named(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    message = refusal(folder)
    assert str(folder / "config.json") in message and key in message and "; use a number" in message


@pytest.mark.parametrize("value", [0, -0.5])
def test_a_scale_that_leaves_nothing_of_the_latents_is_refused(folder, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": value}))
    assert f"scaling_factor {value}, which cannot be used" in refusal(folder)


def test_a_config_nested_deeper_than_python_reads_is_named(folder):
    (folder / "config.json").write_text("[" * 100_000)
    assert str(folder / "config.json") in refusal(folder)


def test_weights_of_eight_bits_are_named(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: w.to(torch.float8_e5m2) for name, w in load_file(path).items()}, path)
    assert str(path) in refusal(folder)


@pytest.mark.parametrize(
    "key, value",
    [
        ("latent_channels", 0),
        ("latent_channels", 10**12),
        ("latent_channels", "8"),
        ("latent_channels", None),
        ("encoder_block_out_channels", []),
        ("encoder_block_out_channels", 8),
        ("encoder_block_out_channels", [8] * 1000),
    ],
    ids=lambda value: str(value)[:9],
)
def test_a_config_that_no_tokens_can_be_counted_from_is_named(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError) as error:
        SavedAutoencoder.open(folder)
    assert str(folder / "config.json") in str(error.value) and key in str(error.value)


MONSTERS = [
    ("AutoencoderKL", "layers_per_block", 10**6),
    ("AutoencoderKL", "layers_per_block", 251),  # 2 levels, both sides
    ("AutoencoderKL", "block_out_channels", [8, 10**9]),
    ("AutoencoderKL", "norm_num_groups", 10**9),
    ("AutoencoderTiny", "num_encoder_blocks", [1, 1, 10**6]),
    ("AutoencoderTiny", "num_decoder_blocks", [400, 400, 400]),
    ("AutoencoderTiny", "decoder_block_out_channels", [8, 8, 10**6]),
    ("AutoencoderTiny", "upsampling_scaling_factor", 1000),
    ("AutoencoderDC", "encoder_layers_per_block", [10**6, 1, 1]),
    ("AutoencoderDC", "decoder_layers_per_block", [0, 1, -(10**6)]),
    ("AutoencoderDC", "decoder_block_out_channels", [8, 8, 16, 16]),
    ("AutoencoderDC", "encoder_qkv_multiscales", [[], [], [10**6]]),
    ("AutoencoderDC", "decoder_qkv_multiscales", [[], [], [3] * 1000]),
    ("AutoencoderDC", "attention_head_dim", 10**9),
    ("AutoencoderDC", "in_channels", 10**9),
]


@pytest.mark.parametrize("kind, key, value", MONSTERS)
def test_a_config_that_describes_a_monster_is_refused_unbuilt(folders, tmp_path, kind, key, value):
    config = json.loads((folders[kind] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=f"config.json has {key} ") as error:
        SavedAutoencoder.open(tmp_path)
    assert error.value.argument == "checkpoint"


VIT = {"encoder_block_types": "EfficientViTBlock"}


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("AutoencoderKL", {"block_out_channels": [65_536, 65_536]}),
        ("AutoencoderTiny", {"encoder_block_out_channels": [65_536] * 3}),
        ("AutoencoderDC", {"encoder_qkv_multiscales": [[], [65_535], []], "attention_head_dim": 4} | VIT),
    ],
)
def test_no_memory_is_taken_before_the_weights_are_known_to_fit(folders, tmp_path, kind, changes):
    """Within the bounds of each number, but of hundreds of gigabytes."""
    for file in folders[kind].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match="has weights that do not fit its config.json: (de|en)coder"):
        SavedAutoencoder.open(tmp_path).build()


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_what_a_config_leaves_out_is_as_diffusers_has_it(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    with torch.device("meta"):
        autoencoder = autoencoder_class(kind)()
    assert SavedAutoencoder.open(tmp_path).latents == LatentSpace.of(autoencoder.config, kind)


def test_loading_neither_imports_diffusers_nor_reads_weights(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    code = f"""
import sys
from engine.codecs.image import ImageCodec
from engine.config import Modality
codec = ImageCodec.load({str(folder)!r}, {{"size": 32, "patch": 1}}, Modality("image", 64, 8, 0))
codec.read(None, "image"), codec.null(), codec.tokens
sys.exit("diffusers" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


BROKEN = {
    "accelerate": "raise RuntimeError('operator does not exist')",
    "bitsandbytes": "raise OSError('libcuda.so')",
    "peft": "[].absent",
    "torchvision": "raise ImportError('libjpeg.so')",
    "transformers": "",  # imports, but lacks what diffusers takes from it
}


def test_broken_packages_that_an_autoencoder_does_not_need_do_not_matter(tmp_path):
    for name, line in BROKEN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(line)
        info = tmp_path / f"{name}-5.0.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 5.0.0\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from engine.codecs.autoencoder import autoencoder_class
from engine.codecs.diffusers_import import UNUSED
import torch
with torch.device("meta"):
    autoencoder_class("AutoencoderDC")()
assert None not in [sys.modules.get(name, 1) for name in UNUSED]
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(("main", "found"), [("engine.sample", False), ("program", True)])
def test_only_commands_of_the_engine_import_diffusers_without_what_is_optional(main, found):
    code = f"""
from importlib.machinery import ModuleSpec
__spec__ = ModuleSpec({main!r}, None)  # as `python -m` does
from engine.codecs.autoencoder import autoencoder_class
autoencoder_class("AutoencoderTiny")
from diffusers.utils import is_scipy_available
assert is_scipy_available() == {found}
import sys, torch
for name in ("peft", "scipy", "torch._dynamo", "transformers"):
    assert {found} or name not in sys.modules, name
torch.compiler.disable(print)
assert "torch._dynamo" in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_other_threads_find_everything_while_a_command_imports_diffusers(tmp_path, monkeypatch):
    with _not_found(["scipy"]):
        assert importlib.util.find_spec("scipy") is None and importlib.util.find_spec("numpy") is not None
        importlib.import_module("scipy.ndimage")
    (tmp_path / "large_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    disable = torch.compiler.disable
    with ThreadPoolExecutor(1) as other, _refused(["large_module", "torch._dynamo"]):
        with pytest.raises(ImportError, match="large_module is left out"):
            importlib.import_module("large_module")
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
        assert torch.compiler.disable(print) is print and torch.compiler.disable(recursive=False)(print) is print
        other.submit(importlib.import_module, "large_module").result()
    assert torch.compiler.disable is disable
    importlib.import_module("large_module")


def test_commands_that_import_diffusers_in_several_threads_leave_nothing_behind(monkeypatch):
    entered = threading.Barrier(2)

    def imported(names):
        with suppress(threading.BrokenBarrierError):
            number = entered.wait(0.3)
            time.sleep(0.1 * number)

    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.setattr(diffusers_import, "_import_diffusers", imported)
    monkeypatch.setattr(diffusers_import, "_is_command", lambda: True)
    before = importlib.util.find_spec, torch.compiler.disable, [*sys.meta_path]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(diffusers_import.import_diffusers, ("A", "B")))
    assert (importlib.util.find_spec, torch.compiler.disable, [*sys.meta_path]) == before


def test_a_program_may_have_imported_diffusers_before():
    """It has then found xformers, which its models import with their first class."""
    code = (
        "import diffusers; from engine.codecs.autoencoder import autoencoder_class; autoencoder_class('AutoencoderDC')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_threads_that_need_the_autoencoder_at_once_build_it_once(folders, monkeypatch):
    codec, builds, barrier = load(folders["AutoencoderDC"]), [], threading.Barrier(4)
    build = SavedAutoencoder.build

    def counted(saved):
        builds.append(saved)
        return build(saved)

    def autoencoder():
        barrier.wait()
        return codec.autoencoder

    monkeypatch.setattr(SavedAutoencoder, "build", counted)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(autoencoder) for _ in range(4)]
    assert len({id(future.result()) for future in futures}) == len(builds) == 1


def test_an_autoencoder_that_is_built_in_inference_mode_can_be_saved_and_moved(folders, tmp_path):
    codec = load(folders["AutoencoderDC"])
    with torch.inference_mode():
        codec.build()
    codec.save(tmp_path / "again")
    assert not any(p.is_inference() for p in codec.autoencoder.parameters())


def test_a_failed_build_is_reported_every_time(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    codec = load(folder)
    for _ in range(2):
        with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors does not exist"):
            codec.build()
