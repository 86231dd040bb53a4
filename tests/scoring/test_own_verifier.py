"""A verifier of one's own: one file outside the package that the job names."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.scripted_run import scripted_job, scripted_run

from tokabatch import plan
from tokabatch.errors import OutputError

OWN = '''
from dataclasses import dataclass
from limits import MORE

@dataclass
class Shortest:
    letters: int

def verify(text, row):
    """Whether the text has as many letters as the reference says, or more."""
    reference = row["least"]
    if not isinstance(reference, int):
        raise ValueError("the reference is no number of letters")
    return len(text) >= Shortest(reference).letters + MORE
'''


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"What is {i}?", "least": [0, 1000, None][i % 3]}) + "\n" for i in range(9))
    )
    return file


def test_a_run_without_a_verdict_does_not_end_as_one_whose_samples_are_all_wrong(rows, tmp_path):
    own, out = tmp_path / "broken.py", tmp_path / "out"
    own.write_text("def verify(text, row):\n    return text.no_such_method()\n")
    summary = scripted_run(rows, out, verify={"kind": str(own)})
    assert (summary.exit_code, summary.ok, summary.unverified) == (3, 18, 18)
    assert "NO SAMPLE HAS A VERDICT" in str(summary)
    again = scripted_run(rows, out, verify={"kind": str(own)})
    assert (again.exit_code, again.steps) == (3, 0)
    own.write_text("def verify(text, row):\n    return None if row['least'] else False\n")
    summary = scripted_run(rows, tmp_path / "some", verify={"kind": str(own)})
    assert (summary.exit_code, summary.unverified) == (0, 6)


def test_a_file_outside_the_package_judges_the_samples(rows, tmp_path):
    own = tmp_path / "length.py"
    own.write_text(OWN)
    (tmp_path / "limits.py").write_text("MORE = 0")
    verify = {"kind": str(own), "answer": "least"}
    summary = scripted_run(rows, tmp_path / "out", verify=verify)
    samples = [row for shard in (tmp_path / "out" / "data").iterdir() for row in pq.read_table(shard).to_pylist()]
    assert len(samples) == 18
    assert all(sample["correct"] is {0: True, 1000: False, None: None}[sample["least"]] for sample in samples)
    assert summary.pass_at_k == {1: pytest.approx(1 / 3), 2: pytest.approx(1 / 3)}
    assert summary.unverified_reasons == ("ValueError: the reference is no number of letters in line 13 (6 samples)",)
    assert scripted_run(rows, tmp_path / "out", verify=verify).ok == 18
    own.write_text(OWN.replace(">=", "<="))
    with pytest.raises(OutputError, match=r"verify\.kind: .*length\.py has changed \([\d,]+ bytes\)\n"):
        scripted_run(rows, tmp_path / "out", verify=verify)
    own.write_text(OWN)
    (tmp_path / "limits.py").write_text("MORE = 1")
    with pytest.raises(OutputError, match=r"verify\.kind: limits\.py has changed \(8 bytes\)\n"):
        scripted_run(rows, tmp_path / "out", verify=verify)


def test_paths_are_those_of_the_shell(monkeypatch, tmp_path, rows):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN.replace("from limits import MORE", "MORE = 0"))
    for kind in ("~/mine.py", "mine.py", "./mine.py"):
        plan(scripted_job(rows, tmp_path / "out", verify={"kind": kind, "answer": "least"}))
