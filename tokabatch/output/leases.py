"""Leases: which of several writers computes what. They avoid double work, and safety does not depend on them: see
output/claim.py.

A lease is a file in OUT/_units that names its holder. It gets its name by a hard link, which fails if another writer holds the
lease. A thread of the holder touches the file three times in LEASE seconds, as long as its main thread calls `sign`. A lease
counts as abandoned if a reader has seen no change of its file for LEASE seconds by the reader's own clock: times of two hosts
are never compared, and the time of a file only with an earlier time of the same file. The file is opened for each check, as NFS
may answer from memory otherwise.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tokabatch.errors import OutputError
from tokabatch.output.claim import Claim
from tokabatch.output.folder import LEASE, OutputFolder
from tokabatch.storage.atomic_files import NewFile, name_first
from tokabatch.storage.listing import list_files, read_bytes

RENEWALS = 3
"""Intervals in the time after which a lease counts as abandoned."""
STANDSTILL_SECONDS = 900.0
"""A holder whose main thread has not called `sign` for this long counts as hung, and its leases are no longer renewed. It may
be working all the while, downloading weights for example: another writer then begins the same work."""
_NO_LEASE = frozenset({errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM})
"""Errors of opening a file in a lease's place that no writer of this user has made; they are the same at every start."""
_Seen = tuple[int, int]
"""What changes when a lease is renewed or replaced: inode and time of the last change."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a lease: a name for people, such as a task of an array, and where it runs."""

    task: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease that exists: `name` is what it is for; `age` the seconds since it was renewed, by the clocks of two hosts."""

    name: str
    holder: Holder
    age: float


class Leases:
    """The leases of one writer, renewed until `close`. The thread that renews them is a daemon and ends with the process."""

    def __init__(self, claim: Claim, holder: Holder, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._files, self._folder = claim.files, claim.folder.units
        self._scratch = claim.folder.temporary
        self._content = json.dumps(asdict(holder)).encode()
        self._seconds, self._clock = seconds, clock
        self._held: dict[str, int] = {}
        """The open file of each lease, by which it is renewed: another's lease under the same name is not touched."""
        self._seen: dict[str, tuple[_Seen, float]] = {}
        """For others' leases: what was seen last, and when that was new."""
        self._alive: set[str] = set()
        self._signed = clock()
        self._closed = threading.Event()
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="leases")
        self._thread.start()

    def take(self, name: str) -> bool:
        """Take the lease; return whether it is this writer's from now on. Raises OSError, and OutputError if something else has
        its name."""
        self.sign()
        path, mine = self._folder / f"{name}{LEASE}", self._scratch / f"{name}{LEASE}"
        if not self._is_free(name, path):
            return False
        file = NewFile(self._files, mine)
        try:
            file.write(self._content)
            file.flush()
            try:
                name_first(self._files, mine, path)
            except FileExistsError:
                return False
            with self._guard:
                self._held[name] = os.dup(file.fileno())
        finally:
            file.close()
            with suppress(OSError):
                self._files.remove(mine)
        return True

    def sign(self) -> None:
        """Show that the holder is alive."""
        self._signed = self._clock()

    def signing(self, call: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Return what calls `sign`, and then `call`."""

        def signed(first: int, second: int) -> None:
            self.sign()
            call(first, second)

        return signed

    def is_alive(self, name: str) -> bool:
        """Return whether this writer has seen another renew the lease that it could not `take`, between two checks less than
        LEASE seconds apart."""
        return name in self._alive

    def drop(self, name: str) -> None:
        """Give the lease up, unless it is another's by now."""
        with self._guard:
            descriptor = self._held.pop(name, None)
        if descriptor is None:
            return
        path = self._folder / f"{name}{LEASE}"
        with suppress(OSError):
            found = self._files.look(path)
            if found is not None and os.path.samestat(found, os.fstat(descriptor)):
                self._files.remove(path)
        os.close(descriptor)

    def leave(self) -> None:
        """Close the files in a forked child: they stay the parent's."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held = {}

    def close(self) -> None:
        """Give up all leases."""
        self._closed.set()
        self._thread.join()
        for name in list(self._held):
            self.drop(name)

    def _is_free(self, name: str, path: Path) -> bool:
        """Return whether no writer holds it; remove one that was abandoned."""
        found, now = self._look(path), self._clock()
        if found is None:
            return True
        before = self._seen.get(name)
        if before is None or before[0] != found:
            self._seen[name] = found, now
            # With a long time between two checks, a change may be older than its holder's death.
            if before is not None and now - before[1] < self._seconds:
                self._alive.add(name)
            else:
                self._alive.discard(name)
            return False
        if now - before[1] < self._seconds:
            return False
        self._alive.discard(name)
        aside = self._scratch / f"{name}.stale"
        with suppress(OSError):
            # Of several that find it abandoned, one gets it.
            os.rename(path, aside)
            if self._look(aside) != found:
                # Another has taken it away since the look, and its own was in its place; or its holder goes on.
                with suppress(FileExistsError):
                    name_first(self._files, aside, path)
                self._files.remove(aside)
                return False
            self._files.remove(aside)
        self._seen.pop(name, None)
        return True

    def _look(self, path: Path) -> _Seen | None:
        try:
            with self._files.open_old(path) as file:
                found = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in _NO_LEASE:
                raise
            raise OutputError(
                f"{path} is in the place of a lease and cannot be read: {os.strerror(error.errno)}. Move it away, then run the "
                "same command again."
            ) from error
        return found.st_ino, found.st_mtime_ns

    def _renew(self) -> None:
        while not self._closed.wait(self._seconds / RENEWALS):
            with self._guard:
                for descriptor in self._held.values() if self._clock() - self._signed < STANDSTILL_SECONDS else ():
                    # One that was removed (ESTALE on NFS) does not keep the others from being renewed.
                    with suppress(OSError):
                        os.utime(descriptor)


def read_leases(folder: OutputFolder, now: float) -> tuple[Lease, ...]:
    """Return the leases that exist, by name. Raises OutputError if they cannot be read."""
    found: list[Lease] = []
    for file in list_files(folder.files, folder.units):
        content = read_bytes(folder.files, file.path) if file.path.name.endswith(LEASE) else None
        with suppress(ValueError, TypeError):
            if content is not None:
                holder = Holder(**json.loads(content))
                found.append(Lease(file.path.name.removesuffix(LEASE), holder, now - file.changed))
    return tuple(found)
