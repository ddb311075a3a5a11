"""From the labels people write to ids, and the names of a model's classes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from prelnroberta.errors import InputError


def label_to_name(value: Any) -> str:
    """A cell or JSON value as the name of a class: text as it stands, 1 as '1', True as 'true'."""
    return value.strip() if isinstance(value, str) else json.dumps(value)


def discover_labels(values: Iterable[Any]) -> tuple[str, ...]:
    """The distinct names among `values` in a fixed order: by number if all are whole, else by text.

    Raises:
        InputError: none at all.
    """
    names = {label_to_name(value) for value in values}
    if not names:
        raise InputError("no labels to discover: the examples have none; give the labels' names")
    if all(name.lstrip("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


class LabelIds:
    """Ids of labels: by name, or, where no name is a number, by a number in range.

    The second serves files exported with class numbers beside a model that has names.

    Raises:
        InputError: a name given twice or empty.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._ids = {name: i for i, name in enumerate(self.names)}
        if len(self._ids) < len(self.names) or "" in self._ids or not self.names:
            raise InputError(f"labels {', '.join(map(repr, names))}: expected different names")
        if not any(name.lstrip("-").isdecimal() for name in self.names):
            self._ids |= {str(i): i for i in range(len(self.names))}

    def find(self, value: Any) -> int | str:
        """The id, or what is wrong, in words."""
        name = label_to_name(value)
        if name in self._ids:
            return self._ids[name]
        shown = ", ".join(self.names[:12]) + (", .." if len(self.names) > 12 else "")
        return f"label {name[:40]!r} is not among the {len(self.names)} labels {shown}"
