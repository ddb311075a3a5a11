"""Imports TensorFlow and Keras without the lines that they print, and settles the backend."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

from prelnroberta.errors import InputError

# What TensorFlow's libraries say of themselves before any setting of theirs is read.
_BANNER = re.compile(rb"(?:WARNING: All log messages before absl::|I0000 ).*\n")


def require_tensorflow() -> None:
    """Chooses Keras' TensorFlow backend, unless the user's settings name another.

    Raises:
        InputError: they do. A Keras of another backend would accept our models, and compute with
            arrays that TensorFlow does not know.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    # Of TensorFlow's own lines on stderr, warnings and errors.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    backend = os.environ["KERAS_BACKEND"]
    if backend == "tensorflow":
        with _without_banner():
            import keras
        backend = keras.backend.backend()
    if backend != "tensorflow":
        raise InputError(
            f"bridges.tensorflow needs Keras' TensorFlow backend, found {backend!r}: set "
            "KERAS_BACKEND=tensorflow before keras is imported"
        )


@contextlib.contextmanager
def _without_banner() -> Iterator[None]:
    """Holds back file descriptor 2, to which C++ writes, and lets all but the banner through."""
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # closed: nobody reads
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            os.write(2, _BANNER.sub(b"", held.read()))
