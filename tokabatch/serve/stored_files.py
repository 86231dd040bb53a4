"""The files of the API's /v1/files, in one folder: `file-ID.jsonl`, and beside each `file-ID.json`, which describes it.

A file exists once its record does. The folder belongs to one server at a time, which reads the records when it starts; files
that a crash left without a record are removed then.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from tokabatch.errors import UsageError
from tokabatch.storage.atomic_files import DurableFiles, make_folders, write_whole
from tokabatch.storage.write_errors import reason

_ID = re.compile(r"(file|batch)-[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file; `created_at` is in seconds since 1970."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str

    def body(self) -> dict[str, Any]:
        """The API's object."""
        return {**asdict(self), "object": "file", "status": "processed", "expires_at": None}


def new_id(kind: str) -> str:
    """For a file or a batch."""
    return f"{kind}-{uuid.uuid4().hex[:24]}"


class StoredFiles:
    """Raises OSError where the folder cannot be written; UsageError where another server has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = DurableFiles()
        try:
            make_folders(self._files, folder)
            # Held until this process ends.
            self._lock = self._files.open_lock(folder / "lock")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"server.files: another server uses {folder}; name another folder") from None
        except OSError as error:
            raise UsageError(
                f"server.files: {folder} cannot be used: {reason(error)}; name another folder, or write null for none"
            ) from error
        listed = self._files.names(folder)
        for name in listed:
            stem, _, suffix = name.partition(".")
            # The folder may hold files of others.
            is_half = suffix == "upload" or (suffix == "jsonl" and stem.startswith("file-") and f"{stem}.json" not in listed)
            if is_half and _ID.fullmatch(stem):
                (folder / name).unlink(missing_ok=True)
        known = {field.name for field in fields(StoredFile)}
        kept = (StoredFile(**each) for each in self.records("file") if each.keys() == known)
        self._known = {file.id: file for file in sorted(kept, key=lambda file: (file.created_at, file.id))}

    def path(self, name: str, suffix: str = ".jsonl") -> Path:
        """Where what belongs to an id lies."""
        return self.folder / f"{name}{suffix}"

    def put(self, name: str, filename: str, purpose: str, content: Path) -> StoredFile:
        """Keep what lies at `content`, in this folder, which is moved; a file of that id is replaced."""
        with content.open("rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        self._files.replace(content, self.path(name))
        stored = StoredFile(name, size, int(time.time()), filename, purpose)
        self.write_record(name, asdict(stored))
        self._known[name] = stored
        return stored

    def get(self, name: str) -> StoredFile | None:
        """None where there is no such file."""
        return self._known.get(name)

    def all(self) -> list[StoredFile]:
        """The newest one last."""
        return list(self._known.values())

    def delete(self, name: str) -> None:
        """Its record first."""
        for suffix in (".json", ".jsonl"):
            self.path(name, suffix).unlink(missing_ok=True)
        self._known.pop(name, None)
        self._files.sync_folder(self.folder)

    def records(self, kind: str) -> Iterator[dict[str, Any]]:
        """All of files or of batches that can be read."""
        for name in self._files.names(self.folder):
            stem = name.removesuffix(".json")
            if stem != name and _ID.fullmatch(stem) and stem.startswith(kind):
                record: Any = None
                with suppress(ValueError):
                    record = json.loads(self.path(stem, ".json").read_bytes())
                if isinstance(record, dict):
                    yield cast("dict[str, Any]", record)

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Replace it: a crash leaves the old or the new."""
        content = json.dumps(record, ensure_ascii=False, indent=1).encode()
        write_whole(self._files, self.path(name, ".json.partial"), self.path(name, ".json"), content)
