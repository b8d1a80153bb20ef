"""What every test file shares: optional data, checkpoints, engines, GPU tests and hypothesis settings."""

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: workers with several threads slow each other down

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under nohup: the processes of tests would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub: names that no cache holds are not looked up

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on the CPU

# Deadlines measure the machine; a fixed order of examples makes a failure in CI one that a developer can repeat.
settings.register_profile("engine", deadline=None, derandomize=True)
settings.load_profile("engine")

gc.set_threshold(100_000, 20, 20)  # collections, which visit all of torch's objects, took a tenth of the time


def pytest_configure(config: pytest.Config) -> None:
    """xdist's `loadfile` would begin with the files of most tests; those of few are the longest here."""
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker begins one when the others have nothing left.

    Tests of endurance are slow too: `-m "not slow"` replaces the `-m "not endurance"` of pyproject.toml.
    """
    for item in items:
        if item.get_closest_marker("endurance"):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """Measurements that `dtype="auto"` keeps are this test run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real photos and published weights that are not part of the project."""
    if "PSUNET_SHARED" not in os.environ:
        pytest.skip("PSUNET_SHARED is unset: no photos or published weights to test on")
    return Path(os.environ["PSUNET_SHARED"])


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A data set of twelve random images with two captions each."""
    from train_cases import captioned_images

    return captioned_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def short_sheets() -> Iterator[None]:
    """Sample sheets of two images of a kind: most of a tiny run's time would be theirs."""
    from train_cases import small_sample_sheets

    with small_sample_sheets(2):
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A complete checkpoint folder of the `tiny` preset with random weights: 32 px, 6 words, a vocabulary of 32."""
    from engine_cases import random_checkpoint

    from engine.presets import PRESETS

    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", PRESETS["tiny"])


@pytest.fixture(scope="session")
def three_modality_checkpoint(tmp_path_factory) -> Path:
    """As `tiny_checkpoint`, with a third modality: `sketch`, a second image that shares the image's codec folder."""
    from engine_cases import random_checkpoint

    from engine.config import CodecConfig, Modality, SamplingConfig
    from engine.presets import PRESETS

    tiny = PRESETS["tiny"]
    model = replace(tiny.model, modalities=(*tiny.model.modalities, Modality("sketch", 16, 4, depth=1)))
    codecs = {**tiny.codecs, "sketch": CodecConfig("image", folder="image", settings=tiny.codecs["image"].settings)}
    sampling = SamplingConfig(tiny.sampling.guidance, order=("text", "sketch", "image"))
    config = replace(tiny, model=model, codecs=codecs, sampling=sampling)
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "three", config)


@pytest.fixture(scope="session", params=["text", "image"])
def single(request, tmp_path_factory) -> tuple[str, Path]:
    """The name of the only modality of a model of random weights, and its checkpoint folder."""
    from engine_cases import random_checkpoint

    from engine.config import SamplingConfig
    from engine.presets import PRESETS

    tiny, name = PRESETS["tiny"], request.param
    model = replace(tiny.model, modalities=(tiny.model.modality(name),))
    codecs, sampling = {name: tiny.codecs[name]}, SamplingConfig(tiny.sampling.guidance)
    config = replace(tiny, model=model, codecs=codecs, sampling=sampling)
    return name, random_checkpoint(tmp_path_factory.mktemp("single") / name, config)


@pytest.fixture(scope="session")
def built(tiny_checkpoint, tmp_path_factory) -> tuple[Path, list[str]]:
    """A cache folder with all compiled code of the tiny model in float32, and the files that were compiled for it.

    Where the CPU can run the library of `engine.kernels.block`, packages of the blocks are there too. Compiled once for
    all workers of a run. Tests may use it, but not change it: `cached` is a copy.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    from filelock import FileLock

    from engine import Engine, compiled
    from engine.kernels import block

    parallel = "PYTEST_XDIST_WORKER" in os.environ
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if parallel else root) / "built"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            files, add, threads = [], compiled.add, torch.get_num_threads()
            writing = folder.with_name("building")
            shutil.rmtree(writing, ignore_errors=True)  # of a worker that failed
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(compiled, "add", lambda source: (files.append(source.file), add(source)))
                patch.setenv("XDG_CACHE_HOME", str(writing))
                torch.set_num_threads(1)
                try:
                    for computes in (block.computes, lambda dtype, sizes: False):
                        patch.setattr(block, "computes", computes)
                        Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", compile=True).close()
                finally:
                    torch.set_num_threads(threads)
            (writing / "compiled.txt").write_text("\n".join(files))
            writing.rename(folder)
    return folder, (folder / "compiled.txt").read_text().splitlines()


@pytest.fixture
def cached(built, monkeypatch, tmp_path) -> Path:
    """A copy of the built packages is the cache; returns its folder."""
    shutil.copytree(built[0], tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "psunet-engine" / "packages"


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    """An engine of the tiny model in float32, on the CPU or the GPU there is."""
    from engine import Engine

    with Engine.from_pretrained(tiny_checkpoint, dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def on_cpu(tiny_checkpoint):
    """As `engine`, on the CPU."""
    from engine import Engine

    with Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    """The tiny model's pipeline for diffusers."""
    from engine.pipeline import PSUNetPipeline

    pipe = PSUNetPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def mixed() -> list:
    """Requests of every task."""
    from engine_cases import mixed_requests

    return mixed_requests()


@pytest.fixture(scope="module")
def alone(engine, mixed) -> list:
    """The results of `mixed`, each generated by itself."""
    return [engine.generate(request) for request in mixed]


@pytest.fixture
def own(tiny_checkpoint):
    """(engine, network) on the CPU for one test only, which may change both."""
    from engine import Engine
    from engine.checkpoint import load

    checkpoint = load(tiny_checkpoint)
    with Engine(checkpoint, torch.device("cpu"), torch.float32) as engine:
        yield engine, checkpoint.network


@pytest.fixture
def forbid() -> Iterator[Callable[[Path], None]]:
    """Takes all permissions from a path, and from this process root's power to ignore that, until the test ends."""
    modes, was_root = [], os.getuid() == 0

    def forbid(path: Path) -> None:
        modes.append((path, path.stat().st_mode))
        path.chmod(0)
        if was_root:
            closed = [parent for parent in path.parents if not parent.stat().st_mode & 1]  # pytest's own
            modes.extend((parent, parent.stat().st_mode) for parent in closed)
            for parent in closed:
                parent.chmod(0o711)
            os.setresuid(65534, 65534, 0)

    yield forbid
    if was_root:
        os.setresuid(0, 0, 0)
    for path, mode in modes:
        path.chmod(mode)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


# ------------------------------------------------------------------------------------------------- page in Chromium


@pytest.fixture(scope="module")
def served(tiny_checkpoint) -> Iterator:
    """A service of `tiny_checkpoint`, see `page_cases.Served`."""
    from page_cases import Served

    with closing(Served(tiny_checkpoint)) as served:
        yield served


@pytest.fixture
def serve() -> Iterator[Callable]:
    """Starts services, `page_cases.Served` of these arguments; `open_page` closes its pages before they end."""
    with ExitStack() as services:

        def serve(checkpoint: Path, **options):
            from page_cases import Served

            return services.enter_context(closing(Served(checkpoint, **options)))

        yield serve


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # CI runs as root
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, served, serve) -> Iterator[Callable]:
    """Opens the page in a context of given options; at the end, nothing may have failed or left the origin."""
    contexts, problems = [], []

    def open_page(url: str = served.url, expected: str = "nothing", **options):
        """expected: part of what the browser itself reports on its console, where a request is to fail"""
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)

        def on_console(message) -> None:
            if message.type in ("error", "warning") and expected not in message.text:
                problems.append(message.text)

        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: r.url.startswith((url, "blob:", "data:")) or problems.append(r.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
