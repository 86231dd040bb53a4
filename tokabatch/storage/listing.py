"""Reading an output folder while others may write to it: what is listed is what is read, or the reader starts over.

A file that the system does not let us read is called unreadable, never damaged: its content is unknown, and it is left alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from tokabatch.errors import OutputError
from tokabatch.storage.atomic_files import DurableFiles, stream_digest

_ATTEMPTS = 5
Result = TypeVar("Result")
Mark = tuple[int, int, int, int, int]
"""Device, inode, size, mtime and ctime in nanoseconds: at least one differs once a file has changed."""
NO_MARK: Mark = (0, 0, 0, 0, 0)


class Changed(Exception):
    """A file is no longer the one that was listed."""


def mark_of(found: os.stat_result) -> Mark:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A name in a folder's listing, and the file it named then. `is_file`: neither a folder, a pipe nor a dangling link."""

    files: DurableFiles
    path: Path
    mark: Mark
    is_file: bool

    @property
    def bytes(self) -> int:
        return self.mark[2]

    @property
    def changed(self) -> float:
        """When its content last changed, in seconds since 1970."""
        return self.mark[3] / 1e9

    def digest(self) -> str:
        """Return the SHA-256 of the whole file. Raises as `open` does."""
        with self.open() as file:
            return stream_digest(file)

    @contextmanager
    def open(self) -> Generator[BinaryIO]:
        """Open the file for reading. Raises Changed if it was replaced or removed, OutputError if it cannot be read, here or
        while the context lasts."""
        try:
            with self.files.open_old(self.path) as file:
                # Publishing removes the second name, which changes the ctime, not the content.
                if mark_of(os.fstat(file.fileno()))[:-1] != self.mark[:-1]:
                    raise Changed(self.path)
                yield file
        except FileNotFoundError as error:
            raise Changed(self.path) from error
        except OSError as error:
            if error.errno is None:  # Raised by the caller for the content itself.
                raise
            raise unreadable(self.path, error) from error


def list_files(
    files: DurableFiles, folder: Path, wanted: Callable[[str], object] = lambda name: True
) -> tuple[ListedFile, ...]:
    """List everything in `folder` whose name is `wanted`, by name; nothing if there is no such folder. Raises OutputError if it
    cannot be listed."""
    listed = (_listed(files, folder / name) for name in list_names(files, folder) if wanted(name))
    return tuple(file for file in listed if file is not None)


def list_names(files: DurableFiles, folder: Path) -> list[str]:
    """List the names in `folder`, without a look at what they name. Raises OutputError if it cannot be listed."""
    try:
        return [] if files.look(folder) is None else files.names(folder)
    except OSError as error:
        raise unreadable(folder, error) from error


def is_there(files: DurableFiles, path: Path) -> bool:
    """Return whether there is something of that name. Raises OutputError if the system does not say."""
    try:
        return files.look(path) is not None
    except OSError as error:
        raise unreadable(path, error) from error


def read_bytes(files: DurableFiles, path: Path) -> bytes | None:
    """Return the content of a small file, None if there is none. Raises OutputError if it cannot be read."""
    try:
        with files.open_old(path) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> OutputError:
    """Return the error of a file that the system does not let us read: it may be intact."""
    return OutputError(
        f"{path} cannot be read: {error.strerror or error}. Nothing is known to be wrong with it, and nothing was changed; "
        "give access to it (its permissions, its mount), then run the same command again."
    )


def consistently(read: Callable[[], Result], path: Path) -> Result:
    """Return the result of `read`, started over while files change under it. Raises OutputError if that does not end."""
    for _ in range(_ATTEMPTS):
        try:
            return read()
        except Changed:
            continue
    raise OutputError(
        f"{path}: its files change while they are read, because a run is writing there. Try again when it has ended."
    )


def _listed(files: DurableFiles, path: Path) -> ListedFile | None:
    try:
        found = files.look(path)
        if found is None:
            # Removed since it was listed, or a dangling link.
            return ListedFile(files, path, NO_MARK, False) if files.look(path, follow=False) else None
    except OSError as error:
        raise unreadable(path, error) from error
    return ListedFile(files, path, mark_of(found), stat.S_ISREG(found.st_mode))
