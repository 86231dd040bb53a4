"""Arrow types as a run carries them: values and logical types are kept, encodings are not.

Dictionaries, run-end encodings and views are memory layouts of the same values. PyArrow cannot select rows of all of them,
write all of them, or read all of them back, so columns are decoded once, on entry. Parquet has no seconds (it has milliseconds)
and one type of date. Everything else (large offsets, decimals, time zones, extension types, nested nullability) is kept.
Independent of files and column names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.arrays import Int64

_CAST: dict[pa.DataType, pa.DataType] = {
    pa.string_view(): pa.string(),
    pa.binary_view(): pa.binary(),
    pa.time32("s"): pa.time32("ms"),
    pa.date64(): pa.date32(),
}
_LISTS = (pa.types.is_list, pa.types.is_large_list)
_LIST_VIEWS = (pa.types.is_list_view, pa.types.is_large_list_view)
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the same values without dictionaries, run-end encodings and views, at any depth, as Parquet has it."""
    if isinstance(kind, pa.BaseExtensionType):
        storage = plain_type(kind.storage_type)
        return kind if storage.equals(kind.storage_type) else storage
    if kind in _CAST:
        return _CAST[kind]
    if pa.types.is_timestamp(kind) and cast("Any", kind).unit == "s":
        return pa.timestamp("ms", cast("Any", kind).tz)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(cast("pa.DictionaryType[Any, Any]", kind).value_type)
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in fields_of(kind)])
    if pa.types.is_map(kind):
        key, item = cast("Any", kind).key_field, cast("Any", kind).item_field
        return pa.map_(_plain_field(key), _plain_field(item), keys_sorted=cast("Any", kind).keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(cast("Any", kind).value_field), cast("Any", kind).list_size)
    if _is(kind, pa.types.is_list, pa.types.is_list_view):
        return pa.list_(_plain_field(cast("Any", kind).value_field))
    if _is(kind, pa.types.is_large_list, pa.types.is_large_list_view):
        return pa.large_list(_plain_field(cast("Any", kind).value_field))
    return kind


def plain_array(array: Any) -> pa.Array[Any]:
    """Return the same values in `plain_type(array.type)`; the array itself if it has that type. Raises ArrowInvalid for a date
    that is not a whole day and for a time out of range.

    PyArrow's own casts are not used for nested types: some fail, and the cast of a list view with a null loses values (26.0).
    """
    kind = array.type
    plain = plain_type(kind)
    if plain.equals(kind):
        return array
    if isinstance(kind, pa.BaseExtensionType):
        return plain_array(array.storage)
    if kind in _CAST or pa.types.is_timestamp(kind):
        return array.cast(plain)
    if pa.types.is_dictionary(kind):
        return plain_array(array.dictionary).take(array.indices)
    if pa.types.is_run_end_encoded(kind):
        # `values` and `run_ends` are those of the whole, unsliced array.
        places = array.offset + np.arange(len(array))
        runs = np.searchsorted(array.run_ends.to_numpy(), places, side="right")
        return plain_array(array.values).take(pa.array(runs.astype(np.int64)))
    nulls = array.is_null()
    if pa.types.is_struct(kind):
        children = [plain_array(array.field(place)) for place in range(kind.num_fields)]
        return pa.StructArray.from_arrays(children, fields=fields_of(plain), mask=nulls)
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        children = plain_array(array.values.slice(array.offset * size, len(array) * size))
        return pa.FixedSizeListArray.from_arrays(children, type=plain, mask=nulls)
    if _is(kind, *_LIST_VIEWS):
        return _list_of_views(array, plain)
    offsets = pa.array(array.offsets.to_numpy())
    if pa.types.is_map(kind):
        keys, items = plain_array(array.keys), plain_array(array.items)
        return cast("Any", pa.MapArray).from_arrays(offsets, keys, items, type=plain, mask=nulls)
    maker = cast("Any", pa.ListArray if pa.types.is_list(kind) else pa.LargeListArray)
    return maker.from_arrays(offsets, plain_array(array.values), type=plain, mask=nulls)


def row_bytes(array: Any) -> Int64:
    """Return the memory of each value of a plain array, shape [values], without validity bits."""
    kind, count = array.type, len(array)
    if isinstance(kind, pa.BaseExtensionType):
        return row_bytes(array.storage)
    if pa.types.is_null(kind):
        return np.zeros(count, np.int64)
    if _is(kind, *_TEXTS):
        lengths = pc.call_function("binary_length", [array]).fill_null(0)
        return lengths.to_numpy(zero_copy_only=False).astype(np.int64) + 8
    if pa.types.is_struct(kind):
        return sum((row_bytes(array.field(place)) for place in range(kind.num_fields)), np.zeros(count, np.int64))
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        return row_bytes(array.values.slice(array.offset * size, count * size)).reshape(count, size).sum(axis=1, dtype=np.int64)
    if pa.types.is_map(kind):
        return _between(array, row_bytes(array.keys) + row_bytes(array.items))
    if _is(kind, *_LISTS):
        return _between(array, row_bytes(array.values))
    if _is(kind, pa.types.is_union):
        return np.full(count, array.nbytes // max(count, 1) + 1, np.int64)
    return np.full(count, -(-kind.bit_width // 8), np.int64)


def fields_of(kind: Any) -> list[pa.Field[Any]]:
    """Return the fields of a struct type."""
    return [kind.field(place) for place in range(kind.num_fields)]


def _plain_field(field: pa.Field[Any]) -> pa.Field[Any]:
    return field.with_type(plain_type(field.type))


def _is(kind: pa.DataType, *tests: Callable[[pa.DataType], bool]) -> bool:
    return any(test(kind) for test in tests)


def _between(array: Any, sizes: Int64) -> Int64:
    """Sum `sizes`, one for each value of the lists in `array`, over each list."""
    ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)))
    offsets = array.offsets.to_numpy()
    return ends[offsets[1:]] - ends[offsets[:-1]] + 8


def _list_of_views(array: Any, plain: pa.DataType) -> pa.Array[Any]:
    """Make a list array of list views, whose lists may overlap and lie in any order."""
    nulls = array.is_null()
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    sizes = np.where(valid, array.sizes.to_numpy(), 0).astype(np.int64)
    ends = np.cumsum(sizes)
    places = np.arange(int(sizes.sum())) + np.repeat(array.offsets.to_numpy() - (ends - sizes), sizes)
    large = pa.types.is_large_list(plain)
    offsets = pa.array(np.concatenate(([0], ends)).astype(np.int64 if large else np.int32))
    maker = cast("Any", pa.LargeListArray if large else pa.ListArray)
    return maker.from_arrays(offsets, plain_array(array.values).take(pa.array(places)), type=plain, mask=nulls)
