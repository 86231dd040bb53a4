"""Parquet files of one dataset, read a small batch at a time.

The schema is the union of the files' schemas, known from their footers before the first row; dictionary columns are read as
plain ones. Text that is not valid UTF-8 is a fault of its row and null in the payload.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tokabatch.data.arrow_rows import rows_of
from tokabatch.data.files import InputFile, refuse_unreachable
from tokabatch.data.rows import MAX_BATCH_BYTES, MAX_BATCH_ROWS, RowBatch
from tokabatch.errors import InputError


@dataclass(frozen=True, slots=True)
class ParquetReader:
    """Reads its files one after another, each cast to the common schema."""

    name: str
    files: tuple[InputFile, ...]
    schema: pa.Schema

    def batches(self, columns: Collection[str] | None = None) -> Iterator[RowBatch]:
        index = 0
        for file in self.files:
            with _opened(file) as parquet:
                for batch in _row_batches(parquet, file):
                    typed = conform(batch, self.schema, file.path)
                    yield rows_of(typed, columns, index, file.path)
                    index += typed.num_rows


def open_files(name: str, files: tuple[InputFile, ...]) -> ParquetReader:
    """The registry's entry point for `.parquet`: reads every footer."""
    compressed = next((file for file in files if file.compression), None)
    if compressed is not None:
        raise InputError(f"{compressed.path}: Parquet files compress themselves and are not read out of another; decompress it")
    schema: pa.Schema | None = None
    for file in files:
        with _opened(file) as parquet:
            own = plain_schema(parquet.schema_arrow)
        try:
            schema = own if schema is None else pa.unify_schemas([schema, own], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"{file.path} has columns of other types than {files[0].path}: {error}") from error
    assert schema is not None
    return ParquetReader(name, files, schema)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The same columns without dictionary encoding and without metadata. Raises InputError on two columns of one name."""
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise InputError(f"the input has more than one column named {', '.join(twice)}; rename them")
    return pa.schema([pa.field(field.name, _plain(field.type)) for field in schema])


def conform(batch: pa.RecordBatch, schema: pa.Schema, path: str) -> pa.RecordBatch:
    """`batch` in `schema`: columns in its order, those that are missing null."""
    try:
        arrays: list[pa.Array[Any]] = [
            batch.column(field.name).cast(field.type)
            if field.name in batch.schema.names
            else pa.nulls(batch.num_rows, field.type)
            for field in schema
        ]
    except pa.ArrowException as error:
        raise InputError(f"{path}: a column does not fit the type it has in the other files: {error}") from error
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _plain(kind: pa.DataType) -> pa.DataType:
    return cast("pa.DataType", kind.value_type) if isinstance(kind, pa.DictionaryType) else kind


@contextmanager
def _opened(file: InputFile) -> Generator[pq.ParquetFile, None, None]:
    with file.open() as stream:
        with _faults_named(file):
            parquet = pq.ParquetFile(stream, pre_buffer=False)
        yield parquet


@contextmanager
def _faults_named(file: InputFile) -> Generator[None, None, None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.path} is not a readable Parquet file: {error}. Fetch or write it again.") from error
    except Exception as error:  # see `refuse_unreachable`
        refuse_unreachable(file.path, error)


def _row_batches(parquet: pq.ParquetFile, file: InputFile) -> Iterator[pa.RecordBatch]:
    """Batches of one row group after another (a batch across two can come out torn where a type is null), fewer rows where
    they are large."""
    for number in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(number)
        row_bytes = max(1, group.total_byte_size // max(group.num_rows, 1))
        size = max(1, min(MAX_BATCH_ROWS, MAX_BATCH_BYTES // row_bytes))
        batches = iter(parquet.iter_batches(batch_size=size, row_groups=[number]))
        while True:
            with _faults_named(file):
                batch = next(batches, None)
            if batch is None:
                break
            yield batch
