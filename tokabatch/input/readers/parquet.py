"""Parquet files of one dataset, read in small batches.

The schema is the union of the files' schemas in plain types, read from their footers before the first row. Text that is not
valid UTF-8 is an error of its row and null in the payload.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tokabatch.errors import InputError
from tokabatch.input.files.arrow_rows import rows_of
from tokabatch.input.files.arrow_types import plain_array, plain_type
from tokabatch.input.files.content import HEAD_BYTES, refuse_foreign
from tokabatch.input.files.paths import InputFile, refuse_unreachable
from tokabatch.input.rows import MAX_BATCH_BYTES, MAX_BATCH_ROWS, RowBatch, no_rows
from tokabatch.storage.parquet_file import ParquetFile


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
    """Open `.parquet` files and read every footer: the registry's entry point. Raises InputError if there are no rows."""
    compressed = next((file for file in files if file.compression), None)
    if compressed is not None:
        raise InputError(f"{compressed.path}: a Parquet file inside another compressed file cannot be read; decompress it")
    schema: pa.Schema | None = None
    rows = 0
    for file in files:
        with _opened(file) as parquet:
            rows += parquet.metadata.num_rows
            own = plain_schema(parquet.schema_arrow)
        try:
            schema = own if schema is None else pa.unify_schemas([schema, own], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(
                f"{file.path} has columns of other types than {files[0].path}: {error}. Cast them to one type in all files, or "
                "run the files as jobs of their own."
            ) from error
    if not rows:
        raise no_rows(name)
    assert schema is not None
    return ParquetReader(name, files, schema)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return the same columns in their plain types. Fields keep their metadata (it names an extension type that is not
    registered here); the schema's own metadata, which describes this table, is dropped. Every column is nullable, because a row
    that cannot be read is null. Raises InputError if two columns have one name."""
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise InputError(f"the input has more than one column named {', '.join(twice)}; rename them")
    return pa.schema([field.with_type(plain_type(field.type)).with_nullable(True) for field in schema])


def conform(batch: pa.RecordBatch, schema: pa.Schema, path: str) -> pa.RecordBatch:
    """Return `batch` in `schema`: columns in its order, missing ones null."""
    arrays: list[pa.Array[Any]] = []
    for field in schema:
        try:
            arrays.append(_fitted(batch, field))
        except pa.ArrowException as error:
            raise InputError(
                f"{path}: its column {field.name!r} does not fit the type {field.type}, which it has with the other files: "
                f"{error}. Cast the column to one type in all files."
            ) from error
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _fitted(batch: pa.RecordBatch, field: pa.Field[Any]) -> pa.Array[Any]:
    if field.name not in batch.schema.names:
        return pa.nulls(batch.num_rows, field.type)
    column = plain_array(batch.column(field.name))
    return column if column.type.equals(field.type) else column.cast(field.type)


@contextmanager
def _opened(file: InputFile) -> Generator[ParquetFile, None, None]:
    with file.open() as stream:
        with _faults_named(file):
            try:
                parquet = ParquetFile(stream)
            except pa.ArrowInvalid:
                stream.seek(0)
                begin = stream.read(HEAD_BYTES)
                if begin.startswith(b"{"):
                    raise InputError(f"{file.path} is JSON text, despite its name; rename it to .jsonl") from None
                if not begin.startswith(b"PAR1"):
                    refuse_foreign(file.path, begin)
                raise
        yield parquet


@contextmanager
def _faults_named(file: InputFile) -> Generator[None, None, None]:
    try:
        yield
    except InputError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file.path} is not a readable Parquet file: {str(error).rstrip('.')}. Fetch or write it again."
        ) from error
    except Exception as error:  # see `refuse_unreachable`
        refuse_unreachable(file.path, error)


def _row_batches(parquet: ParquetFile, file: InputFile) -> Iterator[pa.RecordBatch]:
    """Iterate over batches, one row group after another (a batch across two row groups can be corrupt for columns of type
    null), with fewer rows if they are large."""
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
