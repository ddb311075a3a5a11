"""Writing to disk so that a name always stands for something complete."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or make a directory at; renames it when done.

    If the body raises (a full disk, a signal), what it wrote is removed and whatever stood at
    `path` stays. An existing file is replaced in one step; an existing directory must be empty.
    """
    path = Path(path)
    # Hosts that share a disk may share process ids as well.
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
