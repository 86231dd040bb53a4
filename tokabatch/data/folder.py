"""The output folder: where its parts lie, and the claim by which one run writes into it.

OUT/data/part-00000.parquet   committed shards
OUT/_tmp/                     unfinished files; cleared by the next claim
OUT/_lock                     held by the writing process, released by its death
OUT/manifest.json             what the run is, and what decides its output
OUT/row_digests.parquet       what each row and its prompt were
OUT/job.json                  the job, to run it again from the folder alone
OUT/steps-00000.parquet       what each step did and took; not a result
OUT/summary.json, _SUCCESS    how it ended; taken back by the next start that has something to add
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from tokabatch.data.durable import DurableFiles, make_folders, write_whole
from tokabatch.errors import CommitError, OutputError

_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
_SHARD_NAME = re.compile(r"part-\d{5,}\.parquet")
_CLAIM_ATTEMPTS = 5
_CLAIM_PAUSE_SECONDS = 0.05


class OutputFolder:
    """Paths of an output folder. Holds no resource; reading is free to anyone at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "data"
        self.temporary = path / "_tmp"
        self.lock = path / "_lock"
        self.manifest = path / "manifest.json"
        self.row_digests = path / "row_digests.parquet"
        self.job = path / "job.json"
        self.summary = path / "summary.json"
        self.success = path / "_SUCCESS"

    def shard_paths(self) -> list[Path]:
        """The committed shards, by number."""
        found = [path for path in self.data.glob("part-*.parquet") if _SHARD_NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def step_paths(self) -> list[Path]:
        """The records of steps, one for each time the run was started."""
        return sorted(self.path.glob("steps-*.parquet"))

    def is_claimed(self) -> bool:
        """Whether a living process writes here. False where the file system keeps no locks."""
        try:
            descriptor = os.open(self.lock, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return False


class Claim:
    """The right of one process to write into an output folder, until `release` or the process's end.

    Changes nothing of what an earlier run left, but for its unfinished files. Raises OutputError where the folder cannot be
    written, holds what no run wrote, or another run writes there. The lock belongs to the open file: a forked child holds it
    too, for as long as it lives. A claim that wrote neither a manifest nor a shard takes away what it made.
    """

    def __init__(self, path: Path, files: DurableFiles | None = None) -> None:
        self.files = files or DurableFiles()
        self.folder = OutputFolder(path)
        self._made = [place for place in (self.folder.data, path, *path.parents) if not os.path.lexists(place)]
        self._descriptor: int | None = None
        self._prepare()

    def write(self, target: Path, content: bytes) -> None:
        """Replace one of the folder's small files atomically."""
        write_whole(self.files, self.folder.temporary / target.name, target, content)

    @contextmanager
    def committing(self) -> Generator[None]:
        """Around what writes results: raises CommitError where the system takes no more."""
        try:
            yield
        except OSError as error:
            raise CommitError(
                f"output.path {str(self.folder.path)!r} takes no more: {error.strerror or error}. What is committed is whole; "
                "make room there and run the same command again, which adds the rest."
            ) from error

    def reopen(self, *, keep_summary: bool = False) -> None:
        """Take back the marks of an earlier end: from here on the run goes on; `keep_summary` where nothing is left to do."""
        for mark in (self.folder.success, self.folder.summary):
            if mark.exists() and not (keep_summary and mark == self.folder.summary):
                self.files.remove(mark)
        self.files.sync_folder(self.folder.path)

    def discard(self) -> None:
        """Delete the results of an earlier run. Cut short, it leaves a run that lacks some of its samples."""
        self.reopen()
        for shard in self.folder.shard_paths():
            self.files.remove(shard)
        self.files.sync_folder(self.folder.data)
        for path in (*self.folder.step_paths(), self.folder.row_digests, self.folder.manifest, self.folder.job):
            if path.exists():
                self.files.remove(path)

    def release(self) -> None:
        """Let others write here; leaves no unfinished file behind."""
        if self._descriptor is not None:
            shutil.rmtree(self.folder.temporary, ignore_errors=True)
            self._remove_unused()
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _prepare(self) -> None:
        folder = self.folder
        try:
            make_folders(self.files, folder.data)
            self._descriptor = _lock(folder)
            self._clear()
        except BaseException as error:
            self.release()
            if isinstance(error, OSError):
                raise _unwritable(folder.path, error.strerror or str(error)) from error
            raise

    def _remove_unused(self) -> None:
        """Needs the lock. A folder that is not empty stays."""
        folder = self.folder
        with suppress(OSError):
            if folder.manifest.exists() or any(folder.data.iterdir()):
                return
            folder.lock.unlink()
            for made in self._made:
                made.rmdir()

    def _clear(self) -> None:
        folder = self.folder
        _refuse_foreign(folder)
        if folder.temporary.exists():
            shutil.rmtree(folder.temporary)
        self.files.make_folder(folder.temporary)
        probe, probed = folder.temporary / "probe", folder.temporary / "probed"
        write_whole(self.files, probe, probed, b"written\n")
        self.files.remove(probed)
        self.files.sync_folder(folder.path)


def check_output(path: Path) -> None:
    """Raises the OutputError that a claim of this folder would end in now; makes and changes nothing."""
    folder = OutputFolder(path)
    if os.path.isdir(folder.data) and os.access(folder.data, os.R_OK):
        _refuse_foreign(folder)
    if folder.is_claimed():
        raise _busy(folder)
    # `lexists`: a link to nowhere is in the way, too.
    nearest = next(place for place in (folder.data, path, *path.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(nearest):
        raise _unwritable(path, f"{nearest} is not a folder")
    for place in (nearest, path) if nearest == folder.data else (nearest,):
        if not os.access(place, os.W_OK | os.X_OK):
            raise _unwritable(path, f"no permission to write in {place.absolute()}")


def _refuse_foreign(folder: OutputFolder) -> None:
    shards = {path.name for path in folder.shard_paths()}
    foreign = sorted(entry.name for entry in folder.data.iterdir() if entry.name not in shards and entry.name[:1] != ".")
    if foreign:
        raise OutputError(
            f"output.path {str(folder.path)!r} holds {len(foreign)} file(s) that no run wrote (data/{foreign[0]}). "
            "Choose another output.path, or move them away."
        )


def _unwritable(path: Path, reason: str) -> OutputError:
    return OutputError(f"output.path {str(path)!r} cannot be written: {reason}. Choose another output.path.")


def _busy(folder: OutputFolder) -> OutputError:
    return OutputError(
        f"another run is writing to output.path {str(folder.path)!r}. Wait for it, stop it, or choose another output.path."
    )


def _lock(folder: OutputFolder) -> int:
    # `tokabatch status` holds a shared lock for an instant, hence more than one attempt.
    for _ in range(_CLAIM_ATTEMPTS):
        descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            time.sleep(_CLAIM_PAUSE_SECONDS)
            continue
        # The holder before may have removed the file that is locked now.
        if _is_file(descriptor, folder.lock):
            return descriptor
        os.close(descriptor)
    raise _busy(folder)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
