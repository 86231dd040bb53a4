"""A temporary folder on disk for a command's work, beside the file that it writes.

Its owner holds a lock in it that ends with the process: this identifies what a killed process left behind, which the next one
removes. On a file system without locks nothing is removed.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".tokabatch-export-"
_LOCK = "_lock"


@contextmanager
def scratch_folder(parent: Path) -> Generator[Path]:
    """Make a new folder in `parent`, empty except for its lock, and remove it at the end with its content. Raises OSError."""
    _remove_dead(parent)
    folder, lock = _make(parent)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    """Return the folder and its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        # Another process may find a folder without a lock and take it for left behind.
        with suppress(FileNotFoundError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink:
                return folder, lock
            os.close(lock)


def _remove_dead(parent: Path) -> None:
    """Remove folders whose lock is free; what cannot be reached or locked stays."""
    found: list[Path] = []
    with suppress(OSError):
        found = [parent / name for name in os.listdir(parent) if name.startswith(PREFIX)]
    for folder in found:
        with suppress(OSError):
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:
                # Left between making the folder and its lock; one that is not empty may be someone else's.
                os.rmdir(folder)
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    """The lock is removed last: after an interruption, the rest is still recognised."""
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder), key=lambda name: name == _LOCK):
            os.unlink(folder / name)
        os.rmdir(folder)
