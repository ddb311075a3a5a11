"""Documents from the user's text files, and the split into training and validation.

A corpus has two methods. `documents()` yields the documents in a fixed order and in bounded memory;
it can be called repeatedly. `manifest()` identifies the text without reading it: another text has
another manifest. (token_files.py takes the text's checksum and counts while tokenizing it.)
DocstringCorpus (docstrings.py) is the other corpus.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from prelnroberta.data.text_chunks import iter_lines, iter_text_chunks
from prelnroberta.errors import InputError


class Document(NamedTuple):
    """A text, and the key whose hash assigns it to training or validation."""

    text: str
    key: str


def in_validation_split(key: str, fraction: float) -> bool:
    """Whether the document with this key is held out: the same on every machine, in any order."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


TEXT_SUFFIXES = (".txt", ".text", ".md", ".jsonl")
# A longer document is split, so that memory does not depend on how the text is divided.
MAX_DOCUMENT_CHARS = 1 << 20


class FileCorpus:
    """Text files, plain or gzipped, given by file name, folder (searched recursively) or glob.

    Each line of a `.jsonl` file is an object whose `text_field` is one document. In all other files
    a blank line ends a document, as in BERT's and fairseq's corpora. A document longer than
    `MAX_DOCUMENT_CHARS` characters is split at line ends into several documents. The key is the
    text's checksum, so that equal texts are always on the same side of the split.

    Raises (on construction, and with the location while reading):
        InputError: a pattern matches nothing, a folder has no text files, a file cannot be read or
            is not UTF-8 or gzip, or a line lacks the text field.
    """

    def __init__(self, patterns: Sequence[str], text_field: str = "text"):
        self.files = list(
            dict.fromkeys(path for pattern in patterns for path in _find_files(pattern))
        )
        self.text_field = text_field
        if not self.files:
            raise InputError("no corpus files given: name files, folders or glob patterns")

    def documents(self) -> Iterator[Document]:
        """Yields documents file by file: in the order of the patterns, sorted within each."""
        empty = True
        for path in self.files:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                texts = _json_documents(path, self.text_field)
            else:
                texts = _plain_documents(iter_text_chunks(path))
            for text in texts:
                empty = False
                yield Document(text, hashlib.sha256(text.encode()).hexdigest())
        if empty:
            names = ", ".join(str(path) for path in self.files[:3])
            raise InputError(f"the corpus is empty: no text in {len(self.files)} file(s): {names}")

    def manifest(self) -> dict:
        """Each file's path, size in bytes and modification time (ns), and the text field.

        `text_bytes` is the size of all files, or None if some are compressed.
        """
        stats = [(path, path.stat()) for path in self.files]
        compressed = any(path.suffix == ".gz" for path in self.files)
        return {
            "kind": "files",
            "text_field": self.text_field,
            "text_bytes": None if compressed else sum(stat.st_size for _, stat in stats),
            "files": [
                {"path": str(path), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
                for path, stat in stats
            ],
        }


def _find_files(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.name.removesuffix(".gz").endswith(TEXT_SUFFIXES)]
        problem = f"corpus folder {path} holds no {', '.join(TEXT_SUFFIXES)} files, plain or .gz"
    elif path.exists():
        found, problem = [path], f"corpus file {path} is not a regular file"
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        problem = f"corpus file {path} does not exist"
        if glob.has_magic(pattern):
            problem = f"corpus pattern {pattern!r} matches no file"
    # Not resolved: a link may have a suffix that its target lacks.
    files = sorted(p.absolute() for p in found if p.is_file())
    if not files:
        raise InputError(f"{problem}; name a text file, a folder of them, or a glob pattern")
    return files


def _plain_documents(chunks: Iterable[str]) -> Iterator[str]:
    pending = ""
    for chunk in chunks:
        *complete, pending = re.split(r"\n(?:[^\S\n]*\n)+", pending + chunk)
        for text in complete:
            yield from _split_long(text)
        *pieces, pending = _split_at_line_ends(pending)
        yield from filter(None, map(_strip_blank_lines, pieces))
    yield from _split_long(pending)


def _split_long(text: str) -> Iterator[str]:
    """`text` as one or several documents of at most `MAX_DOCUMENT_CHARS` characters."""
    return filter(None, map(_strip_blank_lines, _split_at_line_ends(text)))


def _split_at_line_ends(text: str) -> Iterator[str]:
    """Pieces of at most `MAX_DOCUMENT_CHARS` characters, split after a line, or else a space."""
    start = 0
    while len(text) - start > MAX_DOCUMENT_CHARS:
        end = start + MAX_DOCUMENT_CHARS
        for separator in "\n ":
            if (found := text.rfind(separator, start, end)) > start:
                end = found + 1
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _strip_blank_lines(text: str) -> str:
    """Removes blank lines around the text; the first line keeps its indentation."""
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text.rstrip())


def _json_documents(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(iter_lines(iter_text_chunks(path)), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not a line of JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            found = f"keys {', '.join(record)}" if isinstance(record, dict) else line.strip()[:40]
            raise InputError(f"{path}:{number}: expected text under {field!r}, found {found}")
        try:
            record[field].encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{path}:{number}: lone surrogate in {field!r}: {error}") from error
        yield from _split_long(record[field])
