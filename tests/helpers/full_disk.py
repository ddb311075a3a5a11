"""A small file system that a test can fill."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@dataclasses.dataclass
class Disk:
    path: Path
    _filler: str = "filler"

    def fill(self) -> None:
        """Fills it up to less than a page."""
        with (self.path.parent / self._filler).open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
            with contextlib.suppress(OSError):
                while file.write(bytes(512)):
                    pass

    def empty(self) -> None:
        (self.path.parent / self._filler).unlink()


@contextlib.contextmanager
def filled_disk(mount: Path, size: str = "16m") -> Iterator[Disk]:
    """A file system of its own, small, to be filled. Only root may make one."""
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system, to fill it")
    try:
        yield Disk(mount / "content")
    finally:
        subprocess.run(["umount", "-l", mount], check=True)
