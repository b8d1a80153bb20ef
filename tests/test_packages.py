"""Packages: what they compute, which are used, and what happens to those that are damaged, of others, or too many.

One real build for the whole file; elsewhere its files stand in for what a compiler makes. Blocks are compiled into
packages in all of these, as on CPUs that cannot run the library of `engine.kernels.block`, which test_block.py tests.
"""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapter_cases import write_adapter
from engine_cases import assert_same, mixed_requests

from engine import Engine, Request, compiled, packages
from engine.checkpoint import load
from engine.codecs import image
from engine.errors import InputError
from engine.files import load_tensors, save_tensors
from engine.kernels import block as native_block
from engine.kernels.linear import onednn_computes
from engine.model.blocks import Block, InnerCache
from engine.sampling import graphs
from engine.training.stages import _given_autoencoder

PACKAGES = ["block-64", "decoder", "skip-block-64"]
ROWS = [1, 2, 31, 32, 33]


@pytest.fixture(autouse=True)
def _packages(monkeypatch):
    monkeypatch.setattr(native_block, "computes", lambda dtype, sizes: False)


@pytest.fixture
def cached(cached) -> Path:
    """The folder without the library."""
    for library in cached.glob("blocks-*"):
        library.unlink()
    return cached


class Builds:
    """Stands in for `packages.compile_package`: copies files that were built from the same, and counts."""

    def __init__(self, folder: Path):
        self.folder, self.files = folder, []

    def __call__(self, source: packages.Source, path: Path) -> None:
        self.files.append(source.file)
        shutil.copy(self.folder / source.file, path)


@pytest.fixture
def builds(built, monkeypatch) -> Builds:
    """Counts what is compiled from now on; nothing really is."""
    builds = Builds(built[0] / "psunet-engine" / "packages")
    monkeypatch.setattr(packages, "compile_package", builds)
    return builds


@pytest.fixture
def network(tiny_checkpoint):
    return load(tiny_checkpoint).network


def inputs_of(network, rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, network.config.size, generator=generator)
    index = torch.randint(0, 1001, (rows, network.config.tokens), generator=generator, dtype=torch.int32)
    return x, network.time_table(torch.arange(1001)), index


def forwards(network, rows: int) -> list[torch.Tensor]:
    """Predictions of every kind of step."""
    x, table, index = inputs_of(network, rows)
    features = {"text": network.branch_features("text", x, table, index)}
    cache, refresh = network.new_cache(rows), torch.ones(rows, dtype=torch.bool)
    steps = [
        {}, {"outputs": ("image",)}, {"outputs": ("image",), "features": features},
        {"inner": InnerCache(cache, refresh)}, {"inner": InnerCache(cache, None)},
    ]  # fmt: skip
    return [*features.values(), *(network(x, table, index, **step) for step in steps)]


@pytest.mark.slow  # the first one builds the packages of this file
@torch.inference_mode()
@pytest.mark.parametrize("rows", ROWS)
def test_every_kind_of_step_is_the_eager_one_at_any_number_of_rows(cached, network, rows):
    expected = forwards(network, rows)
    assert graphs.use_packages(network)
    for found, eager in zip(forwards(network, rows), expected, strict=True):
        torch.testing.assert_close(found, eager, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_blocks_without_a_package_compute_the_same_with_weights_in_onednns_layout(network, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if not onednn_computes(torch.float32):
        pytest.skip("PyTorch has no oneDNN here")
    expected = forwards(network, 3)
    graphs.set_up(network, torch.device("cpu"))
    assert not any("forward" in block.__dict__ for block in network.blocks()), "there are no packages"
    for block in network.blocks():
        for layer in filter(None, (block.skip, block.qkv, block.proj, block.fc1, block.fc2)):
            layer.weight.zero_()  # not read any more
    for found, eager in zip(forwards(network, 3), expected, strict=True):
        torch.testing.assert_close(found, eager, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_block_whose_sums_are_fused_with_products_computes_the_same(built, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    block = Block(16, 8, 4, skip=True, norm="post")
    inputs = torch.randn(5, 3, 16), torch.randn(5, 3, 16), torch.zeros(1, 16), torch.zeros(5, 3, dtype=torch.int32)
    expected = block(*inputs)
    network = SimpleNamespace(blocks=lambda: [block], time_table=lambda times: torch.zeros(len(times), 16))
    assert graphs.use_packages(network, build=True)
    torch.testing.assert_close(block(*inputs), expected, atol=1e-5, rtol=1e-5)


class Products(torch.nn.Module):
    def forward(self, x, once, twice):
        h = F.linear(x, once)
        return F.linear(F.gelu(h, approximate="tanh"), twice) + F.gelu(h).sum() * twice.sum()


def test_only_weights_that_nothing_but_products_read_take_onednns_layout():
    if not onednn_computes(torch.float32):
        pytest.skip("PyTorch has no oneDNN here")
    example = torch.randn(3, 4), torch.randn(5, 4), torch.randn(6, 5)
    exported = torch.export.export(Products(), example)
    assert packages.use_onednn(exported.graph) == {"once"}
    torch.testing.assert_close(exported.module()(*example), Products()(*example))


@torch.inference_mode()
def test_no_call_takes_more_rows_than_other_threads_can_wait_for(cached, network, monkeypatch):
    calls, bind = [], packages.Package.bind

    def counted(self, weights):
        forward = bind(self, weights)
        return lambda *inputs: calls.append(len(inputs[0]) * inputs[0].shape[1]) or forward(*inputs)

    monkeypatch.setattr(packages.Package, "bind", counted)
    monkeypatch.setattr(graphs, "PART", 2 * 22 * network.config.dim)  # 2 rows of the shared stack
    expected = forwards(network, 5)
    graphs.use_packages(network)
    for found, eager in zip(forwards(network, 5), expected, strict=True):
        torch.testing.assert_close(found, eager, atol=1e-5, rtol=1e-5)
    assert max(calls) == 2 * 22


def test_samples_are_the_eager_ones_and_nothing_is_built_when_batch_task_or_steps_change(
    built, cached, builds, engine, mixed, tiny_checkpoint, tmp_path
):
    kinds = [file.rpartition("-")[0] for file in built[1]]
    assert sorted({*kinds} - {"blocks"}) == PACKAGES and len(kinds) == len({*kinds}), "each is compiled once"
    eager = engine.generate(mixed)
    style = write_adapter(tmp_path / "style", tiny_checkpoint)
    with Engine.from_pretrained(tiny_checkpoint, dtype="float32", adapters={"style": style}) as adapted:
        request = Request("red cat", steps=3, adapter="style")
        styled = adapted.generate(request)
    with Engine.from_pretrained(
        tiny_checkpoint, device="cpu", dtype="float32", compile=True, adapters={"style": style}
    ) as compiled:
        assert_same(compiled.generate(request), styled)
        for found, expected in zip(compiled.generate(mixed_requests()), eager, strict=True):
            assert_same(found, expected)
        compiled.generate([Request(num=5, steps=3, step_cache=2), Request(prompt="red", order="together", steps=7)])
    assert builds.files == []


def test_a_run_that_does_not_compile_uses_what_is_there_and_builds_nothing(cached, builds, network):
    assert graphs.use_packages(network)
    assert all("forward" in vars(block) for block in network.blocks())
    shutil.rmtree(cached)
    fresh = type(network)(network.config)
    assert not graphs.use_packages(fresh)
    assert builds.files == [] and not any("forward" in vars(block) for block in fresh.blocks())


def test_packages_serve_every_checkpoint_of_the_width(cached, builds, three_modality_checkpoint):
    network = load(three_modality_checkpoint).network
    assert graphs.use_packages(network, build=True) and builds.files == []


@torch.inference_mode()
@pytest.mark.parametrize("images", [1, 2, 5])
def test_images_are_decoded_as_by_diffusers(cached, tiny_checkpoint, images, monkeypatch):
    monkeypatch.setattr(image, "PART", 2 * 32 * 32)
    codec, decoded = load(tiny_checkpoint).codec("image"), []
    tokens = torch.randn(images, codec.tokens, codec.channels, generator=torch.Generator().manual_seed(0))
    codec.build()
    assert codec._decode is not None
    for _ in range(2):
        decoded.append(codec.decode_pixels(tokens))
        codec._decode = None
    torch.testing.assert_close(*decoded, atol=1e-5, rtol=1e-5)


START = """
import sys
from engine.sample import main
assert main(sys.argv[1:]) == 0
print(sorted({"diffusers", "torch._dynamo", "scipy", "gensim"} & {*sys.modules}))
"""


def test_a_start_with_packages_imports_neither_diffusers_nor_dynamo(built, tiny_checkpoint, tmp_path):
    options = ["--checkpoint", tiny_checkpoint, "--prompt", "red", "--steps", 1, "--dtype", "float32", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", START, *map(str, options), "--out", tmp_path / "out"],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"XDG_CACHE_HOME": str(built[0])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[]\n")
    assert (tmp_path / "out" / "0000.png").exists()


def test_damaged_weights_of_a_compiled_decoder_are_named_before_sampling(cached, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    weights = folder / "image" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    damaged = pytest.raises(InputError, match="diffusion_pytorch_model.safetensors is damaged")
    with Engine.from_pretrained(folder, device="cpu", dtype="float32") as engine, damaged:
        engine.submit(Request(prompt="red", steps=1))


def test_training_refuses_a_broken_encoder_beside_a_compiled_decoder(cached, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint / "image", tmp_path / "image")
    weights, _ = load_tensors(folder / "diffusion_pytorch_model.safetensors")
    del weights[min(name for name in weights if name.startswith("encoder."))]
    save_tensors(folder / "diffusion_pytorch_model.safetensors", weights)
    with pytest.raises(InputError, match="weights that do not fit its config.json: encoder"):
        _given_autoencoder(folder, load(tiny_checkpoint).config)


def test_they_run_on_as_many_threads_as_there_are_then(cached, network):
    for file in cached.iterdir():
        assert b"omp parallel" in file.read_bytes() and b"num_threads(" not in file.read_bytes()
    threads = torch.get_num_threads()
    with torch.inference_mode():
        expected = forwards(network, 4)
        graphs.use_packages(network)
        try:
            for number in (1, 3):
                torch.set_num_threads(number)
                torch.testing.assert_close(forwards(network, 4), expected, atol=1e-5, rtol=1e-5)
                assert torch.get_num_threads() == number
        finally:
            torch.set_num_threads(threads)


def cut(path: Path, other: Path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path, other: Path):
    path.write_bytes(b"")


def flip(path: Path, other: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(path: Path, other: Path):
    shutil.copy(other, path)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [(cut, "is damaged"), (empty, "is damaged"), (flip, "is damaged"), (replace, "was built from something else")],
)
def test_a_damaged_or_foreign_entry_is_never_used_and_built_again(cached, builds, network, caplog, harm, problem):
    one, other = sorted(cached.glob("*block*"))
    harm(one, other)
    with caplog.at_level(logging.WARNING):
        assert not graphs.use_packages(network)
    (line,) = caplog.messages
    assert str(one) in line and problem in line and "\n" not in line and builds.files == []
    assert graphs.use_packages(network, build=True) and builds.files == [one.name]
    assert graphs.use_packages(network) and caplog.messages == [line]


def test_an_entry_of_another_user_is_not_used(cached, network, monkeypatch, caplog):
    for file in cached.iterdir():
        os.chown(file, 1234, 1234) if os.getuid() == 0 else monkeypatch.setattr(os, "getuid", lambda: 1234)
    assert not graphs.use_packages(network)
    assert all("belongs to another user" in line for line in caplog.messages) and len(caplog.messages) == 2, (
        "of both kinds of block"
    )


@pytest.mark.parametrize("changed", ["torch", "processor", "source", "dtype", "width", "norm", "heads"])
def test_an_entry_belongs_to_what_it_was_built_from(monkeypatch, network, changed):
    block, table = next(iter(network.blocks())), network.time_table(torch.arange(7))
    before = graphs._source(block, table).file
    if changed in ("torch", "processor", "source"):
        assert compiled._here()[changed]
        here = {**compiled._here(), changed: "another"}
        monkeypatch.setattr(compiled, "_here", lambda: here)
    elif changed == "dtype":
        block.bfloat16()
    elif changed == "width":
        block.fc1 = torch.nn.Linear(64, 128)
    else:
        setattr(block, changed, 2)
    assert graphs._source(block, table).file != before


def test_the_folder_keeps_what_was_used_last_within_its_limit(cached, builds, network, monkeypatch):
    (skip,), (plain,) = cached.glob("skip*"), cached.glob("block*")
    next(cached.glob("decoder*")).unlink()
    old, abandoned = cached / "old.pt2", cached / ".building-killed"
    old.write_bytes(bytes(1000))
    abandoned.mkdir()
    for i, path in enumerate((old, skip, abandoned)):
        os.utime(path, (i, i))
    monkeypatch.setattr(compiled, "LIMIT", skip.stat().st_size + plain.stat().st_size)
    plain.unlink()
    assert graphs.use_packages(network, build=True) and builds.files == [plain.name]
    assert {*cached.iterdir()} == {skip, plain}, "the skip's was used after the old one"


def test_two_processes_may_build_at_once(cached, builds, network, monkeypatch):
    def late(source, path):
        builds(source, path)
        shutil.copy(path, cached / source.file)  # the other one is done first

    monkeypatch.setattr(packages, "compile_package", late)
    names = {file.name for file in cached.glob("*block*")}
    for file in list(cached.iterdir()):
        file.unlink()
    assert graphs.use_packages(network, build=True)
    assert {file.name for file in cached.iterdir()} == names == {*builds.files}


def test_without_a_place_to_keep_them_the_run_goes_on_with_one_sentence(
    builds, tiny_checkpoint, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", compile=True) as engine:
        assert np.asarray(engine.generate(Request(prompt="red", steps=1)).image).shape == (32, 32, 3)
    (line,) = caplog.messages
    assert "cannot be written (Not a directory); " in line and str(tmp_path / "file") in line and builds.files == []


def test_a_full_disk_is_noticed_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(OSError, match="No space left on device"):
        compiled.add(SimpleNamespace(file="block.pt2"))
    assert not [*(tmp_path / "psunet-engine" / "packages").iterdir()]


def test_without_a_compiler_it_is_refused_in_one_line(tiny_checkpoint, tmp_path, monkeypatch):
    kind = type("InvalidCxxCompiler", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    def broken(source, path):
        raise kind("No working C++ compiler found\nand more")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packages, "compile_package", broken)
    with pytest.raises(InputError, match=r"^compile: True failed \(No working .*\); install a C\+\+ compiler"):
        Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", compile=True)
    assert not any((tmp_path / "psunet-engine" / "packages").iterdir())
