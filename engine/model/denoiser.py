"""`Denoiser`: a network bound to its table of times, all that solvers know of a model; `build` makes the network.

Shapes: R rows, L tokens, C channels, D width, N packed elements, T times.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import InputError
from engine.model.blocks import InnerCache, one_by_one
from engine.model.lora import AdapterRows, Adapters
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT


def build(config: ModelConfig) -> PSUNet | UViT:
    """A network of this config, initialised for training; raises InputError for a modality with a reserved name."""
    try:
        return PSUNet(config) if config.uvit is None else UViT(config)
    except KeyError as error:  # submodules have the modalities' names, and PyTorch's modules have some of their own
        raise InputError("modalities.name", error.args[0], "give the modality another name", "is reserved") from None


class Denoiser:
    """A network bound to its table of times.

    network       in evaluation mode, on its device and in its dtype; changing either later needs another Denoiser
    timesteps     N of the diffusion: times are 0, clean, to N, pure noise
    run_branches  runs the modalities' branches, calls that need nothing of each other, and returns their results in
                  order; `StepGraphs.run_branches` gives each a CUDA stream

    The table is made here, without gradients. Calls record gradients unless the caller turns them off.
    """

    def __init__(
        self, network: PSUNet | UViT, timesteps: int, run_branches: Callable[[list[Callable]], list] = one_by_one
    ):
        self.network, self.config, self.run_branches = network, network.config, run_branches
        device = next(network.parameters()).device
        with torch.no_grad():
            # All times at once: the sampling loop only changes indices into this table.
            self.table = network.time_table(torch.arange(timesteps + 1, device=device))  # [N+1, ·], row t for time t
        self.few_times = device.type == "cpu" and network.time.adaln  # blocks add their modulation to every row
        self._adapters: Adapters | None = None

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters of calls with `adapted`; made when first needed."""
        if self._adapters is None:
            self._adapters = Adapters(self.network)
        return self._adapters

    def free_adapters(self) -> None:
        """Frees the memory of the adapters."""
        self._adapters = None

    @property
    def can_cache(self) -> bool:
        """Whether the shared stack has blocks within an outermost pair, whose result a cache can keep."""
        return self.config.shared_depth >= 3

    def __call__(
        self,
        inputs: Tensor,
        times: Tensor,
        outputs: Iterable[str] | None = None,
        features: Mapping[str, Tensor] | None = None,
        cache: Tensor | None = None,
        refresh: Tensor | None = None,
        adapted: AdapterRows | None = None,
        temperature: Tensor | None = None,
        output_rows: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Predicts the noise (or v) of every element, of categorical modalities x̂0.

        inputs    [R, N] packed state of all modalities
        times     [R, L] int32, each token's time
        outputs   the modalities whose prediction is wanted, default all; the rest of the result is zero
        features  by modality what `branch_features` gave for these inputs and times, [depth, R, L, D]
        cache     [R, L, D] from `new_cache`, step caching: the inner blocks' last results, updated in place
        refresh   [R] bool, with a cache: the rows for which the inner blocks run and the cache is updated, the others
                  use what it holds; None: all rows use it, and the inner blocks do not run
        adapted   the adapters of the rows, by their places in `adapters`; None: no row has one
        temperature  [R, M], of the probabilities of categorical modalities; default 1
        output_rows  by modality of a PS-U-Net, of those wanted, the rows [k] int64 for which it is; default all
        returns   [R, N] in inputs' dtype
        """
        assert cache is None or self.can_cache, "no inner blocks: ask can_cache first"
        inner = None if cache is None else InnerCache(cache, refresh)
        network = self._network_of(adapted)
        given = {"temperature": temperature, "output_rows": output_rows or None}
        options = {name: value for name, value in given.items() if value is not None}  # U-ViTs have neither
        return network(inputs, *self._rows_of(times), outputs, features, inner, self.run_branches, **options)

    def branch_features(self, name: str, inputs: Tensor, times: Tensor, adapted: AdapterRows | None = None) -> Tensor:
        """The outputs of the in-blocks of one modality with depth ≥ 1, [depth, R, L, D] in the network's dtype.

        Arguments as in a call. They depend on the modality's own inputs and times alone: while these do not change, one
        call serves every step.
        """
        return self._network_of(adapted).branch_features(name, inputs, *self._rows_of(times))

    def new_cache(self, rows: int) -> Tensor:
        """Memory for `cache`, [R, L, D] in the network's dtype, L with time tokens; it holds no results yet."""
        return self.network.new_cache(rows)

    def _network_of(self, adapted: AdapterRows | None) -> PSUNet | UViT:
        return self.network if adapted is None else self.adapters.of_rows(adapted)

    def _rows_of(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(table [T, ·], index [R, L]) for the network: where it saves time, only the rows that these times have."""
        if not self.few_times:
            return self.table, times
        distinct, index = times.unique(return_inverse=True)
        return self.table[distinct], index.int()
