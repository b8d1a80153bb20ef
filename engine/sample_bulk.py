"""Thousands of samples for evaluation, by one process or several: `python -m engine.sample --prompts FILE --num N`.

Sample i has the seed SEED + i and its own files, see `engine.data.sample_files`. The processes of a run (RANK and
WORLD_SIZE, as torchrun sets them) each make a part without communicating (so not as `engine.processes`), and skip
finished samples: the same command again makes those that are missing, with any number of processes.
"""

import argparse
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from engine.codecs.words import HOLE, tokenize
from engine.command import check_writable
from engine.data.prompts import read_prompts
from engine.data.sample_files import FileWriter, SampleFiles, ShardWriter
from engine.data.sources import open_captioned
from engine.errors import InputError, errors_named
from engine.files import files_within
from engine.images import images_up_to_the_limit, open_image
from engine.request import ADAPTER, MAX_SEED, NotFiniteSamplesError, Request, Result
from engine.runtime import Engine
from engine.sample_folder import is_image

MAX_BULK, MAX_BATCH = 10_000_000, 65_536
# Options of runs that are not in bulk.
SINGLE = ("prompt", "image", "mask", "sketch", "sketch_mask", "input", "input_mask", "json")
SETTINGS = ("steps", "solver", "spacing", "eta", "order", "guidance", "guidance_kind", "guidance_interval",
            "step_cache", "resample", "jump", "infill", "inner_steps", "step_size", "unknown_words",
            "task", "temperature")  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What one sample is made from, and what its .json records of that."""

    given: dict  # arguments of Request; an image as `CaptionedImage`
    facts: dict


@dataclass(frozen=True)
class Source:
    """Where the samples of a run come from."""

    settings: dict  # all that `wanted` depends on
    count: int
    wanted: Callable[[int], Wanted]
    note: str = ""  # for the log


def run_bulk(options: argparse.Namespace) -> int:
    """Makes this process's part of a run; returns the exit status. Raises InputError."""
    for key in SINGLE:
        if getattr(options, key):
            raise InputError(key, getattr(options, key), "leave it out", "cannot be used in a bulk run")
    for key, lowest, highest in (
        ("num", 1, MAX_BULK), ("joint", 1, MAX_BULK), ("shards", 0, 100_000), ("batch", 1, MAX_BATCH)
    ):  # fmt: skip
        value = getattr(options, key)
        if value is not None and not lowest <= value <= highest:
            raise InputError(key, value, f"use a whole number from {lowest} to {highest}", "is out of range")
    if options.joint is not None and options.num is not None:
        raise InputError("num", options.num, "leave it out", "conflicts with joint, which has a number")
    process, processes = _process()
    settings = {key: getattr(options, key) for key in SETTINGS}
    interval = settings["guidance_interval"]
    settings["guidance_interval"] = tuple(interval) if interval else None
    if options.adapter or options.adapter_scale != 1:
        settings |= {"adapter": options.adapter and ADAPTER, "adapter_scale": options.adapter_scale}
    Request(seed=options.seed, **settings | {"task": "auto"})  # checks all before the model is loaded
    check_writable(options.out)
    with Engine.from_pretrained(
        options.checkpoint, device=_device(options.device), dtype=options.dtype, attention=options.attention,
        compile=options.compile, graphs=not options.no_graphs, max_rows=options.batch, quantize=options.quantize,
        adapters={ADAPTER: options.adapter} if options.adapter else None,
    ) as engine:  # fmt: skip
        source = _source(options, engine)
        if options.seed + source.count - 1 > MAX_SEED:
            raise InputError("seed", options.seed, f"use at most {MAX_SEED + 1 - source.count}", "is too large")
        if options.shards > source.count:
            raise InputError("shards", options.shards, f"use at most {source.count}", "are more than samples")
        files = SampleFiles(options.out, source.count, options.shards)
        model = {"checkpoint": _digest(engine.folder), "quantize": options.quantize}
        if options.adapter:
            model["adapter"] = _digest(options.adapter)
        files.begin({**source.settings, "seed": options.seed, **settings, **model})
        if source.note and not options.quiet and process == 0:
            print(source.note, flush=True)
        making = _Making(engine, source, options.seed, settings, options.batch)
        return _make_share(making, files, process, processes, options.quiet)


def _process() -> tuple[int, int]:
    """This process's number and how many there are."""
    found = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")):
        value = os.environ.get(name, default)
        if not value.isdecimal():
            raise InputError(name, value, "use a whole number, or leave it unset", "is not a number of processes")
        found.append(int(value))
    if found[0] >= found[1]:
        raise InputError("RANK", found[0], f"use 0 to {found[1] - 1}", f"is not below WORLD_SIZE, {found[1]}")
    return found[0], found[1]


def _device(name: str) -> str:
    """Of several CUDA devices that of this process."""
    import torch

    if name in ("auto", "cuda") and torch.cuda.is_available() and os.environ.get("LOCAL_RANK", "").isdecimal():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return name


def _digest(folder: Path) -> str:
    """Of the contents of the files of a checkpoint or an adapter."""
    found = hashlib.sha256()
    for file in (path for path in files_within(folder) if path.suffix in (".json", ".safetensors")):
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def _source(options: argparse.Namespace, engine: Engine) -> Source:
    if options.prompts:
        return _prompts(options, engine)
    if options.images:
        return _images(options)
    return Source({"joint": True}, options.joint, lambda i: Wanted({}, {}))


def _prompts(options: argparse.Namespace, engine: Engine) -> Source:
    """An image of each prompt, of which the model takes as many words as it has."""
    prompts = read_prompts(options.prompts)
    count = options.num or len(prompts.items)
    chosen = prompts.of_run(count, options.seed)
    codec = engine.codecs.get("text")
    if codec is None:
        raise InputError("prompts", options.prompts, "use a checkpoint with one", "needs a modality named text")
    texts: dict[str, str] = {}  # what the model is given, by prompt
    for prompt in chosen:
        if prompt.text not in texts:
            words = [word for word in tokenize(prompt.text) if word != HOLE or not prompts.drawn]
            texts[prompt.text] = " ".join(words[: codec.tokens])
            try:
                codec.read(texts[prompt.text], "prompts", unknown_words=options.unknown_words)
            except InputError as error:
                problem = f"(prompt {prompt.line} of {options.prompts.name}) {error.problem}"
                raise InputError("prompts", error.value, error.remedy, problem) from None

    def wanted(i: int) -> Wanted:
        prompt, text = chosen[i], texts[chosen[i].text]
        known = {} if HOLE in text.split() else {"caption": prompt.text}
        return Wanted({"prompt": text}, {"prompt": text, **known, "image_id": prompt.image_id})

    cut = sum(len(tokenize(prompt)) > codec.tokens for prompt in texts)
    left_out = f", {prompts.skipped} captions without a word left out" if prompts.skipped else ""
    note = f"{count} samples of {len(texts)} prompts, {cut} cut to {codec.tokens} words{left_out}"
    return Source({"prompts": prompts.digest}, count, wanted, note)


def _images(options: argparse.Namespace) -> Source:
    """A text of each image, evenly spaced ones of all if fewer are wanted."""
    with errors_named("images"):
        data = open_captioned(options.images, options.split)
    count = options.num or len(data.items)
    items = [data.items[i * len(data.items) // count] for i in range(count)]  # several texts of one if more are wanted

    def wanted(i: int) -> Wanted:
        return Wanted({"image": items[i]}, {"image_id": items[i].image_id, "file_name": items[i].path.name})

    ids = hashlib.sha256(json.dumps([item.image_id for item in items]).encode()).hexdigest()
    return Source({"images": ids}, count, wanted)


@dataclass
class _Making:
    """From numbers of samples to their files."""

    engine: Engine
    source: Source
    seed: int
    settings: dict
    batch: int

    def files_of(self, indices: Sequence[int]) -> Iterator[tuple[int, dict[str, bytes]]]:
        """The files of each sample in turn; while one batch is written, the next is computed."""
        batches = [indices[i : i + self.batch] for i in range(0, len(indices), self.batch)]
        ahead = None
        for batch in [*batches, None]:
            current, ahead = ahead, self._submit(batch) if batch else None
            if current is not None:
                yield from self._finished(*current)

    def _finished(self, wanted: dict[int, Wanted], errors: dict[int, str], future: Future) -> Iterator:
        try:
            results = future.result()
        except NotFiniteSamplesError as error:
            results = error.results
        by_seed = {sample.seed: (result, sample) for result in results for sample in result.samples}
        for i, what in wanted.items():
            found = by_seed.get(self.seed + i)
            error = errors.get(i, "the sample is NaN or infinity")
            yield i, self._files(i, what, *found) if found else self._failed(i, what, error)

    def _submit(self, batch: Sequence[int]) -> tuple[dict[int, Wanted], dict[int, str], Future]:
        wanted, errors, requests = {i: self.source.wanted(i) for i in batch}, {}, []
        for i, what in wanted.items():
            try:
                with images_up_to_the_limit():
                    given = {k: open_image(v.source()) if k == "image" else v for k, v in what.given.items()}
            except InputError as error:  # a damaged image of a data set
                errors[i] = str(error)
                continue
            requests.append(Request(**given, seed=self.seed + i, **self.settings))
        return wanted, errors, self.engine.submit(requests)

    def _files(self, i: int, what: Wanted, result: Result, sample) -> dict[str, bytes]:
        given = {"prompt": "text", "image": "image"}
        known = {given[key] for key in what.given if key == "image" or "caption" in what.facts}
        outputs = {name: value for name, value in sample.outputs.items() if name not in known}
        text = what.facts.get("caption", sample.outputs.get("text"))
        facts = {
            "index": i, "seed": sample.seed, "task": result.task, **what.facts, "generated": sorted(outputs),
            "text": sample.outputs.get("text"), "guidance": result.guidance, "order": list(result.order) or "together",
            "dtype": str(self.engine.dtype).removeprefix("torch."),
        }  # fmt: skip
        files = {"json": _json(facts)}
        if text is not None:
            files["txt"] = text.encode(errors="replace")  # of lone surrogates, as JSON may have
        for name, value in outputs.items():
            if is_image(value):
                stream = io.BytesIO()
                value.save(stream, "PNG")
                files["png" if name == "image" else f"{name}.png"] = stream.getvalue()
        return files

    def _failed(self, i: int, what: Wanted, error: str) -> dict[str, bytes]:
        return {"json": _json({"index": i, "seed": self.seed + i, **what.facts, "error": error})}


def _json(facts: dict) -> bytes:
    return (json.dumps(facts, ensure_ascii=False) + "\n").encode(errors="backslashreplace")  # \ud800, as JSON has it


def _make_share(making: _Making, files: SampleFiles, process: int, processes: int, quiet: bool) -> int:
    """Writes what is missing of this process's part."""
    parts: list[tuple[Callable[[], AbstractContextManager[FileWriter | ShardWriter]], range]]
    if files.shards:
        mine = range(process, files.shards, processes)
        missing = [shard for shard in mine if not files.shard_file(shard).is_file()]
        parts = [(lambda s=shard: files.shard_writer(s), files.shard_range(shard)) for shard in missing]
        total = sum(len(files.shard_range(shard)) for shard in mine)
    else:
        mine = range(process, files.count, processes)
        parts, total = [(lambda: files.writer(process), mine)], len(mine)
    done = total - sum(len(indices) for _, indices in parts)
    made, failed, started = 0, 0, time.perf_counter()
    name = "sampling" if processes == 1 else f"process {process} of {processes}"
    with tqdm(desc=name, total=total, initial=done, unit="sample", disable=quiet or None, mininterval=1) as bar:
        for open_writer, indices in parts:
            with open_writer() as writer:
                left = _left(files, writer, indices)
                bar.update(len(indices) - len(left))
                for i, of_sample in making.files_of(left):
                    writer.write(i, of_sample)
                    bar.update()
                    made += 1
                    failed += "txt" not in of_sample and "png" not in of_sample
    if not quiet:
        seconds = time.perf_counter() - started
        print(f"{name}: {made} samples made and {total - made} found in {files.folder}, {made / seconds:.2f} samples/s")
    if failed:
        problem = f"{failed} samples could not be made; their .json files say why"
        raise InputError(
            "out", files.folder, "leave out damaged images, or use less guidance", f"is written, but {problem}"
        )
    return 0


def _left(files: SampleFiles, writer: FileWriter | ShardWriter, indices: Iterable[int]) -> list[int]:
    """The samples of a part that are not there yet."""
    if isinstance(writer, ShardWriter):
        return [i for i in indices if i >= writer.next]
    finished = files.finished()
    return [i for i in indices if i not in finished]
