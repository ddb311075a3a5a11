"""The run directory: what makes a folder a run, and what a resumed run is compared with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.flags.resume import check_same_flags, flags_text
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    from experiments.flags.groups.run import RunSettings


def check_run_dir(settings: RunSettings) -> None:
    """Makes the folder of a new run, or compares the flags of the run that is there.

    Raises:
        InputError: the run has other flags, or the folder cannot hold a new run.
    """
    saved = settings.run_path / "flags.txt"
    if saved.exists():
        check_same_flags(settings, saved)
    else:
        _make_run_dir(settings.run_path)


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        empty = not any(run_dir.iterdir())
    except FileExistsError:
        raise InputError(f"--run_dir={run_dir} is a file: give a new or empty folder") from None
    except OSError as error:
        raise InputError(f"--run_dir={run_dir} cannot be made: {error.strerror}") from None
    if not empty:
        raise InputError(f"--run_dir={run_dir} exists and holds no run: give a new or empty folder")
    if not os.access(run_dir, os.W_OK):
        raise InputError(f"--run_dir={run_dir} cannot be written to: give another folder")


def init_run_dir(
    settings: RunSettings,
    record: str,
    content: dict[str, Any],
    write_more: Callable[[], None] = lambda: None,
) -> None:
    """Writes flags.txt, what `write_more` writes, and last the record of the data.

    The flags come first, so that a run killed here is a run already, whose next start writes the
    rest. The record comes last: from then on the data must be the data that it names.

    Args:
        record: name of the JSON file that says what the data was.
    """
    with atomic_write(settings.run_path / "flags.txt") as partial:
        partial.write_text(flags_text(settings), encoding="utf-8")
    write_more()
    with atomic_write(settings.run_path / record) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_record(run_dir: Path, record: str) -> dict[str, Any] | None:
    """The record of the data that the run began with; None before it was written."""
    path = run_dir / record
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
