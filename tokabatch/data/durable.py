"""Files that a crash cannot tear: what is published under its final name is whole and on the disk.

`DurableFiles` is the seam: every system call by which a run's output reaches the disk goes through one, so a test can fail,
cut short or kill any of them. It knows names and bytes, no file format.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
_NO_SUCH_FLAG = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_BUFFER_BYTES = 1 << 20


class DurableFiles:
    """The system calls of a commit, on the local file system. Each raises OSError as the system does."""

    def open_new(self, path: Path) -> int:
        """A descriptor of a new, empty file, open for writing. An unfinished one of that name gives way; it is not emptied, for
        it may have a second name that is final."""
        path.unlink(missing_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def open_folder(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def write(self, descriptor: int, content: memoryview) -> int:
        """How many bytes were taken, which may be fewer than there are."""
        return os.write(descriptor, content)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

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

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def sync_folder(self, path: Path) -> None:
        """The names in the folder are on the disk when this returns."""
        descriptor = self.open_folder(path)
        try:
            self.fsync(descriptor)
        finally:
            self.close(descriptor)


class NewFile(io.BufferedWriter):
    """A file being written. `sync` before it is given its final name."""

    def __init__(self, files: DurableFiles, path: Path) -> None:
        self._files = files
        self._unbuffered = _Unbuffered(files, path)
        super().__init__(self._unbuffered, _BUFFER_BYTES)

    def sync(self) -> None:
        """Everything written so far is on the disk when this returns."""
        self.flush()
        self._files.fsync(self.fileno())

    @property
    def inode(self) -> int:
        return os.fstat(self.fileno()).st_ino

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of what was handed to the system."""
        return self._unbuffered.hash.hexdigest()


class _Unbuffered(io.RawIOBase):
    def __init__(self, files: DurableFiles, path: Path) -> None:
        self._files = files
        self._descriptor = files.open_new(path)
        self.hash = hashlib.sha256()
        self._taken = 0

    def tell(self) -> int:
        return self._taken

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, content: Any, /) -> int:
        """What the system does not take is offered again by the buffer in front."""
        view = memoryview(content)
        taken = self._files.write(self._descriptor, view)
        self.hash.update(view[:taken])
        self._taken += taken
        return taken

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._files.close(self._descriptor)


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
        with suppress(OSError):
            files.remove(target)
        raise
    if linked:
        # The commit stands; a second name that stays behind is cleared with its folder.
        with suppress(OSError):
            files.remove(source)


def write_whole(files: DurableFiles, temporary: Path, target: Path, content: bytes) -> None:
    """Write `content` to `temporary` and let it take the place of `target`: a reader sees the old or the new."""
    with NewFile(files, temporary) as file:
        file.write(content)
        file.sync()
    files.replace(temporary, target)
    files.sync_folder(target.parent)


def make_folders(files: DurableFiles, path: Path) -> None:
    """The folder and whatever lacks above it, durably. Nothing happens where it exists."""
    missing = [place for place in (path, *path.parents) if not place.is_dir()]
    for place in reversed(missing):
        with suppress(FileExistsError):
            files.make_folder(place)
        files.sync_folder(place.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, as `sha256sum` prints it. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_BUFFER_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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
