"""The interface of readers: rows in the order of the input, numbered from 0 over all files, faulty ones included.

A row that could not be read is a `Row` with an error, so that every record of the input is counted exactly once. Independent of
file formats.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

import pyarrow as pa

from tokabatch.errors import InputError, JobError, RowError

MAX_BATCH_ROWS = 1024
MAX_BATCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One record. `error` is why it has no prompt; `columns` is None if it could not even be parsed."""

    index: int
    columns: Mapping[str, Any] | None
    error: RowError | None = None
    prompt: Mapping[str, Any] | None = None
    """What its prompt is made of, if not `columns`."""

    @property
    def prompt_columns(self) -> Mapping[str, Any]:
        """The columns that its prompt and its settings come from."""
        return (self.columns or {}) if self.prompt is None else self.prompt


@dataclass(frozen=True, slots=True)
class RowBatch:
    """At most MAX_BATCH_ROWS consecutive rows, or fewer if they are large, with what is kept of them for the output.

    Either `texts` holds the JSON text of each row (empty if it could not be parsed), or `table` the rows in the reader's
    schema. A row's `columns` may hold fewer columns than that, never others.
    """

    rows: Sequence[Row]
    texts: Sequence[bytes] = ()
    table: pa.RecordBatch | None = None
    begins: Sequence[tuple[int, str, int]] = ()
    """In a format of lines, each row that does not directly follow the line of the row before: the row, its file's name in
    messages, and its line, from 1."""

    def head(self, count: int) -> RowBatch:
        """Return the first `count` rows."""
        if count >= len(self.rows):
            return self
        return RowBatch(
            self.rows[:count], self.texts[:count], None if self.table is None else self.table.slice(0, count), self.begins
        )


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Which line each row is on. `begins` holds the rows where a file begins, or after a line that is no row or several, as in
    `RowBatch`; empty for a format without lines."""

    begins: Sequence[tuple[int, str, int]] = ()

    def line(self, row: int) -> str:
        """Return `rows.jsonl line 6`, or nothing for a format without lines."""
        number = bisect_right(self.begins, row, key=itemgetter(0))
        if not number:
            return ""
        first, file, line = self.begins[number - 1]
        return f"{file} line {row - first + line}"

    def name(self, row: int) -> str:
        """Return `row 5 (rows.jsonl line 6)`, for messages."""
        line = self.line(row)
        return f"row {row} ({line})" if line else f"row {row}"


NO_PLACES = RowPlaces()


def no_rows(name: str) -> InputError:
    """Return the error of an input without any row."""
    return InputError(f"input.path {name!r} holds no rows; check the file")


def no_judged_row(place: str, fault: str) -> JobError:
    """Return the error of an input of which no row can be judged, the one at `place` because of `fault`."""
    return JobError(f"verify: no row can be judged, {place} because {fault}; correct verify or the rows, or leave verify out")


class Reader(Protocol):
    """A dataset that can be read from its beginning any number of times, in constant memory."""

    @property
    def name(self) -> str:
        """The name of this input in messages."""
        ...

    @property
    def schema(self) -> pa.Schema | None:
        """The columns and their Arrow types; None if they follow only from reading every row (JSON Lines)."""
        ...

    def batches(self, columns: Collection[str] | None = None) -> Iterator[RowBatch]:
        """Iterate over every row in order. `columns` names those that the caller reads from `Row.columns`; None is all."""
        ...
