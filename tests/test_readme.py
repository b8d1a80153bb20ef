"""The code blocks of the README and of docs/ are run, in reading order, in one folder that stands for the repository.

Every ```bash and ```python block is run, unless the comment `<!-- not run: reason -->` stands on the line above it. The
program of `forked_python` takes the place of `.venv/bin/python`; installing and `-m pytest` are left to `.ci/run`.
A page's ```python blocks are one program. Those that include a file of examples/ are run by tests/test_examples.py.
"""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```(?P<language>bash|python)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INSTALL = re.compile(r"^python3 -m venv .*?pip install .*? && (?=\.venv/bin/python )", re.MULTILINE)
PYTEST = re.compile(r"^\.venv/bin/python -m pytest.*\n", re.MULTILINE)
OUTPUTS = {"data", "runs", "samples"}  # what the commands write; everything else of the repository they may read


def runnable(code: str, python: str) -> str:
    """A bash block without its installing and its pytest lines."""
    code = PYTEST.sub("", INSTALL.sub("", code))
    return code.replace(".venv/bin/python", shlex.quote(python))


def blocks() -> list:
    """(reason, language, code) of the blocks of all pages, those in Python of a page joined where the first one is."""
    found = []
    for page in PAGES:
        matches = [m for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if "--8<--" not in m["code"]]
        program = [m for m in matches if m["language"] == "python" and not m["reason"]]
        for i, m in enumerate(matches):
            if m in program[1:]:
                continue
            code = "\n".join(part["code"] for part in program) if m in program else m["code"]
            name = page.relative_to(ROOT).with_suffix("").as_posix()
            found.append(pytest.param(m["reason"], m["language"], code, id=f"{name}-{i}"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Links to all that the repository holds, so that commands find its files and write their own outside it."""
    folder = tmp_path_factory.mktemp("readme")
    for entry in ROOT.iterdir():
        if entry.name not in OUTPUTS:
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    """A program that takes the place of the interpreter: importing torch would be most of the time of these tests."""
    with TemporaryDirectory() as short:  # a socket's path has a hundred characters at most
        program = Path(short) / "python"
        command = [sys.executable, Path(__file__).with_name("forked_python.py"), program]
        # It ends when its standard input is closed, so also when this process is killed.
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as server:
            while not program.exists():
                assert server.poll() is None, "the server has failed"
                time.sleep(0.05)
            yield str(program)


@pytest.mark.slow
@pytest.mark.parametrize(("reason", "language", "code"), blocks())
def test_block_runs(reason, language, code, folder, python):
    if reason:
        pytest.skip(reason)
    if language == "python":
        command = [python, "-c", code]
    else:
        command = ["bash", "-euo", "pipefail", "-c", runnable(code, python)]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_links_of_the_readme_lead_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_ci_runs_the_test_line_of_the_readme():
    lines = [line for line in README.splitlines() if "-e '.[test]' && .venv/bin/python -m pytest" in line]
    assert len(lines) == 1, "the README gives exactly one line that installs and runs the tests"
    assert lines[0] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_only_installing_and_pytest_are_left_out_of_a_block():
    code = (
        "python3 -m venv .venv && .venv/bin/pip install --quiet . && .venv/bin/python -m engine.sample\n"
        "python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[test]' && .venv/bin/python -m pytest\n"
        ".venv/bin/python -m engine.sample --num 2 && ls samples\n"
    )
    expected = "'my python' -m engine.sample\n'my python' -m engine.sample --num 2 && ls samples\n"
    assert runnable(code, "my python") == expected
