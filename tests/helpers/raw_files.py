"""Contents of input files, as strings and streams, and the error of a reader."""

import io
import json

import pytest

from prelnroberta.errors import InputError


def error_message(function, *arguments, **named):
    """The message of the InputError that a reader raises, which is one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    return message


def lines(*rows):
    return "".join(f"{row}\n" for row in rows)


def json_lines(*rows):
    return lines(*(row if isinstance(row, str) else json.dumps(row) for row in rows))


class CountingStream(io.RawIOBase):
    """Standard input: bytes that are read once, and their number."""

    def __init__(self, data):
        self.data, self.given = io.BytesIO(data), 0

    def readable(self):
        return True

    def read(self, size=-1):
        chunk = self.data.read(size)
        self.given += len(chunk)
        return chunk
