"""The documentation: the site is built without a warning and loads nothing from elsewhere; figures are up to date."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOADED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//[^>]*>")
needs_mkdocs = pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("mkdocstrings") is None, reason="the extra [docs] is not installed"
)


def build_module(name: str):
    """A file of docs/build, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / "build" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@needs_mkdocs
@pytest.mark.slow
def test_the_site_loads_nothing_from_other_hosts(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not LOADED.search(text), page
        assert 'class="mermaid' not in text, f"{page}: its script would be loaded from elsewhere"


@needs_mkdocs
@pytest.mark.slow
def test_the_reference_has_what_docstrings_and_programs_say(site):
    def text(page: str) -> str:
        return re.sub(r"<[^>]+>", "", (site / page).read_text(encoding="utf-8"))

    assert "samples that wait for a slot enter in the order of their priorities" in text("reference/engine.html")
    assert "N_modality: in-blocks of its own" in text("reference/config.html")  # a comment behind a field
    assert "POST /v1/infill" in text("reference/service.html") and "integer 1 to 64" in text("reference/service.html")
    assert "--guidance-interval START END" in text("reference/commands.html")
    assert "class ColourCodec" in text("how-to/modality.html")


def test_figures_are_those_that_the_program_draws():
    figures = build_module("figures")
    stored = {path.stem: path.read_text(encoding="utf-8") for path in figures.FOLDER.glob("*.svg")}
    assert stored == {name: draw() for name, draw in figures.FIGURES.items()}, "run python docs/build/figures.py"


def test_aligned_columns_of_a_docstring_become_a_list():
    pytest.importorskip("griffe")
    text = "What it is.\n\nsteps  how many,\n    at least one\nseed   of the first\nRaises InputError.\n    x = a·x"
    found = build_module("docstrings").to_markdown(text)
    listed = "- `steps`: how many,\n  at least one\n- `seed`: of the first"
    assert found == f"What it is.\n\n{listed}\n\nRaises InputError.\n\n    x = a·x"
