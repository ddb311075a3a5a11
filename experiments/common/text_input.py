"""Where `predict` has its texts from: --text, --file or standard input, a line at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from experiments.flags import FLAGS
from prelnroberta.errors import InputError


class Line(NamedTuple):
    """A text and where it came from."""

    place: str
    text: str


def reads_keyboard() -> bool:
    return not FLAGS.text and FLAGS.file is None and sys.stdin.isatty()


def opened() -> tuple[BinaryIO, str]:
    """--file or standard input, and its name."""
    if FLAGS.file is None:
        if reads_keyboard():
            print("reading from the keyboard, a text a line; end with Ctrl-D", file=sys.stderr)
        return sys.stdin.buffer, "standard input"
    try:
        return open(FLAGS.file, "rb"), FLAGS.file
    except OSError as error:
        raise InputError(f"--file={FLAGS.file}: {error.strerror}") from None


def texts() -> Iterator[Line]:
    """--text, --file, or standard input; one text a line, empty lines left out."""
    if FLAGS.text:
        yield from (Line(f"--text {i}", text) for i, text in enumerate(FLAGS.text, 1))
        return
    lines, name = opened()
    offset, empty = 0, True
    with lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{name}: not UTF-8 at byte {offset + error.start} (line {number}); convert it "
                    "to UTF-8"
                ) from None
            offset += len(line)
            if text:
                empty = False
                yield Line(f"{name}, line {number}", text)
    if empty:
        raise InputError(f"{name} holds no text, expected a text a line")
