"""The input's columns, kept on disk in row order, so that output rows can carry them.

Rows of a typed source are kept as Arrow batches; rows of JSON Lines as their text, typed when they are read back. A row that
could not be parsed has nulls. Independent of prompts and of the output format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from tokabatch.arrays import Int64
from tokabatch.errors import InputError
from tokabatch.input.files.arrow_types import row_bytes
from tokabatch.input.rows import RowBatch
from tokabatch.input.store.disk_arrays import ArraySpool, Texts, TextSpool, open_array
from tokabatch.input.store.json_types import JSON_TEXTS_KEY, JsonType

MAX_COLUMNS = 4096
_TYPES, _STARTS = "types", "starts"


class Columns(Protocol):
    """Columns that can be read back."""

    @property
    def schema(self) -> pa.Schema: ...
    def take(self, rows: Int64, names: Sequence[str]) -> pa.Table:
        """Return the named columns of ascending, distinct rows; nulls for a column that no row has. Without names, a table
        without rows."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what `restore_columns` needs besides the files, as plain JSON values."""
        ...

    def row_bytes(self, rows: Int64) -> Int64:
        """Return an upper bound of the memory that each of these rows takes, in any order, shape [rows]."""
        ...

    def close(self) -> None: ...


class ColumnSpool(Protocol):
    """Columns being written."""

    def append(self, batch: RowBatch) -> None: ...
    def finish(self) -> Columns: ...


def open_column_spool(path: Path, schema: pa.Schema | None, names: Sequence[str], *, others: bool) -> ColumnSpool:
    """Open a spool for the named columns, and for all others if `others`, of a source with this schema; None for JSON."""
    if schema is None:
        return JsonColumnSpool(path.with_suffix(".jsonl"), names, others)
    return ArrowColumnSpool(path.with_suffix(".arrow"), schema, None if others else names)


def restore_columns(path: Path, state: Mapping[str, Any]) -> Columns:
    """Reopen the columns of a finished spool at `path`."""
    if (types := state.get(_TYPES)) is not None:
        texts = Texts.open(path.with_suffix(".jsonl"))
        return JsonColumns(texts, {name: JsonType.restored(kind) for name, kind in types.items()})
    sizes = open_array(path.with_suffix(".sizes"), np.int64)
    return ArrowColumns(path.with_suffix(".arrow"), np.asarray(state[_STARTS], dtype=np.int64), sizes)


class ArrowColumnSpool:
    """Writes one Arrow IPC file."""

    def __init__(self, path: Path, schema: pa.Schema, names: Sequence[str] | None) -> None:
        self._path = path
        self._names = [name for name in schema.names if names is None or name in names]
        self._schema = pa.schema([schema.field(name) for name in self._names])
        self._writer = ipc.new_file(str(path), self._schema)
        self._sizes = ArraySpool(path.with_suffix(".sizes"), np.int64)
        self._starts = [0]

    def append(self, batch: RowBatch) -> None:
        assert batch.table is not None
        kept = batch.table.select(self._names)
        self._writer.write_batch(kept)
        self._sizes.append(sum((row_bytes(column) for column in kept.columns), np.zeros(kept.num_rows, np.int64)))
        self._starts.append(self._starts[-1] + batch.table.num_rows)

    def finish(self) -> Columns:
        self._writer.close()
        return ArrowColumns(self._path, np.asarray(self._starts, dtype=np.int64), self._sizes.finish())


class ArrowColumns:
    """Reads single batches through a memory map."""

    def __init__(self, path: Path, starts: Int64, sizes: Int64) -> None:
        """`starts` holds the first row of each batch, followed by the number of rows; `sizes` the memory of each row."""
        self._sizes = sizes
        self._source = pa.memory_map(str(path))
        self._file = ipc.open_file(self._source)
        self.schema = self._file.schema
        self._starts = starts

    def take(self, rows: Int64, names: Sequence[str]) -> pa.Table:
        if not names:
            return pa.table({})
        batch_of = np.searchsorted(self._starts, rows, side="right") - 1
        touched, first = np.unique(batch_of, return_index=True)
        bounds = [*first.tolist(), len(rows)]
        pieces: list[pa.RecordBatch] = []
        for position, number in enumerate(touched.tolist()):
            inside = rows[bounds[position] : bounds[position + 1]] - self._starts[number]
            pieces.append(self._file.get_batch(number).select(list(names)).take(pa.array(inside)))
        schema = pa.schema([self.schema.field(name) for name in names])
        return pa.Table.from_batches(pieces, schema=schema)

    def state(self) -> dict[str, Any]:
        return {_STARTS: self._starts.tolist()}

    def row_bytes(self, rows: Int64) -> Int64:
        return self._sizes[rows]

    def close(self) -> None:
        self._source.close()


class JsonColumnSpool:
    """Writes the rows' text and infers the types of their columns."""

    def __init__(self, path: Path, names: Sequence[str], others: bool) -> None:
        self._texts = TextSpool(path)
        self._wanted = frozenset(names)
        self._others = others
        self._types: dict[str, JsonType] = {}

    def append(self, batch: RowBatch) -> None:
        self._texts.append(batch.texts)
        for row in batch.rows:
            if row.columns is None:
                continue
            for name, value in row.columns.items():
                known = self._types.get(name)
                if known is None:
                    if not self._others and name not in self._wanted:
                        continue
                    if len(self._types) >= MAX_COLUMNS:
                        raise InputError(
                            f"the rows have more than {MAX_COLUMNS} different keys; set output.columns to those that the "
                            "output needs, or nest the others in one object"
                        )
                    known = self._types[name] = JsonType()
                known.add(value)

    def finish(self) -> Columns:
        # A requested column exists even if no row could be read.
        for name in sorted(self._wanted):
            self._types.setdefault(name, JsonType())
        return JsonColumns(self._texts.finish(), self._types)


class JsonColumns:
    """Parses requested rows."""

    def __init__(self, texts: Texts, types: dict[str, JsonType]) -> None:
        self._texts = texts
        self._types = types
        self._encoders = {name: kind.encoder() for name, kind in types.items()}
        places = [place for name, kind in types.items() for place in kind.json_texts((name,))]
        metadata = {JSON_TEXTS_KEY: json.dumps(places)} if places else None
        self.schema = pa.schema([self._field(name) for name in types], metadata)

    def take(self, rows: Int64, names: Sequence[str]) -> pa.Table:
        if not names:
            return pa.table({})
        parsed = [self._row(row) for row in rows.tolist()]
        fields = [self._field(name) for name in names]
        arrays: list[pa.Array[Any]] = []
        for field in fields:
            values = [row.get(field.name) for row in parsed]
            encode = self._encoders.get(field.name)
            arrays.append(pa.array([encode(value) for value in values] if encode else values, type=field.type))
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def state(self) -> dict[str, Any]:
        return {_TYPES: {name: kind.state() for name, kind in self._types.items()}}

    def row_bytes(self, rows: Int64) -> Int64:
        lengths = self._texts.offsets[rows + 1] - self._texts.offsets[rows]
        growth = max((kind.growth() for kind in self._types.values()), default=1)
        return lengths * growth + sum(kind.fixed_bytes() for kind in self._types.values())

    def _field(self, name: str) -> pa.Field[Any]:
        return pa.field(name, self._types.get(name, JsonType()).arrow())

    def close(self) -> None:
        """Do nothing: only memory maps are open, which are released with this object."""

    def _row(self, row: int) -> dict[str, Any]:
        text = self._texts.get(row)
        return cast("dict[str, Any]", json.loads(text)) if text else {}
