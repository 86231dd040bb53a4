"""Verdicts read back from shards, error rows and samples without a verdict among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.shards import write_rows

from tokabatch.output.claim import Claim
from tokabatch.output.folder import OutputFolder
from tokabatch.output.schema import output_schema, verdict_fields
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.output.stored_verdicts import read_verdicts


def written(out: Path, shards: list[list[dict[str, Any]]], **columns: str) -> OutputFolder:
    schema = output_schema(pa.schema([("extracted", pa.string())] if not columns else []), verdicts=())
    if columns:
        schema = output_schema(pa.schema([]), verdicts=verdict_fields(columns))
    with Claim(out) as claim:
        writer = ShardWriter(claim, schema, rows_per_shard=100, flush_seconds=1e9)
        for rows in shards:
            samples = [{"sample_index": 0, "status": "ok", **row} for row in rows]
            write_rows(writer, pa.Table.from_pylist(samples, schema=schema))
            writer.commit()
    return OutputFolder(out)


def test_every_sample_is_a_few_numbers(tmp_path: Path) -> None:
    first = [
        {"row_index": 0, "correct": True, "verify_score": 0.75, "extracted": "7", "cumulative_logprob": -1.5},
        {"row_index": 1, "correct": False, "verify_score": 0.25, "extracted": "8", "cumulative_logprob": -2.0},
    ]
    second = [
        {"row_index": 1, "correct": None, "verify_error": "hangs", "cumulative_logprob": -3.0},
        {"row_index": 2, "status": "error", "error_code": "bad_json", "error_message": ""},
        {"row_index": 0, "correct": True, "verify_score": 1.0, "extracted": "7", "cumulative_logprob": -0.5},
    ]
    found = read_verdicts(written(tmp_path / "out", [first, second], extracted="string").shards())
    assert found is not None
    assert found["row"].tolist() == [0, 1, 1, 2, 0]
    assert found["correct"].tolist() == [True, False, False, False, True]
    assert found["verdict"].tolist() == [True, True, False, False, True]
    assert found["score"].tolist() == [0.75, 0.25, 0.0, 0.0, 1.0]
    assert found["logprob"].tolist() == [-1.5, -2.0, -3.0, -np.inf, -0.5]
    answer = found["answer"].tolist()
    assert answer[0] == answer[4] != answer[1] and answer[2] == answer[3] == -1


def test_without_logprobs_and_answers(tmp_path: Path) -> None:
    rows = [[{"row_index": 0, "correct": True, "verify_score": 1.0, "cumulative_logprob": None}]]
    found = read_verdicts(written(tmp_path / "out", rows, length="int64").shards())
    assert found is not None and np.isnan(found["logprob"]).all() and found["answer"].tolist() == [-1]


@pytest.mark.parametrize("shards", [[], [[{"row_index": 0, "extracted": "a column of the input"}]]])
def test_a_run_that_is_not_judged_has_none(shards: list[list[dict[str, Any]]], tmp_path: Path) -> None:
    assert read_verdicts(written(tmp_path / "out", shards).shards()) is None
