"""What one of several writers leaves alone, and what it does where another took the folder over."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pytest
from support.shards import write_rows

from tokabatch.errors import CommitError, DamageError, OutputError
from tokabatch.output import claim as claims
from tokabatch.output.claim import Claim
from tokabatch.output.folder import OutputFolder
from tokabatch.output.journal import Shard
from tokabatch.output.lock import is_claimed
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.storage.atomic_files import DurableFiles
from tokabatch.storage.listing import mark_of

SCHEMA = pa.schema([("row_index", pa.int64()), ("status", pa.string())])


def begin(out: Path) -> Claim:
    """A writer of a run that is marked as complete, beside one whose lock it does not see."""
    claim = Claim(out, writer="mine")
    claim.begin("run", {}, (), "")
    for path in (out / "_tmp" / "other" / "part-00003-00000.parquet", out / "_input" / "tokens.bin", out / "_SUCCESS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"samples": 0, "ok": 0, "errors": 0, "files": []}' if path.name == "_SUCCESS" else "")
    return claim


def test_a_new_folder_does_not_get_the_name_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"of a file.*such as .*/a b\. `tokabatch export '.*/a b' --to '.*/a b\.jsonl'` then"):
        Claim(tmp_path / "a b.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there.json").mkdir()
    Claim(tmp_path / "there.json").release()


@pytest.mark.parametrize("joiner", [False, True])
def test_what_others_left_unfinished_and_the_input_are_the_joiners_to_remove(tmp_path: Path, joiner: bool) -> None:
    out = tmp_path / "out"
    claim = begin(out)
    assert claim.take_alone()
    claim.clears = joiner
    claim.release()
    assert not (out / "_tmp" / "mine").exists()
    assert (out / "_tmp" / "other" / "part-00003-00000.parquet").exists() != joiner
    assert (out / "_input" / "tokens.bin").exists() != joiner
    assert joiner != (out / "_tmp").exists()


def test_a_journal_that_was_taken_away_is_written_anew_unless_a_single_writer_has_joined_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with begin(out) as claim:
        journal = out / "_units" / "commits-mine.jsonl"
        claim.check_folder()
        journal.write_bytes(b"touched")
        claim.check_folder()
        assert journal.read_bytes() != b"touched"
        written = journal.read_bytes()
        shutil.rmtree(journal.parent)
        with claim.committing():
            claim.check_folder()
        assert journal.read_bytes() == written
        (out / "commits.jsonl").touch()
        journal.unlink()
        with pytest.raises(CommitError, match=r"commits-mine\.jsonl was removed"):
            claim.check_folder()
        assert not journal.exists()


def test_a_run_alone_forgets_which_host_was_to_join_and_the_joiner_does_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    claim = begin(out)
    joiner, plan, left = out / "_units" / "joiner", out / "_units" / "plan-1.npy", out / "_units" / "3.lease"
    for path in (joiner, plan, left):
        path.touch()
    assert claim.take_alone()
    claim.begin("run", {}, (), "")
    assert joiner.exists() and plan.exists() and not left.exists()
    claim.release()
    with Claim(out) as alone:
        alone.begin("run", {}, (), "")
        assert not joiner.exists() and plan.exists()


def test_a_reader_on_nfs_goes_by_the_leases_where_it_gets_no_exclusive_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", fcntl.flock

    def flock(file: object, how: int) -> None:
        if how & fcntl.LOCK_EX:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, how)  # pyright: ignore[reportArgumentType]

    with begin(out):
        monkeypatch.setattr(fcntl, "flock", flock)
        assert not is_claimed(OutputFolder(out))
        lease = out / "_units" / "3.lease"
        lease.touch()
        assert is_claimed(OutputFolder(out))
        os.utime(lease, (time.time() - 3600,) * 2)
        assert not is_claimed(OutputFolder(out))


def test_committed_files_are_looked_at_rarely_where_that_takes_long_and_always_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    with Claim(tmp_path / "out") as claim:
        path = claim.folder.data / "part-00000.parquet"
        path.write_bytes(b"shard")
        shard = Shard("data/part-00000.parquet", 1, 1, 0, 5, "")
        claim.begin("run", {}, ((shard, mark_of(path.stat())),), "")
        real = OutputFolder.shards

        def slow(self: OutputFolder) -> object:
            nonlocal looks
            looks += 1
            time.sleep(0.02)
            return real(self)

        for _ in range(10):
            claim.check_folder(sparingly=True)
        monkeypatch.setattr(OutputFolder, "shards", slow)
        for _ in range(10):
            claim.check_folder(sparingly=True)
        assert looks == 1
        monkeypatch.setattr(claims, "RARELY", 0)
        claim.check_folder(sparingly=True)
        assert looks == 2
        monkeypatch.setattr(claims, "RARELY", 1000)
        path.unlink()
        claim.check_folder(sparingly=True)
        with pytest.raises(DamageError, match="part-00000"):
            claim.check_folder()


def test_a_link_that_leads_elsewhere_in_mid_run_moves_no_results(tmp_path: Path) -> None:
    """The path of the output is a symbolic link to a folder; in mid-run it is made to lead to a copy of that folder."""
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "out"
    first.mkdir()
    out.symlink_to(first)
    with Claim(out) as claim:
        claim.begin("run", {}, (), "")
        writer = ShardWriter(claim, SCHEMA, rows_per_shard=1, flush_seconds=30)
        write_rows(writer, pa.table([[0], ["ok"]], schema=SCHEMA))
        shutil.copytree(first, second)
        out.unlink()
        out.symlink_to(second)
        with pytest.raises(CommitError, match="was moved, replaced or removed"):
            write_rows(writer, pa.table([[1], ["ok"]], schema=SCHEMA))
    assert [len(list((folder / "data").iterdir())) for folder in (first, second)] == [2, 1]
    assert not (first / "_tmp").exists() and (second / "_tmp").exists(), "the copy was touched"
    with Claim(out):
        pass


def test_what_a_network_file_system_remembers_as_absent_is_looked_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does, names are remembered as absent until their folder is opened anew, and what a folder holds as long as it is
    open."""
    known = set[str]()
    stat, open_, listdir = os.stat, os.open, os.listdir
    held = dict[int, list[str]]()

    def look(name: object, **options: object) -> os.stat_result:
        if os.path.basename(str(name)) in known:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return stat(name, **options)  # pyright: ignore

    def opened(name: object, flags: int, *rest: object, **options: object) -> int:
        if os.path.basename(str(name)) in known and not flags & os.O_DIRECTORY:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        descriptor = open_(name, flags, *rest, **options)  # pyright: ignore
        if flags & os.O_DIRECTORY:
            known.clear()
            held[descriptor] = listdir(descriptor)
        return descriptor

    files = DurableFiles()
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "stat", look)
    monkeypatch.setattr(os, "listdir", lambda folder: held[folder])
    files.hold(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"there")
    known.add("manifest.json")
    assert files.look(tmp_path / "manifest.json") is not None
    known.add("manifest.json")
    with files.open_old(tmp_path / "manifest.json") as file:
        assert file.read() == b"there"
    assert files.names(tmp_path) == ["manifest.json"]
    assert files.look(tmp_path / "nothing") is None
    monkeypatch.undo()
    files.let_go()


def test_a_folder_that_cannot_be_opened_again_is_held_as_before(tmp_path: Path) -> None:
    files, folder = DurableFiles(), tmp_path / "folder"
    folder.mkdir()
    files.hold(folder)
    before = files.held(folder)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        files.hold(folder)
    assert os.path.samestat(files.held(folder), before)
    folder.mkdir()
    files.hold(folder)
    assert not os.path.samestat(files.held(folder), before)
    files.let_go()
