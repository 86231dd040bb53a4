"""What identifies a row in the output: the value of `input.id_column`, or the row number.

Ids are always strings: whole numbers, also of decimal and floating-point types, in decimal, UUIDs in hexadecimal with dashes.
They must be present and unique. Both are checked with an 8-byte digest for each row; where digests collide, the ids themselves
are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from hashlib import blake2b
from math import isnan
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa

from tokabatch.arrays import Int64
from tokabatch.errors import InputError, RowError
from tokabatch.input.kinds import kind_of
from tokabatch.input.missing import missing_field
from tokabatch.input.rows import NO_PLACES, Row, RowPlaces
from tokabatch.input.store.disk_arrays import ArraySpool, Texts, TextSpool

NULL = b"\xff"  # no UTF-8 text
LISTED = 10
_SHORT_BITS = {pa.float16(): 11, pa.float32(): 24}
_BITS = 53
"""From two to this power on, several whole numbers are the same float; in a column of a shorter type, as above."""


class IdSpool:
    """Collects the ids of `column`, of the type `kind` where the format has types; `of_requests` if messages should call them
    custom_ids."""

    def __init__(self, path: Path, column: str, of_requests: bool = False, kind: pa.DataType | None = None) -> None:
        self.column = column
        self._short_bits = _SHORT_BITS.get(kind) if kind is not None else None
        self._rounded: int | None = None
        """The first row with a short float that several whole numbers may have become."""
        self._of_requests = of_requests
        self._texts = TextSpool(path)
        self._checks = (path.with_suffix(".digests"), path.with_suffix(".rows"))
        self._digests = ArraySpool(self._checks[0], np.uint64)
        self._rows = ArraySpool(self._checks[1], np.int64)

    def append(self, rows: Sequence[Row]) -> dict[int, RowError]:
        """Keep the rows' ids; return the errors of rows without one, by row number."""
        ids = [row_id(row, self.column) for row in rows]
        if self._short_bits is not None and self._rounded is None:
            values = ((row.index, (row.columns or {}).get(self.column)) for row in rows)
            least = 2**self._short_bits
            self._rounded = next((index for index, value in values if value is not None and abs(value) >= least), None)
        texts = [NULL if isinstance(each, RowError) else each.encode() for each in ids]
        good = [(row.index, text) for row, text in zip(rows, texts, strict=True) if text != NULL]
        self._texts.append(texts)
        self._rows.append([index for index, _ in good])
        self._digests.append([int.from_bytes(blake2b(text, digest_size=8).digest(), "little") for _, text in good])
        return {row.index: each for row, each in zip(rows, ids, strict=True) if isinstance(each, RowError)}

    def describe(self, places: RowPlaces = NO_PLACES) -> tuple[str, ...]:
        """Return a note on ids that may have been rounded before they came into the column."""
        if self._rounded is None:
            return ()
        return (
            f"warning: input.id_column {self.column!r} holds short floating-point numbers, in which whole numbers are rounded "
            f"from 2^{self._short_bits} on, the first in {places.name(self._rounded)}; if ids were integers before, give those",
        )

    def finish(self, places: RowPlaces = NO_PLACES) -> Texts:
        """Return all ids. Raises InputError with the first ten that occur more than once."""
        texts = self._texts.finish()
        rows, digests = self._rows.finish(), self._digests.finish()
        order = np.argsort(digests, kind="stable")
        equal = digests[order][1:] == digests[order][:-1]
        suspects = np.unique(rows[order[np.flatnonzero(equal)[:, None] + np.arange(2)]]) if equal.any() else rows[:0]
        first: dict[bytes, int] = {}
        twice: list[str] = []
        for row in suspects.tolist():
            text = texts.get(row)
            if text in first and len(twice) < LISTED:
                twice.append(
                    f"{text.decode()!r} ({places.line(first[text])} and {places.line(row)})"
                    if places.begins
                    else f"{text.decode()!r} (rows {first[text]} and {row})"
                )
            first.setdefault(text, row)
        if twice:
            shown = ", ".join(twice) + (", …" if len(twice) == LISTED else "")
            if self._of_requests:
                raise InputError(f"each custom_id must be unique, but some occur twice: {shown}. Rename one of each pair.")
            raise InputError(
                f"input.id_column {self.column!r} must identify each row, but ids occur twice: {shown}. Remove input.id_column "
                "to number the rows instead."
            )
        for path in self._checks:
            path.unlink()
        return texts


def row_id(row: Row, column: str) -> str | RowError:
    """Return the id of one row, or an error; for a row that could not be parsed, its own."""
    if row.columns is None:
        return row.error or RowError("missing_field", "the row could not be read")
    value: Any = row.columns.get(column)
    if value is None:
        return row.error or _without_id(missing_field(column, row.columns))
    if isinstance(value, float) and isnan(value):
        return row.error or _without_id(RowError("missing_field", f"the column {column!r} is NaN in this row"))
    if isinstance(value, float) and value.is_integer():
        # As which pandas keeps whole numbers where one is missing.
        if abs(value) >= 2**_BITS:
            return RowError(
                "bad_type",
                f"the id in column {column!r} is the floating-point number {value}, which is not exact from 2^{_BITS} on; give "
                "ids as integers or text",
            )
        value = int(value)
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | UUID):
        return RowError("bad_type", f"the id in column {column!r} must be text or a whole number, not {kind_of(value)}")
    return str(value)


def _without_id(error: RowError) -> RowError:
    return RowError(error.code, f"{error.message}; give each row an id, or remove input.id_column to number the rows")


def read_ids(texts: Texts | None, rows: Int64) -> pa.Array[Any]:
    """Return the ids of the given rows: the row number without an id column, null where a row has no id."""
    if texts is None:
        return pa.array(rows).cast(pa.string())
    raw = [texts.get(row) for row in rows.tolist()]
    return pa.array([None if text == NULL else text.decode() for text in raw], type=pa.string())
