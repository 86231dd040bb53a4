"""An Arrow batch as rows: the columns asked for become Python values, the batch itself stays the payload.

Binary values that are UTF-8 are texts in the rows: many writers store text so. This module knows no file format. The one fault
that can live in a single Arrow value is text that is not UTF-8.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.data.rows import Row, RowBatch
from tokabatch.errors import RowError


def rows_of(batch: pa.RecordBatch, columns: Collection[str] | None, first_index: int, place: str) -> RowBatch:
    """Rows numbered from `first_index`. `place` names the file in messages."""
    names = [name for name in batch.schema.names if columns is None or name in columns]
    bad: dict[int, str] = {}
    valid = batch
    values: dict[str, list[Any]] = {}
    for position, name in enumerate(batch.schema.names):
        column = batch.column(position)
        broken = _broken_text(column)
        bad |= {row: name for row in broken}
        if broken:
            column = _without(column, broken)
            valid = valid.set_column(position, batch.schema.field(position), column)
        if name in names:
            values[name] = _texts(column.to_pylist()) if _holds_binary(column.type) else column.to_pylist()
    rows = [
        Row(
            first_index + offset,
            {name: values[name][offset] for name in names} if offset not in bad else None,
            _fault(place, first_index + offset, bad[offset]) if offset in bad else None,
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
    return True


def _without(column: pa.Array[Any], rows: list[int]) -> pa.Array[Any]:
    mask = pa.array([row not in set(rows) for row in range(len(column))])
    return pc.call_function("if_else", [mask, column, pa.scalar(None, column.type)])


def _fault(place: str, index: int, column: str) -> RowError:
    return RowError("bad_utf8", f"{place}: row {index} of the input holds invalid UTF-8 in the column {column!r}")
