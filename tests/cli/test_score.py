"""What `tokabatch score` says, and what other commands say of a folder that it left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from support.scripted_run import scripted_job, scripted_run

from tokabatch import Job, run
from tokabatch.cli import folder as commands
from tokabatch.errors import OutputError, Stopped
from tokabatch.output.status import read_status
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.score import score

ANSWER = {"kind": "exact", "answer": "answer"}
OPTION = "def verify(text, row, ci=False): return ci\n"
PLAIN = "def verify(text, row): return True\n"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(6)))
    return file


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    file = tmp_path / "judge.py"
    file.write_text(PLAIN)
    return file


def told_by_score(capsys: pytest.CaptureFixture[str], out: Path, *overrides: str, to: Path | None = None) -> tuple[str, str]:
    """What it prints to standard output, and to standard error, each in one line."""
    capsys.readouterr()
    commands.score(out, [*overrides], to, quiet=True)
    said = capsys.readouterr()
    return " ".join(said.out.split()), " ".join(said.err.split())


def test_an_export_and_a_page_say_how_many_samples_a_stopped_score_left(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, judge, calls = tmp_path / "out", tmp_path / "slow.py", tmp_path / "calls.txt"
    judge.write_text(
        "import time\n"
        "def verify(text, row):\n"
        f"    with open({str(calls)!r}, 'a') as file: file.write('x')\n"
        "    time.sleep(0.1)\n"
        "    return True\n"
    )
    scripted_run(rows, out)
    stopped_by = Interruption(lambda: calls.exists() and len(calls.read_text()) > 2)
    with pytest.raises(Stopped):
        score(out, [f"verify.kind={judge}", "verify.processes=1"], stop=stopped_by)
    unjudged = read_status(out).unjudged
    assert unjudged is not None and 1 < unjudged < 12
    monkeypatch.setattr("tokabatch.report.review.write_report", lambda out, to: out / "report.html")
    note = f"warning: {unjudged} of 12 samples have no verdict yet; `tokabatch score {out}` judges them"
    capsys.readouterr()
    commands.report(out, None)
    assert " ".join(capsys.readouterr().err.split()) == note
    for where in (None, "wrong"):
        commands.export(out, tmp_path / "all.csv", False, None, where, None, None)
        assert note in " ".join(capsys.readouterr().err.split())
    judge.write_text(PLAIN)
    score(out)
    commands.export(out, tmp_path / "all.csv", False, None, None, None, None)
    assert "warning" not in capsys.readouterr().err


def test_none_right_is_followed_by_what_to_check(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, beside = tmp_path / "out", tmp_path / "verdicts.parquet"
    scripted_run(rows, out)
    hint = "check the judge, the form of the references, and whether samples are cut off"
    wrong = ("verify.kind=exact", "verify.answer=answer")
    assert f"none is right: {hint}" in told_by_score(capsys, out, *wrong, to=beside)[0]
    said, _ = told_by_score(capsys, out, *wrong)
    assert "pass@1 0.0000" in said and f"none is right {hint}" in said
    right = tmp_path / "right.py"
    right.write_text(PLAIN)
    assert hint not in told_by_score(capsys, out, f"verify.kind={right}", to=beside)[0]
    assert hint not in told_by_score(capsys, out, f"verify.kind={right}")[0]
    right.write_text("def verify(text, row): return None\n")
    with pytest.raises(typer.Exit):
        commands.score(out, [], None, quiet=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "NO SAMPLE HAS A VERDICT" in said and hint not in said


def test_where_all_are_judged_it_says_so(rows: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    scripted_run(rows, out, verify={"kind": str(judge)})
    assert told_by_score(capsys, out)[0].startswith(f"{out}: every sample has a verdict Verified")
    judge.write_text(OPTION)
    assert told_by_score(capsys, out)[0].startswith(f"{out}: 12 samples judged in 1 file ")


def test_another_verifier_gets_no_options_of_the_earlier_one(
    rows: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = tmp_path / "out", tmp_path / "first.py"
    first.write_text(OPTION)
    monkeypatch.chdir(tmp_path)
    scripted_run(rows, out, verify={"kind": "./first.py", "answer": "answer", "options": {"ci": True}})
    first.write_text(OPTION + "\n")
    told_by_score(capsys, out, "verify.kind=first.py")
    assert read_status(out).correct == 12, "the same file has its options"
    _, noted = told_by_score(capsys, out, f"verify.kind={judge}")
    assert f'verify.options {{"ci": true}} of first.py are not passed to {judge}; write options of its own as' in noted
    assert read_status(out).correct == 12
    _, noted = told_by_score(capsys, out, "verify.kind=./first.py", "verify.options.ci=true")
    assert not noted and read_status(out).correct == 12
    told_by_score(capsys, out, "verify.kind=exact")
    assert read_status(out).correct == 0, "exact has the answer's column of before"


@pytest.mark.parametrize("options", [{}, {"ci": True, "words": "a, b: {c}"}])
def test_the_job_of_a_folder_that_was_judged_is_told_which_section_it_needs(
    options: dict[str, object], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, judge = tmp_path / "out", tmp_path / "judge.py"
    judge.write_text("def verify(text, row, **options): return True\n")
    scripted_run(rows, out)
    given = (f"verify.kind={judge}", "verify.answer=answer", *([f"verify.options={json.dumps(options)}"] if options else []))
    said, _ = told_by_score(capsys, out, *given)
    section = said.partition("to continue this run, its job must say `")[2].partition("`")[0]
    if not options:
        assert section == f"verify: {{kind: {judge}, answer: answer}}"
    with pytest.raises(OutputError) as refused:
        scripted_run(rows, out)
    advice = f"write `{section}` into the job; or choose another output.path."
    assert str(refused.value).endswith(f"To continue the run with its verdicts, {advice}")
    assert "this job has no section `verify`:\n  verify.kind: " in str(refused.value)
    file = tmp_path / "job.yaml"
    sections = {name: value for name, value in scripted_job(rows, out).given().items() if name != "verify"}
    file.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in sections.items()) + f"\n{section}\n")
    assert run(Job.load(file)).ok == 12
    # What no verdict depends on needs no place in the job.
    assert "its job must say" not in told_by_score(capsys, out, "verify.processes=1")[0]
    assert "its job must say" not in told_by_score(capsys, out)[0]
