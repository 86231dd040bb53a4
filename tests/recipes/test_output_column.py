"""The recipe of an output column: a field of the schema and how its values come about, in one file."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import tiny_models
from support.edited_package import EditedPackage

from tokabatch import Job, run


def test_a_column_is_one_file(tmp_path):
    package = EditedPackage(tmp_path / "edited")
    package.edit(
        "output/schema.py",
        '        pa.field("logprobs", pa.list_(_TOKEN_LOGPROBS)),\n',
        '        pa.field("logprobs", pa.list_(_TOKEN_LOGPROBS)),\n        pa.field("least_logprob", pa.float32()),\n',
    )
    package.edit(
        "output/schema.py",
        '        "logprobs": lambda: _logprob_column(completions, nulls),\n',
        '        "logprobs": lambda: _logprob_column(completions, nulls),\n'
        '        "least_logprob": lambda: of_good([None if c.logprobs is None else c.logprobs.min() for c in completions]),\n',
    )
    assert package.changed == {"output/schema.py"}
    job = write_job(tmp_path)
    done = package.run(job)
    assert done.returncode == 0, done.stderr
    (shard,) = (tmp_path / "out" / "data").glob("*.parquet")
    table = pq.read_table(shard)
    assert table.schema.field("least_logprob").type == pa.float32()
    for sample in table.to_pylist():
        least = None if sample["status"] == "error" else min(token["logprob"] for token in sample["logprobs"])
        assert sample["least_logprob"] == (None if least is None else pytest.approx(least))
    assert sorted(table["status"].to_pylist()) == ["error", "ok", "ok"]


def test_a_number_that_is_counted_while_a_sample_runs_is_three_files(tmp_path):
    package = EditedPackage(tmp_path / "edited")
    package.edit("scheduling/contracts.py", "    cached_tokens: Count\n", "    steps: Count\n    cached_tokens: Count\n")
    field = "        slots.computed[run_slot] = step.run_start + step.run_length\n"
    package.edit("scheduling/kv/manager.py", field, field + "        slots.sample_counts.steps[run_slot] += 1\n")
    field = '        pa.field("num_output_tokens", pa.int32()),\n'
    package.edit("output/schema.py", field, field + '        pa.field("num_steps", pa.int32()),\n')
    values = '        "id": lambda: ids,\n'
    package.edit(
        "output/schema.py", values, values + '        "num_steps": lambda: of_all([c.counts.steps for c in completions]),\n'
    )
    assert len(package.changed) == 3
    job = write_job(tmp_path, n=3)
    done = package.run(job)
    assert done.returncode == 0, done.stderr
    (shard,) = (tmp_path / "out" / "data").glob("*.parquet")
    samples = [sample for sample in pq.read_table(shard).to_pylist() if sample["status"] == "ok"]
    assert len(samples) == 6
    for sample in samples:
        # With one step in flight none is begun for a sample that has ended; the first step computes the prompt as well.
        assert sample["num_steps"] == sample["num_output_tokens"] > 0


def test_a_run_without_the_column_is_not_continued_with_it(tmp_path):
    job = write_job(tmp_path)
    run(Job.load(job))
    package, schema = EditedPackage(tmp_path / "edited"), "output/schema.py"
    field, values = '        pa.field("stop_reason", pa.string()),\n', '        "id": lambda: ids,\n'
    package.edit(schema, field, field + '        pa.field("found_by", pa.string()),\n')
    package.edit(schema, values, values + '        "found_by": lambda: of_all(texts),\n')
    done = package.run(job)
    assert done.returncode == 2 and "found_by (absent there, string now)" in " ".join(done.stderr.split()), done.stderr


def write_job(folder: Path, n: int = 1) -> Path:
    """Two rows and a broken one."""
    model = tiny_models.add_tokenizer(tiny_models.build("llama", folder / "model"))
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "What is 1+1?"}\n{"prompt": "Say"}\n{"prompt": 5}\n')
    job = {
        "model": {"path": str(model), "dtype": "float64"},
        "input": {"path": str(rows)},
        "generation": {"n": n, "max_tokens": 8, "logprobs": 0, "seed": 1},
        "engine": {"device": "cpu", "queue_depth": 1},
        "errors": {"max_fraction": 1.0},
        "output": {"path": str(folder / "out")},
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    return folder / "job.yaml"
