"""Programs that models write, run against the tests of HumanEval's and MBPP's rows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.scripted_run import scripted_job, scripted_run

from tokabatch.errors import JobError
from tokabatch.job import VerifyConfig
from tokabatch.scoring.judge import Verdict
from tokabatch.scoring.pool import JudgePool, judge_spec

HUMAN_EVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'def add(a: int, b: int) -> int:\n    """The sum."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
}
MBPP = {"text": "Write add.", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": "import math"}
HANDED_IN = {
    "continues the prompt": ("    return a + b\n", "passed"),
    "a whole function": ("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", "passed"),
    "wrong": ("    return a - b\n", "AssertionError"),
    "no Python": ("is what we need", "SyntaxError"),
    "ends early": ("    exit(0)\n", "ended with code 0 before its tests did"),
    "ends at once": ("    return 1\nimport os\nos._exit(0)\n", "ended with code 0 before its tests did"),
    "hangs": ("    while True: pass\n", "not done within 2 s"),
    "eats memory": ("    return bytearray(1 << 40)\n", "MemoryError"),
    "fills the disk": ("    f = open('x', 'wb')\n    while True: f.write(bytes(1 << 20))\n", "File too large"),
    "leaves processes": (
        "    import subprocess\n    subprocess.Popen(['sleep', '7779'], start_new_session=True)\n    return a + b\n",
        "passed",
    ),
    "looks for secrets": ("    import os\n    assert 'SECRET' not in os.environ\n    return a + b\n", "passed"),
}


def judge_all(texts: list[str], row: dict[str, Any]) -> list[Verdict]:
    verify = VerifyConfig(kind="code", allow_code_execution=True, options={"seconds": 2.0})
    pool = JudgePool(judge_spec(verify), 2, verify.seconds)
    try:
        tickets = pool.submit(texts, [row] * len(texts))
        assert pool.wait(tickets, 100.0)
        return [ticket.verdict for ticket in tickets if ticket.verdict is not None]
    finally:
        pool.close()


def test_human_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "token")
    verdicts = judge_all([text for text, _ in HANDED_IN.values()], HUMAN_EVAL)
    for name, (_, outcome), verdict in zip(HANDED_IN, HANDED_IN.values(), verdicts, strict=True):
        assert verdict.error is None and verdict.correct is (outcome == "passed"), (name, verdict)
        assert outcome in verdict.columns["outcome"], (name, verdict)
    time.sleep(0.1)
    assert not [each for each in psutil.process_iter(["cmdline"]) if "7779" in (each.info["cmdline"] or [])]


def test_mbpp() -> None:
    good, bad = judge_all(["```python\ndef add(a, b):\n    return a + b\n```", "def add(a, b): return a"], MBPP)
    assert good.correct is True and bad.correct is False


def test_it_runs_only_where_that_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"can read and delete your files.*allow_code_execution to true"):
        scripted_job("x.jsonl", tmp_path / "out", verify={"kind": "code"})


def test_a_run(tmp_path: Path) -> None:
    rows = tmp_path / "human_eval.jsonl"
    lines = [{**HUMAN_EVAL, "task_id": f"HumanEval/{row}", "question": "def"} for row in range(4)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"question": "no tests", "prompt": "x"}]))
    before = set(Path("/tmp").glob("tokabatch-code-*"))
    summary = scripted_run(rows, tmp_path / "out", verify={"kind": "code", "allow_code_execution": True})
    assert (summary.ok, summary.unverified, summary.pass_at_k) == (10, 2, {1: 0.0, 2: 0.0})
    assert summary.unverified_reasons[0].startswith("the row has neither HumanEval's columns")
    assert set(Path("/tmp").glob("tokabatch-code-*")) <= before
