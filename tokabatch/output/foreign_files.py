"""Which files in an output folder no run wrote, so that none of the user's own is replaced or deleted.

A folder with the manifest of a run is the run's; what lies among its shards is told apart by the record of commits
(`inspection.py`). Elsewhere a run may have been stopped before it wrote its manifest, or the manifest is lost: its other files
are recognised by their content. They are written atomically, so a crash leaves none of them torn.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from tokabatch.errors import OutputError
from tokabatch.output.folder import OutputFolder
from tokabatch.output.journal import read_record
from tokabatch.storage.listing import ListedFile, consistently, is_there, list_files, read_bytes, unreadable
from tokabatch.storage.parquet_file import ParquetFile

RUN_KEY = b"tokabatch.run"
"""Key of a shard's metadata: its run."""
_KEY_TYPES = {"row_index": pa.int64(), "status": pa.string()}
"""Columns of every shard, also of versions that did not name the run."""
_STEPS, _DIGESTS = frozenset({"seconds", "running"}), frozenset({"content", "prompt"})
_SHOWN = 5


def refuse_foreign(folder: OutputFolder, *, overwrite: bool = False) -> None:
    """Raise OutputError if the folder holds files that no run wrote: in data/ or, without the manifest of a run, under any name
    that a run writes or removes. With `overwrite`, which deletes the files of a run, nothing else may be among its shards
    either."""
    try:
        foreign = consistently(lambda: _foreign(folder, overwrite), folder.path)
    except OSError as error:
        raise unreadable(folder.path, error) from error
    if foreign:
        names = ", ".join(foreign[:_SHOWN]) + ", …" * (len(foreign) > _SHOWN)
        raise OutputError(
            f"output.path {str(folder.path)!r} holds {len(foreign)} file(s) that no run wrote ({names}), where a run's "
            "own would be. Choose another output.path, or move them away."
        )


def is_manifest(value: object) -> bool:
    """Return whether this JSON value may be the manifest of a run, be it of another version or damaged."""
    return _has_keys(value, "fingerprint") or _has_keys(value, "working_folder")


def _foreign(folder: OutputFolder, overwrite: bool) -> list[str]:
    there = folder.files.look(folder.path)
    if there is None or not stat.S_ISDIR(there.st_mode):
        return []
    found = [f"{folder.data.name}/{name}" for name in folder.foreign()]
    has_run = _has_manifest(folder)
    if not has_run:
        listed = {file.path: file for file in list_files(folder.files, folder.path)}
        small = (folder.manifest, folder.commits, folder.job, folder.row_digests, folder.summary, folder.success, folder.lock)
        mine = (*(listed[path] for path in small if path in listed), *folder.steps())
        found += [file.path.name for file in mine if not (file.is_file and _is_ours(folder, file))]
        found += [path.name for path in (folder.temporaries, folder.input, folder.units) if _is_foreign_folder(folder, path)]
    if overwrite or not has_run:
        found += [folder.name_of(file.path) for file in folder.shards() if not _is_shard(folder, file, has_run)]
    return found


def _has_manifest(folder: OutputFolder) -> bool:
    """Return whether the folder has the manifest of a run, be it damaged."""
    found = folder.files.look(folder.manifest)
    if found is None or not stat.S_ISREG(found.st_mode):
        return False
    content = read_bytes(folder.files, folder.manifest) or b""
    try:
        return is_manifest(json.loads(content))
    except ValueError:
        return _has_record(folder)


def _has_record(folder: OutputFolder) -> bool:
    return is_there(folder.files, folder.units) or bool((record := read_record(folder.files, folder.commits)) and record.run)


def _is_ours(folder: OutputFolder, file: ListedFile) -> bool:
    """Return whether a run wrote this file, which has the name of one beside the shards."""
    path = file.path
    if path == folder.lock:
        return not file.bytes
    if path == folder.commits:
        return bool((record := read_record(folder.files, path)) and record.run)
    if path.suffix == ".parquet":
        columns = _schema(file)
        return columns is not None and (_DIGESTS if path == folder.row_digests else _STEPS) <= set(columns.names)
    try:
        value = json.loads(read_bytes(folder.files, path) or b"")
    except ValueError:
        return False
    keys = {
        folder.job: ("model", "input"),
        folder.summary: ("exit_code", "samples"),
        folder.success: ("samples", "ok", "files"),
    }
    return path in keys and _has_keys(value, *keys[path])


def _is_foreign_folder(folder: OutputFolder, path: Path) -> bool:
    """Return whether a run would empty this folder although none made it: a run has left its lock before."""
    found = folder.files.look(path)
    if found is None or is_there(folder.files, folder.lock):
        return found is not None and not stat.S_ISDIR(found.st_mode)
    return not stat.S_ISDIR(found.st_mode) or bool(folder.files.names(path))


def _is_shard(folder: OutputFolder, file: ListedFile, has_run: bool) -> bool:
    """Return whether this file, which has a shard's name, is one, be it damaged."""
    columns = _schema(file) if file.is_file else None
    if columns is not None:
        return RUN_KEY in (columns.metadata or {}) or all(
            name in columns.names and columns.field(name).type == kind for name, kind in _KEY_TYPES.items()
        )
    record = folder.record()
    if record is None or record.problem is not None:
        return has_run
    return folder.name_of(file.path) in record.versions


def _schema(file: ListedFile) -> pa.Schema | None:
    """Return the schema of a Parquet file, None if it cannot be read as one."""
    try:
        with file.open() as stream, ParquetFile(stream) as parquet:
            return parquet.schema_arrow
    except OutputError:
        raise
    except (OSError, pa.ArrowException):
        return None


def _has_keys(value: object, *names: str) -> bool:
    return isinstance(value, dict) and cast("Mapping[str, Any]", value).keys() >= set(names)
