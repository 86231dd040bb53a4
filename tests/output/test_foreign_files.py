"""Which of a folder's files are taken for a run's, where a run has left no manifest, and what it costs to tell."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.shards import write_rows

from tokabatch.errors import OutputError
from tokabatch.output import foreign_files
from tokabatch.output.claim import Claim
from tokabatch.output.folder import OutputFolder
from tokabatch.output.foreign_files import refuse_foreign
from tokabatch.output.probe import describe_others
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.storage.atomic_files import DurableFiles

SCHEMA = pa.schema([("row_index", pa.int64()), ("status", pa.string())])
JOB = {"model": {"path": "M"}, "input": {"path": "rows.jsonl"}}
MANIFEST = {"fingerprint": {}, "working_folder": "/"}


class Counting(DurableFiles):
    """Counts the names that are looked at, and the bytes that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = self.read = 0
        self.opened: list[str] = []

    def look(self, path: Path, *, follow: bool = True) -> Any:
        self.looks += 1
        return super().look(path, follow=follow)

    def open_old(self, path: Path) -> BinaryIO:
        self.opened.append(path.name)
        counting = self

        class Counted(io.BufferedReader):
            def read(self, size: int | None = -1, /) -> bytes:
                content = super().read(size)
                counting.read += len(content)
                return content

        return Counted(super().open_old(path).detach())  # pyright: ignore[reportAttributeAccessIssue]


def refused(out: Path, files: DurableFiles | None = None, *, overwrite: bool = False) -> str:
    with pytest.raises(OutputError, match="that no run wrote") as caught:
        refuse_foreign(OutputFolder(out, files), overwrite=overwrite)
    return str(caught.value)


def test_a_manifest_that_another_task_publishes_meanwhile_is_a_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = foreign_files.list_files

    def publish_first(*given: Any) -> Any:
        (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
        return found(*given)

    monkeypatch.setattr(foreign_files, "list_files", publish_first)
    refuse_foreign(OutputFolder(tmp_path))
    assert (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("text", [json.dumps(JOB), json.dumps(JOB, indent=2), json.dumps(JOB, indent=2) + "\n"])
def test_a_users_own_job_file_is_refused_and_a_runs_is_known_beside_its_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    assert "(job.json)" in refused(tmp_path)
    (tmp_path / "job.json").unlink()
    with Claim(tmp_path) as claim:
        claim.begin("run", {}, (), "")
        claim.write(claim.folder.job, text.encode(), keep=True)
        # As after a start that is killed here.
        if text.endswith("\n"):
            refuse_foreign(OutputFolder(tmp_path))
        else:
            assert "(job.json)" in refused(tmp_path)


def test_a_table_with_the_same_column_twice_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    column = pa.array([1], pa.int64())
    table = pa.Table.from_arrays([column, column, pa.array(["ok"])], names=["row_index", "row_index", "status"])
    pq.write_table(table, tmp_path / "data" / "part-00000.parquet")
    assert "(data/part-00000.parquet)" in refused(tmp_path, overwrite=True)


@pytest.mark.parametrize("name", ["manifest.json", "summary.json"])
def test_json_that_is_nested_too_deeply_is_foreign(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 100_000)
    assert f"holds 1 file that no run wrote ({name})" in refused(tmp_path)


def test_the_message_counts_files(tmp_path: Path) -> None:
    for name in ("summary.json", "_SUCCESS"):
        (tmp_path / name).write_text("mine")
    assert "holds 2 files that no run wrote (_SUCCESS, summary.json)" in refused(tmp_path)


def test_a_users_many_files_are_not_looked_at(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}.txt").touch()
    files = Counting()
    refuse_foreign(OutputFolder(tmp_path, files))
    assert "100 other files" in describe_others(OutputFolder(tmp_path, files))[0]
    assert files.looks < 50


@pytest.mark.parametrize("name", ["commits.jsonl", "summary.json", "manifest.json"])
def test_a_users_large_file_is_not_read(tmp_path: Path, name: str) -> None:
    files = Counting()
    padded = json.dumps({"exit_code": 0, "samples": 1, "padding": "x" * (9 << 20)})
    (tmp_path / name).write_text('{"mine": 1}\n' + padded if name == "commits.jsonl" else padded)
    assert f"({name})" in refused(tmp_path, files) and files.read < 1 << 20


def test_the_record_is_read_once_for_all_damaged_shards(tmp_path: Path) -> None:
    with Claim(tmp_path) as claim:
        claim.begin("run", {b"tokabatch.run": b"run"}, (), "")
        writer = ShardWriter(claim, SCHEMA, rows_per_shard=1, flush_seconds=30)
        write_rows(writer, pa.table({"row_index": range(9), "status": ["ok"] * 9}, schema=SCHEMA))
        writer.close()
    for shard in (tmp_path / "data").iterdir():
        shard.write_bytes(b"torn")
    files = Counting()
    refuse_foreign(OutputFolder(tmp_path, files), overwrite=True)
    assert files.opened.count("commits.jsonl") < 5


@pytest.mark.parametrize("name", ["model", "repository", "project"])
def test_a_folder_of_another_use_takes_no_run_but_continues_one(tmp_path: Path, name: str) -> None:
    names = {"model": ("config.json", "model.safetensors"), "repository": (".git", "code.c"), "project": ("setup.py",)}[name]
    for each in names:
        (tmp_path / each).write_text("{}")
    with pytest.raises(OutputError, match=rf"holds a .*{name} \({names[0]}[^)]*\), .*; name a folder that is empty or new"):
        refuse_foreign(OutputFolder(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    refuse_foreign(OutputFolder(tmp_path))


def test_a_users_notes_and_settings_do_not_make_a_folder_of_another_use(tmp_path: Path) -> None:
    for name in ("config.json", "notes.md", "train.py"):
        (tmp_path / name).write_text("{}")
    refuse_foreign(OutputFolder(tmp_path))
    assert "config.json, notes.md, train.py" in describe_others(OutputFolder(tmp_path))[0]
    (tmp_path / "results" / ".git").mkdir(parents=True)
    (tmp_path / "results" / ".gitattributes").touch()
    refuse_foreign(OutputFolder(tmp_path / "results"))  # A repository for the results alone.
