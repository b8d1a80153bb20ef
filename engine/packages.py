"""Packages: modules compiled ahead of time for this CPU by AOTInductor, kept in the user's cache folder.

Loading one takes milliseconds and imports no Dynamo. A package has no weights: they are inputs, so that one serves all
modules of a kind, and every checkpoint of that shape. Its dynamic dimensions take any size from 1.

An entry belongs to what it was compiled from: the versions of torch and of the engine's source, the processor, the
module's settings, shapes and dtypes. That is in its name and inside it; an entry that does not fit, or is damaged, is
never loaded. Entries are written beside their place and renamed, so several processes may build at once.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.device import processor
from engine.files import cache_folder
from engine.kernels.linear import onednn_computes, pack

LIMIT = 256 << 20  # bytes of the folder; beyond it the least recently used entries are removed
ROOM = 32 << 20  # bytes that have to be free to build an entry
ABANDONED = 24 * 3600  # seconds after which the folder of a build that was killed is removed
LABEL = "psunet-engine"  # of the entry's description among a package's metadata
PACKED = "packed"  # of the names of the weights in oneDNN's layout, likewise
WEIGHT = 1  # its place among the arguments of oneDNN's product
DAMAGE = (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error)

log = logging.getLogger("engine.packages")


@dataclass(frozen=True, eq=False)
class Source:
    """What a package is compiled from. Of the weights only names, shapes and dtypes matter: they may be "meta" tensors.

    name      for people: the first part of the file's name
    module    makes the module, when a package is built
    weights   of the module, by name
    inputs    of its forward, examples on the CPU, each a tensor of its own
    dynamic   for each input the dimensions of any size, by names that inputs may share; their examples are above 1
    settings  all else that the computation depends on, in JSON's types
    """

    name: str
    module: Callable[[], nn.Module]
    weights: Mapping[str, Tensor]
    inputs: tuple[Tensor | None, ...]
    dynamic: tuple[Mapping[int, str], ...]
    settings: Mapping = field(default_factory=dict)

    @cached_property
    def description(self) -> str:
        """All that identifies a package, in JSON."""
        inputs = [
            None if x is None else [str(x.dtype), *(sizes.get(i, n) for i, n in enumerate(x.shape))]
            for x, sizes in zip(self.inputs, self.dynamic, strict=True)
        ]
        weights = {name: [str(w.dtype), *w.shape] for name, w in self.weights.items()}
        return json.dumps({**_here(), "settings": self.settings, "inputs": inputs, "weights": weights}, sort_keys=True)

    @property
    def file(self) -> str:
        return f"{self.name}-{hashlib.sha256(self.description.encode()).hexdigest()[:20]}.pt2"


class Package:
    """A package that is loaded. Calls from several threads wait for each other.

    metadata  of the package: tells which weights it takes in oneDNN's layout
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]):
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        self._packed = json.loads(metadata[PACKED])

    def bind(self, weights: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        """The module's forward with these weights as they are now: those of products are copied.

        oneDNN would otherwise bring them into its layout again at every call.
        """
        run = self._loader.run
        ordered = [pack(weight) if name in self._packed else weight for name, weight in sorted(weights.items())]

        def forward(*inputs: Tensor | None) -> Tensor:
            # The compiled code assumes the layout of its examples.
            return run([*(x.contiguous() for x in inputs if x is not None), *ordered])[0]

        return forward


def package(source: Source, build: bool = False) -> Package | None:
    """The package compiled from this; None where there is none and none is to be built, or it cannot be kept or loaded.

    Damaged entries and those built from something else are announced, once, and with `build` built again.
    Raises what PyTorch raises where a compiler fails or is missing.
    """
    folder = _folder()
    found = _stored(folder / source.file, source.description) if folder else None
    if found is None and build:
        try:
            if folder is None:
                raise OSError("there is no home folder")
            _build(folder, source)
        except OSError as error:
            where = folder or "the cache"
            _announce(f"compile: {where} cannot be written ({error.strerror or error}); continuing without packages")
            return None
        found = _stored(folder / source.file, source.description)
    return found


@cache  # once
def _announce(problem: str) -> None:
    log.warning(problem)


def _folder() -> Path | None:
    cache = cache_folder()
    return cache and cache / "packages"


def _stored(path: Path, description: str) -> Package | None:
    """The package in a file; None if there is none, or none that can be trusted, which is announced."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return None
    problem = None
    try:
        if owner not in (0, os.getuid()):  # it would run as code
            problem = "belongs to another user"
        else:
            with zipfile.ZipFile(path) as file:
                broken = file.testzip()  # a damaged library could end the process
            metadata = torch._C._aoti.AOTIModelPackageLoader.load_metadata_from_package(str(path), "model")
            if broken is not None:
                problem = "is damaged"
            elif metadata.get(LABEL) != description:
                problem = "was built from something else"
            else:
                found = Package(path, metadata)
                with suppress(OSError):
                    os.utime(path)
                return found
    except (*DAMAGE, RuntimeError) as error:
        problem = f"is damaged or cannot be loaded ({' '.join(str(error).split())[:100]})"
    _announce(f"compile: {path} {problem}; it is not used, --compile builds it again")
    return None


def _build(folder: Path, source: Source) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < ROOM:  # PyTorch's writer aborts the process on a full disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as building:
        made = Path(building) / source.file
        compile_package(source, made)
        os.replace(made, folder / source.file)
    _shrink(folder, keep=source.file)


def compile_package(source: Source, path: Path) -> None:
    """Compiles into a file; seconds to a minute."""
    names = sorted(source.weights)
    sizes = {name: torch.export.Dim(name, min=1) for named in source.dynamic for name in named.values()}
    dynamic = tuple({i: sizes[name] for i, name in named.items()} or None for named in source.dynamic)
    example = tuple(None if x is None else x.contiguous() for x in source.inputs)
    weights = [torch.zeros(w.shape, dtype=w.dtype) for _, w in sorted(source.weights.items())]
    with torch.no_grad(), _onednn_products(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about itself
        exported = torch.export.export(
            _Stateless(source.module(), names), (example, weights), dynamic_shapes=(dynamic, [None] * len(names))
        )
        packed = use_onednn(exported.graph)
        inputs = exported.graph_signature.user_inputs[-len(names) :]
        of_products = [name for name, node in zip(names, inputs, strict=True) if node in packed]
        options = {
            "aot_inductor.metadata": {LABEL: source.description, PACKED: json.dumps(of_products)},
            "cpp.dynamic_threads": True,  # as many as there are when it runs, not as there were here
        }
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)


def use_onednn(graph: torch.fx.Graph) -> set[str]:
    """Replaces products by oneDNN's, with the GELU that follows, where it computes in their dtype.

    Returns the inputs that are weights of such products and nothing else, by name: they may be in oneDNN's own layout.
    """
    aten, linear = torch.ops.aten, torch.ops.mkldnn._linear_pointwise.default
    for product in graph.find_nodes(op="call_function", target=aten.linear.default):
        if not onednn_computes(product.meta["val"].dtype):
            continue
        user, then, approximate = next(iter(product.users)), "none", ""
        if len(product.users) == 1 and user.target is aten.gelu.default:
            then, approximate = "gelu", user.kwargs.get("approximate", "none")
            user.replace_all_uses_with(product)
            graph.erase_node(user)
        x, weight, bias = (*product.args, None)[:3]
        product.target, product.args = linear, (x, weight, bias, then, [], approximate)
    return {
        weight.name
        for weight in graph.find_nodes(op="placeholder")
        if weight.users and all(u.target is linear and u.args.index(weight) == WEIGHT for u in weight.users)
    }


@contextmanager
def _onednn_products() -> Iterator[None]:
    """Within it, Inductor compiles oneDNN's products for any weight; by itself it does for constants only.

    The second kind adds another tensor: Inductor makes it of a product and a sum.
    """
    from torch._inductor import compile_fx, ir, lowering, mkldnn_ir  # noqa: F401 - the first registers lowerings

    product = torch.ops.mkldnn._linear_pointwise
    ours = {
        product.default: lambda *inputs: ir.TensorBox.create(mkldnn_ir.LinearUnary.create(*inputs)),
        product.binary: lambda *inputs: ir.TensorBox.create(mkldnn_ir.LinearBinary.create(*inputs)),
    }
    of_inductor = lowering.lowerings
    before = {operation: of_inductor.get(operation) for operation in ours}
    of_inductor.update(ours)
    try:
        yield
    finally:
        for operation, lower in before.items():
            if lower is None:
                del of_inductor[operation]
            else:
                of_inductor[operation] = lower


class _Stateless(nn.Module):
    """A module whose weights are inputs."""

    def __init__(self, module: nn.Module, names: Sequence[str]):
        super().__init__()
        self._module, self._names = [module], list(names)  # in a list, so that weights are not registered

    def forward(self, inputs: tuple[Tensor | None, ...], weights: list[Tensor]) -> Tensor:
        return torch.func.functional_call(self._module[0], dict(zip(self._names, weights, strict=True)), inputs)


def _shrink(folder: Path, keep: str) -> None:
    """Removes the least recently used entries until the folder is within its limit, and abandoned builds."""
    entries = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process may have removed it
            status = path.stat()
            if path.name.startswith(".building-"):
                if time.time() - status.st_mtime > ABANDONED:
                    shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".pt2":
                entries.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total > LIMIT and path.name != keep:
            with suppress(OSError):
                path.unlink()
            total -= size


@cache
def _here() -> dict[str, str]:
    """Versions and processor that compiled code depends on."""
    engine = Path(__file__).parent
    files = sorted([Path(__file__), *(engine / "model").glob("*.py"), *(engine / "kernels").glob("*.py")])
    source = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files))
    flags = ""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "source": source.hexdigest(),
        "processor": f"{processor()}, {capability}, {hashlib.sha256(flags.encode()).hexdigest()}",
    }
