"""Judges that misbehave: a run ends with every sample there, and what one sample's judging does costs its verdict alone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from support.scripted_run import MAX_TOKENS, scripted_engine, scripted_job, scripted_run

from tokabatch import plan, run
from tokabatch.cli.folder import status
from tokabatch.errors import EngineError, JobError
from tokabatch.job import VerifyConfig
from tokabatch.output.integrity import check
from tokabatch.output.status import read_status
from tokabatch.runner import judging, recorder
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.score import score, score_to
from tokabatch.scheduling.contracts import NOT_JUDGED
from tokabatch.scoring import pool
from tokabatch.scoring.judge import Judge, JudgeSpec
from tokabatch.scoring.judge_process import Request

ROWS = 8


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [{"question": f"What is {i}?", "number": i, "answer": None if i == 5 else str(i)} for i in range(ROWS)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def judged(rows: Path, tmp_path: Path, source: str, **verify: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The summary and the samples, in order, of a run whose judge is this file."""
    judge = tmp_path / "judge.py"
    judge.write_text(source)
    summary = scripted_run(rows, tmp_path / "out", verify={"kind": str(judge), "seconds": 2.0, **verify})
    return summary, samples(tmp_path / "out")


def samples(out: Path) -> list[dict[str, Any]]:
    found = [row for shard in (out / "data").iterdir() for row in pq.read_table(shard).to_pylist()]
    return sorted(found, key=lambda each: (each["row_index"], each["sample_index"]))


HOSTILE = {
    "raises": ("raise KeyError('no')", "KeyError: 'no' in line 6"),
    "raises in a library": (
        "return __import__('json').loads('')",
        "JSONDecodeError: Expecting value: line 1 column 1 (char 0) in line 6",
    ),
    "raises a ValueError": ("return int('')", "ValueError: invalid literal for int() with base 10: '' in line 6"),
    "raises without words": ("raise RuntimeError", "RuntimeError in line 6"),
    "raises at length": ("raise RuntimeError('x' * 500)", "x in line 6"),
    "hangs": ("time.sleep(600)", "no verdict within 2 s"),
    "hangs deaf": ("[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; time.sleep(600)", "no verdict within 2 s"),
    "eats memory": ("bytearray(1 << 40)", "MemoryError"),
    "eats memory slowly": ("held = []\n        while True: held.append(bytearray(1 << 24))", "MemoryError"),
    "exits": ("exit(3)", "SystemExit: 3"),
    "exits at once": ("os._exit(7)", "ended with code 7"),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by signal 11"),
    "recurses": ("return verify(text, row)", "RecursionError"),
    "returns a text": ("return 'yes'", "not a verdict"),
    "returns NaN": ("return float('nan')", "not a verdict"),
    "returns None": ("return None", "it returned None"),
    "returns another key": ("return {'correct': True}", "the verdict itself is returned as 'score'"),
    "returns no score": ("return {}", "it returned no 'score', which is the verdict"),
    "closes everything": ("os.closerange(0, 1 << 20); return True", ""),
    "stops itself": ("os.kill(os.getpid(), signal.SIGSTOP)", "no verdict within 2 s"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_judge_that_misbehaves_costs_one_verdict(case: str, rows: Path, tmp_path: Path) -> None:
    deed, reason = HOSTILE[case]
    source = f"""
import os, signal, time

def verify(text, row):
    if row["number"] == 3:
        {deed}
    return row["number"] % 2 == 0
"""
    summary, found = judged(rows, tmp_path, source, memory_bytes=1 << 28)
    assert (summary.exit_code, summary.ok, summary.errors, summary.unverified) == (0, 2 * ROWS, 0, 2)
    for sample in found:
        bad = sample["row_index"] == 3
        assert sample["correct"] is (None if bad else sample["row_index"] % 2 == 0), sample
        assert sample["verify_score"] == (None if bad else float(sample["row_index"] % 2 == 0))
        assert (reason in sample["verify_error"]) if bad else (sample["verify_error"] is None)
    assert summary.unverified_reasons and "(2 samples)" in summary.unverified_reasons[0]


def test_what_a_judge_prints_and_forks_disturbs_nothing(rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = """
import os, subprocess, sys, time

def verify(text, row):
    print("to standard output", flush=True)
    os.write(2, b"to standard error")
    if os.fork() == 0:
        return False           # comes back into the caller
    if os.fork() == 0:
        os.setsid()
        time.sleep(7777)       # stays behind
    subprocess.Popen(["sleep", "7778"], start_new_session=True)
    return True
"""
    summary, found = judged(rows, tmp_path, source)
    assert summary.ok == 2 * ROWS and all(sample["correct"] for sample in found)
    told = capfd.readouterr()
    assert "to standard" not in told.out + told.err
    time.sleep(0.2)
    left = [process for process in psutil.Process().children(recursive=True) if process.status() != psutil.STATUS_ZOMBIE]
    assert not [process for process in left if "judge" in " ".join(process.cmdline())]
    stray = [process.info for process in psutil.process_iter(["cmdline"]) if "7778" in (process.info["cmdline"] or [])]
    assert not stray


def test_scores_columns_and_options(rows: Path, tmp_path: Path) -> None:
    source = """
from dataclasses import dataclass

@dataclass
class Share:
    of: int

COLUMNS = {"length": int, "first": str, "short": bool}

def grade(text, row, *, answer, divisor=1):
    assert answer == "answer"
    share = Share(divisor)
    return {"score": row["number"] / share.of, "length": len(text), "first": text[:1] or None, "short": len(text) < 3}
"""
    judge = tmp_path / "judge.py"
    judge.write_text(source)
    verify = {"kind": f"{judge}:grade", "answer": "answer", "options": {"divisor": 7}, "correct_from": 0.5}
    summary = scripted_run(rows, tmp_path / "out", verify=verify, output={"columns": ["question"]})
    for sample in samples(tmp_path / "out"):
        score = sample["row_index"] / 7
        assert (sample["verify_score"], sample["correct"]) == (pytest.approx(score), score >= 0.5)
        assert (sample["length"], sample["short"]) == (len(sample["text"]), len(sample["text"]) < 3)
        assert "number" not in sample
    assert summary.pass_at_k == {1: 0.5, 2: 0.5}


def test_a_module_judges_in_batches_and_one_fault_costs_one_verdict(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "graders"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "length.py").write_text(
        """
import os

def grade(texts, rows):
    numbers = [row["number"] for row in rows]
    if 2 in numbers and len(rows) > 1:
        os._exit(1)
    if 4 in numbers:
        raise RuntimeError("four")
    return [number > 2 for number in numbers]
"""
    )
    monkeypatch.chdir(tmp_path)
    summary = scripted_run(rows, tmp_path / "out", verify={"kind": "graders.length:grade"})
    assert summary.ok == 2 * ROWS and summary.unverified == 2
    for sample in samples(tmp_path / "out"):
        row = sample["row_index"]
        assert sample["correct"] is (None if row == 4 else row > 2), sample


def test_what_no_column_holds_costs_no_sample(rows: Path, tmp_path: Path) -> None:
    """Nor does a value of another type than COLUMNS declares; NumPy's numbers are of those."""
    source = r"""
import numpy as np

class Unspoken(Exception):
    def __str__(self): raise ValueError("no text")

COLUMNS = {"found": str, "count": int, "short": bool, "share": float}

def verify(text, row):
    if row["number"] == 1: raise ValueError("found \ud83d alone")
    if row["number"] == 2: raise Unspoken()
    given = {
        0: {"colour": "red"}, 3: {"count": 1 << 63}, 4: {"count": 3.5}, 5: {"short": "false"},
        6: {"found": "half \ud83d", "count": 1 << 62},
        7: {"found": 3, "count": np.int32(4), "short": np.bool_(False), "share": np.float32(0.5), "score": np.bool_(True)},
    }
    return {"score": 1, **given[row["number"]]}
"""
    summary, found = judged(rows, tmp_path, source)
    assert (summary.ok, summary.errors, summary.unverified) == (2 * ROWS, 0, 12)
    reasons = [sample["verify_error"] for sample in found[::2]]
    parts = ["COLUMNS", "found \ufffd alone", "Unspoken", "64 bits", "'3.5' as 'count'", "'false' as 'short', which COLUMNS"]
    assert all(part in reason for part, reason in zip(parts, reasons[:6], strict=True)) and reasons[6:] == [None, None]
    named = [[sample[name] for name in ("correct", "found", "count", "short", "share")] for sample in found[12:]]
    assert named == [*[[True, "half \ufffd", 1 << 62, None, None]] * 2, *[[True, "3", 4, False, 0.5]] * 2]


def test_a_slow_judge_holds_the_run_up_and_loses_nothing(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "MOST_UNJUDGED", 2)
    # Their columns alone would be few enough bytes for all rows.
    monkeypatch.setattr(judging, "KEPT_BYTES", 4 * judging.ROW_BYTES)
    most = kept = 0
    add = recorder.Recorder.add

    def watched(self: recorder.Recorder, completions: Any, *goes_on: Any) -> None:
        nonlocal most, kept
        add(self, completions, *goes_on)
        preparing: Any = self._preparing
        most = max(most, sum(each.ticket is not None and each.verdict is None for each in preparing.waiting.finished))
        kept = max(kept, len(preparing._judging._rows))

    monkeypatch.setattr(recorder.Recorder, "add", watched)
    source = "import time\ndef verify(text, row):\n    time.sleep(0.05)\n    return True\n"
    judge, out = tmp_path / "judge.py", tmp_path / "out"
    judge.write_text(source)
    summary = scripted_run(rows, out, verify={"kind": str(judge), "processes": 2}, engine={"max_running": 2})
    found = samples(out)
    assert summary.ok == 2 * ROWS and all(sample["correct"] for sample in found)
    assert 0 < most <= 2 and 0 < kept < 4


def test_while_a_run_waits_for_verdicts_it_commits_others_and_can_be_stopped(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sample's verdict takes long. Those behind it are committed after `flush_seconds`, then a stop is heard. What
    is not judged is missing: the run is not complete, and nothing is estimated."""
    monkeypatch.setattr(judging, "MOST_UNJUDGED", 2)
    monkeypatch.setattr(judging, "HURRIED_SECONDS", 0.3)
    judge, out = tmp_path / "judge.py", tmp_path / "out"
    judge.write_text("import time\ndef verify(text, row):\n    time.sleep(0 if row['number'] else 300)\n    return True\n")
    verify = {"kind": str(judge), "seconds": 300.0, "processes": 2}
    # One sample a row: with two of the first row, both processes might sleep.
    sections = {"generation": {"n": 1, "max_tokens": MAX_TOKENS, "temperature": 1.0}, "engine": {"max_running": 2}}
    job = scripted_job(rows, out, verify=verify, output={"path": str(out), "flush_seconds": 0.2}, **sections)
    with scripted_engine():
        summary = run(job, should_stop=lambda: bool(list((out / "data").glob("part-*"))))
    assert (summary.exit_code, summary.estimates) == (130, ()) and not (out / "_SUCCESS").exists()
    found = samples(out)
    assert any(each["correct"] for each in found) and {each["verify_error"] for each in found if not each["correct"]} == {
        NOT_JUDGED
    }


def test_a_run_that_is_stopped_commits_what_is_not_judged(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judging, "HURRIED_SECONDS", 0.3)
    judge = tmp_path / "judge.py"
    flag = tmp_path / "hang"
    flag.touch()
    judge.write_text(
        "import os, time\ndef verify(text, row):\n"
        f"    time.sleep(600 if row['number'] and os.path.exists({str(flag)!r}) else 0)\n    return True\n"
    )
    stop, began = Interruption(), time.monotonic()
    finish = recorder.Recorder.finish

    def stopped(self: recorder.Recorder, *arguments: Any, **named: Any) -> Any:
        stop._exit_code = 130
        return finish(self, *arguments, **named)

    monkeypatch.setattr(recorder.Recorder, "finish", stopped)
    job = scripted_job(rows, tmp_path / "out", verify={"kind": str(judge), "seconds": 300.0})
    with scripted_engine():
        stopped_run = run(job, should_stop=stop)
    assert time.monotonic() - began < 60
    assert (stopped_run.exit_code, stopped_run.pending, stopped_run.estimates) == (130, 0, ())
    assert not (tmp_path / "out" / "_SUCCESS").exists() and check(tmp_path / "out").exit_code == 75
    found = samples(tmp_path / "out")
    assert Counter(sample["verify_error"] is None for sample in found)[True] >= 1
    assert len(found) == 2 * ROWS and all("run was stopped" in (each["verify_error"] or "run was stopped") for each in found)
    unjudged = sum(each["verify_error"] is not None for each in found)
    assert read_status(tmp_path / "out").unjudged == unjudged
    capsys.readouterr()
    status(tmp_path / "out")
    assert re.search(rf"again \(`tokabatch run` or `score`\) +judges {unjudged} samples\n", capsys.readouterr().out)
    monkeypatch.undo()
    flag.unlink()
    with scripted_engine():
        summary = run(job)
    assert (summary.exit_code, summary.unverified, summary.pass_at_k) == (0, 0, {1: 1.0, 2: 1.0})
    assert all(sample["correct"] for sample in samples(tmp_path / "out")) and check(tmp_path / "out").exit_code == 0


def test_references_are_checked_before_anything_is_computed(rows: Path, tmp_path: Path) -> None:
    report = plan(scripted_job(rows, tmp_path / "out", verify={"kind": "gsm8k", "answer": "answer"}))
    assert [note for note in report.notes if "judged" in note] == [
        f"warning: row 5 ({rows} line 6) cannot be judged: the reference answer 'None' holds no number"
    ]
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def check(row):\n    if row['number'] > 1: raise ValueError('too large')\ndef verify(text, row): return True\n"
    )
    report = plan(scripted_job(rows, tmp_path / "out", verify={"kind": str(judge)}))
    assert [note for note in report.notes if "judged" in note] == [
        f"warning: row 2 ({rows} line 3) cannot be judged: too large",
        f"warning: row 3 ({rows} line 4) cannot be judged: too large",
        f"warning: row 4 ({rows} line 5) cannot be judged: too large",
        "warning: 3 more rows cannot be judged",
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"there is no file .*; check the path"),
        ("def verify(text, row)", r"SyntaxError"),
        ("import there_is_no_such_module", r"ModuleNotFoundError"),
        ("raise SystemExit(0)", r"SystemExit"),
        ("import os; os._exit(5)", r"ended with code 5 while it was loaded"),
        (
            "def verify(text): return True",
            r"its `verify\(text\)` is called with a text and its row; write `verify\(text, row\)`",
        ),
        ("def judge(text, row): return True", r"has no function .*; add one, or name another: .*broken\.py:judge"),
        (
            "def _normalise(text, case): return text\ndef first(text): return text\ndef grade(text, row): return True",
            r"or name another: .*broken\.py:grade",
        ),
        ("def _normalise(text, case): return text", r"has no function `verify\(text, row\)`; add one\."),
        ("def verify(text, reference): return True", r"write `verify\(text, row\)`, where row\[COLUMN\] is the reference"),
        ("def verify(completion, expected): return True", r"write `verify\(completion, row\)`, where row\[COLUMN\] is the exp"),
        ("def verify(row, text): return True", r"its `verify\(row, text\)` is called with the text first .*; exchange the two"),
        ("def verify(rows, texts): return True", r"`verify\(rows, texts\)` is called with the text first"),
        ("def verify(problem, prediction): return True", r"`verify\(problem, prediction\)` is called with the text first"),
        ("def verify(Row, Text): return True", r"its `verify\(Row, Text\)` is called with the text first"),
        ("def verify(row, *args): return 1", r"its `verify\(row, \*args\)` is called .* second; write `verify\(text, row\)`"),
        ("def verify(*, text, n=2): return True", r"its `verify\(\*, text, n=2\)` is called with a text and its row"),
        ("def verify(Text, Gold): return True", r"write `verify\(Text, row\)`, where row\[COLUMN\] is the Gold"),
        (
            "def verify(text: str, answer: str = '', *, m=[], **more: int) -> bool: return True",
            r"its `verify\(text, answer='', \*, m=\.\.\., \*\*more\)` is called with a text and the whole row",
        ),
        ("def verify(text, row, *, strict): return True", r"it needs 'strict'; give verify\.options\.strict"),
        ("COLUMNS = {'a': list}\ndef verify(text, row): return True", r"write str, int, float or bool"),
        ("COLUMNS = {'a': ['str']}\ndef verify(text, row): return True", r"COLUMNS\['a'\] is \['str'\]; write str, int, float"),
        ("def verify(text, row, more, /): return True", r"called with a text and its row: .*'more'; write `verify"),
        (
            "def check(a, b): pass\ndef verify(text, row): return True",
            r"its `check\(a, b\)` is called with a row alone, .*: .*'b'; write `check\(row\)`, or give it another name",
        ),
        (
            "def check_options(): raise ValueError('no such file of words')\ndef verify(text, row): return True",
            "no such file of words",
        ),
        (
            "def check_options(**options): raise ValueError(f'given {[*options]}')\ndef verify(text, row, k=1): return True",
            r"given \['k'\]",
        ),
        ("verify = max", r"its `verify` is not written in Python; write a plain `def verify\(text, row\)`"),
        (
            "def check_options(parser): pass\ndef verify(text, row): return True",
            r"its `check_options\(parser\)` is called with the options alone, .*: .*'parser'; .* or give it another name",
        ),
        ("COLUMNS = ['a']\ndef verify(text, row): return True", r"write names and types"),
        ("async def verify(text, row): return True", r"`verify` is async or has `yield`; write a plain `def`"),
    ],
)
def test_a_file_that_gives_no_judge_is_refused_before_anything_starts(
    source: str | None, message: str, rows: Path, tmp_path: Path
) -> None:
    own = tmp_path / "broken.py"
    if source is not None:
        own.write_text(source)
    with pytest.raises(JobError, match=rf"verify\.kind: .*broken\.py.*{message}"):
        plan(
            scripted_job(
                rows,
                tmp_path / "out",
                verify={"kind": str(own), "answer": "answer", "options": {"k": 1} if "k=1" in str(source) else {}},
            )
        )
    assert not (tmp_path / "out").exists()


def test_unknown_options_and_modules_are_refused(rows: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def verify(text, row, *, strict=True): return True")
    with pytest.raises(JobError, match=r"verify\.options names 'lenient', which it does not take; it takes strict"):
        plan(scripted_job(rows, tmp_path / "out", verify={"kind": str(own), "options": {"lenient": True}}))
    with pytest.raises(JobError, match="ModuleNotFoundError"):
        plan(scripted_job(rows, tmp_path / "out", verify={"kind": "no.such_module:grade"}))


def test_a_file_is_compiled_as_python_compiles_it_and_after_every_edit(tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    for number in (1, 2):
        judge.write_text(f"def verify(text: str, row): return {number}\nassert verify.__annotations__ == {{'text': str}}\n")
        loaded = Judge(JudgeSpec("judge", str(judge), "verify"))
        assert [each.score for each in loaded.verdicts(["a"], [{}])] == [number]
    assert list(tmp_path.iterdir()) == [judge]


def test_a_wrapper_that_takes_anything_gets_no_options(tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def logged(f): return lambda *args, **named: f(*args, **named)\n"
        "@logged\ndef check(row):\n    if row: raise ValueError('no')\n"
        "def verify(text, row, k): return k\n"
    )
    loaded = Judge(JudgeSpec("judge", str(judge), "verify", options={"k": 2}))
    assert (loaded.check({}), loaded.check({"a": 1})) == (None, "no")
    assert [each.score for each in loaded.verdicts(["a"], [{}])] == [2]


def test_a_fault_of_its_own_names_its_line_whatever_it_calls(tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(
        "from tokabatch.scoring.verifiers import gsm8k\n"
        "def verify(text, row):\n    return gsm8k.verify(text, row, answer='answr') if text else [].nothing\n"
    )
    loaded = Judge(JudgeSpec("judge", str(judge), "verify"))
    reasons = [each.error for each in loaded.verdicts(["a", ""], [{}, {}])]
    assert reasons[0] == "ValueError: the reference answer 'None' holds no number in line 3"
    assert reasons[1] is not None and reasons[1].startswith("AttributeError: ") and reasons[1].endswith(" in line 3")


def test_no_process_is_left_when_a_run_ends(rows: Path, tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process(os.getpid()).children(recursive=True)}
    judged(rows, tmp_path, "def verify(text, row): return True")
    left = [p for p in psutil.Process(os.getpid()).children(recursive=True) if p.pid not in before]
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


def test_a_judge_that_does_not_read_its_request_costs_a_verdict(tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def verify(text, row): return True")
    process = pool.JudgeProcess(pool.judge_spec(VerifyConfig(kind=str(judge))))
    child = process._process  # pyright: ignore[reportPrivateUsage]
    # Where nothing else ends the wait.
    end = threading.Timer(20.0, child.kill)
    end.start()
    try:
        assert [each.correct for verdicts in process.ask(Request([{}], ["right"]), 10.0) for each in verdicts] == [True]
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(pool.JudgeLost, match="not read within 1 s"):
            list(process.ask(Request([{}], ["x" * (1 << 24)]), 1.0))
    finally:
        end.cancel()
        process.close()


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("sys.executable", "/no/such/python", "/no/such/python: No such file or directory"),
        ("tokabatch.scoring.pool._START", "import there_is_no_such_module", "ended, or did not respond, before it loaded"),
    ],
)
def test_a_process_that_cannot_be_started_is_no_fault_of_the_judge(
    name: str, value: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def verify(text, row): return True")
    judges = pool.JudgePool(pool.judge_spec(VerifyConfig(kind=str(judge))), 1, 10.0)
    monkeypatch.setattr(name, value)
    try:
        tickets = judges.submit(["x"] * 500, [{}] * 500)
        assert judges.wait(tickets, 30.0)
        for ticket in tickets:
            assert ticket.verdict is not None and ticket.verdict.correct is None
            assert f"no process for the judge can be started: {sys.executable}"[:60] in str(ticket.verdict.error)
            assert cause in str(ticket.verdict.error)
        with pytest.raises(EngineError, match="no process for the judge can be started"):
            judges.load()
    finally:
        judges.close()


def test_processes_are_started_where_those_there_fall_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow judge gets as many as it may have, a fast one keeps one process, however many samples wait at a look."""
    judge = tmp_path / "judge.py"
    source = "import os, time\nCOLUMNS = {'pid': int}\ndef verify(text, row):\n    time.sleep(row['seconds'])\n"
    judge.write_text(f"{source}    return {{'score': 1, 'pid': os.getpid()}}\n")

    monkeypatch.setattr(pool, "GROW_SECONDS", 0.1)

    def processes_of(seconds: float, parts: int) -> int:
        judges = pool.JudgePool(pool.judge_spec(VerifyConfig(kind=str(judge), correct_from=0.5)), 3, 10.0)
        try:
            tickets = [each for _ in range(parts) for each in judges.submit(["x"] * 12, [{"seconds": seconds}] * 12)]
            assert judges.wait(tickets, 60.0)
            found = [ticket.verdict for ticket in tickets if ticket.verdict is not None]
            assert not any(verdict.error for verdict in found)
            return len({verdict.columns["pid"] for verdict in found})
        finally:
            judges.close()

    assert processes_of(0.2, parts=1) == 3
    assert processes_of(0.0, parts=50) == 1

    # Those of several replicas begin together, as many as the job allows.
    for most, at_once, begun in ((3, 2, 2), (1, 2, 1)):
        judges = pool.JudgePool(pool.judge_spec(VerifyConfig(kind=str(judge), correct_from=0.5)), most, 10.0, at_once)
        assert judges.wait(judges.submit(["x"], [{"seconds": 0.0}]), 60.0)
        assert len(judges._threads) == begun
        judges.close()


def test_a_default_timeout_for_sockets_leaves_judges_their_time(tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("import time\ndef verify(text, row):\n    time.sleep(0.3)\n    return len(text) == 1 << 24")
    socket.setdefaulttimeout(0.05)
    try:
        process = pool.JudgeProcess(pool.judge_spec(VerifyConfig(kind=str(judge))))
        try:
            answers = [each for group in process.ask(Request([{}, {}], ["x" * (1 << 24), "x"]), 10.0) for each in group]
        finally:
            process.close()
    finally:
        socket.setdefaulttimeout(None)
    assert [answer.correct for answer in answers] == [True, False]


def test_a_limit_that_the_process_has_already_is_kept_where_it_is_lower() -> None:
    """As under a queue's limit of address space: raising it would fail, and with it every judge."""
    program = """
import resource
from tokabatch.scoring.limits import limit_resource
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for most in (16 << 30, 4 << 30):
    limit_resource(resource.RLIMIT_AS, most)
    print(resource.getrlimit(resource.RLIMIT_AS)[0] >> 30)
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True).split() == ["8", "4"]


CHECKS = """
def check(row, limit=6):
    with open({calls!r}, "a") as file: file.write(f"{{row['number']}}\\n")
    if row["number"] >= limit: raise ValueError("too large")
    if row["number"] == 0: raise KeyError("zero")

"""
ONE_TEXT = """
def verify(text, row, limit):
    assert 0 < row["number"] < limit
    return True
"""
SEVERAL = """
def verify(texts, rows, limit):
    assert all(0 < row["number"] < limit for row in rows)
    return [True for _ in rows]
"""


@pytest.mark.parametrize("source", [ONE_TEXT, SEVERAL], ids=["one text", "several texts"])
def test_a_sample_of_a_row_that_check_rejects_gets_no_verdict_from_verify(source: str, rows: Path, tmp_path: Path) -> None:
    judge, out, calls = tmp_path / "judge.py", tmp_path / "out", tmp_path / "calls.txt"
    judge.write_text(CHECKS.format(calls=str(calls)) + source)
    verify = {"kind": str(judge), "options": {"limit": 6}}
    assert scripted_run(rows, out, verify=verify).unverified == 6

    def check_verdicts(of: list[dict[str, Any]], limit: int) -> None:
        for sample in of:
            number = sample["row_index"]
            reason = "too large" if number >= limit else None if number else "KeyError: 'zero' in line 5"
            assert (sample["correct"], sample["verify_error"]) == (True if reason is None else None, reason), sample

    check_verdicts(samples(out), 6)
    calls.unlink()
    target = tmp_path / "verdicts.parquet"
    assert score_to(out, target, ["verify.options.limit=3", "verify.processes=1"]).right == 4
    check_verdicts(pq.read_table(target).to_pylist(), 3)
    assert sorted(map(int, calls.read_text().split())) == list(range(ROWS)), "once a row"
    assert score(out, ["verify.options.limit=3"]).judged == 2 * ROWS
    check_verdicts(samples(out), 3)


def test_the_verifiers_of_the_package_are_not_made_to_check_a_row_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    rejected: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "exact": ({}, {"answer": None}),
        "gsm8k": ({}, {"answer": "no number"}),
        "choice": ({}, {"answer": "Z"}),
        "regex": ({"pattern": "x"}, {"answer": None}),
        "code": ({}, {"prompt": "x"}),
    }
    for kind, (options, row) in rejected.items():
        spec = JudgeSpec(kind, f"tokabatch.scoring.verifiers.{kind}", "verify", None if kind == "code" else "answer", options)
        judge = Judge(spec)
        reason = judge.check(row)
        monkeypatch.setattr(judge, "check", None)
        (verdict,) = judge.verdicts(["x"], [row])
        assert reason is not None and (verdict.correct, verdict.error) == (None, reason), kind
