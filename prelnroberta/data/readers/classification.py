"""Reads texts, or pairs of texts, and their labels from tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.readers.tables import Column, stream_table, text_problem

_BINARY_VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


class TextExample(NamedTuple):
    """A text or pair of texts.

    `label` is a cell or JSON value as read; a list of names if the labels are in several columns;
    None if it is unknown.
    """

    location: str
    text: str
    pair: str | None = None
    label: Any = None


def read_text_examples(
    path: str | Path,
    text: Column,
    pair: Column | None = None,
    label: Column | Sequence[Column] | None = None,
    header: bool | None = None,
    row_errors: RowErrors | None = None,
) -> list[TextExample]:
    """All examples of a file; arguments as of `stream_text_examples`.

    Raises:
        InputError: as of `stream_table`; or there are unusable rows and `row_errors` is None.
    """
    row_errors, is_owner = ensure_collector(row_errors)
    examples = list(stream_text_examples(path, text, row_errors, pair, label, header))
    if is_owner:
        row_errors.raise_if_any()
    return examples


def stream_text_examples(
    path: str | Path,
    text: Column,
    row_errors: RowErrors,
    pair: Column | None = None,
    label: Column | Sequence[Column] | None = None,
    header: bool | None = None,
    file: BinaryIO | None = None,
) -> Iterator[TextExample]:
    """Yields the examples of a CSV, TSV, JSON-lines or text file while reading it.

    Args:
        path, header, file: as of `tables.stream_table`.
        text: column of the text.
        pair: column of the second text of a pair, if any.
        row_errors: collects unusable rows: those of the table, values that are not text, and rows
            without a label.
        label: column of the label; None if there are no labels. Several columns are the labels of a
            multi-label problem: each cell is 0 or 1, and the columns' names are the labels.
    """
    text_columns = [text] + ([] if pair is None else [pair])
    label_columns: list[str | int] = []
    if isinstance(label, str | int):
        label_columns = [label]
    elif label is not None:
        label_columns = list(label)
    columns = [*text_columns, *label_columns]
    for location, values in stream_table(path, columns, row_errors, header=header, file=file):
        problems = (text_problem(column, values[column]) for column in text_columns)
        problem = next(filter(None, problems), None)
        value = None
        if label is not None and not isinstance(label, str | int):
            value, label_problem = _binary_labels(values, label_columns)
            problem = problem or label_problem
        elif label is not None:
            value = values[label]
            if value is None:
                problem = problem or f"no label under {label!r}"
        if problem:
            row_errors.add(location, problem)
        else:
            yield TextExample(location, values[text], None if pair is None else values[pair], value)


def _binary_labels(
    values: dict[Column, Any], columns: Sequence[Column]
) -> tuple[list[str], str | None]:
    """(names of the columns whose cell is true, the first problem or None)."""
    cells = {column: str(values[column]).strip().lower() for column in columns}
    problems = (
        f"expected 0 or 1 under {column!r}, found {cell!r}"
        for column, cell in cells.items()
        if cell not in _BINARY_VALUES
    )
    names = [str(column) for column, cell in cells.items() if _BINARY_VALUES.get(cell)]
    return names, next(problems, None)


def split_labels(label: Any) -> list[Any]:
    """The labels of a multi-label example: a JSON list, or text separated by commas."""
    if isinstance(label, str):
        return [name.strip() for name in label.split(",") if name.strip()]
    return list(label) if isinstance(label, list | tuple) else [label]
