"""A file system that fails, cuts short, suspends or kills at the n-th system call of a commit, counted from 0."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tokabatch.storage.atomic_files import DurableFiles

SYSTEM_CALLS = (
    "open_new", "open_folder", "write", "fsync", "close", "link", "rename_new", "replace", "exchange", "remove",
    "make_folder",
)  # fmt: skip


class CountedFiles(DurableFiles):
    """Notes every system call in `calls` as its name and, for a path, the path's last parts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        """Called before the system call is made; what it raises is the call's failure."""

    def after(self, name: str, arguments: tuple[object, ...], result: object) -> None:
        """Called when it has been made."""


def _counted(name: str) -> Callable[..., object]:
    def call(self: CountedFiles, *arguments: object) -> object:
        self.calls.append(name)
        self.before(name, arguments)
        result = getattr(DurableFiles, name)(self, *arguments)
        self.after(name, arguments, result)
        return result

    return call


for _name in SYSTEM_CALLS:
    setattr(CountedFiles, _name, _counted(_name))


class Failing(CountedFiles):
    """Call number `at` raises `error`; each later one, too, if it is to `last`."""

    def __init__(self, at: int | None = None, error: BaseException | None = None, *, last: bool = False) -> None:
        super().__init__()
        self.at, self.error, self.last = at, error or OSError(5, os.strerror(5)), last

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        number = len(self.calls) - 1
        if self.at is None or not (number == self.at or (self.last and number > self.at)):
            return
        if name == "close":
            # A descriptor is closed whatever close(2) reports.
            os.close(arguments[0])  # pyright: ignore[reportArgumentType]
        raise self.error


class Short(CountedFiles):
    """Call number `at`, if it is a write, takes half of what it is given; the next one fails, as on a disk that is full."""

    def __init__(self, at: int, then: OSError | None) -> None:
        super().__init__()
        self.at, self.then, self.cut = at, then, False

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        if self.cut and name == "write" and self.then is not None:
            error, self.then = self.then, None
            raise error

    def write(self, descriptor: int, content: memoryview) -> int:
        self.calls.append("write")
        self.before("write", (descriptor, content))
        if len(self.calls) - 1 == self.at:
            self.cut = True
            return os.write(descriptor, content[: max(1, len(content) // 2)])
        return os.write(descriptor, content)


class Killing(CountedFiles):
    """The process dies at call number `at`: before it, or right after; in the middle of it, if it is a write."""

    def __init__(self, at: int, moment: str) -> None:
        super().__init__()
        self.at, self.moment = at, moment

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        if len(self.calls) - 1 != self.at or self.moment == "after":
            return
        if self.moment == "within" and name == "write":
            descriptor, content = arguments
            os.write(descriptor, content[: len(content) // 2])  # pyright: ignore
        os.kill(os.getpid(), signal.SIGKILL)

    def after(self, name: str, arguments: tuple[object, ...], result: object) -> None:
        if len(self.calls) - 1 == self.at and self.moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)


class Suspending(CountedFiles):
    """The process is suspended before call number `at`, until it gets SIGCONT."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        if len(self.calls) - 1 == self.at:
            os.kill(os.getpid(), signal.SIGSTOP)


class Disk(CountedFiles):
    """Knows what would survive a power cut: a file's bytes once they are fsynced, a name once its folder is.

    `cut` leaves on the real disk what a merciless one would have kept: bytes that were not synced are gone, and so are the
    changes of names since the last sync of their folder, in the folders that it is told to `lose`: all, only that of the
    shards, or none. A disk writes names in any order, but never bytes that it does not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self._paths: dict[int, Path] = {}
        self._synced_bytes: dict[int, int] = {}
        """Size at the last fsync of each inode written here."""
        self._undo: dict[Path, list[Callable[[], None]]] = {}
        """What takes back the changes of a folder's names since it was synced, oldest first."""

    def before(self, name: str, arguments: tuple[object, ...]) -> None:
        if name in ("link", "rename_new", "replace", "remove"):
            paths = [path for path in arguments if isinstance(path, Path)]
            for path in paths[1:] if name == "link" else paths:
                self._remember(path)

    def after(self, name: str, arguments: tuple[object, ...], result: object) -> None:
        if name == "open_new":
            path = arguments[0]
            assert isinstance(path, Path) and isinstance(result, int)
            self._paths[result] = path
            self._synced_bytes[os.fstat(result).st_ino] = 0
            self._undo.setdefault(path.parent, []).append(lambda: path.unlink(missing_ok=True))
        elif name == "exchange":
            one, other = arguments
            assert isinstance(one, Path) and isinstance(other, Path)
            assert not self._undo.get(one) and not self._undo.get(other), "a folder is swapped before its names are synced"
            self._undo.setdefault(one.parent, []).append(lambda: DurableFiles().exchange(one, other))
        elif name == "open_folder":
            path = arguments[0]
            assert isinstance(path, Path) and isinstance(result, int)
            self._paths[result] = path
        elif name == "fsync":
            descriptor = arguments[0]
            assert isinstance(descriptor, int)
            path = self._paths[descriptor]
            if path.is_dir():
                self._undo.pop(path, None)
            else:
                self._synced_bytes[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def _remember(self, path: Path) -> None:
        undo = self._undo.setdefault(path.parent, [])
        if not path.exists():
            undo.append(lambda: path.unlink(missing_ok=True))
            return
        content, inode = path.read_bytes(), path.stat().st_ino
        kept = content[: self._synced_bytes.get(inode, len(content))]
        undo.append(lambda: (path.unlink(missing_ok=True), path.write_bytes(kept))[0])

    def cut(self, folder: Path, lose: str) -> None:
        # First: what comes back under its old name may be given the inode of a file that is gone.
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_ino in self._synced_bytes:
                size = self._synced_bytes[path.stat().st_ino]
                if path.stat().st_size > size:
                    os.truncate(path, size)
        for parent, undo in self._undo.items():
            # What lay in a folder that is gone is gone with it.
            lost = lose == "all" or parent.name == lose
            for step in reversed(undo) if lost and parent.is_dir() else ():
                step()
