"""Judging a run's samples again: nothing but the verdicts changes, whatever comes in between."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.scripted_run import scripted_engine, scripted_job, scripted_run

from tokabatch import plan, run
from tokabatch.cli import main
from tokabatch.cli.signals import stop_on_signals
from tokabatch.errors import EXIT_COMPLETE, EXIT_ERRORS, EXIT_INTERRUPTED, EXIT_STOPPED, JobError, OutputError, Stopped
from tokabatch.output.claim import Claim
from tokabatch.output.existing_results import replace_shard
from tokabatch.output.export import Selection, export
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import inspect
from tokabatch.output.integrity import check
from tokabatch.output.manifest import read_manifest
from tokabatch.output.remedy import begin_record
from tokabatch.output.status import read_status
from tokabatch.output.unwritable import CANNOT_BE_WRITTEN
from tokabatch.report import review
from tokabatch.report.folder_state import what_is_left
from tokabatch.report.progress import LineProgress, MessagesOnly
from tokabatch.report.run_estimates import read_estimates
from tokabatch.runner import score as scoring
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.judge_again import NO_TEXT
from tokabatch.runner.score import score, score_to
from tokabatch.scheduling.contracts import NOT_JUDGED

OLD = {"kind": "gsm8k", "answer": "answer"}
THREE = "ValueError: three in line 3"
VERDICTS = ("correct", "verify_score", "verify_error", "extracted", "length")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [{"question": f"What is {i}?", "answer": str(i)} for i in range(12)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    return file


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    file = tmp_path / "even.py"
    file.write_text(
        "COLUMNS = {'length': int}\n"
        "def verify(text, row):\n"
        "    if row['answer'] == '3': raise ValueError('three')\n"
        "    return {'score': int(row['answer']) % 2 == 0, 'length': len(text)}\n"
    )
    return file


def samples(out: Path) -> list[dict[str, Any]]:
    found = [row for shard in sorted((out / "data").iterdir()) for row in pq.read_table(shard).to_pylist()]
    return sorted(found, key=lambda each: (each["row_index"], each["sample_index"]))


def without_verdicts(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in VERDICTS} for row in samples(out)]


def check_even(out: Path) -> None:
    for row in samples(out):
        number = row["row_index"]
        judged = row["status"] == "ok" and number != 3
        assert row["correct"] is (number % 2 == 0 if judged else None), row
        assert row["verify_error"] == (THREE if number == 3 else None)
        assert row["length"] == (len(row["text"]) if judged else None)


@contextmanager
def killed_after_a_file(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Inside, `score` is killed as soon as one file has new verdicts."""

    def once(*arguments: Any) -> None:
        replace_shard(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "replace_shard", once)
        yield


@pytest.mark.parametrize("beside", [False, True])
def test_a_judge_that_fails_everywhere_ends_as_a_run_of_it_does(
    beside: bool, rows: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    scripted_run(rows, out)
    good = judge.read_text()
    judge.write_text("def verify(text, row):\n    return row['anser'] in text\n")
    command = ["score", str(out), f"verify={{kind: {judge}}}", *(("--to", str(tmp_path / "v.parquet")) if beside else ())]
    monkeypatch.setattr(sys, "argv", ["tokabatch", *command])
    for text, code in ((judge.read_text(), EXIT_ERRORS), (good, EXIT_COMPLETE)):
        judge.write_text(text)
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code
        said = capsys.readouterr().out
        assert ("NO SAMPLE HAS A VERDICT" in said) == (code == EXIT_ERRORS)
        shown = (
            r"\n  estimated +pass@k by Chen" if code == EXIT_COMPLETE else r"Verified\n  no estimate +no sample has a verdict\n"
        )
        assert beside or re.search(shown, said), "as `status` says it"


@pytest.mark.parametrize("before", [OLD, None])
def test_another_judge(before: dict[str, str] | None, rows: Path, judge: Path, tmp_path: Path) -> None:
    out, output = tmp_path / "out", {"rows_per_shard": 7}
    scripted_run(rows, out, output=output, **({"verify": before} if before else {}))
    computed = without_verdicts(out)
    scored = score(out, [f"verify.kind={judge}", "verify.answer=null"] if before else [f"verify={{kind: {judge}}}"])
    assert (scored.judged, scored.reasons) == (24, {THREE: 2}) and scored.files > 1
    check_even(out)
    assert without_verdicts(out) == computed
    found = check(out)
    assert (found.exit_code, found.faults) == (0, ())
    manifest = read_manifest(OutputFolder(out))
    assert manifest is not None and manifest.job["verify"]["kind"] == str(judge)
    again = score(out)
    assert (again.judged, again.files, again.reasons) == (2, 1, {THREE: 2})
    with scripted_engine():
        assert run(scripted_job(rows, out, output=output, verify={"kind": str(judge)})).ok == 24
        # The suggested command does what it says.
        exact, odd = {"kind": "exact", "answer": "answer"}, {"kind": str(judge), "correct_from": 0.5, "answer": "question"}
        for other in (exact, odd, {"kind": str(judge)}, {"kind": str(judge)}):
            judge.write_text(judge.read_text() + "# edited\n")
            with pytest.raises(OutputError) as refused:
                run(scripted_job(rows, out, output=output, verify=other))
            command = re.search(r"The samples are the same: `(.*)` judges", str(refused.value))
            assert command
            _, _, folder, *overrides = shlex.split(command[1])
            assert score(Path(folder), overrides).judged == 24
            assert run(scripted_job(rows, out, output=output, verify=other)).ok == 24
        more = run(scripted_job(rows, out, output=output, verify={"kind": str(judge)}, generation={"n": 3}))
    assert more.ok == 36 and check(out).exit_code == 0
    check_even(out)


def test_interrupted_it_continues(rows: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, output = tmp_path / "out", {"rows_per_shard": 7}
    scripted_run(rows, out, verify=OLD, output=output)
    with killed_after_a_file(monkeypatch):
        score(out, [f"verify.kind={judge}", "verify.answer=null"])
    assert (check(out).exit_code, check(out).faults) == (75, ())
    with scripted_engine():
        with pytest.raises(OutputError, match=r"has not judged 3 of 4 files yet.*`tokabatch score"):
            run(scripted_job(rows, out, output=output, verify={"kind": str(judge)}))
        with pytest.raises(OutputError, match="holds a run that another verifier judged"):
            run(scripted_job(rows, out, output=output, verify=OLD))
    assert score(out).files == 3
    check_even(out)
    assert check(out).exit_code == 0


def test_samples_without_a_verdict_are_judged_again_and_no_others(rows: Path, tmp_path: Path) -> None:
    """The cause is outside of the judge's file: a file that it reads is not there yet."""
    out, judge, version = tmp_path / "out", tmp_path / "reading.py", tmp_path / "version.txt"
    version.write_text("1")
    judge.write_text(
        "from pathlib import Path\n"
        "COLUMNS = {'version': int}\n"
        "def verify(text, row):\n"
        "    here = Path(__file__).parent\n"
        "    if row['answer'] == '3': (here / 'three.txt').read_text()\n"
        "    return {'score': 1, 'version': int((here / 'version.txt').read_text())}\n"
    )
    summary = scripted_run(rows, out, verify={"kind": str(judge)}, output={"rows_per_shard": 7})
    lacking = [row["verify_error"] is not None for row in samples(out)]
    assert 0 < sum(lacking) == summary.unverified < summary.ok
    assert read_status(out).without_verdict == sum(lacking)
    version.write_text("2")
    scored = score(out)
    assert (scored.judged, scored.reasons.total()) == (sum(lacking), sum(lacking))
    (tmp_path / "three.txt").write_text("")
    scored = score(out)
    assert (scored.judged, scored.files, scored.reasons.total()) == (sum(lacking), 1, 0)
    # One of the 13 rows is an error row.
    assert scored.estimates[0].value == pytest.approx(12 / 13) and read_status(out).without_verdict == 0
    for row, lacked in zip(samples(out), lacking, strict=True):
        good = row["status"] == "ok"
        assert (row["correct"], row["version"]) == ((True, 2 if lacked else 1) if good else (None, None))
    assert score(out).files == 0 and check(out).exit_code == 0


def test_the_summary_and_the_page_follow_the_verdicts_that_are_filled_in(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run none of whose samples has a verdict, judged again in part, continued, and judged again."""
    out, judge = tmp_path / "out", tmp_path / "reading.py"
    judge.write_text(
        "from pathlib import Path\ndef verify(text, row): return bool(Path(__file__).with_name('reference.txt').read_text())\n"
    )
    sections: dict[str, Any] = {"verify": {"kind": str(judge)}, "output": {"rows_per_shard": 7}}
    summary = scripted_run(rows, out, **sections)
    assert (summary.exit_code, summary.unverified) == (3, summary.ok)
    assert "<p class=sub>" in page(out) and "errors.max_fraction" not in page(out)
    (tmp_path / "reference.txt").write_text("there")
    with killed_after_a_file(monkeypatch):
        score(out)
    continued = scripted_run(rows, out, **sections)
    assert 0 < continued.unverified < summary.ok and continued.exit_code == 0
    told = json.loads((out / "summary.json").read_text())
    assert (told["unverified"], told["exit_code"]) == (continued.unverified, 0)
    assert told["pass_at_k"] == {str(k): value for k, value in (continued.pass_at_k or {}).items()}
    assert told["this_start"] == {**told["this_start"], "steps": summary.steps}
    assert "errors.max_fraction" not in page(out) and f"<b class=bad>{continued.unverified}</b>" in page(out)
    score(out)
    assert json.loads((out / "summary.json").read_text())["unverified"] == 0
    assert "without a verdict" not in page(out)


def test_a_stopped_score_leaves_no_figure_of_before(
    rows: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it stops: summary.json says nothing of the verdicts, `status` and the page count those that are there."""
    out, reading = tmp_path / "out", tmp_path / "reading.py"
    reading.write_text(
        "from pathlib import Path\ndef verify(text, row): return bool(Path(__file__).with_name('reference.txt').read_text())\n"
    )
    summary = scripted_run(rows, out, verify={"kind": str(reading)}, output={"rows_per_shard": 7})
    assert summary.unverified == summary.ok == read_status(out).without_verdict
    (tmp_path / "reference.txt").write_text("there")

    def stop_in_the_middle(*overrides: str) -> None:
        with killed_after_a_file(monkeypatch):
            score(out, overrides)
        told = json.loads((out / "summary.json").read_text())
        assert (told["estimates"], told["pass_at_k"], told["unverified"]) == ({}, None, None)
        assert told["exit_code"] == EXIT_STOPPED, "the folder is not complete"
        assert told["ok"] == summary.ok and told["this_start"]["steps"] == summary.steps

    stop_in_the_middle()
    lacking = sum(row["status"] == "ok" and row["correct"] is None for row in samples(out))
    assert 0 < lacking < summary.ok and read_status(out).without_verdict == lacking
    assert f"<b class=bad>{lacking}</b><span>samples without a verdict" in page(out)
    score(out)
    told = json.loads((out / "summary.json").read_text())
    assert (told["unverified"], told["exit_code"], read_status(out).without_verdict) == (0, 0, 0) and told["pass_at_k"][
        "1"
    ] > 0.9

    # By another judge: the verdicts of the first one count nowhere.
    stop_in_the_middle(f"verify.kind={judge}")
    status = read_status(out)
    left = sum(row["status"] == "ok" for row in samples(out) if "length" not in row)
    assert status.of_another_judge == left > 0 == status.unjudged
    assert status.correct == sum(bool(row["correct"]) for row in samples(out) if "length" in row)
    assert read_estimates(OutputFolder(out)) == ()
    shown = page(out)
    assert f"<b class=bad>{left}</b><span>samples still to be judged" in shown and "pass@1" not in shown
    assert "pass@k by" not in shown, "nothing is estimated"
    with pytest.raises(OutputError, match=r"the verifier that the folder names has not judged .* files yet\. `tokabatch score"):
        export(out, tmp_path / "samples.jsonl")
    monkeypatch.setattr(sys, "argv", ["tokabatch", "status", str(out)])
    with pytest.raises(SystemExit):
        main()
    words = capsys.readouterr().out
    assert re.search(rf"judged earlier +{left}\b", words) and "still to be judged" in words
    assert re.search(rf"tokabatch score \S+ +judges {left} samples", words)
    assert "tokabatch score" in str(check(out).facts["result"])
    score(out)
    check_even(out)
    assert check(out).facts["result"] == "complete"
    assert read_status(out).of_another_judge is None and "samples still to be judged" not in page(out)


@pytest.mark.parametrize("at", ["write_summary", "mark_success"])
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_its_end_it_leaves_what_the_next_run_completes(
    at: str, after: bool, rows: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In front of either of the last two writes or behind it: no folder counts as complete without its figures."""
    out, verify = tmp_path / "out", {"kind": str(judge)}
    scripted_run(rows, out, verify=OLD)
    write = getattr(scoring, at)

    def killed(claim: Claim, *given: Any) -> None:
        if at == "write_summary" and not given[0]["estimates"]:
            return write(claim, *given)
        if after:
            write(claim, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, at, killed)
        score(out, [f"verify.kind={judge}", "verify.answer=null"])
    blank = not json.loads((out / "summary.json").read_text())["estimates"]
    assert not (blank and (out / "_SUCCESS").exists())
    scripted_run(rows, out, verify=verify)
    told = json.loads((out / "summary.json").read_text())
    assert told["estimates"]["mean score"][0] == pytest.approx(6 / 13) and told["unverified"] == 2
    assert (check(out).exit_code, check(out).facts["result"]) == (0, "complete")


def test_files_of_error_rows_alone_that_a_stopped_score_left_are_named(tmp_path: Path) -> None:
    """They hold no sample to judge, but no run continues before they name the judge."""
    assert what_is_left(tmp_path, {"of_another_judge": None, "pending": 0}) == ()
    (section,) = what_is_left(tmp_path, {"of_another_judge": 0, "pending": 0})
    assert section.rows == ((f"tokabatch score {tmp_path}", "names the judge in the files that are left"),)


def page(out: Path) -> str:
    return review.write_report(out).read_text()


def test_a_summary_without_any_verdict_is_mended_by_them(rows: Path, tmp_path: Path) -> None:
    """The exit code 3 of such a run would otherwise be taken for too many error rows."""
    out, judge = tmp_path / "out", tmp_path / "reading.py"
    judge.write_text("import pathlib\ndef verify(text, row): return int(pathlib.Path(__file__).with_name('r').read_text())\n")
    assert scripted_run(rows, out, verify={"kind": str(judge)}).exit_code == 3
    score(out)
    assert json.loads((out / "summary.json").read_text())["exit_code"] == 3
    (tmp_path / "r").write_text("1")
    score(out)
    assert json.loads((out / "summary.json").read_text())["exit_code"] == 0
    assert "errors.max_fraction" not in page(out)


def test_where_verdicts_stopped_rows_none_is_judged_again(rows: Path, tmp_path: Path) -> None:
    out, judge = tmp_path / "out", tmp_path / "reading.py"
    judge.write_text(
        "from pathlib import Path\n"
        "def verify(text, row):\n"
        "    if row['answer'] == '3': (Path(__file__).parent / 'three.txt').read_text()\n"
        "    return 1\n"
    )
    verify = {"kind": str(judge), "stop": {"after_correct": 1}}
    summary = scripted_run(rows, out, verify=verify, generation={"n": 4})
    (tmp_path / "three.txt").write_text("")
    shown = io.StringIO()
    assert summary.unverified > 0 and score(out, progress=MessagesOnly(shown)).judged == 0
    told = shown.getvalue().splitlines()
    what = "without a verdict: not judged again, as verdicts stop rows (verify.stop)"
    assert told == [f"note: {summary.unverified} samples {what}"]
    assert read_status(out).without_verdict == summary.unverified


def test_where_verdicts_stopped_rows_and_none_is_there_the_run_starts_over(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, judge = tmp_path / "out", tmp_path / "bad.py"
    judge.write_text("def verify(text, row): return row['anser']\n")
    summary = scripted_run(rows, out, verify={"kind": str(judge), "stop": {"after_correct": 1}}, generation={"n": 4})
    monkeypatch.setattr(sys, "argv", ["tokabatch", "score", str(out)])
    with pytest.raises(SystemExit):
        main()
    for said in (str(summary), capsys.readouterr().out):
        assert "then start over (--overwrite)" in " ".join(said.split()), said


def test_it_stops_on_request(rows: Path, tmp_path: Path) -> None:
    scripted_run(rows, tmp_path / "out", verify=OLD)
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ndef verify(text, row): time.sleep(5)\n")
    stop = Interruption(lambda: True)
    with pytest.raises(Stopped, match="the folder is as it was"):
        score(tmp_path / "out", [f"verify.kind={slow}", "verify.answer=null"], stop=stop)
    assert check(tmp_path / "out").exit_code == 0
    assert score(tmp_path / "out", [f"verify.kind={OLD['kind']}", "verify.answer=answer"]).judged == 0
    manifest = read_manifest(OutputFolder(tmp_path / "out"))
    assert manifest is not None and manifest.job["verify"]["kind"] == "gsm8k" and check(tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("other", [False, True])
def test_a_stopped_one_keeps_the_verdicts_of_a_part_of_a_file(other: bool, rows: Path, tmp_path: Path) -> None:
    out, calls, judge = tmp_path / "out", tmp_path / "calls.txt", tmp_path / "slow.py"
    judge.write_text(
        "import time\n"
        "def verify(text, row):\n"
        f"    with open({str(calls)!r}, 'a') as file: file.write(row['answer'] + '\\n')\n"
        "    time.sleep(0.1)\n"
        "    return True\n"
    )
    scripted_run(rows, out, verify=OLD)
    shown = io.StringIO()
    stop = Interruption(lambda: calls.exists() and len(calls.read_text().split()) > 5)
    with LineProgress(shown, interval=0.0) as progress, pytest.raises(Stopped) as stopped:
        score(out, [f"verify.kind={judge}", "verify.answer=null"], progress, stop)
    status = read_status(out)
    assert status.unjudged is not None and 0 < status.unjudged < 24 and status.of_another_judge is None
    kept = f"stopped: the verdicts of {24 - status.unjudged} of 24 samples are kept; `tokabatch score {out}` judges the others"
    assert str(stopped.value) == kept and check(out).exit_code == 75 and read_estimates(OutputFolder(out)) == ()
    assert json.loads((out / "summary.json").read_text())["exit_code"] == EXIT_INTERRUPTED
    assert f"samples {24 - status.unjudged}/24" in shown.getvalue().splitlines()[-1]
    assert re.search(r"judging    samples \d+/24  \d+ per second", shown.getvalue())
    (section,) = what_is_left(out, {"pending": 0, "unjudged": status.unjudged})
    assert section.rows == (("the same command again (`tokabatch run` or `score`)", f"judges {status.unjudged} samples"),)
    if other:
        assert score(out, ["verify.kind=gsm8k", "verify.answer=answer"]).judged == 24
    else:
        assert score(out).judged == status.unjudged
        assert all(row["correct"] for row in samples(out) if row["status"] == "ok")
    assert check(out).exit_code == 0 and read_status(out).unjudged == 0
    assert json.loads((out / "summary.json").read_text())["exit_code"] == EXIT_COMPLETE


def test_a_stopped_one_that_writes_a_file_writes_none(rows: Path, tmp_path: Path) -> None:
    scripted_run(rows, tmp_path / "out", verify=OLD)
    with pytest.raises(Stopped, match=r"verdicts\.parquet is not written, and the same command begins from the start"):
        score_to(tmp_path / "out", tmp_path / "verdicts.parquet", stop=Interruption(lambda: True))
    assert not (tmp_path / "verdicts.parquet").exists()


@pytest.mark.parametrize("beside", [False, True])
def test_ctrl_c_stops_it_while_it_loads_the_judge(beside: bool, rows: Path, tmp_path: Path) -> None:
    out, slow, target = tmp_path / "out", tmp_path / "slow.py", tmp_path / "verdicts.parquet"
    scripted_run(rows, out)
    slow.write_text("import time\ntime.sleep(15)\ndef verify(text, row): return True\n")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    began = time.monotonic()
    with stop_on_signals() as stop, pytest.raises(Stopped, match="is not written" if beside else "the folder is as it was"):
        timer.start()
        overrides = [f"verify={{kind: {slow}}}"]
        score_to(out, target, overrides, stop=stop) if beside else score(out, overrides, stop=stop)
    assert time.monotonic() - began < 10 and not target.exists()
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def rewrite(out: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace every sample in the folder by what `change` makes of it, as a commit of the run."""
    manifest = read_manifest(OutputFolder(out))
    assert manifest is not None
    with Claim(out) as claim:
        begin_record(claim, manifest, inspect(claim.folder, manifest).marked)
        for file in claim.folder.shards():
            table = pq.read_table(file.path)
            replace_shard(claim, file, [pa.Table.from_pylist(list(map(change, table.to_pylist())), schema=table.schema)])
        claim.reopen(keep_summary=True)


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """A judge that writes down the rows that it is called with."""
    file = tmp_path / "counting.py"
    file.write_text(
        "import json\nfrom pathlib import Path\n"
        "def verify(text, row):\n"
        "    with (Path(__file__).with_name('calls.jsonl')).open('a') as calls: print(json.dumps(row), file=calls)\n"
        "    return True\n"
    )
    return file


def take_calls(tmp_path: Path) -> list[dict[str, Any]]:
    """Return the rows that the judge was called with since the last call."""
    file = tmp_path / "calls.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return found


@pytest.mark.parametrize("stop", [None, {"after_correct": 9}])
@pytest.mark.parametrize("by", ["score", "run"])
def test_samples_that_a_stopped_run_left_unjudged_are_judged_and_no_others(
    stop: dict[str, int] | None, by: str, rows: Path, counting: Path, tmp_path: Path
) -> None:
    out, verify = tmp_path / "out", {"kind": str(counting), **({"stop": stop} if stop else {})}
    scripted_run(rows, out, verify=verify)
    take_calls(tmp_path)
    unjudged = {"correct": None, "verify_score": None, "verify_error": NOT_JUDGED}
    wanted = [(2, 0), (2, 1), (5, 1)]
    rewrite(out, lambda row: {**row, **(unjudged if (row["row_index"], row["sample_index"]) in wanted else {})})
    status = read_status(out)
    assert (status.unjudged, status.without_verdict, status.of_another_judge) == (3, 0, None)
    told = json.loads((out / "summary.json").read_text())
    (out / "summary.json").write_text(json.dumps({**told, "exit_code": 75}))
    if by == "score":
        assert score(out).judged == 3
    else:
        scripted_run(rows, out, verify=verify)
    assert json.loads((out / "summary.json").read_text())["exit_code"] == 0
    # The calls of one sample each, in any order.
    assert sorted(row["answer"] for row in take_calls(tmp_path)) == ["2", "2", "5"]
    assert read_status(out).unjudged == 0 and check(out).exit_code == 0
    assert all(row["correct"] for row in samples(out) if row["status"] == "ok")


@pytest.mark.parametrize(
    ("lines", "id_column"),
    [
        ([{"question": "a"}, {"question": "b"}], None),
        ([{"question": "a", "id": 5}, {"question": "b", "id": 6}], None),
        ([{"question": "a", "id": 5}, {"question": "b", "id": 6}], "id"),
        ([{"question": "a", "id": "5"}, {"question": "b", "id": "x"}], "id"),
        ([{"question": "a", "id": "5"}, {"question": "b", "id": 6}], "id"),
        ([{"question": "a", "name": "x"}, {"question": "b", "name": "y"}], "name"),
    ],
)
def test_the_judge_gets_the_row_that_it_got_in_the_run(
    lines: list[dict[str, Any]], id_column: str | None, counting: Path, tmp_path: Path
) -> None:
    """Whether it is called by a run, by `score`, with --to, or by a run that judges what an earlier one left unjudged."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sections: dict[str, Any] = {"input": {"id_column": id_column}, "verify": {"kind": str(counting)}, "generation": {"n": 1}}
    scripted_run(rows, out, **sections)
    in_order = partial(sorted, key=json.dumps)
    given = in_order(take_calls(tmp_path))
    assert given == in_order(lines)
    score_to(out, tmp_path / "verdicts.parquet")
    assert in_order(take_calls(tmp_path)) == given
    counting.write_text(counting.read_text() + "# edited\n")
    score(out)
    assert in_order(take_calls(tmp_path)) == given
    rewrite(out, lambda row: {**row, "correct": None, "verify_error": NOT_JUDGED})
    scripted_run(rows, out, **sections)
    assert in_order(take_calls(tmp_path)) == given


def test_a_judge_gets_all_columns_of_samples_that_were_left_unjudged(counting: Path, tmp_path: Path) -> None:
    """Also those that the output does not carry."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text(json.dumps({"question": "a", "answer": "1"}) + "\n")
    sections: dict[str, Any] = {"output": {"columns": ["question"]}, "verify": {"kind": str(counting)}}
    scripted_run(rows, out, **sections)
    take_calls(tmp_path)
    rewrite(out, lambda row: {**row, "correct": None, "verify_error": NOT_JUDGED})
    scripted_run(rows, out, **sections)
    assert take_calls(tmp_path) == [{"question": "a", "answer": "1"}] * 2


def test_a_sample_whose_text_was_not_written_keeps_its_reason(rows: Path, judge: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scripted_run(rows, out, verify={"kind": str(judge)})
    lost = {"status": "error", "error_code": CANNOT_BE_WRITTEN, "error_message": "not every column", "text": None}
    lost_rows = {(3, 0): {}, (4, 0): {}, (5, 0): {"correct": None, "verify_error": NOT_JUDGED}}

    def lose(row: dict[str, Any]) -> dict[str, Any]:
        changes = lost_rows.get((row["row_index"], row["sample_index"]))
        return row if changes is None else {**row, **lost, **changes}

    def verdicts() -> list[tuple[bool | None, str | None]]:
        found = {(row["row_index"], row["sample_index"]): row for row in samples(out)}
        return [(found[place]["correct"], found[place]["verify_error"]) for place in lost_rows]

    rewrite(out, lose)
    assert score(out).judged == 1, "the other sample of row 3"
    assert verdicts() == [(None, THREE), (True, None), (None, NO_TEXT)]
    status = read_status(out)
    assert (status.without_verdict, status.unjudged) == (1, 0)
    # Another judge has said nothing of them, and cannot.
    score(out, ["verify.correct_from=0.5"])
    assert verdicts() == [(None, NO_TEXT)] * 3
    # Nor is anything left to judge of them: the files and the mark stay as they are.
    judge.write_text(judge.read_text().replace("'3'", "'none'"))
    score(out, [f"verify.kind={judge}"])
    before = {file: file.stat().st_mtime_ns for file in (*(out / "data").iterdir(), out / "_SUCCESS")}
    assert score(out).files == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_judge_without_any_verdict_costs_no_earlier_ones(rows: Path, judge: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scripted_run(rows, out, verify={"kind": str(judge)}, output={"rows_per_shard": 7})
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.suffix in (".parquet", ".json")}
    for verify, told in (
        ("{kind: regex, answer: answer, options: {pattern: '('}}", r"pattern '\(' is not a valid regular expression"),
        (f"{{kind: {judge}:verdict}}", "no verdict for any of the first .*KeyError: 'anser' in line .* stay as they are"),
    ):
        judge.write_text(judge.read_text() + "\ndef verdict(text, row): return row['anser'] in text\n")
        with pytest.raises(JobError, match=told):
            score(out, [f"verify={verify}"])
        assert {file: file.read_bytes() for file in before} == before
        assert check(out).exit_code == 0 and (out / "_SUCCESS").exists()


def test_a_killed_one_continues_with_a_file_that_the_judge_fails_on(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, judge = tmp_path / "out", tmp_path / "late.py"
    judge.write_text("def verify(text, row):\n    return row['answer'] == '0' or row['late']\n")
    scripted_run(rows, out, verify=OLD, output={"rows_per_shard": 2})
    with killed_after_a_file(monkeypatch):
        score(out, [f"verify.kind={judge}", "verify.answer=null"])
    assert score(out).reasons["KeyError: 'late' in line 2"] == 22 and check(out).exit_code == 0


def test_error_rows_are_no_samples_without_a_verdict(rows: Path, judge: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scripted_run(rows, out, verify={"kind": str(judge)})
    lost = {"status": "error", "error_code": CANNOT_BE_WRITTEN, "error_message": "not every column", "text": None}
    rewrite(out, lambda row: {**row, **lost} if row["row_index"] < 9 else row)
    scored = score_to(out, tmp_path / "verdicts.parquet")
    assert 0 < scored.judged < scored.reasons[NO_TEXT] and not scored.silent


def test_the_page_says_what_counts_as_right_where_scores_lie_between(rows: Path, tmp_path: Path) -> None:
    judge, said = tmp_path / "half.py", "<tr><th>right<td>a score of verify.correct_from (1.0 by default) or more"
    for source, shown in (("return 0.5 * (len(text) % 3)", True), ("return len(text) % 2 == 0", False)):
        judge.write_text(f"def verify(text, row):\n    {source}\n")
        scripted_run(rows, out := tmp_path / str(shown), verify={"kind": str(judge)})
        assert (said in page(out)) is shown


def test_refusals(rows: Path, judge: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="no run has written here"):
        score(out)
    scripted_run(rows, out, output={"columns": ["question"]})
    with pytest.raises(JobError, match="has no verifier"):
        score(out)
    with pytest.raises(JobError, match=r"`generation\.n=4`: only keys under verify"):
        score(out, ["generation.n=4"])
    with pytest.raises(JobError, match=r"`kind=exact`: only keys under verify .*; write verify\.kind=exact"):
        score(out, ["kind=exact"])
    with pytest.raises(OutputError, match=r"no column 'answer' \(see output\.columns\); it has question"):
        score(out, ["verify={kind: exact, answer: answer}"])
    with pytest.raises(JobError, match=r"there is no file /.*none\.py; check the path"):
        score(out, ["verify.kind=./none.py"])
    with Claim(out), pytest.raises(OutputError, match="another run is writing"):
        score(out, [f"verify.kind={judge}"])
    assert check(out).exit_code == 0


def test_the_figures_follow_the_judge(rows: Path, judge: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = scripted_run(rows, out, verify=OLD)
    names = ["mean score", "pass@1", "pass@2"]
    assert [each.name for each in before.estimates] == names
    scored = score(out, [f"verify.kind={judge}", "verify.answer=null"])
    # Of 12 rows 6 are even, and one row is no prompt: its samples count as wrong.
    assert [each.name for each in scored.estimates] == names
    assert all(each.value == pytest.approx(6 / 13) and each.low < each.value < each.high for each in scored.estimates)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["pass_at_k"] == {"1": pytest.approx(6 / 13), "2": pytest.approx(6 / 13)}
    assert summary["estimates"]["mean score"][0] == pytest.approx(6 / 13)


def test_a_part_of_a_run_has_no_figures(rows: Path, tmp_path: Path) -> None:
    with scripted_engine():
        job = scripted_job(rows, tmp_path / "out", verify=OLD, engine={"max_running": 2})
        stop = iter([False] * 8)
        part = run(job, should_stop=lambda: not next(stop, False) and next(stop, None) is None)
        assert part.pending and part.verifies and part.estimates == () and part.pass_at_k == {}
        assert score(tmp_path / "out").estimates == ()
        assert run(job).estimates


def test_beside_a_run_the_verdicts_go_into_a_file(rows: Path, judge: Path, tmp_path: Path) -> None:
    out, target = tmp_path / "out", tmp_path / "verdicts.parquet"
    scripted_run(rows, out, verify=OLD, output={"rows_per_shard": 7})
    files = sorted(path for path in out.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    overrides = [f"verify.kind={judge}", "verify.answer=null"]
    with Claim(out):
        scored = score_to(out, target, overrides)
    assert (scored.judged, scored.reasons, scored.done) == (24, {THREE: 2}, 26)
    assert {path: path.read_bytes() for path in files} == before
    verdicts = pq.read_table(target).sort_by([("row_index", "ascending"), ("sample_index", "ascending")]).to_pylist()
    score(out, overrides)
    assert scored.right == sum(bool(row["correct"]) for row in verdicts)
    assert verdicts == [{name: row[name] for name in verdicts[0]} for row in samples(out)]
    for wrong, told in (
        (tmp_path / "verdicts.csv", r"name a file that ends in \.parquet"),
        (out / "data" / "x.parquet", "lies among the run's own shards"),
        (tmp_path / "no" / "x.parquet", "does not exist; create it first"),
        (judge / "x.parquet", r"\.py is not a folder"),
    ):
        with pytest.raises(OutputError, match=f"--to .*{told}"):
            score_to(out, wrong, overrides)


def test_a_run_of_which_no_row_can_be_judged_does_not_begin(rows: Path, tmp_path: Path) -> None:
    for verify, told in (
        ({"kind": "choice", "answer": "answer", "options": {"choices": "none"}}, "its column 'none' is not a list"),
        ({"kind": "gsm8k", "answer": "question", "options": {}}, ""),
    ):
        if not told:
            assert scripted_run(rows, tmp_path / "out", verify=verify).ok == 24, "these rows can be judged"
            continue
        with pytest.raises(JobError, match=f"^verify: no row can be judged, row 0 .* because {re.escape(told)}"):
            scripted_run(rows, tmp_path / "out", verify=verify)
        assert not list(tmp_path.glob("out/data/*"))


def test_a_run_begins_if_the_judge_is_lost_while_it_checks_the_rows(rows: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("import os\ndef check(row): os._exit(3)\ndef verify(text, row): return True\n")
    notes = plan(scripted_job(rows, tmp_path / "out", verify={"kind": str(judge)})).notes
    assert any("row 0 " in note and "cannot be judged: " in note and "code 3" in note for note in notes), notes


def test_a_run_with_samples_goes_on_though_no_row_can_be_judged_now(rows: Path, tmp_path: Path) -> None:
    judge, flag, out = tmp_path / "judge.py", tmp_path / "flag", tmp_path / "out"
    judge.write_text(
        f"import os\ndef check(row):\n    if os.path.exists({str(flag)!r}): raise ValueError('no reference')\n"
        "def verify(text, row): return True\n"
    )
    job = scripted_job(rows, out, verify={"kind": str(judge)})
    with scripted_engine():
        run(job)
        flag.touch()
        assert any("cannot be judged: no reference" in note for note in plan(job).notes)
        assert run(job).ok == 24
        with pytest.raises(JobError, match="no row can be judged"):
            run(job, overwrite=True)


def test_an_export_does_not_replace_what_the_job_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    line = json.dumps({"question": "x", "answer": "1"}) + "\n"
    Path("in/rows.jsonl").write_text(line)
    Path("shots.jsonl").write_text(line)
    few_shot = {"path": "shots.jsonl", "k": 1, "template": "{{ question }}"}
    prompt = {"template": "{{ question }}", "few_shot": few_shot}
    for place, given in enumerate(("in/rows.jsonl", "in/*.jsonl", "in")):
        out = Path(f"out{place}")
        scripted_run(Path(given), out, prompt=prompt)
        monkeypatch.chdir("in")
        for target in ("rows.jsonl", "../shots.jsonl", *(("new.jsonl",) if place else ())):
            with pytest.raises(
                OutputError, match=r"is or would be one of the files that the job reads \((input|prompt\.few_shot)\.path "
            ):
                export(Path("..") / out, Path(target))
        export(Path("..") / out, Path("new.csv"))
        monkeypatch.chdir(tmp_path)
        export(out, Path("new.jsonl"))
    # Nor is a page drawn before it is known that it can be written.
    monkeypatch.setattr(review, "read_record", None)
    monkeypatch.setattr(sys, "argv", ["tokabatch", "report", "out0", "--to", "none/page.html"])
    with pytest.raises(SystemExit):
        main()
    assert "the folder none does not exist; create it first" in capsys.readouterr().err
    assert Path("in/rows.jsonl").read_text() == Path("shots.jsonl").read_text() == line


def test_columns_of_the_input_with_names_of_ours_go_all_the_way(tmp_path: Path) -> None:
    """To the prompt and the judge under their own names, to the output as `input_text` and so on; also when further rows change
    their types, and when a judge takes one more name."""
    rows, out, judge = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "judge.py"
    row = {"text": "a question", "id": "x", "status": 1, "level": 3}
    rows.write_text(json.dumps(row) + "\n")
    judge.write_text(
        "def verify(text, row): return row['text'] == 'a question' and row['id'] == 'x' and 'input_text' not in row\n"
    )
    changes: dict[str, Any] = {"prompt": {"template": "{{ text }} {{ id }}"}, "verify": {"kind": str(judge)}}
    assert scripted_run(rows, out, **changes).pass_at_k == {1: 1.0, 2: 1.0}
    rows.write_text(json.dumps(row) + "\n" + json.dumps({**row, "status": "new"}) + "\n")
    assert scripted_run(rows, out, **changes).pass_at_k == {1: 1.0, 2: 1.0}
    found = pq.read_table(out / "data")
    assert found["input_text"].to_pylist() == ["a question"] * 4 and found["status"].to_pylist() == ["ok"] * 4
    assert found["input_status"].to_pylist() == ["1", "1", '"new"', '"new"'] and found["level"].to_pylist() == [3] * 4
    judge.write_text(
        "COLUMNS = {'level': str}\n"
        "def verify(text, row): return {'score': (row['level'], row['id']) == (3, 'x'), 'level': 'b'}\n"
    )
    scored = score(out, ["verify.kind=" + str(judge)])
    assert (scored.judged, scored.reasons) == (4, {})
    found = pq.read_table(out / "data")
    assert (
        found["input_level"].to_pylist() == [3] * 4
        and found["level"].to_pylist() == ["b"] * 4
        and all(found["correct"].to_pylist())
    )
    assert scripted_run(rows, out, **changes).ok == 4 and check(out).exit_code == 0


def test_a_column_correct_of_the_input_is_no_verdict(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text(json.dumps({"correct": True, "question": "x"}) + "\n")
    scripted_run(rows, out, prompt={"template": "{{ question }}"})
    assert read_status(out).correct is None and review.read_record(out).samples_shown.keys() == {"first", "longest"}
    with pytest.raises(OutputError, match="the run was not verified"):
        export(out, tmp_path / "right.jsonl", Selection(where="correct"))
