"""A million samples: latents stay on disk, and reading them keeps up with training."""

import pytest

from benchmarks.reading import measure


@pytest.mark.parametrize(
    "samples, batches",
    [(5000, 20), pytest.param(1_000_000, 1000, marks=pytest.mark.endurance)],
)
def test_reading_holds_no_latents_in_memory(tmp_path, samples, batches):
    found = measure(tmp_path, samples, batches, steps=1)
    assert found["samples read"] == 256 * batches
    assert found["MB after reading"] - found["MB before reading"] < 32
    if samples > 100_000:
        assert found["latents MB"] > 900 and found["MB opened"] - found["MB before opening"] < 1000
