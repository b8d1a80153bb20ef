"""How blocks are compiled, and the only `torch.compile` and CUDA-graph capture of the engine.

Compilation is regional: a model's blocks repeat, so one compilation per kind of block and shape serves them all, and a
cold start costs a few compilations instead of one as long as the model. Inductor keeps what it has built on disk
(`TORCHINDUCTOR_CACHE_DIR`), so that the next process starts quickly.

For sampling on a CPU blocks are compiled ahead of time instead, once for this machine and for all numbers of rows and
tokens: on CPUs with AVX-512 as one library for all blocks (`engine.native`), unasked if there is a C++ compiler, since
that takes seconds; on others as a package for each kind of block, for all checkpoints of this width
(`engine.packages`).

Capture is for CUDA: on a CPU there is nothing to capture, and `StepGraphs` cannot be made.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor, nn

from engine import compiled, native
from engine.errors import InputError
from engine.kernels import block as native_block
from engine.kernels.linear import onednn_computes, packed_product
from engine.model.blocks import Block, quantize_blocks
from engine.packages import Source

PART = 1 << 19  # elements of a block's input that one call of compiled code takes: some 20 to 100 milliseconds
EXAMPLE_TIMES = 7  # rows of the table that packages are compiled with; they take any number
log = logging.getLogger("engine.compiled")


def set_up(
    network: nn.Module, device: torch.device, compile: bool = False, attention: str = "auto", quantize: str = "none",
    meanwhile: Iterable[Callable[[], object]] = (),
) -> None:  # fmt: skip
    """Sets how a network, on its device, in its dtype and in evaluation mode, computes; as `Engine.from_pretrained`.

    meanwhile  are called while a compiler runs, where `compile` does not ask for one
    """
    for block in network.blocks():
        block.attention = attention
    if quantize != "none":
        quantize_blocks(list(network.blocks()))
    if device.type == "cpu":
        if not compile:
            _add_library(network, meanwhile)
        if not use_packages(network, build=compile):
            pack_products(block for block in network.blocks() if "forward" not in block.__dict__)
    elif compile:
        compile_blocks(network.blocks())


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles modules in place, without graph breaks; each shape is built at its first call.

    On CUDA every shape is tuned for itself. On a CPU, where the matrix products are a library's anyway, a second shape
    is compiled for all the further ones too, since any number of rows may come.
    """
    from torch._dynamo import config  # not above: it takes as long to import as torch itself

    # All blocks share one compiled call, whose limit counts every kind of block times every batch size.
    config.recompile_limit = max(config.recompile_limit, 256)
    for block in blocks:
        if next(block.parameters()).is_cuda:
            block.compile(fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
        else:
            block.compile(fullgraph=True)


def use_packages(network: nn.Module, build: bool = False) -> bool:
    """Lets a network's blocks compute in compiled code as far as there is any; with `build`, builds what is missing.

    network  in evaluation mode on a CPU, with its last weights: the compiled code copies those of products
    Returns whether all blocks do. Shows its progress on a terminal. Raises InputError where nothing can be compiled.
    """
    from tqdm import tqdm

    table = network.time_table(torch.arange(EXAMPLE_TIMES))
    sources = [(block, _source(block, table)) for block in network.blocks()]
    kinds = {source.file: source for _, source in sources}
    found = {file: compiled.entry(source) for file, source in kinds.items()}
    if build and not all(found.values()):
        missing = [file for file, known in found.items() if known is None]
        for file in tqdm(missing, desc="compiling, once for this machine", unit="kind of block", disable=None):
            found[file] = compiled.entry(kinds[file], build=True)
    for block, source in sources:
        if (code := found[source.file]) is None:
            continue
        weights = dict(block.named_parameters())
        settings = (block.heads, block.norm, block.gelu) if isinstance(source, native.Source) else ()
        block.forward = _in_parts(code.bind(weights, *settings))
    if used := sorted({source.name for _, source in sources if found[source.file] is not None}):
        log.info("compiled: %s", ", ".join(used))
    return all(found.values())


def _add_library(network: nn.Module, meanwhile: Iterable[Callable[[], object]]) -> None:
    """Compiles the library for blocks where it is missing, this CPU can run it, and there is a compiler.

    It takes seconds, once for this machine. What `meanwhile` raise for bad input is ignored: they are called again.
    """
    source = native.Source()
    if not any(_in_library(block) for block in network.blocks()) or not compiled.lacks(source):
        return
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(compiled.add, source)
        for call in meanwhile:
            with suppress(InputError):
                call()
        try:
            adding.result()
        except InputError as error:
            log.info("compiling the blocks %s", error.problem)
        except OSError as error:
            log.info("compiling the blocks failed (%s)", error)


def pack_products(blocks: Iterable[Block]) -> None:
    """Lets the products of blocks on a CPU use weights in oneDNN's own layout, where it computes in their dtype.

    It would otherwise bring them into that layout at every call. The weights are copied, as they are now.
    """
    for block in blocks:
        if not onednn_computes(block.qkv.weight.dtype):
            continue
        for layer in filter(None, (block.skip, block.qkv, block.proj, block.fc2)):
            layer.forward = packed_product(layer.weight, layer.bias)
        block._hidden = packed_product(block.fc1.weight, block.fc1.bias, "gelu", block.gelu)


def _in_parts(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A block's forward, some rows at a time.

    A package holds Python's lock, and other threads must go on; the library keeps what memory a call needed.
    """

    def forward_parts(x: Tensor, skip: Tensor | None, table: Tensor, index: Tensor) -> Tensor:
        rows = max(1, PART // max(1, x[:1].numel()))
        if len(x) <= rows:
            return forward(x, skip, table, index)
        skips = [None] * len(x) if skip is None else skip.split(rows)
        parts = zip(x.split(rows), skips, index.split(rows), strict=False)
        return torch.cat([forward(x, skip, table, index) for x, skip, index in parts])

    return forward_parts


def _source(block: Block, table: Tensor) -> native.Source | Source:
    """What a block is compiled from."""
    if _in_library(block):
        return native.Source()
    x, skip = torch.zeros(2, 3, 5, block.qkv.in_features, dtype=block.qkv.weight.dtype)  # [R, L, D] each
    index = torch.zeros(3, 5, dtype=torch.int32)  # [R, L]
    size, without = {0: "rows", 1: "tokens"}, block.skip is None
    return Source(
        name=f"{'block' if without else 'skip-block'}-{block.qkv.in_features}",
        module=lambda: block,
        weights=dict(block.named_parameters()),
        inputs=(x, None if without else skip, table, index),
        dynamic=(size, {} if without else size, {0: "times"}, size),
        settings={"heads": block.heads, "norm": block.norm, "gelu": block.gelu},
    )


def _in_library(block: Block) -> bool:
    """Whether the library can compute this block here."""
    dim, hidden = block.fc2.out_features, block.fc2.in_features
    return native_block.computes(block.qkv.weight.dtype, (dim, hidden, dim // block.heads))


class StepGraphs:
    """CUDA graphs of steps, one for each key, in one memory pool; one thread at a time may use them.

    A step is a function without arguments or result that works on memory which stays where it is: what it reads and
    writes at its capture is what every replay reads and writes. It may not wait for the device, nor build a tensor
    from values of the host. Memory of the pool holds nothing from one step to the next, so all graphs share it;
    capture the largest first, and the others need no more.
    """

    def __init__(self, device: torch.device):
        self.replays = 0  # steps replayed so far
        self._stream = torch.cuda.Stream(device)
        self._sides: list[torch.cuda.Stream] = []
        self.clear()

    def clear(self) -> None:
        """Drops all graphs, and with them their hold on memory."""
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()  # a pool whose graphs are all gone cannot be captured into again

    def __call__(self, key: Hashable, step: Callable[[], None]) -> None:
        """Does one step: a replay of the key's graph, or, the first time, the step itself and then its capture."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            self.replays += 1
            return
        # A real step in the thread and on the stream of the capture is also the warm-up that the capture needs:
        # kernels are compiled and loaded and library handles made, none of which can be captured.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads of other engines, and of this one's callers, go on allocating meanwhile.
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):  # records the step, does not do it
                step()
        except BaseException:
            self.clear()  # nothing can be captured into a pool after a capture in it has failed
            raise
        self._graphs[key] = graph

    def run_branches(self, calls: Sequence[Callable[[], torch.Tensor]]) -> list:
        """Results of calls, within a step, that need nothing of each other; all but the first on streams of their own.

        In the graph they become branches, which small kernels share the device in. What the calls take and give is safe
        to free: a side stream starts after all that the main one was given before, which waits for it at the end.
        """
        main = torch.cuda.current_stream(self._stream.device)
        while len(self._sides) < len(calls) - 1:
            self._sides.append(torch.cuda.Stream(self._stream.device))
        sides, results = self._sides[: len(calls) - 1], []
        for side in sides:
            side.wait_stream(main)
        try:
            for side, call in zip(sides, calls[1:], strict=True):
                with torch.cuda.stream(side):
                    results.append(call())
            return [calls[0](), *results]
        finally:  # also after an error: a capture cannot end while one of its streams is apart
            for side in sides:
                main.wait_stream(side)
