"""Parquet files read by the calling thread alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class ParquetFile(pq.ParquetFile):
    """PyArrow's ParquetFile without its threads.

    These may drop the last reference to a Python object (an open file, its bytes) after a read has returned. If the interpreter
    is shutting down by then, they end inside a destructor, and the process aborts ("terminate called without an active
    exception") or hangs.
    """

    def __init__(self, source: Any, *, page_checksum_verification: bool = False) -> None:
        super().__init__(source, pre_buffer=False, page_checksum_verification=page_checksum_verification)

    def read(self, columns: Any = None, use_threads: bool = False, use_pandas_metadata: bool = False) -> pa.Table:
        return super().read(columns, use_threads, use_pandas_metadata)

    def read_row_group(
        self, i: int, columns: Any = None, use_threads: bool = False, use_pandas_metadata: bool = False
    ) -> pa.Table:
        return super().read_row_group(i, columns, use_threads, use_pandas_metadata)

    def iter_batches(
        self,
        batch_size: int = 65536,
        row_groups: Any = None,
        columns: Any = None,
        use_threads: bool = False,
        use_pandas_metadata: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        return super().iter_batches(batch_size, row_groups, columns, use_threads, use_pandas_metadata)
