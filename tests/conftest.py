"""What every test file shares: optional data, GPU tests and hypothesis settings."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on the CPU

# Deadlines measure the machine; a fixed order of examples makes a failure in CI one that a developer can repeat.
settings.register_profile("engine", deadline=None, derandomize=True)
settings.load_profile("engine")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real photos and published weights that are not part of the project."""
    if "PSUNET_SHARED" not in os.environ:
        pytest.skip("PSUNET_SHARED is unset: no photos or published weights to test on")
    return Path(os.environ["PSUNET_SHARED"])


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A complete checkpoint folder of the `tiny` preset with random weights: 32 px, 6 words, a vocabulary of 32."""
    from diffusers import AutoencoderDC

    from engine import checkpoint
    from engine.codecs.image import ImageCodec
    from engine.codecs.text import END, TextCodec
    from engine.config import PRESETS
    from engine.model import PSUNet
    from engine.recipes import RECIPES

    folder, config = tmp_path_factory.mktemp("checkpoint") / "tiny", PRESETS["tiny"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PSUNet(config.model)
        # All of them random: as initialised, gates and heads are zero and no sample would depend on anything.
        weights = {name: 0.1 * torch.randn_like(w) for name, w in model.state_dict().items()}
        vectors = torch.nn.functional.normalize(torch.randn(32, 8)) * 8**0.5
        autoencoder = AutoencoderDC(**RECIPES["tiny"].autoencoder_config)
    checkpoint.save(folder, config, weights, torch.float32)
    words = "red green blue big small old new cat dog bird fish tree sun moon star car house man woman child face hand "
    words += "heart flag of with and in on the running"
    TextCodec((END, *words.split()), vectors).save(folder / "text")
    ImageCodec(autoencoder, config.image.size, config.image.patch).save(folder / "image")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
