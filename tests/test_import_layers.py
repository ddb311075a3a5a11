"""The arrows of import: experiments -> prelnroberta <- bridges, and nothing heavy by the way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "prelnroberta": {
        "torch",
        "tensorflow",
        "keras",
        "absl",
        "transformers",
        "experiments",
        "bridges",
    },
    "bridges": {"experiments"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_source_keeps_the_arrows(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & FORBIDDEN[package], path


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_importing_all_of_it_loads_no_other_framework():
    modules = [
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in sorted((ROOT / "prelnroberta").rglob("*.py"))
    ]
    code = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'tensorflow', 'keras', 'transformers'} & set(sys.modules)))"
    )
    assert run(code).strip() == "[]"


PROGRAMS = ["pretrain", "finetune", "evaluate", "predict", "demo", "convert", "parity", "export"]


@pytest.mark.parametrize("program", [*PROGRAMS, "example_data"])
def test_help_loads_no_jax(program):
    """--help answers at once because nothing heavy is imported to give it."""
    code = (
        f"import sys, experiments.{program}\n"
        "print(sorted({'jax', 'flax', 'orbax', 'tokenizers', 'matplotlib'} & set(sys.modules)))"
    )
    assert run(code).strip() == "[]"
