"""`PRESETS`: named configurations to train."""

from dataclasses import replace

from engine.config import (
    GUIDANCE,
    CodecConfig,
    Config,
    DiffusionConfig,
    Modality,
    ModelConfig,
    SamplingConfig,
    UViTConfig,
)

# Tasks with sketches, by the task whose guidance and temperature they use, and those with another guidance.
SKETCH_TASKS = {
    "image-to-text": ("image-to-text+sketch", "image+sketch-to-text", "sketch-to-image+text"),
    "text-to-image": ("text-to-image+sketch", "text+sketch-to-image"),
}
SKETCH_GUIDANCE = dict.fromkeys(("sketch-to-image+text", "image-to-text+sketch", "image+text-to-sketch"), 5.0)


def _codecs(size: int, patch: int) -> dict[str, CodecConfig]:
    """An autoencoder for images of `size` pixels a side, word vectors for text."""
    return {"image": CodecConfig("image", settings={"size": size, "patch": patch}), "text": CodecConfig("text")}


def _uvit(modalities: tuple[Modality, ...], blocks: int, dim: int, uvit: UViTConfig | None = None) -> ModelConfig:
    """A U-ViT, by default U-ViT-multi: a time token per modality, all of them predicted."""
    names = tuple(m.name for m in modalities)
    return ModelConfig(modalities, blocks, dim, time_conditioning="token", uvit=uvit or UViTConfig(names, names))


def with_categories(model: ModelConfig, categories: int) -> ModelConfig:
    """With so many categories in the modalities that are categorical; 0: with none that are."""
    parts = (replace(m, categories=categories if m.categories else 0) for m in model.modalities)
    return replace(model, modalities=tuple(parts))


def with_sketch(config: Config) -> Config:
    """With drawings of the images, which share their codec, its files and their blocks."""
    image, codec = config.model.modality("image"), config.codecs["image"]
    sketch = replace(image, name="sketch", blocks_of="image")
    sampling = config.sampling
    guidance, temperature = (
        {**values} | {task: values[of] for of, tasks in SKETCH_TASKS.items() if of in values for task in tasks}
        for values in (sampling.guidance, sampling.temperature)
    )
    return replace(
        config,
        model=replace(config.model, modalities=(*config.model.modalities, sketch)),
        codecs={**config.codecs, "sketch": replace(codec, folder="image")},
        sampling=replace(
            sampling, guidance=guidance | SKETCH_GUIDANCE, temperature=temperature, order=(*sampling.order, "sketch")
        ),
    )


# 256 px MS-COCO latents (4×32×32, patch 2) and 64 words of Word2Vec-64; L = 320.
COCO = Modality("image", 256, 16, depth=0), Modality("text", 64, 64, depth=0)
# The same images with CLIP's 77 sub-words of 768 channels, as in the published text-to-image U-ViTs; L = 333.
COCO_CLIP = COCO[0], Modality("text", 77, 768, depth=0)
# 64 px emoji (16×8×8 latents, patch 2) and names of up to 16 words.
EMOJI = Modality("image", 16, 64, depth=0), Modality("text", 16, 32, depth=0)
WORDS = 2780  # of the emoji's names and keywords in CLDR 41; training takes as many as its captions have
TINY = Modality("image", 16, 4, depth=0), Modality("text", 6, 8, depth=0)

# U-ViT for text-to-image: the text is a condition, the last layer a convolution.
T2I = UViTConfig(timed=("image",), predicted=("image",), patch=2)

INDEPENDENT = DiffusionConfig("scaled_linear", 1000, "epsilon", "clean", "independent")
CONDITIONAL = DiffusionConfig("scaled_linear", 1000, "epsilon", "clean", "conditional")
MASKED = DiffusionConfig("cosine", 1000, "v_prediction", "clean", "masked")
COSINE_INDEPENDENT = DiffusionConfig("cosine", 1000, "v_prediction", "clean", "independent")

TEXT = {"text": CodecConfig("text")}
TEXT_FIRST = SamplingConfig(GUIDANCE, order=("text", "image"))
TOGETHER = SamplingConfig(GUIDANCE)

PRESETS: dict[str, Config] = {
    # The paper's size.
    "coco256": Config(
        ModelConfig((Modality("image", 256, 16, depth=4), Modality("text", 64, 64, depth=2)), shared_depth=9, dim=512),
        DiffusionConfig("scaled_linear", 1000, "epsilon", "renoise", "shared"),
        _codecs(256, 2),
        TOGETHER,
    ),
    # The built-in model.
    "emoji": Config(
        ModelConfig(
            (Modality("image", 16, 64, depth=2), Modality("text", 16, 32, depth=2, categories=WORDS)),
            shared_depth=7,
            dim=192,
        ),
        MASKED,
        _codecs(64, 2),
        replace(
            TEXT_FIRST,
            guidance=GUIDANCE | {"text-to-image": 2.0, "infill": 1.5},
            temperature={"joint": 0.85, "image-to-text": 0.25, "infill": 0.25},
        ),
    ),
    # The paper's baseline: depth 12, as on MS-COCO.
    "uvit-multi-coco256": Config(_uvit(COCO, 13, 512), INDEPENDENT, _codecs(256, 2), TEXT_FIRST),
    # The same at depth 16.
    "uvit-multi-deep-coco256": Config(_uvit(COCO, 17, 512), INDEPENDENT, _codecs(256, 2), TEXT_FIRST),
    # The shapes of the published U-ViT-S/2 and U-ViT-S/2 (Deep) on MS-COCO.
    "uvit-t2i-coco256": Config(_uvit(COCO_CLIP, 13, 512, T2I), CONDITIONAL, _codecs(256, 2), TOGETHER),
    "uvit-t2i-deep-coco256": Config(_uvit(COCO_CLIP, 17, 512, T2I), CONDITIONAL, _codecs(256, 2), TOGETHER),
    # 128 px photos as 4×16×16 latents and captions of up to 16 words; small enough for a CPU.
    "photos128": Config(
        ModelConfig((Modality("image", 64, 16, depth=2), Modality("text", 16, 32, depth=2)), shared_depth=3, dim=128),
        MASKED,
        _codecs(128, 2),
        TEXT_FIRST,
    ),
    # As many blocks and skips as `emoji`, all of them shared.
    "uvit-emoji": Config(_uvit(EMOJI, 15, 192), COSINE_INDEPENDENT, _codecs(64, 2), TEXT_FIRST),
    # Text alone, of up to 64 words; small enough for a CPU.
    "text": Config(
        ModelConfig((Modality("text", 64, 64, depth=1),), shared_depth=3, dim=128), MASKED, TEXT, SamplingConfig()
    ),
    # For tests: trained in seconds.
    "text-tiny": Config(
        ModelConfig((Modality("text", 12, 8, depth=1),), shared_depth=1, dim=64), MASKED, TEXT, SamplingConfig()
    ),
    "uvit-tiny": Config(_uvit(TINY, 3, 64), COSINE_INDEPENDENT, _codecs(32, 1), TEXT_FIRST),
    "tiny": Config(
        ModelConfig((Modality("image", 16, 4, depth=1), Modality("text", 6, 8, depth=1)), shared_depth=3, dim=64),
        MASKED,
        _codecs(32, 1),
        TEXT_FIRST,
    ),
}
PRESETS |= {f"{name}-sketch": with_sketch(PRESETS[name]) for name in ("emoji", "tiny")}
