"""What gets installed; pyproject.toml has everything else."""

from setuptools import setup

setup(
    # Named one by one, because engine/kernels is a link to ../kernels: search tools would also find the folder behind
    # it and install a second, top-level `kernels` over Hugging Face's package of that name.
    packages=[
        "engine",
        "engine.codecs",
        "engine.data",
        "engine.diffusion",
        "engine.kernels",
        "engine.metrics",
        "engine.model",
        "engine.sampling",
        "engine.serving",
        "engine.training",
    ],
    package_data={
        "engine": ["assets/**/*", "py.typed"],
        "engine.kernels": ["block.cpp", "measured.json"],
        "engine.serving": ["page/*"],
    },
)
