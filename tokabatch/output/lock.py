"""The lock of an output folder: exclusive for a single writer, shared by several."""

from __future__ import annotations

import errno
import fcntl
import os
import time

from tokabatch.errors import BusyError, OutputError
from tokabatch.output.folder import LEASE, OutputFolder
from tokabatch.storage.listing import is_there, list_files, unreadable

_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
LATELY_SECONDS = 300.0
"""A lease changed this recently, by another host's clock, may belong to a living writer."""
_ATTEMPTS = 5
_PAUSE_SECONDS = 0.05


class FolderLock:
    """The lock of a folder, exclusive or `shared`, until `release` or the end of the process and of the children that it forked
    meanwhile. Raises BusyError if another process holds it, OutputError if the file system has no locks and it must be
    exclusive, OSError."""

    def __init__(self, folder: OutputFolder, *, shared: bool) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        # `is_claimed` holds the lock for an instant, hence more than one attempt.
        for _ in range(_ATTEMPTS):
            descriptor = folder.files.open_lock(folder.lock)
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS and shared:
                    self._descriptor = descriptor
                    return
                os.close(descriptor)
                if error.errno in _NO_LOCKS:
                    raise OutputError(
                        f"output.path {str(folder.path)!r}: its file system does not support locks ({error.strerror}), so a "
                        "second run could not be kept out. Choose another output.path; a new run may be written there with "
                        "--shared, unless its job has verify.stop or errors.policy: stop."
                    ) from error
                if not isinstance(error, BlockingIOError):
                    raise
                time.sleep(_PAUSE_SECONDS)
                continue
            self._descriptor = descriptor
            try:
                # The previous holder may have removed the file that is locked now.
                if self.is_in_place():
                    return
            except OSError:
                self.release()
                raise
            self.release()
        raise busy(folder)

    def is_in_place(self) -> bool:
        """Return whether the file that is locked here is the one that others would lock. Raises OSError."""
        found = self._folder.files.look(self._folder.lock)
        return self._descriptor is not None and found is not None and os.path.samestat(found, os.fstat(self._descriptor))

    def become_exclusive(self) -> bool:
        """Give up the share of the lock; return whether no other process holds one, in which case this lock is exclusive now.
        Otherwise it is released."""
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Close the lock file. In a forked child the lock stays the parent's."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_claimed(folder: OutputFolder) -> bool:
    """Return whether one or several living processes write to the folder. False on a file system without locks."""
    # Another reader may check at the same instant.
    for _ in range(_ATTEMPTS):
        try:
            with folder.files.open_old(folder.lock) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if not is_there(folder.files, folder.units):
                    return False
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            if not is_there(folder.files, folder.units):
                return True
            time.sleep(_PAUSE_SECONDS)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            if error.errno == errno.EBADF:
                # NFS grants an exclusive lock only on a file that is open for writing.
                now = time.time()
                leases = list_files(folder.files, folder.units, lambda name: name.endswith(LEASE))
                return any(now - lease.changed < LATELY_SECONDS for lease in leases)
            raise unreadable(folder.lock, error) from error
    return True


def busy(folder: OutputFolder) -> BusyError:
    """Return the error of a folder to which another run writes."""
    return BusyError(
        f"another run is writing to output.path {str(folder.path)!r}. Wait for it, stop it, or choose another output.path."
    )
