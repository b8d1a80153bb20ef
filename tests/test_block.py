"""The library that computes whole blocks on a CPU: equal to the modules, for all shapes, and safe to load."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from engine_cases import assert_same

from engine import Engine, Request, compiled, native
from engine.checkpoint import load
from engine.errors import InputError
from engine.kernels import block as native_block
from engine.model.blocks import Block
from engine.sampling import graphs

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.bfloat16]
TIMES = 7


def needed(dtype: torch.dtype = torch.float32) -> None:
    if not native_block.computes(dtype, (64,)):
        pytest.skip(f"the library does not compute in {dtype} on this CPU")


@pytest.fixture
def library(built) -> native_block.Library:
    needed()
    source = native.Source()
    return source.load(built[0] / "psunet-engine" / "packages" / source.file)


def block_of(dim: int, head_dim: int, skip: bool, norm: str, exact_gelu: bool, dtype: torch.dtype) -> Block:
    torch.manual_seed(dim + head_dim)
    block = Block(dim, head_dim, 4, skip, norm, exact_gelu).eval().requires_grad_(False)
    for name, parameter in block.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.06)
    return block.to(dtype)


def inputs_of(block: Block, rows: int, tokens: int) -> tuple[torch.Tensor | None, ...]:
    generator, dim = torch.Generator().manual_seed(rows * tokens), block.qkv.in_features
    x, skip = torch.randn(2, rows, tokens, dim, generator=generator).to(block.qkv.weight.dtype)
    if block.norm == "adaln":
        table = torch.randn(TIMES, 6 * dim, generator=generator).to(x.dtype)
    else:
        table = torch.empty(TIMES, 0)  # is not read
    index = torch.randint(TIMES, (rows, tokens), generator=generator, dtype=torch.int32)
    return x, None if block.skip is None else skip, table, index


def bind(library: native_block.Library, block: Block):
    return library.bind(dict(block.named_parameters()), block.heads, block.norm, block.gelu)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm, exact_gelu", [("adaln", False), ("pre", True), ("post", True)])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dim, head_dim", [(32, 16), (192, 64), (160, 80), (96, 48)])
def test_blocks_are_as_near_to_float64_as_the_modules(library, dim, head_dim, skip, norm, exact_gelu, dtype):
    needed(dtype)
    block = block_of(dim, head_dim, skip, norm, exact_gelu, dtype)
    exact, forward = block_of(dim, head_dim, skip, norm, exact_gelu, dtype).double(), bind(library, block)
    for rows, tokens in ((0, 5), (1, 1), (2, 32), (3, 17), (1, 77), (2, 100)):
        x, skipped, table, index = inputs = inputs_of(block, rows, tokens)
        found = forward(*inputs)
        assert found.dtype == dtype and found.shape == x.shape
        if rows:
            expected = exact(x.double(), None if skipped is None else skipped.double(), table.double(), index)
            error, of_module = ((y.double() - expected).abs().max() for y in (found, block(*inputs)))
            assert error <= 2 * of_module + 1e-5 * expected.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_other_rows_or_on_threads(library, dtype):
    needed(dtype)
    block = block_of(192, 64, True, "adaln", False, dtype)
    forward, inputs, threads = bind(library, block), inputs_of(block, 9, 33), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            together = forward(*inputs)
            for row in (0, 4, 8):
                x, skip, table, index = inputs
                alone = forward(x[row : row + 1], skip[row : row + 1], table, index[row : row + 1])
                assert torch.equal(alone, together[row : row + 1])
            results.append(together)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@torch.inference_mode()
def test_inputs_may_be_parts_of_longer_tensors(library):
    block = block_of(64, 32, True, "adaln", False, torch.float32)
    x, skip, table, index = inputs_of(block, 3, 20)
    found = bind(library, block)(x[:, 4:11], skip[:, 4:11], table, index[:, 4:11])
    torch.testing.assert_close(found, block(x[:, 4:11], skip[:, 4:11], table, index[:, 4:11]), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("norm", ["adaln", "pre", "post"])
def test_the_norms_of_small_values_are_the_modules(library, norm):
    block = block_of(64, 32, False, norm, False, torch.float32)
    x, skip, table, index = inputs_of(block, 2, 20)
    x *= 2e-3  # a variance as small as what the norms add to it
    torch.testing.assert_close(
        bind(library, block)(x, skip, table, index), block(x, skip, table, index), atol=1e-6, rtol=1e-4
    )


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [20, 21])
def test_nan_stays_in_its_row(library, tokens, dtype):
    needed(dtype)
    block = block_of(64, 32, False, "adaln", False, dtype)
    x, skip, table, index = inputs_of(block, 2, tokens)
    x[1, 0, 5] = torch.nan
    found = bind(library, block)(x, skip, table, index)
    assert found[0].isfinite().all() and found[1].isnan().all(), "all tokens of a row see each other"


@torch.inference_mode()
def test_threads_may_call_at_once(library):
    block = block_of(64, 32, False, "adaln", False, torch.float32)
    forward, cases = bind(library, block), [inputs_of(block, rows, 11 * rows) for rows in (1, 2, 3, 4)]
    expected, wrong = [forward(*case) for case in cases], []

    def run(case, result):
        for _ in range(50):
            if not torch.equal(forward(*case), result):
                wrong.append(case)

    workers = [threading.Thread(target=run, args=pair) for pair in zip(cases, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.fixture
def eager(tiny_checkpoint, tmp_path, monkeypatch):
    """An engine whose blocks are not compiled."""
    with monkeypatch.context() as patch:
        patch.setattr(native_block, "computes", lambda dtype, sizes: False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing"))
        engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    with engine:
        yield engine


def test_samples_are_the_eager_ones(library, built, eager, mixed, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(built[0]))
    with Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32") as engine:
        for found, expected in zip(engine.generate(mixed), eager.generate(mixed), strict=True):
            assert_same(found, expected)
        assert_same(engine.generate(Request("red", num=3, steps=2)), eager.generate(Request("red", num=3, steps=2)))


@pytest.fixture
def added(tmp_path, monkeypatch) -> list[str]:
    """What is compiled from now on, for an empty cache."""
    needed()
    files, add = [], compiled.add
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "add", lambda source: (files.append(source.name), add(source)))
    return files


def is_compiled(network) -> bool:
    return all("forward" in vars(block) for block in network.blocks())


def test_it_is_compiled_unasked_once(tiny_checkpoint, added, caplog):
    caplog.set_level("INFO", "engine.compiled")
    for _ in range(2):
        network = load(tiny_checkpoint).network
        graphs.set_up(network, torch.device("cpu"))
        assert is_compiled(network) and added == ["blocks"]
    assert caplog.messages == ["compiled: blocks"] * 2


@pytest.mark.parametrize("lacking", ["compiler", "one that works", "cache"])
def test_what_prevents_compiling_unasked_is_not_even_a_warning(
    tiny_checkpoint, eager, added, tmp_path, monkeypatch, caplog, lacking
):
    if lacking == "cache":
        (tmp_path / "cache").touch()
    else:
        monkeypatch.setenv("CXX", "false" if lacking == "one that works" else str(tmp_path / "no-such-compiler"))
    caplog.set_level("INFO", "engine.compiled")
    with Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32") as engine:
        assert_same(engine.generate(Request("red", steps=2)), eager.generate(Request("red", steps=2)))
    (record,) = caplog.records
    assert record.levelname == "INFO" and record.message.startswith("compiling the blocks failed (")


def test_a_damaged_decoder_is_reported_when_it_is_needed_though_it_is_loaded_while_compiling(
    tiny_checkpoint, added, tmp_path
):
    damaged = Path(shutil.copytree(tiny_checkpoint, tmp_path / "damaged"))
    (weights,) = damaged.glob("*/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with Engine.from_pretrained(damaged, device="cpu", dtype="float32") as engine:
        assert added == ["blocks"]
        with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors"):
            engine.generate(Request("red", steps=1))


@pytest.mark.parametrize("other", ["heads of 8", "float16"])
def test_what_the_library_cannot_do_is_left_to_packages(other):
    dtype = torch.float16 if other == "float16" else torch.float32
    block = block_of(32, 8 if "8" in other else 16, False, "adaln", False, dtype)
    assert not isinstance(graphs._source(block, torch.zeros(3, 192)), native.Source)


def test_widths_that_differ_from_the_inputs_are_packages_too():
    block = block_of(64, 32, False, "adaln", False, torch.float32)
    block.fc1, block.fc2 = torch.nn.Linear(64, 40), torch.nn.Linear(40, 64)
    assert not isinstance(graphs._source(block, torch.zeros(3, 384)), native.Source)


def use(tiny_checkpoint, build: bool = False) -> bool:
    return graphs.use_packages(load(tiny_checkpoint).network, build=build)


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "another source"])
def test_a_library_that_is_damaged_or_of_another_source_is_not_loaded(
    library, cached, tiny_checkpoint, harm, monkeypatch, caplog
):
    (path,) = cached.glob("blocks-*")
    content = bytearray(path.read_bytes())
    if harm == "another source":
        source = native.Source()
        source.__dict__["description"] = "another"
        content = content[: -native.DIGEST] + source._digest(bytes(content[: -native.DIGEST]))
    elif harm == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[:-1000] if harm == "cut" else b"" if harm == "empty" else content)
    assert not use(tiny_checkpoint)
    (line,) = caplog.messages
    assert f"{path} is damaged or was built from something else" in line
    assert use(tiny_checkpoint, build=True), "it is built again"


COMPILERS = {  # CXX, and what is said of it; {} is a script
    "no-such-compiler -m64": "no-such-compiler: No such file",
    "false": "false: exit status 1",
    "'g++": "CXX: No closing quotation",
    "true": "true: .*file too short",  # it succeeds, and writes nothing
    r"{}printf '\377 bad\nmore' >&2; exit 3": "\ufffd bad",
    "{}read line; exit 3": "exit status 3",  # it waits for input
    "{}sleep 9": "takes more than 0.1 s",
}


@pytest.mark.parametrize("compiler", COMPILERS, ids=COMPILERS.values())
def test_a_compiler_that_is_missing_or_fails_is_one_sentence(tiny_checkpoint, tmp_path, monkeypatch, compiler):
    needed()
    problem, script = COMPILERS[compiler], tmp_path / "compiler"
    if compiler.startswith("{}"):
        script.write_text(f"#!/bin/sh\n{compiler[2:]}\n")
        script.chmod(0o755)
        compiler = str(script)
    if "takes" in problem:
        monkeypatch.setattr(native_block, "PATIENCE", 0.1)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        InputError, match=rf"^compile: True failed \(.*{problem}.*; install a C\+\+ compiler such as g\+\+"
    ):
        use(tiny_checkpoint, build=True)
    assert not [*(tmp_path / "psunet-engine" / "packages").iterdir()]


def test_a_compiler_that_does_not_know_the_processor_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    needed(torch.bfloat16)
    monkeypatch.setenv("CXX", "g++ -mno-avx512bf16")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="the compiler does not know this processor: block_bfloat16 is missing"):
        use(tiny_checkpoint, build=True)


@torch.inference_mode()
def test_options_of_the_compiler_serve_runs_with_these_options_and_change_no_arithmetic(
    tiny_checkpoint, added, monkeypatch
):
    block = block_of(64, 32, False, "adaln", False, torch.float32)
    x, _, table, index = inputs_of(block, 2, 5)
    expected = block(x, None, table, index)
    for options in ("-ffast-math", ""):
        monkeypatch.setenv("CXX", f"g++ {options}")
        compiled.add(native.Source())
        library = compiled.entry(native.Source())
        torch.testing.assert_close(bind(library, block)(x, None, table, index), expected, atol=1e-5, rtol=1e-5)
    assert added == ["blocks"] * 2


def test_memory_that_does_not_suffice_is_an_error(library, built):
    script = (
        "import resource, sys, torch\nfrom pathlib import Path\nfrom engine.kernels.block import Library\n"
        "from engine.model.blocks import Block\n"
        "block = Block(256, 64, 4, False, 'pre', False).requires_grad_(False)\n"
        "forward = Library(Path(sys.argv[1])).bind(dict(block.named_parameters()), 4, 'pre', 'tanh')\n"
        "x, index = torch.zeros(8, 25_000, 256), torch.zeros(8, 25_000, dtype=torch.int32)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limit, small = used + 400 * 2**20, (x[:1, :9].contiguous(), None, torch.zeros(1, 256), index[:1, :9])\n"
        "forward(*small)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try:\n    forward(x, None, torch.zeros(1, 256), index)\n"
        "except torch.OutOfMemoryError as error:\n    print(error)\n"
        "print(forward(*small).isfinite().all().item())"
    )
    (path,) = built[0].glob("psunet-engine/packages/blocks-*")
    done = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["memory does not suffice for a block of 51200000 elements", "True"], done.stderr


def test_it_shares_the_threads_of_pytorch(built, tiny_checkpoint):
    """A second OpenMP library would have threads of its own, which wait for each other's cores."""
    needed()
    script = (
        "import sys, torch\nfrom engine import Engine, Request\n"
        "with Engine.from_pretrained(sys.argv[1], device='cpu', dtype='float32') as engine:\n"
        "    engine.generate(Request('red', steps=1))\n"
        "files = {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}\n"
        "print(sum('libgomp' in file for file in files), sum('blocks-' in file for file in files))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_checkpoint)],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(built[0])},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1 1\n", done.stderr
