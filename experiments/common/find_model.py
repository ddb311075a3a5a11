"""Finds the model that a user names: a Hugging Face folder, or a run."""

from __future__ import annotations

from pathlib import Path

from prelnroberta.errors import InputError


def find_model_folder(path: str) -> Path:
    """The Hugging Face folder at `path`, or the one inside a finished run.

    Raises:
        InputError: the run is not finished, or there is no model.
    """
    folder = Path(path)
    for found in (folder, folder / "model"):
        if (found / "config.json").exists():
            return found
    if (folder / "flags.txt").exists():
        raise InputError(f"{folder} is a run that has no model yet: finish it first")
    raise InputError(f"{folder}: no config.json found, expected a model folder or a run")
