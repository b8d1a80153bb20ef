"""What a program may rely on, as types: checked by mypy through tests/test_types.py, never run."""

from concurrent.futures import Future
from pathlib import Path

from PIL import Image
from typing_extensions import assert_type

from engine import AsyncEngine, Engine, InputError, Request, Result
from engine.checkpoint import Checkpoint, load
from engine.request import Sample


def sampled(engine: Engine, folder: Path) -> None:
    one, several = Request(prompt="red _", image=folder / "cat.png", order=("text", "image")), [Request(), Request()]
    assert_type(engine.generate(one), Result)
    assert_type(engine.generate(several, print), list[Result])
    assert_type(engine.submit(one, priority=1), Future[Result])
    assert_type(engine.submit(several, preview=shown, preview_every=2), Future[list[Result]])
    assert_type(engine.generate(one).image, Image.Image)
    assert_type(engine.generate(one).text, str)
    assert_type(engine.stats().samples, int)


def shown(samples: dict[int, Sample]) -> None:
    assert_type(samples[0].word_confidence, tuple[float, ...])


def loaded(folder: str) -> None:
    assert_type(load(folder), Checkpoint)
    with Engine.from_pretrained(folder, dtype="float32") as engine:
        assert_type(engine, Engine)
    try:
        Request(steps=0)
    except InputError as error:
        assert_type(error.argument, str)


async def served(engine: AsyncEngine) -> None:
    handle = await engine.submit(Request(), deadline=1.5)
    assert_type(await handle.result(), Result)
    assert_type(await engine.generate(Request()), Result)


def refused(engine: Engine) -> None:
    """Each of these is an error; mypy reports an `ignore` that is not needed."""
    Request(steps="many")  # type: ignore[arg-type]
    engine.generate("red heart")  # type: ignore[arg-type]
    engine.submit(Request(), shown)  # type: ignore[arg-type]
