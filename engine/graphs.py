"""The only `torch.compile` of the engine.

Compilation is regional: a model's blocks repeat, so one compilation per kind of block and shape serves them all, and a
cold start costs a few compilations instead of one as long as the model.
"""

from collections.abc import Iterable

from torch import nn


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles modules in place, without graph breaks; each shape is built at its first call."""
    for block in blocks:
        cuda = next(block.parameters()).is_cuda
        block.compile(fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs" if cuda else None)
