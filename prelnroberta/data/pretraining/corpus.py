"""Where text comes from: the installed packages' own prose, or the user's files.

A corpus has two methods. `documents()` yields its documents in a fixed order, in flat memory, as
often as it is called; `manifest()` says at once, without reading the text, what they are made of,
such that another text has another manifest. (The text's own checksum and counts are taken while it
is tokenized: token_files.py.)
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import BinaryIO, NamedTuple

from prelnroberta.data.pretraining.docstrings import prose
from prelnroberta.errors import InputError


class Document(NamedTuple):
    """A text, and the key whose hash decides between training and validation."""

    text: str
    key: str


def is_validation(key: str, fraction: float) -> bool:
    """Whether the document of this key is held out: the same on every machine, in any order."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


# ---------------------------------------------------------------------------------------------
# The default corpus: English that every installation already has.

# The largest bodies of prose among what installing prelnroberta brings along.
PACKAGES = (
    "absl", "etils", "flax", "huggingface_hub", "humanize", "jax", "numpy", "optax",
    "orbax", "rich", "scipy", "tensorboardX",
)  # fmt: skip
STDLIB = "python"
_NOT_PROSE = {"test", "tests", "testing", "idle_test", "lib2to3", "site-packages", "dist-packages"}


class DocstringCorpus:
    """The prose of the docstrings of the standard library and of the installed `packages`.

    Sources are compiled, never run; what is read is every string constant of several lines: so
    documentation kept elsewhere counts too (numpy's `add_newdoc`, the stdlib's `pydoc_data`).
    A document is the prose of one such string, a paragraph a line; a paragraph is given once in
    the whole corpus. The key is the module's path, so that training and validation never share a
    module. Packages that are not installed are left out, and named in the manifest.
    """

    def __init__(self, packages: Sequence[str] = PACKAGES):
        self.roots = {STDLIB: [Path(sysconfig.get_path("stdlib"))]}
        self.missing = []
        for package in sorted(set(packages)):
            # find_spec of a top-level name looks for the package without running it.
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                self.missing.append(package)
            else:
                self.roots[package] = [Path(p) for p in sorted(spec.submodule_search_locations)]

    def documents(self) -> Iterator[Document]:
        """One document for each docstring that holds prose; stdlib first, then packages by name."""
        return iter(self._documents)

    @cached_property
    def _documents(self) -> list[Document]:
        """Kept, all 6 MB: to read them takes 10 s, and a tokenizer is trained on them first."""
        return list(self._read())

    def _read(self) -> Iterator[Document]:
        seen = set()
        for string, key in self.strings():
            new = [p for p in dict.fromkeys(prose(string)) if p not in seen]
            seen.update(new)
            if new:
                yield Document("\n".join(new), key)

    def strings(self) -> Iterator[Document]:
        """What the documents are found in: every string of several lines, with all its markup."""
        for package, roots in self.roots.items():
            for root in roots:
                for path in _sources(root):
                    key = f"{package}/{path.relative_to(root).with_suffix('').as_posix()}"
                    for string in _long_strings(path):
                        yield Document(string, key)

    def manifest(self) -> dict:
        """The versions of all that is read, and the checksum of the rules that read it."""
        distributions = importlib.metadata.packages_distributions()
        rules = Path(__file__).read_bytes() + Path(prose.__code__.co_filename).read_bytes()
        return {
            "kind": "docstrings",
            "python": platform.python_version(),
            "packages": {
                package: {name: importlib.metadata.version(name) for name in sorted(set(names))}
                for package in self.roots
                if (names := distributions.get(package))
            },
            "missing_packages": self.missing,
            "rules_sha256": hashlib.sha256(rules).hexdigest(),
        }


def _sources(root: Path) -> list[Path]:
    def is_library(path: Path) -> bool:
        inside = path.relative_to(root)
        is_test = path.stem.startswith("test_") or path.stem.endswith("_test")
        return not is_test and _NOT_PROSE.isdisjoint(inside.parts)

    return sorted(path for path in root.rglob("*.py") if is_library(path))


def _long_strings(path: Path) -> Iterator[str]:
    """Every string constant of more than one line, in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):  # templates, and files for another Python
        return
    pending = [code]
    while pending:
        constant = pending.pop()
        if isinstance(constant, str) and "\n" in constant:
            yield constant
        elif isinstance(constant, tuple | frozenset):
            pending += reversed(list(constant))
        elif isinstance(constant, CodeType):
            pending += reversed(constant.co_consts)


# ---------------------------------------------------------------------------------------------
# The user's own text.

SUFFIXES = (".txt", ".text", ".md", ".jsonl")
# A longer document is passed on in pieces, so that memory does not depend on how text is divided.
PIECE = 1 << 20


class FileCorpus:
    """Text files, gzipped or not, by file name, folder (searched through), or glob pattern.

    A line of a `.jsonl` file is an object whose `text_field` is one document. In any other file a
    blank line ends a document, as BERT's and fairseq's corpora have it. A document longer than
    `PIECE` characters is given in pieces cut at line ends, each a document of its own. The key is
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
                texts = _plain_documents(text_chunks(path))
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
        found = [p for p in path.rglob("*") if p.name.removesuffix(".gz").endswith(SUFFIXES)]
        problem = f"corpus folder {path} holds no {', '.join(SUFFIXES)} files, plain or .gz"
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


def text_chunks(path: Path, file: BinaryIO | None = None) -> Iterator[str]:
    """The file's text in chunks of a megabyte: decompressed, decoded, newlines made one kind.

    Args:
        file: read in the path's place, which is then only its name (standard input, say).
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0  # of the chunk, in bytes of the (decompressed) text
    try:
        with contextlib.ExitStack() as stack:
            if file is None:
                file = stack.enter_context(open(path, "rb"))
            if path.suffix == ".gz":
                file = stack.enter_context(gzip.open(file))
            while True:
                chunk = file.read(1 << 20)
                pending = len(decoder.getstate()[0])
                text = newlines.decode(decoder.decode(chunk, final=not chunk), final=not chunk)
                yield text.removeprefix("\ufeff") if offset == 0 else text
                if not chunk:
                    return
                offset += len(chunk)
    except UnicodeDecodeError as error:
        inside = " of the decompressed text" if path.suffix == ".gz" else ""
        raise InputError(
            f"{path}: not UTF-8 at byte {offset - pending + error.start}{inside} "
            f"({error.object[error.start]:#04x}, {error.reason}); convert the file to UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


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
    """`text` in pieces of `PIECE` characters at most, cut after a line's end, or else a space."""
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
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
    for number, line in enumerate(lines(text_chunks(path)), 1):
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


def lines(chunks: Iterable[str]) -> Iterator[str]:
    pending = []  # the parts of a line longer than a chunk, joined once
    for chunk in chunks:
        head, *rest = chunk.split("\n")
        pending.append(head)
        if rest:
            yield "".join(pending)
            yield from rest[:-1]
            pending = [rest[-1]]
    yield "".join(pending)
