"""Files that a crash cannot tear: what is published under its final name is whole and on disk.

`DurableFiles` is the seam: every system call by which a run's output reaches the disk, or is read back, goes through one, so
that a test can fail, interrupt or kill any of them. Independent of file formats.

pathlib's `exists`, `glob` and similar are not used on a run's folder: they treat a file that cannot be reached as one that does
not exist.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
_NO_SUCH_FLAG = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_BUFFER_BYTES = 1 << 20
Result = TypeVar("Result")
Place = tuple[Path | str, int | None]
"""A name, and the handle of the folder that it is relative to, if there is one."""


class DurableFiles:
    """The system calls of a commit, on the local file system. Each raises OSError as the system does.

    A folder that is held is reached through its handle: it stays the same one wherever it is moved, whatever takes its name.
    """

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self.alone = True
        """Whether no other process writes to the same folder."""

    def hold(self, folder: Path) -> None:
        """Reach the content of `folder` through a handle from now on, until `let_go`. If it is held already, the folder that
        has its name now takes its place."""
        before = self._handles.pop(folder, None)
        try:
            self._handles[folder] = self.open_folder(folder)
        except BaseException:
            if before is not None:
                self._handles[folder] = before
            raise
        if before is not None:
            os.close(before)

    def let_go(self) -> None:
        """Close all handles; paths are names again."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def names(self, folder: Path) -> list[str]:
        """List what the folder holds, sorted."""
        # Opened again: for a folder that is open, NFS may return a listing that is a minute old.
        handle = self._handles.get(folder)
        descriptor = os.open(folder if handle is None else ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=handle)
        try:
            return sorted(os.listdir(descriptor))
        finally:
            os.close(descriptor)

    def look(self, path: Path, *, follow: bool = True) -> os.stat_result | None:
        """Return the status of a name, of the target if it is a link and `follow`; None only if the system says that it does
        not exist."""
        try:
            return self._afresh(path, lambda name, folder: os.stat(name, dir_fd=folder, follow_symlinks=follow))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def held(self, folder: Path) -> os.stat_result:
        """Return the held folder that contains this path."""
        return os.fstat(self._handles[folder])

    def open_old(self, path: Path) -> BinaryIO:
        """Open a file to read from its beginning."""
        # Opening a pipe under a file's name would block.
        flags = os.O_RDONLY | os.O_NONBLOCK
        descriptor = self._afresh(path, lambda name, folder: os.open(name, flags, dir_fd=folder))
        try:
            return os.fdopen(descriptor, "rb")
        except OSError:
            os.close(descriptor)
            raise

    def open_new(self, path: Path) -> int:
        """Open a new, empty file for writing and return its descriptor. An unfinished one of that name is replaced, not
        emptied, for it may have a second name that is final."""
        name, folder = self._at(path)
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder)

    def open_lock(self, path: Path) -> int:
        """Open a file, creating it if it is missing, never emptying it, and return its descriptor."""
        name, folder = self._at(path)
        return os.open(name, os.O_RDWR | os.O_CREAT, 0o644, dir_fd=folder)

    def open_folder(self, path: Path) -> int:
        name, folder = self._at(path) if path not in self._handles else (".", self._handles[path])
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)

    def write(self, descriptor: int, content: memoryview) -> int:
        """Write; return how many bytes were taken, which may be fewer than given."""
        return os.write(descriptor, content)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """Give `source` a second name. Raises FileExistsError if `target` exists."""
        (old, old_folder), (new, new_folder) = self._at(source), self._at(target)
        os.link(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder)

    def rename_new(self, source: Path, target: Path) -> None:
        """Rename without replacing. Raises FileExistsError if `target` exists. If the system cannot check by itself, the check
        and the rename are two steps; the claim on the output folder keeps other writers from coming between them. Without a
        claim, raises OSError (EOPNOTSUPP)."""
        old, new = self._at(source), self._at(target)
        if not _rename_at_once(old, new, _RENAME_NOREPLACE):
            if not self.alone:
                raise OSError(errno.EOPNOTSUPP, "the file system has no hard links and no rename that refuses to replace")
            with suppress(FileNotFoundError):
                os.stat(new[0], dir_fd=new[1], follow_symlinks=False)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            os.rename(old[0], new[0], src_dir_fd=old[1], dst_dir_fd=new[1])

    def replace(self, source: Path, target: Path) -> None:
        """Rename, replacing what is there."""
        (old, old_folder), (new, new_folder) = self._at(source), self._at(target)
        os.replace(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder)

    def exchange(self, one: Path, other: Path) -> None:
        """Swap what two names refer to in one step; handles of held folders follow them. Raises OSError if the system
        cannot."""
        if not _rename_at_once(self._at(one), self._at(other), _RENAME_EXCHANGE):
            raise OSError(errno.EOPNOTSUPP, "the file system cannot swap two folders", str(one))
        handles = {other: self._handles.pop(one, None), one: self._handles.pop(other, None)}
        self._handles.update({path: handle for path, handle in handles.items() if handle is not None})

    def remove(self, path: Path) -> None:
        name, folder = self._at(path)
        os.unlink(name, dir_fd=folder)

    def make_folder(self, path: Path) -> None:
        name, folder = self._at(path)
        os.mkdir(name, dir_fd=folder)

    def sync_folder(self, path: Path) -> None:
        """Sync the folder: its names are on disk when this returns."""
        descriptor = self.open_folder(path)
        try:
            self.fsync(descriptor)
        finally:
            self.close(descriptor)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that it holds, if it exists. Links are removed, not followed."""
        name, folder = self._at(path)
        with suppress(FileNotFoundError):
            _remove_tree(name, folder)
        if path in self._handles:
            os.close(self._handles.pop(path))

    def _afresh(self, path: Path, call: Callable[[Path | str, int | None], Result]) -> Result:
        """Call `call` with the name of `path` and the handle it is relative to. If the name does not exist, the folder is
        opened before a second call: NFS may remember that it did not, until the folder is read again."""
        name, folder = self._at(path)
        try:
            return call(name, folder)
        except FileNotFoundError:
            with suppress(OSError):
                os.close(os.open(path.parent if folder is None else ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder))
            return call(name, folder)

    def _at(self, path: Path) -> Place:
        """Return the name of `path`, and the handle it is relative to."""
        handle = self._handles.get(path.parent)
        return (path, None) if handle is None else (path.name or ".", handle)


class NewFile(io.BufferedWriter):
    """A file being written. Call `sync` before it gets its final name."""

    def __init__(self, files: DurableFiles, path: Path) -> None:
        self._files = files
        self._unbuffered = _Unbuffered(files, path)
        super().__init__(self._unbuffered, _BUFFER_BYTES)

    def sync(self) -> None:
        """Sync the file: everything written so far is on disk when this returns."""
        self.flush()
        self._files.fsync(self.fileno())

    @property
    def status(self) -> os.stat_result:
        """The status of the open file, whatever its names."""
        return os.fstat(self.fileno())

    @property
    def digest(self) -> str:
        """The SHA-256, in hexadecimal, of what was passed to the system."""
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
    """Give the finished, synced `source` its final name, durably. Raises FileExistsError if `target` exists. A name that cannot
    be made durable is removed, so that the same commit can be tried again; with several writers it is kept, because others may
    rely on it already."""
    linked = name_first(files, source, target)
    try:
        files.sync_folder(target.parent)
    except OSError:
        if files.alone:
            with suppress(OSError):
                files.remove(target)
        raise
    if linked:
        # The commit is done; a second name that is left behind is cleared with its folder.
        with suppress(OSError):
            files.remove(source)


def name_first(files: DurableFiles, source: Path, target: Path) -> bool:
    """Give `source` the name `target`, by a hard link, or by a rename if there are none; return whether it keeps its first
    name, too. Raises FileExistsError if `target` exists."""
    try:
        files.link(source, target)
    except OSError as error:
        # NFS: the link may have been made, and the reply lost.
        if not _is_same(files, source, target):
            if error.errno not in _NO_HARD_LINKS:
                raise
            files.rename_new(source, target)
            return False
    return True


def _is_same(files: DurableFiles, one: Path, other: Path) -> bool:
    """Return whether both names refer to one file with more than one name."""
    first, second = files.look(one, follow=False), files.look(other, follow=False)
    return first is not None and second is not None and first.st_nlink > 1 and os.path.samestat(first, second)


def write_whole(files: DurableFiles, temporary: Path, target: Path, content: bytes) -> None:
    """Write `content` to `temporary`, then replace `target` by it: a reader sees the old or the new content."""
    with NewFile(files, temporary) as file:
        file.write(content)
        file.sync()
    files.replace(temporary, target)
    files.sync_folder(target.parent)


def make_folders(files: DurableFiles, path: Path) -> None:
    """Make the folder and its missing parents, durably; nothing if it exists."""
    seen = [(place, files.look(place)) for place in (path, *path.parents)]
    missing = [place for place, found in seen if found is None or not stat.S_ISDIR(found.st_mode)]
    for place in reversed(missing):
        with suppress(FileExistsError):
            files.make_folder(place)
        files.sync_folder(place.parent)


def stream_digest(file: BinaryIO) -> str:
    """Return the SHA-256 of the rest of an open file, in hexadecimal, as `sha256sum` prints it. Raises OSError."""
    digest = hashlib.sha256()
    while chunk := file.read(_BUFFER_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _remove_tree(name: Path | str, folder: int | None) -> None:
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        for entry in os.listdir(descriptor):
            if stat.S_ISDIR(os.stat(entry, dir_fd=descriptor, follow_symlinks=False).st_mode):
                _remove_tree(entry, descriptor)
            else:
                os.unlink(entry, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    os.rmdir(name, dir_fd=folder)


def _rename_at_once(source: Place, target: Place, flag: int) -> bool:
    """Call renameat2(2) with a flag; return False if the C library or the file system does not support it."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    old, new = ((_AT_FDCWD if folder is None else folder, os.fsencode(name)) for name, folder in (source, target))
    if library.renameat2(*old, *new, flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_FLAG:
        return False
    raise OSError(code, os.strerror(code), str(target[0]))
