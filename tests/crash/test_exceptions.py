"""An exception at each call that the recorder makes, in turn: nothing is lost, doubled or torn, and all that was finished is on
the disk when the run ends. Faults that stay cost what they touch, and the message names it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.injected import LASTING, Injection, injected, lasting
from support.output_checker import Checker, table
from support.scripted_run import MAX_TOKENS, scripted_engine, scripted_job

from tokabatch import Job, run
from tokabatch.errors import OutputError, TokabatchError
from tokabatch.runner import preparation, recorder
from tokabatch.storage.atomic_files import DurableFiles

SAMPLED_CALLS = 36
QUESTIONS: list[str | None] = ["What is 1?", "What is 2?", None, "What is 3?"]
pytestmark = [
    pytest.mark.crash,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Panic(BaseException):
    """What a library written in Rust raises for a bug of its own."""


ERRORS = [
    RuntimeError("injected"),
    MemoryError(),
    AssertionError(),
    KeyboardInterrupt(),
    Panic("injected"),
    OSError("no number"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No fault here is one of the disk."""
    monkeypatch.setattr(DurableFiles, "fsync", lambda self, descriptor: None)
    monkeypatch.setattr(recorder, "BATCH_SAMPLES", 3)
    monkeypatch.setattr(preparation, "BATCH_SAMPLES", 3)
    with scripted_engine() as script:
        global checker
        checker = Checker(QUESTIONS, 2, MAX_TOKENS, script)
        yield


checker: Checker


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": each, "answer": "x", "number": 1.5}) + "\n" for each in QUESTIONS))
    return path


def job(rows: Path, out: Path) -> Job:
    return scripted_job(
        rows, out, verify={"kind": "exact", "answer": "answer"}, output={"rows_per_shard": 4, "flush_seconds": 3600}
    )


@pytest.fixture
def reference(rows: Path, tmp_path: Path) -> list[dict[str, Any]]:
    assert run(job(rows, tmp_path / "undisturbed")).exit_code == 0
    checker.check_complete(tmp_path / "undisturbed")
    return table(tmp_path / "undisturbed")


def test_an_exception_at_any_call_loses_doubles_and_tears_nothing(
    rows: Path, reference: list[dict[str, Any]], tmp_path: Path, all_faults: bool
) -> None:
    with injected(Injection()) as counted:
        run(job(rows, tmp_path / "counted"))
    assert counted.calls > 500
    points = range(0, counted.calls, 1 if all_faults else counted.calls // SAMPLED_CALLS)
    for at in points:
        for error in ERRORS if all_faults and at % 7 == 0 else [ERRORS[at % len(ERRORS)]]:
            out = tmp_path / f"{at} {type(error).__name__}"
            # An OSError may come with the file's name and a remedy.
            with injected(Injection(at, error)) as injection, suppress(type(error), OutputError):
                run(job(rows, out))
            try:
                assert checker.check(out) == injection.accepted, "not all that was finished is committed"
                assert run(job(rows, out)).exit_code == 0
                checker.check_complete(out, reference)
            except AssertionError as failure:
                raise AssertionError(f"{error!r} at call {at}, {injection.place}: {failure}") from failure


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_stays_loses_doubles_and_tears_nothing(
    fault: str, rows: Path, reference: list[dict[str, Any]], tmp_path: Path, all_faults: bool
) -> None:
    for after in range(6 if all_faults else 2):
        out = tmp_path / str(after)
        committed = 0
        for _ in range(2):
            with lasting(fault, after, RuntimeError("injected")), suppress(RuntimeError, TokabatchError):
                run(job(rows, out))
            known = samples(out)
            assert known >= committed, "what was committed is gone"
            committed = known
        final = run(job(rows, out), retry_errors=True)
        assert final.exit_code == 0
        checker.check_complete(out, reference)


def samples(out: Path) -> int:
    """How many samples are there, each once; some of them error rows that keep what could be written."""
    found = table(out)
    keys = {(row["row_index"], row["sample_index"]) for row in found}
    assert len(keys) == len(found)
    for row in found:
        if row["error_code"] == "cannot_be_written":
            assert f"row {row['row_index']} " in row["error_message"] and "injected" in row["error_message"]
    return len(found)
