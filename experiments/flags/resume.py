"""`flags.txt`: the flags of a run, saved with it and compared when it is resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.flags.absl_flags import flagfile
from prelnroberta.errors import InputError

# The first line of flags.txt, a comment to absl. Raise the number when flags are renamed.
FORMAT = "# prelnroberta run, format 2"


def flags_text(settings: Any) -> str:
    """The content of `flags.txt`: a flagfile that runs the same again."""
    return f"{FORMAT}\n{flagfile(settings)}"


def check_same_flags(settings: Any, saved: Path) -> None:
    """Compares the settings with the `flags.txt` of the run that they would resume.

    Raises:
        InputError: the run was written by an older version; or flags differ, with their names.
    """
    text = saved.read_text(encoding="utf-8")
    if not text.startswith(FORMAT):
        raise InputError(
            f"{saved.parent} holds a run of an older version of prelnroberta ({saved} does not "
            f"begin with {FORMAT!r}), which this version cannot resume: give another --run_dir"
        )
    fields = {field.name: field for field in dataclasses.fields(settings)}
    before, now = _parse(text, fields.keys()), _parse(flags_text(settings), fields.keys())
    differing = [
        f"--{name} (there {before.get(name, 'not set')}, here {now.get(name, 'not set')})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not (name in fields and fields[name].metadata["on_resume"] == "free")
    ]
    if differing:
        raise InputError(
            f"{saved.parent} holds a run with other flags: {'; '.join(differing)}. Give the same "
            "flags to resume it, or another --run_dir"
        )


def _parse(text: str, names: Any) -> dict[str, str]:
    """name -> value of the lines of a flagfile, where a bool is --name or --noname."""
    values = {}
    for line in text.splitlines()[1:]:
        name, equals, value = line.removeprefix("--").partition("=")
        if not equals:
            value = str(name in names).lower()
            name = name if name in names else name.removeprefix("no")
        values[name] = value
    return values
