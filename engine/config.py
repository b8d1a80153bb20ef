"""Configurations and presets: frozen dataclasses, no torch, unknown keys refused."""

import reprlib
from dataclasses import asdict, dataclass, field, fields
from math import isqrt

SCHEDULES = ("scaled_linear", "cosine")
PREDICTIONS = ("epsilon", "v_prediction")
CONDITIONINGS = ("renoise", "clean")
TRAINING_TIMES = ("shared", "independent", "masked", "conditional")
TIME_CONDITIONINGS = ("adaln", "token")
NORMS = ("pre", "post")
# Far above all that has been trained, and low enough that a slip in a file neither fills the memory nor takes hours.
MOST_TOKENS = MOST_CHANNELS = MOST_PIXELS = 65_536  # also blocks' width
MOST_BLOCKS, MOST_TIMESTEPS = 1000, 10_000


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the key, the value and the remedy."""


@dataclass(frozen=True)
class Modality:
    """One named stream of the joint sample, whose diffusion state is [B, tokens, channels]."""

    name: str
    tokens: int  # L
    channels: int  # C
    depth: int  # N_modality: in-blocks of its own, and as many out-blocks

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
        _require(self.norm in NORMS, "uvit.norm", self.norm, f"use one of {NORMS}")
        for key in ("patch", "extra_tokens"):
            _require_within(f"uvit.{key}", getattr(self, key), 0, MOST_TOKENS)


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
    time: str = "adaln"  # "adaln": modulations per token; "token": a time token per modality (U-ViT)
    uvit: UViTConfig | None = None

    def __post_init__(self):
        names = [m.name for m in self.modalities]
        _require(len(names) >= 1, "modalities", names, "give at least one")
        _require(len(set(names)) == len(names), "modalities", names, "give each its own name")
        for m in self.modalities:
            _require_within(f"{m.name}.tokens", m.tokens, 1, MOST_TOKENS)
            _require_within(f"{m.name}.channels", m.channels, 1, MOST_CHANNELS)
            _require_within(f"{m.name}.depth", m.depth, 0, MOST_BLOCKS)
        _require_within("shared_depth", self.shared_depth, 0, MOST_BLOCKS)
        _require(
            self.shared_depth == 0 or self.shared_depth % 2 == 1,
            "shared_depth",
            self.shared_depth,
            "use 0 or an odd number (in-blocks, one middle block, out-blocks)",
        )
        _require_within("dim", self.dim, 1, MOST_CHANNELS)
        _require_within("head_dim", self.head_dim, 1, self.dim)
        _require(self.dim % self.head_dim == 0, "dim", self.dim, f"use a multiple of head_dim ({self.head_dim})")
        _require_within("mlp_ratio", self.mlp_ratio, 1, 64)
        _require(self.time in TIME_CONDITIONINGS, "time", self.time, f"use one of {TIME_CONDITIONINGS}")
        if self.uvit is not None:
            self._check_uvit(self.uvit, names)

    def _check_uvit(self, uvit: UViTConfig, names: list[str]) -> None:
        _require(self.time == "token", "time", self.time, "a U-ViT's time is a token: use 'token'")
        _require(self.shared_depth >= 1, "shared_depth", self.shared_depth, "a U-ViT needs an odd number")
        for m in self.modalities:
            _require(m.depth == 0, f"{m.name}.depth", m.depth, "a U-ViT has no blocks of one modality: use 0")
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
    def token_slices(self) -> dict[str, slice]:
        """Where each modality's tokens lie in the concatenated token sequence [B, L]."""
        return _slices({m.name: m.tokens for m in self.modalities})

    def modality(self, name: str) -> Modality:
        for m in self.modalities:
            if m.name == name:
                return m
        raise KeyError(name)


@dataclass(frozen=True)
class DiffusionConfig:
    """What the model was trained to undo, and how known parts enter it."""

    schedule: str = "scaled_linear"
    timesteps: int = 1000  # N; time 0 is clean data, time N the noisiest
    prediction: str = "epsilon"
    conditioning: str = "renoise"  # how known values enter: at their scheduled noise, or clean at time 0
    times: str = "shared"  # training times, see `engine.loss`

    def __post_init__(self):
        for key, allowed in (
            ("schedule", SCHEDULES),
            ("prediction", PREDICTIONS),
            ("conditioning", CONDITIONINGS),
            ("times", TRAINING_TIMES),
        ):
            _require(getattr(self, key) in allowed, key, getattr(self, key), f"use one of {allowed}")
        _require_within("timesteps", self.timesteps, 2, MOST_TIMESTEPS)
        fits = {"shared": ("renoise",), "independent": CONDITIONINGS}.get(self.times, ("clean",))
        _require(self.conditioning in fits, "conditioning", self.conditioning, f"times={self.times!r} trains {fits}")


@dataclass(frozen=True)
class ImageConfig:
    """How pictures become tokens: an autoencoder's latents, cut into patch × patch squares."""

    size: int  # pixels, pictures are size × size
    patch: int  # latents per token side

    def __post_init__(self):
        _require_within("image.size", self.size, 8, MOST_PIXELS)
        _require_within("image.patch", self.patch, 1, self.size)


@dataclass(frozen=True)
class Config:
    """Everything a checkpoint's config.json says."""

    model: ModelConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    image: ImageConfig | None = None

    def __post_init__(self):
        if self.model.time == "token":
            _require(
                self.diffusion.times != "masked",
                "times",
                "masked",
                "a time token is one per modality: use 'adaln', or times 'shared' or 'independent'",
            )
        conditional = len(self.model.predicted) < len(self.model.modalities)
        _require(
            conditional == (self.diffusion.times == "conditional"),
            "times",
            self.diffusion.times,
            f"for a model that predicts {', '.join(self.model.predicted)} use "
            + ("'conditional'" if conditional else "'shared', 'independent' or 'masked'"),
        )
        if self.diffusion.times == "independent" and self.model.uvit is not None:
            timed = self.model.uvit.timed
            _require(
                len(timed) == len(self.model.modalities), "uvit.timed", timed, "independent times need a token each"
            )

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of `to_dict`; raises ConfigError on unknown, missing or ill-typed keys."""
        values = _known_keys(cls, values, "config")
        model = _known_keys(ModelConfig, values.get("model"), "model")
        modalities = model.get("modalities")
        _require(isinstance(modalities, list | tuple), "model.modalities", modalities, "give a list")
        model["modalities"] = tuple(_build(Modality, m, "model.modalities") for m in modalities)
        if model.get("uvit") is not None:
            model["uvit"] = _build(UViTConfig, model["uvit"], "model.uvit")
        image = values.get("image")
        return cls(
            model=_build(ModelConfig, model, "model"),
            diffusion=_build(DiffusionConfig, values.get("diffusion", {}), "diffusion"),
            image=None if image is None else _build(ImageConfig, image, "image"),
        )


def _require(holds: bool, key: str, value, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{key}: {shown(value)} does not work; {remedy}")


def _require_within(key: str, value: int, lowest: int, highest: int) -> None:
    _require(lowest <= value <= highest, key, value, f"use a whole number from {lowest} to {highest}")


def shown(value) -> str:
    """A value for a message, cut where it is long or deeply nested."""
    short = reprlib.Repr()
    short.maxstring = 100
    return short.repr(value)


def _known_keys(cls, values, where: str) -> dict:
    _require(isinstance(values, dict), where, values, "give a mapping of settings")
    names = [f.name for f in fields(cls)]
    unknown = sorted(set(values) - set(names))
    _require(not unknown, where, ", ".join(unknown), f"unknown setting; known are {', '.join(names)}")
    return dict(values)


def _build(cls, values, where: str):
    values = _known_keys(cls, values, where)
    for f in fields(cls):
        if f.name in values and f.type in (int, str):
            right = isinstance(values[f.name], f.type) and not isinstance(values[f.name], bool)
            _require(right, f"{where}.{f.name}", values[f.name], f"give a {f.type.__name__}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _slices(sizes: dict[str, int]) -> dict[str, slice]:
    slices, start = {}, 0
    for name, size in sizes.items():
        slices[name] = slice(start, start + size)
        start += size
    return slices


PRESETS: dict[str, Config] = {
    # The paper's size: 256 px MS-COCO latents (4×32×32, patch 2) and 64 words of Word2Vec-64; L = 320.
    "coco256": Config(
        ModelConfig((Modality("image", 256, 16, depth=4), Modality("text", 64, 64, depth=2)), shared_depth=9, dim=512),
        DiffusionConfig("scaled_linear", 1000, "epsilon", "renoise", "shared"),
        ImageConfig(size=256, patch=2),
    ),
    # The built-in model: 64 px emoji (8×8×8 latents, patch 2) and names of up to 16 words.
    "emoji": Config(
        ModelConfig((Modality("image", 16, 32, depth=2), Modality("text", 16, 32, depth=2)), shared_depth=7, dim=192),
        DiffusionConfig("cosine", 1000, "v_prediction", "clean", "masked"),
        ImageConfig(size=64, patch=2),
    ),
    # U-ViT-multi, depth 12 as on MS-COCO: one stack, a time token per modality. The paper's baseline.
    "uvit-multi-coco256": Config(
        ModelConfig(
            (Modality("image", 256, 16, depth=0), Modality("text", 64, 64, depth=0)), shared_depth=13, dim=512,
            time="token", uvit=UViTConfig(("image", "text"), ("image", "text")),
        ),
        DiffusionConfig("scaled_linear", 1000, "epsilon", "clean", "independent"),
        ImageConfig(size=256, patch=2),
    ),
    # The same, deeper: depth 16.
    "uvit-multi-deep-coco256": Config(
        ModelConfig(
            (Modality("image", 256, 16, depth=0), Modality("text", 64, 64, depth=0)), shared_depth=17, dim=512,
            time="token", uvit=UViTConfig(("image", "text"), ("image", "text")),
        ),
        DiffusionConfig("scaled_linear", 1000, "epsilon", "clean", "independent"),
        ImageConfig(size=256, patch=2),
    ),
    # U-ViT for text-to-image: the text is a condition, the last layer a convolution.
    "uvit-t2i-coco256": Config(
        ModelConfig(
            (Modality("image", 256, 16, depth=0), Modality("text", 64, 64, depth=0)), shared_depth=13, dim=512,
            time="token", uvit=UViTConfig(("image",), ("image",), patch=2),
        ),
        DiffusionConfig("scaled_linear", 1000, "epsilon", "clean", "conditional"),
        ImageConfig(size=256, patch=2),
    ),
    # As many blocks and skips as `emoji`, all of them shared.
    "uvit-emoji": Config(
        ModelConfig(
            (Modality("image", 16, 32, depth=0), Modality("text", 16, 32, depth=0)), shared_depth=15, dim=192,
            time="token", uvit=UViTConfig(("image", "text"), ("image", "text")),
        ),
        DiffusionConfig("cosine", 1000, "v_prediction", "clean", "independent"),
        ImageConfig(size=64, patch=2),
    ),
    # For tests: seconds, not minutes.
    "uvit-tiny": Config(
        ModelConfig(
            (Modality("image", 16, 4, depth=0), Modality("text", 6, 8, depth=0)), shared_depth=3, dim=64,
            time="token", uvit=UViTConfig(("image", "text"), ("image", "text")),
        ),
        DiffusionConfig("cosine", 1000, "v_prediction", "clean", "independent"),
        ImageConfig(size=32, patch=1),
    ),
    "tiny": Config(
        ModelConfig((Modality("image", 16, 4, depth=1), Modality("text", 6, 8, depth=1)), shared_depth=3, dim=64),
        DiffusionConfig("cosine", 1000, "v_prediction", "clean", "masked"),
        ImageConfig(size=32, patch=1),
    ),
}  # fmt: skip
