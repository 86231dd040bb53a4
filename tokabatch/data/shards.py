"""Committing completions: tables in, whole Parquet files out.

A shard is written under `_tmp/`, flushed, fsynced, published under its final name without overwriting, and its folder
fsynced; only then does the writer forget its rows. So a reader, a crash included, meets whole shards only, and a commit
that failed can be tried again. Every page carries a checksum. The writer knows the table's schema, not its meaning,
except that `status` tells ok from error rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokabatch.data.durable import publish
from tokabatch.data.folder import Claim
from tokabatch.errors import OutputError

ARROW_BYTES_KEY = b"tokabatch.arrow_bytes"
"""Footer key: the size of the shard in memory, which its encoded size does not tell."""
_ROW_GROUP_BYTES = 32 << 20
_SHARD_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """One committed file. `name` is relative to the output folder; rows = ok + errors; `bytes` on disk."""

    name: str
    rows: int
    ok: int
    errors: int
    bytes: int


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._claim = claim
        self._schema = schema
        self._rows_per_shard = rows_per_shard
        self._flush_seconds = flush_seconds
        self._clock = clock
        self._buffer: list[pa.Table] = []
        self._buffered_rows = 0
        self._buffered_bytes = 0
        self._oldest = 0.0
        self._shards: list[Shard] = []

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What is committed so far."""
        return tuple(self._shards)

    @property
    def buffered_rows(self) -> int:
        """Rows that a crash would lose now."""
        return self._buffered_rows

    def add(self, table: pa.Table) -> None:
        """Take over the rows of `table`; commits what is due. Raises OSError where the disk fails, the rows kept."""
        assert table.schema.equals(self._schema), "a table of another schema"
        if table.num_rows:
            if not self._buffer:
                self._oldest = self._clock()
            self._buffer.append(table)
            self._buffered_rows += table.num_rows
            self._buffered_bytes += table.nbytes
        while self._buffered_rows >= self._rows_per_shard:
            self._commit(self._rows_per_shard)
        if self._buffered_bytes >= _SHARD_BYTES:
            self.commit()
        self.tick()

    def tick(self) -> None:
        """Commit if the oldest buffered row has waited long enough."""
        if self._buffer and self._clock() - self._oldest >= self._flush_seconds:
            self.commit()

    def commit(self) -> None:
        """Commit everything buffered; nothing happens when there is none."""
        while self._buffered_rows:
            self._commit(min(self._rows_per_shard, self._buffered_rows))

    def close(self) -> tuple[Shard, ...]:
        """Commit the rest and return all shards."""
        self.commit()
        return self.shards

    def _commit(self, num_rows: int) -> None:
        rows = pa.concat_tables(self._buffer)
        self._shards.append(self._write(rows.slice(0, num_rows), len(self._shards)))
        rest = rows.slice(num_rows)
        self._buffer = [rest] if rest.num_rows else []
        self._buffered_rows = rest.num_rows
        self._buffered_bytes = rest.nbytes
        self._oldest = self._clock()

    def _write(self, table: pa.Table, number: int) -> Shard:
        folder, files = self._claim.folder, self._claim.files
        final = folder.data / f"part-{number:05d}.parquet"
        temporary = folder.temporary / final.name
        try:
            with files.create(temporary) as file:
                write_parquet(table, file)
                files.sync(file)
                size = file.tell()
            publish(files, temporary, final)
        except FileExistsError as error:
            raise OutputError(
                f"{final} exists already: something else writes to this folder. Choose another output.path."
            ) from error
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        ok = count_ok(table)
        name = final.relative_to(folder.path).as_posix()
        return Shard(name, table.num_rows, ok, table.num_rows - ok, size)


def write_parquet(table: pa.Table, file: object) -> None:
    """Write one shard into an open binary file."""
    size = table.nbytes
    metadata = {**(table.schema.metadata or {}), ARROW_BYTES_KEY: str(size).encode()}
    rows_per_group = max(1, min(table.num_rows, _ROW_GROUP_BYTES * table.num_rows // max(size, 1)))
    pq.write_table(
        table.replace_schema_metadata(metadata),
        file,
        compression="zstd",
        write_page_checksum=True,
        row_group_size=rows_per_group,
    )


def count_ok(table: pa.Table) -> int:
    """Rows of `table` that are samples, not errors."""
    return int(pc.call_function("sum", [pc.call_function("equal", [table["status"], "ok"])]).as_py() or 0)


def open_shard(path: Path) -> pq.ParquetFile:
    """A shard to read, its checksums verified. Raises OutputError naming it where it is no whole Parquet file."""
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> OutputError:
    """The error for a shard that cannot be read."""
    return OutputError(f"{path} is damaged ({error}). Restore it from a copy, or remove the output folder and run again.")
