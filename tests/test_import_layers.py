"""Which packages may import which; no circular imports; what test modules may import."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import PACKAGES, module_markers

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {"torch", "tensorflow", "keras", "transformers"}
FORBIDDEN = {
    "prelnroberta": FRAMEWORKS | {"absl", "experiments", "bridges"},
    "bridges": {"absl", "experiments"},
}
# A package, or module beside packages, and those it may import, in functions as well as at the
# top. Each row may name only rows above it.
LAYERS = {
    "prelnroberta.errors": set(),
    "prelnroberta.files": set(),
    "prelnroberta.config": {"prelnroberta.errors"},
    "prelnroberta.params": {"prelnroberta.config", "prelnroberta.errors"},
    "prelnroberta.data": {"prelnroberta.errors"},
    "prelnroberta.data.readers": {"prelnroberta.data", "prelnroberta.errors"},
    "prelnroberta.data.pretraining": {
        *("prelnroberta.data", "prelnroberta.errors", "prelnroberta.files"),
    },
    "prelnroberta.data.features": {
        *("prelnroberta.config", "prelnroberta.data", "prelnroberta.data.pretraining"),
        *("prelnroberta.data.readers", "prelnroberta.errors"),
    },
    "prelnroberta.data.batches": {
        *("prelnroberta.config", "prelnroberta.data", "prelnroberta.data.features"),
        "prelnroberta.errors",
    },
    "prelnroberta.distributed": {
        *("prelnroberta.config", "prelnroberta.errors", "prelnroberta.params"),
    },
    "prelnroberta.model": {
        *("prelnroberta.config", "prelnroberta.distributed", "prelnroberta.errors"),
        "prelnroberta.params",
    },
    "prelnroberta.metrics": {"prelnroberta.data.readers", "prelnroberta.model"},
    "prelnroberta.inference": {
        *("prelnroberta.config", "prelnroberta.data", "prelnroberta.errors"),
        *("prelnroberta.files", "prelnroberta.model", "prelnroberta.params"),
    },
    "prelnroberta.pretrained": {
        *("prelnroberta.config", "prelnroberta.errors", "prelnroberta.files"),
        *("prelnroberta.inference", "prelnroberta.model", "prelnroberta.params"),
    },
    "prelnroberta.training": {
        *("prelnroberta.config", "prelnroberta.distributed", "prelnroberta.errors"),
        *("prelnroberta.model", "prelnroberta.params"),
    },
    "bridges.formats": {
        *("prelnroberta.config", "prelnroberta.data", "prelnroberta.errors"),
        *("prelnroberta.files", "prelnroberta.params", "prelnroberta.pretrained"),
    },
    "bridges.pytorch": {
        *("prelnroberta.config", "prelnroberta.errors", "prelnroberta.files"),
        *("prelnroberta.inference", "prelnroberta.params", "prelnroberta.pretrained"),
    },
    "bridges.tensorflow": {
        *("bridges.formats", "prelnroberta.config", "prelnroberta.errors", "prelnroberta.files"),
        *("prelnroberta.inference", "prelnroberta.model", "prelnroberta.params"),
        "prelnroberta.pretrained",
    },
    "bridges.verify": {
        *("bridges.formats", "bridges.pytorch", "bridges.tensorflow", "prelnroberta"),
        *("prelnroberta.config", "prelnroberta.errors", "prelnroberta.params"),
        "prelnroberta.pretrained",
    },
    "experiments.tasks": {
        *("prelnroberta.config", "prelnroberta.data", "prelnroberta.data.batches"),
        *("prelnroberta.data.features", "prelnroberta.data.pretraining"),
        *("prelnroberta.data.readers", "prelnroberta.errors", "prelnroberta.metrics"),
        *("prelnroberta.model", "prelnroberta.params"),
    },
    "experiments.common.find_model": {
        "prelnroberta.errors",
    },
    "experiments.flags": {
        *("experiments.common.find_model", "experiments.tasks", "prelnroberta.config"),
        *("prelnroberta.data.pretraining", "prelnroberta.distributed", "prelnroberta.errors"),
        *("prelnroberta.model", "prelnroberta.training"),
    },
    "experiments.common": {
        *("bridges.verify", "experiments.flags", "experiments.tasks", "prelnroberta.config"),
        *("prelnroberta.data", "prelnroberta.data.batches", "prelnroberta.data.features"),
        *("prelnroberta.data.readers", "prelnroberta.distributed", "prelnroberta.errors"),
        *("prelnroberta.files", "prelnroberta.metrics", "prelnroberta.model"),
        *("prelnroberta.params", "prelnroberta.pretrained", "prelnroberta.training"),
    },
    "experiments.benchmark": {
        *("bridges.pytorch", "bridges.tensorflow", "experiments.common", "experiments.flags"),
        *("prelnroberta.config", "prelnroberta.data", "prelnroberta.data.batches"),
        *("prelnroberta.data.features", "prelnroberta.data.pretraining"),
        *("prelnroberta.distributed", "prelnroberta.errors", "prelnroberta.files"),
        *("prelnroberta.inference", "prelnroberta.model", "prelnroberta.params"),
        *("prelnroberta.pretrained", "prelnroberta.training"),
    },
    "experiments": {
        *("bridges.formats", "bridges.pytorch", "bridges.tensorflow", "bridges.verify"),
        *("experiments.common", "experiments.common.find_model", "experiments.flags"),
        *("experiments.tasks", "prelnroberta.config", "prelnroberta.data"),
        *("prelnroberta.data.batches", "prelnroberta.data.pretraining"),
        *("prelnroberta.data.readers", "prelnroberta.distributed", "prelnroberta.errors"),
        *("prelnroberta.files", "prelnroberta.inference", "prelnroberta.metrics"),
        *("prelnroberta.model", "prelnroberta.params", "prelnroberta.pretrained"),
        "prelnroberta.training",
    },
}


def module_name(path: Path) -> str:
    name = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    return name.removesuffix(".__init__")


@functools.cache
def sources() -> dict[str, Path]:
    """Every module of the three packages and of the tests' helpers."""
    folders = ("prelnroberta", "bridges", "experiments", "tests")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {module_name(path): path for path in paths}


def imported_names(tree: ast.AST, top_level: bool = False) -> Iterator[str]:
    """Dotted names that are imported; `from a import b` gives a.b."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if top_level and isinstance(child, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "a relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imported_names(child, top_level)


@functools.cache
def imports(path: Path, top_level: bool = False) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(imported_names(tree, top_level))


def imported_packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@functools.cache
def imported_modules(module: str, top_level: bool = False) -> set[str]:
    """Modules of this repository that a module imports."""
    found = set()
    for name in imports(sources()[module], top_level):
        while name and name not in sources():
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module}


def layer_of(module: str) -> str | None:
    """The longest row of LAYERS that a module belongs to; `prelnroberta` itself is in none."""
    while module and module not in LAYERS:
        module = module.rpartition(".")[0]
    return module or None


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_no_forbidden_packages(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported_packages(path) & FORBIDDEN[package], path


def test_layers_name_only_layers_above():
    above = {"prelnroberta"}  # lazy: it imports nothing until a name is read
    for layer, allowed in LAYERS.items():
        assert allowed <= above, layer
        above.add(layer)


@pytest.mark.parametrize("package", ["prelnroberta", "bridges", "experiments"])
def test_every_package_has_a_layer(package):
    for module in sources():
        if module.startswith(f"{package}."):
            assert layer_of(module) is not None or module == package, module


@pytest.mark.parametrize("layer", LAYERS)
def test_modules_import_only_layers_of_their_row(layer):
    for module in sources():
        if layer_of(module) != layer:
            continue
        for imported in imported_modules(module):
            allowed = LAYERS[layer] | {layer}
            assert (layer_of(imported) or imported) in allowed, f"{module} imports {imported}"


def test_no_modules_import_each_other():
    """In functions as well: graphlib raises CycleError with the modules of a circle."""
    graph = {module: imported_modules(module) for module in sources()}
    list(TopologicalSorter(graph).static_order())


def test_only_experiments_flags_imports_absl():
    for module, path in sources().items():
        if "absl" in imported_packages(path):
            assert module.startswith(("experiments.flags", "tests.experiments.")), module


def test_no_test_imports_a_test_file():
    for module, path in sources().items():
        for name in imports(path):
            parts = name.split(".")
            assert not (parts[0] == "tests" and any(p.startswith("test_") for p in parts)), (
                f"{module} imports {name}"
            )


def packages_at_import(module: str, seen: set[str]) -> set[str]:
    """Packages of others that importing a module imports, by way of this repository's modules."""
    seen.add(module)
    found = {name.partition(".")[0] for name in imports(sources()[module], top_level=True)}
    for other in imported_modules(module, top_level=True) - seen:
        found |= packages_at_import(other, seen)
    return found


def test_test_modules_are_marked_with_the_frameworks_they_import():
    """So that `make test-core` can leave them uncollected; see tests/conftest.py."""
    for module, path in sources().items():
        if not path.name.startswith("test_"):
            continue
        packages = packages_at_import(module, set())
        needed = {marker for marker, names in PACKAGES.items() if packages & set(names)}
        assert needed <= module_markers(path), f"{module} imports {sorted(needed)}"


def test_test_functions_are_marked_with_the_frameworks_they_import():
    """Imports in a test function need the marker on it, unless the module has it."""
    for path in sources().values():
        if not path.name.startswith("test_"):
            continue
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            found = {name.partition(".")[0] for name in imported_names(function)}
            needed = {marker for marker, names in PACKAGES.items() if found & set(names)}
            decorators = " ".join(map(ast.unparse, function.decorator_list))
            marked = module_markers(path) | set(re.findall(r"pytest\.mark\.(\w+)", decorators))
            assert needed <= marked, f"{path.name}: {function.name} imports {sorted(needed)}"


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_importing_prelnroberta_loads_no_other_framework():
    modules = [module for module in sources() if module.partition(".")[0] == "prelnroberta"]
    code = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'tensorflow', 'keras', 'transformers'} & set(sys.modules)))"
    )
    assert run(code).strip() == "[]"


PROGRAMS = ["pretrain", "finetune", "evaluate", "predict", "demo", "convert", "parity", "export"]


@pytest.mark.parametrize("program", [*PROGRAMS, "example_data"])
def test_help_loads_no_jax(program):
    """--help is quick because it imports nothing heavy."""
    code = (
        f"import sys, experiments.{program}\n"
        "print(sorted({'jax', 'flax', 'orbax', 'tokenizers', 'matplotlib'} & set(sys.modules)))"
    )
    assert run(code).strip() == "[]"
