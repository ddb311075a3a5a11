"""Rows of CSV, TSV and JSON-lines files, each with the place it came from.

CSV is RFC 4180: quotes may enclose commas, quotes and line ends. TSV has no quotes at all, as GLUE
writes it: a quotation mark is a character like any other, and a tab always parts two columns.
JSON lines hold an object each, and in .txt every line is the only column, 'text' or 0. Files are
UTF-8 with or without a byte order mark, `.gz` or plain.

`stream_` functions, here and for the tasks, give rows as they are read, for inputs larger than
memory; `read_` functions give all of them, and have refused bad ones.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.text import iter_lines, iter_text_chunks
from prelnroberta.errors import InputError

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
}

Column = str | int  # a name of the header or a key, or a place counted from 0


class Record(NamedTuple):
    """A row: its place as 'file:line' and the values of the columns asked for."""

    location: str
    values: dict[Column, Any]


def read_table(
    path: str | Path,
    columns: Sequence[Column],
    optional: Sequence[Column] = (),
    header: bool | None = None,
    row_errors: RowErrors | None = None,
) -> list[Record]:
    """The given columns of every row, in the file's order; arguments as of `stream_table`.

    Raises:
        InputError: the file cannot be read, has no rows or no such columns; or, where `bad` is
            None, bad rows.
    """
    row_errors, is_owner = ensure_collector(row_errors)
    found = list(stream_table(path, columns, row_errors, optional, header))
    if is_owner:
        row_errors.raise_if_any()
    return found


def stream_table(
    path: str | Path,
    columns: Sequence[Column],
    row_errors: RowErrors,
    optional: Sequence[Column] = (),
    header: bool | None = None,
    file: BinaryIO | None = None,
) -> Iterator[Record]:
    """The given columns of each row as it is read.

    Values are str, except that JSON lines have whatever JSON holds. Blank lines are no rows.

    Args:
        path: named by its format (`FORMATS`), also with `.gz`.
        columns: needed in every row. By number in files without a header.
        bad: takes rows of another number of columns, with quotes out of place, or that are no JSON
            object with the keys.
        optional: read where there are such columns, else left out.
        header: whether a CSV or TSV begins with names; None: where any column is given by name.
        file: read in the path's place, which is then only a name (standard input, say).

    Raises:
        InputError: the file cannot be read, has no rows or no such columns, or a quote swallows
            rows.
    """
    path = Path(path).expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in FORMATS:
        raise InputError(f"{path}: expected a file named {', '.join(FORMATS)}, plain or .gz")
    kind = FORMATS[suffix]
    chunks = iter_text_chunks(path, file)
    before = row_errors.num_rows
    if kind == "jsonl":
        yield from _json_records(path, chunks, columns, optional, row_errors)
    else:
        if header is None:
            header = any(isinstance(column, str) for column in [*columns, *optional])
        if kind == "txt":
            rows, header = _split_text(path, chunks), True
        else:
            rows = (_split_csv if kind == "csv" else _split_tsv)(path, chunks, row_errors)
        yield from _table_records(path, rows, columns, optional, header, row_errors)
    if row_errors.num_rows == before:
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
    where: dict[Column, int] = {}
    for location, cells in rows:
        if names is None:
            names = [cell.strip() for cell in cells] if header else [""] * len(cells)
            where = _places(path, names, columns, optional, header)
            if header:
                continue
        row_errors.count_rows()
        if len(cells) != len(names):
            like = "the header" if header else "the first row"
            row_errors.add(
                location, f"expected {len(names)} columns as in {like}, found {len(cells)}"
            )
            continue
        yield Record(location, {column: cells[at] for column, at in where.items()})


def _places(
    path: Path,
    names: list[str],
    columns: Sequence[Column],
    optional: Sequence[Column],
    header: bool,
) -> dict[Column, int]:
    """Which cell each column is; InputError names all that the file does not have."""
    where: dict[Column, int] = {}
    missing = []
    for column in [*columns, *optional]:
        if isinstance(column, int) and 0 <= column < len(names):
            where[column] = column
        elif isinstance(column, str) and names.count(column) == 1:
            where[column] = names.index(column)
        elif isinstance(column, str) and names.count(column) > 1:
            raise InputError(f"{path}: the header names column {column!r} more than once")
        elif column in columns:
            missing.append(column)
    if missing:
        found = f"columns {', '.join(names if header else map(str, range(len(names))))}"
        raise InputError(f"{path}: no column {_names(missing)}; the file has {found}")
    return where


def _split_text(path: Path, chunks: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    yield str(path), ["text"]
    for number, line in enumerate(iter_lines(chunks), 1):
        if line.strip():
            yield f"{path}:{number}", [line]


def _split_tsv(
    path: Path, chunks: Iterable[str], row_errors: RowErrors
) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(iter_lines(chunks), 1):
        if line.strip(" "):  # a row of empty cells is no blank line
            yield f"{path}:{number}", line.split("\t")


def _split_csv(
    path: Path, chunks: Iterable[str], row_errors: RowErrors
) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader((line + "\n" for line in iter_lines(chunks)), strict=True)
    while True:
        start = reader.line_num + 1
        # The limit (131,072 characters) is the process's, so it is ours only while a row is read.
        limit = csv.field_size_limit(1 << 30)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = "a quotation mark out of place: inside quotes it is written twice"
            if reader.line_num > start:
                # Never to be skipped: good rows may be among the lines between.
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
        wanted = [column for column in [*columns, *optional] if column in row]
        yield Record(location, {column: row[column] for column in wanted})


def text_problem(name: Column, value: Any) -> str | None:
    """Why `value` is no text that can be tokenized; None if it is."""
    if not isinstance(value, str):
        return f"expected text under {name!r}, found {json.dumps(value)[:40]}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"a lone surrogate in {name!r}"
    return None


def _names(columns: Sequence[Column]) -> str:
    return ", ".join(repr(column) for column in columns) or "none"
