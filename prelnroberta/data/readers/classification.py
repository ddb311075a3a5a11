"""Reads texts or pairs of texts with their labels from tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.readers.tables import Column, stream_table, text_problem


class TextExample(NamedTuple):
    """A text or pair of texts; `label` is a cell or JSON value as read, None where there is none.

    Of several labels, `label` is a list of names.
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
    """Every example of a file; arguments as of `stream_text_examples`.

    Raises:
        InputError: the file's, and bad rows where `bad` is None.
    """
    row_errors, is_owner = ensure_collector(row_errors)
    found = list(stream_text_examples(path, text, row_errors, pair, label, header))
    if is_owner:
        row_errors.raise_if_any()
    return found


def stream_text_examples(
    path: str | Path,
    text: Column,
    row_errors: RowErrors,
    pair: Column | None = None,
    label: Column | Sequence[Column] | None = None,
    header: bool | None = None,
    file: BinaryIO | None = None,
) -> Iterator[TextExample]:
    """Examples of a CSV, TSV, JSON-lines or text file as they are read (`tables.stream_table`).

    Args:
        text, pair: columns of the first text, and of the second if there are pairs.
        bad: takes the table's bad rows, texts that are none, and rows without a label.
        label: column of the label. Several columns are several labels, each cell 0 or 1, and the
            columns' names are those of the labels. None: there are none to read.
    """
    several = label is not None and not isinstance(label, str | int)
    wanted = [text] + ([] if pair is None else [pair])
    label_columns = list(label) if several else [] if label is None else [label]
    records = stream_table(path, [*wanted, *label_columns], row_errors, header=header, file=file)
    for location, values in records:
        problem = next(filter(None, (text_problem(name, values[name]) for name in wanted)), None)
        value = None if label is None else values[label_columns[0]]
        if several:
            sides = {column: str(values[column]).strip().lower() for column in label_columns}
            wrong = [c for c, side in sides.items() if side not in _SIDES]
            if wrong:
                problem = (
                    problem or f"expected 0 or 1 under {wrong[0]!r}, found {sides[wrong[0]]!r}"
                )
            value = [str(column) for column, side in sides.items() if _SIDES.get(side)]
        elif label is not None and value is None:
            problem = problem or f"no label under {label!r}"
        if problem:
            row_errors.add(location, problem)
        else:
            second = None if pair is None else values[pair]
            yield TextExample(location, values[text], second, value)


_SIDES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


def split_labels(label: Any) -> list[Any]:
    """The labels of a multi-label example: a JSON list, or text parted by commas."""
    if isinstance(label, str):
        return [name.strip() for name in label.split(",") if name.strip()]
    return list(label) if isinstance(label, list | tuple) else [label]
