"""An Arrow batch as rows: the columns asked for become Python values, the batch itself stays the payload.

Binary values that are UTF-8 are texts in the rows: many writers store text so. A single Arrow value can be text that is not
UTF-8, and one that is asked for can be beyond what Python has (a date after the year 9999): faults of their rows. This module
knows no file format.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import numpy as np
import pyarrow as pa

from tokabatch.errors import RowError
from tokabatch.input.rows import Row, RowBatch


def rows_of(batch: pa.RecordBatch, columns: Collection[str] | None, first_index: int, place: str) -> RowBatch:
    """Rows numbered from `first_index`. `place` names the file in messages."""
    faults: dict[int, RowError] = {}
    valid = batch
    values: dict[str, list[Any]] = {}
    for position, name in enumerate(batch.schema.names):
        column = batch.column(position)
        broken = _broken_text(column)
        if broken:
            column = _without(column, broken)
            valid = valid.set_column(position, batch.schema.field(position), column)
        faults |= {row: _fault("bad_utf8", place, first_index + row, name, "invalid UTF-8") for row in broken}
        if columns is None or name in columns:
            values[name], beyond = _to_python(column)
            values[name] = _texts(values[name]) if _holds_binary(column.type) else values[name]
            faults |= {row: _fault("bad_type", place, first_index + row, name, why) for row, why in beyond.items()}
    rows = [
        Row(
            first_index + offset,
            {name: column[offset] for name, column in values.items()} if offset not in faults else None,
            faults.get(offset),
        )
        for offset in range(batch.num_rows)
    ]
    return RowBatch(rows, table=valid)


def _holds_binary(kind: pa.DataType) -> bool:
    """Whether values of a type have bytes in them, at any depth."""
    if pa.types.is_nested(kind):
        return any(_holds_binary(kind.field(number).type) for number in range(kind.num_fields))
    if isinstance(kind, pa.DictionaryType):
        return _holds_binary(kind.value_type)
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or (pa.types.is_binary_view(kind))
    )


def _texts(value: Any) -> Any:
    """The value with bytes that are UTF-8 as text, at any depth; others stay bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, list):
        return [_texts(item) for item in cast("list[Any]", value)]
    if isinstance(value, tuple):  # an entry of a map
        return tuple(_texts(item) for item in cast("tuple[Any, ...]", value))
    if isinstance(value, dict):
        return {key: _texts(item) for key, item in cast("dict[str, Any]", value).items()}
    return value


def _broken_text(column: pa.Array[Any]) -> list[int]:
    """Rows whose value holds text that is no UTF-8; a fast check of the whole column comes first."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return [row for row in range(len(column)) if not _readable(column, row)]
    return []


def _readable(column: pa.Array[Any], row: int) -> bool:
    try:
        column[row].as_py()
    except UnicodeDecodeError:
        return False
    except Exception:  # another fault, which matters only where the value is asked for
        return True
    return True


def _to_python(column: pa.Array[Any]) -> tuple[list[Any], dict[int, str]]:
    """The values, and why there is none, by row; extension types of the user's own may raise anything."""
    try:
        return column.to_pylist(), {}
    except Exception:
        values: list[Any] = []
        faults: dict[int, str] = {}
        for row in range(len(column)):
            try:
                values.append(column[row].as_py())
            except Exception as error:
                values.append(None)
                faults[row] = f"a value that Python cannot hold ({type(error).__name__}: {error})"
        return values, faults


def _without(column: pa.Array[Any], rows: list[int]) -> pa.Array[Any]:
    """Nulls in these rows. PyArrow selects rows of every type, but chooses between two arrays of few."""
    places = np.arange(len(column))
    return column.take(pa.array(places, mask=np.isin(places, rows)))


def _fault(code: str, place: str, index: int, column: str, what: str) -> RowError:
    return RowError(code, f"{place}: row {index} of the input holds {what} in the column {column!r}")
