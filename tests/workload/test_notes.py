"""What is noted at the start of a run, in a plan, and at the end of a long run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.scripted_run import scripted_engine, scripted_job

from tokabatch import plan, run
from tokabatch.report.progress import NullProgress
from tokabatch.runner.shared import Shared


class Told(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def message(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": str(i)}) + "\n" for i in range(3)))
    return file


@pytest.mark.parametrize("shared", [None, Shared(units=2)])
def test_a_new_run_between_files_of_others(rows: Path, tmp_path: Path, shared: Shared | None) -> None:
    out = tmp_path / "home"
    out.mkdir()
    for name in (".profile", "slurm-1.out", "job.yaml", "report.html"):
        (out / name).touch()
    job = scripted_job(rows, out)
    assert not plan(job).notes
    for name in ("thesis.tex", "photos", "a.txt", "b.txt"):
        (out / name).touch()
    noted = f"output.path '{out}' already holds 4 other files and folders (a.txt, b.txt, photos, …), and those of the run"
    assert [note.startswith(noted) for note in plan(job).notes] == [True]
    first, second = Told(), Told()
    with scripted_engine():
        summary = run(job, first, shared=shared)
        assert run(job, second, shared=shared).exit_code == 0, "a continued run is where it was"
    assert sum(note.startswith(noted) for note in first.notes) == 1
    assert not any("already holds" in note for note in second.notes)
    # A run of seconds shows them just above; after a long one they are gone from the screen.
    assert summary.notes[0].startswith(noted) and "already holds 4" not in str(summary)
    long = str(replace(summary, seconds=3600.0, notes=(*summary.notes, "second", "third", "fourth", "fifth")))
    assert "Noted at the start" in long and "already holds 4" in long and "and 2 more notes above" in long
    assert "fourth" not in long


def test_continuations_that_nothing_scores(rows: Path, tmp_path: Path) -> None:
    def noted(**sections: Any) -> list[str]:
        return [note for note in plan(scripted_job(rows, tmp_path / "out", **sections)).notes if "mode: score" in note]

    (note,) = noted(prompt={"continuations": "options"})
    assert note.startswith("warning: prompt.continuations is 'options', which has no effect without `mode: score`")
    assert not noted(prompt={"continuations": "continuations"})


def test_prompts_that_show_the_answer(rows: Path, tmp_path: Path) -> None:
    def noted(template: str, **verify: str) -> list[str]:
        job = scripted_job(rows, tmp_path / "out", prompt={"template": template}, verify={"kind": "exact", **verify})
        return [note for note in plan(job).notes if "verify.answer" in note]

    assert not noted("Q: {{ question }} A:", answer="answer")
    (note,) = noted("Q: {{ question }} A:", answer="question")
    assert note.startswith("warning: prompt.template uses the column 'question', the reference answer")
    assert noted("{{ question }}{% if answer %} ({{ answer }}){% endif %}", answer="answer")
