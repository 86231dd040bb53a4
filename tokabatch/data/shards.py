"""Committing completions: tables in, whole Parquet files out.

A shard is written under `_tmp/`, flushed, fsynced, published under its final name without overwriting, and its folder
fsynced; only then does the writer forget its rows. So a reader, a crash included, meets whole shards only, and a commit
that an exception cut short, wherever it did, can be tried again: it neither loses nor repeats a row. Every page carries
a checksum. The writer knows the table's schema, not its meaning, except that `status` tells ok from error rows.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokabatch.data.durable import NewFile, publish
from tokabatch.data.folder import Claim
from tokabatch.errors import OutputError

ARROW_BYTES_KEY = b"tokabatch.arrow_bytes"
"""Footer key: the size of the shard in memory, which its encoded size does not tell."""
PARQUET_OPTIONS: Mapping[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""How every shard is written. Without page checksums most flipped bits would go unseen."""
_ROW_GROUP_BYTES = 32 << 20
_SHARD_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """One committed file. `name` is relative to the output folder; rows = ok + errors; `bytes` on disk; `sha256` of the file,
    None where it was not written by this process."""

    name: str
    rows: int
    ok: int
    errors: int
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class _Books:
    """What is committed and what waits. Replaced in one assignment, so that they are true wherever an exception strikes."""

    shards: tuple[Shard, ...] = ()
    waiting: tuple[pa.Table, ...] = ()
    oldest: float = 0.0
    attempt: tuple[Shard, int] | None = None
    """The shard being published, and the inode by which its file is known."""

    @property
    def num_rows(self) -> int:
        return sum(table.num_rows for table in self.waiting)

    @property
    def num_bytes(self) -> int:
        return sum(table.nbytes for table in self.waiting)

    def committed(self, shard: Shard, now: float) -> _Books:
        """The shard's rows moved from those that wait to those that are committed."""
        rest = pa.concat_tables(self.waiting).slice(shard.rows)
        return _Books((*self.shards, shard), (rest,) if rest.num_rows else (), now)


class ShardWriter:
    """Buffers tables of one schema and commits them as numbered shards, in the order they came.

    A shard is committed when `rows_per_shard` rows are buffered, when the oldest of them has waited `flush_seconds`, or
    when they take 512 MB of memory. Time is looked at in `add` and `tick` only. Owns its files under `_tmp/`.
    """

    def __init__(
        self,
        claim: Claim,
        schema: pa.Schema,
        *,
        rows_per_shard: int,
        flush_seconds: float,
        earlier: Sequence[Shard] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`earlier` shards stand in the folder already."""
        self._claim = claim
        self._schema = schema
        self._rows_per_shard = rows_per_shard
        self._flush_seconds = flush_seconds
        self._clock = clock
        self._books = _Books(tuple(earlier))
        self._first_number = max((shard_number(shard.name) + 1 for shard in earlier), default=0) - len(earlier)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What is committed so far, earlier shards included."""
        return self._books.shards

    def add(self, table: pa.Table) -> None:
        """Take over the rows of `table`; commits what is due. Raises OSError where the disk fails, the rows kept."""
        assert table.schema.equals(self._schema), "a table of another schema"
        books = self._books
        if table.num_rows:
            oldest = books.oldest if books.waiting else self._clock()
            self._books = replace(books, waiting=(*books.waiting, table), oldest=oldest)
        while self._books.num_rows >= self._rows_per_shard:
            self._commit(self._rows_per_shard)
        if self._books.num_bytes >= _SHARD_BYTES:
            self.commit()
        self.tick()

    def tick(self) -> None:
        """Commit if the oldest buffered row has waited long enough."""
        if self._books.waiting and self._clock() - self._books.oldest >= self._flush_seconds:
            self.commit()

    def commit(self) -> None:
        """Commit everything buffered; nothing happens when there is none."""
        while waiting := self._books.num_rows:
            self._commit(min(self._rows_per_shard, waiting))

    def close(self) -> tuple[Shard, ...]:
        """Commit the rest and return all shards."""
        self.commit()
        return self.shards

    def _commit(self, num_rows: int) -> None:
        """Commit the first `num_rows` rows, or book the shard that an exception kept from being booked."""
        if self._settle():
            return
        folder, files, books = self._claim.folder, self._claim.files, self._books
        final = folder.data / f"part-{self._first_number + len(books.shards):05d}.parquet"
        temporary = folder.temporary / final.name
        try:
            shard, inode = self._write(pa.concat_tables(books.waiting).slice(0, num_rows), temporary, final)
            self._books = replace(books, attempt=(shard, inode))
            publish(files, temporary, final)
        except FileExistsError as error:
            raise OutputError(
                f"{final} exists already: something else writes to this folder. Choose another output.path."
            ) from error
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self._books = books.committed(shard, self._clock())

    def _settle(self) -> bool:
        """Whether a shard had its final name already when an exception struck; it is booked now."""
        if self._books.attempt is None:
            return False
        shard, inode = self._books.attempt
        final = self._claim.folder.path / shard.name
        if final.exists() and final.stat().st_ino == inode:
            self._claim.files.sync_folder(final.parent)
            self._books = self._books.committed(shard, self._clock())
            return True
        self._books = replace(self._books, attempt=None)
        return False

    def _write(self, table: pa.Table, temporary: Path, final: Path) -> tuple[Shard, int]:
        """The finished, synced shard under its temporary name, and its inode."""
        with NewFile(self._claim.files, temporary) as file:
            write_parquet(table, file)
            file.sync()
            size, inode, digest = file.tell(), file.inode, file.digest
        ok = count_ok(table)
        name = final.relative_to(self._claim.folder.path).as_posix()
        return Shard(name, table.num_rows, ok, table.num_rows - ok, size, digest), inode


def write_parquet(table: pa.Table, file: BinaryIO) -> None:
    """Write one shard into an open file."""
    size = table.nbytes
    metadata = {**(table.schema.metadata or {}), ARROW_BYTES_KEY: str(size).encode()}
    rows_per_group = max(1, min(table.num_rows, _ROW_GROUP_BYTES * table.num_rows // max(size, 1)))
    with pq.ParquetWriter(file, table.schema.with_metadata(metadata), **PARQUET_OPTIONS) as writer:
        writer.write_table(table.replace_schema_metadata(metadata), row_group_size=rows_per_group)


def count_ok(table: pa.Table) -> int:
    """Rows of `table` that are samples, not errors."""
    return int(pc.call_function("sum", [pc.call_function("equal", [table["status"], "ok"])]).as_py() or 0)


def shard_number(name: str) -> int:
    """12 of `data/part-00012.parquet`."""
    return int(name.rpartition("-")[2].partition(".")[0])


def open_shard(path: Path) -> pq.ParquetFile:
    """A shard to read, its checksums verified. Raises OutputError naming it where it is no whole Parquet file."""
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> OutputError:
    """The error for a shard that cannot be read."""
    out = shlex.quote(str(path.parent.parent))
    return OutputError(
        f"{path} is damaged ({error}). `tokabatch verify {out}` reads every file and names the command that recomputes "
        "what is lost."
    )


def read_groups(path: Path, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    """The row groups of a shard, one at a time, without the columns that it does not have. Raises OutputError."""
    with open_shard(path) as file:
        present = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            try:
                yield file.read_row_group(group, columns=present)
            except (OSError, pa.ArrowException) as error:
                raise damaged(path, error) from error
