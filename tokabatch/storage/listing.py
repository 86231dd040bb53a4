"""Reading an output folder while others may write to it: what is listed is what is read, or the reader starts over.

A file that the system will not give is called unreadable, never damaged: nothing is known of it, and nothing is done to it.
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
"""Device, inode, bytes, and the times of the last change of content and of anything: what cannot stay when a file changes."""
NO_MARK: Mark = (0, 0, 0, 0, 0)


class Changed(Exception):
    """A file is not the one that was listed any more."""


def mark_of(found: os.stat_result) -> Mark:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A name of a folder's listing, and what stood under it then. `is_file`: no folder, pipe or link to nowhere."""

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
        """SHA-256 of the whole file. Raises as `open` does."""
        with self.open() as file:
            return stream_digest(file)

    @contextmanager
    def open(self) -> Generator[BinaryIO]:
        """The file, to read. Raises Changed where it is another one by now or gone, OutputError where it cannot be read, in
        here or while the context lasts."""
        try:
            with self.files.open_old(self.path) as file:
                # Publishing takes the second name away, which the last time tells: the content is the same.
                if mark_of(os.fstat(file.fileno()))[:-1] != self.mark[:-1]:
                    raise Changed(self.path)
                yield file
        except FileNotFoundError as error:
            raise Changed(self.path) from error
        except OSError as error:
            if error.errno is None:  # Raised for what the content is.
                raise
            raise unreadable(self.path, error) from error


def list_files(
    files: DurableFiles, folder: Path, wanted: Callable[[str], object] = lambda name: True
) -> tuple[ListedFile, ...]:
    """Everything in `folder` whose name is `wanted`, by name; nothing where there is no such folder. Raises OutputError where
    it cannot be listed."""
    try:
        if files.look(folder) is None:
            return ()
        names = files.names(folder)
    except OSError as error:
        raise unreadable(folder, error) from error
    listed = (_listed(files, folder / name) for name in names if wanted(name))
    return tuple(file for file in listed if file is not None)


def is_there(files: DurableFiles, path: Path) -> bool:
    """Whether there is something of that name. Raises OutputError where the system does not say."""
    try:
        return files.look(path) is not None
    except OSError as error:
        raise unreadable(path, error) from error


def read_bytes(files: DurableFiles, path: Path) -> bytes | None:
    """The content of a small file, None where there is none. Raises OutputError where it cannot be read."""
    try:
        with files.open_old(path) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> OutputError:
    """The error for what the system does not give: it may be whole."""
    return OutputError(
        f"{path} cannot be read: {error.strerror or error}. Nothing is known to be wrong with it, and nothing was changed; "
        "give access to it (its permissions, its mount), then run the same command again."
    )


def consistently(read: Callable[[], Result], path: Path) -> Result:
    """What `read` returns, started over where a file changed under it. Raises OutputError where that does not end."""
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
            # Gone since it was listed, or a link to nowhere.
            return ListedFile(files, path, NO_MARK, False) if files.look(path, follow=False) else None
    except OSError as error:
        raise unreadable(path, error) from error
    return ListedFile(files, path, mark_of(found), stat.S_ISREG(found.st_mode))
