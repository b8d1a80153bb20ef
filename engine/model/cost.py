"""What a forward of a network costs, from its config alone: operations and bytes."""

from collections.abc import Collection, Iterator

from engine.config import ModelConfig
from engine.kernels import attention


def forward_flops(
    config: ModelConfig,
    rows: int,
    outputs: Collection[str] | None = None,
    cached: Collection[str] = (),
    reuse_inner: bool = False,
) -> int:
    """Multiplications and additions of the matrix products of one forward; what is elementwise is left out.

    rows         R, all passes of all samples
    outputs      the modalities whose prediction is wanted, default all; the others' out-blocks and heads do not run
    cached       the modalities whose branch features are given; their embeddings and in-blocks do not run
    reuse_inner  step caching: of the shared stack only the outermost pair runs
    A U-ViT's last convolution is left out too.
    """
    dim = config.dim
    per_token = 2 * dim * dim * (4 + 2 * config.mlp_ratio)  # QKV, projection, MLP
    total = 0
    for tokens, blocks, skips in _stacks(config, outputs, cached, reuse_inner):
        products, _ = attention.cost(1, tokens, dim // config.head_dim, config.head_dim, 2)
        total += blocks * (tokens * per_token + products) + skips * 2 * tokens * 2 * dim * dim
    wanted = _wanted(config, outputs)
    for m in config.modalities:
        total += (m.name not in cached) * 2 * m.tokens * m.channels * dim  # embedding
        total += (m.name in wanted) * 2 * m.tokens * (m.head * dim + m.categories * m.channels)  # head, mean of vectors
    return rows * total


def forward_bytes(
    config: ModelConfig,
    rows: int,
    itemsize: int,
    outputs: Collection[str] | None = None,
    cached: Collection[str] = (),
    reuse_inner: bool = False,
) -> int:
    """Bytes that one forward moves at least, all values of `itemsize` bytes; other arguments as in `forward_flops`.

    Counted are the parameters of all modules that run, read once whatever the rows, and the activations: each of the
    following reads what it takes once and writes what it gives once. Embedding, head, join of a skip, norm, QKV,
    attention (its weights are never stored), projection, residual with the norm after it, first layer of the MLP with
    its GELU, second layer, last residual, with adaLN part of that layer. So elementwise steps are merged as the fused
    kernels merge them. Left out are the table of times, concatenations and a U-ViT's last convolution (but not its
    weights).
    """
    wanted = _wanted(config, outputs)
    weights, activations = 0, 0  # values, and values per row
    for tokens, blocks, skips in _stacks(config, outputs, cached, reuse_inner):
        weights += blocks * _block_parameters(config) + skips * _skip_parameters(config)
        activations += tokens * (blocks * _block_traffic(config) + skips * _skip_traffic(config))
    for m in config.modalities:  # blocks that several modalities pass through are read once
        names = {o.name for o in config.modalities if m.name in (o.name, o.blocks_of)}
        ins, outs = (max(0, len(running) - 1) for running in (names - set(cached), names & set(wanted)))
        weights -= m.depth * ((ins + outs) * _block_parameters(config) + outs * _skip_parameters(config))
    dim, uvit, time = config.dim, config.uvit, _own_time_tokens(config)
    norm = 6 * dim if config.time_conditioning == "adaln" else 2 * dim  # the last one, of each branch or of the U-ViT
    for m in config.modalities:
        if m.name not in cached:
            weights += m.channels * dim + dim + (m.tokens + time) * dim  # embedding, positions
            activations += m.tokens * (m.channels + dim)
        if m.name in wanted:
            weights += dim * m.head + m.head + m.categories * m.channels + (norm if uvit is None else 0)
            activations += m.tokens * (2 * dim + dim + m.channels)  # norm, head
            activations += m.tokens * 4 * m.categories  # logits, probabilities
    if uvit is not None:
        weights += (len(uvit.timed) + uvit.extra_tokens) * dim + norm
        if uvit.patch and "image" in wanted:
            channels = config.modality("image").channels // uvit.patch**2
            weights += 9 * channels * channels + channels
    return (weights + rows * activations) * itemsize


def _stacks(
    config: ModelConfig, outputs: Collection[str] | None, cached: Collection[str], reuse_inner: bool
) -> Iterator[tuple[int, int, int]]:
    """(tokens, blocks, blocks that join a skip) of the shared stack and of each branch, as far as they run."""
    prefix = 0 if config.uvit is None else len(config.uvit.timed) + config.uvit.extra_tokens
    time, wanted = _own_time_tokens(config), _wanted(config, outputs)
    tokens = prefix + config.tokens + time * len(config.modalities)
    yield (tokens, 2, 1) if reuse_inner else (tokens, config.shared_depth, config.shared_depth // 2)
    for m in config.modalities:
        before, after = m.name not in cached, m.name in wanted
        yield m.tokens + time, (before + after) * m.depth, after * m.depth


def _wanted(config: ModelConfig, outputs: Collection[str] | None) -> Collection[str]:
    return config.predicted if outputs is None else outputs


def _own_time_tokens(config: ModelConfig) -> int:
    """Time tokens in each modality's branch: a PS-U-Net's carry their own, a U-ViT has them in front of the stack."""
    return int(config.uvit is None and config.time_conditioning == "token")


def _block_parameters(config: ModelConfig) -> int:
    """Values in a block without a skip."""
    dim, ratio = config.dim, config.mlp_ratio
    norms = 6 * dim if config.time_conditioning == "adaln" else 4 * dim
    return norms + 3 * dim * dim + (dim * dim + dim) + (ratio * dim * dim + ratio * dim) + (ratio * dim * dim + dim)


def _skip_parameters(config: ModelConfig) -> int:
    """Values in the layers that join a skip."""
    return 2 * config.dim * config.dim + config.dim + 2 * config.dim * _is_post_norm(config)


def _block_traffic(config: ModelConfig) -> int:
    """Values per token that a block without a skip reads and writes."""
    # Reads + writes in D: QKV, attention, projection, the MLP's two layers.
    layers = (1 + 3) + (3 + 1) + (1 + 1) + 2 * (1 + config.mlp_ratio)
    if _is_post_norm(config):
        norms = (2 + 1) + (2 + 1)  # twice a residual with its norm
    else:  # a first norm, a residual with the norm after it (both kept), a residual: with adaLN the MLP's second layer
        last = 1 if config.time_conditioning == "adaln" else 2 + 1  # reads the stream and adds to it
        norms = (1 + 1) + (2 + 2) + last
    return (layers + norms) * config.dim


def _skip_traffic(config: ModelConfig) -> int:
    """Values per token that joining a skip reads and writes: a linear layer of both and, in post-norm, its norm."""
    return (2 + 1 + 2 * _is_post_norm(config)) * config.dim


def _is_post_norm(config: ModelConfig) -> bool:
    return config.uvit is not None and config.uvit.norm == "post"
