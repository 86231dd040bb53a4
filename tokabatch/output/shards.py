"""A shard: one Parquet file of finished samples, how it is written, recorded and read back.

Every page has a checksum; every file names its run in its metadata.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokabatch.errors import DamageError, ForeignFileError
from tokabatch.output.claim import Claim
from tokabatch.output.journal import Shard
from tokabatch.output.schema import CANCELLED, verdict_names
from tokabatch.output.shard_names import shard_number
from tokabatch.scheduling.contracts import NOT_JUDGED
from tokabatch.storage.atomic_files import NewFile
from tokabatch.storage.listing import NO_MARK, ListedFile, Mark, mark_of
from tokabatch.storage.parquet_file import ParquetFile

ARROW_BYTES_KEY = b"tokabatch.arrow_bytes"
"""Footer key: the size of the shard in memory, which does not follow from its encoded size."""
PARQUET_OPTIONS: Mapping[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""How every shard is written. Without page checksums most flipped bits would go unnoticed."""
_KEY_TYPES = {"row_index": pa.int64(), "status": pa.string()}
"""Columns that every shard has."""
_ROW_GROUP_BYTES = 32 << 20


def write_shard(claim: Claim, table: pa.Table, temporary: Path, name: str) -> tuple[Shard, Mark]:
    """Write and sync a shard that will be called `name`, under its temporary name; return it with the mark of its file. Raises
    OSError."""
    with NewFile(claim.files, temporary) as file:
        write_parquet(table, file, claim.identity)
        file.sync()
        size, digest, written = file.tell(), file.digest, mark_of(file.status)
    ok, cancelled = count_ok(table), count_cancelled(table)
    errors = table.num_rows - ok - cancelled
    return Shard(name, table.num_rows, ok, errors, size, digest, cancelled, count_unjudged(table)), written


def record_commit(claim: Claim, shard: Shard, written: Mark) -> None:
    """Record in the journal that the shard has its name; `written` is the mark of its finished file. A file that was touched
    since is read at the next check of the folder. Raises OSError."""
    if claim.journal is not None:
        found = claim.files.look(claim.folder.path / shard.name)
        # Renaming changes a file's ctime, the last element of a mark.
        same = found is not None and mark_of(found)[:-1] == written[:-1]
        claim.journal.done(shard.name, shard, mark_of(found) if found is not None and same else NO_MARK)


def write_parquet(table: pa.Table, file: BinaryIO, identity: Mapping[bytes, bytes] = MappingProxyType({})) -> None:
    """Write one shard into an open file; `identity` names its run in the metadata."""
    size = table.nbytes
    metadata = {**(table.schema.metadata or {}), **identity, ARROW_BYTES_KEY: str(size).encode()}
    rows_per_group = max(1, min(table.num_rows, _ROW_GROUP_BYTES * table.num_rows // max(size, 1)))
    with pq.ParquetWriter(file, table.schema.with_metadata(metadata), **PARQUET_OPTIONS) as writer:
        writer.write_table(table.replace_schema_metadata(metadata), row_group_size=rows_per_group)


def count_ok(table: pa.Table) -> int:
    """Count the rows of `table` that are finished samples."""
    return _count(table, "ok")


def count_cancelled(table: pa.Table) -> int:
    """Count the rows of `table` that were cancelled because their row stopped before them."""
    return _count(table, CANCELLED)


def count_unjudged(table: pa.Table) -> int:
    """Count the rows of `table` that are still to be judged."""
    return _count(table, NOT_JUDGED, "verify_error") if "verify_error" in verdict_names(table.schema) else 0


def count_without_verdict(table: pa.Table) -> int:
    """Count the finished samples of `table` that the judge could not judge, without those that are still to be judged; 0 if
    the job does not verify."""
    if "correct" not in (names := verdict_names(table.schema)):
        return 0
    lacks = pc.call_function("and", [pc.call_function("equal", [table["status"], "ok"]), table["correct"].is_null()])
    if "verify_error" in names:
        waits = pc.call_function("equal", [table["verify_error"], NOT_JUDGED]).fill_null(False)
        lacks = pc.call_function("and_not", [lacks, waits])
    return int(pc.call_function("sum", [lacks]).as_py() or 0)


def _count(table: pa.Table, value: str, column: str = "status") -> int:
    return int(pc.call_function("sum", [pc.call_function("equal", [table[column], value])]).as_py() or 0)


def in_order(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """Return the shards sorted by number, and those of one number by unit."""
    return tuple(sorted(shards, key=lambda shard: (shard_number(shard.name), shard.name)))


def claimed_shards(claim: Claim) -> tuple[Shard, ...]:
    """Return the shards in a folder whose commits are recorded, in order."""
    assert claim.journal is not None, "a run that writes has a journal"
    return in_order(shard for shard, _ in claim.journal.shards.values())


@contextmanager
def open_shard(shard: ListedFile) -> Generator[ParquetFile]:
    """Open a shard, verifying its checksums. Raises OutputError naming it if it cannot be read, DamageError if it is not a
    whole Parquet file, ForeignFileError for a folder, and Changed if it is not the file that was listed."""
    if not shard.is_file:
        raise ForeignFileError(
            f"{shard.path} is not a file, so no run wrote it. Move it away, then run the same command again."
        )
    try:
        with shard.open() as file, ParquetFile(file, page_checksum_verification=True) as parquet:
            yield parquet
    except (OSError, pa.ArrowException) as error:
        raise damaged(shard.path, error) from error


def damaged(path: Path, error: Exception) -> DamageError:
    """Return the error of a shard that is not as it was written."""
    out = shlex.quote(str(path.parent.parent))
    return DamageError(
        f"{path} is damaged ({error}). `tokabatch check {out}` reads every file and names the command that recomputes "
        "what is lost."
    )


def read_groups(
    shard: ListedFile, columns: Sequence[str] | None, check: Callable[[pa.Schema], None] = lambda found: None
) -> Iterator[pa.Table]:
    """Iterate over the row groups of a shard, one at a time, without the columns that it does not have. Raises as `open_shard`
    does, what `check` raises for the shard's schema, and ForeignFileError if it lacks the columns that identify samples."""
    with open_shard(shard) as file:
        found = file.schema_arrow  # Rebuilt at each access.
        check(found)
        for name in [name for name in columns or _KEY_TYPES if name in _KEY_TYPES]:
            if name not in found.names or found.field(name).type != _KEY_TYPES[name]:
                raise ForeignFileError(
                    f"{shard.path} was not written by a run: it has no column {name} of type {_KEY_TYPES[name]}. Move it away, "
                    "then run the same command again."
                )
        present = None if columns is None else [name for name in columns if name in found.names]
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=present)
