"""The import of diffusers, which takes longer than all else that a short run does (benchmarks/NOTES.md)."""

import importlib.util
import logging
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from threading import Lock, get_ident
from types import ModuleType

import torch

# Packages that diffusers imports for classes other than our autoencoders.
UNUSED = (
    "accelerate", "auto_round", "av", "bitsandbytes", "cv2", "flash_attn", "flash_attn_3", "flashinfer", "flax", "gguf",
    "jax", "kernels", "kornia", "librosa", "modelopt", "onnxruntime", "optimum", "peft", "sageattention", "scipy",
    "sdnq", "sentencepiece", "timm", "torchao", "torchsde", "torchvision", "transformers", "xformers",
)  # fmt: skip
UNGUARDED = ("torch._dynamo", "transformers")  # which it imports without looking for them first, and can do without
XFORMERS_LOG = logging.getLogger("xformers")
LOCK = Lock()  # held while the import changes what all threads share
log = logging.getLogger("engine.codecs")


def import_diffusers(*names: str) -> ModuleType:
    """diffusers, with the modules of these classes, which it imports when they are first used.

    It imports Dynamo and many optional packages. Our autoencoders need none of these, so the engine's commands
    (`python -m engine.…`) import it without them. A program may need them for its own use of diffusers; there the
    packages are left out only if the import fails, as with a broken package, and the program had not imported it
    before. Without a CUDA device xformers is always left out; with one, or where diffusers has found it before, its
    warnings are suppressed.
    """
    with LOCK:
        return _with_fallback(names)


def _with_fallback(names: Iterable[str]) -> ModuleType:
    first = "diffusers" not in sys.modules
    level = XFORMERS_LOG.level
    XFORMERS_LOG.setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            if first and not torch.cuda.is_available() and "xformers" not in sys.modules:
                stack.enter_context(_hidden(("xformers",)))
            if first and _is_command():
                stack.enter_context(_not_found(UNUSED))
                stack.enter_context(_refused(UNGUARDED))
            return _import_diffusers(names)
    except Exception as error:  # a broken package raises anything
        if not first:
            raise
        log.info("diffusers: imported again without optional packages (%s)", error)
    finally:
        XFORMERS_LOG.setLevel(level)
    for module in [module for module in sys.modules if module.partition(".")[0] == "diffusers"]:
        del sys.modules[module]
    with _hidden(UNUSED):
        return _import_diffusers(names)


def _is_command() -> bool:
    """Whether this process is `python -m` of one of our modules."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.startswith("engine.")


def _import_diffusers(names: Iterable[str]) -> ModuleType:
    module = importlib.import_module("diffusers")
    for name in names:
        getattr(module, name)
    return module


@contextmanager
def _not_found(packages: Iterable[str]) -> Iterator[None]:
    """Lets `importlib.util.find_spec`, by which diffusers looks for packages, find none of these.

    Importing them works all the same: other threads may do that meanwhile.
    """
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name in packages else find_spec(name, package)
    try:
        yield
    finally:
        importlib.util.find_spec = find_spec


@contextmanager
def _refused(modules: Collection[str]) -> Iterator[None]:
    """Lets this thread, but no other, import none of these modules, unless they are imported already.

    `torch.compiler.disable`, by which diffusers marks what it does not use here, would import Dynamo.
    """
    thread, disable = get_ident(), torch.compiler.disable

    def unmarked(fn=None, *args, **kwargs):
        if get_ident() != thread or "torch._dynamo" in sys.modules:
            return disable(fn, *args, **kwargs)
        return (lambda function: function) if fn is None else fn

    refusal = _Refusal(modules, thread)
    sys.meta_path.insert(0, refusal)
    torch.compiler.disable = unmarked
    try:
        yield
    finally:
        torch.compiler.disable = disable
        sys.meta_path.remove(refusal)


@dataclass(frozen=True)
class _Refusal(MetaPathFinder):
    modules: Collection[str]
    thread: int

    def find_spec(self, fullname, path, target=None):
        if fullname in self.modules and get_ident() == self.thread:
            raise ModuleNotFoundError(f"{fullname} is left out", name=fullname)
        return None


@contextmanager
def _hidden(packages: Iterable[str]) -> Iterator[None]:
    """Lets imports find none of these packages."""
    before = {package: sys.modules[package] for package in packages if package in sys.modules}
    sys.modules.update(dict.fromkeys(packages))
    try:
        yield
    finally:
        for package in packages:
            del sys.modules[package]
        sys.modules.update(before)
