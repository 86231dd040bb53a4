"""Whole runs in this process with a scripted engine: the reader, the scheduler and the shards are the real ones."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.scripted_engine import QUICKSTART, Script, build_worker, quickstart_script
from tokabatch import Job, run
from tokabatch.engine.executor import Executor, InProcessExecutor
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.forecast import cost_model as pricing
from tokabatch.report.summary import RunSummary
from tokabatch.runner import make_replica
from tokabatch.workload.prepare import Workload

MAX_TOKENS = 6


@contextmanager
def scripted_engine(script: Script | None = None) -> Generator[Script]:
    """Inside, every run's engine is the scripted one."""
    script = script or quickstart_script(slots=64)

    def maker(job: Job, workload: Workload, sizes: ReplicaSizes, *_: object) -> Callable[[], Executor]:
        return partial(InProcessExecutor, (script, sizes), build_worker)

    measured = pricing.present_device("cpu")
    with (
        mock.patch.object(make_replica, "executor_maker", maker),
        mock.patch.object(pricing, "measure_processor", lambda memory: replace(measured, memory=memory)),
    ):
        yield script


def scripted_job(rows: Path | str, out: Path, **sections: Any) -> Job:
    """Two samples a row, prompted by the column `question`."""
    job: dict[str, Any] = {
        "model": {"path": str(QUICKSTART), "dtype": "float32"},
        "input": {"path": str(rows)},
        "prompt": {"template": "{{ question }}"},
        "generation": {"n": 2, "max_tokens": MAX_TOKENS, "temperature": 1.0},
        "engine": {"device": "cpu", "max_running": 16},
        "output": {"path": str(out)},
        "errors": {"max_fraction": 1.0},
    }
    return Job.load({**job, **{name: {**job.get(name, {}), **values} for name, values in sections.items()}})


def scripted_run(rows: Path | str, out: Path, **sections: Any) -> RunSummary:
    """Run such a job to its end."""
    with scripted_engine():
        return run(scripted_job(rows, out, **sections))


def carried(out: Path, name: str) -> pa.ChunkedArray:
    """One column of a finished run's first samples, in the order of the rows; read with PyArrow alone."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted((out / "data").iterdir())])
    order = np.lexsort((table["sample_index"].to_numpy(), table["row_index"].to_numpy()))
    pieces = [table[name].slice(place, 1).chunk(0) for place in order.tolist() if table["sample_index"][place].as_py() == 0]
    return pa.chunked_array([pa.concat_arrays(pieces)])
