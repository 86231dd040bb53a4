"""Processes that prepare samples: the rows are those of a run that prepares them itself, whatever happens to the processes."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil
import pytest
from support.output_checker import Checker, table
from support.processes import children, started_with
from support.scripted_run import MAX_TOKENS, scripted_engine, scripted_job

from benchmarks.scripted_engine import quickstart_script
from tokabatch import run
from tokabatch.errors import EngineError
from tokabatch.report.progress import NullProgress
from tokabatch.runner import preparation, preparer_process, preparers, recorder
from tokabatch.runner.forked import can_fork, fork
from tokabatch.scheduling.completion_batch import PackedCompletions
from tokabatch.scheduling.contracts import NOT_JUDGED

pytestmark = pytest.mark.skipif(not can_fork(), reason="a process of threads is forked on Linux alone")
QUESTIONS: list[str | None] = [f"What is {number}?" if number % 7 else None for number in range(24)]
SAMPLES = 6
JUDGE = """
import time
COLUMNS = {"extracted": str}
def verify(text, row):
    time.sleep(SECONDS)
    return {"score": len(text) % 2, "extracted": text[:1]}
"""


class Told(NullProgress):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checker]:
    """Small tables, sent often: samples of one message come back in several, and in another order."""
    for module in (preparation, recorder):
        monkeypatch.setattr(module, "BATCH_SAMPLES", 8)
    monkeypatch.setattr(preparation, "LOOKED_AT", 4)
    monkeypatch.setattr(preparers, "SEND_SECONDS", 0.02)
    before = psutil.Process().children(recursive=True)
    with scripted_engine(quickstart_script(slots=64, step_seconds=0.002)) as script:
        yield Checker(QUESTIONS, SAMPLES, MAX_TOKENS, script)
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []


def job(folder: Path, name: str, seconds: float, source: str = JUDGE, verify: Any = MappingProxyType({}), **engine: Any) -> Any:
    rows, judge = folder / "rows.jsonl", folder / "judge.py"
    rows.write_text("".join(json.dumps({"question": each, "number": place}) + "\n" for place, each in enumerate(QUESTIONS)))
    judge.write_text(source.replace("SECONDS", str(seconds)))
    return scripted_job(
        rows,
        folder / name,
        generation={"n": SAMPLES},
        verify={"kind": str(judge), "processes": 2, **verify},
        engine={"max_running": 8, "max_restarts": 1000, **engine},
        output={"rows_per_shard": 40, "flush_seconds": 0.3},
    )


def processes() -> list[psutil.Process]:
    """Those that prepare samples: they alone have judges as children."""
    return [each for each in psutil.Process().children() if started_with("judge_process", children(each))]


def test_the_rows_are_the_same_whoever_prepares_them(tmp_path: Path, checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(job(tmp_path, "here", 0.0)).exit_code == 0
    reference = table(tmp_path / "here")
    most = 0
    add = preparers.Preparers.add

    def watched(self: preparers.Preparers, completions: Any) -> None:
        nonlocal most
        add(self, completions)
        most = max(most, self.num_waiting)

    monkeypatch.setattr(preparers.Preparers, "add", watched)
    monkeypatch.setattr(preparers, "MOST_WAITING", 20)
    for replicas, count in ((1, 1), (3, 1), (3, 2)):
        monkeypatch.setattr("tokabatch.runner.run.num_preparers", lambda job, replicas, count=count: count)
        name, summary = f"{replicas} {count}", run(job(tmp_path, f"{replicas} {count}", 0.005, process=True, replicas=replicas))
        assert (summary.exit_code, summary.unverified) == (0, 0)
        checker.check_complete(tmp_path / name, reference)
        # What a member sends in one message comes on top.
        assert 0 < most <= 2 * 20 + 8 * 3, "more samples wait than is allowed"
        assert any(row["correct"] for row in reference) and all(row["correct"] is not None for row in reference if row["text"])


@pytest.mark.timeout(200)
def test_the_end_of_a_run_does_not_pause_until_the_next_table_is_due(
    tmp_path: Path, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparers, "SEND_SECONDS", 600.0)
    summary = run(job(tmp_path, "out", 0.0, process=True, replicas=1))
    assert (summary.exit_code, summary.samples) == (0, len(QUESTIONS) * SAMPLES)


@pytest.mark.parametrize("seed", range(3))
def test_processes_killed_at_any_time_lose_and_double_nothing(seed: int, tmp_path: Path, checker: Checker) -> None:
    """Members and processes that prepare samples, while these travel between them."""
    assert run(job(tmp_path, "calm", 0.0)).exit_code == 0
    over, kills, told, chance = threading.Event(), 0, Told(), random.Random(seed)
    others = psutil.Process().children()

    def kill() -> None:
        nonlocal kills
        while kills < 6 and not over.wait(chance.uniform(0.15, 0.5)):
            # In turn: one of all that the run has started, and one of those that hold samples.
            victims = [each for each in psutil.Process().children() if each not in others] if kills % 2 else processes()
            if victims:
                with suppress(psutil.NoSuchProcess):
                    chance.choice(victims).kill()
                    kills += 1

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        summary = run(job(tmp_path, "killed", 0.02, process=True, replicas=2), told)
    finally:
        over.set()
        killer.join()
    assert summary.exit_code == 0 and kills > 2
    checker.check_complete(tmp_path / "killed", table(tmp_path / "calm"))
    assert any("prepares samples was killed by signal 9" in text for text in told.messages), told.messages


def test_a_process_that_is_lost_again_and_again_ends_the_run(
    tmp_path: Path, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(preparer_process, "_serve", lambda *given: __import__("os")._exit(3))
        with pytest.raises(EngineError, match=r"prepares samples ended with code 3; giving up \(engine.max_restarts\)"):
            run(job(tmp_path, "out", 0.0, process=True, max_restarts=2))
    checker.check(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(preparation.Preparation, "add", lambda *given: 1 / 0)
        with pytest.raises(EngineError, match="preparing samples failed: ZeroDivisionError"):
            run(job(tmp_path, "out", 0.0, process=True))
    assert run(job(tmp_path, "out", 0.0, process=True)).exit_code == 0
    checker.check_complete(tmp_path / "out")


def test_a_run_that_is_stopped_commits_what_is_not_judged(
    tmp_path: Path, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparers, "HURRIED_SECONDS", 0.3)
    began = time.monotonic()
    summary = run(job(tmp_path, "out", 300.0, process=True), should_stop=lambda: bool(processes()))
    assert summary.exit_code == 130 and time.monotonic() - began < 30
    found = [row for row in table(tmp_path / "out") if row["status"] == "ok"]
    assert found and {row["verify_error"] for row in found} == {NOT_JUDGED}
    checker.check(tmp_path / "out")


def test_judges_are_added_where_they_fall_behind_and_may_end_what_they_start(
    tmp_path: Path, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no sample comes any more; and signals that the processes leave to main are not kept from a judge's children."""
    monkeypatch.setattr("tokabatch.scoring.pool.GROW_SECONDS", 0.1)
    source = """
import subprocess, time
def verify(text, row):
    time.sleep(SECONDS)
    child = subprocess.Popen(["sleep", "60"])
    child.terminate()
    return child.wait(20) < 0
"""
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.05):
            most = max(most, sum(len(children(each)) for each in processes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        summary = run(job(tmp_path, "out", 0.05, source, {"processes": 3}, process=True))
    finally:
        over.set()
        watcher.join()
    assert summary.exit_code == 0 and most == 3
    assert all(row["correct"] for row in table(tmp_path / "out") if row["status"] == "ok")


def test_one_that_stands_still_is_killed_and_main_goes_on_meanwhile(
    tmp_path: Path, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though what it is sent fills every buffer on the way."""
    hand, told, stopped = preparers._Process.hand, Told(), list[int]()

    def handed(self: preparers._Process, work: preparers.Work) -> None:
        if not stopped:
            stopped.append(self._process.pid or 0)
            os.kill(stopped[0], signal.SIGSTOP)
            # It reads none of this.
            self.send(preparers.Work(work.numbers, replace(work.completions, contents=(bytes(1 << 22),))))
        hand(self, work)

    monkeypatch.setattr(preparers._Process, "hand", handed)
    summary = run(job(tmp_path, "out", 0.0, process=True, hang_seconds=1.0), told)
    assert summary.exit_code == 0
    checker.check_complete(tmp_path / "out")
    assert any("did not respond" in text for text in told.messages), told.messages


def test_where_one_fails_the_samples_of_the_others_are_committed(
    tmp_path: Path, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokabatch.runner.run.num_preparers", lambda job, replicas: 2)
    real = preparation.Preparation.tables

    def tables(self: preparation.Preparation, received: int, *, everything: bool) -> Any:
        if multiprocessing.current_process().name.endswith("-1") and self.num_waiting > 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, received, everything=everything)

    with monkeypatch.context() as patch:
        patch.setattr(preparation.Preparation, "tables", tables)
        # What fails is in none: all of the other's are.
        with pytest.raises(EngineError, match="preparing samples failed: OSError"):
            run(job(tmp_path, "out", 0.01, process=True))
    assert checker.check(tmp_path / "out") > len([each for each in QUESTIONS if each is None]) * SAMPLES
    assert run(job(tmp_path, "out", 0.01, process=True)).exit_code == 0
    checker.check_complete(tmp_path / "out")


@pytest.mark.parametrize("before", [True, False], ids=["before it is taken", "behind"])
def test_an_exception_while_main_takes_a_table_neither_loses_nor_doubles_it(
    before: bool, tmp_path: Path, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, tables = recorder.Recorder._accept, list[int]()

    def accepting(self: recorder.Recorder, unsampled: Any, rows: Any, *received: int) -> None:
        if rows is not None:
            tables.append(rows.num_rows)
        if before and len(tables) == 3 and rows is not None:
            raise KeyboardInterrupt
        accept(self, unsampled, rows, *received)
        if len(tables) == 3 and rows is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "_accept", accepting)
        with pytest.raises(KeyboardInterrupt):
            run(job(tmp_path, "out", 0.005, process=True))
    failed = len([each for each in QUESTIONS if each is None]) * SAMPLES
    # The third one came once more where it had not been taken.
    assert checker.check(tmp_path / "out") == failed + sum(tables) - before * tables[2] and len(tables) > 3
    assert run(job(tmp_path, "out", 0.005, process=True)).exit_code == 0
    checker.check_complete(tmp_path / "out")


def test_a_slow_verdict_keeps_no_bytes_of_those_behind_it() -> None:
    process = object.__new__(preparers._Process)
    process._held = []
    completions = PackedCompletions(
        np.zeros(2, np.int64), *[np.zeros(2, np.int32)] * 2, *[np.zeros(2, np.bool_)] * 2, (b"12345",)
    )
    for first in (0, 2, 4):
        process._held.append(preparers._Held(preparer_process.Work(np.arange(first, first + 2), completions)))
    process._let_go(np.array([5, 2, 1, 3]))
    assert (process.num_waiting, process.num_bytes) == (2, 10)
    process._let_go(np.array([5, 2, 1, 3]))
    assert (process.num_waiting, process.num_bytes) == (2, 10), "heard of twice"


@pytest.mark.parametrize(
    ("cores", "replicas", "judged", "expected"),
    [(2, 1, False, 1), (2, 4, False, 1), (128, 1, False, 1), (64, 4, False, 4), (64, 4, True, 4), (8, 4, True, 2)],
)
def test_how_many_processes_there_are(
    cores: int, replicas: int, judged: bool, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    judging = job(tmp_path, "out", 0.0)
    assert judging.verify is not None
    judging = judging.model_copy(update={"verify": judging.verify.model_copy(update={"processes": "auto"})})
    plain = judging.model_copy(update={"verify": None})
    assert preparers.num_preparers(judging if judged else plain, replicas) == expected


def test_many_samples_at_once_come_back_in_several_tables_of_which_the_first_can_be_recorded_meanwhile(
    tmp_path: Path, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = list[int]()
    taken = preparers._Process.next

    def watched(self: preparers._Process, received: int) -> Any:
        prepared = taken(self, received)
        if prepared is not None:
            sizes.append(len(prepared.numbers))
        return prepared

    monkeypatch.setattr(preparers._Process, "next", watched)
    # Nothing is ready before all samples have come.
    monkeypatch.setattr(preparers, "SEND_SECONDS", 60.0)
    monkeypatch.setattr(preparation, "LOOKED_AT", 10_000)
    assert run(job(tmp_path, "out", 0.0, process=True, replicas=1)).exit_code == 0
    assert max(sizes) == 8 and sum(sizes) == len([each for each in QUESTIONS if each is not None]) * SAMPLES, sizes


def test_processes_end_while_the_last_samples_are_written(
    tmp_path: Path, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, left = recorder.ShardWriter.close, list[int]()

    def closing(self: recorder.ShardWriter) -> Any:
        until = time.monotonic() + 20
        while processes() and time.monotonic() < until:
            time.sleep(0.02)
        left.append(len(processes()))
        return close(self)

    monkeypatch.setattr(recorder.ShardWriter, "close", closing)
    assert run(job(tmp_path, "out", 0.0, process=True, replicas=1)).exit_code == 0
    assert left == [0]


def test_the_collector_of_a_forked_process_leaves_what_main_has_read_alone() -> None:
    """It would copy every page with an object of main."""
    ours, theirs = multiprocessing.Pipe()
    process = fork(lambda: theirs.send((gc.get_freeze_count(), len(gc.get_objects()))), (), "forked")
    frozen, others = ours.recv()
    process.join()
    assert frozen > 10_000 > others
