"""Reads sentences of tagged words: CoNLL columns, CoNLL-U and JSON lines.

CoNLL: one word a line, columns separated by tabs or, if there is no tab, by spaces. A blank line
ends a sentence; `-DOCSTART-` lines separate documents and are not words. CoNLL-U (suffix .conllu)
has ten columns, comments after `#`, and lines for multiword tokens (1-2) and empty nodes (1.1),
which are skipped: tags belong to syntactic words. JSON lines have a list of words and one of tags.
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
from prelnroberta.data.text_chunks import iter_lines, iter_text_chunks
from prelnroberta.errors import InputError

_CONLLU_COLUMNS = 10
_DOCUMENT_MARK = "-DOCSTART-"


class Sentence(NamedTuple):
    """Words and their tags; `tags` is None if they are unknown.

    `document` is the number of document marks before the sentence.
    """

    location: str
    words: list[str]
    tags: list[str] | None
    document: int = 0


class Sentences(NamedTuple):
    """The content of a file.

    Attributes:
        examples: the sentences, with entity tags in IOB2.
        scheme: the file's scheme of entity tags; None for other tags.
        num_repaired: number of sentences whose tags violated their scheme; they are read as
            conlleval reads them.
    """

    examples: list[Sentence]
    scheme: str | None
    num_repaired: int


def read_sentences(
    path: str | Path,
    word: int | str | None = None,
    tag: int | str | None = None,
    tagged: bool = True,
    row_errors: RowErrors | None = None,
) -> Sentences:
    """All sentences of a file, with entity tags of any scheme converted to IOB2.

    Arguments as of `stream_sentences`. That function does not convert tags, because only a whole
    file shows whether it is IOB1 or IOB2.

    Raises:
        InputError: the file cannot be read or has no sentences; or there are unusable sentences
            and `row_errors` is None.
    """
    row_errors, is_owner = ensure_collector(row_errors)
    sentences = list(stream_sentences(path, row_errors, word, tag, tagged))
    if is_owner:
        row_errors.raise_if_any()
    scheme = detect_scheme(sentence.tags for sentence in sentences) if tagged else None
    if scheme is None:
        return Sentences(sentences, None, 0)
    return _to_iob2(sentences, scheme)


def stream_sentences(
    path: str | Path,
    row_errors: RowErrors,
    word: int | str | None = None,
    tag: int | str | None = None,
    tagged: bool = True,
    file: BinaryIO | None = None,
) -> Iterator[Sentence]:
    """Yields sentences while reading the file, with its tags unchanged.

    Args:
        path: `.conllu`; `.jsonl`, `.ndjson` or `.json` (JSON lines); any other name is CoNLL.
        row_errors: collects unusable sentences: those with a line that lacks columns, a word or a
            tag. A sentence counts as a row.
        word, tag: columns by index, negative ones from the last; in JSON lines, keys. Default:
            CoNLL's first and last column, CoNLL-U's FORM and UPOS, 'tokens' and 'ner_tags'.
        tagged: False if the tags are unknown.
        file: read instead of `path`, which then is only its name (for example standard input).

    Raises:
        InputError: the file cannot be read or has no sentences.
    """
    path = Path(path).expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix
    rows_before = row_errors.num_rows
    if suffix in (".jsonl", ".ndjson", ".json"):
        keys = ("tokens" if word is None else word, "ner_tags" if tag is None else tag)
        yield from _from_json(path, *keys, tagged, row_errors, file)
        return
    is_conllu = suffix == ".conllu"
    default = (1, 3) if is_conllu else (0, -1)
    columns = (default[0] if word is None else word, default[1] if tag is None else tag)
    yield from _from_columns(path, *columns, tagged, row_errors, is_conllu, file)
    if row_errors.num_rows == rows_before:
        raise InputError(f"{path}: no sentences: expected a word a line and blank lines between")


def _to_iob2(sentences: list[Sentence], scheme: str) -> Sentences:
    num_repaired = 0
    examples = []
    to_iobes = str.maketrans("LU", "ES")
    for sentence in sentences:
        spans = conlleval_spans(sentence.tags)
        length = len(sentence.words)
        written = [tag[0].translate(to_iobes) + tag[1:] for tag in sentence.tags]
        num_repaired += spans_to_tags(spans, length, scheme) != written
        examples.append(sentence._replace(tags=spans_to_tags(spans, length)))
    return Sentences(examples, scheme, num_repaired)


def _split_sentences(path: Path, file: BinaryIO | None) -> Iterator[list[tuple[int, str]]]:
    """(line number, line) of each run of lines between blank lines."""
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
    is_conllu: bool,
    file: BinaryIO | None,
) -> Iterator[Sentence]:
    if not (isinstance(word, int) and isinstance(tag, int)):
        raise InputError(f"{path}: columns {word!r}, {tag!r}: expected numbers, from 0")
    document = 0
    for block in _split_sentences(path, file):
        rows = []
        problem = None
        for number, line in block:
            if _is_comment(line, is_conllu):
                document += line.startswith(("# newdoc", _DOCUMENT_MARK))
                continue
            cells = _split_cells(line, is_conllu)
            if is_conllu and len(cells) == _CONLLU_COLUMNS and not cells[0].isdecimal():
                if not cells[0].replace("-", "").replace(".", "").isdecimal():
                    problem = problem or (number, f"{cells[0]!r} is not the id of a word")
                continue
            problem = problem or _line_problem(number, cells, word, tag, tagged, is_conllu)
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


def _is_comment(line: str, is_conllu: bool) -> bool:
    """Whether a line is a CoNLL-U comment or a CoNLL document mark."""
    return line.startswith("#" if is_conllu else _DOCUMENT_MARK)


def _split_cells(line: str, is_conllu: bool) -> list[str]:
    if "\t" in line:
        return line.split("\t")
    return line.split(" ") if is_conllu else [cell for cell in line.split(" ") if cell]


def _line_problem(
    number: int, cells: list[str], word: int, tag: int, tagged: bool, is_conllu: bool
) -> tuple[int, str] | None:
    """(line number, the problem), or None."""
    columns = [word, tag] if tagged else [word]
    needed = max(column + 1 if column >= 0 else -column for column in columns)
    if tagged and not is_conllu:
        needed = max(needed, 2)
    if is_conllu and len(cells) != _CONLLU_COLUMNS:
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
    """Label names for a model of these sentences: `O`, then B- and I- of each type; or plain tags.

    Each type gets both, even if no entity in this file has two words: one in another file may.
    """
    tags = {tag for sentence in sentences for tag in sentence.tags or ()}
    if not tags:
        raise InputError("no tags to discover: the sentences have none; give the labels' names")
    if not all(is_entity_tag(tag) for tag in tags):
        return tuple(sorted(tags))
    types = sorted({tag[2:] for tag in tags if tag != "O"})
    return ("O", *(f"{letter}-{type_}" for type_ in types for letter in "BI"))
