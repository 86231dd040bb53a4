"""A folder for what a command needs on the disk while it works, beside the file that it writes.

Its owner holds a lock in it, which ends with the process: what a killed one left behind is known by that, and taken away by the
next. Where the file system keeps no locks, nothing is taken away.
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
    """A new, empty folder in `parent` (but for its lock), removed at the end with all that is in it. Raises OSError."""
    _remove_dead(parent)
    folder, lock = _make(parent)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    """The folder and its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        # Another process may take a folder without a lock for one that was left behind.
        with suppress(FileNotFoundError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink:
                return folder, lock
            os.close(lock)


def _remove_dead(parent: Path) -> None:
    """What cannot be reached or locked stays."""
    found: list[Path] = []
    with suppress(OSError):
        found = [parent / name for name in os.listdir(parent) if name.startswith(PREFIX)]
    for folder in found:
        with suppress(OSError):
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:
                # Left in the instant between the two; one that is not empty is not ours to judge.
                os.rmdir(folder)
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    """The lock goes last: cut short, the rest is still known."""
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder), key=lambda name: name == _LOCK):
            os.unlink(folder / name)
        os.rmdir(folder)
