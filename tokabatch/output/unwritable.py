"""Values that cannot be written. A column of a type that Parquet does not hold is refused before a run; a value that cannot be
built or encoded is null in its sample, which becomes an error row that keeps the rest."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from tokabatch.errors import STOPS, OutputError
from tokabatch.output.schema import CANCELLED, SAMPLE_SCHEMA, UnsampledRow, build_table
from tokabatch.output.shards import write_parquet
from tokabatch.scheduling.contracts import Completion
from tokabatch.storage.parquet_file import ParquetFile

CANNOT_BE_WRITTEN = "cannot_be_written"
"""The error code of a finished sample with columns that cannot be written."""
_WHO_AND_WHAT = ("row_index", "sample_index", "status", "error_code", "error_message")
_MAX_FAULT = 300


def refuse_unwritable(schema: pa.Schema) -> None:
    """Raise OutputError if a column could be computed, but not written and read back unchanged."""
    nullable = [field for field in schema if field.nullable]
    if _fault_of(nullable) is None:
        return
    for field in nullable:
        if fault := _fault_of([field]):
            raise OutputError(
                f"the column {field.name!r} has the type {field.type}, which pyarrow {pa.__version__} cannot write to "
                f"Parquet: {fault}. Cast it in the input, or leave it out with output.columns=[...]."
            )


def build_piecemeal(schema: pa.Schema, key: pa.Table, build: Callable[[pa.Schema], pa.Table]) -> pa.Table:
    """Build the samples of one row column by column, if `build` fails for the whole `schema`: columns that cannot be built are
    null, and the samples are error rows that name them and the reason. `key` has the columns of `_WHO_AND_WHAT`."""
    arrays = {name: key[name] for name in key.column_names}
    faults: dict[str, BaseException] = {}
    for field in schema:
        if field.name in arrays:
            continue
        try:
            arrays[field.name] = build(pa.schema([field])).column(0)
        except STOPS:
            raise
        except BaseException as error:
            arrays[field.name], faults[field.name] = _nulls(key.num_rows, field.type), error
    return _with_faults(pa.Table.from_arrays([arrays[field.name] for field in schema], schema=schema), faults)


def mended(table: pa.Table, encode: Callable[[pa.Table], object]) -> pa.Table:
    """Return `table` with nulls in place of values for which `encode` raises, their rows being error rows that say so; the same
    table if there are none."""
    try:
        encode(table)
    except STOPS:
        raise
    except BaseException:
        if table.num_rows > 1:
            half = table.num_rows // 2
            return pa.concat_tables([mended(table.slice(0, half), encode), mended(table.slice(half), encode)])
        return _mended_row(table, encode)
    return table


def key_table(completions: Sequence[Completion], failures: Sequence[UnsampledRow]) -> pa.Table:
    """Return the columns that identify the samples and say how they ended: what `build_piecemeal` begins with."""
    fields = [SAMPLE_SCHEMA.field(name) for name in _WHO_AND_WHAT]
    texts = [""] * len(completions)
    return build_table(pa.schema(fields), completions, failures, texts=texts, ids=[], columns=pa.table({}))


def _fault_of(fields: Sequence[pa.Field[Any]]) -> str | None:
    """Return why a row of nulls would not be read back unchanged; None if it would."""
    file = io.BytesIO()
    try:
        row = pa.Table.from_arrays([pa.nulls(2, field.type) for field in fields], schema=pa.schema(fields))
        write_parquet(row.take(pa.array([1])), file)
        found = ParquetFile(file).read().schema
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        return str(error)
    changed = [kept.type for kept, field in zip(found, fields, strict=True) if not kept.type.equals(field.type)]
    return f"it would be read back as {changed[0]}" if changed else None


def _mended_row(table: pa.Table, encode: Callable[[pa.Table], object]) -> pa.Table:
    faults: dict[str, BaseException] = {}
    for place, field in enumerate(table.schema):
        try:
            encode(table.select([place]))
        except STOPS:
            raise
        except BaseException as error:
            faults[field.name] = error
            table = table.set_column(place, field, _nulls(1, field.type))
    return _with_faults(table, faults)


def _with_faults(table: pa.Table, faults: dict[str, BaseException]) -> pa.Table:
    # A cancelled sample was never drawn and has not failed; the samples before it report the row's columns.
    if not faults or CANCELLED in table["status"].to_pylist():
        return table
    named = "; ".join(f"{name!r} ({type(error).__name__}: {str(error)[:_MAX_FAULT]})" for name, error in faults.items())
    message = (
        f"not every column of row {table['row_index'][0]} can be written: {named}. What cannot is null here, the rest is kept. "
        "Correct the value in the input and run again with --retry-errors, or leave the column out with output.columns=[...] "
        "in a job with another output.path; if it is not a column of the input, please report a bug."
    )
    codes = [code or CANNOT_BE_WRITTEN for code in table["error_code"].to_pylist()]
    messages = [f"{earlier}; {message}" if earlier else message for earlier in table["error_message"].to_pylist()]
    changed = {"status": ["error"] * table.num_rows, "error_code": codes, "error_message": messages}
    for name, values in changed.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
    return table


def _nulls(count: int, kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([pa.nulls(count, kind)])
