"""Processes that prepare samples: the rows are those of a run that prepares them itself, whatever happens to the processes."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.output_checker import Checker, table
from support.scripted_run import MAX_TOKENS, scripted_engine, scripted_job

from benchmarks.scripted_engine import quickstart_script
from tokabatch import run
from tokabatch.errors import EngineError
from tokabatch.report.progress import NullProgress
from tokabatch.runner import preparation, preparers, recorder
from tokabatch.runner.forked import can_fork
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


def job(folder: Path, name: str, seconds: float, **engine: Any) -> Any:
    rows, judge = folder / "rows.jsonl", folder / "judge.py"
    rows.write_text("".join(json.dumps({"question": each, "number": place}) + "\n" for place, each in enumerate(QUESTIONS)))
    judge.write_text(JUDGE.replace("SECONDS", str(seconds)))
    return scripted_job(
        rows,
        folder / name,
        generation={"n": SAMPLES},
        verify={"kind": str(judge), "processes": 2},
        engine={"max_running": 8, "max_restarts": 1000, **engine},
        output={"rows_per_shard": 40, "flush_seconds": 0.3},
    )


def processes() -> list[psutil.Process]:
    """Those that prepare samples: they alone have judges as children."""
    started = psutil.Process().children()
    return [each for each in started if any("judge_process" in " ".join(child.cmdline()) for child in each.children())]


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


@pytest.mark.parametrize("seed", range(3))
def test_processes_killed_at_any_time_lose_and_double_nothing(seed: int, tmp_path: Path, checker: Checker) -> None:
    """Members and processes that prepare samples, while these travel between them."""
    assert run(job(tmp_path, "calm", 0.0)).exit_code == 0
    over, kills, told, chance = threading.Event(), 0, Told(), random.Random(seed)

    def kill() -> None:
        nonlocal kills
        while kills < 6 and not over.wait(chance.uniform(0.3, 0.8)):
            # In turn: one of all children, and one of those that hold samples.
            victims = psutil.Process().children() if kills % 2 else processes()
            if victims:
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
        patch.setattr(preparers, "_serve", lambda *given: __import__("os")._exit(3))
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
