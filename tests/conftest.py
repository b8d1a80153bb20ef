"""What every test file shares: optional data, GPU tests and hypothesis settings."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Deadlines measure the machine; a fixed order of examples makes a failure in CI one that a developer can repeat.
settings.register_profile("engine", deadline=None, derandomize=True)
settings.load_profile("engine")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real photos and published weights that are not part of the project."""
    if "PSUNET_SHARED" not in os.environ:
        pytest.skip("PSUNET_SHARED is unset: no photos or published weights to test on")
    return Path(os.environ["PSUNET_SHARED"])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # only here: a run without GPU tests need not pay for it

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
