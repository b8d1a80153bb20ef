"""Packages: modules compiled ahead of time for this CPU by AOTInductor.

Loading one takes milliseconds and imports no Dynamo. A package has no weights: they are inputs, so that one serves all
modules of a kind, and every checkpoint of that shape. Its dynamic dimensions take any size from 1.

A package belongs to its module's settings, shapes and dtypes, besides what all entries of `engine.compiled` belong to.
"""

import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import compiled
from engine.kernels.linear import onednn_computes, pack

LABEL = "psunet-engine"  # of the entry's description among a package's metadata
PACKED = "packed"  # of the names of the weights in oneDNN's layout, likewise
WEIGHT = 1  # its place among the arguments of oneDNN's product


@dataclass(frozen=True, eq=False)
class Source(compiled.Source["Package"]):
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

    suffix = ".pt2"

    def facts(self) -> Mapping:
        inputs = [
            None if x is None else [str(x.dtype), *(sizes.get(i, n) for i, n in enumerate(x.shape))]
            for x, sizes in zip(self.inputs, self.dynamic, strict=True)
        ]
        weights = {name: [str(w.dtype), *w.shape] for name, w in self.weights.items()}
        return {"settings": self.settings, "inputs": inputs, "weights": weights}

    def compile(self, path: Path) -> None:
        """Raises InputError if there is no compiler that works."""
        try:
            compile_package(self, path)
        except Exception as error:
            if (failure := compiled.compile_failure(error)) is error:
                raise
            raise failure from None

    def load(self, path: Path) -> "Package":
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()  # a damaged library could end the process
        metadata = torch._C._aoti.AOTIModelPackageLoader.load_metadata_from_package(str(path), "model")
        if broken is not None:
            raise compiled.Unfit("is damaged")
        if metadata.get(LABEL) != self.description:
            raise compiled.Unfit("was built from something else")
        return Package(path, metadata)


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
