"""Many starts of one run leave few files: small shards and records of steps are joined, and starts do not get slower."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.output_checker import check_success, table
from support.scripted_run import scripted_engine, scripted_job

from tokabatch import run
from tokabatch.output import joining
from tokabatch.output.export import export
from tokabatch.output.folder import OutputFolder
from tokabatch.output.integrity import check
from tokabatch.output.status import output_lengths
from tokabatch.output.steps import read_steps
from tokabatch.report.progress import NullProgress
from tokabatch.storage.atomic_files import DurableFiles
from tokabatch.storage.listing import ListedFile

ROWS, SHARD = 30, 16


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {row}?", "number": row}) + "\n" for row in range(ROWS)))
    return path


class Told(NullProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def start(rows: Path, out: Path, polls: int | None = None, **sections: Any) -> tuple[int, Told]:
    """One start, stopped after some steps where `polls` are given."""
    told, left = Told(), iter(range(polls if polls is not None else 1 << 30))
    output = {"path": str(out), "rows_per_shard": SHARD}
    with scripted_engine():
        job = scripted_job(rows, out, output=output, engine={"max_running": 4}, **sections)
        return run(job, told, lambda: next(left, None) is None).exit_code, told


def leave_small_shards(rows: Path, out: Path, starts: int = 8) -> None:
    for _ in range(starts):
        assert start(rows, out, 9)[0] == 130
    assert len(files(out)) == starts


def files(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "data").iterdir())


def test_small_shards_and_steps_of_many_starts_are_joined_when_the_run_completes(rows, tmp_path):
    out = tmp_path / "out"
    assert start(rows, tmp_path / "whole")[0] == 0
    leave_small_shards(rows, out)
    assert start(rows, out)[0] == 0
    assert len(files(out)) == 4, "sixty samples, sixteen in a shard"
    assert [path.name for path in out.glob("steps-*")] == ["steps-00000.parquet"]
    assert table(out) == table(tmp_path / "whole") and check_success(out) == 2 * ROWS
    assert check(out).exit_code == 0
    steps = read_steps(OutputFolder(out))
    assert steps is not None and len(next(iter(steps.values()))) > 8 * 8
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert start(rows, out)[0] == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # As a version from before replicas left them.
    file = out / "steps-00000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["replica"]), file)
    found = read_steps(OutputFolder(out))
    assert found is not None and {*found["replica"].tolist()} == {0.0} and found.keys() == steps.keys()


@pytest.mark.parametrize(
    "count",
    [lambda out: export(out, out.parent / "all.jsonl").samples, lambda out: len(output_lengths(out))],
    ids=["export", "lengths"],
)
def test_a_reader_whose_listing_is_joined_away_begins_anew(count, rows, tmp_path, monkeypatch):
    out = tmp_path / "out"
    leave_small_shards(rows, out)
    real = OutputFolder.shards

    def listed_before_the_run_completes(folder: OutputFolder) -> tuple[ListedFile, ...]:
        shards = real(folder)
        monkeypatch.setattr(OutputFolder, "shards", real)
        assert start(rows, out)[0] == 0
        return shards

    monkeypatch.setattr(OutputFolder, "shards", listed_before_the_run_completes)
    assert count(out) == 2 * ROWS
    assert len(files(out)) == 4


def test_shards_of_half_the_usual_size_and_more_stay_as_they_are(rows, tmp_path):
    out = tmp_path / "out"
    assert start(rows, out, 40)[0] == 130
    full = {name: (out / "data" / name).stat().st_ino for name in files(out)[:-1]}
    for _ in range(3):
        start(rows, out, 9)
    assert start(rows, out)[0] == 0 and full and len(files(out)) == 4
    assert {name: (out / "data" / name).stat().st_ino for name in full} == full
    assert check(out).exit_code == 0


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC])
@pytest.mark.parametrize("call", ["exchange", "make_folder"])
def test_a_system_that_refuses_keeps_the_small_shards(call, error, rows, tmp_path, monkeypatch):
    out, real = tmp_path / "out", getattr(DurableFiles, call)
    leave_small_shards(rows, out, 3)

    def refuse(self: DurableFiles, path: Path, *more: Path) -> None:
        if out / "_tmp" / "data" in (path, *more):
            raise OSError(error, "refused")
        real(self, path, *more)

    monkeypatch.setattr(DurableFiles, call, refuse)
    code, told = start(rows, out)
    assert code == 0 and any("small files are not joined: " in text and "refused" in text for text in told.texts)
    assert len(files(out)) > 4 and not (out / "_tmp").exists() and check(out).exit_code == 0
    assert check_success(out) == 2 * ROWS
    first = out / "data" / files(out)[0]
    first.unlink()
    assert check(out).exit_code == 4, "the record names the small ones again"


@pytest.mark.parametrize(("swapped", "exit_code"), [(False, 0), (True, 0), (False, 3)])
def test_a_disk_that_is_full_while_shards_are_joined_ends_a_complete_run(swapped, exit_code, rows, tmp_path, monkeypatch):
    out, judge = tmp_path / "out", tmp_path / "silent.py"
    judge.write_text("def verify(text, row):\n    raise ValueError\n")
    # Where no judge gives a verdict, the run ends with 3, as it does without this fault.
    sections = {"verify": {"kind": str(judge)}} if exit_code else {}
    assert start(rows, out, 40, **sections)[0] == 130
    for _ in range(3):
        start(rows, out, 9, **sections)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    real, commits = joining.record_commit, []

    def record_commit(*given: Any) -> None:
        """Fails once everything is recorded, or at once."""
        commits.append(given[1].name)
        if swapped:
            real(*given)
        if not swapped or len(commits) == len(files(out)):
            full()

    if not swapped:
        monkeypatch.setattr(DurableFiles, "exchange", full)
    monkeypatch.setattr(joining, "record_commit", record_commit)
    code, told = start(rows, out, **sections)
    assert told.texts[-1].startswith("every sample is committed and the run is complete; small files may"), told.texts
    assert not any("again" in text for text in told.texts), told.texts
    assert code == exit_code
    assert check_success(out) == 2 * ROWS and check(out).exit_code == 0


def test_a_stop_while_shards_are_joined_leaves_them_and_a_complete_run(rows, tmp_path, monkeypatch):
    out, stopping = tmp_path / "out", []
    leave_small_shards(rows, out, 3)
    real = joining._small
    monkeypatch.setattr(joining, "_small", lambda *given: (stopping.append(1), real(*given))[1])
    with scripted_engine():
        job = scripted_job(rows, out, output={"path": str(out), "rows_per_shard": SHARD})
        assert run(job, None, lambda: bool(stopping)).exit_code == 0
    assert len(files(out)) > 4 and check_success(out) == 2 * ROWS and check(out).exit_code == 0
