"""Rows that stop: which samples are cancelled follows from the samples alone, whatever computes them and however often it is
stopped, and everything that counts samples counts them."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import tiny_models
from support.forked_runs import ForkServer
from support.scripted_run import scripted_engine, scripted_job, scripted_run

from tokabatch import Job, run
from tokabatch.errors import EXIT_INTERRUPTED, EXIT_STALLED, EXIT_STOPPED, JobError, OutputError
from tokabatch.input.store.tokenized_input import InputStore
from tokabatch.output import folder as folder_module
from tokabatch.output.export import Selection, Where, export
from tokabatch.output.integrity import check
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.output.status import read_status
from tokabatch.report.progress import NullProgress, ProgressSnapshot
from tokabatch.report.review import write_report
from tokabatch.report.summary import run_sections
from tokabatch.runner import judging
from tokabatch.runner.plan import plan
from tokabatch.runner.recorder import Recorder
from tokabatch.runner.row_stops import RowStops
from tokabatch.runner.score import score, score_to
from tokabatch.runner.shared import Shared
from tokabatch.scheduling.contracts import Completion, Drawn
from tokabatch.scheduling.scheduler import Scheduler
from tokabatch.scoring.early_stopping import Outcome, StopRule
from tokabatch.storage.atomic_files import DurableFiles

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

    shown: list[ProgressSnapshot] = []

    class Display(NullProgress):
        interval = 0.0

        def update(self, snapshot: ProgressSnapshot) -> None:
            shown.append(snapshot)

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
        return tmp_path / name, run(Job.load(job), Display())

    out, summary = computed("full", None, max_running=64)
    expected = stopped(samples(out), RULES[0])
    cancelled = sum(sample[0] == "cancelled" for sample in expected.values())
    assert 0 < cancelled < len(expected) and summary.output_tokens > 0
    for engine in ({"max_running": 12, "kv_cache_tokens": 300}, {"max_running": 5, "process": True}, {"replicas": 2}):
        out, found = computed(str(engine), RULES[0], **engine)
        assert (found.exit_code, found.cancelled, found.pending) == (0, cancelled, 0), engine
        assert not differing(out, expected), engine
        assert found.output_tokens < summary.output_tokens, "running samples were not stopped"
        assert shown[-1].samples_done == shown[-1].samples_total == ROWS * SAMPLES, engine


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


def test_verdicts_are_collected_however_often_an_idle_run_looks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that can begin nothing before they are there calls the recorder every 10 ms."""
    now, asked = 0.0, list[bool]()

    def tables(received: int, *, everything: bool) -> Iterator[pa.Table]:
        asked.append(everything)
        return iter(())

    monkeypatch.setattr("tokabatch.runner.recorder.time", mock.Mock(monotonic=lambda: now))
    recorder = object.__new__(Recorder)
    vars(recorder).update(
        _claim=mock.MagicMock(),
        _stops=mock.Mock(),
        _follow_at=0.0,
        _oldest=None,
        _num_samples=ROWS,
        _waiting=mock.MagicMock(received=0),
        _preparers=None,
        _preparing=mock.Mock(num_waiting=1, tables=tables),
        writer=mock.Mock(num_rows=0, **{"nears_end.return_value": False, "is_due.return_value": False}),
    )
    for _ in range(10):
        recorder.add([])
        now += 0.01
    assert 3 <= asked.count(True) <= 6, asked


def test_a_sample_is_written_before_those_that_it_cancels(
    folder: Path, full: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece may be on disk before the next one is, and a sample that is lost may come out otherwise the second time."""
    written: dict[tuple[int, int], str] = {}
    take = ShardWriter.take

    def spied(self: ShardWriter, table: pa.Table) -> None:
        rows = table.select(["row_index", "sample_index", "status"]).to_pylist()
        written.update({(row["row_index"], row["sample_index"]): row["status"] for row in rows})
        for row in rows:
            if row["status"] == "cancelled":
                front = [written.get((row["row_index"], number)) for number in range(row["sample_index"])]
                assert "ok" in front and "error" not in front, "cancelled before the sample that stopped the row"
                assert None not in front[: front.index("cancelled") if "cancelled" in front else None]
        take(self, table)

    monkeypatch.setattr(ShardWriter, "take", spied)
    out = tmp_path / "out"
    assert scripted_run(folder / "rows.jsonl", out, **scripted(folder, out, RULES[0])).exit_code == 0
    assert not differing(out, stopped(full, RULES[0])) and "cancelled" in written.values()


def test_a_sample_that_cannot_be_written_stops_its_row_after_a_crash_too(
    folder: Path, full: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verdict stays in the error row that it becomes; the crash comes before the samples that it cancels are on disk."""
    out, expected = tmp_path / "out", stopped(full, RULES[0])
    row = next(row for row in range(ROWS) if expected[row, SAMPLES - 1][0] == "cancelled")
    stop = max(number for number in range(SAMPLES) if expected[row, number][0] == "ok")
    columns, take = InputStore.columns, ShardWriter.take

    def fails(self: InputStore, rows: Any, names: Any) -> pa.Table:
        if row in rows.tolist() and "question" in names:
            raise pa.ArrowInvalid("offset overflow")
        return columns(self, rows, names)

    def dies(self: ShardWriter, table: pa.Table) -> None:
        if "cancelled" in table["status"].to_pylist():
            raise MemoryError
        take(self, table)

    monkeypatch.setattr(InputStore, "columns", fails)
    with monkeypatch.context() as crash:
        crash.setattr(ShardWriter, "take", dies)
        with pytest.raises(MemoryError):
            scripted_run(folder / "rows.jsonl", out, **scripted(folder, out, RULES[0]))
    assert not any(sample[0] == "cancelled" for sample in samples(out).values())
    summary = scripted_run(folder / "rows.jsonl", out, **scripted(folder, out, RULES[0]))
    found = samples(out)
    assert dict(summary.error_counts) == {"cannot_be_written": stop + 1}, "the row went on"
    assert found[row, stop][0] == "error" and found[row, stop][-2:] == expected[row, stop][-2:]
    assert {found[row, number][0] for number in range(stop + 1, SAMPLES)} == {"cancelled"}
    assert {key: sample for key, sample in found.items() if key[0] != row} == {
        key: sample for key, sample in expected.items() if key[0] != row
    }
    # Its text is there, for another judge.
    score_to(out, tmp_path / "again.parquet", ["verify.kind=regex", "verify.options={pattern: '(?s).*'}"])
    again = pq.read_table(tmp_path / "again.parquet", columns=["row_index", "sample_index", "correct"]).to_pylist()
    assert {"row_index": row, "sample_index": stop, "correct": True} in again


def test_whatever_counts_samples_counts_cancelled_ones(folder: Path, full: Samples, tmp_path: Path) -> None:
    rule, out = RULES[0], tmp_path / "out"
    expected = stopped(full, rule)
    cancelled = sum(sample[0] == "cancelled" for sample in expected.values())
    sections, rows = scripted(folder, out, rule), folder / "rows.jsonl"
    told = " ".join(plan(scripted_job(rows, out, **sections)).notes)
    assert f"saves {ROWS * (SAMPLES - 1)} of {ROWS * SAMPLES} samples at most" in told
    summary = scripted_run(rows, out, **sections)
    assert not differing(out, expected)
    shown = {name: value for section in run_sections(summary) for name, *value in section.rows}
    assert shown["samples"] == [f"{ROWS * SAMPLES} = {ROWS * SAMPLES - cancelled} ok + 0 errors + {cancelled} cancelled"]
    assert "count without it" in shown["estimated"][0] and "pass@16" in shown
    # Each row's, from what it was: pass@1 with r = 1 is whether the first sample was right.
    first = np.mean([full[row, 0][-2] == "True" for row in range(ROWS)])
    assert summary.pass_at_k is not None and summary.pass_at_k[1] == pytest.approx(first)
    status = read_status(out)
    assert (status.ok, status.errors, status.cancelled, status.pending) == (ROWS * SAMPLES - cancelled, 0, cancelled, 0)
    checked = check(out)
    assert (
        checked.exit_code == 0
        and checked.facts["cancelled"] == cancelled
        and json.loads((out / "_SUCCESS").read_text())["cancelled"] == cancelled
    )
    counts: dict[Where | None, int] = {
        "cancelled": cancelled,
        "ok": ROWS * SAMPLES - cancelled,
        "error": 0,
        None: ROWS * SAMPLES,
    }
    for where, count in counts.items():
        assert export(out, tmp_path / "export.jsonl", Selection(where=where)).samples == count
    assert f"{cancelled:,}</b><span>cancelled" in write_report(out).read_text()
    # Nothing is left to do, and nothing is done.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert scripted_run(rows, out, **sections).cancelled == cancelled
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Other verdicts would not have stopped these rows: they go beside the folder.
    with pytest.raises(OutputError, match=r"--to verdicts\.parquet"):
        score(out, ["verify.kind=regex", "verify.options={pattern: x}"])
    with pytest.raises(JobError, match=r"verify\.stop"):
        score(out, ["verify.stop.after_correct=2"])
    assert score(out).judged == 0
    told_beside = score_to(out, tmp_path / "verdicts.parquet", ["verify.kind=regex", "verify.options={pattern: x}"])
    assert told_beside.judged == ROWS * SAMPLES - cancelled
    with pytest.raises(OutputError, match=r"verify\.stop .*Change what differs back") as refused:
        scripted_run(rows, out, **scripted(folder, out, RULES[1]))
    assert "tokabatch score" not in str(refused.value)
    # Cancelled samples are not progress of a start that commits nothing.
    job = scripted_job(rows, out, **{**sections, "generation": {"n": 2 * SAMPLES}})
    with mock.patch.object(folder_module, "DurableFiles", TakesNoShard), scripted_engine():
        assert [run(job).exit_code for _ in range(2)] == [EXIT_STOPPED, EXIT_STALLED]
    # With more samples, rows that have stopped remain stopped; the others continue.
    more = scripted_run(rows, out, **{**sections, "generation": {"n": 2 * SAMPLES}})
    assert more.pending == 0 and more.cancelled >= cancelled + SAMPLES * (ROWS - 1) - SAMPLES
    assert {key: sample for key, sample in samples(out).items() if key[1] < SAMPLES} == expected


class TakesNoShard(DurableFiles):
    def link(self, source: Path, target: Path) -> None:
        if target.name.startswith("part-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().link(source, target)


def test_a_row_continues_from_its_first_error(folder: Path, full: Samples, tmp_path: Path) -> None:
    """A sample that failed counts as wrong; run again, the row is as if it had not failed."""
    out, rows = tmp_path / "out", folder / "rows.jsonl"
    expected = stopped(full, RULES[0])
    stop = {row: [number for number in range(SAMPLES) if expected[row, number][0] == "ok"][-1] for row in range(ROWS)}
    row = next(row for row in range(ROWS) if stop[row] < SAMPLES - 1)

    with failing(row, stop[row]):
        summary = scripted_run(rows, out, **scripted(folder, out, RULES[0]))
    found = samples(out)
    assert summary.errors == 1 and found[row, stop[row]][5] == "nan_logits" and found[row, stop[row] + 1][0] == "ok"
    with scripted_engine():
        again = run(scripted_job(rows, out, **scripted(folder, out, RULES[0])), retry_errors=True)
    assert again.exit_code == 0 and not differing(out, expected)


def failing(row: int, number: int) -> Any:
    """Inside, that sample is an error."""
    apply = Scheduler.apply

    def applied(self: Scheduler, result: Any) -> list[Completion]:
        return [
            replace(each, error_code="nan_logits", error_message="made up")
            if (each.row_index, each.sample_index) == (row, number)
            else each
            for each in apply(self, result)
        ]

    return mock.patch.object(Scheduler, "apply", applied)


def test_an_error_stops_the_run_where_it_is_recorded(folder: Path, full: Samples, tmp_path: Path) -> None:
    """Not one behind the sample that stopped its row: nothing of it is kept, and each start would stop at it again."""
    rows, expected = folder / "rows.jsonl", stopped(full, RULES[0])
    row = next(row for row in range(ROWS) if expected[row, 3][0] == "cancelled")
    kept = [number for number in range(4) if expected[row, number][0] == "ok"]
    for number, code in ((3, 0), (kept[-1], EXIT_STOPPED)):
        out = tmp_path / str(number)
        sections = {**scripted(folder, out, RULES[0], max_running=64), "errors": {"policy": "stop", "max_fraction": 1.0}}
        with failing(row, number):
            summary = scripted_run(rows, out, **sections)
            assert summary.exit_code == code and summary.errors == (code != 0)
            if code:
                assert samples(out)[row, number][5] == "nan_logits"
                assert scripted_run(rows, out, **sections).exit_code == 0, "it stood still"
            else:
                assert not differing(out, expected)


def test_faulty_rows_may_be_gone_when_errors_run_again(folder: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": "Say 0"}), json.dumps({"question": "Say 1"}), json.dumps({"other": 2})]
    rows.write_text("\n".join(lines))
    assert scripted_run(rows, out, **scripted(folder, out, RULES[0])).errors == SAMPLES
    rows.write_text("\n".join(lines[:2]))
    with scripted_engine():
        again = run(scripted_job(rows, out, **scripted(folder, out, RULES[0])), retry_errors=True)
    assert (again.exit_code, again.errors, again.samples) == (0, 0, 2 * SAMPLES)


def test_a_run_that_is_stopped_before_its_last_verdicts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends as stopped. A judge that is killed while it is loaded has judged nothing: nothing of that is recorded."""
    monkeypatch.setattr(judging, "HURRIED_SECONDS", 0.5)
    (tmp_path / "judge.py").write_text(
        'import pathlib, time\nif pathlib.Path(__file__).with_name("slow").exists():\n    time.sleep(60)\n'
        "def verify(text, row):\n    return True\n"
    )
    stop = threading.Event()

    class Display(NullProgress):
        interval = 0.0

        def update(self, snapshot: ProgressSnapshot) -> None:
            if snapshot.phase == "loading":
                (tmp_path / "slow").touch()
            if snapshot.phase == "writing":
                stop.set()

    out = tmp_path / "out"
    sections = {**scripted(folder, out, RULES[0]), "generation": {"n": 4}, "verify": verify(tmp_path, RULES[0])}
    with scripted_engine():
        summary = run(scripted_job(folder / "rows.jsonl", out, **sections), Display(), stop.is_set)
    assert stop.is_set() and (summary.exit_code, summary.pending, summary.unverified) == (EXIT_INTERRUPTED, 4 * ROWS, 0)


def test_what_no_rule_can_be(folder: Path, tmp_path: Path) -> None:
    for rule in ({}, {"after_correct": 1, "majority": 2}, {"after_correct": 0}):
        with pytest.raises(JobError, match=r"verify\.stop"):
            scripted_job(folder / "rows.jsonl", tmp_path / "out", **scripted(folder, tmp_path / "out", rule))
    (tmp_path / "judge.py").write_text("def verify(text, row): return True")
    sections = {**scripted(folder, tmp_path / "out", None), "verify": verify(tmp_path, {"majority": 2})}
    with pytest.raises(JobError, match="'extracted'"):
        plan(scripted_job(folder / "rows.jsonl", tmp_path / "out", **sections))
    several = scripted_job(folder / "rows.jsonl", tmp_path / "out", **scripted(folder, tmp_path / "out", RULES[0]))
    with pytest.raises(JobError, match=r"remove --shared, or write verify\.stop=null"):
        run(several, shared=Shared())
    assert not (tmp_path / "out").exists()


def test_many_samples_behind_one_that_is_missing_cost_little_each() -> None:
    """Each verdict looks at what its row's prefix has reached, not at all that is held."""
    count = 16_384
    stops: RowStops[int] = RowStops(
        StopRule(majority=10**6), np.array([count]), Drawn(np.array([0, count]), np.zeros(count, bool))
    )
    began = time.process_time()
    for sample in [*range(1, count), 0]:
        stops.hold(0, sample, sample)
        stops.judge(0, sample, Outcome(False, "a"))
    assert time.process_time() - began < 2 and stops.take_kept() == list(range(count))


def test_of_a_table_only_the_rows_that_are_held_stay_in_memory() -> None:
    count = 1000
    rows, numbers = np.arange(count), np.zeros(count, np.int64)
    # The samples of these rows come before the first ones.
    numbers[[3, 700]] = 1
    columns: dict[str, Any] = {"row_index": rows, "sample_index": numbers, "error_code": pa.nulls(count, pa.string())}
    columns |= {"correct": [False] * count, "verify_error": pa.nulls(count, pa.string()), "text": ["x" * 1000] * count}
    stops: RowStops[Any] = RowStops(
        StopRule(after_correct=1), np.full(count, 4), Drawn(np.arange(count + 1) * 4, np.zeros(4 * count, bool))
    )
    accepted: list[Any] = []
    recorder: Any = SimpleNamespace(_accept=lambda unsampled, table: accepted.append(table))
    Recorder._follow(recorder, pa.table(columns), stops)  # pyright: ignore[reportPrivateUsage]
    assert [table.num_rows for table in accepted] == [count - 2] and stops.num_held == 2
    held = [each for samples in stops._held.values() for each in samples.values()]  # pyright: ignore[reportPrivateUsage]
    assert {table.num_rows for table, _ in held} == {2} and held[0][0].get_total_buffer_size() < 10_000
    assert [table["row_index"][place].as_py() for table, place in held] == [3, 700]
