"""Class names and their ids, from labels as they are written in files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from prelnroberta.errors import InputError


def label_to_name(value: Any) -> str:
    """A cell or JSON value as a class name: text without outer spaces, 1 as '1', True as 'true'."""
    return value.strip() if isinstance(value, str) else json.dumps(value)


def discover_labels(values: Iterable[Any]) -> tuple[str, ...]:
    """The distinct class names among `values`: sorted by number if all are integers, else by text.

    Raises:
        InputError: `values` is empty.
    """
    names = {label_to_name(value) for value in values}
    if not names:
        raise InputError("no labels to discover: the examples have none; give the labels' names")
    if all(name.lstrip("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


class LabelIds:
    """Ids of class names. If no name is a number, a label may also be the id itself.

    The latter is for files with class numbers that are used with a model that has class names.

    Raises:
        InputError: no names, a repeated name, or an empty one.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._ids = {name: i for i, name in enumerate(self.names)}
        if len(self._ids) < len(self.names) or "" in self._ids or not self.names:
            raise InputError(f"labels {', '.join(map(repr, names))}: expected different names")
        if not any(name.lstrip("-").isdecimal() for name in self.names):
            self._ids |= {str(i): i for i in range(len(self.names))}

    def find(self, value: Any) -> int | str:
        """The id of a label as read, or an error message (str)."""
        name = label_to_name(value)
        if name in self._ids:
            return self._ids[name]
        shown = ", ".join(self.names[:12]) + (", .." if len(self.names) > 12 else "")
        return f"label {name[:40]!r} is not among the {len(self.names)} labels {shown}"
