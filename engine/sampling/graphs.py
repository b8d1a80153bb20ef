"""The only `torch.compile` and the only CUDA-graph capture of the engine.

Compilation is regional: a model's blocks repeat, so one compilation per kind of block and shape serves them all, and a
cold start costs a few compilations instead of one as long as the model. Inductor keeps what it has built on disk
(`TORCHINDUCTOR_CACHE_DIR`), so that the next process starts quickly.

Capture is for CUDA: on a CPU there is nothing to capture, and `StepGraphs` cannot be made.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import nn

from engine.errors import InputError, cut


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


def compile_failure(error: Exception) -> Exception:
    """A failure of torch.compile, such as for want of a C++ compiler, as InputError; any other error as it is."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return error
    remedy = "install a C++ compiler such as g++ and Python's headers, or leave it out"
    reason = cut(str(error).partition("\n")[0], 200)
    return InputError("compile", True, remedy, f"failed ({reason})")


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
