"""OUT/steps-00000.parquet: the steps of a run as a table of numbers, one file each time the run was started.

They are for plots and profiles, not results: a run that dies leaves none, and nothing reads them to resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tokabatch.data.folder import Claim, OutputFolder
from tokabatch.errors import OutputError

Columns = Mapping[str, npt.NDArray[Any]]


def write_steps(claim: Claim, columns: Columns) -> None:
    """Add the steps of one start: arrays of one length by name."""
    paths = claim.folder.step_paths()
    place = 1 + int(paths[-1].stem.removeprefix("steps-")) if paths else 0
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)), sink, compression="zstd")
    claim.write(claim.folder.path / f"steps-{place:05}.parquet", sink.getvalue().to_pybytes())


def read_steps(folder: OutputFolder) -> Columns | None:
    """The steps of all starts, one after another; None where there are none. Raises OutputError where a file is damaged."""
    paths = folder.step_paths()
    if not paths:
        return None
    try:
        table = pa.concat_tables([pq.read_table(path) for path in paths])
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{folder.path}: the record of steps cannot be read ({error}). Remove steps-*.parquet.") from error
    return {name: np.asarray(table.column(name)) for name in table.column_names}
