"""The project installs beside Hugging Face's package `kernels`, and neither disturbs the other.

Everything happens on a copy of the sources, in throw-away virtual environments that see the packages of this test run
(torch, setuptools) through a .pth file: no network, and nothing written into the repository.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from engine import __version__

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("engine", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")
NOT_INSTALLED = ("benchmarks", "docs", "examples", "tests")
STUB = "PUBLISHER = 'Hugging Face'\n"
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")


def run(*command, cwd: Path, env: dict[str, str] | None = None) -> str:
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """What the packages are built from, with the link as a link."""
    folder = tmp_path_factory.mktemp("repository")
    for name in (*SOURCES, *NOT_INSTALLED):
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder)
    measured = folder / "kernels" / "measured.json"
    if not measured.exists():  # none before the first measurement
        measured.write_text("[]\n")
    return folder


@pytest.fixture(scope="module")
def shipped(repository) -> set[str]:
    """Paths of all files that an installed engine consists of."""
    engine = repository / "engine"
    paths = (*engine.rglob("*"), *engine.glob("assets/*/*/*"))  # rglob passes over links to folders
    files = {path.relative_to(repository).as_posix() for path in paths if path.is_file()}
    return files | {f"engine/kernels/{path.name}" for path in (repository / "kernels").glob("*.*")}


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory) -> Path:
    """Links to the packages of this test run, less the engine that may be installed among them."""
    folder = tmp_path_factory.mktemp("dependencies")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("engine", "psunet_engine")):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module", params=["regular", "editable"])
def environment(request, repository, dependencies, tmp_path_factory) -> Path:
    """A virtual environment with a stub of Hugging Face's kernels, into which the project was then installed."""
    folder = tmp_path_factory.mktemp(request.param)
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    (packages / "kernels").mkdir()
    (packages / "kernels" / "__init__.py").write_text(STUB)
    (packages / "of_this_test_run.pth").write_text(f"{dependencies}\n")
    target = ["-e", "."] if request.param == "editable" else ["."]
    run(python, *PIP, "install", *OFFLINE, *target, cwd=repository)
    assert (packages / "kernels" / "__init__.py").read_text() == STUB
    assert [path.name for path in (packages / "kernels").glob("*.py")] == ["__init__.py"]
    return folder


@pytest.mark.parametrize("where", ["repository root", "elsewhere"])
def test_engine_and_hugging_face_kernels_do_not_disturb_each_other(environment, repository, where, tmp_path):
    ours = [f"engine.kernels.{path.stem}" for path in sorted((repository / "kernels").glob("*.py"))]
    assert ours, "no kernel to import"
    code = f"import kernels, {', '.join(ours)}; print(kernels.PUBLISHER)"
    cwd = repository if where == "repository root" else tmp_path
    assert run(environment / "bin" / "python", "-c", code, cwd=cwd) == "Hugging Face"


def test_elsewhere_the_installed_engine_is_found(environment, repository, tmp_path):
    home = run(environment / "bin" / "python", "-c", "import engine; print(engine.__file__)", cwd=tmp_path)
    expected = repository if environment.name.startswith("editable") else environment
    assert Path(home).is_relative_to(expected)


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, *PIP, "wheel", *OFFLINE, "--wheel-dir", folder, ".", cwd=repository)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_holds_the_whole_engine_and_no_second_kernels(wheel, shipped):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name for name in names if ".dist-info/" not in name} == shipped
    assert {"engine/py.typed", "engine/serving/page/index.html", "engine/assets/emoji/model.safetensors"} <= shipped
    assert {"engine/kernels/cfg_step.py", "engine/kernels/block.cpp", "engine/kernels/measured.json"} <= shipped


@pytest.mark.slow
def test_wheel_samples_offline_without_the_repository(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, *PIP, "install", "--no-index", "--no-deps", "--target", installed, wheel, cwd=elsewhere)
    code = (
        "import sys, engine.sample as s; print(s.__file__); sys.exit(s.main(['--steps', '2', '--num', '1', '--quiet']))"
    )
    environment = {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "HOME": str(elsewhere)}
    file = run(sys.executable, "-c", code, cwd=elsewhere, env=os.environ | environment)
    assert Path(file).is_relative_to(installed)
    assert (elsewhere / "samples" / "0000.png").stat().st_size > 0


def test_version_changelog_and_tags_agree(wheel):
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    released = headings[1:] if headings[0] == "Unreleased" else headings
    assert released[0] == __version__ and wheel.name.split("-")[1] == __version__
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in released)
    git = subprocess.run(["git", "tag", "--list", "v*"], cwd=ROOT, capture_output=True, text=True)
    assert {tag.removeprefix("v") for tag in git.stdout.split()} <= set(released)


def test_source_distribution_builds_the_same_wheel(repository, shipped, tmp_path):
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", build, tmp_path, cwd=repository)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert shipped <= names
    assert not {name for name in names if name.startswith(("kernels", "benchmarks", "docs", "examples"))}
    run(sys.executable, *PIP, "wheel", *OFFLINE, "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert shipped <= set(zipfile.ZipFile(wheel).namelist())
