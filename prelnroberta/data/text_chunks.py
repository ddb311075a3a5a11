"""Reads text files, plain or gzipped, in chunks or by line, in bounded memory."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prelnroberta.errors import InputError


def iter_text_chunks(path: Path, file: BinaryIO | None = None) -> Iterator[str]:
    """Yields the file's text in chunks of a megabyte: decompressed, decoded, newlines as `\\n`.

    Args:
        file: read instead of `path`, which then is only its name (for example standard input).

    Raises:
        InputError: the file cannot be read, is not gzip although named `.gz`, or not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0  # of the chunk in the decompressed text, in bytes
    try:
        with contextlib.ExitStack() as stack:
            if file is None:
                file = stack.enter_context(open(path, "rb"))
            source: Any = file
            if path.suffix == ".gz":
                source = stack.enter_context(gzip.open(file))
            while True:
                chunk = source.read(1 << 20)
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


def iter_lines(chunks: Iterable[str]) -> Iterator[str]:
    """Yields the lines of a text given in chunks, without their newlines."""
    pending = []  # the parts of a line that spans chunks; joined once, when it is complete
    for chunk in chunks:
        head, *rest = chunk.split("\n")
        pending.append(head)
        if rest:
            yield "".join(pending)
            yield from rest[:-1]
            pending = [rest[-1]]
    yield "".join(pending)
