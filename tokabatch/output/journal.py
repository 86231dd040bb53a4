"""OUT/commits.jsonl: which files were committed, with counts and digests. A start compares what it finds with this record.

A line is on the disk before its file gets its name, so every committed file has one; another line follows when the name is
durable. Until then a crash may leave the file in its earlier or its new state, and both are accepted. A start that changes the
folder rewrites the record; after that it only grows. Each line carries a checksum.

    {"run": ..., "version": 1}      first
    {"holds": FILE}                 committed before this start, or still there where a change was given up
    {"begins": FILE}                is about to be published, perhaps in place of an earlier one of its name
    {"removes": NAME}               is about to be taken away
    {"done": NAME}                  the last of these has happened

If several processes write, each has a journal of its own (OUT/_units/commits-WRITER.jsonl), which no other touches; `merged`
combines them. The next start that writes alone makes one journal of them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokabatch.errors import CommitError
from tokabatch.output.plain_json import to_json
from tokabatch.storage.atomic_files import DurableFiles, NewFile
from tokabatch.storage.listing import NO_MARK, Changed, ListedFile, Mark, mark_of, read_bytes, unreadable

VERSION = 1
_CHECK = b',"crc32":"'
_LONGEST_FIRST = 1 << 16


@dataclass(frozen=True, slots=True)
class Shard:
    """One committed file. `name` is relative to the output folder; rows = ok + errors + cancelled; `bytes` on disk; `sha256` of
    the file, None where only its rows were looked at. The verdicts of `unjudged` rows are still to come."""

    name: str
    rows: int
    ok: int
    errors: int
    bytes: int
    sha256: str | None = None
    cancelled: int = 0
    unjudged: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """What the journal of the run `run` says: the possible states of each file, with None among them if it may be missing.
    `problem` is what is wrong with the journal itself. `torn`: its last line is incomplete, as a crash may leave it."""

    run: str
    versions: Mapping[str, tuple[Shard | None, ...]]
    problem: str | None
    torn: bool


class Journal:
    """The record of a run that is being written. Its content is kept in memory, too: if others touch the file, it is
    rewritten."""

    def __init__(
        self,
        files: DurableFiles,
        path: Path,
        temporary: Path,
        run: str,
        shards: Iterable[tuple[Shard, Mark]],
        damaged: Iterable[Shard],
        whole: Path | None,
    ) -> None:
        """Replace the record at `path`: `shards` are in the folder, checked, with their marks; the `damaged` ones were
        committed, and are about to be removed. `whole` is the path at which a single writer merges this journal with others.
        Raises OSError."""
        self._files, self._path, self._temporary = files, path, temporary
        self._whole, self._whole_mark = whole, _mark(files, whole)
        self._shards = {shard.name: (shard, mark) for shard, mark in shards}
        self._told = set[str]()
        self._mark = NO_MARK
        held = [{"holds": asdict(shard)} for shard, _ in self._shards.values()]
        going = [line for shard in damaged for line in ({"holds": asdict(shard)}, {"removes": shard.name})]
        self._lines = [_line(fields) for fields in ({"run": run, "version": VERSION}, *held, *going)]
        self._file = self._write_anew()

    @property
    def shards(self) -> Mapping[str, tuple[Shard, Mark]]:
        """The files that must exist, with the mark that each had when its content was verified."""
        return self._shards

    def holds(self, shards: Iterable[Shard]) -> None:
        """Record that these are in the folder, whatever was about to happen to them. Raises OSError."""
        self._append(*({"holds": asdict(shard)} for shard in shards), sync=True)

    def begins(self, shard: Shard) -> None:
        """Record that `shard` is finished under a temporary name and about to be published. Raises OSError."""
        self._append({"begins": asdict(shard)}, sync=True)

    def removes(self, names: Iterable[str]) -> None:
        """Record that these are about to be removed. Raises OSError."""
        self._append(*({"removes": name} for name in names), sync=True)

    def done(self, name: str, shard: Shard | None = None, mark: Mark = NO_MARK) -> None:
        """Record that the file `name` is `shard` now, or gone if that is None. Not synced: until it is, both count. Raises
        OSError."""
        self._shards.pop(name, None)
        if shard is not None:
            self._shards[name] = (shard, mark)
        self._append({"done": name})

    def restore(self) -> None:
        """Rewrite the record where it is not the file that was written here. Raises OSError; CommitError where a single writer
        has made one of several: what this one says is in there, and may have been joined since."""
        found = self._files.look(self._path)
        if found is None and _mark(self._files, self._whole) != self._whole_mark:
            raise CommitError(
                f"{self._path} was removed while this run was writing, perhaps by a run without --shared. This "
                "run stops; what is committed is intact. Run the same command again to add what is missing."
            )
        if found is None or mark_of(found) != self._mark:
            self.close()
            self._file = self._write_anew()

    def compare(
        self, listed: Mapping[str, ListedFile], others: Callable[[], Record | None] = lambda: None
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """Return the committed files that are not as they were committed, with what is wrong, each reported once; and the names
        that are not in the record. Only files that were touched since their content was verified are read."""
        damage: list[tuple[str, str]] = []
        for name, (shard, mark) in list(self._shards.items()):
            file = listed.get(name)
            if file is not None and file.mark == mark:
                continue
            if file is not None:
                record = None if _has_content(file, shard) else others()
                known = [shard] if record is None else [each for each in record.versions.get(name, ()) if each is not None]
                now = next((each for each in known if _has_content(file, each)), None)
                if now is not None:
                    self._shards[name] = (now, file.mark)
                    continue
            del self._shards[name]
            self._told.add(name)
            damage.append((name, "is gone" if file is None else "is not what was committed any more"))
        return damage, [name for name in listed if name not in self._shards and name not in self._told]

    def _write_anew(self) -> NewFile:
        file = NewFile(self._files, self._temporary)
        try:
            file.write(b"".join(self._lines))
            file.sync()
            self._files.replace(self._temporary, self._path)
            self._files.sync_folder(self._path.parent)
            self._mark = mark_of(file.status)
        except BaseException:
            with suppress(OSError):
                file.close()
            raise
        return file

    def _append(self, *lines: Mapping[str, Any], sync: bool = False) -> None:
        """Append lines. If this fails, the record is rewritten the next time: after an fsync(2) that failed, a later one of the
        same file may succeed although the system has dropped what the first one was to write."""
        self.restore()
        added = [_line(fields) for fields in lines]
        try:
            self._file.write(b"".join(added))
            self._file.flush()
            if sync:
                self._file.sync()
            self._mark = mark_of(self._file.status)
        except BaseException:
            self._mark = NO_MARK
            raise
        self._lines += added

    def close(self) -> None:
        """Close the file. What could not be written stays unwritten: the lines before a commit are on disk already."""
        with suppress(OSError):
            self._file.close()


def begins_record(files: DurableFiles, path: Path) -> bool:
    """Return whether the first line of this file names a run, as that of a journal does. Raises OutputError if it cannot be
    read."""
    try:
        with files.open_old(path) as file:
            line = file.readline(_LONGEST_FIRST)
        return line.endswith(b"\n") and bool(_fields(line[:-1])["run"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error


def read_record(files: DurableFiles, path: Path) -> Record | None:
    """Read the journal; None if there is none. Raises OutputError if it cannot be read."""
    content = read_bytes(files, path)
    if content is None:
        return None
    versions: dict[str, tuple[Shard | None, ...]] = {}
    run, problem = "", None
    # What follows the last line break was not written whole.
    *lines, rest = content.split(b"\n")
    torn = bool(rest)
    for number, line in enumerate(lines, 1):
        try:
            fields = _fields(line)
            if number == 1:
                run = str(fields["run"])
                if fields["version"] != VERSION:
                    raise ValueError("written by another version")
            else:
                _apply(versions, fields)
        except (ValueError, KeyError, TypeError):
            torn = torn or number == len(lines) > 1
            if number < len(lines) or number == 1:
                problem = problem or f"line {number} is not as it was written"
    if not lines:
        problem = "it is empty"
    return Record(run, {name: known for name, known in versions.items() if known != (None,)}, problem, torn)


def merged(records: Iterable[Record | None]) -> Record | None:
    """Merge the journals of several writers. A file may be in any state that one of them allows; it may be missing if none says
    that it exists. A writer that lost a name to another one has only begun it."""
    known = [record for record in records if record is not None]
    if not known:
        return None
    known = [record for record in known if record.run == known[0].run]
    versions: dict[str, tuple[Shard | None, ...]] = {}
    for record in known:
        for name, these in record.versions.items():
            before = versions.get(name)
            absent = None in these and (before is None or None in before)
            shards = dict.fromkeys(shard for shard in (*(before or ()), *these) if shard is not None)
            versions[name] = (*((None,) if absent else ()), *shards)
    problem = next((record.problem for record in known if record.problem), None)
    return Record(known[0].run, versions, problem, known[0].torn)


def _apply(versions: dict[str, tuple[Shard | None, ...]], fields: Mapping[str, Any]) -> None:
    ((kind, value),) = fields.items()
    if kind in ("done", "removes"):
        before = versions.get(value, (None,))
        versions[value] = before[-1:] if kind == "done" else (*before, None)
        return
    shard = Shard(**value)
    versions[shard.name] = (shard,) if kind == "holds" else (*versions.get(shard.name, (None,)), shard)


def _mark(files: DurableFiles, path: Path | None) -> Mark:
    """Return the mark of a file, which is opened for that: NFS may answer from memory otherwise."""
    try:
        if path is not None:
            with files.open_old(path) as file:
                return mark_of(os.fstat(file.fileno()))
    except FileNotFoundError:
        pass
    return NO_MARK


def _has_content(file: ListedFile, shard: Shard) -> bool:
    try:
        return file.is_file and file.digest() == shard.sha256
    except Changed:
        return False


def _line(fields: Mapping[str, Any]) -> bytes:
    text = to_json(fields).encode()
    return text[:-1] + _CHECK + _sum(text) + b'"}\n'


def _fields(line: bytes) -> dict[str, Any]:
    """Parse a line. Raises ValueError if it is not as it was written."""
    text, found, check = line.rpartition(_CHECK)
    if not found or check != _sum(text + b"}") + b'"}':
        raise ValueError("checksum")
    fields: dict[str, Any] = json.loads(text + b"}")
    return fields


def _sum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()
