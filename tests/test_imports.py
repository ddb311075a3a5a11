"""The package needs none of the frameworks it bridges to, and is cheap to import."""

import ast
import subprocess
import sys
from pathlib import Path

import prelnroberta

SOURCE = Path(prelnroberta.__file__).parent
FOREIGN = {"torch", "tensorflow", "keras", "tf_keras", "absl", "transformers"}


def test_source_never_imports_another_framework():
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            found = {name.partition(".")[0] for name in names} & FOREIGN
            assert not found, f"{path}:{node.lineno} imports {found}"


def test_nothing_pulls_another_framework_in():
    """Every module, in one process; and the package alone loads not even jax."""
    modules = [
        ".".join(("prelnroberta", *path.relative_to(SOURCE).with_suffix("").parts))
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "__init__.py"
    ]
    program = f"""
import importlib, sys
import prelnroberta
assert "jax" not in sys.modules and "numpy" not in sys.modules
for name in {modules}:
    importlib.import_module(name)
found = {FOREIGN - {"absl"}} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_public_names_exist():
    for name in prelnroberta.__all__:
        assert name == "PRESETS" or getattr(prelnroberta, name).__name__ == name
