"""An Arrow batch as rows: the columns in use become Python values, and the batch itself stays the payload.

Numbers of 32 bits and less get their shortest digits. Binary values that are valid UTF-8 become texts, because many writers
store text that way. Maps become mappings, like JSON objects, if their keys are texts or whole numbers; a repeated key is an
error of its row, as in JSON. So are text that is not UTF-8, and a value in use that Python cannot represent (a date after the
year 9999). Independent of file formats.
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
    """Return the rows, numbered from `first_index`. `place` names the file in messages."""
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
    """Return the rows as Python values: null in place of one that Python cannot represent, such as a date after the year
    9999."""
    try:
        return table.to_pylist()
    except Exception:
        columns = {name: _to_python(table[name])[0] for name in table.column_names}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _holds(kind: pa.DataType, *tests: Callable[[pa.DataType], bool]) -> bool:
    """Return whether a type, or one nested in it at any depth, passes one of the tests."""
    if any(test(kind) for test in tests):
        return True
    if isinstance(kind, pa.DictionaryType):
        return _holds(kind.value_type, *tests)
    nested = range(kind.num_fields) if pa.types.is_nested(kind) else ()
    return any(_holds(kind.field(number).type, *tests) for number in nested)


def _shortest(value: Any, kind: Any) -> Any:
    """Return the value with its 32-bit and 16-bit numbers in their shortest digits, 0.1 and not 0.10000000149011612, except in
    maps."""
    if value is None or not _holds(kind, *_SHORT_FLOATS):
        return value
    if pa.types.is_struct(kind):
        return {field.name: _shortest(value[field.name], field.type) for field in kind}
    if isinstance(value, list):
        return value if pa.types.is_map(kind) else [_shortest(item, kind.value_type) for item in cast("list[Any]", value)]
    return float(str((np.float32 if pa.types.is_float32(kind) else np.float16)(value)))


def _read_maps(values: list[Any], kind: pa.DataType) -> dict[int, str]:
    """Turn the maps in `values` into mappings, in place; return the faults by row."""
    faults: dict[int, str] = {}
    for row, value in enumerate(values):
        try:
            values[row] = _mappings(value, kind)
        except _Twice as error:
            faults[row] = f"a map that has the key {error.args[0]!r} twice"
    return faults


class _Twice(ValueError):
    """A key occurs more than once in a map."""


def _mappings(value: Any, kind: Any) -> Any:
    """Return the value with its maps as mappings, at any depth; a map with keys of another type stays a list of pairs."""
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
    """Return the value with bytes that are valid UTF-8 as text, at any depth; other bytes are kept."""
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
    """Return the rows whose value holds text that is not UTF-8; a fast check of the whole column comes first."""
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
    except Exception:  # another fault, which matters only if the column is in use
        return True
    return True


def _to_python(column: pa.Array[Any] | pa.ChunkedArray) -> tuple[list[Any], dict[int, str]]:
    """Return the values, and the faults of those without one, by row. Users' own extension types may raise anything."""
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
    """Set these rows to null. PyArrow takes rows of every type, but chooses between two arrays of only a few."""
    places = np.arange(len(column))
    return column.take(pa.array(places, mask=np.isin(places, rows)))


def _fault(code: str, place: str, index: int, column: str, what: str) -> RowError:
    return RowError(code, f"{place}: row {index} of the input holds {what} in the column {column!r}")
