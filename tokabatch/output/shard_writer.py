"""Committing completions: tables in, whole Parquet files out.

A shard is written under `_tmp/`, flushed, fsynced, recorded in the journal, published under its final name without overwriting,
and its folder fsynced; only then does the writer forget its rows. Readers, also after a crash, see whole shards only, and a
commit interrupted by an exception, at any point, can be tried again without losing or repeating a row.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import pyarrow as pa

from tokabatch.arrays import Int32, Int64
from tokabatch.errors import OutputError
from tokabatch.output.claim import Claim
from tokabatch.output.journal import Shard
from tokabatch.output.shard_names import shard_name, shard_number
from tokabatch.output.shards import record_commit, write_shard
from tokabatch.storage.atomic_files import publish
from tokabatch.storage.listing import Mark, mark_of

EARLY_ROWS = 4096
"""With at least this many rows buffered, and no more still to come, commit, so that little is left to write after the last
row."""
SHARD_BYTES = 512 << 20
"""Buffered rows of this size in memory are committed, however few they are."""


@dataclass(frozen=True, slots=True)
class _Books:
    """What is committed and what is buffered of one unit; `number` is that of the next shard."""

    number: int
    lacks: int | None = None
    """Samples that the unit still needs besides those that are committed; None if that is not known."""
    there: frozenset[int] = frozenset()
    """Numbers of other writers' shards when the unit was opened."""
    shards: tuple[Shard, ...] = ()
    waiting: tuple[pa.Table, ...] = ()
    oldest: float = 0.0
    attempt: tuple[Shard, Mark] | None = None
    """The shard being published, and the mark of its file."""
    lost: bool = False
    """Whether another writer has published a shard, and so owns the unit."""

    @property
    def num_rows(self) -> int:
        return sum(table.num_rows for table in self.waiting)

    @property
    def num_bytes(self) -> int:
        return sum(table.nbytes for table in self.waiting)

    def committed(self, shard: Shard, now: float) -> _Books:
        """Move the shard's rows from the buffered to the committed ones."""
        rest = pa.concat_tables(self.waiting).slice(shard.rows)
        lacks = None if self.lacks is None else self.lacks - shard.rows
        number = next_number(self.there, self.number + 1)
        return _Books(number, lacks, self.there, (*self.shards, shard), (rest,) if rest.num_rows else (), now)


@dataclass(frozen=True, slots=True)
class _State:
    """Replaced in one assignment, so that it is consistent wherever an exception strikes. `taken` counts the rows taken
    over."""

    taken: int
    units: Mapping[int, _Books]

    def with_books(self, unit: int, books: _Books) -> _State:
        return replace(self, units={**self.units, unit: books})


WHOLE = -1
"""The only unit of a writer that has the folder to itself; its shards are `part-00000` and so on."""


class ShardWriter:
    """Buffers tables of one schema and commits them as numbered shards, in the order they came.

    A shard is committed when `rows_per_shard` rows are buffered (fewer, once that many made a file too large for the system),
    when the oldest of them has waited `flush_seconds` (`is_due`), when they take 512 MB of memory, or when few rows are still
    to come (`nears_end`). No thread of its own: a shard is committed in the call that finds it due. Owns its files under
    `_tmp/`.

    With several writers, `unit_of` gives each row's unit from the columns row_index and sample_index. A writer `open`s units
    and writes each into shards of its own; it drops the rows of a unit in which another writer publishes first (see
    output/claim.py) and of units that are not open.
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
        """`earlier` are the shards in the folder."""
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
        """Rows taken over so far, including those of earlier shards and those that were dropped; consistent wherever an
        exception strikes."""
        return self._state.taken

    def open(self, unit: int, there: Collection[int], lacks: int) -> None:
        """Take rows of this unit from now on. `there` are the numbers of its shards, which have been read; `lacks` samples are
        in none."""
        self._state = self._state.with_books(unit, _Books(next_number(there), lacks, frozenset(there)))

    def is_complete(self, unit: int) -> bool:
        """Return whether all samples of a unit that was opened are committed."""
        return self._state.units[unit].lacks == 0

    def is_lost(self, unit: int) -> bool:
        """Return whether another writer has published a shard of a unit that was opened here."""
        return self._state.units[unit].lost

    def take(self, table: pa.Table) -> None:
        """Take over the rows of `table`, which are kept from here on."""
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
        """Return the rows of each unit."""
        if self._unit_of is None:
            return [(WHOLE, table)]
        unit = self._unit_of(table["row_index"].to_numpy(), table["sample_index"].to_numpy())
        return [(number, table.filter(pa.array(unit == number))) for number in np.unique(unit).tolist()]

    def mend(self, mended: Callable[[pa.Table], pa.Table]) -> None:
        """Replace each buffered table, which could not be written, by `mended(table)`, with as many rows."""
        if not any([self._settle(unit) for unit in self._state.units]):
            units = {
                unit: replace(books, waiting=tuple(mended(table) for table in books.waiting))
                for unit, books in self._state.units.items()
            }
            self._state = replace(self._state, units=units)

    def commit_due(self) -> None:
        """Commit full shards, what completes a unit, and what has waited long enough. Raises OSError if the disk fails; the
        rows are kept."""
        for unit in self._state.units:
            while self._state.units[unit].num_rows >= self._rows_per_shard:
                self._commit(unit, self._rows_per_shard)
            books = self._state.units[unit]
            if books.lacks is not None and books.num_rows and books.num_rows == books.lacks:
                self._commit_all(unit)
        if sum(books.num_bytes for books in self._state.units.values()) >= SHARD_BYTES:
            self.commit()
        for unit, books in self._state.units.items():
            if books.waiting and self.is_due(books.oldest):
                self._commit_all(unit)

    def is_due(self, oldest: float) -> bool:
        """Return whether rows that arrived at `oldest`, by the writer's clock, have waited long enough to be committed."""
        return self._clock() - oldest >= self._flush_seconds

    def nears_end(self, to_come: int) -> bool:
        """Return whether many rows are buffered, and no more than that are still `to_come`, so that they should be committed
        now."""
        return sum(books.num_rows for books in self._state.units.values()) >= max(EARLY_ROWS, to_come)

    def commit(self) -> None:
        """Commit everything buffered, if anything is."""
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
        """Commit the first `num_rows` rows, or record the shard that an exception kept from being recorded. The folder is
        checked after the commit: what is finished is on disk when the run finds that it cannot continue."""
        self._claim.check_lock()
        if not self._settle(unit):
            self._publish(unit, num_rows)
        self._claim.check_folder(sparingly=True)

    def _publish(self, unit: int, num_rows: int) -> None:
        folder, files, books = self._claim.folder, self._claim.files, self._state.units[unit]
        final = folder.data / shard_name(books.number, None if unit == WHOLE else unit)
        temporary = folder.temporary / final.name
        try:
            table = pa.concat_tables(books.waiting).slice(0, num_rows)
            shard, written = write_shard(self._claim, table, temporary, folder.name_of(final))
        except OSError as error:
            with suppress(OSError):
                files.remove(temporary)
            if error.errno != errno.EFBIG or num_rows == 1:
                raise
            # Beyond the limit on file sizes (`ulimit -f`): smaller files take the same rows.
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
        """Record a shard that has its final name."""
        record_commit(self._claim, shard, written)
        self._state = self._state.with_books(unit, self._state.units[unit].committed(shard, self._clock()))

    def _settle(self, unit: int) -> bool:
        """Return whether a shard had its final name already when an exception struck; record it now."""
        books = self._state.units[unit]
        if books.attempt is None:
            return False
        shard, written = books.attempt
        final = self._claim.folder.path / shard.name
        found = self._claim.files.look(final)
        # A file of another process may have reused an inode number; it was not written at the same instant.
        if found is not None and mark_of(found)[:-1] == written[:-1]:
            self._claim.files.sync_folder(final.parent)
            self._book(unit, shard, written)
            return True
        self._state = self._state.with_books(unit, replace(books, attempt=None))
        return False


def next_number(there: Collection[int], first: int = 0) -> int:
    """Return the first number, from `first` on, that is not in `there`."""
    return next(number for number in count(first) if number not in there)
