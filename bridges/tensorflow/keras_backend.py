"""Import of Keras with its TensorFlow backend, without TensorFlow's banner."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

from prelnroberta.errors import InputError

# What TensorFlow's libraries print before they read any log setting.
_BANNER = re.compile(rb"(?:WARNING: All log messages before absl::|I0000 ).*\n")


def require_tensorflow() -> None:
    """Selects Keras' TensorFlow backend, unless the user has selected another.

    Raises:
        InputError: another backend is selected. Keras would accept these models, but compute with
            arrays that TensorFlow cannot read.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    # TensorFlow's log on stderr: warnings and errors only.
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
    """Removes the banner from file descriptor 2, to which C++ code writes."""
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            os.write(2, _BANNER.sub(b"", captured.read()))
