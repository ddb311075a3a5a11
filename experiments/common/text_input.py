"""The texts of `predict`: --text, --file or standard input, a line each."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from prelnroberta.errors import InputError


class Line(NamedTuple):
    """A text and where it comes from."""

    place: str
    text: str


@dataclasses.dataclass(frozen=True)
class TextInput:
    """Where the texts come from.

    Attributes:
        texts: those of --text; if there are any, nothing is read.
        path: of --file; None reads standard input.
    """

    texts: tuple[str, ...]
    path: str | None

    @property
    def is_keyboard(self) -> bool:
        return not self.texts and self.path is None and sys.stdin.isatty()

    def open(self) -> tuple[BinaryIO, str]:
        """The file or standard input, and its name."""
        if self.path is None:
            if self.is_keyboard:
                print("reading texts from the keyboard, one a line; Ctrl-D ends", file=sys.stderr)
            return sys.stdin.buffer, "standard input"
        try:
            return open(self.path, "rb"), self.path
        except OSError as error:
            raise InputError(f"--file={self.path}: {error.strerror}") from None

    def lines(self) -> Iterator[Line]:
        """The texts; empty lines are skipped.

        Raises:
            InputError: the file cannot be read, is not UTF-8, or has no text.
        """
        if self.texts:
            yield from (Line(f"--text {i}", text) for i, text in enumerate(self.texts, 1))
            return
        lines, name = self.open()
        offset, empty = 0, True
        with lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = line.decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{name}: not UTF-8 at byte {offset + error.start} (line {number}); "
                        "convert it to UTF-8"
                    ) from None
                offset += len(line)
                if text:
                    empty = False
                    yield Line(f"{name}, line {number}", text)
        if empty:
            raise InputError(f"{name} holds no text, expected a text a line")
