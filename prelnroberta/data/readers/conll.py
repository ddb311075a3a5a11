"""Sentences of tagged words, from CoNLL columns, CoNLL-U and JSON lines.

CoNLL: a word a line, columns parted by tabs or, where there is no tab, by spaces; a blank line ends
a sentence; `-DOCSTART-` lines part documents and are no words. CoNLL-U (by its suffix .conllu) has
ten columns, comments after `#`, and lines for multiword tokens (1-2) and empty nodes (1.1), which
are no words: tags belong to the syntactic words. JSON lines have a list of words and one of tags.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prelnroberta.data.readers.bio_tags import (
    conlleval_spans,
    detect_scheme,
    is_entity_tag,
    spans_to_tags,
)
from prelnroberta.data.readers.labels import label_to_name
from prelnroberta.data.readers.row_errors import RowErrors, ensure_collector
from prelnroberta.data.readers.tables import stream_table, text_problem
from prelnroberta.data.text import iter_lines, iter_text_chunks
from prelnroberta.errors import InputError

_CONLLU_COLUMNS = 10
_DOCUMENT = "-DOCSTART-"


class Sentence(NamedTuple):
    """Words and, unless they are to be predicted, their tags; `document` counts marks before it."""

    location: str
    words: list[str]
    tags: list[str] | None
    document: int = 0


class Sentences(NamedTuple):
    """What a file holds.

    scheme: the entity scheme its tags are in, None for other tags. `examples` have IOB2.
    repaired: sentences whose tags broke their scheme and were read as conlleval reads them.
    """

    examples: list[Sentence]
    scheme: str | None
    repaired: int


def read_sentences(
    path: str | Path,
    word: int | str | None = None,
    tag: int | str | None = None,
    tagged: bool = True,
    row_errors: RowErrors | None = None,
) -> Sentences:
    """The sentences of a file, entity tags turned to IOB2 whatever their scheme.

    Arguments as of `stream_sentences`, which leaves tags as they are: only the whole file tells
    IOB1 from IOB2.

    Raises:
        InputError: the file cannot be read or has no sentences; or, where `bad` is None, bad ones.
    """
    row_errors, is_owner = ensure_collector(row_errors)
    sentences = list(stream_sentences(path, row_errors, word, tag, tagged))
    if is_owner:
        row_errors.raise_if_any()
    scheme = detect_scheme(sentence.tags for sentence in sentences) if tagged else None
    if scheme is None:
        return Sentences(sentences, None, 0)
    return _in_iob2(sentences, scheme)


def stream_sentences(
    path: str | Path,
    row_errors: RowErrors,
    word: int | str | None = None,
    tag: int | str | None = None,
    tagged: bool = True,
    file: BinaryIO | None = None,
) -> Iterator[Sentence]:
    """Sentences as they are read, with the tags of the file.

    Args:
        path: `.conllu`; `.jsonl`, `.ndjson` or `.json` (JSON lines); CoNLL by any other name.
        bad: takes sentences with a line that lacks columns, a word or a tag; a sentence is a row.
        word, tag: columns counted from 0, negative from the last; keys in JSON lines. By default
            CoNLL's first and last, CoNLL-U's FORM and UPOS, and 'tokens' and 'ner_tags'.
        tagged: False for words whose tags are unknown.
        file: read in the path's place, which is then only a name (standard input, say).

    Raises:
        InputError: the file cannot be read or has no sentences.
    """
    path = Path(path).expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix
    before = row_errors.num_rows
    if suffix in (".jsonl", ".ndjson", ".json"):
        names = ("tokens" if word is None else word, "ner_tags" if tag is None else tag)
        yield from _from_json(path, *names, tagged, row_errors, file)
        return
    universal = suffix == ".conllu"
    default = (1, 3) if universal else (0, -1)
    columns = (default[0] if word is None else word, default[1] if tag is None else tag)
    yield from _from_columns(path, *columns, tagged, row_errors, universal, file)
    if row_errors.num_rows == before:
        raise InputError(f"{path}: no sentences: expected a word a line and blank lines between")


def _in_iob2(sentences: list[Sentence], scheme: str) -> Sentences:
    repaired = 0
    examples = []
    letters = str.maketrans("LU", "ES")
    for sentence in sentences:
        found = conlleval_spans(sentence.tags)
        length = len(sentence.words)
        written = [tag[0].translate(letters) + tag[1:] for tag in sentence.tags]
        repaired += spans_to_tags(found, length, scheme) != written
        examples.append(sentence._replace(tags=spans_to_tags(found, length)))
    return Sentences(examples, scheme, repaired)


def _blocks(path: Path, file: BinaryIO | None) -> Iterator[list[tuple[int, str]]]:
    """Lines between blank lines, with their numbers."""
    block: list[tuple[int, str]] = []
    for number, line in enumerate(iter_lines(iter_text_chunks(path, file)), 1):
        if line.strip():
            block.append((number, line))
        elif block:
            yield block
            block = []
    if block:
        yield block


def _from_columns(
    path: Path,
    word: int | str,
    tag: int | str,
    tagged: bool,
    row_errors: RowErrors,
    universal: bool,
    file: BinaryIO | None,
) -> Iterator[Sentence]:
    if not (isinstance(word, int) and isinstance(tag, int)):
        raise InputError(f"{path}: columns {word!r}, {tag!r}: expected numbers, from 0")
    document = 0
    for block in _blocks(path, file):
        rows = []
        problem = None
        for number, line in block:
            if universal and line.startswith("#"):
                document += line.startswith("# newdoc")
                continue
            if line.startswith(_DOCUMENT) and not universal:
                document += 1
                continue
            cells = line.split("\t") if "\t" in line else line.split(" ")
            if not universal and "\t" not in line:
                cells = [cell for cell in cells if cell]
            if universal and len(cells) == _CONLLU_COLUMNS and not cells[0].isdecimal():
                if not cells[0].replace("-", "").replace(".", "").isdecimal():
                    problem = problem or (number, f"{cells[0]!r} is no id of a word")
                continue
            problem = problem or _line_problem(number, cells, word, tag, tagged, universal)
            rows.append((number, cells))
        if not rows and problem is None:
            continue
        row_errors.count_rows()
        if problem:
            row_errors.add(f"{path}:{problem[0]}", problem[1])
            continue
        yield Sentence(
            f"{path}:{rows[0][0]}",
            [cells[word].strip() for _, cells in rows],
            [cells[tag].strip() for _, cells in rows] if tagged else None,
            document,
        )


def _line_problem(
    number: int, cells: list[str], word: int, tag: int, tagged: bool, universal: bool
) -> tuple[int, str] | None:
    """(line, what is wrong with it), if anything."""
    columns = [word, tag] if tagged else [word]
    needed = max(column + 1 if column >= 0 else -column for column in columns)
    if tagged and not universal:
        needed = max(needed, 2)
    if universal and len(cells) != _CONLLU_COLUMNS:
        return number, f"expected {_CONLLU_COLUMNS} columns, found {len(cells)}"
    if len(cells) < needed:
        return number, f"expected at least {needed} columns, found {len(cells)}"
    for name, column in zip(("word", "tag"), columns, strict=False):
        if not cells[column].strip():
            return number, f"no {name} in column {column}"
    return None


def _from_json(
    path: Path,
    word: int | str,
    tag: int | str,
    tagged: bool,
    row_errors: RowErrors,
    file: BinaryIO | None,
) -> Iterator[Sentence]:
    keys = [word, tag] if tagged else [word]
    for location, values in stream_table(path, keys, row_errors, file=file):
        words = values[word]
        tags = values[tag] if tagged else None
        if not isinstance(words, list) or not words:
            row_errors.add(location, f"expected a list of words under {word!r}")
        elif problem := next(filter(None, map(_word_problem, words)), None):
            row_errors.add(location, problem)
        elif tagged and (not isinstance(tags, list) or len(tags) != len(words)):
            found = f"{len(tags)} tags" if isinstance(tags, list) else "no list of tags"
            row_errors.add(location, f"expected {len(words)} tags under {tag!r}, found {found}")
        else:
            yield Sentence(location, words, [label_to_name(t) for t in tags] if tagged else None)


def _word_problem(word: Any) -> str | None:
    problem = text_problem("a word", word)
    return problem or (None if word.strip() else "an empty word")


def tag_names(sentences: list[Sentence]) -> tuple[str, ...]:
    """Labels for a model of these sentences: `O`, then B- and I- of each type; or plain tags.

    Both of a type, even if the file at hand never continues it: another one will.
    """
    found = {tag for sentence in sentences for tag in sentence.tags or ()}
    if not found:
        raise InputError("no tags to discover: the sentences have none; give the labels' names")
    if not all(is_entity_tag(tag) for tag in found):
        return tuple(sorted(found))
    types = sorted({tag[2:] for tag in found if tag != "O"})
    return ("O", *(f"{letter}-{kind}" for kind in types for letter in "BI"))
