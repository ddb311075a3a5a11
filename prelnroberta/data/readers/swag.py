"""Reads multiple-choice examples: SWAG's columns, or JSON lines with a list of choices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.readers.tables import stream_table, text_problem

MAX_CHOICES = 32  # more are probably a mistake in the file
# One more column than allowed, so that a row with too many choices is noticed.
_ENDINGS = [f"ending{i}" for i in range(MAX_CHOICES + 1)]


class ChoiceExample(NamedTuple):
    """A context and its possible continuations, each `prefix` followed by a choice.

    `label` is the index of the right choice; None if it is unknown.
    """

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
    """All examples of a file; arguments as of `stream_choices`.

    Raises:
        InputError: as of `stream_table`; or there are unusable rows and `row_errors` is None.
    """
    row_errors, is_owner = ensure_collector(row_errors)
    examples = list(stream_choices(path, row_errors, context, prefix, choices, label))
    if is_owner:
        row_errors.raise_if_any()
    return examples


def stream_choices(
    path: str | Path,
    row_errors: RowErrors,
    context: str = "sent1",
    prefix: str | None = "sent2",
    choices: str = "endings",
    label: str | None = "label",
    file: BinaryIO | None = None,
) -> Iterator[ChoiceExample]:
    """Yields examples while reading a CSV or TSV with a header, or JSON lines.

    Args:
        path, file: as of `tables.stream_table`.
        row_errors: collects unusable rows: those of the table, rows without 2 to `MAX_CHOICES`
            choices, and rows whose label is not the index of a choice.
        context: column of the first text.
        prefix: column of a text that precedes every choice; it may be None, or missing in the
            file.
        choices: key of a list of choices. If there is no such key, the choices are the columns
            ending0, ending1, ..; empty ones at the end are ignored.
        label: column of the index of the right choice, from 0; None if it is unknown.
    """
    optional = [*([prefix] if prefix else []), choices, *_ENDINGS]
    required = [context, *([label] if label else [])]
    for location, values in stream_table(path, required, row_errors, optional, True, file):
        found, problem = _parse_choices(values, choices)
        prefix_text = values.get(prefix, "") if prefix else ""
        problem = text_problem(context, values[context]) or problem
        problem = problem or (text_problem(prefix, prefix_text) if prefix else None)
        index = None
        if label and not problem:
            index, problem = _parse_label(values[label], len(found))
        if problem:
            row_errors.add(location, problem)
        else:
            yield ChoiceExample(location, values[context], prefix_text, found, index)


def _parse_choices(values: dict[Any, Any], key: str) -> tuple[list[str], str | None]:
    """(the choices of a row, the problem or None)."""
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


def _parse_label(value: Any, num_choices: int) -> tuple[int | None, str | None]:
    """(the index of the right choice, the problem or None)."""
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal():
        return None, f"expected the number of a choice as label, found {text[:40]!r}"
    if int(text) >= num_choices:
        return None, f"label {text} is not among its {num_choices} choices, 0 to {num_choices - 1}"
    return int(text), None
