"""Leaves test modules uncollected whose framework is missing, if `-m` names that framework."""

import importlib.util
import re
from pathlib import Path

import pytest

# A marker, and the packages that a module with this marker may import.
PACKAGES = {
    "torch": ("torch", "onnx", "onnxruntime"),
    "tensorflow": ("tensorflow", "keras", "h5py"),
    "oracle": ("transformers", "sklearn"),
}


def module_markers(path: Path) -> set[str]:
    """Names of the markers in the line `pytestmark = ...` of a test module."""
    line = re.search(r"^pytestmark = .*$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return set(re.findall(r"pytest\.mark\.(\w+)", line[0])) if line else set()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignores modules that `-m` names and this environment cannot import.

    Without `-m "not (torch or ...)"` a missing framework stays an error of collection, so that
    `make test` leaves nothing out silently.
    """
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    named = module_markers(collection_path) & PACKAGES.keys()
    named &= set(re.findall(r"\w+", config.option.markexpr))
    missing = [
        package
        for marker in named
        for package in PACKAGES[marker]
        if importlib.util.find_spec(package) is None
    ]
    return True if missing else None
