"""Files that a crash cannot tear: what is published under its final name is whole and on the disk.

`DurableFiles` is the seam: every call by which a run's output reaches the disk goes through one, so a test can fail or
kill any of them. It knows names and bytes, no file format.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
_NO_SUCH_FLAG = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class DurableFiles:
    """The calls of a commit, on the local file system. Each raises OSError as the system does."""

    def create(self, path: Path) -> BinaryIO:
        """A new, empty file, open for writing."""
        return path.open("wb")

    def sync(self, file: BinaryIO) -> None:
        """Everything written so far is on the disk when this returns."""
        file.flush()
        os.fsync(file.fileno())

    def link(self, source: Path, target: Path) -> None:
        """A second name for `source`. Raises FileExistsError where `target` exists."""
        os.link(source, target)

    def rename_new(self, source: Path, target: Path) -> None:
        """Rename without replacing. Raises FileExistsError where `target` exists.

        Where the system cannot refuse on its own, the look and the rename are two steps; the claim on the output folder
        keeps other writers from coming between them.
        """
        if not _rename_no_replace(source, target):
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            source.rename(target)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, taking the place of what is there."""
        source.replace(target)

    def remove(self, path: Path) -> None:
        path.unlink()

    def sync_folder(self, path: Path) -> None:
        """The names in the folder are on the disk when this returns."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(files: DurableFiles, source: Path, target: Path) -> None:
    """Give the finished, synced `source` its final name, durably. Raises FileExistsError where `target` exists.

    Where the name cannot be made durable it is taken back, so that the same commit can be tried again.
    """
    linked = True
    try:
        files.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        files.rename_new(source, target)
        linked = False
    try:
        files.sync_folder(target.parent)
    except OSError:
        files.remove(target)
        raise
    if linked:
        # The commit stands; a second name that stays behind is cleared with its folder.
        with suppress(OSError):
            files.remove(source)


def write_whole(files: DurableFiles, temporary: Path, target: Path, content: bytes) -> None:
    """Write `content` to `temporary` and let it take the place of `target`: a reader sees the old or the new."""
    with files.create(temporary) as file:
        file.write(content)
        files.sync(file)
    files.replace(temporary, target)
    files.sync_folder(target.parent)


def _rename_no_replace(source: Path, target: Path) -> bool:
    """renameat2(2) with RENAME_NOREPLACE; False where the C library or the file system does not know it."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_FLAG:
        return False
    raise OSError(code, os.strerror(code), str(target))
