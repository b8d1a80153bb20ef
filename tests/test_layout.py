"""Holds the house in order: floors, lazy imports, the kernels link, one place to compile, nothing unpickled, sizes."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {  # a folder stands for all files in it; the table in CONTRIBUTING.md is the same
    "engine.kernels": 1,
    "engine.command": 2,
    "engine.compiled": 2,
    "engine.config": 2,
    "engine.device": 2,
    "engine.errors": 2,
    "engine.files": 2,
    "engine.hub": 2,
    "engine.images": 2,
    "engine.interrupts": 2,
    "engine.native": 2,
    "engine.packages": 2,
    "engine.presets": 2,
    "engine.processes": 2,
    "engine.request": 2,
    "engine.codecs": 3,
    "engine.diffusion": 4,
    "engine.model": 4,
    "engine.adapters": 5,
    "engine.checkpoint": 5,
    "engine.model_card": 5,
    "engine.data": 5,
    "engine.sampling": 5,
    "engine.decoding": 6,
    "engine.preparation": 6,
    "engine.runtime": 6,
    "engine.evaluation": 7,
    "engine.metrics": 7,
    "engine.pipeline": 7,
    "engine.pipeline_components": 7,
    "engine.pipeline_values": 7,
    "engine.serving": 7,
    "engine.training": 7,
    "engine.evaluate": 8,
    "engine.sample": 8,
    "engine.sample_bulk": 8,
    "engine.sample_folder": 8,
    "engine.serve": 8,
    "engine.train": 8,
    "engine": 8,  # the facade
}
LONGEST_FILE, LONGEST_FUNCTION = 360, 65  # lines
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
OF_DIFFUSERS = {"engine.pipeline", "engine.pipeline_components"}  # classes derived from those of diffusers
IMPORTED_WHERE_USED = {
    "accelerate", "diffusers", "gensim", "huggingface_hub", "matplotlib", "peft", "pynvml", "ray", "scipy",
    "torchmetrics", "transformers", "xformers",
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Through the link, since that is how the kernels are imported; rglob follows no links before Python 3.13.
FILES = [*(ROOT / "engine").rglob("*.py"), *(ROOT / "engine" / "kernels").glob("*.py")]
TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in set(FILES)}
MODULES = sorted(TREES)


def floor(module: str) -> int:
    """The floor of a module, or of the folder it is in."""
    places = [place for place in FLOORS if module == place or (module.startswith(f"{place}.") and place != "engine")]
    assert len(places) == 1, f"{module} has no floor: place it in FLOORS and in CONTRIBUTING.md"
    return FLOORS[places[0]]


def imports(nodes) -> set[str]:
    """Modules that these statements import; for `from package import name`, the module of that name if there is one."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES else node.module for name in names}
    return found


def outside_functions(tree: ast.AST):
    """Nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from outside_functions(node)


def calls(tree: ast.AST) -> dict[str, list[ast.Call]]:
    """Calls by the dotted name of what is called."""
    found: dict[str, list[ast.Call]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.setdefault(ast.unparse(node.func), []).append(node)
    return found


def loaded_modules(statement: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter after one statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    own = {name for name in imports(ast.walk(TREES[module])) if name.split(".")[0] == "engine"}
    upward = sorted(name for name in own if floor(name) > floor(module))
    assert not upward, f"{module} (floor {floor(module)}) imports {upward}"


@pytest.mark.parametrize("module", MODULES)
def test_the_engine_imports_neither_benchmarks_nor_tests(module):
    assert not {name.split(".")[0] for name in imports(ast.walk(TREES[module]))} & {"benchmarks", "tests"}


def test_imports_make_no_circle():
    graph = {module: imports(ast.walk(tree)) & TREES.keys() for module, tree in TREES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("engine.kernels.")])
def test_kernels_import_torch_and_triton_only(module):
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    if module == "engine.kernels.attention":
        allowed |= {"xformers"}  # a backend of its own, imported inside the function that calls it
    foreign = {name for name in imports(ast.walk(TREES[module])) if name.split(".")[0] not in allowed}
    assert all(name.startswith("engine.kernels.") for name in foreign), foreign


@pytest.mark.parametrize("module", MODULES)
def test_slow_packages_are_imported_where_they_are_used(module):
    at_import = {name.split(".")[0] for name in imports(outside_functions(TREES[module]))}
    assert not at_import & (IMPORTED_WHERE_USED - ({"diffusers"} if module in OF_DIFFUSERS else set()))


def test_nothing_else_imports_the_pipeline():
    importers = {module for module in MODULES if imports(ast.walk(TREES[module])) & OF_DIFFUSERS}
    assert importers == {"engine.pipeline"}


@pytest.mark.parametrize("statement", ["import engine", "import engine.config", "from engine import Request"])
def test_light_names_import_no_torch(statement):
    assert not loaded_modules(statement) & {"torch", "diffusers", "gensim"}


def test_the_engine_needs_nothing_of_the_service():
    loaded = loaded_modules("import engine.serving.async_engine, engine.runtime, engine.serve")
    assert not loaded & {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "python_multipart"}


def test_facade_offers_what_it_lists():
    import engine

    assert set(engine.__all__) <= set(dir(engine))
    assert all(getattr(engine, name) for name in engine.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = engine.Engin


def test_kernels_are_reached_through_the_link_only():
    link = ROOT / "engine" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("..", "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's package named kernels"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled(module):
    tree = TREES[module]
    assert not {name.split(".")[0] for name in imports(ast.walk(tree))} & PICKLES
    for name, found in calls(tree).items():
        settings = [{k.arg: ast.unparse(k.value) for k in call.keywords} for call in found]
        assert not any(s.get("allow_pickle", "False") != "False" for s in settings), name
        assert name != "torch.load" or all(s.get("weights_only") == "True" for s in settings), name
        assert name.rpartition(".")[0].split(".")[-1] not in {"Word2Vec", "KeyedVectors"} or not name.endswith(".load")


@pytest.mark.parametrize("module", MODULES)
def test_only_graphs_compiles_and_captures_and_only_packages_compiles_ahead_of_time(module):
    found = calls(TREES[module]).keys()
    captures = found & {"torch.compile", "block.compile", "torch.cuda.graph", "torch.cuda.CUDAGraph"}
    assert not captures or module == "engine.sampling.graphs"
    ahead = {
        name for name in found if name.endswith((".export", ".aoti_compile_and_package", ".AOTIModelPackageLoader"))
    }
    assert not ahead or module == "engine.packages"


def test_no_file_is_a_drawer_for_odds_and_ends():
    drawers = {"util", "utils", "helper", "helpers", "common", "misc"}
    assert not drawers & {module.rpartition(".")[2] for module in MODULES}


def test_contributing_has_the_same_floors():
    table = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0].isdigit():
            for name in cells[1].replace("`", "").split():
                place = name.removesuffix(".py").strip("/").replace("/", ".")
                table["engine" if place == "engine.__init__" else place] = int(cells[0])
    assert table == FLOORS


@pytest.mark.parametrize("module", MODULES)
def test_no_file_and_no_function_is_too_long_to_be_read(module):
    tree = TREES[module]
    lines = max((node.end_lineno for node in ast.walk(tree) if hasattr(node, "end_lineno")), default=0)
    assert lines <= LONGEST_FILE, f"{module} has {lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{module}.{node.name} has {length} lines"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_needs_its_docstring(module):
    """`python -OO` has none."""
    attributes = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)]
    assert not any(isinstance(node.value, ast.Name) and node.value.id == "__doc__" for node in attributes)


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
