"""Arrow tables as JSON Lines: one object per row, in UTF-8.

Values without a JSON type: timestamps, dates, times and decimals become text at full precision, bytes base64, durations
ISO 8601 (`P1DT2H3M4.5S`), maps a list of [key, value] pairs, NaN and Infinity null. Years of more than four digits are written
in full, as `numpy.datetime64` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.output.plain_json import to_json

_BYTES_AT_ONCE = 4 << 20
_TEXT = pa.string()


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
    plain = table.cast(pa.schema([field.with_type(_json_type(field.type, spans=pa.int64())) for field in table.schema]))
    for place, field in enumerate(table.schema):
        kind = _json_type(field.type)
        if kind != plain.field(place).type or any(map(_has_far_times, table[place].chunks)):
            counts = table[place].cast(_json_type(field.type, counts=True, spans=pa.int64())).to_pylist()
            values = [_with_times(field.type, *each) for each in zip(plain[place].to_pylist(), counts, strict=True)]
            plain = plain.set_column(place, plain.field(place).with_type(kind), pa.array(values, kind))
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


def _with_times(type_: pa.DataType, text: Any, count: Any) -> Any:
    """Return a value of this type from `text`, with times as Arrow prints them, and `count`, with times as numbers; durations
    are numbers in both."""
    is_ = pa.types
    if text is None:
        return None
    if is_.is_duration(type_):
        return _span(count, type_.unit)
    if is_.is_dictionary(type_):
        return _with_times(type_.value_type, text, count)
    if is_.is_timestamp(type_) or is_.is_date(type_):
        if abs(count) <= _near(type_):
            return text
        return str(np.datetime64(count, _unit(type_))).replace("T", " ") + ("Z" if getattr(type_, "tz", None) else "")
    if is_.is_struct(type_):
        return {field.name: _with_times(field.type, text[field.name], count[field.name]) for field in type_}
    if is_.is_map(type_):
        types = type_.key_type, type_.item_type
        return [tuple(map(_with_times, types, *each)) for each in zip(text, count, strict=True)]
    if is_.is_list(type_) or is_.is_large_list(type_) or is_.is_fixed_size_list(type_):
        return [_with_times(type_.value_type, *each) for each in zip(text, count, strict=True)]
    return text


def _span(count: int, unit: str) -> str:
    """Write a duration as ISO 8601 does, at full precision."""
    digits = {"s": 0, "ms": 3, "us": 6, "ns": 9}[unit]
    whole, part = divmod(abs(count), 10**digits)
    minutes, seconds = divmod(whole, 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    fraction = f".{part:0{digits}d}".rstrip("0") if part else ""
    clock = "".join(f"{number}{letter}" for number, letter in ((hours, "H"), (minutes, "M")) if number)
    clock += f"{seconds}{fraction}S" if seconds or part or not whole else ""
    return f"{'-' * (count < 0)}P{f'{days}D' * bool(days)}{f'T{clock}' * bool(clock)}"


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


def _json_type(type_: pa.DataType, *, counts: bool = False, spans: pa.DataType = _TEXT) -> pa.DataType:
    """Return the type to convert to before values become Python objects, which could not hold all of them exactly; with
    `counts`, times become numbers of their unit. `spans` is the type for durations."""
    is_ = pa.types
    inner = partial(_json_type, counts=counts, spans=spans)
    if counts and (is_.is_timestamp(type_) or is_.is_date(type_)):
        return pa.int32() if is_.is_date32(type_) else pa.int64()
    if is_.is_dictionary(type_):
        return inner(type_.value_type)
    if is_.is_timestamp(type_) or is_.is_date(type_) or is_.is_time(type_) or is_.is_decimal(type_):
        return pa.string()
    if is_.is_duration(type_):
        return spans
    if is_.is_float16(type_):
        return pa.float32()
    if is_.is_struct(type_):
        return pa.struct([field.with_type(inner(field.type)) for field in type_])
    if is_.is_list(type_):
        return pa.list_(type_.value_field.with_type(inner(type_.value_type)))
    if is_.is_large_list(type_):
        return pa.large_list(type_.value_field.with_type(inner(type_.value_type)))
    if is_.is_fixed_size_list(type_):
        return pa.list_(type_.value_field.with_type(inner(type_.value_type)), type_.list_size)
    if is_.is_map(type_):
        return pa.map_(inner(type_.key_type), inner(type_.item_type))
    return type_
