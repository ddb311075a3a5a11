"""Reads rows of CSV, TSV, JSON-lines and text files, each with its location.

CSV follows RFC 4180: quotes may enclose commas, quotes and line ends. TSV has no quoting, as GLUE
writes it: a quotation mark is an ordinary character, and a tab always separates columns. Each line
of JSON lines holds an object. Each line of .txt is the only column, 'text' or 0. Files are UTF-8,
with or without a byte order mark, plain or `.gz`.

In this package, `stream_` functions yield rows while reading, for inputs larger than memory.
`read_` functions return all rows and, by default, raise if any is unusable.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.text_chunks import iter_lines, iter_text_chunks
from prelnroberta.errors import InputError

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
}

Column = str | int  # a name in the header or a key, or an index from 0


class Record(NamedTuple):
    """A row: its location as 'file:line', and the values of the requested columns."""

    location: str
    values: dict[Column, Any]


def read_table(
    path: str | Path,
    columns: Sequence[Column],
    optional: Sequence[Column] = (),
    header: bool | None = None,
    row_errors: RowErrors | None = None,
) -> list[Record]:
    """The requested columns of all rows, in the file's order; arguments as of `stream_table`.

    Raises:
        InputError: the file cannot be read, has no rows or lacks a column; or there are unusable
            rows and `row_errors` is None.
    """
    row_errors, is_owner = ensure_collector(row_errors)
    records = list(stream_table(path, columns, row_errors, optional, header))
    if is_owner:
        row_errors.raise_if_any()
    return records


def stream_table(
    path: str | Path,
    columns: Sequence[Column],
    row_errors: RowErrors,
    optional: Sequence[Column] = (),
    header: bool | None = None,
    file: BinaryIO | None = None,
) -> Iterator[Record]:
    """Yields the requested columns of each row while reading the file.

    Values are str; from JSON lines, whatever JSON holds. Blank lines are skipped.

    Args:
        path: its suffix is the format (`FORMATS`), optionally followed by `.gz`.
        columns: columns that every row must have; by index if the file has no header.
        row_errors: collects unusable rows: those with another number of columns, with misplaced
            quotes, or that are not JSON objects with the keys.
        optional: columns that are read if the file has them.
        header: whether a CSV or TSV begins with column names. None: if a column is given by name.
        file: read instead of `path`, which then is only its name (for example standard input).

    Raises:
        InputError: the file cannot be read, has no rows, lacks a column, or an unclosed quote
            spans rows.
    """
    path = Path(path).expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in FORMATS:
        raise InputError(f"{path}: expected a file named {', '.join(FORMATS)}, plain or .gz")
    kind = FORMATS[suffix]
    chunks = iter_text_chunks(path, file)
    rows_before = row_errors.num_rows
    if kind == "jsonl":
        yield from _json_records(path, chunks, columns, optional, row_errors)
    else:
        if header is None:
            header = any(isinstance(column, str) for column in [*columns, *optional])
        if kind == "txt":
            rows, header = _split_text(path, chunks), True
        elif kind == "tsv":
            rows = _split_tsv(path, chunks)
        else:
            rows = _split_csv(path, chunks, row_errors)
        yield from _table_records(path, rows, columns, optional, header, row_errors)
    if row_errors.num_rows == rows_before:
        raise InputError(f"{path}: no rows; expected columns {_names(columns)}")


def _table_records(
    path: Path,
    rows: Iterator[tuple[str, list[str]]],
    columns: Sequence[Column],
    optional: Sequence[Column],
    header: bool,
    row_errors: RowErrors,
) -> Iterator[Record]:
    names: list[str] | None = None
    indices: dict[Column, int] = {}
    for location, cells in rows:
        if names is None:
            names = [cell.strip() for cell in cells] if header else [""] * len(cells)
            indices = _column_indices(path, names, columns, optional, header)
            if header:
                continue
        row_errors.count_rows()
        if len(cells) != len(names):
            like = "the header" if header else "the first row"
            row_errors.add(
                location, f"expected {len(names)} columns as in {like}, found {len(cells)}"
            )
            continue
        yield Record(location, {column: cells[index] for column, index in indices.items()})


def _column_indices(
    path: Path,
    names: list[str],
    columns: Sequence[Column],
    optional: Sequence[Column],
    header: bool,
) -> dict[Column, int]:
    """The index of each column; InputError names all required columns that are missing."""
    indices: dict[Column, int] = {}
    missing = []
    for column in [*columns, *optional]:
        if isinstance(column, int) and 0 <= column < len(names):
            indices[column] = column
        elif isinstance(column, str) and names.count(column) == 1:
            indices[column] = names.index(column)
        elif isinstance(column, str) and names.count(column) > 1:
            raise InputError(f"{path}: the header names column {column!r} more than once")
        elif column in columns:
            missing.append(column)
    if missing:
        found = f"columns {', '.join(names if header else map(str, range(len(names))))}"
        raise InputError(f"{path}: no column {_names(missing)}; the file has {found}")
    return indices


def _split_text(path: Path, chunks: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    yield str(path), ["text"]
    for number, line in enumerate(iter_lines(chunks), 1):
        if line.strip():
            yield f"{path}:{number}", [line]


def _split_tsv(path: Path, chunks: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(iter_lines(chunks), 1):
        if line.strip(" "):  # a row of empty cells is not a blank line
            yield f"{path}:{number}", line.split("\t")


def _split_csv(
    path: Path, chunks: Iterable[str], row_errors: RowErrors
) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader((line + "\n" for line in iter_lines(chunks)), strict=True)
    while True:
        start = reader.line_num + 1
        # The limit (131,072 characters) belongs to the process: raise it only while reading a row.
        limit = csv.field_size_limit(1 << 30)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = "a quotation mark out of place: inside quotes, write it twice"
            if reader.line_num > start:
                # Cannot be skipped: the lines between may hold usable rows.
                raise InputError(
                    f"{path}:{start}: {problem}; it opens a cell that goes on to line "
                    f"{reader.line_num} ({error})"
                ) from error
            row_errors.count_rows()
            row_errors.add(f"{path}:{start}", f"{problem} ({error})")
            continue
        finally:
            csv.field_size_limit(limit)
        if len(cells) > 1 or "".join(cells).strip():
            yield f"{path}:{start}", cells


def _json_records(
    path: Path,
    chunks: Iterable[str],
    columns: Sequence[Column],
    optional: Sequence[Column],
    row_errors: RowErrors,
) -> Iterator[Record]:
    numbers = [column for column in [*columns, *optional] if isinstance(column, int)]
    if numbers:
        raise InputError(f"{path}: column {_names(numbers)}: JSON lines have keys, not numbers")
    for number, line in enumerate(iter_lines(chunks), 1):
        if not line.strip():
            continue
        location = f"{path}:{number}"
        row_errors.count_rows()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row_errors.add(location, f"not a line of JSON: {error}")
            continue
        if not isinstance(row, dict):
            row_errors.add(location, f"expected a JSON object, found {line.strip()[:40]}")
            continue
        missing = [column for column in columns if column not in row]
        if missing:
            row_errors.add(location, f"no key {_names(missing)} among {_names(list(row)[:12])}")
            continue
        found = [column for column in [*columns, *optional] if column in row]
        yield Record(location, {column: row[column] for column in found})


def text_problem(name: Column, value: Any) -> str | None:
    """Why `value` cannot be tokenized as text; None if it can."""
    if not isinstance(value, str):
        return f"expected text under {name!r}, found {json.dumps(value)[:40]}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"a lone surrogate in {name!r}"
    return None


def _names(columns: Sequence[Column]) -> str:
    return ", ".join(repr(column) for column in columns) or "none"
