"""`TrainOptions`: what a training run is made from, checked. Imports no torch."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import CodecConfig, Config
from engine.errors import InputError
from engine.files import is_file, is_folder
from engine.hub import local_folder
from engine.presets import PRESETS
from engine.request import MAX_ALPHA, is_number
from engine.training.recipes import RECIPES, Recipe

MAX_RANK = 1024  # of adapters
MAX_STEPS, MAX_BATCH = 1_000_000_000, 65_536  # of a stage, of a step: far above anything useful
MAX_SEED = (1 << 32) - 1  # gensim takes no more than 32 bits
DTYPES = ("auto", "float32", "bfloat16", "float16")
SKETCH = "sketch"  # the modality that is drawn from the image, see `engine.data.sketch`
TRACKERS = ("tensorboard", "wandb", "trackio")
WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")  # how names of files of weights end


@dataclass(frozen=True)
class TrainOptions:
    """A training run; `python -m engine.train` has an option for each field down to `dtype`.

    Raises InputError for values that cannot be used. After the checks `config` and `recipe` are never None, and the
    recipe has the steps, batch and so on that were given.
    """

    data: Path  # MS-COCO captions layout (captions.json alone for a model of text), tar files, or their pattern
    out: Path  # folder of the run; a run found there is resumed
    preset: str = "emoji"  # name of the config and of the recipe
    autoencoder: str | None = None  # a trained diffusers autoencoder: a folder or a hub id; None: train one
    init: Path | None = None  # start from this checkpoint folder (or owner/name on the hub) or file of U-ViT weights
    init_heads: int | None = None  # attention heads of a weights file, also those of the run; None: the preset's
    lora: int | None = None  # train adapters of this rank on the blocks of `init`, a checkpoint; None: all weights
    lora_alpha: float | None = None  # the adapters are scaled by alpha / rank; None: alpha is the rank
    steps: int | None = None  # optimiser steps of the denoiser; None: the recipe's, like the next four
    batch: int | None = None  # samples per step of the denoiser
    learning_rate: float | None = None  # of the denoiser
    accumulate: int | None = None  # micro-batches per step of the denoiser
    autoencoder_steps: int | None = None  # optimiser steps of the autoencoder; None: the recipe's, like the next one
    autoencoder_learning_rate: float | None = None
    save_every: int = 250  # steps between saves of the state, with sample images
    evaluate_every: int | None = None  # steps between scores on the data's test split, a multiple of save_every
    evaluate_samples: int | None = None  # images drawn and described for further scores at each of these steps
    keep: int = 1  # saved states of a stage that are kept
    compile: bool = False  # torch.compile of the denoiser
    fsdp: bool = False  # processes share weights, gradients and optimiser state (FSDP2); each has all without it
    log: str | None = None  # report the denoiser's training to one of TRACKERS
    grad_checkpointing: bool = False  # compute the denoiser's blocks again in the backward pass: less memory
    split: str = "train"  # of the data
    known_images: tuple[Path, ...] = ()  # further data sets, whose images are described and never drawn
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"  # of the arithmetic, one of DTYPES; the weights stay float32
    config: Config | None = None  # instead of the preset's
    recipe: Recipe | None = None  # instead of the preset's

    def __post_init__(self):
        for key in ("data", "out", "init"):
            value = getattr(self, key)
            object.__setattr__(self, key, None if value is None else Path(value))
        known = self.known_images
        if not isinstance(known, list | tuple) or not all(isinstance(source, str | Path) for source in known):
            raise InputError("known_images", known, "give a list of them", "is not a list of folders")
        object.__setattr__(self, "known_images", tuple(map(Path, known)))
        if self.preset not in PRESETS:
            raise InputError("preset", self.preset, f"use one of {', '.join(PRESETS)}", "is not known")
        if self.dtype not in DTYPES:
            raise InputError("dtype", self.dtype, f"use one of {', '.join(DTYPES)}", "is not known")
        if self.log not in (None, *TRACKERS):
            raise InputError("log", self.log, f"use one of {', '.join(TRACKERS)}", "is not known")
        for key in ("steps", "autoencoder_steps"):
            self._require_whole(key, 1, MAX_STEPS, optional=True)
        for key in ("batch", "accumulate"):
            self._require_whole(key, 1, MAX_BATCH, optional=True)
        for key in ("save_every", "keep"):
            self._require_whole(key, 1, MAX_STEPS)
        self._require_whole("evaluate_every", 1, MAX_STEPS, optional=True)
        if self.evaluate_every is not None and self.evaluate_every % self.save_every:
            remedy = f"use a multiple of {self.save_every}, or change save_every"
            raise InputError("evaluate_every", self.evaluate_every, remedy, "is not a multiple of save_every")
        self._require_whole("evaluate_samples", 2, MAX_STEPS, optional=True)
        if self.evaluate_samples is not None and self.evaluate_every is None:
            problem = "needs evaluate_every"
            raise InputError("evaluate_samples", self.evaluate_samples, "give both, or leave it out", problem)
        self._require_whole("seed", 0, MAX_SEED)
        for key in ("learning_rate", "autoencoder_learning_rate"):
            rate = getattr(self, key)
            if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):  # also NaN
                raise InputError(key, rate, "use a number above 0", "is out of range")
        if self.init is not None:
            if self.init.suffix not in WEIGHTS:  # names of missing files are not looked up on the hub
                object.__setattr__(self, "init", local_folder(self.init, "init"))
            _check_init(self.init)
        self._check_lora()
        object.__setattr__(self, "config", self._with_heads(self.config or PRESETS[self.preset]))
        object.__setattr__(self, "recipe", self._changed(self.recipe or RECIPES[self.preset]))
        has_images = image_and_text(self.config)[0] is not None
        if not has_images and self.evaluate_every is not None:
            problem = "needs a model of images and texts"
            raise InputError("evaluate_every", self.evaluate_every, "leave it out", problem)
        if self.known_images and not (has_images and self.config.diffusion.time_sampling == "masked"):
            problem = f"is of no use to {self.preset}, which is not trained on images that are known as a whole"
            raise InputError("known_images", self.known_images[0], "leave it out", problem)

    @property
    def init_has_codecs(self) -> bool:
        """Whether the run starts from a checkpoint folder, whose codecs it then uses."""
        return self.init is not None and not is_file(self.init, "init")

    def _check_lora(self) -> None:
        if self.lora is None:
            if self.lora_alpha is not None:
                raise InputError("lora_alpha", self.lora_alpha, "give lora, the rank, too", "needs lora")
            return
        self._require_whole("lora", 1, MAX_RANK)
        if self.fsdp:
            raise InputError("fsdp", self.fsdp, "leave out one of them", "conflicts with lora")
        if not self.init_has_codecs:
            remedy = "give the checkpoint to adapt as init"
            raise InputError("lora", self.lora, remedy, "needs a checkpoint, and trains no other weights")
        alpha = self.lora if self.lora_alpha is None else self.lora_alpha
        if not is_number(alpha) or not 0 < alpha <= MAX_ALPHA:  # also NaN
            raise InputError("lora_alpha", alpha, f"use a number above 0, at most {MAX_ALPHA}", "is out of range")
        object.__setattr__(self, "lora_alpha", alpha)

    def _with_heads(self, config: Config) -> Config:
        """The config with the heads of the weights file that the run starts from, if they were given."""
        if self.init_heads is None:
            return config
        dim = config.model.dim
        self._require_whole("init_heads", 1, dim)
        if self.init is None or self.init_has_codecs:
            remedy = "leave it out, or give a file of U-ViT weights as init"
            raise InputError("init_heads", self.init_heads, remedy, "is for files of weights only")
        if dim % self.init_heads:
            raise InputError("init_heads", self.init_heads, f"use a divisor of {dim}", "does not divide the width")
        return replace(config, model=replace(config.model, head_dim=dim // self.init_heads))

    def _changed(self, recipe: Recipe) -> Recipe:
        """The recipe with the settings that were given."""
        given = {key: getattr(self, key) for key in ("steps", "batch", "learning_rate", "accumulate")}
        denoiser = replace(recipe.denoiser, seed=self.seed, **{k: v for k, v in given.items() if v is not None})
        if denoiser.batch % denoiser.accumulate:
            remedy = f"use a divisor of the batch of {denoiser.batch}"
            raise InputError("accumulate", denoiser.accumulate, remedy, "does not divide the batch")
        if self.init_has_codecs and self.autoencoder:
            remedy = "leave out one of them"
            raise InputError("autoencoder", self.autoencoder, remedy, "conflicts with init, which has its own")
        assert self.config is not None  # set before
        autoencoder, image = recipe.autoencoder, image_and_text(self.config)[0]
        if image is None and self.autoencoder:
            raise InputError("autoencoder", self.autoencoder, "leave it out", "is of no use to a model of text alone")
        if image is not None and autoencoder is None and not (self.autoencoder or self.init_has_codecs):
            remedy = "give autoencoder, the folder or hub id of a diffusers autoencoder"
            raise InputError("preset", self.preset, remedy, "needs a trained autoencoder")
        if autoencoder is not None:
            steps, rate = self.autoencoder_steps, self.autoencoder_learning_rate
            autoencoder = replace(
                autoencoder,
                seed=self.seed,
                steps=steps or autoencoder.steps,
                learning_rate=rate or autoencoder.learning_rate,
            )
        return replace(recipe, denoiser=denoiser, autoencoder=autoencoder)

    def _require_whole(self, key: str, lowest: int, highest: int, optional: bool = False) -> None:
        value = getattr(self, key)
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise InputError(key, value, f"use a whole number from {lowest} to {highest}", "is out of range")


def _check_init(init: Path) -> None:
    """Raises InputError if nothing is there, and for a folder that another program, such as accelerate, has written."""
    if is_file(init, "init"):
        return
    if not is_folder(init, "init"):
        problem = "is neither a file nor a folder" if os.path.exists(init) else "does not exist"
        raise InputError("init", init, "give the folder of a checkpoint, or a file of U-ViT weights", problem)
    if not os.path.exists(init / "config.json"):
        if os.path.exists(init / "adapter_config.json"):
            remedy = "give the checkpoint it belongs to, or one that merge_adapter has written"
            raise InputError("init", init, remedy, "is a LoRA adapter")
        files = sorted(name for name in os.listdir(init) if name.endswith(WEIGHTS))
        if files:
            remedy = f"give one of its files of weights ({', '.join(files[:5])})"
            raise InputError("init", init, remedy, "is not a checkpoint of engine.train")


def image_and_text(config: Config) -> tuple[str | None, str]:
    """Names of the modality with the image codec, None in a model of text alone, and of the one with the text codec.

    Beside them there may be a sketch, see `sketch_of`. Raises InputError for a config with other codecs: the data sets
    have nothing else to train on.
    """
    drawn = sketch_of(config)
    kinds = {name: codec.kind for name, codec in config.codecs.items() if name != drawn}
    if sorted(kinds.values()) not in (["image", "text"], ["text"]):
        codecs = ", ".join(f"{name}: {codec.kind}" for name, codec in config.codecs.items())
        remedy = f"use a model with exactly one text codec and at most one image codec, which a {SKETCH} may share"
        raise InputError("config", codecs, remedy, "cannot be trained on images with captions")
    by_kind = {kind: name for name, kind in kinds.items()}
    return by_kind.get("image"), by_kind["text"]


def sketch_of(config: Config) -> str | None:
    """Name of the modality that is a drawing of another one: it is called sketch and has the codec of that image.

    Their scales may differ: training measures that of the sketch.
    """
    if SKETCH not in config.codecs:
        return None
    alike = {name: (codec.folder or name, *kind_and_settings(codec)) for name, codec in config.codecs.items()}
    shared = [name for name in alike if name != SKETCH and alike[name] == alike[SKETCH]]
    return SKETCH if shared and config.codecs[SKETCH].kind == "image" else None


def kind_and_settings(codec: CodecConfig) -> tuple[str, dict]:
    """A codec's kind and its settings but for the scale, which training measures."""
    return codec.kind, {key: value for key, value in codec.settings.items() if key != "scale"}
