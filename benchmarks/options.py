"""`ExperimentOptions`: what an experiment is made from, checked."""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import InputError

TRAINING = ("architecture", "depths", "modalities", "autoregression")  # experiments that always train
LOWEST = {"count": 2, "sampling_steps": 1, "steps": 1, "batch": 1, "size": 8, "points": 1}


@dataclass(frozen=True)
class ExperimentOptions:
    """One run of an experiment; raises InputError for values that cannot be used."""

    experiment: str  # a key of `benchmarks.descriptions.DESCRIPTIONS`
    data: Path  # folder of images and captions, MS-COCO captions layout; autoregression: of texts, with a test split
    preset: str
    models: tuple[int, ...]  # of those that the experiment architecture compares, numbered from 1; none: all
    size: int | None  # pixels a side; None: the preset's
    autoencoder: str | None  # diffusers autoencoder; None: the built-in model's, with its word vectors
    features: Path | None  # of Fréchet distances, see `engine.metrics.features.feature_network`
    checkpoint: Path | None  # of the experiments that do not compare models; None: the built-in one
    steps: int | None  # of training; None: load a model
    batch: int | None  # of training; None: the preset's
    points: int  # steps of training, evenly spaced, at which errors are measured
    seeds: tuple[int, ...]
    count: int  # held-out images to measure on
    sampling_steps: int
    ratios: tuple[float, ...]  # of masking
    scales: tuple[float, ...]  # of guidance
    compile: bool  # torch.compile of the denoiser in training
    device: torch.device
    dtype: torch.dtype
    out: Path  # trained models
    results: Path  # stored tables

    def __post_init__(self):
        for key in ("seeds", "ratios", "scales", "models"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        if self.experiment in TRAINING and self.steps is None:
            raise InputError("steps", None, "say how many steps to train, 1 or more", "is missing")
        if (self.experiment == "autoregression") != self.preset.startswith("text"):
            remedy = "use text with the experiment autoregression, another preset with the others"
            raise InputError("preset", self.preset, remedy, f"does not fit the experiment {self.experiment}")
        if self.features is not None and not self.autoencoder:
            remedy = "give the folder of one with --features, which is for photos"
            raise InputError("autoencoder", None, remedy, "is missing")
        for key, lowest in LOWEST.items():
            value = getattr(self, key)
            if value is not None and value < lowest:
                raise InputError(key, value, f"use {lowest} or more", "is out of range")
        if not all(0 < ratio <= 1 for ratio in self.ratios):
            raise InputError("ratios", self.ratios, "use numbers above 0 and up to 1", "is out of range")
