"""Compare an output folder with what was committed there: the journal of commits, and `_SUCCESS`.

Every byte is read: sizes and times prove nothing. A digest is never taken from what is there now, except for the shards of a
version without a record: those count as committed if all their pages match their checksums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from tokabatch.cores import usable_cores
from tokabatch.errors import DamageError, ForeignFileError
from tokabatch.number_text import counted
from tokabatch.output.folder import OutputFolder
from tokabatch.output.foreign_files import RUN_KEY
from tokabatch.output.journal import Record, Shard
from tokabatch.output.manifest import Manifest, Success, read_success
from tokabatch.output.shards import count_cancelled, count_ok, damaged, open_shard, read_groups
from tokabatch.storage.listing import Changed, ListedFile, Mark, is_there

_THREADS = 8
Kind = Literal["damaged", "missing", "unrecorded", "foreign", "record"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one file of the folder. `damaged` and `missing` shards were committed; an `unrecorded` one is of this
    run, but its digest is on no record; a `foreign` file is not of this run; `record` is a fault of the journal or of
    `_SUCCESS`."""

    file: str
    problem: str
    kind: Kind = "damaged"


@dataclass(frozen=True, slots=True)
class Inspection:
    """`good` are the shards that are as they were committed, `unrecorded` those of this run without a record. `sealed`:
    `_SUCCESS` says that the run is complete, and names exactly the good ones."""

    good: tuple[tuple[Shard, ListedFile], ...]
    unrecorded: tuple[ListedFile, ...]
    faults: tuple[Fault, ...]
    success: Success | None
    run: str
    """The run that the journal names; empty without a journal."""
    damaged: tuple[Shard, ...]
    """The shards that exist, but not as they were committed."""

    @property
    def to_repair(self) -> tuple[str, ...]:
        """The shards whose samples have to be computed again."""
        damaged = [fault.file for fault in self.faults if fault.kind in ("damaged", "missing")]
        return (*damaged, *(f"{file.path.parent.name}/{file.path.name}" for file in self.unrecorded))

    @property
    def marked(self) -> list[tuple[Shard, Mark]]:
        """The good shards with their marks, as the record of commits takes them."""
        return [(shard, file.mark) for shard, file in self.good]

    @property
    def sealed(self) -> bool:
        return self.success is not None and not self.faults and {shard for shard, _ in self.good} == set(self.success.files)


def inspect(folder: OutputFolder, manifest: Manifest) -> Inspection:
    """Read every shard of the run with this manifest. Raises OutputError for what cannot be read, Changed if a shard is
    replaced meanwhile."""
    before = folder.record()
    listed = folder.shards()
    # A file is recorded before it is published, so a file in this listing is in the record, which is read after it.
    record = folder.record()
    success, faults = None, list[Fault]()
    try:
        success = read_success(folder)
    except DamageError:
        faults.append(Fault(folder.success.name, "is damaged", "record"))
    versions, problems = _believed(folder, manifest, record, success)
    faults += problems
    good: list[tuple[Shard, ListedFile]] = []
    unrecorded: list[ListedFile] = []
    changed: list[Shard] = []
    named = {folder.name_of(file.path): file for file in listed}
    for (name, file), digest in zip(named.items(), _digests(list(named.values())), strict=True):
        known = [each for each in versions.get(name, ()) if each is not None]
        found = next((each for each in known if each.sha256 == digest), None)
        if found is not None:
            good.append((found, file))
        elif known:
            faults.append(Fault(name, _difference(file, manifest, known[-1], digest)))
            changed.append(known[-1])
        elif (problem := _stranger(file, manifest)) is not None:
            faults.append(Fault(name, problem, "foreign"))
        elif manifest.run or versions:
            unrecorded.append(file)
        else:
            shard, fault = _believe(file, name, digest)
            good += [(shard, file)] if shard is not None else []
            faults += [fault] if fault is not None else []
    required = _required(versions, before) if record and not problems else [n for n in versions if None not in versions[n]]
    faults += [Fault(name, "is missing", "missing") for name in required if name not in named]
    run = "" if record is None else record.run
    return Inspection(tuple(good), tuple(unrecorded), tuple(faults), success, run, tuple(changed))


def recorded_shards(folder: OutputFolder, manifest: Manifest | None) -> tuple[ListedFile, ...]:
    """List the shards by number, for readers that do not read everything. If the run keeps a record of commits, raises
    ForeignFileError for a file of another run, DamageError for one that is missing, of another size or in no record."""
    before = folder.record()
    listed = folder.shards()
    record = folder.record() if manifest is not None and manifest.run else None
    if record is None and listed and manifest is not None and manifest.run and not is_there(folder.files, folder.success):
        raise damaged(listed[0].path, ValueError("there is no record of commits"))
    if record is None or record.problem is not None:
        return listed
    for shard in listed:
        known = [each for each in record.versions.get(folder.name_of(shard.path), ()) if each is not None]
        if not known and before is not None and any(before.versions.get(folder.name_of(shard.path), ())):
            # It was joined with others meanwhile.
            raise Changed(shard.path)
        if not known and manifest is not None and (problem := _stranger(shard, manifest)) is not None:
            raise ForeignFileError(f"{shard.path} {problem}. Move it away, then try again.")
        if not known:
            raise damaged(shard.path, ValueError("it is in no record of commits"))
        if shard.bytes not in [each.bytes for each in known]:
            raise damaged(
                shard.path,
                ValueError(f"it has {counted(shard.bytes, 'byte')}; {counted(known[-1].bytes, 'was', 'were')} committed"),
            )
    names = {folder.name_of(shard.path) for shard in listed}
    missing = [name for name in _required(record.versions, before) if name not in names]
    if missing:
        raise damaged(folder.path / missing[0], ValueError("it is missing"))
    return listed


def _required(versions: Mapping[str, tuple[Shard | None, ...]], before: Record | None) -> list[str]:
    """Return the files that must exist; what was recorded while the folder was listed need not be in the listing."""
    earlier = {} if before is None else before.versions
    return [name for name, known in versions.items() if None not in (*known, *earlier.get(name, (None,)))]


def _believed(
    folder: OutputFolder, manifest: Manifest, record: Record | None, success: Success | None
) -> tuple[Mapping[str, tuple[Shard | None, ...]], list[Fault]]:
    """Return the states that the record, or `_SUCCESS` if that is the only one, allows for each file, and what is wrong with
    the record."""
    name = folder.commits.name
    marked = {} if success is None else {shard.name: (shard,) for shard in success.files}
    if record is None:
        # Without shards, the run may not have begun.
        lost = bool(manifest.run) and bool(marked or folder.shards())
        return marked, [Fault(name, "is missing", "record")] if lost else []
    if manifest.run and record.run not in ("", manifest.run):
        return marked, [Fault(name, "belongs to another run than manifest.json", "record")]
    if record.problem is not None:
        return {**record.versions, **marked}, [Fault(name, f"is damaged: {record.problem}", "record")]
    if record.torn and success is not None:
        return {**record.versions, **marked}, [Fault(name, "is damaged: its last line is not whole", "record")]
    return record.versions, []


def _digests(files: Sequence[ListedFile]) -> list[str]:
    """Digest the files in threads: hashing releases the interpreter's lock, and reading waits for the disk."""
    threads = min(_THREADS, usable_cores() + 1, max(1, len(files)))
    with ThreadPoolExecutor(threads) as pool:
        try:
            return list(pool.map(lambda file: file.digest() if file.is_file else "", files))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _difference(file: ListedFile, manifest: Manifest, committed: Shard, digest: str) -> str:
    other = _stranger(file, manifest)
    if other is not None and "belongs to another run" in other:
        return f"is damaged: it {other}"
    if file.bytes != committed.bytes:
        return f"is damaged: it has {counted(file.bytes, 'byte')}; {counted(committed.bytes, 'was', 'were')} committed"
    return f"is damaged: it has the digest {digest}; {committed.sha256} was committed"


def _stranger(file: ListedFile, manifest: Manifest) -> str | None:
    """Return why a file that no record names is not of this run; None if it is."""
    if not file.is_file:
        return "is not a file"
    try:
        with open_shard(file) as parquet:
            metadata = parquet.schema_arrow.metadata or {}
    except DamageError:
        # A run without a record may have lost it to damage.
        return "is not a readable Parquet file" if manifest.run else None
    run = metadata.get(RUN_KEY, b"").decode(errors="replace")
    if run:
        mine = {key: value for key, value in manifest.identity.items() if metadata.get(key) == value}
        return None if len(mine) == len(manifest.identity) else f"belongs to another run ({run[:12]})"
    return "was not written by this run" if manifest.run else None


def _believe(file: ListedFile, name: str, digest: str) -> tuple[Shard | None, Fault | None]:
    """Accept a shard of a version without a record, of a run that is not complete."""
    rows = ok = cancelled = 0
    try:
        for table in read_groups(file, None):
            table.validate(full=True)
            rows, ok, cancelled = rows + table.num_rows, ok + count_ok(table), cancelled + count_cancelled(table)
    except DamageError as error:
        return None, Fault(name, str(error))
    except pa.ArrowException as error:
        return None, Fault(name, str(damaged(file.path, error)))
    except ForeignFileError:
        return None, Fault(name, "was not written by a run", "foreign")
    return Shard(name, rows, ok, rows - ok - cancelled, file.bytes, digest, cancelled), None
