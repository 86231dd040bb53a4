"""Rows that stop: which samples are cancelled follows from the samples alone, whatever computes them and however often it is
stopped, and everything that counts samples counts them."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from support import tiny_models
from support.forked_runs import ForkServer
from support.scripted_run import scripted_engine, scripted_job, scripted_run

from tokabatch import Job, run
from tokabatch.output.integrity import check

ROWS, SAMPLES = 9, 24
JUDGE = '''
import hashlib, time
COLUMNS = {"extracted": str}
def verify(text, row):
    """Right in about one sample of five by its text, and as slow as that says."""
    number = int(hashlib.sha256((text + row["question"]).encode()).hexdigest(), 16)
    time.sleep(number % 7 / 2000)
    return {"score": number % 5 == 0, "extracted": str(number % 3) if number % 4 else None}
'''
RULES = [{"after_correct": 1}, {"after_correct": 3}, {"majority": 3}]
Samples = dict[tuple[int, int], tuple[str, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the rows and the judge."""
    folder = tmp_path_factory.mktemp("stops")
    (folder / "judge.py").write_text(JUDGE)
    rows = [{"question": f"Say {i} and {i % 3}"} for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.close()


def verify(folder: Path, rule: dict[str, int] | None) -> dict[str, Any]:
    return {"kind": str(folder / "judge.py"), "processes": 2, **({} if rule is None else {"stop": rule})}


def scripted(folder: Path, out: Path, rule: dict[str, int] | None, **engine: Any) -> dict[str, Any]:
    """Sections for `scripted_job`."""
    return {
        "generation": {"n": SAMPLES},
        "engine": {"max_running": 16, **engine},
        "output": {"path": str(out), "flush_seconds": 0.05},
        "verify": verify(folder, rule),
    }


def shards(out: Path) -> list[Path]:
    return list((out / "data").glob("*.parquet"))


def samples(out: Path) -> Samples:
    """What a sample is, whatever it shared its steps with."""
    names = ["status", "text", "token_ids", "finish_reason", "num_prompt_tokens", "error_code", "correct", "extracted"]
    columns = ["row_index", "sample_index", *names]
    rows = [row for shard in shards(out) for row in pq.read_table(shard, columns=columns).to_pylist()]
    assert len({(row["row_index"], row["sample_index"]) for row in rows}) == len(rows)
    return {(row["row_index"], row["sample_index"]): tuple(str(row[name]) for name in names) for row in rows}


def stopped(full: Samples, rule: dict[str, int]) -> Samples:
    """What a rule leaves of a run of all samples."""
    left: Samples = {}
    for row in range(ROWS):
        done, right, votes = False, 0, Counter[str]()
        for number in range(SAMPLES):
            left[row, number] = ("cancelled", *["None"] * 7) if done else full[row, number]
            correct, answer = full[row, number][-2:]
            right += correct == "True"
            votes[answer] += answer != "None"
            done = done or right == rule.get("after_correct") or max(votes.values()) == rule.get("majority")
    return left


def differing(out: Path, expected: Samples) -> list[tuple[int, int]]:
    found = samples(out)
    return [key for key in sorted(expected.keys() | found.keys()) if found.get(key) != expected.get(key)][:8]


@pytest.fixture(scope="module")
def full(folder: Path) -> Samples:
    """Every sample of the scripted engine."""
    with scripted_engine():
        out = folder / "full"
        assert scripted_run(folder / "rows.jsonl", out, **scripted(folder, out, None)).exit_code == 0
    return samples(out)


def test_the_same_samples_on_any_engine(folder: Path, tmp_path: Path) -> None:
    """A real model in float64: in this process, in two, and two replicas that share the rows."""
    model = tiny_models.add_tokenizer(tiny_models.build("llama", tmp_path / "llama"))

    def computed(name: str, rule: dict[str, int] | None, **engine: Any) -> tuple[Path, Any]:
        job = {
            "model": {"path": str(model), "dtype": "float64"},
            "input": {"path": str(folder / "rows.jsonl")},
            "prompt": {"template": "One header for all of them.\nQ: {{ question }}\nA:"},
            "generation": {"n": SAMPLES, "max_tokens": 12, "seed": 3, "temperature": 1.0},
            "engine": {"device": "cpu", "hydragen_min_group": 2, **engine},
            "output": {"path": str(tmp_path / name)},
            "verify": verify(folder, rule),
        }
        return tmp_path / name, run(Job.load(job))

    out, summary = computed("full", None, max_running=64)
    expected = stopped(samples(out), RULES[0])
    cancelled = sum(sample[0] == "cancelled" for sample in expected.values())
    assert 0 < cancelled < len(expected) and summary.output_tokens > 0
    for engine in ({"max_running": 12, "kv_cache_tokens": 300}, {"max_running": 5, "process": True}, {"replicas": 2}):
        out, found = computed(str(engine), RULES[0], **engine)
        assert (found.exit_code, found.cancelled, found.pending) == (0, cancelled, 0), engine
        assert not differing(out, expected), engine
        assert found.output_tokens < summary.output_tokens, "running samples were not stopped"


@pytest.mark.parametrize("rule", RULES)
def test_the_same_samples_after_kills(
    folder: Path, server: ForkServer, full: Samples, rule: dict[str, int], tmp_path: Path
) -> None:
    """kill -9 once some of the rows are committed, resumed with other limits each time; in this process and by two replicas."""
    expected, chance = stopped(full, rule), random.Random(str(rule))
    for replicas in (1, 2):
        out, partly = tmp_path / str(replicas), 0
        for attempt in range(4):
            sections = scripted(folder, out, rule, max_running=chance.choice((3, 16, 40)), replicas=replicas)
            job = scripted_job(folder / "rows.jsonl", out, **sections).given()
            before = len(shards(out))
            if attempt == 3:
                assert server.run(job, apart=replicas > 1).code == 0
                break
            pid = server.start(job, apart=replicas > 1, step_seconds=0.01)
            while psutil.pid_exists(pid) and len(shards(out)) <= before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.1))
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            server.wait()
            found = samples(out)
            partly += 0 < len(found) < len(expected)
            assert not [key for key, sample in found.items() if expected[key] != sample], "a sample is there that goes"
        assert partly and not differing(out, expected)
        assert check(out).exit_code == 0
