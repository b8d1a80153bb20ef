"""A training run: `train` runs its three stages, each of which is also a function of its own.

    images ──── train_autoencoder ──> image codec ── cache_latents ──> latents ─┐
    captions ── train_words ────────> text codec ───────────────────────────────┴─ train_denoiser ──> RUN/checkpoint

Each stage resumes where it was interrupted. A model of text alone has the two stages of captions.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from engine import checkpoint
from engine.adapters import fingerprint
from engine.codecs.codec import Codec, codec_folder, load_codec
from engine.codecs.image import ImageCodec
from engine.codecs.text import TextCodec
from engine.command import check_writable
from engine.config import Config
from engine.data.captioned import CaptionedImages
from engine.data.latents import LatentCache, cache_latents
from engine.data.record import differences, record_of
from engine.data.sketch import VARIANTS
from engine.data.sources import open_captioned
from engine.data.texts import Texts
from engine.device import DTYPES, resolve_device, resolve_dtype
from engine.errors import InputError, errors_named
from engine.files import unreadable, write_atomically
from engine.hub import name_of
from engine.model.psunet import PSUNet
from engine.model.uvit import UViT
from engine.presets import PRESETS, with_categories
from engine.processes import INSTALL, Processes
from engine.training.adapter import Lora, require_peft
from engine.training.autoencoder import train_autoencoder
from engine.training.denoiser import train_denoiser
from engine.training.evaluations import Evaluations
from engine.training.initial import initial_network
from engine.training.options import TrainOptions, image_and_text, sketch_of
from engine.training.recipes import Recipe
from engine.training.stage import StageOptions, run_lock
from engine.training.tracking import Tracker, record_start

KNOWN = "known_images"  # before the ids of images of these data sets
# What must be equal when a run is resumed, besides the settings that `Stage` checks.
RUN_OPTIONS = ("preset", "seed", "autoencoder", "init")
RUN_RECIPE = (
    "gamma", "skew", "odds", "first_caption", "joined", "reordered", "captions_alike", "repeats", "augmentation",
)  # fmt: skip


def train(options: TrainOptions) -> None:
    """Checks all that can be checked beforehand, then runs the three stages in order.

    Raises InputError; FloatingPointError if a loss is not finite; OSError if the run cannot be written;
    ModuleNotFoundError without matplotlib; what a broken matplotlib or gensim raises.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(f"matplotlib, which plots the loss curves, is not installed; use {INSTALL}")
    if options.lora:
        require_peft()
    for module in ("matplotlib.figure", "gensim.models"):  # now: a broken one would be found after hours
        import_module(module)
    config, run = options.config, options.out
    check_writable(run, ["run.json"])
    tracker = Tracker(options.log, run) if options.log else None
    processes = Processes.started(options.device, options.fsdp)
    device = processes.device or resolve_device(options.device)
    dtype = processes.from_main(processes.on_main(lambda: resolve_dtype(options.dtype, device, config.model)))
    _require_enough_samples(options.recipe, processes)
    data = _open_data(options)
    init = initial_network(options.init, config) if options.init else None
    if options.lora and with_categories(init.config, 1) != with_categories(config.model, 1):
        problem = "holds a model of another kind than the preset, which cannot be adapted"
        raise InputError("init", options.init, "use the preset it was trained with", problem)
    base = fingerprint(init.state_dict()) if options.lora else None
    with ExitStack() as stack:

        def begin() -> tuple[dict[str, list], ImageCodec | None, Evaluations | None]:
            several = f" in {processes.count} processes" if processes.count > 1 else ""
            print(f"{_sources(options)}: {data.summary()}; on {device} in {dtype}{several}")
            image = None
            if options.autoencoder and not _codec_folder(run, config, image_and_text(config)[0]).exists():
                with errors_named("autoencoder"):
                    image = _given_autoencoder(options.autoencoder, config)
            evaluations = Evaluations(options, data) if options.evaluate_every else None
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run_lock(run))
            _require_same_run(options, base)
            record = _require_same_data(data, options)
            record_start(options, device, dtype, processes.count)
            return record, image, evaluations

        record, image, evaluations = processes.on_main(begin) or (None, None, None)
        if tracker is not None:
            processes.on_main(tracker.start)
            if processes.is_main:
                stack.callback(tracker.end)
        how = StageOptions(
            device,
            dtype,
            save_every=options.save_every,
            keep=options.keep,
            compile=options.compile,
            grad_checkpointing=options.grad_checkpointing,
            tracker=tracker,
            processes=processes,
        )
        lora = Lora(options.lora, options.lora_alpha, name_of(options.init), base) if options.lora else None
        _run_stages(data, record, options, how, image, init, lora, evaluations)
    if processes.is_main:
        print(f"checkpoint: {run / 'checkpoint'}")
    processes.end()


def _open_data(options: TrainOptions) -> CaptionedImages | Texts:
    with errors_named("data"):
        if image_and_text(options.config)[0] is None:
            return Texts.open(options.data)
        data = open_captioned(options.data, options.split)
    for number, source in enumerate(options.known_images):
        with errors_named("known_images"):
            data = data.with_known(open_captioned(source, options.split), f"{KNOWN}/{number}")
    return data


def _sources(options: TrainOptions) -> str:
    return ", ".join(map(str, (options.data, *options.known_images)))


def _run_stages(
    data: CaptionedImages | Texts,
    record: dict[str, list] | None,
    options: TrainOptions,
    how: StageOptions,
    image: ImageCodec | None,
    init: PSUNet | UViT | None,
    lora: Lora | None,
    evaluations: Evaluations | None,
) -> None:
    """The three stages; `image` has the autoencoder to use and `init` the initial weights, if they were given.

    Codecs are trained by the first process alone: autoencoders of this size, and words, take minutes.
    """
    config, recipe, run = options.config, options.recipe, options.out
    image_name, text_name = image_and_text(config)
    folder = None if image_name is None else _codec_folder(run, config, image_name)
    skipped = 0 if isinstance(data, Texts) else len(data.skipped)

    def make_codecs() -> None:
        if options.init_has_codecs:
            copy_codecs(options.init, run, config)
        given = image
        if folder is not None and given is None and not folder.exists():
            given = train_autoencoder(run, data, config, recipe, how)
        if given is not None:
            _save_codec(given, folder, DTYPES[recipe.weights_dtype])
        train_words(run, data, config, options.seed)

    how.processes.on_main(make_codecs)
    any_words = with_categories(config.model, 0).modality(text_name)
    text = load_codec(run / "checkpoint", config.codecs[text_name], any_words)
    if isinstance(data, Texts):
        cache = LatentCache([], [[text] for text in data.texts])
    else:
        cache = _latents(data, record, options, how)
        if len(data.skipped) > skipped and how.processes.is_main:  # images are opened only now
            print(f"{_sources(options)}: {data.summary()}")
        if options.known_images and not cache.only_known:
            problem = "has no readable image"
            raise InputError("known_images", options.known_images[0], "give a data set with intact images", problem)
    config, cache = with_unit_sketches(config, cache)
    config = replace(config, model=with_categories(config.model, len(text.vectors)))
    train_denoiser(run, cache, text, config, recipe, how, init, lora, evaluations)


def _latents(
    data: CaptionedImages, record: dict[str, list] | None, options: TrainOptions, how: StageOptions
) -> LatentCache:
    """Encodes the images with the codec of RUN/checkpoint."""
    config, run, name = options.config, options.out, image_and_text(options.config)[0]
    codec = load_codec(run / "checkpoint", config.codecs[name], config.model.modality(name), how.device)
    folder = _codec_folder(run, config, name)
    fingerprint = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.iterdir()))).hexdigest()
    with errors_named("data"):
        return cache_latents(
            data,
            codec.encode_pixels,
            run / "latents",
            fingerprint,
            codec.size,
            options.recipe.augmentation,
            options.seed,
            record,
            processes=how.processes,
            sketches=VARIANTS if sketch_of(config) is not None else 0,
        )


def with_unit_sketches(config: Config, cache: LatentCache) -> tuple[Config, LatentCache]:
    """Both with the scale of the sketches' latents, measured; as they are for a model without sketches."""
    if (name := sketch_of(config)) is None:
        return config, cache
    cache, codec = cache.with_unit_sketches(), config.codecs[name]
    scaled = replace(codec, settings={**codec.settings, "scale": cache.sketch_scale})
    return replace(config, codecs={**config.codecs, name: scaled}), cache


def train_words(run: Path, data: CaptionedImages | Texts, config: Config, seed: int) -> None:
    """Trains the word vectors and saves them as the text codec of RUN/checkpoint, unless that exists."""
    name = image_and_text(config)[1]
    folder, modality = _codec_folder(run, config, name), config.model.modality(name)
    if not folder.exists():
        is_text = isinstance(data, Texts)
        captions = data.texts if is_text else [caption for item in data.items for caption in item.captions]
        with errors_named("data"):
            _save_codec(TextCodec.train(captions, modality.channels, seed), folder)


def _require_enough_samples(recipe: Recipe, processes: Processes) -> None:
    """Refuses batches of which a process would get no sample."""
    batch, least = recipe.denoiser.batch, processes.count * recipe.denoiser.accumulate
    if batch < least:
        problem = f"is too small for {processes.count} processes"
        raise InputError("batch", batch, f"use {least} or more, or fewer processes or micro-batches", problem)


def copy_codecs(source: Path, run: Path, config: Config) -> None:
    """Copies the codecs of the checkpoint folder `source` into RUN/checkpoint, except for those it already has.

    Left out are those of modalities that the config lacks.
    """
    file = source / "config.json"  # there is none while a run has only codecs
    codecs = (checkpoint.read_config(file) if file.exists() else config).codecs
    for name in config.codecs.keys() & codecs.keys():
        codec, folder = codecs[name], _codec_folder(run, config, name)
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            unfinished.mkdir(parents=True, exist_ok=True)
            for part in filter(Path.is_file, codec_folder(source, codec, name).iterdir()):
                shutil.copyfile(part, unfinished / part.name)  # without its mode: the source may be read-only
            unfinished.rename(folder)


def _save_codec(codec: Codec, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Saves a codec under a temporary name that is then changed: a kill leaves no partial codec."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    codec.save(unfinished, dtype)
    unfinished.rename(folder)


def _codec_folder(run: Path, config: Config, name: str) -> Path:
    return codec_folder(run / "checkpoint", config.codecs[name], name)


def _given_autoencoder(source: str, config: Config) -> ImageCodec:
    """The codec of an image modality with a given autoencoder, loaded: a damaged one is refused before any work."""
    name = image_and_text(config)[0]
    codec = ImageCodec.load(source, config.codecs[name].settings, config.model.modality(name))
    _ = codec.autoencoder  # all of it, where `build` may load a compiled decoder alone
    return codec


def _require_same_run(options: TrainOptions, base: str | None) -> None:
    """Refuses to resume a run of other settings; `Stage` checks those of the optimiser. Records the settings.

    base  the fingerprint of the weights that adapters are trained for, which no saved state has
    """
    file = options.out / "run.json"
    recorded = _recorded(file, lambda setting: isinstance(setting, str))
    settings = {key: str(getattr(options, key)) for key in RUN_OPTIONS}
    settings |= {"init": name_of(options.init)} if options.init else {}
    settings |= {key: str(getattr(options.recipe, key)) for key in RUN_RECIPE}
    if base is not None:
        settings |= {"lora": str(options.lora), "lora_alpha": str(options.lora_alpha), "base": base[:16]}
    if options.config != PRESETS[options.preset]:
        settings["config"] = hashlib.sha256(json.dumps(options.config.to_dict()).encode()).hexdigest()[:16]
    if recorded not in (None, settings):
        raise InputError("out", options.out, "use another folder", f"holds a run with {recorded}, not {settings}")
    write_atomically(file, lambda p: p.write_text(json.dumps(settings) + "\n"))


def _require_same_data(data: CaptionedImages | Texts, options: TrainOptions) -> dict[str, list]:
    """Refuses to resume a run whose images or captions have changed. Records them; returns the record."""
    file = options.out / "data.json"
    recorded = _recorded(file, lambda entry: isinstance(entry, list) and len(entry) == 4)
    if isinstance(data, Texts):
        record = data.record()
        changes = {"data": "" if recorded == record else "the texts have changed"}
    else:
        record = record_of(data, recorded)
        parts = [_own_and_known(recorded or record), _own_and_known(record)]
        changes = dict(zip(("data", "known_images"), map(differences, *parts), strict=True))
    for argument, changed in changes.items():
        if recorded and changed:
            known = argument == "known_images"
            value = (", ".join(map(str, options.known_images)) or "none") if known else options.data
            remedy = "give the same in the same order" if known else "restore it"
            remedy += ", or start a run in another folder, with --init to continue from this one's checkpoint"
            raise InputError(argument, value, remedy, f"is not what this run began with: {changed}")
    write_atomically(file, lambda p: p.write_text(json.dumps(record) + "\n"))
    return record


def _own_and_known(record: dict[str, list]) -> tuple[dict[str, list], dict[str, list]]:
    """A record's entries of the data itself, and those of the data sets of known images."""
    known = {name: entry for name, entry in record.items() if name.startswith(f"{KNOWN}/")}
    return {name: entry for name, entry in record.items() if name not in known}, known


def _recorded(file: Path, is_value: Callable[[object], bool]) -> dict | None:
    """The object in a JSON file of the run, whose values must be such; None if there is none yet."""
    try:
        content = json.loads(file.read_text()) if file.exists() else None
        if content is not None and not (isinstance(content, dict) and all(map(is_value, content.values()))):
            raise ValueError("it does not hold what a run records")
        return content
    except OSError as error:
        raise unreadable("out", file, error, "give another folder") from None
    except (ValueError, RecursionError) as error:
        raise InputError("out", file, "delete it to resume with these options", f"cannot be read ({error})") from None
