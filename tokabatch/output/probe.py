"""Check that an output folder can take what a run writes: `check_output` looks and leaves nothing behind; `probe` writes a file
the way shards are written."""

from __future__ import annotations

import errno
import os
import shlex
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from tokabatch.errors import OutputError
from tokabatch.number_text import counted
from tokabatch.output.folder import OutputFolder
from tokabatch.output.foreign_files import refuse_foreign
from tokabatch.output.lock import busy, is_claimed
from tokabatch.storage.atomic_files import NewFile, publish
from tokabatch.storage.write_errors import reason

PROBE = ".probe"
"""In data/ for an instant at the start of a run, one of several writers adds its name; readers of Parquet folders skip names
that begin with a dot."""
_PROBE_BYTES = 1 << 16
"""Smaller than almost any shard: under a smaller limit on file sizes no run can work."""


def check_output(path: Path, *, shared: bool = False, overwrite: bool = False) -> None:
    """Raise the OutputError that claiming this folder now would raise; leave nothing behind. With `shared`, others may be
    writing there; with `overwrite`, its run is to be deleted."""
    folder = OutputFolder(path)
    if not shared and is_claimed(folder):
        raise busy(folder)
    refuse_foreign(folder, overwrite=overwrite)
    try:
        refuse_file_name(folder)
        # A dangling link is in the way, too.
        seen = ((place, folder.files.look(place, follow=False)) for place in (folder.data, path, *path.absolute().parents))
        nearest = next(place for place, found in seen if found is not None)
        found = folder.files.look(nearest)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise _unwritable(path, f"{nearest} is not a folder")
    for place in (nearest, path) if nearest == folder.data else (nearest,):
        if not os.access(place, os.W_OK | os.X_OK):
            read_only = os.statvfs(place).f_flag & os.ST_RDONLY
            where = place.absolute()
            raise _unwritable(
                path, f"{where} is on a read-only file system" if read_only else f"no permission to write in {where}"
            )
    if nearest not in (folder.data, path):
        try:
            # Some places take no folder from anyone, whatever the permissions say: /proc, the root of a network file system.
            os.rmdir(tempfile.mkdtemp(prefix=".tokabatch-", dir=nearest))
        except OSError as error:
            raise _unwritable(path, f"no folder can be created in {nearest} ({error.strerror})") from error


def refuse_file_name(folder: OutputFolder) -> None:
    """Raise OutputError if a new output folder has the name of a file. Raises OSError if it cannot be looked for."""
    path = folder.path
    if path.suffix in (".jsonl", ".json", ".csv", ".parquet") and folder.files.look(path) is None:
        plain = path.with_suffix("")
        file = path.with_suffix(".jsonl") if path.suffix == ".json" else path
        export = f"tokabatch export {shlex.quote(str(plain))} --to {shlex.quote(str(file))}"
        raise OutputError(
            f"output.path {str(path)!r} is the name of a file, and the output is a folder of Parquet files; name a folder, "
            f"such as {plain}. `{export}` then writes one file"
        )


def describe_others(folder: OutputFolder) -> tuple[str, ...]:
    """Return a note if the folder of a new run holds files that are no run's."""
    others = folder.others()
    if not others:
        return ()
    shown = ", ".join(others[:3]) + ", …" * (len(others) > 3)
    number = counted(len(others), "other file or folder", "other files and folders")
    return (
        f"output.path {str(folder.path)!r} already holds {number} ({shown}), and those of the run are written between them; to "
        f"keep them apart, name a folder that is empty or new, such as {folder.path / 'run'}",
    )


def probe(folder: OutputFolder) -> None:
    """Write a file and commit it the way shards are committed: what can never work fails before anything is computed. A
    complete run is left alone until there is something to add."""
    written, published = folder.temporary / "probe", folder.data / PROBE
    if not folder.files.alone:
        published = folder.data / f"{PROBE}-{folder.temporary.name}"
    # Left behind by a start that was killed here.
    with suppress(FileNotFoundError):
        folder.files.remove(published)
    for attempt in range(1 if folder.files.alone else 2):
        with NewFile(folder.files, written) as file:
            file.write(bytes(_PROBE_BYTES))
            file.sync()
        try:
            publish(folder.files, written, published)
        except FileExistsError:
            if not attempt:
                raise
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or folder.files.alone:
                raise
            raise OutputError(
                f"output.path {str(folder.path)!r} cannot be shared: {reason(error)}, which keep several writers "
                "from publishing a sample twice. Choose a folder on another file system."
            ) from error
        else:
            if attempt:
                raise OutputError(
                    f"output.path {str(folder.path)!r} cannot be shared: a hard link there replaces an existing "
                    "file. Choose a folder on another file system."
                )
    # The last writer of another host may have cleared it.
    with suppress(FileNotFoundError):
        folder.files.remove(published)


def _unwritable(path: Path, reason: str) -> OutputError:
    return OutputError(f"output.path {str(path)!r} cannot be written: {reason}. Choose another output.path.")
