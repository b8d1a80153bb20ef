"""Every file in examples/ runs, with few steps, and does what its docstring says."""

import ast
import importlib
import sys
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Imports an example by its name; it then runs in an empty folder."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module
    for name in EXAMPLES:
        sys.modules.pop(name, None)


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.effect_noise((90, 60), 80).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_it_draws_a_grid(example, capsys):
    example("sample").main(["--num", "2", "--steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == ["0", "1", "0", "1", "7", "8"]
    assert lines[0] == "0 red heart" and lines[2].startswith("0 flag")
    with Image.open("examples.png") as grid:
        assert grid.width < grid.height  # three rows of two


def test_it_fills_a_photo_in(example, photo):
    example("infill_photo").main([str(photo), "--num", "1", "--steps", "2", "--box", "0.5", "0", "1", "1"])
    with Image.open("infilled.png") as grid:
        side, given, masked, filled = 128, 8, 8 + 136, 8 + 2 * 136  # enlarged twice, with margins of 8 pixels

        def part(left: int, x: int) -> bytes:
            return grid.crop((left + x, 8, left + x + 56, 8 + side)).tobytes()  # short of the box, which a crop moved

        assert part(filled, 0) == part(given, 0) == part(masked, 0)
        assert part(filled, 72) != part(given, 72) and part(filled, 72) != part(masked, 72)


def test_it_serves_images(example, monkeypatch):
    from fastapi.testclient import TestClient

    from engine.serving.async_engine import AsyncEngine, QueueFull

    def full(self, samples: int) -> None:
        raise QueueFull(64, 64)

    with TestClient(example("fastapi_app").app) as client:
        answer = client.get("/draw", params={"prompt": "red heart", "steps": 2})
        refused = client.get("/draw", params={"prompt": "qwertz"})
        monkeypatch.setattr(AsyncEngine, "check_room", full)
        late = client.get("/draw", params={"prompt": "red heart"})
    assert answer.content.startswith(b"\x89PNG") and answer.headers["content-type"] == "image/png"
    assert refused.status_code == 422 and "qwertz" in refused.json()["detail"]
    assert late.status_code == 503 and "the queue is full" in late.json()["detail"]


def test_it_trains_on_a_folder(example, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("red", "green", "blue", "dark red"):
        Image.new("RGB", (32, 32), name.replace(" ", "")).save(images / f"{name}.png")
    (images / "notes.txt").write_text("not an image")
    example("train_on_folder").main([str(images), "--out", "run", "--preset", "tiny", "--steps", "1"])
    assert "4 usable images" in capsys.readouterr().out
    with Image.open("run/sample.png") as sample:
        assert sample.size == (32, 32)


def test_it_adds_a_modality(example, capsys):
    example("new_modality").main(["--out", "colours", "--steps", "1"])
    lines = [line.split(" → ") for line in capsys.readouterr().out.splitlines() if "→" in line]
    assert [line[0] for line in lines[:2]] == ["dark red", "dark green"] and len(lines) == 12
    assert all(len(line[1]) == 7 and line[1][0] == "#" for line in lines[:10])


def test_it_adds_a_solver(example):
    example("new_solver").main(["--num", "1", "--steps", "2"])
    with Image.open("heun.png") as grid:
        assert grid.height > 200  # two rows


@pytest.mark.parametrize("steps", [20, 40])
def test_heun_errs_less_than_ddim_at_as_many_evaluations(example, steps):
    """Of data N(0, s²), whose x̂0 and whose end of the ODE, s·x_N / √(α_N²·s² + σ_N²), are known."""
    import torch

    from engine.diffusion.schedule import NoiseSchedule, timesteps

    solvers, schedule, s = example("new_solver"), NoiseSchedule("cosine", 1000), 0.5

    def variance(t: int) -> float:
        return float(schedule.alpha(t) ** 2 * s**2 + schedule.sigma(t) ** 2)

    def estimate(x: torch.Tensor, t: int) -> torch.Tensor:
        return float(schedule.alpha(t)) * s**2 / variance(t) * x

    def error(solver, steps: int) -> float:
        start = torch.ones(1, 1, dtype=torch.float64)
        return abs(solver(estimate, start, schedule, timesteps(1000, steps)).item() - s / variance(1000) ** 0.5)

    assert error(solvers.heun, steps) < 0.8 * error(solvers.ddim, 2 * steps)
    assert error(solvers.heun, 2 * steps) < error(solvers.heun, steps) / 2.6
    assert error(solvers.ddim, 2 * steps) < error(solvers.ddim, steps) / 1.8


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_import_public_names_only_and_say_what_one_sees(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "engine":
            assert not any(part.startswith("_") for part in (*node.module.split("."), *(a.name for a in node.names)))
    assert "examples/" in ast.get_docstring(tree) or "--app-dir examples" in ast.get_docstring(tree)


def test_every_example_is_run_here():
    assert EXAMPLES == ["fastapi_app", "infill_photo", "new_modality", "new_solver", "sample", "train_on_folder"]
