"""Committing shards: when, under which names, and what a failing disk leaves behind. Read back with plain pyarrow."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.faulty_files import Failing
from support.shards import write_rows

from tokabatch.errors import OutputError
from tokabatch.input.fingerprint import Fingerprint
from tokabatch.input.store.row_digests import RowDigests
from tokabatch.output.claim import Claim
from tokabatch.output.lock import is_claimed
from tokabatch.output.manifest import Manifest, Versions, mark_success, read_manifest, write_manifest, write_summary
from tokabatch.output.probe import check_output
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.output.steps import write_steps
from tokabatch.storage.atomic_files import DurableFiles, publish

WRITTEN = ["open_new", "write", "fsync", "close"]
FOLDER_SYNCED = ["open_folder", "fsync", "close"]
OF_UNITS = pa.schema([("row_index", pa.int64()), ("sample_index", pa.int32()), ("status", pa.string())])
SCHEMA = pa.schema([("row_index", pa.int64()), ("status", pa.string()), ("text", pa.string())])


def rows(begin: int, stop: int, errors: int = 0) -> pa.Table:
    count = stop - begin
    status = ["error"] * errors + ["ok"] * (count - errors)
    return pa.table(
        {"row_index": range(begin, stop), "status": status, "text": [f"t{i}" for i in range(begin, stop)]},
        schema=SCHEMA,
    )


def committed(out: Path) -> dict[str, list[int]]:
    return {path.name: pq.read_table(path)["row_index"].to_pylist() for path in sorted((out / "data").iterdir())}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def writer_for(claim: Claim, rows_per_shard: int = 1000, clock: Callable[[], float] | None = None) -> ShardWriter:
    return ShardWriter(claim, SCHEMA, rows_per_shard=rows_per_shard, flush_seconds=30, clock=clock or Clock())


def test_shards_are_cut_at_rows_per_shard(tmp_path: Path) -> None:
    with Claim(tmp_path / "out") as claim:
        writer = writer_for(claim, rows_per_shard=4)
        write_rows(writer, rows(0, 3))
        assert committed(tmp_path / "out") == {}
        write_rows(writer, rows(3, 10, errors=1))
        assert list(committed(tmp_path / "out")) == ["part-00000.parquet", "part-00001.parquet"]
        shards = writer.close()
    assert committed(tmp_path / "out") == {
        "part-00000.parquet": [0, 1, 2, 3],
        "part-00001.parquet": [4, 5, 6, 7],
        "part-00002.parquet": [8, 9],
    }
    assert [(shard.rows, shard.ok, shard.errors) for shard in shards] == [(4, 3, 1), (4, 4, 0), (2, 2, 0)]
    for shard in shards:
        assert (tmp_path / "out" / shard.name).stat().st_size == shard.bytes
    assert not (tmp_path / "out" / "_tmp").exists()


def test_a_shard_is_cut_when_its_oldest_row_has_waited(tmp_path: Path) -> None:
    clock = Clock()
    with Claim(tmp_path / "out") as claim:
        writer = writer_for(claim, clock=clock)
        clock.now += 1000
        write_rows(writer, rows(0, 1))
        clock.now += 20
        write_rows(writer, rows(1, 2))
        clock.now += 9.9
        writer.commit_due()
        assert writer.shards == ()
        clock.now += 0.2
        writer.commit_due()
        assert committed(tmp_path / "out") == {"part-00000.parquet": [0, 1]}
        writer.commit_due()
        writer.close()
    assert len(committed(tmp_path / "out")) == 1


def test_rows_left_over_by_a_full_shard_wait_anew(tmp_path: Path) -> None:
    clock = Clock()
    with Claim(tmp_path / "out") as claim:
        writer = writer_for(claim, rows_per_shard=2, clock=clock)
        write_rows(writer, rows(0, 1))
        clock.now += 29
        write_rows(writer, rows(1, 3))
        clock.now += 29
        writer.commit_due()
        assert len(writer.shards) == 1
        clock.now += 2
        writer.commit_due()
        assert len(writer.shards) == 2


def test_many_bytes_are_cut_before_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokabatch.output.shard_writer.SHARD_BYTES", 100)
    with Claim(tmp_path / "out") as claim:
        writer = writer_for(claim)
        write_rows(writer, rows(0, 50))
        assert len(writer.shards) == 1


def test_an_empty_run_commits_nothing_and_closes_its_books(tmp_path: Path) -> None:
    with Claim(tmp_path / "out") as claim:
        writer = writer_for(claim)
        write_rows(writer, rows(0, 0))
        assert mark_success(claim, writer.close(), 0).closed
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["files"] == []


def test_pages_carry_checksums_and_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    with Claim(tmp_path / "out") as claim:
        writer = writer_for(claim)
        write_rows(writer, rows(0, 500))
        path = tmp_path / "out" / writer.close()[0].name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError):
        pq.ParquetFile(path, page_checksum_verification=True).read()


def test_row_groups_stay_small_where_rows_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokabatch.output.shards._ROW_GROUP_BYTES", 1000)
    with Claim(tmp_path / "out") as claim:
        writer = writer_for(claim)
        write_rows(writer, rows(0, 500))
        path = tmp_path / "out" / writer.close()[0].name
    metadata = pq.read_metadata(path)
    assert metadata.num_rows == 500 and 10 <= metadata.num_row_groups <= 50


def test_the_commit_is_synced_before_it_is_published(tmp_path: Path) -> None:
    files = Failing()
    with Claim(tmp_path / "out", files) as claim:
        writer = writer_for(claim)
        files.calls.clear()
        write_rows(writer, rows(0, 3))
        writer.close()
    assert files.calls == [*WRITTEN, "link", *FOLDER_SYNCED, "remove"]


@pytest.mark.parametrize("call", range(8))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_commit_keeps_its_rows_and_can_be_tried_again(tmp_path: Path, call: int, code: int) -> None:
    files = Failing()
    out = tmp_path / "out"
    with Claim(out, files) as claim:
        writer = writer_for(claim)
        write_rows(writer, rows(0, 3))
        files.calls.clear()
        files.at, files.error = call, OSError(code, os.strerror(code))
        with pytest.raises(OSError) as caught:
            writer.commit()
        assert caught.value.errno == code
        assert committed(out) == {} and writer.shards == ()
        assert list((out / "_tmp").iterdir()) == []
        files.at = None
        writer.close()
    assert committed(out) == {"part-00000.parquet": [0, 1, 2]}


@pytest.mark.parametrize("link", [True, False], ids=["link", "rename"])
@pytest.mark.parametrize("call", range(11))
def test_an_interrupt_at_any_call_neither_loses_nor_repeats_rows(tmp_path: Path, call: int, link: bool) -> None:
    class Interrupted(Failing):
        def before(self, name: str, arguments: tuple[object, ...]) -> None:
            super().before(name, arguments)
            if name == "link" and not link:
                raise OSError(errno.EPERM, "no links here")

    files = Interrupted()
    out = tmp_path / "out"
    with Claim(out, files) as claim:
        writer = writer_for(claim, rows_per_shard=3)
        files.calls.clear()
        files.at, files.error = call, KeyboardInterrupt()
        try:
            write_rows(writer, rows(0, 4))
        except KeyboardInterrupt:
            files.at = None
            write_rows(writer, rows(4, 5))
        else:
            files.at = None
            write_rows(writer, rows(4, 5))
        write_rows(writer, rows(5, 8))
        shards = writer.close()
    held = committed(out)
    assert [row for name in sorted(held) for row in held[name]] == list(range(8))
    assert [shard.name for shard in shards] == [f"data/{name}" for name in sorted(held)]
    assert [shard.rows for shard in shards] == [len(held[name]) for name in sorted(held)]


def test_an_interrupt_behind_the_publishing_does_not_repeat_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(files: DurableFiles, source: Path, target: Path) -> None:
        publish(files, source, target)
        raise KeyboardInterrupt

    with Claim(tmp_path / "out") as claim:
        writer = writer_for(claim)
        write_rows(writer, rows(0, 3))
        monkeypatch.setattr("tokabatch.output.shard_writer.publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.commit()
        monkeypatch.undo()
        write_rows(writer, rows(3, 5))
        writer.close()
    assert committed(tmp_path / "out") == {"part-00000.parquet": [0, 1, 2], "part-00001.parquet": [3, 4]}


def test_a_temporary_name_that_stays_behind_does_not_undo_the_commit(tmp_path: Path) -> None:
    files = Failing()
    with Claim(tmp_path / "out", files) as claim:
        writer = writer_for(claim, rows_per_shard=3)
        files.calls.clear()
        files.at = 8
        write_rows(writer, rows(0, 3))
        assert len(writer.close()) == 1
    assert committed(tmp_path / "out") == {"part-00000.parquet": [0, 1, 2]}


def test_without_hard_links_a_rename_that_does_not_replace_publishes(tmp_path: Path) -> None:
    files = Failing()
    out = tmp_path / "out"
    with Claim(out, files) as claim:
        writer = writer_for(claim, rows_per_shard=3)
        files.calls.clear()
        files.at, files.error = 4, OSError(errno.EPERM, "no links here")
        write_rows(writer, rows(0, 3))
    assert files.calls == [*WRITTEN, "link", "rename_new", *FOLDER_SYNCED]
    assert committed(out) == {"part-00000.parquet": [0, 1, 2]}


@pytest.mark.parametrize("code", [None, errno.EPERM], ids=["link", "rename"])
@pytest.mark.parametrize("system", [True, False], ids=["renameat2", "plain rename"])
def test_a_shard_that_exists_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None, system: bool
) -> None:
    if not system:
        monkeypatch.setattr("tokabatch.storage.atomic_files._rename_at_once", lambda source, target, flag: False)
    files = Failing()
    with Claim(tmp_path / "out", files) as claim:
        writer = writer_for(claim)
        write_rows(writer, rows(0, 3))
        foreign = tmp_path / "out" / "data" / "part-00000.parquet"
        foreign.write_bytes(b"another's")
        files.calls.clear()
        if code is not None:
            files.at, files.error = 4, OSError(code, os.strerror(code))
        with pytest.raises(OutputError, match=r"part-00000\.parquet exists already"):
            writer.close()
        assert foreign.read_bytes() == b"another's"


def test_files_that_no_run_wrote_are_refused_and_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Claim(out) as claim:
        writer = writer_for(claim)
        write_rows(writer, rows(0, 1))
        writer.close()
    (out / "data" / "part-mine.parquet").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"1 file that no run wrote \(data/part-mine.*Choose another output\.path") as caught:
        Claim(out)
    assert caught.value.exit_code == 2
    assert sorted(path.name for path in (out / "data").iterdir()) == ["part-00000.parquet", "part-mine.parquet"]


def test_further_shards_are_numbered_behind_those_that_are_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Claim(out) as claim:
        writer = writer_for(claim, rows_per_shard=2)
        write_rows(writer, rows(0, 6))
        earlier = writer.close()
    (out / earlier[1].name).unlink()
    with Claim(out) as claim:
        writer = ShardWriter(claim, SCHEMA, rows_per_shard=2, flush_seconds=30, earlier=[earlier[0], earlier[2]])
        write_rows(writer, rows(2, 4))
        assert [shard.name for shard in writer.close()][-1] == "data/part-00003.parquet"
    assert committed(out) == {"part-00000.parquet": [0, 1], "part-00002.parquet": [4, 5], "part-00003.parquet": [2, 3]}


def test_a_claim_clears_what_a_crash_left_unfinished_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "_tmp").mkdir(parents=True)
    (out / "_tmp" / "part-00000.parquet").write_bytes(b"torn")
    (out / "_lock").touch()
    (out / "_SUCCESS").write_text('{"samples": 0, "ok": 0, "errors": 0, "files": []}')
    with Claim(out) as claim:
        assert list((out / "_tmp").iterdir()) == []
        assert (out / "_SUCCESS").exists()
        claim.reopen()
        assert not (out / "_SUCCESS").exists()


def test_a_claim_that_wrote_nothing_leaves_nothing_it_made(tmp_path: Path) -> None:
    with Claim(tmp_path / "made" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with Claim(tmp_path / "there"):
        pass
    assert list((tmp_path / "there").iterdir()) == []
    with pytest.raises(OutputError, match="No space left"):
        Claim(tmp_path / "full", Failing(0, OSError(errno.ENOSPC, "No space left on device")))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with Claim(tmp_path / "kept") as claim:
        write_manifest(claim, manifest(), {"input": {}})
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["_lock", "data", "job.json", "manifest.json"]


def test_a_lock_that_its_holder_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock file and locking it, the run before may end and take the file away."""
    out = tmp_path / "out"
    out.mkdir()
    lock_file = out / "_lock"
    real, struck = fcntl.flock, False

    def flock(descriptor: int, operation: int) -> None:
        nonlocal struck
        if not struck:
            struck = True
            lock_file.unlink()
        real(descriptor, operation)

    monkeypatch.setattr("tokabatch.output.lock.fcntl.flock", flock)
    with Claim(out) as claim:
        assert lock_file.exists() and is_claimed(claim.folder)


def test_check_output_refuses_as_a_claim_does_and_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Claim(tmp_path / "full") as claim:
        writer = writer_for(claim)
        write_rows(writer, rows(0, 1))
        writer.close()
        (tmp_path / "busy").mkdir()
        with Claim(tmp_path / "busy"), pytest.raises(OutputError, match="another run is writing"):
            check_output(tmp_path / "busy")
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for path in (tmp_path / "new" / "deep", tmp_path / "busy", tmp_path):
        check_output(path)
    (tmp_path / "full" / "data" / "notes.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="1 file that no run wrote"):
        check_output(tmp_path / "full")
    for path in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "dangling" / "out"):
        with pytest.raises(OutputError, match=r"cannot be written: .* is not a folder"):
            check_output(path)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(OutputError, match=r"cannot be written: no permission .*Choose another output\.path"):
        check_output(tmp_path / "new" / "deep")
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY | os.ST_NOSUID))
    with pytest.raises(
        OutputError, match=r"cannot be written: \S+ is on a read-only file system\. Choose another output\.path"
    ):
        check_output(tmp_path / "new" / "deep")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputError, match=r"cannot be written.*Choose another output\.path"):
            Claim(path)
    with pytest.raises(OutputError, match="No space left"):
        Claim(tmp_path / "full", Failing(0, OSError(errno.ENOSPC, "No space left on device")))
    with Claim(tmp_path / "full"):
        pass


def test_one_writer_a_folder_and_the_claim_dies_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import sys; from pathlib import Path; from tokabatch.output.claim import Claim\n"
        "claim = Claim(Path(sys.argv[1])); print('claimed', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "claimed\n"
        with pytest.raises(OutputError, match="another run is writing"):
            Claim(out)
        other.kill()
    with Claim(out) as claim:
        assert is_claimed(claim.folder)
    assert not is_claimed(claim.folder)


def manifest() -> Manifest:
    versions = Versions("0.1.0", "2.13.0", "5.23.0", "3.11.7")
    fingerprint = Fingerprint({"generation.seed": "0"}, {"rows.jsonl": 12}, 5, "ab12")
    return Manifest("2026-01-02T03:04:05+00:00", "/home", "models/x", versions, 5, 10, {"generation": {"n": 2}}, fingerprint)


def test_the_manifest_comes_back(tmp_path: Path) -> None:
    with Claim(tmp_path / "out") as claim:
        assert read_manifest(claim.folder) is None
        write_manifest(claim, manifest(), {"input": {}})
        assert read_manifest(claim.folder) == manifest()
        write_summary(claim, {"tokens_per_second": float("nan"), "path": tmp_path})
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written == {"tokens_per_second": None, "path": str(tmp_path)}


def test_success_is_marked_only_when_the_books_close(tmp_path: Path) -> None:
    success = tmp_path / "out" / "_SUCCESS"
    with Claim(tmp_path / "out") as claim:
        writer = writer_for(claim, rows_per_shard=2)
        write_rows(writer, rows(0, 3, errors=1))
        shards = writer.close()
        books = mark_success(claim, shards, 4)
        assert not books.closed and books.pending == 1 and not success.exists()
        assert mark_success(claim, shards, 3).closed
    document = json.loads(success.read_text())
    for file in document["files"]:
        content = (tmp_path / "out" / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (document["samples"], document["ok"], document["errors"]) == (3, 2, 1)
    assert [(file["name"], file["rows"]) for file in document["files"]] == [
        ("data/part-00000.parquet", 2),
        ("data/part-00001.parquet", 1),
    ]


def writer_of_unit(claim: Claim, **options: object) -> ShardWriter:
    def unit_of(row: object, sample: object) -> object:
        return np.zeros(len(row), np.int32)  # pyright: ignore

    return ShardWriter(claim, OF_UNITS, rows_per_shard=2, flush_seconds=30, unit_of=unit_of, **options)  # pyright: ignore


def of_unit(begin: int, stop: int) -> pa.Table:
    count = stop - begin
    return pa.table([range(begin, stop), [0] * count, ["ok"] * count], schema=OF_UNITS)


def test_numbers_that_lack_between_those_of_a_unit_are_used_and_the_others_passed_over(tmp_path: Path) -> None:
    with Claim(tmp_path / "out", writer="a") as claim:
        claim.begin("run", {}, (), "")
        writer = writer_of_unit(claim)
        # Number 1 was removed by a run that repaired the folder.
        for number in (0, 2, 3):
            pq.write_table(of_unit(90 + number, 91 + number), claim.folder.data / f"part-00000-0000{number}.parquet")
        writer.open(0, {0, 2, 3}, 6)
        write_rows(writer, of_unit(0, 6))
        assert writer.is_complete(0) and not writer.is_lost(0)
        names = [path.name for path in sorted(claim.folder.data.iterdir())]
    assert names == [f"part-00000-0000{number}.parquet" for number in range(6)]


def test_anothers_shard_with_the_number_of_an_inode_that_was_given_back_is_not_ones_own(tmp_path: Path) -> None:
    """Publishing is cut short; another, which publishes first, gets the inode of the file that was removed then."""
    out = tmp_path / "out"

    class Interrupted(DurableFiles):
        def link(self, source: Path, target: Path) -> None:
            if target.name.startswith("part-"):
                content = b"another's".ljust(source.stat().st_size, b".")
                # The same file of the file system, with another content.
                os.utime(source, ns=(1, 1))
                source.write_bytes(content)
                os.rename(source, target)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().link(source, target)

    with Claim(out, Interrupted(), writer="a") as claim:
        claim.begin("run", {}, (), "")
        writer = writer_of_unit(claim)
        writer.open(0, (), 2)
        with pytest.raises(OSError, match="Input/output"):
            write_rows(writer, of_unit(0, 2))
        claim.files.link = DurableFiles.link.__get__(claim.files)  # pyright: ignore
        writer.commit()
        assert writer.is_lost(0) and not writer.shards


OF_A_USER = {
    **dict.fromkeys(("manifest.json", "job.json", "summary.json", "_SUCCESS", "commits.jsonl"), b'{"my": "results"}\n'),
    **dict.fromkeys(("row_digests.parquet", "steps-00000.parquet", "data/part-00000.parquet"), b"a table"),
    **dict.fromkeys(("_lock", "_tmp/notes", "_input/notes", "_units/notes", "data/notes"), b"mine"),
}


@pytest.mark.parametrize("name", OF_A_USER)
@pytest.mark.parametrize("writer", ["", "one"])
def test_where_no_run_is_a_users_files_under_its_names_are_refused_and_stay(tmp_path: Path, name: str, writer: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if OF_A_USER[name] == b"a table":
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        path.write_bytes(OF_A_USER[name])
    content, before = path.read_bytes(), sorted(tmp_path.rglob("*"))
    named = name.removesuffix("/notes") if name[0] == "_" else name
    message = rf"holds 1 file that no run wrote \({named}\).*Choose another output\.path, or move it away"
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=message):
            check_output(tmp_path, overwrite=overwrite)
    with pytest.raises(OutputError, match=message):
        Claim(tmp_path, writer=writer)
    assert sorted(tmp_path.rglob("*")) == before and path.read_bytes() == content


def test_what_a_run_left_without_its_manifest_is_no_obstacle(tmp_path: Path) -> None:
    with Claim(tmp_path) as claim:
        claim.begin("run", {b"tokabatch.run": b"run"}, (), "")
        write_manifest(claim, manifest(), {"model": {}, "input": {}})
        writer = writer_for(claim)
        write_rows(writer, rows(0, 2))
        mark_success(claim, writer.close(), 2)
        write_summary(claim, {"exit_code": 0, "samples": 2})
        write_steps(claim, {"seconds": np.zeros(1), "running": np.zeros(1)})
        claim.write(claim.folder.row_digests, RowDigests(np.zeros(2, np.uint64), np.zeros(2, np.uint64)).to_parquet())
    (tmp_path / "_tmp").mkdir()
    (tmp_path / "_tmp" / "part-00001.parquet").touch()
    (tmp_path / "manifest.json").unlink()
    check_output(tmp_path, overwrite=True)
    with Claim(tmp_path) as claim:
        claim.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_what_several_writers_left_before_a_manifest_stays_known_as_a_runs(tmp_path: Path) -> None:
    Claim(tmp_path, writer="one").release()
    Claim(tmp_path).release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_lock", "_units", "data"]
    check_output(tmp_path)


def test_overwrite_deletes_no_parquet_file_of_a_user_among_the_shards(tmp_path: Path) -> None:
    with Claim(tmp_path) as claim:
        claim.begin("run", {b"tokabatch.run": b"run"}, (), "")
        write_manifest(claim, manifest(), {"model": {}, "input": {}})
        writer = writer_for(claim)
        write_rows(writer, rows(0, 2))
        writer.close()
    # Damaged is not foreign: the record names it.
    (tmp_path / "data" / "part-00000.parquet").write_bytes(b"torn")
    check_output(tmp_path, overwrite=True)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "data" / "part-00007.parquet")
    with pytest.raises(OutputError, match=r"holds 1 file that no run wrote \(data/part-00007\.parquet\)"):
        check_output(tmp_path, overwrite=True)
    with Claim(tmp_path) as claim, pytest.raises(OutputError, match=r"data/part-00007\.parquet"):
        claim.discard()
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["part-00000.parquet", "part-00007.parquet"]
    assert (tmp_path / "manifest.json").exists()
