"""64-bit digests of each row of the input and of its prompt, kept beside the shards as OUT/row_digests.parquet.

They let a run continue only if the rows that it has sampled, and their prompts, are unchanged, name the first row that differs,
and allow a row that was never sampled to be replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tokabatch.input.rows import RowBatch
from tokabatch.input.store.disk_arrays import ArraySpool, open_array
from tokabatch.storage.atomic_files import DurableFiles
from tokabatch.storage.listing import read_bytes
from tokabatch.storage.parquet_file import ParquetFile

UInt64 = npt.NDArray[np.uint64]
_CONTENT, _PROMPT = "content", "prompt"
_CONTENT_FILE, _PROMPT_FILE = "content_digests.bin", "prompt_digests.bin"
_BYTES = 8


@dataclass(frozen=True, slots=True)
class RowDigests:
    """Digests of each row's content and of its prompt's token ids, arrays of shape [rows]."""

    content: UInt64
    prompt: UInt64

    @classmethod
    def open(cls, folder: Path) -> RowDigests:
        """Open the digests of a finished spool in `folder`."""
        return cls(open_array(folder / _CONTENT_FILE, np.uint64), open_array(folder / _PROMPT_FILE, np.uint64))

    def __len__(self) -> int:
        return len(self.content)

    def head(self, rows: int) -> RowDigests:
        """Return the digests of the first `rows` rows."""
        return RowDigests(self.content[:rows], self.prompt[:rows])

    @property
    def content_sha256(self) -> str:
        """One digest of all rows, in hexadecimal."""
        return hashlib.sha256(self.content.tobytes()).hexdigest()

    @property
    def prompt_sha256(self) -> str:
        """One digest of all prompts, in hexadecimal."""
        return hashlib.sha256(self.prompt.tobytes()).hexdigest()

    def to_parquet(self) -> bytes:
        """Return the content of a Parquet file whose pages have checksums."""
        sink = pa.BufferOutputStream()
        table = pa.table({_CONTENT: self.content, _PROMPT: self.prompt})
        pq.write_table(table, sink, compression="none", use_dictionary=False, write_page_checksum=True)
        return sink.getvalue().to_pybytes()

    @classmethod
    def read(cls, path: Path) -> RowDigests | None:
        """Read what `to_parquet` wrote; None if the file is missing or damaged. Raises OutputError if it cannot be read."""
        content = read_bytes(DurableFiles(), path)
        if content is None:
            return None
        try:
            with ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
                table = file.read()
            return cls(table[_CONTENT].to_numpy(), table[_PROMPT].to_numpy())
        except (OSError, KeyError, pa.ArrowException):
            return None


class DigestSpool:
    """Digests rows as they stream by. A row is its content: the text of a JSON line, the values of an Arrow row whatever its
    columns' types, the error code of a row that could not be read."""

    def __init__(self, folder: Path) -> None:
        self._content = ArraySpool(folder / _CONTENT_FILE, np.uint64)
        self._prompt = ArraySpool(folder / _PROMPT_FILE, np.uint64)

    def append(self, batch: RowBatch, prompts: Sequence[npt.NDArray[np.int32] | None]) -> None:
        """Add a batch; `prompts` are the token ids of each row, None for a row without a prompt."""
        faults = [b"" if row.error is None else row.error.code.encode() for row in batch.rows]
        values = batch.texts if batch.table is None else _values(batch.table)
        self._content.append(digest_each(value + fault for value, fault in zip(values, faults, strict=True)))
        self._prompt.append(digest_each(b"" if ids is None else ids.tobytes() for ids in prompts))

    def finish(self) -> RowDigests:
        return RowDigests(self._content.finish(), self._prompt.finish())


def digest_each(contents: Iterable[bytes]) -> UInt64:
    """Return 64 bits of BLAKE2b for each byte string."""
    digests = b"".join(blake2b(content, digest_size=_BYTES).digest() for content in contents)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64, copy=False)


def _values(table: pa.RecordBatch) -> list[bytes]:
    """Return the content of each row, independent of the rows around it."""
    columns = sorted((field.name, _is_plain(field.type)) for field in table.schema)
    try:
        return [
            repr({name: row[name] if plain else _plain(row[name]) for name, plain in columns if row[name] is not None}).encode(
                errors="surrogatepass"
            )
            for row in table.to_pylist()
        ]
    except Exception:  # a value that Python does not have, such as a date after the year 9999
        rows = [table.slice(row, 1) for row in range(table.num_rows)]
        return [_values(row)[0] for row in rows] if len(rows) != 1 else [table.take(pa.array([0])).serialize().to_pybytes()]


def _is_plain(kind: pa.DataType) -> bool:
    """Return whether `_plain` would return every value of this type as it is, such as millions of token ids."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_plain(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)


def _plain(value: Any) -> Any:
    """Return a value in a form that is the same in every type it fits: further files may widen a column's type or add
    fields."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: _plain(fields[name]) for name in sorted(fields) if fields[name] is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else value.normalize()
    return value.isoformat() if isinstance(value, datetime | date) else value
