"""`Engine`: the whole flow of a request, from what is given through codecs and sampler and back."""

import resource
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from os import PathLike
from queue import SimpleQueue
from typing import overload

import torch
from torch import Tensor

from engine.adapters import fingerprint, read_adapter
from engine.checkpoint import BUILT_IN, Checkpoint, load, read_network
from engine.codecs.codec import Codec, Decoded, Given
from engine.decoding import Decoder, on_arrival, results_of, sample_of
from engine.device import check_quantization, resolve_device, resolve_dtype
from engine.errors import InputError
from engine.kernels import backend
from engine.model.denoiser import Denoiser
from engine.model.lora import Adapter
from engine.preparation import PreparedRequest, encoded, encoded_null, known_patterns, prepare, settle
from engine.request import ATTENTIONS, MAX_NAME, MAX_NUM, OnPreview, OnStep, Request, Result, Stats, Watch, is_whole
from engine.sampling.graphs import StepGraphs, set_up
from engine.sampling.preview import Preview
from engine.sampling.sampler import NotFiniteError, Sampler
from engine.sampling.worker import check_process, drive, in_own_thread

NOT_FINITE = "NaN or infinity; use less guidance, or an autoencoder of other weights"


class Engine:
    """A loaded model that samples. Make one with `Engine.from_pretrained`, not directly; close it, or use a `with`.

    Several threads may call it: their samples share the slots of one batch, which one worker thread computes.
    """

    def __init__(
        self, loaded: Checkpoint, device: torch.device, dtype: torch.dtype, max_rows: int = 64, graphs: bool = True,
        compile: bool = False, attention: str = "auto", quantize: str = "none",
    ):  # fmt: skip
        """Arguments after `dtype` as in `from_pretrained`."""
        self.config, self.device, self.dtype, self.max_rows = loaded.config, device, dtype, max_rows
        self.codecs: dict[str, Codec] = {name: loaded.codec(name, device) for name in loaded.config.codecs}
        self._lock, self._seconds, self._built = threading.Lock(), [0.0, 0.0, 0.0], False
        self._adapters: dict[str, Adapter] = {}
        self.folder, self._fingerprint = loaded.folder, ""  # of the weights; made when an adapter is loaded
        network = loaded.network.to(device, dtype)
        set_up(network, device, compile, attention, quantize, [codec.build for codec in self.codecs.values()])
        cuda = device.type == "cuda"
        if compile and not cuda:
            for codec in self.codecs.values():
                codec.build(compile=True)
        captured = StepGraphs(device) if cuda and graphs else None
        branches = {} if captured is None else {"run_branches": captured.run_branches}
        self._denoiser: Denoiser | None = Denoiser(network, self.config.diffusion.timesteps, **branches)
        if cuda and (compile or graphs):  # every size of batch is compiled or captured by itself, so there are few
            buckets: Sequence[int] = [2**i for i in range(max_rows.bit_length()) if 2**i < max_rows] + [max_rows]
            self._warm_sizes = [*buckets]
        else:  # one code for all sizes
            buckets, self._warm_sizes = range(1, max_rows + 1), []
        self._sampler = Sampler(self._denoiser, self.config.model, device, buckets=buckets, graphs=captured)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | PathLike | None = None,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        attention: str = "auto",
        compile: bool = False,
        graphs: bool = True,
        max_rows: int = 64,
        quantize: str = "none",
        adapters: Mapping[str, str | PathLike] | None = None,
    ) -> "Engine":
        """Loads a checkpoint: a folder, or "owner/name" on the Hugging Face hub; default the built-in one.

        revision   of the hub: branch, tag or commit; "owner/name@revision" says the same
        device     "auto", "cpu", "cuda" or "cuda:N"
        dtype      "auto" (bfloat16 on a GPU that has it, and on a CPU where it is measured 1.2 times as fast for the
                   model's shapes; else float32), "float32", "bfloat16" or "float16", or such a torch dtype; the
                   sampler's state stays float32
        attention  "auto" (the fastest measured), "sdpa", "triton" or "xformers", the last two on CUDA only
        compile    on CUDA, torch.compile of the transformer blocks, at the first forward of each shape; on a CPU,
                   compiles what is missing of blocks and decoders ahead of time, for later engines too
        graphs     on CUDA, captures each kind of step in a CUDA graph when it first comes, and replays it from then on
        max_rows   samples computed together
        quantize   "fp8" keeps the weights of each block's four large products in 8 bits; needs an NVIDIA GPU that has
                   such products. "none" leaves them in dtype
        adapters   folders of LoRA adapters by name, see `load_adapter`
        Raises InputError, naming the argument or the damaged file, and RuntimeError in a process that was forked from
        one in which an engine had been made.
        """
        if attention not in ATTENTIONS:
            raise InputError("attention", attention, f"use one of {', '.join(ATTENTIONS)}", "is not known")
        check_process()
        if not is_whole(max_rows) or not 1 <= max_rows <= 65_536:
            raise InputError("max_rows", max_rows, "use a whole number from 1 to 65536")
        where = resolve_device(device)
        backend.check("attention", attention, where.type)
        check_quantization(quantize, where)
        if adapters is not None and not isinstance(adapters, Mapping):
            raise InputError("adapters", adapters, "give a dict of names and folders", "is not a mapping")

        def make() -> Engine:
            loaded = load(BUILT_IN if checkpoint is None else checkpoint, revision)
            what = resolve_dtype(dtype, where, loaded.config.model)
            engine = cls(loaded, where, what, int(max_rows), graphs, compile, attention, quantize)
            for name, folder in (adapters or {}).items():
                engine.load_adapter(name, folder)
            return engine

        return in_own_thread(make)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._sampler.worker.closed

    def close(self) -> None:
        """Frees the model, after the step that is under way; the engine cannot be used afterwards.

        Calls that are not done raise EngineClosed in their own threads.
        """
        self._sampler.close()
        self._denoiser = self._sampler.denoiser = None
        self.codecs = {}

    def load_adapter(self, name: str, folder: str | PathLike) -> None:
        """Reads a LoRA adapter that `Request(adapter=name)` asks for from now on, also while other requests run.

        folder  that `engine.train --lora` or peft has written
        Samples with any adapters, and without, share their steps. Steps with an adapter run on blocks that are neither
        compiled nor in packages; others are as before. One of the same name is replaced: requests that were submitted
        before keep it. Raises EngineClosed, and InputError about "name", or about "adapter" if that does not fit.
        """
        self._sampler.worker.check()
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            raise InputError("name", name, f"give a string of 1 to {MAX_NAME} printable characters", "is not a name")
        # Of the file's weights: those of the network may be of another dtype, or in 8 bits.
        self._fingerprint = self._fingerprint or fingerprint(read_network(self.folder, self.config.model).state_dict())
        self._adapters[name] = read_adapter(folder, self.config.model, self._fingerprint)

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; requests that were submitted before keep it. Raises InputError if there is none."""
        if not isinstance(name, str) or self._adapters.pop(name, None) is None:
            raise InputError("name", name, f"use one of {', '.join(self.adapters) or 'none'}", "is not loaded")

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that are loaded."""
        return sorted(self._adapters)

    @overload
    def generate(self, requests: Request, callback: OnStep = None) -> Result: ...
    @overload
    def generate(self, requests: Sequence[Request], callback: OnStep = None) -> list[Result]: ...

    def generate(self, requests: Request | Sequence[Request], callback: OnStep = None) -> Result | list[Result]:
        """Samples one request, or several of any tasks together, and waits for them; interrupted, it cancels them.

        callback  called in this thread as `callback(steps done, steps in all)` after every step that some of the
                  samples took part in, the steps of all samples counted; raise from it to cancel
        Returns a Result, or a list of them in the requests' order. Raises as `submit` and its future.
        """
        self._sampler.worker.check_waiting()
        if callback is not None and not callable(callback):
            raise InputError("callback", callback, "give a function of two numbers", "cannot be called")
        counts: SimpleQueue = SimpleQueue()
        future = self.submit(requests, None if callback is None else lambda *count: counts.put(count))
        try:
            if callback is not None:
                future.add_done_callback(lambda _: counts.put(None))
                while (count := counts.get()) is not None:
                    callback(*count)
            return future.result()
        finally:
            future.cancel()  # without effect on one that is done

    @overload
    def submit(self, requests: Request, progress: OnStep = None, *, priority: int = 0,
               preview: OnPreview = None, preview_every: int = 1) -> Future[Result]: ...  # fmt: skip
    @overload
    def submit(self, requests: Sequence[Request], progress: OnStep = None, *, priority: int = 0,
               preview: OnPreview = None, preview_every: int = 1) -> Future[list[Result]]: ...  # fmt: skip

    def submit(
        self,
        requests: Request | Sequence[Request],
        progress: OnStep = None,
        *,
        priority: int = 0,
        preview: OnPreview = None,
        preview_every: int = 1,
    ) -> Future:
        """Starts sampling one request, or several of any tasks together, and returns a future of what `generate` does.

        progress  called on the engine's thread as `progress(steps done, steps in all)`; it has to return at once, since
                  all samples wait for it. What it raises, the future raises
        priority  samples that wait for a slot enter in the order of their priorities, the highest first
        preview   called like `progress`, after every `preview_every` steps of a sample but the last, with what x̂0
                  decodes to by sample, counted over all requests: of the generated modalities those that have begun.
                  Decoding takes the engine's time, and changes no result. What it raises is dropped

        Callbacks of the future (`add_done_callback`) run on the engine's thread too. Like `progress` they may `submit`,
        but not wait for the engine.

        Cancelling the future, at any time before it is done, frees its slots before the next step. Requests are read
        and checked in this thread: raises InputError before anything is computed if one of them cannot be served,
        EngineClosed if the engine is closed, and RuntimeError if it was made before a fork. The future raises
        NotFiniteSamplesError, whose `results` hold all other samples, if some are not finite, torch.OutOfMemoryError if
        memory does not suffice for a single sample, EngineClosed if the engine is closed meanwhile, and what the model
        raised where it fails; other calls' samples are not affected.
        """
        started = time.perf_counter()
        watch = Watch(progress, priority, preview, preview_every)
        if not isinstance(requests, Request | Iterable):
            raise InputError("requests", requests, "give a Request or a list of them", "is not a Request")
        listed = [requests] if isinstance(requests, Request) else list(requests)
        for other in listed:
            if not isinstance(other, Request):
                raise InputError("requests", other, "give a Request or a list of them", "is not a Request")
        denoiser, codecs = self._denoiser, self.codecs  # first, since the engine may be closed at any moment
        self._sampler.worker.check()
        assert denoiser is not None, "only a closed engine has none"
        prepared = [prepare(r, self.config, codecs, denoiser.can_cache, self._adapters) for r in listed]
        self._build(codecs)  # now, since a damaged file is to be reported before the sampling, not after
        return drive(self._flow(prepared, codecs, watch, isinstance(requests, Request), started))

    def _flow(
        self, prepared: list[PreparedRequest], codecs: dict[str, Codec], watch: Watch, alone: bool, started: float
    ):
        """Requests to results, as a generator: each `yield` waits for the worker."""
        if not prepared:
            return []
        model = self.config.model
        known = {}
        for m in model.modalities:
            given = [p.given[m.name] for p in prepared]
            known[m.name] = yield from encoded(self._sampler, m, codecs[m.name], given)  # [n, L·C]
        null = yield from encoded_null(self._sampler, prepared, self.config, codecs)
        values = torch.cat([known[m.name] for m in model.modalities], dim=1)  # [n, N]
        owners = [(i, p, seed) for i, p in enumerate(prepared) for seed in p.seeds]
        usable = values.isfinite().all(1)  # [n]
        values[~usable] = 0
        # Why samples are not finite, by their positions.
        failed = {k: f"what is given is encoded as {NOT_FINITE}" for k, (i, _, _) in enumerate(owners) if not usable[i]}
        arrivals = [on_arrival(p, codecs) for p in prepared]
        specs = [p.spec(seed, values[i], null, arrivals[i]) for i, p, seed in owners]
        begun = self._count(0, started)

        self._sampler.worker.check()  # it may have been closed meanwhile
        try:
            preview = watch.preview
            show = None if preview is None else (lambda found: drive(self._preview(found, owners, codecs, preview)))
            states = yield self._sampler.submit(
                specs, watch.progress, priority=watch.priority, preview=show, preview_every=watch.preview_every
            )  # [B, N]
        except NotFiniteError as error:
            states = error.states
            failed |= dict.fromkeys(set(error.positions) - failed.keys(), str(error))
        sampled = self._count(1, begun)

        outputs: list[dict[str, Decoded]] = [{} for _ in owners]
        for m in model.modalities:
            pairs = [(x, p.given[m.name]) for x, (_, p, _) in zip(states, owners, strict=True)]
            for k, decoded in enumerate((yield self._decoded(m.name, codecs, pairs))):
                outputs[k][m.name] = decoded
                if decoded.value is None:
                    failed.setdefault(k, f"the {m.name} is decoded as {NOT_FINITE}")
        self._count(2, sampled)
        results = results_of(prepared, outputs, failed)
        return results[0] if alone else results

    def _decoded(self, name: str, codecs: dict[str, Codec], pairs: Sequence[tuple[Tensor, Given]]) -> Future:
        """A future of a modality's values in packed states [N], each with what was given of it."""
        part = self.config.model.state_slices[name]
        decoder = Decoder(codecs[name], self.config.model.modality(name), (part.start, part.stop))
        return self._sampler.call(decoder, pairs)

    def _preview(self, found: list[Preview], owners, codecs: dict[str, Codec], show: Callable):
        """Decodes samples in progress for the caller's `preview`; a generator like `_flow`."""
        outputs: dict[int, dict[str, Decoded]] = {}
        found = [p for p in found if p.x0.isfinite().all()]  # the future reports the others
        for m in self.config.model.modalities:
            begun = [p for p in found if m.name in p.modalities]
            pairs = [(p.x0, owners[p.position][1].given[m.name]) for p in begun]
            for p, decoded in zip(begun, (yield self._decoded(m.name, codecs, pairs)), strict=True):
                if decoded.value is not None:
                    outputs.setdefault(p.position, {})[m.name] = decoded
        if outputs:
            show({i: sample_of(owners[i][2], output) for i, output in outputs.items()})

    def warmup(self, batch: int = 1) -> None:
        """Runs a step of every task with and without guidance, so that nothing is loaded, compiled or captured later.

        batch  samples that will come together; sizes that are compiled or captured apart are all done up to this one
        Shows its progress on a terminal. Steps that use a step cache are captured when they first come, and all steps
        again when a request has 64 or more of them, since the memory of all tables then grows. Raises InputError if the
        batch is more than `max_rows`.
        """
        from tqdm import tqdm

        if not is_whole(batch) or not 1 <= batch <= self.max_rows:
            raise InputError("batch", batch, f"use 1 to max_rows, {self.max_rows}", "is out of range")
        self._sampler.worker.check_waiting()
        self._sampler.worker.check()
        # The largest first: the smaller ones fit into its memory.
        sizes = [batch, *(rows for rows in reversed(self._warm_sizes) if rows < batch)]
        patterns = known_patterns(self.config, self.codecs)
        kinds = [(rows, given, order, w) for rows in sizes for given, order in patterns for w in (1.0, 2.0)]
        self._build(self.codecs)
        for rows, given, order, w in tqdm(kinds, desc="warm-up", unit="kind of step", disable=None):
            parts = [min(MAX_NUM, rows - i) for i in range(0, rows, MAX_NUM)]
            requests = [Request(num=num, steps=2, guidance=w, order=order) for num in parts]
            prepared = [settle(request, given, self.config) for request in requests]
            drive(self._flow(prepared, self.codecs, Watch(), alone=False, started=time.perf_counter())).result()

    def stats(self) -> Stats:
        """What all calls so far have done together."""
        sampler = self._sampler
        flops, moved = sampler.work(self.dtype.itemsize)
        replays = sampler.graphs.replays if sampler.graphs else 0
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        prepare, sample, decode = self._seconds
        return Stats(sampler.forwards, replays, sampler.finished, flops, moved, prepare, sample, decode, memory)

    def _build(self, codecs: dict[str, Codec]) -> None:
        """Builds the codecs, unless they are built."""
        if not self._built:
            for codec in codecs.values():
                in_own_thread(codec.build)
            self._built = True

    def _count(self, stage: int, since: float) -> float:
        """Adds the seconds since then to a stage's; returns the time."""
        now = time.perf_counter()
        with self._lock:
            self._seconds[stage] += now - since
        return now
