"""Where text comes from: the installed packages' own prose, or the user's files.

A corpus has two methods. `documents()` yields its documents in a fixed order, in flat memory, as
often as it is called; `manifest()` says at once, without reading the text, what they are made of,
such that another text has another manifest. (The text's own checksum and counts are taken while it
is tokenized: token_files.py.)
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from prelnroberta.data.text import iter_lines, iter_text_chunks
from prelnroberta.errors import InputError


class Document(NamedTuple):
    """A text, and the key whose hash decides between training and validation."""

    text: str
    key: str


def in_validation_split(key: str, fraction: float) -> bool:
    """Whether the document of this key is held out: the same on every machine, in any order."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


TEXT_SUFFIXES = (".txt", ".text", ".md", ".jsonl")
# A longer document is passed on in pieces, so that memory does not depend on how text is divided.
MAX_DOCUMENT_CHARS = 1 << 20


class FileCorpus:
    """Text files, gzipped or not, by file name, folder (searched through), or glob pattern.

    A line of a `.jsonl` file is an object whose `text_field` is one document. In any other file a
    blank line ends a document, as BERT's and fairseq's corpora have it. A document longer than
    `MAX_DOCUMENT_CHARS` characters is given in pieces cut at line ends, each a document of its own. The key is
    the text's checksum, so that equal texts are never on both sides of the split.

    Raises (on construction, and while reading with the place):
        InputError: a pattern that matches nothing, a folder without text, a file that cannot be
            read, is not UTF-8 or gzip, or a line without the text field.
    """

    def __init__(self, patterns: Sequence[str], text_field: str = "text"):
        self.files = list(dict.fromkeys(path for pattern in patterns for path in _find(pattern)))
        self.text_field = text_field
        if not self.files:
            raise InputError("no corpus files given: name files, folders or glob patterns")

    def documents(self) -> Iterator[Document]:
        """Documents in the order of the files: the patterns' order, sorted within each."""
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
        """Each file's path, size in bytes and time of last change (ns), and the text field.

        `text_bytes`, the size of all, is None if some are compressed.
        """
        states = [(path, path.stat()) for path in self.files]
        compressed = any(path.suffix == ".gz" for path in self.files)
        return {
            "kind": "files",
            "text_field": self.text_field,
            "text_bytes": None if compressed else sum(state.st_size for _, state in states),
            "files": [
                {"path": str(path), "bytes": state.st_size, "modified_ns": state.st_mtime_ns}
                for path, state in states
            ],
        }


def _find(pattern: str) -> list[Path]:
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
    # Not resolved: a link may have the suffix that its target lacks.
    files = sorted(p.absolute() for p in found if p.is_file())
    if not files:
        raise InputError(f"{problem}; name a text file, a folder of them, or a glob pattern")
    return files


def _plain_documents(chunks: Iterable[str]) -> Iterator[str]:
    pending = ""
    for chunk in chunks:
        *complete, pending = re.split(r"\n(?:[^\S\n]*\n)+", pending + chunk)
        for text in complete:
            yield from _cut(text)
        *pieces, pending = _pieces(pending)
        yield from filter(None, map(_trim, pieces))
    yield from _cut(pending)


def _cut(text: str) -> Iterator[str]:
    return filter(None, map(_trim, _pieces(text)))


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of `MAX_DOCUMENT_CHARS` characters at most, cut after a line's end, or else a space."""
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


def _trim(text: str) -> str:
    """Without the blank lines around it; the first line keeps its indentation."""
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
        yield from _cut(record[field])
