"""Arrow tables as JSON Lines: one object a row, in UTF-8.

What JSON has no type for: timestamps, dates, times and decimals become their text at full precision, bytes base64,
durations their count in the column's unit, maps a list of [key, value] pairs, NaN and Infinity null.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import pyarrow as pa

from tokabatch.output.plain_json import to_json

_BYTES_AT_ONCE = 4 << 20


def write_json_lines(table: pa.Table, file: BinaryIO) -> None:
    """Append the rows of `table` to an open binary file."""
    table = table.cast(pa.schema([field.with_type(_json_type(field.type)) for field in table.schema]))
    rows_at_once = max(1, _BYTES_AT_ONCE * table.num_rows // max(table.nbytes, 1))
    for begin in range(0, table.num_rows, rows_at_once):
        lines = [to_json(row) for row in table.slice(begin, rows_at_once).to_pylist()]
        file.write(("\n".join(lines) + "\n").encode())


def flatten(table: pa.Table) -> pa.Table:
    """The same rows with columns as CSV has them: lists, mappings and structs as their JSON text, and so what extension types
    hold, unless it is text."""
    table = table.cast(pa.schema([field.with_type(_json_type(field.type)) for field in table.schema]))
    for place, field in enumerate(table.schema):
        if pa.types.is_nested(field.type) or _is_bytes(field.type) or isinstance(field.type, pa.BaseExtensionType):
            texts = map(_cell, table[place].to_pylist())
            table = table.set_column(place, field.name, pa.array(texts, pa.string()))
    return table


def _is_bytes(type_: pa.DataType) -> bool:
    is_ = pa.types
    return is_.is_binary(type_) or is_.is_large_binary(type_) or is_.is_fixed_size_binary(type_)


def _cell(value: Any) -> str | None:
    """A text as it is; of what JSON has as a text, such as base64, that text without its quotes."""
    if value is None or isinstance(value, str):
        return value
    text = to_json(value)
    return text[1:-1] if text[:1] == '"' else text


def _json_type(type_: pa.DataType) -> pa.DataType:
    """The type to convert to before values become Python objects, which could not hold them all exactly."""
    is_ = pa.types
    if is_.is_dictionary(type_):
        return _json_type(type_.value_type)
    if is_.is_timestamp(type_) or is_.is_date(type_) or is_.is_time(type_) or is_.is_decimal(type_):
        return pa.string()
    if is_.is_duration(type_):
        return pa.int64()
    if is_.is_float16(type_):
        return pa.float32()
    if is_.is_struct(type_):
        return pa.struct([field.with_type(_json_type(field.type)) for field in type_])
    if is_.is_list(type_):
        return pa.list_(type_.value_field.with_type(_json_type(type_.value_type)))
    if is_.is_large_list(type_):
        return pa.large_list(type_.value_field.with_type(_json_type(type_.value_type)))
    if is_.is_fixed_size_list(type_):
        return pa.list_(type_.value_field.with_type(_json_type(type_.value_type)), type_.list_size)
    if is_.is_map(type_):
        return pa.map_(_json_type(type_.key_type), _json_type(type_.item_type))
    return type_
