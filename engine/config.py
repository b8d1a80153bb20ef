"""Configurations: frozen dataclasses, no torch, unknown keys refused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from math import isqrt

from engine.errors import InputError

SCHEDULES = ("scaled_linear", "cosine")
PREDICTIONS = ("epsilon", "v_prediction")
CONDITIONINGS = ("renoise", "clean")
TIME_SAMPLINGS = ("shared", "independent", "masked", "conditional")
TIME_CONDITIONINGS = ("adaln", "token")
NORMS = ("pre", "post")
KINDS = {int: "a whole number", str: "a string"}
# Scales by task for models of images and texts; also those of checkpoints of version 0.1, which name none.
GUIDANCE = {"joint": 3.0, "text-to-image": 5.0, "image-to-text": 3.0, "infill": 3.0}
# Far above all that has been trained, and low enough that a slip in a file neither fills the memory nor takes hours.
MAX_TOKENS = MAX_CHANNELS = MAX_PIXELS = 65_536  # also blocks' width
MAX_BLOCKS, MAX_TIMESTEPS, MAX_CATEGORIES = 1000, 10_000, 10_000_000


@dataclass(frozen=True)
class Modality:
    """One named stream of the joint sample, whose diffusion state is [B, tokens, channels]."""

    name: str
    tokens: int  # L
    channels: int  # C
    depth: int  # N_modality: in-blocks of its own, and as many out-blocks
    categories: int = 0  # K vectors, such as those of words, one of which each token is; 0: tokens have any values
    blocks_of: str = ""  # another modality, whose in- and out-blocks this one uses in place of its own; "": its own

    @property
    def head(self) -> int:
        """What the model's head gives for a token: logits of its categories, or its channels."""
        return self.categories or self.channels

    @property
    def size(self) -> int:
        """Elements of a row's packed state that belong to this modality, L·C."""
        return self.tokens * self.channels


@dataclass(frozen=True)
class UViTConfig:
    """What makes a U-ViT (arXiv 2209.12152) of the shared stack: no branches, time tokens before all others."""

    timed: tuple[str, ...]  # modalities with a time token of their own; independent times want one each
    predicted: tuple[str, ...]  # the others are conditions: always known, never predicted
    norm: str = "pre"  # where the blocks normalise: before a sublayer (U-ViT) or after it (UniDiffuser's release)
    patch: int = 0  # latents per side of an image token, for U-ViT's last 3×3 convolution; 0: no convolution
    extra_tokens: int = 0  # learned tokens beside the others (UniDiffuser's data type is one)

    def __post_init__(self):
        for key in ("timed", "predicted"):
            names = getattr(self, key)
            right = isinstance(names, list | tuple) and len(set(names)) == len(names) >= 1
            _require(right, f"uvit.{key}", names, "give a list of different modalities")
            object.__setattr__(self, key, tuple(names))
        _require_one_of("uvit.norm", self.norm, NORMS)
        for key in ("patch", "extra_tokens"):
            _require_within(f"uvit.{key}", getattr(self, key), 0, MAX_TOKENS)


@dataclass(frozen=True)
class ModelConfig:
    """PS-U-Net (arXiv 2311.16488, section 3.1): a branch per modality around a shared U-ViT stack.

    With `uvit` it is a U-ViT, which is the stack alone.
    """

    modalities: tuple[Modality, ...]
    shared_depth: int  # N_shared; 0 or odd: ⌊N/2⌋ in-blocks, one middle block, ⌊N/2⌋ out-blocks
    dim: int  # D, width of every block
    head_dim: int = 64
    mlp_ratio: int = 4
    time_conditioning: str = "adaln"  # "adaln": modulations per token; "token": a time token per modality (U-ViT)
    uvit: UViTConfig | None = None

    def __post_init__(self):
        names = [m.name for m in self.modalities]
        _require(len(names) >= 1, "modalities", names, "give at least one")
        _require(len(set(names)) == len(names), "modalities", names, "give each its own name")
        for m in self.modalities:  # a name is also that of a folder and of a submodule
            _require(str(m.name).isidentifier(), "modalities.name", m.name, "use letters, digits and _")
            _require_within(f"{m.name}.tokens", m.tokens, 1, MAX_TOKENS)
            _require_within(f"{m.name}.channels", m.channels, 1, MAX_CHANNELS)
            _require_within(f"{m.name}.depth", m.depth, 0, MAX_BLOCKS)
            _require_within(f"{m.name}.categories", m.categories, 0, MAX_CATEGORIES)
            lenders = [""] + [o.name for o in self.modalities if not o.blocks_of and o.depth == m.depth > 0]
            remedy = "name a modality with as many blocks of its own"
            _require(m.blocks_of in lenders, f"{m.name}.blocks_of", m.blocks_of, remedy)
        _require_within("shared_depth", self.shared_depth, 0, MAX_BLOCKS)
        odd, remedy = self.shared_depth % 2 == 1, "use 0 or an odd number (in-blocks, one middle block, out-blocks)"
        _require(odd or self.shared_depth == 0, "shared_depth", self.shared_depth, remedy)
        _require_within("dim", self.dim, 1, MAX_CHANNELS)
        _require_within("head_dim", self.head_dim, 1, self.dim)
        _require(self.dim % self.head_dim == 0, "dim", self.dim, f"use a multiple of head_dim ({self.head_dim})")
        _require_within("mlp_ratio", self.mlp_ratio, 1, 64)
        _require_one_of("time_conditioning", self.time_conditioning, TIME_CONDITIONINGS)
        if self.uvit is not None:
            self._check_uvit(self.uvit, names)

    def _check_uvit(self, uvit: UViTConfig, names: list[str]) -> None:
        token = self.time_conditioning == "token"
        _require(token, "time_conditioning", self.time_conditioning, "a U-ViT has time tokens: use 'token'")
        _require(self.shared_depth >= 1, "shared_depth", self.shared_depth, "a U-ViT needs an odd number")
        for m in self.modalities:
            _require(m.depth == 0, f"{m.name}.depth", m.depth, "a U-ViT has no blocks of one modality: use 0")
            _require(m.categories == 0, f"{m.name}.categories", m.categories, "a U-ViT predicts values: use 0")
        for key in ("timed", "predicted"):
            unknown = sorted(set(getattr(uvit, key)) - set(names))
            _require(not unknown, f"uvit.{key}", ", ".join(unknown), f"the modalities are {', '.join(names)}")
        if uvit.patch:
            _require("image" in names, "uvit.patch", uvit.patch, "without a modality named image use 0")
            image = self.modality("image")
            fits = isqrt(image.tokens) ** 2 == image.tokens and image.channels % uvit.patch**2 == 0
            _require(fits, "uvit.patch", uvit.patch, "tokens must form a square and channels be a multiple of patch²")

    @property
    def predicted(self) -> tuple[str, ...]:
        """Names of the modalities that the model predicts; any others are conditions."""
        return tuple(m.name for m in self.modalities) if self.uvit is None else self.uvit.predicted

    @property
    def categorical(self) -> tuple[int, ...]:
        """The modalities, by position, whose tokens are one of some categories each."""
        return tuple(i for i, m in enumerate(self.modalities) if m.categories)

    @property
    def size(self) -> int:
        """N, elements of a row's packed state."""
        return sum(m.size for m in self.modalities)

    @property
    def tokens(self) -> int:
        """Tokens of all modalities together."""
        return sum(m.tokens for m in self.modalities)

    @property
    def state_slices(self) -> dict[str, slice]:
        """Where each modality lies in the packed state [B, N]."""
        return _slices({m.name: m.size for m in self.modalities})

    @property
    def head_slices(self) -> dict[str, slice]:
        """Where each modality lies in what the heads give, packed likewise."""
        return _slices({m.name: m.tokens * m.head for m in self.modalities})

    @property
    def token_slices(self) -> dict[str, slice]:
        """Where each modality's tokens lie in the concatenated token sequence [B, L]."""
        return _slices({m.name: m.tokens for m in self.modalities})

    def modality(self, name: str) -> Modality:
        return {m.name: m for m in self.modalities}[name]

    @classmethod
    def from_dict(cls, values) -> "ModelConfig":
        """The inverse of `asdict`; raises InputError on unknown, missing or ill-typed keys."""
        values = _known_keys(cls, values, "model")
        modalities = values.get("modalities")
        _require(isinstance(modalities, list | tuple), "model.modalities", modalities, "give a list")
        values["modalities"] = tuple(_build(Modality, m, "model.modalities") for m in modalities)
        if values.get("uvit") is not None:
            values["uvit"] = _build(UViTConfig, values["uvit"], "model.uvit")
        return _build(cls, values, "model")


@dataclass(frozen=True)
class DiffusionConfig:
    """What the model was trained to undo, and how known parts enter it."""

    schedule: str = "scaled_linear"
    timesteps: int = 1000  # N; time 0 is clean data, time N the noisiest
    prediction: str = "epsilon"
    conditioning: str = "renoise"  # how known values enter: at their scheduled noise, or clean at time 0
    time_sampling: str = "shared"  # how training times are drawn, see `engine.diffusion.loss`

    def __post_init__(self):
        for key, allowed in (
            ("schedule", SCHEDULES),
            ("prediction", PREDICTIONS),
            ("conditioning", CONDITIONINGS),
            ("time_sampling", TIME_SAMPLINGS),
        ):
            _require_one_of(key, getattr(self, key), allowed)
        _require_within("timesteps", self.timesteps, 2, MAX_TIMESTEPS)
        fits = {"shared": ("renoise",), "independent": CONDITIONINGS}.get(self.time_sampling, ("clean",))
        _require(
            self.conditioning in fits,
            "conditioning",
            self.conditioning,
            f"time_sampling {self.time_sampling!r} needs {' or '.join(fits)}",
        )


@dataclass(frozen=True)
class CodecConfig:
    """The codec between a modality's values and its tokens; its files are in a folder of the checkpoint."""

    kind: str  # a name in `engine.codecs.codec.CODECS`
    folder: str = ""  # of the checkpoint; "": the modality's name. Modalities may share one
    settings: Mapping[str, int | float | str] = field(default_factory=dict)  # the codec's own, such as an image's size

    def to_dict(self) -> dict:
        return {"kind": self.kind, **({"folder": self.folder} if self.folder else {}), **self.settings}

    @classmethod
    def from_dict(cls, values, where: str) -> "CodecConfig":
        _require(isinstance(values, dict), where, values, "give a mapping with the codec's kind")
        for key in ("kind", "folder"):
            right = isinstance(values.get(key, ""), str)
            _require(right, f"{where}.{key}", values.get(key), "give a string")
        _require(bool(values.get("kind")), f"{where}.kind", values.get("kind"), "name a codec")
        folder = values.get("folder", "")
        inside = not {"/", "\\", "\0"} & set(folder) and folder not in (".", "..")
        _require(inside, f"{where}.folder", folder, "name a folder of the checkpoint")
        settings = {key: value for key, value in values.items() if key not in ("kind", "folder")}
        for key, value in settings.items():
            plain = isinstance(value, int | float | str) and not isinstance(value, bool)
            _require(plain, f"{where}.{key}", value, "give a number or a string")
        return cls(values["kind"], folder, settings)


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of requests, as far as the request leaves them open."""

    # By task, as `engine.diffusion.masks.task_of` names it. Joint runs in which all modalities move together are not
    # guided by default: nothing is known that a second pass could drop.
    guidance: Mapping[str, float] = field(default_factory=dict)
    order: tuple[str, ...] = ()  # in which modalities are generated; those not named come last; (): all together
    feather: int = 2  # pixels over which a regenerated region blends into the kept one, inside the regenerated region
    temperature: Mapping[str, float] = field(default_factory=dict)  # by task, see `Request`; 1 for tasks not named

    def __post_init__(self):
        right = isinstance(self.order, list | tuple) and all(isinstance(name, str) for name in self.order)
        _require(right and len(set(self.order)) == len(self.order), "sampling.order", self.order, "give distinct names")
        object.__setattr__(self, "order", tuple(self.order))
        for key, lowest in (("guidance", -100), ("temperature", 0.01)):
            values = getattr(self, key)
            _require(isinstance(values, Mapping), f"sampling.{key}", values, "give a number for each task")
            for task, value in values.items():
                right = isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= 100
                _require(right, f"sampling.{key}.{task}", value, f"use a number from {lowest} to 100")
        _require_within("sampling.feather", self.feather, 0, MAX_PIXELS)


@dataclass(frozen=True)
class Config:
    """Everything a checkpoint's config.json says."""

    model: ModelConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    codecs: Mapping[str, CodecConfig] = field(default_factory=dict)  # by modality; none for a bare network
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self):
        sampling = self.diffusion.time_sampling
        if self.model.time_conditioning == "token":
            remedy = "time tokens are one per modality: use time_conditioning 'adaln', or 'shared' or 'independent'"
            _require(sampling != "masked", "time_sampling", sampling, remedy)
        conditional = len(self.model.predicted) < len(self.model.modalities)
        fits = "'conditional'" if conditional else "'shared', 'independent' or 'masked'"
        remedy = f"for a model that predicts {', '.join(self.model.predicted)} use {fits}"
        _require(conditional == (sampling == "conditional"), "time_sampling", sampling, remedy)
        if sampling == "independent" and self.model.uvit is not None:
            timed, all_timed = self.model.uvit.timed, len(self.model.uvit.timed) == len(self.model.modalities)
            _require(all_timed, "uvit.timed", timed, "independent times need a time token for each modality")
        names = [m.name for m in self.model.modalities]
        if self.codecs:
            _require(set(self.codecs) == set(names), "codecs", sorted(self.codecs), f"name one each for {names}")
        unknown = sorted(set(self.sampling.order) - set(names))
        _require(not unknown, "sampling.order", unknown, f"the modalities are {', '.join(names)}")
        ordered = not self.sampling.order or self.diffusion.conditioning == "clean"
        _require(ordered, "sampling.order", self.sampling.order, "an order needs conditioning 'clean'; use []")

    def to_dict(self) -> dict:
        codecs = {name: codec.to_dict() for name, codec in self.codecs.items()}
        return {**asdict(replace(self, codecs={})), "codecs": codecs}

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of `to_dict`; also reads the files of version 0.1.

        Raises InputError on unknown, missing or ill-typed keys.
        """
        values = _known_keys(cls, _from_version_0_1(values), "config")
        codecs = values.get("codecs", {})
        _require(isinstance(codecs, dict), "codecs", codecs, "give a codec for each modality")
        return cls(
            model=ModelConfig.from_dict(values.get("model")),
            diffusion=_build(DiffusionConfig, values.get("diffusion", {}), "diffusion"),
            codecs={name: CodecConfig.from_dict(codec, f"codecs.{name}") for name, codec in codecs.items()},
            sampling=_build(SamplingConfig, values.get("sampling", {}), "sampling"),
        )


def _from_version_0_1(values):
    """Version 0.1 had `model.time`, `diffusion.times` and, in place of codecs, `image` beside an implied text codec."""
    if not isinstance(values, dict):
        return values
    values = dict(values)
    for part, old, new in (("model", "time", "time_conditioning"), ("diffusion", "times", "time_sampling")):
        if isinstance(values.get(part), dict) and old in values[part] and new not in values[part]:
            values[part] = {new if key == old else key: value for key, value in values[part].items()}
    if "image" in values and "codecs" not in values:
        image = values.pop("image")
        if image is not None:
            settings = dict(image) if isinstance(image, dict) else {"size": image}
            values["codecs"] = {"image": {"kind": "image", **settings}, "text": {"kind": "text"}}
            diffusion = values.get("diffusion")
            clean = isinstance(diffusion, dict) and diffusion.get("conditioning") == "clean"
            order = {"order": ["text", "image"]} if clean else {}
            values.setdefault("sampling", {"guidance": GUIDANCE} | order)
    return values


def _require(holds: bool, key: str, value, remedy: str) -> None:
    if not holds:
        raise InputError(key, value, remedy)


def _require_one_of(key: str, value, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, key, value, f"use one of {', '.join(allowed)}")


def _require_within(key: str, value, lowest: int, highest: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(whole and lowest <= value <= highest, key, value, f"use a whole number from {lowest} to {highest}")


def _known_keys(cls, values, where: str) -> dict:
    _require(isinstance(values, dict), where, values, "give a mapping of settings")
    names = [f.name for f in fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise InputError(where, ", ".join(unknown), f"use {', '.join(names)}", "is not a known setting")
    return dict(values)


def _build(cls, values, where: str):
    values = _known_keys(cls, values, where)
    for f in fields(cls):
        if f.name in values and f.type in (int, str):
            right = isinstance(values[f.name], f.type) and not isinstance(values[f.name], bool)
            _require(right, f"{where}.{f.name}", values[f.name], f"give {KINDS[f.type]}")
    try:
        return cls(**values)
    except TypeError as error:
        missing = [f.name for f in fields(cls) if f.name not in values]
        raise InputError(where, sorted(values), f"give {', '.join(missing)} too ({error})", "is not complete") from None


def _slices(sizes: dict[str, int]) -> dict[str, slice]:
    ends = accumulate(sizes.values())
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
