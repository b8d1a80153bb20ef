"""`Processes`: the processes of a run under `torchrun` or `accelerate launch`; without a launcher there is one.

Each has all weights (DDP), or they share them (FSDP2): then a parameter is a DTensor, of which each process has a part
of the rows. accelerate, which connects them, is imported only where there are several.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from engine.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

INSTALL = "pip install 'psunet-engine[train]'"
LONGEST_WAIT = timedelta(days=30)  # for the first process, which may train word vectors or an autoencoder
T = TypeVar("T")


class Processes:
    """This process's place among all; by default the only one.

    accelerator  the `accelerate.Accelerator` that connects several processes; None: there is one
    fsdp         whether several processes share the weights, instead of each having all
    """

    fsdp = False

    def __init__(self, accelerator=None, fsdp: bool = False):
        self.accelerator, self.rank, self.count = accelerator, 0, 1
        if accelerator is not None and accelerator.num_processes > 1:
            from torch import distributed

            self.rank, self.count, self.fsdp = accelerator.process_index, accelerator.num_processes, fsdp
            # For waiting and for values on the host; the other group gives up after minutes.
            self._hosts = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
            self.saving = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)  # for the thread that saves
            if fsdp:
                self._mesh_of_hosts = distributed.device_mesh.DeviceMesh.from_group(self._hosts, "cpu")

    @classmethod
    def started(cls, device: str, fsdp: bool = False) -> "Processes":
        """The processes that the launcher has started, connected; `device` as in `engine.device.resolve_device`.

        Raises ModuleNotFoundError if there are several and no accelerate; InputError about `device` if it is not one
        for each, about `processes` for backends of accelerate's configuration that are not supported.
        """
        count, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if count == 1:
            return cls()
        if find_spec("accelerate") is None:
            raise ModuleNotFoundError(f"accelerate, which connects {count} processes, is not installed; use {INSTALL}")
        for backend in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{backend}", "").lower() == "true":
                problem = "is asked for by accelerate's configuration"
                remedy = "use engine.train's --fsdp" if backend == "FSDP" else "use one of several CPUs or GPUs"
                raise InputError("processes", backend, f"{remedy}, or torchrun", problem)
        import torch
        from accelerate import Accelerator

        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        if not on_cpu and device not in ("auto", "cuda"):
            raise InputError("device", device, "use auto, cpu or cuda", f"is one device for {count} processes")
        if not on_cpu and local > torch.cuda.device_count():
            problem = f"has {torch.cuda.device_count()} CUDA devices for {local} processes"
            raise InputError("device", device, "start one process per device, or use cpu", problem)
        return cls(Accelerator(cpu=on_cpu, mixed_precision="no"), fsdp)  # autocast is `Stage`'s

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> "torch.device | None":
        """This process's own device; None: there is one process, which may take any."""
        return self.accelerator.device if self.count > 1 else None

    def on_main(self, call: Callable[[], T]) -> T | None:
        """Calls in the first process while the others wait, and returns None there.

        An error is raised in the first process; the others then end without a message.
        """
        if self.count == 1:
            return call()
        import torch
        from torch import distributed

        result, failed = None, torch.ones(1)
        try:
            if self.is_main:
                result = call()
            failed.zero_()
        finally:
            distributed.broadcast(failed, 0, group=self._hosts)
        if failed:
            raise SystemExit(2)
        return result

    def wait(self) -> None:
        """Returns once every process has called this."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier(group=self._hosts)

    def from_main(self, value: T) -> T:
        """The value that the first process has, in all."""
        if self.count == 1:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, 0, group=self._hosts)
        return values[0]

    def sum(self, values: "Tensor") -> "Tensor":
        """Adds up the values of all processes, in place."""
        if self.count > 1:
            from torch import distributed

            distributed.all_reduce(values)
        return values

    def part(self, size: int, i: int = 0, parts: int = 1) -> slice:
        """This process's samples of the i-th of `parts` micro-batches of a batch."""
        k, of = i * self.count + self.rank, parts * self.count
        return slice(size * k // of, size * (k + 1) // of)

    def parallel(self, module: "nn.Module", blocks: Iterable["nn.Module"] = ()) -> "nn.Module":
        """The module, of which a backward pass averages the gradients over the processes.

        blocks  modules in it that FSDP gathers and frees one at a time
        """
        if self.fsdp:
            return self.share(module, blocks)
        return self.accelerator.prepare_model(module) if self.count > 1 else module

    def share(self, module: "nn.Module", blocks: Iterable["nn.Module"] = ()) -> "nn.Module":
        """Shards the module's parameters over the processes, where they share them."""
        if self.fsdp:
            from torch.distributed import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.count,))
            for part in (*blocks, module):
                fully_shard(part, mesh=mesh)
        return module

    def own(self, tensor: "Tensor") -> "Tensor":
        """The part of a shared tensor that this process has; any other tensor as it is."""
        return getattr(tensor, "to_local", lambda: tensor)() if self.fsdp else tensor

    def whole(self, tensor: "Tensor") -> "Tensor":
        """The full tensor of one that may be shared; all processes call this."""
        return getattr(tensor, "full_tensor", lambda: tensor)() if self.fsdp else tensor

    def gathered(self, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """Whole tensors in the first process, on the CPU where they are shared. All call this; the others get none."""
        if not self.fsdp:
            return dict(tensors) if self.is_main else {}
        gathered = {}
        for name, tensor in tensors.items():  # one at a time on the device
            whole = self.whole(tensor.detach())
            if self.is_main:
                gathered[name] = whole.cpu()
        return gathered

    def copied(self, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """Contiguous copies on the CPU that training does not change; all processes together copy everything once.

        Of shared tensors, this process's part. The others, which all processes have, are divided among them by size.
        """
        from torch import contiguous_format
        from torch.distributed.tensor import DTensor

        copies, taken = {}, [0] * self.count  # bytes of whole tensors, by process
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
            is_shared = isinstance(tensor, DTensor)
            if not is_shared:
                process = taken.index(min(taken))
                taken[process] += tensor.nbytes
                if process != self.rank:
                    continue
            copy = self.own(tensor.detach()).to("cpu", copy=True, memory_format=contiguous_format)
            if is_shared:
                mesh, like = self._mesh_of_hosts, {"shape": tensor.shape, "stride": tensor.stride()}
                copy = DTensor.from_local(copy, mesh, tensor.placements, run_check=False, **like)
            copies[name] = copy
        return copies

    def without_averaging(self, module: "nn.Module") -> AbstractContextManager:
        """Turns off the averaging of gradients in backward passes of what `parallel` returned."""
        if self.fsdp:
            return _without_reducing(module)
        return self.accelerator.no_sync(module) if self.count > 1 else nullcontext()

    def end(self) -> None:
        if self.count > 1:
            from torch import distributed

            distributed.destroy_process_group()


@contextmanager
def _without_reducing(module):
    module.set_requires_gradient_sync(False)
    yield
    module.set_requires_gradient_sync(True)
