"""An Arrow batch as rows: the columns asked for become Python values, the batch itself stays the payload.

Numbers of 32 bits and less have their shortest digits. Binary values that are UTF-8 are texts in the rows: many writers store
text so. Maps are mappings, as objects of JSON are, where their keys are texts or whole numbers; a key that occurs twice is a
fault of its row, as in JSON. A single Arrow value can be text that is not UTF-8, and one that is asked for can be beyond what
Python has (a date after the year 9999): faults of their rows. This module knows no file format.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import numpy as np
import pyarrow as pa

from tokabatch.errors import RowError
from tokabatch.input.rows import Row, RowBatch

_SHORT_FLOATS = (pa.types.is_float32, pa.types.is_float16)
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)


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
            values[name] = _texts(values[name]) if _holds(column.type, *_BINARY) else values[name]
            if _holds(column.type, *_SHORT_FLOATS):
                values[name] = [_shortest(value, column.type) for value in values[name]]
            if _holds(column.type, pa.types.is_map):
                beyond |= _read_maps(values[name], column.type)
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


def python_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as Python values: null in place of one that Python does not have, such as a date after the year 9999."""
    try:
        return table.to_pylist()
    except Exception:
        columns = {name: _to_python(table[name])[0] for name in table.column_names}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _holds(kind: pa.DataType, *tests: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type is one of those tested for, or has one in it, at any depth."""
    if any(test(kind) for test in tests):
        return True
    if isinstance(kind, pa.DictionaryType):
        return _holds(kind.value_type, *tests)
    nested = range(kind.num_fields) if pa.types.is_nested(kind) else ()
    return any(_holds(kind.field(number).type, *tests) for number in nested)


def _shortest(value: Any, kind: Any) -> Any:
    """The value with its 32-bit and 16-bit numbers by their shortest digits, 0.1 and not 0.10000000149011612, outside maps."""
    if value is None or not _holds(kind, *_SHORT_FLOATS):
        return value
    if pa.types.is_struct(kind):
        return {field.name: _shortest(value[field.name], field.type) for field in kind}
    if isinstance(value, list):
        return value if pa.types.is_map(kind) else [_shortest(item, kind.value_type) for item in cast("list[Any]", value)]
    return float(str((np.float32 if pa.types.is_float32(kind) else np.float16)(value)))


def _read_maps(values: list[Any], kind: pa.DataType) -> dict[int, str]:
    """Makes mappings of the maps in `values`; why there is none, by row."""
    faults: dict[int, str] = {}
    for row, value in enumerate(values):
        try:
            values[row] = _mappings(value, kind)
        except _Twice as error:
            faults[row] = f"a map that has the key {error.args[0]!r} twice"
    return faults


class _Twice(ValueError):
    """A key that a map has more than once."""


def _mappings(value: Any, kind: Any) -> Any:
    """The value with its maps as mappings, at any depth; one with keys of another type stays a list of pairs."""
    if value is None or not _holds(kind, pa.types.is_map):
        return value
    if pa.types.is_dictionary(kind):
        return _mappings(value, kind.value_type)
    if pa.types.is_struct(kind):
        return {field.name: _mappings(value[field.name], field.type) for field in kind}
    if not pa.types.is_map(kind):
        return [_mappings(item, kind.value_type) for item in value]
    pairs = [(key, _mappings(item, kind.item_type)) for key, item in value]
    if not all(isinstance(key, str | int) for key, _ in pairs):
        return pairs
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return mapping


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


def _to_python(column: pa.Array[Any] | pa.ChunkedArray) -> tuple[list[Any], dict[int, str]]:
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
