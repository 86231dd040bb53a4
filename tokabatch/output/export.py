"""One file out of many shards, ordered by row and sample, in bounded memory.

A distribution sort: the keys of all shards are read and ranked (about 60 bytes per sample), the ranking is cut into buckets
that fit in memory, each shard is read once and its rows are distributed to the buckets on disk, and each bucket is sorted and
written. A row's samples stay together. Only the key columns and `SAMPLE_SCHEMA` matter here; other columns pass through. While
a run writes to the folder, both readings must see one listing, or the export starts over.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from tokabatch.arrays import Bool, Int64
from tokabatch.errors import ForeignFileError, OutputError
from tokabatch.input.store.json_types import parse_json_texts
from tokabatch.output.export_target import check_target
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import inspect
from tokabatch.output.json_lines import flatten, write_json_lines
from tokabatch.output.manifest import read_manifest
from tokabatch.output.remedy import refuse_faults, refuse_other_verdicts, refuse_unrecorded
from tokabatch.output.schema import CORRECT, input_names, own_names, verdict_names
from tokabatch.output.scratch import scratch_folder
from tokabatch.output.shards import ARROW_BYTES_KEY, PARQUET_OPTIONS, count_unjudged, open_shard, read_groups
from tokabatch.storage.listing import ListedFile, consistently, is_there
from tokabatch.storage.write_errors import or_else, reason

_KEYS = ("row_index", "sample_index")
_ROW_FIELDS = ("id", "row_index")
_SAMPLES = "samples"
_BUCKET_BYTES = 128 << 20
_WIDENED_BYTES, _COLUMN_BYTES = 1 << 30, (1 << 31) - 1
"""A table above the first size is sorted with 64-bit offsets. Tables that are returned have 32-bit offsets, so the second
bounds the bytes of text, and the entries of lists, in one column."""
Where = Literal["correct", "wrong", "ok", "error", "cancelled"]
StreamFormat = Literal["jsonl", "csv"]
_WHERE = {"correct": ("correct", True), "wrong": ("correct", False)}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which samples are exported, and which columns: all, in the order of the output, if `columns` is None; `where` keeps those
    that are right or wrong, finished, error rows or cancelled; `nested` makes one record per row, with its samples in a list
    `samples`."""

    nested: bool = False
    columns: tuple[str, ...] | None = None
    where: Where | None = None


@dataclass(slots=True)
class Exported:
    """What was written: `rows` of the input with `samples` in total, in `bytes`. `done` of the run's `planned` samples were
    there, whichever were selected, and `unjudged` of them are still to be judged; how many are planned is unknown without a
    manifest."""

    rows: int = 0
    samples: int = 0
    bytes: int = 0
    done: int = 0
    planned: int | None = None
    unjudged: int = 0


def export(
    path: Path, target: Path | BinaryIO, selection: Selection | None = None, stream_format: StreamFormat = "jsonl"
) -> Exported:
    """Write the committed samples of the output folder `path` to `target`, ordered by row and sample: a file (.jsonl, .csv or
    .parquet), which is replaced, or an open stream, which receives `stream_format`. A run that is not complete exports what it
    has. Raises OutputError if there is nothing to export, something cannot be read, or `target` cannot be written, DamageError
    if a shard is not as it was committed, BrokenPipeError if the reader of the stream ends."""
    folder, chosen = OutputFolder(path), selection or Selection()
    if isinstance(target, Path):
        check_target(folder, target)
    try:
        return consistently(lambda: _export(folder, committed_shards(folder), target, chosen, stream_format), path)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"--to {target if isinstance(target, Path) else '-'} cannot be written: {reason(error)}. "
            f"{or_else(error, ', or name a file elsewhere', 'name a file elsewhere')}."
        ) from error


def committed_shards(folder: OutputFolder) -> tuple[ListedFile, ...]:
    """Return the shards that are as they were committed; raise an error if there are others."""
    manifest = read_manifest(folder)
    if manifest is None:
        return folder.shards()
    found = inspect(folder, manifest)
    refuse_faults(folder, manifest, found)
    refuse_unrecorded(folder, manifest, found)
    refuse_other_verdicts(folder, manifest, found)
    return tuple(file for _, file in found.good)


def _export(
    folder: OutputFolder,
    shards: Sequence[ListedFile],
    target: Path | BinaryIO,
    selection: Selection,
    stream_format: StreamFormat,
) -> Exported:
    _check_shards(folder, shards, selection)
    needed = None if selection.columns is None else (*_KEYS, "status", CORRECT.name, *selection.columns)
    place = target.absolute().parent if isinstance(target, Path) else Path(tempfile.gettempdir())
    with open_ordered(shards, place, needed, whole_rows=selection.nested) as (schema, ordered, scratch):
        manifest = read_manifest(folder)
        unjudged = sum(count_unjudged(table) for shard in shards for table in read_groups(shard, ("verify_error",)))
        exported = Exported(done=sum(map(_num_rows, shards)), planned=manifest and manifest.samples, unjudged=unjudged)
        tables = _shaped(ordered, selection, exported)
        shaped = next(_shaped(iter([schema.empty_table()]), selection, Exported())).schema
        restore = partial(parse_json_texts, schema=schema, names=input_names(schema))
        if not isinstance(target, Path):
            _write(target, f".{stream_format}", shaped, tables, restore)
            target.flush()
            return exported
        finished = scratch / "finished"
        with finished.open("wb") as file:
            _write(file, target.suffix, shaped, tables, restore)
            file.flush()
            os.fsync(file.fileno())
        finished.replace(target)
    exported.bytes = target.stat().st_size
    return exported


@contextmanager
def open_ordered(
    shards: Sequence[ListedFile], place: Path, columns: Collection[str] | None, *, whole_rows: bool = True
) -> Generator[tuple[pa.Schema, Iterator[pa.Table], Path]]:
    """Provide the samples of at least one shard as tables ordered by row and sample: their schema, the tables, and a folder for
    further files, which lies in `place` and is removed at the end. `columns` are those to read, as far as they exist, and must
    include `row_index` and `sample_index`; None means all. With `whole_rows` a row's samples are in one table. Raises
    ForeignFileError if the shards are of different runs, OSError if the folder cannot be written, and OutputError if one table
    does not hold a whole row."""
    schema = _schema(shards[0])
    for shard in shards[1:]:
        if not _schema(shard).equals(schema):
            raise ForeignFileError(
                f"{shard.path} has other columns than {shards[0].path.name}: they do not belong to one run. Move "
                "foreign files away."
            )
    schema = schema.with_metadata({key: value for key, value in (schema.metadata or {}).items() if key != ARROW_BYTES_KEY})
    if columns is not None:
        schema = pa.schema([field for field in schema if field.name in columns], schema.metadata)
    with scratch_folder(place) as scratch:
        bucket, num_buckets = _cut(shards)
        _deal(shards, schema, bucket, scratch)
        yield schema, _sorted_buckets(scratch, num_buckets, whole_rows=whole_rows), scratch


def _shaped(tables: Iterator[pa.Table], selection: Selection, exported: Exported) -> Iterator[pa.Table]:
    """Iterate over what is selected of tables ordered by row and sample, and count it in `exported`."""
    last_row = -1
    for table in tables:
        if selection.where is not None:
            column, value = _WHERE.get(selection.where, ("status", selection.where))
            kept = pc.call_function("equal", [table[column], value])
            ok = pc.call_function("equal", [table["status"], "ok" if column == CORRECT.name else value])
            table = table.filter(pc.call_function("and_kleene", [kept.fill_null(False), ok]))
        exported.samples += table.num_rows
        rows = np.append(last_row, table["row_index"].to_numpy())
        exported.rows, last_row = exported.rows + int(_begins(rows)[1:].sum()), rows[-1]
        if selection.columns is not None:
            hidden = ["row_index"] if selection.nested and "row_index" not in selection.columns else []
            table = table.select([*hidden, *selection.columns])
            yield nest(table).drop_columns(hidden) if selection.nested else table
        else:
            yield nest(table) if selection.nested else table


def nest(table: pa.Table) -> pa.Table:
    """Return one record per row of a table ordered by row and sample: `id`, `row_index`, the input columns, then `samples`."""
    rows = table["row_index"].to_numpy()
    first = np.flatnonzero(_begins(rows))
    sample_names = [name for name in own_names(table.schema) if name not in _ROW_FIELDS]
    outer = table.select([name for name in table.column_names if name not in sample_names]).take(pa.array(first))
    inner = table.select(sample_names)
    if not sample_names:
        return outer
    samples = pa.StructArray.from_arrays(
        [pa.concat_arrays([pa.array([], column.type), *column.chunks]) for column in inner.columns],
        fields=list(inner.schema),
    )
    offsets = pa.array(np.append(first, len(rows)), pa.int32())
    return outer.append_column(_SAMPLES, pa.ListArray.from_arrays(offsets, samples))


def _check_shards(folder: OutputFolder, shards: Sequence[ListedFile], selection: Selection) -> None:
    if not shards:
        remedy = "check the path"
        if is_there(folder.files, folder.manifest):
            remedy = "a run commits what is finished every output.flush_seconds; `tokabatch status` shows how far it is"
        raise OutputError(f"{folder.path} holds no committed samples (no data/part-*.parquet); {remedy}")
    names = _schema(shards[0]).names
    for name in selection.columns or ():
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
            raise OutputError(f"--columns: the output has no column {name}; {hint}")
    if selection.where in ("correct", "wrong") and CORRECT.name not in verdict_names(_schema(shards[0])):
        raise OutputError(
            f"--where {selection.where}: the run was not verified, so no sample is known to be right or wrong; use ok or "
            f"error, or judge them first: tokabatch score {quote(str(folder.path))} verify.kind=KIND verify.answer=COLUMN"
        )
    if selection.nested and _SAMPLES in names and (selection.columns is None or _SAMPLES in selection.columns):
        raise OutputError(f"the input has a column named {_SAMPLES!r}, which --nested uses itself; export without it")


def _num_rows(shard: ListedFile) -> int:
    with open_shard(shard) as file:
        return file.metadata.num_rows


def _schema(shard: ListedFile) -> pa.Schema:
    with open_shard(shard) as file:
        return file.schema_arrow


def _cut(shards: Sequence[ListedFile]) -> tuple[Int64, int]:
    """Return the bucket of each sample, in the order of the shards, and the number of buckets."""
    rows: list[Int64] = []
    samples: list[Int64] = []
    sizes: list[Int64] = []
    for shard in shards:
        with open_shard(shard) as file:
            size = int((file.schema_arrow.metadata or {}).get(ARROW_BYTES_KEY, b"0")) or shard.bytes
            per_sample = size // max(file.metadata.num_rows, 1) + 1
        for keys in read_groups(shard, _KEYS):
            rows.append(keys["row_index"].to_numpy())
            samples.append(keys["sample_index"].to_numpy())
            sizes.append(np.full(keys.num_rows, per_sample))
    row = np.concatenate(rows)
    order = np.lexsort((np.concatenate(samples), row))
    begins = _begins(row[order])
    before = np.cumsum(np.concatenate(sizes)[order])
    # A whole row goes to the bucket of its first sample.
    _, of_row = np.unique(before[begins] // _BUCKET_BYTES, return_inverse=True)
    bucket = np.empty(len(row), dtype=np.int64)
    bucket[order] = of_row[np.cumsum(begins) - 1]
    return bucket, int(of_row[-1]) + 1


def _deal(shards: Sequence[ListedFile], schema: pa.Schema, bucket: Int64, scratch: Path) -> None:
    """Append each row to its bucket's file, a sequence of Arrow streams (so that one file is open at a time)."""
    begin = 0
    for shard in shards:
        for table in read_groups(shard, schema.names):
            table = table.select(schema.names)
            part = bucket[begin : begin + table.num_rows]
            begin += table.num_rows
            by_bucket = np.argsort(part, kind="stable")
            dealt = table.take(pa.array(by_bucket)).replace_schema_metadata(schema.metadata)
            edges = np.flatnonzero(_begins(part[by_bucket])).tolist()
            for first, last in pairwise([*edges, len(part)]):
                with (
                    _bucket_path(scratch, int(part[by_bucket[first]])).open("ab") as sink,
                    pa.ipc.new_stream(sink, schema) as stream,
                ):
                    stream.write_table(dealt.slice(first, last - first))


def _sorted_buckets(scratch: Path, num_buckets: int, *, whole_rows: bool) -> Iterator[pa.Table]:
    """Iterate over the buckets, each ordered by its keys; free their disk space along the way."""
    for number in range(num_buckets):
        path = _bucket_path(scratch, number)
        tables: list[pa.Table] = []
        with path.open("rb") as source:
            size = path.stat().st_size
            while source.tell() < size:
                tables.append(pa.ipc.open_stream(source).read_all())
        path.unlink()
        table = pa.concat_tables(tables)
        order = np.lexsort((table["sample_index"].to_numpy(), table["row_index"].to_numpy()))
        if table.nbytes <= _WIDENED_BYTES:
            yield table.take(pa.array(order))
        else:
            yield from _taken_in_parts(table, order, whole_rows=whole_rows)


def _taken_in_parts(table: pa.Table, order: Int64, *, whole_rows: bool) -> Iterator[pa.Table]:
    """Take the rows of a table in this order, about _BUCKET_BYTES at a time, or as much as a whole row of the input takes;
    fewer where neighbouring rows are far above the mean."""
    wide = table.cast(pa.schema([field.with_type(_widened(field.type)) for field in table.schema], table.schema.metadata))
    row = table["row_index"].to_numpy()[order]
    most = at_once = max(1, _BUCKET_BYTES * len(order) // table.nbytes)
    ends = np.append(np.flatnonzero(_begins(row))[1:], len(order)) if whole_rows else np.arange(1, len(order) + 1)
    begin = 0
    while begin < len(order):
        end = int(ends[min(np.searchsorted(ends, begin + at_once), len(ends) - 1)])
        part = wide.take(pa.array(order[begin:end]))
        if max(sum(map(_largest_offset, column.chunks)) for column in part.columns) > _COLUMN_BYTES:
            if at_once > 1:
                at_once //= 2
                continue
            raise OutputError(
                f"the samples of row {row[begin]} hold more than {_COLUMN_BYTES:,} bytes or entries in one column, which is "
                "more than one record of a row takes. Export without --nested, or fewer columns."
            )
        yield part.cast(table.schema)
        begin, at_once = end, min(most, 2 * at_once)


def _largest_offset(values: pa.Array) -> int:
    """Return the offsets of the texts and lists in an array, at any depth."""
    if isinstance(values, (pa.LargeStringArray, pa.LargeBinaryArray)):
        return pc.call_function("sum", [pc.call_function("binary_length", [values])]).as_py() or 0
    if isinstance(values, pa.LargeListArray):
        entries = values.flatten()
        return max(len(entries), _largest_offset(entries))
    if isinstance(values, pa.StructArray):
        return max(map(_largest_offset, values.flatten()), default=0)
    return 0


def _widened(type_: pa.DataType) -> pa.DataType:
    """Return the type with 64-bit offsets."""
    if pa.types.is_string(type_):
        return pa.large_string()
    if pa.types.is_binary(type_):
        return pa.large_binary()
    if pa.types.is_list(type_):
        return pa.large_list(type_.value_field.with_type(_widened(type_.value_type)))
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(_widened(field.type)) for field in type_])
    return type_


def _write(
    file: BinaryIO,
    suffix: str,
    schema: pa.Schema,
    tables: Iterator[pa.Table],
    restore: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Only JSON Lines can hold values of several kinds in one column, which `restore` makes of JSON text."""
    if suffix == ".jsonl":
        for table in tables:
            write_json_lines(table, file, restore)
        return
    if suffix == ".csv":
        with csv.CSVWriter(file, flatten(schema.empty_table()).schema) as lines:
            for table in tables:
                lines.write_table(flatten(table))
        return
    with pq.ParquetWriter(file, schema, **PARQUET_OPTIONS) as writer:
        for table in tables:
            writer.write_table(table)


def _begins(values: Int64) -> Bool:
    """Return True where a run of equal values begins."""
    begins = np.ones(len(values), dtype=np.bool_)
    begins[1:] = values[1:] != values[:-1]
    return begins


def _bucket_path(scratch: Path, number: int) -> Path:
    return scratch / f"bucket-{number}"
