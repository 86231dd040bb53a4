"""Which files in an output folder no run wrote, so that none of the user's own is replaced or deleted.

A folder with the manifest of a run is the run's; what lies among its shards is told apart by the record of commits
(`inspection.py`). Elsewhere a run may have been stopped before it wrote its manifest, or the manifest is lost: its other files
are recognised by their content. They are written atomically, so a crash leaves none of them torn.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from tokabatch.errors import OutputError
from tokabatch.number_text import counted
from tokabatch.output.folder import OutputFolder
from tokabatch.output.journal import Record, begins_record
from tokabatch.output.plain_json import to_document
from tokabatch.storage.listing import ListedFile, consistently, is_there, list_files, list_names, read_bytes, unreadable
from tokabatch.storage.parquet_file import ParquetFile

RUN_KEY = b"tokabatch.run"
"""Key of a shard's metadata: its run."""
_KEY_TYPES = {"row_index": pa.int64(), "status": pa.string()}
"""Columns of every shard, also of versions that did not name the run."""
_STEPS, _DIGESTS = frozenset({"seconds", "running"}), frozenset({"content", "prompt"})
_SHOWN = 5
_REPOSITORIES, _PROJECTS = (".git", ".hg", ".svn"), ("pyproject.toml", "setup.py", "setup.cfg")
_MODEL_CONFIG, _TOKENIZER = "config.json", ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""Files that tell a folder's other use, which a folder of results is kept apart from."""
_MOST_BYTES = 4 << 20
"""No run writes larger JSON, except `_SUCCESS`, which names every shard."""


def refuse_foreign(folder: OutputFolder, *, overwrite: bool = False) -> None:
    """Raise OutputError if the folder holds files that no run wrote: in data/ or, without the manifest of a run, under any name
    that a run writes or removes; or if a folder without a run is a model's, a repository or a Python project. With `overwrite`,
    which deletes the files of a run, nothing else may be among its shards either."""
    try:
        foreign = consistently(lambda: _foreign(folder, overwrite), folder.path)
    except OSError as error:
        raise unreadable(folder.path, error) from error
    if not foreign and (kind := _other_use(folder)):
        raise OutputError(
            f"output.path {str(folder.path)!r} holds {kind}, and a run would write its Parquet files beside it; name a folder "
            f"that is empty or new, such as {folder.path / 'run'}"
        )
    if foreign:
        names = ", ".join(foreign[:_SHOWN]) + ", …" * (len(foreign) > _SHOWN)
        number, them = counted(len(foreign), "file"), "it" if len(foreign) == 1 else "them"
        raise OutputError(
            f"output.path {str(folder.path)!r} holds {number} that no run wrote ({names}), where a run's own would be. "
            f"Choose another output.path, or move {them} away."
        )


def _other_use(folder: OutputFolder) -> str:
    """Return what a folder without the manifest of a run holds, where that is a model, a repository or a Python project; else
    nothing. Raises OutputError if it cannot be read."""
    there = folder.files.look(folder.path)
    if there is None or not stat.S_ISDIR(there.st_mode) or has_manifest(folder):
        return ""
    names = list_names(folder.files, folder.path)
    # One for the results alone has nothing beside it yet.
    is_empty = all(name.startswith(".") for name in names)
    if (repository := next((name for name in _REPOSITORIES if name in names), None)) and not is_empty:
        return f"a repository ({repository})"
    if project := next((name for name in _PROJECTS if name in names), None):
        return f"a Python project ({project})"
    weights = next((name for name in sorted(names) if name.endswith(_WEIGHTS)), None)
    if _MODEL_CONFIG in names and (weights or any(name in names for name in _TOKENIZER)):
        return f"a model ({_MODEL_CONFIG}, {weights or next(name for name in _TOKENIZER if name in names)})"
    return ""


def is_manifest(value: object) -> bool:
    """Return whether this JSON value may be the manifest of a run, be it of another version or damaged."""
    return _has_keys(value, "fingerprint") or _has_keys(value, "working_folder")


def _foreign(folder: OutputFolder, overwrite: bool) -> list[str]:
    there = folder.files.look(folder.path)
    if there is None or not stat.S_ISDIR(there.st_mode):
        return []
    found = [f"{folder.data.name}/{name}" for name in folder.foreign()]
    has_run = has_manifest(folder)
    if not has_run:
        small = (folder.manifest, folder.commits, folder.job, folder.row_digests, folder.summary, folder.success, folder.lock)
        names = {path.name for path in small}
        mine = (*list_files(folder.files, folder.path, names.__contains__), *folder.steps())
        found += [file.path.name for file in mine if not (file.is_file and _is_ours(folder, file))]
        found += [path.name for path in (folder.temporaries, folder.input, folder.units) if _is_foreign_folder(folder, path)]
    if overwrite or not has_run:
        record = cache(folder.record)
        found += [folder.name_of(file.path) for file in folder.shards() if not _is_shard(folder, file, has_run, record)]
    return found


def has_manifest(folder: OutputFolder) -> bool:
    """Return whether the folder has the manifest of a run, be it damaged."""
    found = folder.files.look(folder.manifest)
    if found is None or not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
        return False
    try:
        return is_manifest(json.loads(read_bytes(folder.files, folder.manifest) or b""))
    except (ValueError, RecursionError):
        return _has_record(folder)


def _has_record(folder: OutputFolder) -> bool:
    return is_there(folder.files, folder.units) or begins_record(folder.files, folder.commits)


def _is_ours(folder: OutputFolder, file: ListedFile) -> bool:
    """Return whether a run wrote this file, which has the name of one beside the shards."""
    path = file.path
    if path == folder.lock:
        return not file.bytes
    if path == folder.commits:
        return begins_record(folder.files, path)
    if path.suffix == ".parquet":
        columns = _schema(file)
        return columns is not None and (_DIGESTS if path == folder.row_digests else _STEPS) <= set(columns.names)
    if file.bytes > _MOST_BYTES and path != folder.success:
        return False
    content = read_bytes(folder.files, path) or b""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return False
    if path == folder.manifest:
        # Another process has published it since it was looked for.
        return is_manifest(value)
    if path == folder.job:
        # A user's own job file has the same keys. A run begins its record before it writes this one.
        return _has_keys(value, "model", "input") and content == to_document(value) and _has_record(folder)
    return _has_keys(value, *(("exit_code", "samples") if path == folder.summary else ("samples", "ok", "files")))


def _is_foreign_folder(folder: OutputFolder, path: Path) -> bool:
    """Return whether a run would empty this folder although none made it: a run has left its lock before."""
    found = folder.files.look(path)
    if found is None or is_there(folder.files, folder.lock):
        return found is not None and not stat.S_ISDIR(found.st_mode)
    return not stat.S_ISDIR(found.st_mode) or bool(folder.files.names(path))


def _is_shard(folder: OutputFolder, file: ListedFile, has_run: bool, read: Callable[[], Record | None]) -> bool:
    """Return whether this file, which has a shard's name, is one, be it damaged; `read` returns the record of commits."""
    columns = _schema(file) if file.is_file else None
    if columns is not None:
        types = [(field.name, field.type) for field in columns if field.name in _KEY_TYPES]
        return RUN_KEY in (columns.metadata or {}) or (len(types) == len(_KEY_TYPES) and dict(types) == _KEY_TYPES)
    record = read()
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
