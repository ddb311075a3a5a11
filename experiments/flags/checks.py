"""Checks of flag values that several programs share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from prelnroberta.errors import InputError


def check_positive(settings: Any, *names: str) -> None:
    """Raises InputError for a flag below 1. A flag that is None is not set, and passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f"--{name}={value}, expected 1 or more")


def check_new_folder(path: str) -> None:
    """Raises InputError for an --output that would be overwritten."""
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"--output={folder} exists: name a new or empty folder")


def check_installed(module: str, extra: str, flag: str) -> None:
    """Raises InputError, before any work, for a flag whose library is not installed."""
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{flag} needs {module}: pip install -e '.[{extra}]'")
