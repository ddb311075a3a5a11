"""`flag(default, help)`: a dataclass field that is also a command-line flag."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

# What a resumed run does with a flag:
#   same     it must have the value that the run began with
#   free     it may change: no number of the run depends on it, or only their rounding (the mesh)
#   unsaved  it belongs to one launch of the program and is not written to flags.txt
OnResume = Literal["same", "free", "unsaved"]


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    repeated: bool = False,
    on_resume: OnResume = "same",
) -> Any:
    """A field with a default.

    Args:
        help: the text of `--help`.
        choices: the allowed values of a string.
        repeated: a tuple is given as one flag a value; otherwise as one comma-separated flag.
        on_resume: what a resumed run does with the flag.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "repeated": repeated,
        "on_resume": on_resume,
    }
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, *, on_resume: OnResume = "same") -> Any:
    """A field without a default: the flag must be given."""
    return flag(dataclasses.MISSING, help, on_resume=on_resume)
