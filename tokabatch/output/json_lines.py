"""Arrow tables as JSON Lines: one object per row, in UTF-8.

Values without a JSON type: timestamps, dates, times and decimals become text at full precision, bytes base64, durations their
count in the column's unit, maps a list of [key, value] pairs, NaN and Infinity null. Years of more than four digits are written
in full, as `numpy.datetime64` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.output.plain_json import to_json

_BYTES_AT_ONCE = 4 << 20


def write_json_lines(
    table: pa.Table, file: BinaryIO, restore: Callable[[list[dict[str, Any]]], None] = lambda rows: None
) -> None:
    """Append the rows of `table` to an open binary file. `restore` may change values of the rows before they are written."""
    table = _plain(table)
    rows_at_once = max(1, _BYTES_AT_ONCE * table.num_rows // max(table.nbytes, 1))
    for begin in range(0, table.num_rows, rows_at_once):
        rows = table.slice(begin, rows_at_once).to_pylist()
        restore(rows)
        lines = [to_json(row) for row in rows]
        file.write(("\n".join(lines) + "\n").encode())


def flatten(table: pa.Table) -> pa.Table:
    """Return the same rows with columns for CSV: lists, mappings, structs and values of extension types that are not text
    become their JSON text."""
    table = _plain(table)
    for place, field in enumerate(table.schema):
        is_ = pa.types
        is_bytes = is_.is_binary(field.type) or is_.is_large_binary(field.type) or is_.is_fixed_size_binary(field.type)
        if is_.is_nested(field.type) or is_bytes or isinstance(field.type, pa.BaseExtensionType):
            texts = map(_cell, table[place].to_pylist())
            table = table.set_column(place, field.name, pa.array(texts, pa.string()))
    return table


def _plain(table: pa.Table) -> pa.Table:
    """Return the same rows in types whose values are exact as Python objects."""
    plain = table.cast(pa.schema([field.with_type(_json_type(field.type)) for field in table.schema]))
    for place, field in enumerate(table.schema):
        if any(map(_has_far_times, table[place].chunks)):
            counts = table[place].cast(_json_type(field.type, counts=True)).to_pylist()
            values = [_with_far_times(field.type, *each) for each in zip(plain[place].to_pylist(), counts, strict=True)]
            plain = plain.set_column(place, plain.field(place), pa.array(values, plain.field(place).type))
    return plain


def _has_far_times(values: pa.Array[Any]) -> bool:
    """Return whether there is a time, at any depth, that Arrow does not print: in the years from 32768 on, or as far in the
    past."""
    type_, is_ = values.type, pa.types
    if is_.is_dictionary(type_):
        return _has_far_times(values.dictionary)
    if is_.is_timestamp(type_) or is_.is_date(type_):
        bounds = pc.call_function("min_max", [values.cast(_json_type(type_, counts=True))]).as_py()
        return any(bound is not None and abs(bound) > _near(type_) for bound in bounds.values())
    if is_.is_struct(type_):
        return any(map(_has_far_times, values.flatten()))
    if is_.is_map(type_):
        return _has_far_times(values.keys) or _has_far_times(values.items)
    is_list = is_.is_list(type_) or is_.is_large_list(type_) or is_.is_fixed_size_list(type_)
    return is_list and _has_far_times(values.flatten())


def _with_far_times(type_: pa.DataType, text: Any, count: Any) -> Any:
    """Return a value of this type from `text`, with times as Arrow prints them, and `count`, with times as numbers."""
    is_ = pa.types
    if text is None:
        return None
    if is_.is_dictionary(type_):
        return _with_far_times(type_.value_type, text, count)
    if is_.is_timestamp(type_) or is_.is_date(type_):
        if abs(count) <= _near(type_):
            return text
        return str(np.datetime64(count, _unit(type_))).replace("T", " ") + ("Z" if getattr(type_, "tz", None) else "")
    if is_.is_struct(type_):
        return {field.name: _with_far_times(field.type, text[field.name], count[field.name]) for field in type_}
    if is_.is_map(type_):
        types = type_.key_type, type_.item_type
        return [tuple(map(_with_far_times, types, *each)) for each in zip(text, count, strict=True)]
    if is_.is_list(type_) or is_.is_large_list(type_) or is_.is_fixed_size_list(type_):
        return [_with_far_times(type_.value_type, *each) for each in zip(text, count, strict=True)]
    return text


def _unit(type_: pa.DataType) -> str:
    return type_.unit if pa.types.is_timestamp(type_) else "D" if pa.types.is_date32(type_) else "ms"


def _near(type_: pa.DataType) -> int:
    """Return how many units from 1970 Arrow prints: 30,000 years."""
    return int(np.timedelta64(30_000 * 365, "D") / np.timedelta64(1, _unit(type_)))


def _cell(value: Any) -> str | None:
    """Return text as it is; for a value that JSON writes as text, such as base64, that text without its quotes."""
    if value is None or isinstance(value, str):
        return value
    text = to_json(value)
    return text[1:-1] if text[:1] == '"' else text


def _json_type(type_: pa.DataType, *, counts: bool = False) -> pa.DataType:
    """Return the type to convert to before values become Python objects, which could not hold all of them exactly; with
    `counts`, times become numbers of their unit."""
    is_ = pa.types
    if counts and (is_.is_timestamp(type_) or is_.is_date(type_)):
        return pa.int32() if is_.is_date32(type_) else pa.int64()
    if is_.is_dictionary(type_):
        return _json_type(type_.value_type, counts=counts)
    if is_.is_timestamp(type_) or is_.is_date(type_) or is_.is_time(type_) or is_.is_decimal(type_):
        return pa.string()
    if is_.is_duration(type_):
        return pa.int64()
    if is_.is_float16(type_):
        return pa.float32()
    if is_.is_struct(type_):
        return pa.struct([field.with_type(_json_type(field.type, counts=counts)) for field in type_])
    if is_.is_list(type_):
        return pa.list_(type_.value_field.with_type(_json_type(type_.value_type, counts=counts)))
    if is_.is_large_list(type_):
        return pa.large_list(type_.value_field.with_type(_json_type(type_.value_type, counts=counts)))
    if is_.is_fixed_size_list(type_):
        return pa.list_(type_.value_field.with_type(_json_type(type_.value_type, counts=counts)), type_.list_size)
    if is_.is_map(type_):
        return pa.map_(_json_type(type_.key_type, counts=counts), _json_type(type_.item_type, counts=counts))
    return type_
