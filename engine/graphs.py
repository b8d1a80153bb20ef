"""The only `torch.compile` of the engine.

Compilation is regional: a model's blocks repeat, so one compilation per kind of block and shape serves them all, and a
cold start costs a few compilations instead of one as long as the model.
"""

from collections.abc import Iterable

from torch import nn


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles modules in place, without graph breaks; each shape is built at its first call."""
    from torch._dynamo import config  # not above: it takes as long to import as torch itself

    # All blocks share one compiled call, whose limit counts every kind of block times every batch size.
    config.recompile_limit = max(config.recompile_limit, 256)
    for block in blocks:
        cuda = next(block.parameters()).is_cuda
        block.compile(fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs" if cuda else None)
