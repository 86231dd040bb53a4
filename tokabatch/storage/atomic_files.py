"""Files that a crash cannot tear: what is published under its final name is whole and on the disk.

`DurableFiles` is the seam: every system call by which a run's output reaches the disk, or is read back, goes through one, so a
test can fail, cut short or kill any of them. It knows names and bytes, no file format. pathlib's `exists`, `glob` and their kin
are not used on a run's folder: they take a file that cannot be reached for one that is not there.
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
"""A name, and the handle of the folder that it counts from, if there is one."""


class DurableFiles:
    """The system calls of a commit, on the local file system. Each raises OSError as the system does.

    A folder that is held is reached through its handle: it stays the same one wherever it is moved, whatever takes its name.
    """

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self.alone = True
        """No other process writes where this one does."""

    def hold(self, folder: Path) -> None:
        """Reach what lies in `folder` through a handle from now on, until `let_go`."""
        if folder not in self._handles:
            self._handles[folder] = self.open_folder(folder)

    def let_go(self) -> None:
        """Close all handles; paths are names again."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def names(self, folder: Path) -> list[str]:
        """What the folder holds, sorted."""
        # Opened anew: of a folder that is open, NFS may say what it held a minute ago.
        handle = self._handles.get(folder)
        descriptor = os.open(folder if handle is None else ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=handle)
        try:
            return sorted(os.listdir(descriptor))
        finally:
            os.close(descriptor)

    def look(self, path: Path, *, follow: bool = True) -> os.stat_result | None:
        """What the name stands for, the target of a link if that is to be followed; None only where the system says that it is
        not there."""
        try:
            return self._afresh(path, lambda name, folder: os.stat(name, dir_fd=folder, follow_symlinks=follow))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def held(self, folder: Path) -> os.stat_result:
        """The folder that is held under this path."""
        return os.fstat(self._handles[folder])

    def open_old(self, path: Path) -> BinaryIO:
        """A file to read from its beginning."""
        # A pipe under a file's name would be waited for.
        flags = os.O_RDONLY | os.O_NONBLOCK
        descriptor = self._afresh(path, lambda name, folder: os.open(name, flags, dir_fd=folder))
        try:
            return os.fdopen(descriptor, "rb")
        except OSError:
            os.close(descriptor)
            raise

    def open_new(self, path: Path) -> int:
        """A descriptor of a new, empty file, open for writing. An unfinished one of that name gives way; it is not emptied, for
        it may have a second name that is final."""
        name, folder = self._at(path)
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder)

    def open_lock(self, path: Path) -> int:
        """A descriptor of a file, which is created where it is missing and never emptied."""
        name, folder = self._at(path)
        return os.open(name, os.O_RDWR | os.O_CREAT, 0o644, dir_fd=folder)

    def open_folder(self, path: Path) -> int:
        name, folder = self._at(path) if path not in self._handles else (".", self._handles[path])
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)

    def write(self, descriptor: int, content: memoryview) -> int:
        """How many bytes were taken, which may be fewer than there are."""
        return os.write(descriptor, content)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        """A second name for `source`. Raises FileExistsError where `target` exists."""
        (old, old_folder), (new, new_folder) = self._at(source), self._at(target)
        os.link(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder)

    def rename_new(self, source: Path, target: Path) -> None:
        """Rename without replacing. Raises FileExistsError where `target` exists.

        Where the system cannot refuse on its own, the look and the rename are two steps; the claim on the output folder
        keeps other writers from coming between them. Without one, raises OSError (EOPNOTSUPP).
        """
        old, new = self._at(source), self._at(target)
        if not _rename_at_once(old, new, _RENAME_NOREPLACE):
            if not self.alone:
                raise OSError(errno.EOPNOTSUPP, "the file system has no hard links and no rename that refuses to replace")
            with suppress(FileNotFoundError):
                os.stat(new[0], dir_fd=new[1], follow_symlinks=False)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            os.rename(old[0], new[0], src_dir_fd=old[1], dst_dir_fd=new[1])

    def replace(self, source: Path, target: Path) -> None:
        """Rename, taking the place of what is there."""
        (old, old_folder), (new, new_folder) = self._at(source), self._at(target)
        os.replace(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder)

    def exchange(self, one: Path, other: Path) -> None:
        """Swap what two names stand for in one step; each folder that is held goes with its handle. Raises OSError where the
        system cannot."""
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
        """The names in the folder are on the disk when this returns."""
        descriptor = self.open_folder(path)
        try:
            self.fsync(descriptor)
        finally:
            self.close(descriptor)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that it holds; nothing happens where it is not there. Links are removed, not followed."""
        name, folder = self._at(path)
        with suppress(FileNotFoundError):
            _remove_tree(name, folder)
        if path in self._handles:
            os.close(self._handles.pop(path))

    def _afresh(self, path: Path, call: Callable[[Path | str, int | None], Result]) -> Result:
        """What `call` makes of the name of `path`, and of the handle that it counts from. Where the name is not there its
        folder is opened before a second call: NFS may remember that it was not, until the folder is looked at again."""
        name, folder = self._at(path)
        try:
            return call(name, folder)
        except FileNotFoundError:
            with suppress(OSError):
                os.close(os.open(path.parent if folder is None else ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder))
            return call(name, folder)

    def _at(self, path: Path) -> Place:
        """The name of `path`, and the handle that it counts from."""
        handle = self._handles.get(path.parent)
        return (path, None) if handle is None else (path.name or ".", handle)


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
    def status(self) -> os.stat_result:
        """What the system says of the open file, whatever its names."""
        return os.fstat(self.fileno())

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

    Where the name cannot be made durable it is taken back, so that the same commit can be tried again; where others write, too,
    it stays, for they may go by it already.
    """
    linked = name_first(files, source, target)
    try:
        files.sync_folder(target.parent)
    except OSError:
        if files.alone:
            with suppress(OSError):
                files.remove(target)
        raise
    if linked:
        # The commit stands; a second name that stays behind is cleared with its folder.
        with suppress(OSError):
            files.remove(source)


def name_first(files: DurableFiles, source: Path, target: Path) -> bool:
    """Give `source` the name `target`, by a hard link, or by a rename where there are none; whether it has its first name, too.
    Raises FileExistsError where `target` exists."""
    try:
        files.link(source, target)
    except OSError as error:
        # NFS: the link may have been made, and its answer been lost.
        if not _is_same(files, source, target):
            if error.errno not in _NO_HARD_LINKS:
                raise
            files.rename_new(source, target)
            return False
    return True


def _is_same(files: DurableFiles, one: Path, other: Path) -> bool:
    """Whether both names stand for one file that has more than one name."""
    first, second = files.look(one, follow=False), files.look(other, follow=False)
    return first is not None and second is not None and first.st_nlink > 1 and os.path.samestat(first, second)


def write_whole(files: DurableFiles, temporary: Path, target: Path, content: bytes) -> None:
    """Write `content` to `temporary` and let it take the place of `target`: a reader sees the old or the new."""
    with NewFile(files, temporary) as file:
        file.write(content)
        file.sync()
    files.replace(temporary, target)
    files.sync_folder(target.parent)


def make_folders(files: DurableFiles, path: Path) -> None:
    """The folder and its missing parents, durably. Nothing happens where it exists."""
    seen = [(place, files.look(place)) for place in (path, *path.parents)]
    missing = [place for place, found in seen if found is None or not stat.S_ISDIR(found.st_mode)]
    for place in reversed(missing):
        with suppress(FileExistsError):
            files.make_folder(place)
        files.sync_folder(place.parent)


def stream_digest(file: BinaryIO) -> str:
    """SHA-256 of what is left of an open file, in hexadecimal, as `sha256sum` prints it. Raises OSError."""
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
    """renameat2(2) with a flag; False where the C library or the file system does not know it."""
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
