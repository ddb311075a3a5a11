"""Atomic writes: a path never refers to an incomplete file or directory."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path next to `path` for a file or directory; renames it to `path` at exit.

    If the body raises (a full disk, a signal), the temporary path is removed and `path` is left as
    it was. An existing file is replaced in one step; an existing directory must be empty.
    """
    path = Path(path)
    # Hosts that share a disk may also have equal process ids.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
