"""Whole runs of several replicas on the CPU: the rows are those of one replica, whatever number an earlier start had, the
summary has each one's share, and signals reach every process once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from support import tiny_models
from support.processes import started_with

from tokabatch import Job, run
from tokabatch.report.progress import NullProgress, ProgressSnapshot
from tokabatch.report.render import plain
from tokabatch.report.summary import run_sections
from tokabatch.runner.interruption import Interruption

ROOT = Path(__file__).parents[2]
KINDS = [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95}, {"temperature": 1.0, "n": 9}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    each = [{"question": f"Say {i} and {i % 3}", "sampling_params": KINDS[i % 3]} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in each))
    return file


def job(model: Path, rows: Path, out: Path, **engine: Any) -> Job:
    """Greedy and sampled rows under one header, whose samples do not all fit the cache at once."""
    return Job.load(
        {
            "model": {"path": str(model), "dtype": "float64"},
            "input": {"path": str(rows)},
            "prompt": {"template": "One header for all of them.\nQ: {{ question }}\nA:"},
            "generation": {"n": 4, "max_tokens": 40, "seed": 3},
            "engine": {"device": "cpu", "max_running": 12, "hydragen_min_group": 2, "kv_cache_tokens": 300, **engine},
            "output": {"path": str(out)},
        }
    )


def table(out: Path) -> list[tuple[Any, ...]]:
    names = ["row_index", "sample_index", "status", "token_ids", "text", "finish_reason", "num_prompt_tokens"]
    samples = [row for shard in (out / "data").glob("*.parquet") for row in pq.read_table(shard, columns=names).to_pylist()]
    return sorted(tuple(map(str, row.values())) for row in samples)


@pytest.fixture(scope="module")
def calm(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    out = tmp_path_factory.mktemp("calm")
    summary = run(job(model, rows, out / "out"))
    assert summary.exit_code == 0 and not summary.replicas
    return table(out / "out")


class StopAt(NullProgress):
    """Requests a stop once this many samples are done."""

    interval = 0.0

    def __init__(self, samples: int) -> None:
        self.samples, self.stop = samples, Interruption()

    def update(self, snapshot: ProgressSnapshot) -> None:
        if snapshot.phase == "generating" and snapshot.samples_done >= self.samples:
            self.stop.request(75)


def test_the_rows_are_those_of_one_replica_and_each_has_its_share(model, rows, tmp_path, calm):
    summary = run(job(model, rows, tmp_path / "out", replicas=2))
    assert table(tmp_path / "out") == calm
    assert summary.exit_code == 0 and "2 replicas" in summary.layout
    assert len(summary.replicas) == 2 and sum(share.samples for share in summary.replicas) == len(calm)
    shown = plain(run_sections(summary))
    assert "idle in the last tenth" in shown and f"{summary.replicas[1].samples:,}" in shown
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [share["samples"] for share in written["this_start"]["replicas"]] == [share.samples for share in summary.replicas]


def test_a_run_continues_with_another_number_of_replicas(model, rows, tmp_path, calm):
    done = [0]
    for replicas, samples in ((1, 15), (3, 40), (1, len(calm) + 1)):
        progress = StopAt(samples)
        summary = run(job(model, rows, tmp_path / "out", replicas=replicas), progress, progress.stop)
        done.append(summary.ok)
    assert done == sorted(done) and done[-1] == len(calm) and summary.exit_code == 0
    assert table(tmp_path / "out") == calm


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_stops_the_run_once_and_leaves_none(model, rows, tmp_path, number):
    file = tmp_path / "job.json"
    given = job(model, rows, tmp_path / "out", replicas=2, max_running=2, kv_cache_tokens=2000).given()
    given["generation"] |= {"max_tokens": 400, "ignore_eos": True, "n": 60}
    given["input"]["limit"] = 3
    file.write_text(json.dumps(given))
    command = [sys.executable, "-m", "tokabatch", "run", str(file), "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    deadline, family = time.monotonic() + 60, []
    while len(family) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
    time.sleep(2.0)
    family = psutil.Process(process.pid).children(recursive=True)
    assert not started_with("spawn_main", family), "workers are forked, which imports nothing"
    names = [each.name() for each in family]
    assert {"toka-forks", "toka-replica-0", "toka-replica-1"} <= set(names) and names.count("toka-worker") == 2
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 75), told
    assert told.count("stopping") == 1 and "Traceback" not in told
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert len(gone) >= 4 and not alive
