"""Reads multiple-choice examples: SWAG's columns, or JSON lines with a list of choices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.readers.tables import stream_table, text_problem

MAX_CHOICES = 32  # more are rather a mistake in the file than a question


# One more than there may be, so that too many are noticed.
_ENDINGS = [f"ending{i}" for i in range(MAX_CHOICES + 1)]


class ChoiceExample(NamedTuple):
    """`choices` follow `context`, each after `prefix`; `label` is the right one's number."""

    location: str
    context: str
    prefix: str
    choices: list[str]
    label: int | None


def read_choices(
    path: str | Path,
    context: str = "sent1",
    prefix: str | None = "sent2",
    choices: str = "endings",
    label: str | None = "label",
    row_errors: RowErrors | None = None,
) -> list[ChoiceExample]:
    """Every example of a file; arguments as of `stream_choices`.

    Raises:
        InputError: the file's, and bad rows where `bad` is None.
    """
    row_errors, is_owner = ensure_collector(row_errors)
    found = list(stream_choices(path, row_errors, context, prefix, choices, label))
    if is_owner:
        row_errors.raise_if_any()
    return found


def stream_choices(
    path: str | Path,
    row_errors: RowErrors,
    context: str = "sent1",
    prefix: str | None = "sent2",
    choices: str = "endings",
    label: str | None = "label",
    file: BinaryIO | None = None,
) -> Iterator[ChoiceExample]:
    """Examples from SWAG's columns or from JSON lines as they are read.

    Args:
        path: CSV or TSV with a header, or JSON lines (`tables.stream_table`).
        bad: takes the table's bad rows, and those without 2 to `MAX_CHOICES` choices or whose
            label is none of them.
        context, prefix: columns of the first text and of what stands before every choice; without
            such a prefix (None, or none in the file) the choices stand alone.
        choices: key of a list of choices. Where there is none, the choices are in the columns
            ending0, ending1, ..; empty ones at the end are no choices.
        label: column of the right choice's number, from 0; None: not known.
        file: read in the path's place, which is then only a name (standard input, say).
    """
    optional = [*([prefix] if prefix else []), choices, *_ENDINGS]
    needed = [context, *([label] if label else [])]
    for location, values in stream_table(path, needed, row_errors, optional, True, file):
        found, problem = _choices(values, choices)
        number = None
        before = values.get(prefix, "") if prefix else ""
        problem = text_problem(context, values[context]) or problem
        problem = problem or (text_problem(prefix, before) if prefix else None)
        if label and not problem:
            number, problem = _number(values[label], len(found))
        if problem:
            row_errors.add(location, problem)
        else:
            yield ChoiceExample(location, values[context], before, found, number)


def _choices(values: dict[Any, Any], key: str) -> tuple[list[str], str | None]:
    """The choices of a row, and what is wrong with them."""
    if key in values:
        found = values[key]
        if not isinstance(found, list):
            return [], f"expected a list of choices under {key!r}"
    else:
        columns = [name for name in _ENDINGS if name in values]
        if columns != _ENDINGS[: len(columns)]:
            return [], f"choices are missing among {', '.join(columns)}"
        found = [values[name] for name in columns]
        while found and found[-1] in ("", None):
            found.pop()
    problems = (text_problem(f"choice {i}", choice) for i, choice in enumerate(found))
    if problem := next(filter(None, problems), None):
        return [], problem
    if not 2 <= len(found) <= MAX_CHOICES:
        return [], f"expected 2 to {MAX_CHOICES} choices, found {len(found)}"
    return found, None


def _number(value: Any, choices: int) -> tuple[int | None, str | None]:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal():
        return None, f"expected the number of a choice as label, found {text[:40]!r}"
    if int(text) >= choices:
        return None, f"label {text} is not among its {choices} choices, 0 to {choices - 1}"
    return int(text), None
