"""OUT/steps-00000.parquet: the steps of a run as a table of numbers, one start after another.

They serve plots and profiles and are not results: a run that dies leaves none, and none are read to resume. A file is replaced
by a longer one until it is long enough, so that many starts leave few files; with several writers, each adds a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tokabatch.errors import DamageError, ForeignFileError, OutputError
from tokabatch.output.claim import Claim
from tokabatch.output.folder import OutputFolder
from tokabatch.output.shards import PARQUET_OPTIONS
from tokabatch.storage.atomic_files import NewFile, publish
from tokabatch.storage.listing import Changed, ListedFile
from tokabatch.storage.parquet_file import ParquetFile

_REMEDY = "It holds no results: move it away to do without what it tells."
_STEPS_PER_FILE = 1 << 18
REPLICA = "replica"
"""The column with the number of the step's replica."""
Columns = Mapping[str, npt.NDArray[Any]]


def write_steps(claim: Claim, columns: Columns) -> None:
    """Add the steps of one start: arrays of one length by name."""
    files, table = claim.folder.steps(), pa.table(dict(columns))
    place = int(files[-1].path.stem.removeprefix("steps-")) if files else 0
    if files and claim.files.alone:
        earlier = None
        # A file that cannot be read is kept as it is.
        with suppress(OutputError, Changed):
            earlier = _read(files[-1])
        if earlier is not None and earlier.num_rows < _STEPS_PER_FILE and earlier.schema.equals(table.schema):
            table = pa.concat_tables([earlier, table])
        else:
            place += 1
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **PARQUET_OPTIONS)
    path = claim.folder.path / f"steps-{place:05}.parquet"
    if claim.files.alone:
        claim.write(path, sink.getvalue().to_pybytes())
        return
    with NewFile(claim.files, claim.folder.temporary / path.name) as file:
        file.write(sink.getvalue().to_pybytes())
        file.sync()
    while True:
        with suppress(FileExistsError):
            publish(claim.files, claim.folder.temporary / path.name, claim.folder.path / f"steps-{place:05}.parquet")
            return
        place += 1


def read_steps(folder: OutputFolder) -> Columns | None:
    """Return the steps of all starts, one after another; None if there are none. Raises DamageError if a file is damaged,
    OutputError if it cannot be read, and Changed if it is replaced meanwhile."""
    files = folder.steps()
    if not files:
        return None
    tables = [_read(file) for file in files]
    # Files from before there were several replicas lack the column.
    tables = [
        table
        if REPLICA in table.column_names
        else table.append_column(REPLICA, pa.nulls(len(table), pa.float32()).fill_null(0))
        for table in tables
    ]
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise DamageError(f"{folder.path}: its records of steps differ in their columns ({error}). {_REMEDY}") from error
    return {name: np.asarray(table.column(name)) for name in table.column_names}


def elapsed(columns: Columns) -> npt.NDArray[np.float64]:
    """Return when each step ended, in seconds of stepping, shape [S]: those of several replicas run side by side."""
    ends = np.zeros(len(columns["seconds"]))
    for number in np.unique(columns[REPLICA]):
        own = columns[REPLICA] == number
        ends[own] = np.cumsum(columns["seconds"][own], dtype=np.float64)
    return ends


def _read(file: ListedFile) -> pa.Table:
    if not file.is_file:
        raise ForeignFileError(f"{file.path} is not a file, so no run wrote it. Move it away.")
    try:
        with file.open() as stream, ParquetFile(stream, page_checksum_verification=True) as parquet:
            return parquet.read()
    except (OSError, pa.ArrowException) as error:
        raise DamageError(f"{file.path} is damaged ({error}). {_REMEDY}") from error
