"""Samples to make, and the device memory in which they are made side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.diffusion.masks import token_mask
from engine.diffusion.solver_table import StepTable
from engine.errors import InputError
from engine.kernels.cfg_step import init_state
from engine.kernels.sampler_state import BatchConstants, new_state
from engine.kernels.step_table import NOOP_STEP, PassKind, StepColumn
from engine.model.lora import Adapter, AdapterRows


@dataclass(frozen=True, eq=False)
class SampleSpec:
    """One sample to make. Raises InputError on values that cannot be sampled."""

    seed: int  # 0 … 2⁶⁴ − 1
    table: StepTable
    generate: Tensor  # [N] bool
    known: Tensor  # [N] float32, read where generate is False
    null: Tensor | None = None  # [N] float32, what "empty" guidance knows instead
    # By modality, for those that arrive before others start: a function from its tokens [n, L, C] to those that the
    # later modalities are given, such as the nearest word vectors. Samples with the same function share its calls.
    on_arrival: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    adapter: Adapter | None = None  # of the denoiser's network
    adapter_scale: float = 1.0

    def __post_init__(self):
        if not 0 <= self.seed < 2**64:
            raise InputError("seed", self.seed, "use 0 to 2^64 - 1", "is out of range")
        if self.generate.dtype != torch.bool or self.generate.shape != self.known.shape:
            found = f"{self.generate.dtype} {tuple(self.generate.shape)}"
            raise InputError("generate", found, f"give bool {tuple(self.known.shape)}, the shape of known")
        if not torch.isfinite(self.known[~self.generate]).all():
            raise InputError("known", "a value", "give finite values", "is NaN or infinite")
        if self.null is None and (self.table.kinds & PassKind.NULLS_KNOWN).any():
            raise InputError("null", None, "give the values of an empty condition for guidance 'empty'", "is missing")


class Batch:
    """The memory of some slots: constants and state of the samples in them, side by side.

    An empty slot runs no-op steps, or further steps of a sample that was cancelled; its output is ignored.
    """

    def __init__(self, constants: BatchConstants):
        self.constants, self.state = constants, new_state(constants)
        self.features: dict[str, Tensor] = {}  # by modality [depth, P·B, L, D], pass-major like the inputs
        self.cache: Tensor | None = None  # [P·B, L, D], the inner blocks' last result; made when first needed
        device = self.state.state.device
        # Of the slots; written before each step with an adapter. Graphs read this memory.
        self.adapted = AdapterRows(torch.zeros(self.slots, dtype=torch.int64, device=device),
                                   torch.ones(self.slots, device=device))  # fmt: skip
        init_state(constants, self.state)

    @property
    def slots(self) -> int:
        """B"""
        return len(self.state.state)

    @property
    def passes(self) -> int:
        """P, the passes that there is memory for."""
        return len(self.state.inputs) // self.slots

    def copy(self, source: "Batch", pairs: Sequence[tuple[int, int]]) -> None:
        """Copies samples of another batch, `pairs` of (slot there, slot here).

        Its tables may be shorter and its passes fewer: what lies beyond is off for these samples.
        """
        if not pairs:
            return
        device = self.state.state.device
        theirs, ours = (upload(torch.tensor(slots), device) for slots in zip(*pairs, strict=True))
        for name, values in source.features.items():
            self.new_features(name, values)
        if source.cache is not None and self.cache is None:
            self.cache = source.cache.new_zeros(self.passes * self.slots, *source.cache.shape[1:])
        targets = self._by_slot()
        for name, (values, dim) in source._by_slot().items():
            target = targets[name][0]
            for other in range(target.ndim):
                if other != dim and target.shape[other] > values.shape[other]:
                    target = target.narrow(other, 0, values.shape[other])
            target.index_copy_(dim, ours, values.index_select(dim, theirs))

    def new_features(self, name: str, like: Tensor) -> None:
        """Makes room for a modality's branch features, [depth, ·, L, D] shaped as those given, if there is none."""
        if name not in self.features:
            depth, _, *shape = like.shape
            self.features[name] = like.new_zeros(depth, self.passes * self.slots, *shape)

    def rows(self, slots: Tensor, passes: int) -> Tensor:
        """Rows of the first passes of the pass-major inputs that belong to these slots [k], [passes·k] int64."""
        return (torch.arange(passes, device=slots.device)[:, None] * self.slots + slots).flatten()

    def adapted_rows(self, passes: int) -> AdapterRows:
        """The adapters of the rows of so many passes."""
        return AdapterRows(*(x.repeat(passes) for x in self.adapted))

    def _by_slot(self) -> dict[str, tuple[Tensor, int]]:
        """Everything that belongs to a slot, by name, and which dimension counts the slots."""
        found = {name: (x, 0) for name, x in self.constants._asdict().items() if not name.endswith("modality")}
        for name, tensor in self.state._asdict().items():
            passes = name in ("inputs", "times")
            found[name] = (tensor.unflatten(0, (-1, self.slots)), 1) if passes else (tensor, 0)
        for name, tensor in self.features.items():
            found[f"features {name}"] = tensor.unflatten(1, (-1, self.slots)), 2
        if self.cache is not None:
            found["cache"] = self.cache.unflatten(0, (-1, self.slots)), 1
        return found


def batch_constants(
    specs: Sequence[SampleSpec],
    model: ModelConfig,
    device: torch.device | str,
    slots: int | None = None,  # B, default one for each sample
    lines: int | None = None,  # S + 1, default what the longest table needs
    passes: int | None = None,  # P, default what the samples' tables have
) -> BatchConstants:
    """Stacks samples into the constants of `cfg_step`; shorter tables, and slots without a sample, change nothing."""
    slots = len(specs) if slots is None else slots
    lines = lines or max(spec.table.steps for spec in specs) + 1  # every table ends in a line that changes nothing
    extra = max(spec.table.kinds.shape[2] for spec in specs) if passes is None else passes - 1
    M = len(model.modalities)
    coefficients = np.tile(np.array(NOOP_STEP, np.float32), (slots, lines, M, 1))
    indices = np.zeros((slots, lines, M, StepColumn.PASS + extra), np.int32)  # PassKind.OFF is 0
    seeds = np.zeros(slots, np.uint64)
    generate, known, null = torch.zeros(slots, model.size, dtype=torch.bool), *torch.zeros(2, slots, model.size)
    for i, spec in enumerate(specs):
        table = spec.table
        coefficients[i, : table.steps] = table.coefficients
        indices[i, : table.steps, :, : table.indices.shape[2]] = table.indices
        seeds[i], generate[i], known[i] = spec.seed, spec.generate, spec.known
        null[i] = spec.known if spec.null is None else spec.null
    sizes, tokens = [m.size for m in model.modalities], [m.tokens for m in model.modalities]
    number = torch.arange(M, dtype=torch.int32)
    constants = BatchConstants(
        seeds=torch.from_numpy(seeds.view(np.int64)),
        generate=generate,
        known=known,
        null=null,
        modality=number.repeat_interleave(torch.tensor(sizes)),
        token_generate=token_mask(generate, model),
        token_modality=number.repeat_interleave(torch.tensor(tokens)),
        coefficients=torch.from_numpy(coefficients),
        indices=torch.from_numpy(indices),
    )
    return BatchConstants(*(upload(tensor, device) for tensor in constants))


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Host to device; from pinned memory, since the host would wait for the steps before it otherwise."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
