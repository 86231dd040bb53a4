"""The output folder: where its parts lie, and the claim by which one run writes into it.

OUT/data/part-00000.parquet   committed shards
OUT/_tmp/                     unfinished files; cleared by the next claim
OUT/_lock                     held by the writing process, released by its death
OUT/manifest.json, summary.json, _SUCCESS
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from pathlib import Path
from types import TracebackType

from tokabatch.data.durable import DurableFiles, write_whole
from tokabatch.errors import OutputError

_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
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
        self.summary = path / "summary.json"
        self.success = path / "_SUCCESS"

    def shard_paths(self) -> list[Path]:
        """The committed shards, by name."""
        return sorted(self.data.glob("part-*.parquet"))

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

    Raises OutputError where the folder cannot be written, already holds data, or another run writes there. The lock
    belongs to the open file: a forked child holds it too, for as long as it lives.
    """

    def __init__(self, path: Path, files: DurableFiles | None = None) -> None:
        self.files = files or DurableFiles()
        self.folder = OutputFolder(path)
        self._descriptor = self._prepare(path)

    def write(self, target: Path, content: bytes) -> None:
        """Replace one of the folder's small files atomically."""
        write_whole(self.files, self.folder.temporary / target.name, target, content)

    def release(self) -> None:
        """Let others write here; leaves no unfinished file behind."""
        if self._descriptor is not None:
            shutil.rmtree(self.folder.temporary, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _prepare(self, path: Path) -> int | None:
        folder = self.folder
        descriptor: int | None = None
        try:
            folder.data.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(folder)
            self._clear()
        except (OSError, OutputError) as error:
            if descriptor is not None:
                os.close(descriptor)
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"output.path {str(path)!r} cannot be written: {error.strerror or error}. Choose another output.path."
            ) from error
        return descriptor

    def _clear(self) -> None:
        folder = self.folder
        found = sorted(entry.name for entry in folder.data.iterdir() if not entry.name.startswith("."))
        if found:
            raise OutputError(
                f"output.path {str(folder.path)!r} already holds {len(found)} file(s) of a run (data/{found[0]}). "
                "Choose another output.path, or remove that folder to start over."
            )
        if folder.temporary.exists():
            shutil.rmtree(folder.temporary)
        folder.temporary.mkdir()
        for stale in (folder.success, folder.summary):
            stale.unlink(missing_ok=True)
        probe = folder.temporary / "probe"
        write_whole(self.files, probe, folder.temporary / "probed", b"written\n")
        (folder.temporary / "probed").unlink()
        self.files.sync_folder(folder.path)


def _lock(folder: OutputFolder) -> int:
    descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o644)
    # `tokabatch status` holds a shared lock for an instant, hence more than one attempt.
    for _ in range(_CLAIM_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            time.sleep(_CLAIM_PAUSE_SECONDS)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
    os.close(descriptor)
    raise OutputError(
        f"another run is writing to output.path {str(folder.path)!r}. Wait for it, stop it, or choose another output.path."
    )
