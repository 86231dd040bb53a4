"""A workload as a tokabatch job: its input file, the job around it, and the check of what came out.

The samples of a prompt that have the same output length are one row, with n and max_tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.workloads import Workload

PROMPT, TOKENS, PARAMS = "prompt_index", "prompt_token_ids", "sampling_params"
ROW_GROUP = 2048


def write_input(workload: Workload, file: Path) -> int:
    """One row for each prompt and output length. Returns the number of rows."""
    groups = list(workload.groups())
    params = [{"n": group.samples, "max_tokens": group.output_length} for group in groups]
    tokens: pa.Array[Any] = pa.array([workload.prompts[group.prompt] for group in groups], pa.list_(pa.int32()))
    struct = pa.struct([("n", pa.int64()), ("max_tokens", pa.int64())])
    prompts = pa.array([group.prompt for group in groups], pa.int64())
    table = pa.table({PROMPT: prompts, TOKENS: tokens, PARAMS: pa.array(params, struct)})
    pq.write_table(table, file, row_group_size=ROW_GROUP, compression="zstd")
    return len(groups)


def job(model: Path, source: Path, output: Path, workload: Workload) -> dict[str, Any]:
    """The job that completes `source`; engine settings are tokabatch's own, the worker a process of its own everywhere."""
    return {
        "model": {"path": str(model)},
        "input": {"path": str(source)},
        "prompt": {"token_ids": TOKENS},
        "generation": {"temperature": workload.temperature, "ignore_eos": True, "seed": workload.seed},
        "engine": {"process": True},
        "output": {"path": str(output), "columns": [PROMPT]},
    }


def check_output(output: Path, workload: Workload) -> None:
    """Check that every sample is there with its length. Raises ValueError otherwise: the figures would mean nothing."""
    files = sorted((output / "data").glob("part-*.parquet"))
    columns: Sequence[str] = (PROMPT, "status", "num_output_tokens")
    table = pa.concat_tables([pq.read_table(file, columns=list(columns)) for file in files])
    bad = [status for status in table.column("status").to_pylist() if status != "ok"]
    if bad:
        raise ValueError(f"{len(bad)} samples are not ok (the first: {bad[0]})")
    prompt, length = (table.column(name).to_numpy() for name in (PROMPT, "num_output_tokens"))
    order = np.lexsort((length, prompt))
    wanted = np.sort(workload.output_length_PN, axis=1).reshape(-1)
    if len(length) != len(wanted) or (length[order] != wanted).any():
        raise ValueError(f"{len(length)} samples of {int(length.sum())} tokens, not {len(wanted)} of {int(wanted.sum())}")
