"""Committing completions: tables in, whole Parquet files out.

A shard is written under `_tmp/`, flushed, fsynced, recorded in the journal, published under its final name without overwriting,
and its folder fsynced; only then does the writer forget its rows. So a reader, a crash included, meets whole shards only, and
a commit that an exception cut short, wherever it did, can be tried again: it neither loses nor repeats a row. Every page has a
checksum, every file the name of its run. The writer knows the table's schema, not its meaning, except that `status` tells ok
from error rows.
"""

from __future__ import annotations

import errno
import io
import shlex
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokabatch.arrays import Int32, Int64
from tokabatch.errors import DamageError, ForeignFileError, OutputError
from tokabatch.output.folder import Claim
from tokabatch.output.journal import Shard
from tokabatch.output.schema import CANCELLED
from tokabatch.storage.atomic_files import NewFile, publish
from tokabatch.storage.listing import NO_MARK, ListedFile, Mark, mark_of
from tokabatch.storage.parquet_file import ParquetFile

ARROW_BYTES_KEY = b"tokabatch.arrow_bytes"
"""Footer key: the size of the shard in memory, which its encoded size does not tell."""
PARQUET_OPTIONS: Mapping[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""How every shard is written. Without page checksums most flipped bits would go unseen."""
_KEY_TYPES = {"row_index": pa.int64(), "status": pa.string()}
"""Columns without which a file is no shard."""
_ROW_GROUP_BYTES = 32 << 20
EARLY_ROWS = 4096
"""Where at least so many rows are buffered, and no more are still to come, little is to be left to write after the last."""
SHARD_BYTES = 512 << 20
"""Of rows in memory: a shard that holds as many is committed, however few rows they are."""


@dataclass(frozen=True, slots=True)
class _Books:
    """Of one unit: what is committed and what waits; `number` is that of the next shard."""

    number: int
    lacks: int | None = None
    """Samples that the unit needs beside those that are committed; None where that is not known."""
    there: frozenset[int] = frozenset()
    """Numbers that others' shards had when the unit was opened."""
    shards: tuple[Shard, ...] = ()
    waiting: tuple[pa.Table, ...] = ()
    oldest: float = 0.0
    attempt: tuple[Shard, Mark] | None = None
    """The shard being published, and the mark of its file."""
    lost: bool = False
    """Another has published a shard: the unit is that one's."""

    @property
    def num_rows(self) -> int:
        return sum(table.num_rows for table in self.waiting)

    @property
    def num_bytes(self) -> int:
        return sum(table.nbytes for table in self.waiting)

    def committed(self, shard: Shard, now: float) -> _Books:
        """The shard's rows moved from those that wait to those that are committed."""
        rest = pa.concat_tables(self.waiting).slice(shard.rows)
        lacks = None if self.lacks is None else self.lacks - shard.rows
        number = next_number(self.there, self.number + 1)
        return _Books(number, lacks, self.there, (*self.shards, shard), (rest,) if rest.num_rows else (), now)


@dataclass(frozen=True, slots=True)
class _State:
    """Replaced in one assignment, so that it is true wherever an exception strikes. `taken` counts the rows taken over."""

    taken: int
    units: Mapping[int, _Books]

    def with_books(self, unit: int, books: _Books) -> _State:
        return replace(self, units={**self.units, unit: books})


WHOLE = -1
"""The one unit of a writer that has the folder to itself; its shards are `part-00000` and so on."""


class ShardWriter:
    """Buffers tables of one schema and commits them as numbered shards, in the order they came.

    A shard is committed when `rows_per_shard` rows are buffered (fewer, once so many made a file too large for the system),
    when the oldest of them has waited `flush_seconds` (`is_due`), when they take 512 MB of memory, or when little is still to
    come (`nears_end`). Time is looked at in `add`, `is_due` and `tick` only. Owns its files under `_tmp/`.

    One of several writers is told by `unit_of` which unit each row is of, by the columns row_index and sample_index. It `open`s
    units, writes shards for each of them apart, and drops the rows of a unit in which another publishes first (see
    output/folder.py), and those of units that are not open.
    """

    def __init__(
        self,
        claim: Claim,
        schema: pa.Schema,
        *,
        rows_per_shard: int,
        flush_seconds: float,
        earlier: Sequence[Shard] = (),
        unit_of: Callable[[Int64, Int64], Int32] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`earlier` shards stand in the folder already."""
        self._claim = claim
        self._schema = schema
        self._rows_per_shard = rows_per_shard
        self._flush_seconds = flush_seconds
        self._unit_of = unit_of
        self._clock = clock
        self._earlier = tuple(earlier)
        first = _Books(max((shard_number(shard.name) + 1 for shard in earlier), default=0))
        self._state = _State(sum(shard.rows for shard in earlier), {} if unit_of else {WHOLE: first})

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What is committed so far, earlier shards included."""
        return (*self._earlier, *(shard for books in self._state.units.values() for shard in books.shards))

    @property
    def num_rows(self) -> int:
        """Rows taken over so far, those of earlier shards and those that were dropped included: true wherever an exception
        strikes."""
        return self._state.taken

    def open(self, unit: int, there: Collection[int], lacks: int) -> None:
        """Take rows of this unit from now on. Shards of these numbers are `there`, and have been read; so many samples are in
        none."""
        self._state = self._state.with_books(unit, _Books(next_number(there), lacks, frozenset(there)))

    def is_complete(self, unit: int) -> bool:
        """Whether all samples of a unit that was opened are committed."""
        return self._state.units[unit].lacks == 0

    def is_lost(self, unit: int) -> bool:
        """Whether another writer has published a shard of a unit that was opened here."""
        return self._state.units[unit].lost

    @property
    def num_waiting(self) -> int:
        """Of these, the rows that are not committed."""
        return sum(books.num_rows for books in self._state.units.values())

    def add(self, table: pa.Table) -> None:
        """Take over the rows of `table`; commits what is due. Raises OSError where the disk fails, the rows kept."""
        self.take(table)
        self.commit_due()

    def take(self, table: pa.Table) -> None:
        """Take over the rows of `table`; they are kept from here on."""
        assert table.schema.equals(self._schema), "a table of another schema"
        if not table.num_rows:
            return
        units = dict(self._state.units)
        for unit, part in self._parts(table):
            books = units.get(unit)
            if books is not None and not books.lost:
                oldest = books.oldest if books.waiting else self._clock()
                units[unit] = replace(books, waiting=(*books.waiting, part), oldest=oldest)
        self._state = _State(self._state.taken + table.num_rows, units)

    def _parts(self, table: pa.Table) -> list[tuple[int, pa.Table]]:
        """The rows of each unit."""
        if self._unit_of is None:
            return [(WHOLE, table)]
        unit = self._unit_of(table["row_index"].to_numpy(), table["sample_index"].to_numpy())
        return [(number, table.filter(pa.array(unit == number))) for number in np.unique(unit).tolist()]

    def mend(self, mended: Callable[[pa.Table], pa.Table]) -> None:
        """Replace the buffered tables by what `mended` makes of each, with as many rows. For where they cannot be written."""
        if not any([self._settle(unit) for unit in self._state.units]):
            units = {
                unit: replace(books, waiting=tuple(mended(table) for table in books.waiting))
                for unit, books in self._state.units.items()
            }
            self._state = replace(self._state, units=units)

    def commit_due(self) -> None:
        """Commit full shards, what completes a unit, and what has waited long enough. Raises OSError where the disk fails, the
        rows kept."""
        for unit in self._state.units:
            while self._state.units[unit].num_rows >= self._rows_per_shard:
                self._commit(unit, self._rows_per_shard)
            books = self._state.units[unit]
            if books.lacks is not None and books.num_rows and books.num_rows == books.lacks:
                self._commit_all(unit)
        if sum(books.num_bytes for books in self._state.units.values()) >= SHARD_BYTES:
            self.commit()
        self.tick()

    def is_due(self, oldest: float) -> bool:
        """Whether rows that came in at `oldest`, by the writer's clock, have waited long enough to be committed."""
        return self._clock() - oldest >= self._flush_seconds

    def tick(self) -> None:
        """Commit what has waited long enough."""
        for unit, books in self._state.units.items():
            if books.waiting and self.is_due(books.oldest):
                self._commit_all(unit)

    def nears_end(self, to_come: int) -> bool:
        """Whether much is buffered, and no more rows are `to_come`, so that it is to be committed now."""
        return self.num_waiting >= max(EARLY_ROWS, to_come)

    def commit(self) -> None:
        """Commit everything buffered; nothing happens when there is none."""
        for unit in self._state.units:
            self._commit_all(unit)

    def close(self) -> tuple[Shard, ...]:
        """Commit the rest and return all shards."""
        self.commit()
        return self.shards

    def _commit_all(self, unit: int) -> None:
        while waiting := self._state.units[unit].num_rows:
            self._commit(unit, min(self._rows_per_shard, waiting))

    def _commit(self, unit: int, num_rows: int) -> None:
        """Commit the first `num_rows` rows, or book the shard that an exception kept from being booked. The folder is looked at
        behind the commit: what is finished is on the disk when the run learns that it cannot go on."""
        self._claim.check_lock()
        if not self._settle(unit):
            self._publish(unit, num_rows)
        self._claim.check_folder(sparingly=True)

    def _publish(self, unit: int, num_rows: int) -> None:
        folder, files, books = self._claim.folder, self._claim.files, self._state.units[unit]
        of_unit = "" if unit == WHOLE else f"{unit:05d}-"
        final = folder.data / f"part-{of_unit}{books.number:05d}.parquet"
        temporary = folder.temporary / final.name
        try:
            table = pa.concat_tables(books.waiting).slice(0, num_rows)
            shard, written = write_shard(self._claim, table, temporary, folder.name_of(final))
        except OSError as error:
            with suppress(OSError):
                files.remove(temporary)
            if error.errno != errno.EFBIG or num_rows == 1:
                raise
            # More than a file may hold here (`ulimit -f`): smaller ones take the same rows.
            self._rows_per_shard = num_rows // 2
            return
        try:
            if self._claim.journal is not None:
                self._claim.journal.begins(shard)
            self._state = self._state.with_books(unit, replace(books, attempt=(shard, written)))
            publish(files, temporary, final)
        except FileExistsError as error:
            if unit != WHOLE:
                self._state = self._state.with_books(unit, _Books(books.number, books.lacks, shards=books.shards, lost=True))
                with suppress(OSError):
                    files.remove(temporary)
                return
            raise OutputError(
                f"{final} exists already: something else writes to this folder. Choose another output.path."
            ) from error
        except OSError:
            with suppress(OSError):
                files.remove(temporary)
            raise
        self._book(unit, shard, written)

    def _book(self, unit: int, shard: Shard, written: Mark) -> None:
        """The shard stands under its name."""
        record_commit(self._claim, shard, written)
        self._state = self._state.with_books(unit, self._state.units[unit].committed(shard, self._clock()))

    def _settle(self, unit: int) -> bool:
        """Whether a shard had its final name already when an exception struck; it is booked now."""
        books = self._state.units[unit]
        if books.attempt is None:
            return False
        shard, written = books.attempt
        final = self._claim.folder.path / shard.name
        found = self._claim.files.look(final)
        # Another's file may have the number of an inode that was given back here; it was not written at the same instant.
        if found is not None and mark_of(found)[:-1] == written[:-1]:
            self._claim.files.sync_folder(final.parent)
            self._book(unit, shard, written)
            return True
        self._state = self._state.with_books(unit, replace(books, attempt=None))
        return False


def write_shard(claim: Claim, table: pa.Table, temporary: Path, name: str) -> tuple[Shard, Mark]:
    """The finished, synced shard that is to be called `name`, under its temporary name; and the mark of its file. Raises
    OSError."""
    with NewFile(claim.files, temporary) as file:
        write_parquet(table, file, claim.identity)
        file.sync()
        size, digest, written = file.tell(), file.digest, mark_of(file.status)
    ok, cancelled = count_ok(table), count_cancelled(table)
    return Shard(name, table.num_rows, ok, table.num_rows - ok - cancelled, size, digest, cancelled), written


def record_commit(claim: Claim, shard: Shard, written: Mark) -> None:
    """Note in the journal that the shard stands under its name; `written` is the mark that its file had when it was finished. A
    file that was touched since is read when the folder is looked at next. Raises OSError."""
    if claim.journal is not None:
        found = claim.files.look(claim.folder.path / shard.name)
        # The names of a file count into the time of its last change, which comes last.
        same = found is not None and mark_of(found)[:-1] == written[:-1]
        claim.journal.done(shard.name, shard, mark_of(found) if found is not None and same else NO_MARK)


def write_parquet(table: pa.Table, file: BinaryIO, identity: Mapping[bytes, bytes] = MappingProxyType({})) -> None:
    """Write one shard into an open file; `identity` tells in its metadata which run it is of."""
    size = table.nbytes
    metadata = {**(table.schema.metadata or {}), **identity, ARROW_BYTES_KEY: str(size).encode()}
    rows_per_group = max(1, min(table.num_rows, _ROW_GROUP_BYTES * table.num_rows // max(size, 1)))
    with pq.ParquetWriter(file, table.schema.with_metadata(metadata), **PARQUET_OPTIONS) as writer:
        writer.write_table(table.replace_schema_metadata(metadata), row_group_size=rows_per_group)


def refuse_unwritable(schema: pa.Schema) -> None:
    """Raises OutputError where a column could be computed, but not written and read back as what it is."""
    nullable = [field for field in schema if field.nullable]
    if _fault_of(nullable) is None:
        return
    for field in nullable:
        if fault := _fault_of([field]):
            raise OutputError(
                f"the column {field.name!r} has the type {field.type}, which Parquet does not hold with pyarrow "
                f"{pa.__version__}: {fault}. Cast it in the input, or leave it out with output.columns=[...]."
            )


def _fault_of(fields: Sequence[pa.Field[Any]]) -> str | None:
    """Why a row of nulls would not come back; None where it does."""
    file = io.BytesIO()
    try:
        row = pa.Table.from_arrays([pa.nulls(2, field.type) for field in fields], schema=pa.schema(fields))
        write_parquet(row.take(pa.array([1])), file)
        found = ParquetFile(file).read().schema
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        return str(error)
    changed = [kept.type for kept, field in zip(found, fields, strict=True) if not kept.type.equals(field.type)]
    return f"it would be read back as {changed[0]}" if changed else None


def count_ok(table: pa.Table) -> int:
    """Rows of `table` that are finished samples."""
    return _count(table, "ok")


def count_cancelled(table: pa.Table) -> int:
    """Rows of `table` that their rows stopped before."""
    return _count(table, CANCELLED)


def _count(table: pa.Table, status: str) -> int:
    return int(pc.call_function("sum", [pc.call_function("equal", [table["status"], status])]).as_py() or 0)


def shard_number(name: str) -> int:
    """12 of `data/part-00012.parquet`; of a unit's shard, its number within the unit."""
    return int(name.rpartition("-")[2].partition(".")[0])


def next_number(there: Collection[int], first: int = 0) -> int:
    """The first number, from `first` on, that is not among those that are there."""
    return next(number for number in count(first) if number not in there)


@contextmanager
def open_shard(shard: ListedFile) -> Generator[ParquetFile]:
    """A shard to read, its checksums verified. Raises OutputError naming it where it cannot be read, DamageError where it is no
    whole Parquet file, ForeignFileError for a folder, and Changed where it is not the one that was listed."""
    if not shard.is_file:
        raise ForeignFileError(f"{shard.path} is no file: no run wrote it. Move it away, then run the same command again.")
    try:
        with shard.open() as file, ParquetFile(file, page_checksum_verification=True) as parquet:
            yield parquet
    except (OSError, pa.ArrowException) as error:
        raise damaged(shard.path, error) from error


def damaged(path: Path, error: Exception) -> DamageError:
    """The error for a shard that is not as it was written."""
    out = shlex.quote(str(path.parent.parent))
    return DamageError(
        f"{path} is damaged ({error}). `tokabatch check {out}` reads every file and names the command that recomputes "
        "what is lost."
    )


def read_groups(
    shard: ListedFile, columns: Sequence[str] | None, check: Callable[[pa.Schema], None] = lambda found: None
) -> Iterator[pa.Table]:
    """The row groups of a shard, one at a time, without the columns that it does not have. Raises as `open_shard` does, what
    `check` raises for the shard's schema, and ForeignFileError where it has not the columns that say which sample a row is."""
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
