"""How one of several writers begins in a folder that another run began. Without an engine: nothing is generated."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.scripted_run import scripted_engine, scripted_job

from tokabatch import Job, run
from tokabatch.errors import EXIT_STOPPED, CommitError, DamageError, OutputError, Stopped
from tokabatch.input.store.disk_arrays import ArraySpool
from tokabatch.output import claim as claims
from tokabatch.output import existing_results
from tokabatch.output.claim import Claim
from tokabatch.output.folder import OutputFolder
from tokabatch.output.integrity import check
from tokabatch.output.leases import Leases
from tokabatch.output.manifest import Books, Manifest, read_manifest
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.output.shards import claimed_shards
from tokabatch.runner import judging
from tokabatch.runner import run as running
from tokabatch.runner import shared as sharing
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.recorder import Recorder
from tokabatch.runner.resume import start
from tokabatch.runner.reuse import Reuse
from tokabatch.runner.shared import Shared, close_shared, cut_earlier_run
from tokabatch.storage.atomic_files import DurableFiles, NewFile


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Of a folder in which a run alone was begun, and has committed nothing."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"What is {row}?"}) + "\n" for row in range(20)))
    job = scripted_job(rows, tmp_path / "out")
    with Claim(tmp_path / "out") as claim:
        start(job, claim, ignore, Reuse(), ignore).workload.store.close()
    return job


def ignore(*told: object) -> None:
    pass


def manifest_of(job: Job) -> Manifest:
    manifest = read_manifest(OutputFolder(Path(job.output.path)))
    assert manifest is not None
    return manifest


def cut(job: Job, units: int, tell: Callable[[str], None] = ignore, stop: Interruption | None = None) -> None:
    cut_earlier_run(job, Shared(units=units), ignore, tell, stop or Interruption())


def test_a_run_that_another_cut_in_between_is_not_cut_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    # A writer that was refused before the run was cut has left its folder.
    (Path(job.output.path) / "_units").mkdir()
    real, entered = sharing.Claim, list[int]()

    def claim(path: Path, **options: Any) -> Claim:
        entered.append(1)
        if len(entered) == 1:
            cut(job, 5)
            assert manifest_of(job).units == 5
        return real(path, **options)

    monkeypatch.setattr(sharing, "Claim", claim)
    cut(job, 3)
    assert len(entered) == 2 and manifest_of(job).units == 5


def test_while_another_has_the_folder_to_itself_a_writer_waits_and_can_be_stopped(job: Job) -> None:
    path, told = Path(job.output.path), list[str]()
    with Claim(path):
        asked = iter([False, True])
        with pytest.raises(Stopped):
            cut(job, 5, stop=Interruption(lambda: next(asked)))
        with pytest.raises(Stopped):
            Shared().claim(path, ignore, Interruption(lambda: True))
        waiting = threading.Thread(target=cut, args=(job, 5, told.append))
        waiting.start()
        deadline = time.monotonic() + 60
        while not told:
            assert time.monotonic() < deadline, "not told that it waits"
            time.sleep(0.01)
        # Longer than the attempts at one claim take, twice.
        time.sleep(1)
        assert waiting.is_alive() and len(told) == 1 and not manifest_of(job).units
    waiting.join(30)
    assert not waiting.is_alive() and manifest_of(job).units == 5


def test_a_run_whose_joining_left_no_success_is_to_be_started_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(job.output.path)

    removed = list[int]()

    def fail(*arguments: object) -> None:
        assert (path / "_SUCCESS").exists()
        if not removed:
            (path / "_SUCCESS").unlink()
            removed.append(1)
        raise CommitError("the disk is full")

    monkeypatch.setattr(running, "join_as_last", fail)
    with scripted_engine():
        assert run(job, shared=Shared(units=1)).exit_code == EXIT_STOPPED
        assert run(job, shared=Shared(units=1)).exit_code == 0
        monkeypatch.undo()
    with scripted_engine():
        success = (path / "_SUCCESS").stat()
        assert run(job, shared=Shared(units=1)).exit_code == 0
    # One journal now, and no shard to join with another: the mark of the end stays.
    assert not list((path / "_units").glob("commits-*")) and len(list((path / "data").iterdir())) == 1
    assert (path / "_SUCCESS").stat().st_mtime_ns == success.st_mtime_ns


def test_a_lease_that_cannot_be_written_ends_the_run_as_a_full_disk_does(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: Leases, name: str) -> bool:
        if name.isdigit():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, name)

    real = Leases.take
    monkeypatch.setattr(Leases, "take", take)
    with scripted_engine():
        summary = run(job, shared=Shared(units=5))
    assert (summary.exit_code, summary.ok) == (EXIT_STOPPED, 0)


def test_names_that_others_gave_are_on_the_disk_before_the_run_is_marked_complete(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noted(DurableFiles):
        def sync_folder(self, path: Path) -> None:
            super().sync_folder(path)
            happened.append(path.name)

    happened = list[str]()
    with scripted_engine():
        run(job)
    with Claim(Path(job.output.path), Noted(), writer="a") as claim:
        (claim.folder.success).unlink()
        monkeypatch.setattr(sharing, "mark_success", lambda *given: happened.append("marked"))
        del happened[:]
        nobody: Any = None
        close_shared(job, claim, nobody, cast("Any", SimpleNamespace(samples_total=40)), Interruption(), ignore, ignore)
        assert happened == ["data", "marked"]


def test_verdicts_that_another_left_are_given_beside_others_and_where_there_are_no_locks(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer is stopped during its last verdicts, and the one that gives them is killed. The next one finds every sample
    there and does the rest; one that has the folder to itself joins."""
    monkeypatch.setattr(judging, "HURRIED_SECONDS", 0.3)
    judge, slow = tmp_path / "judge.py", tmp_path / "slow"
    judge.write_text(
        f"import os, time\ndef verify(text, row):\n    time.sleep(60 * os.path.exists({str(slow)!r}))\n    return True\n"
    )
    slow.touch()
    judged = scripted_job(tmp_path / "rows.jsonl", tmp_path / "judged", verify={"kind": str(judge), "seconds": 300.0})
    folder = OutputFolder(tmp_path / "judged")
    stop = Interruption()
    finish, publish = Recorder.finish, existing_results.publish
    monkeypatch.setattr(Recorder, "finish", lambda self, *given: (stop.request(75), finish(self, *given))[1])

    def without_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def killed(files: DurableFiles, source: Path, target: Path) -> None:
        publish(files, source, target)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with scripted_engine():
        first = run(judged, should_stop=stop, shared=Shared(units=2))
        assert (first.exit_code, first.pending, first.estimates) == (75, 0, ()) and not folder.success.exists()
        slow.unlink()
        monkeypatch.undo()
        with monkeypatch.context() as patch:
            patch.setattr("fcntl.flock", without_locks)
            with monkeypatch.context() as inner:
                inner.setattr(existing_results, "publish", killed)
                assert run(judged, shared=Shared(units=2)).exit_code == 75
            (folder.units / "verdicts.lease").write_text(json.dumps({"task": "killed", "host": "other", "pid": 1}))
            beside = run(judged, shared=Shared(units=2, lease_seconds=0.5))
        assert (beside.exit_code, beside.pending, beside.unverified) == (0, 0, 0) and beside.estimates
        assert folder.success.exists() and folder.journals()
        second = run(judged, shared=Shared(units=2))
    assert second.exit_code == 0 and not folder.journals() and not list(folder.units.glob("judged-*"))
    assert check(folder.path).exit_code == 0
    assert all(row["correct"] for path in folder.data.iterdir() for row in pq.read_table(path, columns=["correct"]).to_pylist())


def test_of_two_that_give_verdicts_at_once_one_is_believed_by_all(tmp_path: Path) -> None:
    """The lease of the first one counted as left behind while it stood still."""
    schema = pa.schema([("status", pa.string()), ("verify_error", pa.string())])
    with ExitStack() as open_claims:
        drew, one, two = (open_claims.enter_context(Claim(tmp_path / "out", writer=name)) for name in ("drew", "one", "two"))
        for claim in (drew, one, two):
            claim.begin("run", {}, (), "")
        writer = ShardWriter(drew, schema, rows_per_shard=9, flush_seconds=3600)
        writer.take(pa.table([["ok"], ["not judged"]], schema=schema))
        writer.commit()
        (seen,) = drew.folder.shards()
        existing_results.replace_shard(one, seen, [pa.table([["ok"], ["one's"]], schema=schema)])
        existing_results.replace_shard(two, seen, [pa.table([["ok"], ["two's"]], schema=schema)])
        for claim in (drew, one, two):
            claim.check_folder()
            (shard,) = claimed_shards(claim)
            assert shard.sha256 == drew.folder.shards()[0].digest()
        assert pq.read_table(seen.path)["verify_error"].to_pylist() == ["one's"]
        seen.path.write_bytes(b"damaged")
        with pytest.raises(DamageError, match="is not what was committed"):
            drew.check_folder()


def test_hosts_of_one_name_are_distinguished_and_containers_of_one_host_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks of each host are apart, one host alone joins: both would with names alone."""
    taken: list[bool] = []
    for number, (boot, name) in enumerate((("one", "node"), ("two", "node"), ("one", "container"))):
        (tmp_path / boot).write_text(f"{boot}\n")
        monkeypatch.setattr(sharing, "BOOT_ID", tmp_path / boot)
        monkeypatch.setattr("socket.gethostname", lambda name=name: name)
        claim = Claim(tmp_path / "out", writer=f"w{number}")
        claim.begin("run", {}, (), "")
        taken.append(claim.take_alone() and sharing._may_join(claim))  # pyright: ignore[reportPrivateUsage]
        with nullcontext() if taken[-1] else pytest.raises(CommitError, match="another host"):
            claim.check_lock()
        claim.clears = False
        claim.release()
    assert taken == [True, False, True]


def test_a_full_disk_while_an_earlier_run_is_cut_is_reported_as_one(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sharing, "write_units", full)
    with pytest.raises(CommitError, match="cannot be written any more"):
        cut_earlier_run(job, Shared(units=4), ignore, ignore, Interruption())
    monkeypatch.undo()
    assert not manifest_of(job).units
    cut_earlier_run(job, Shared(units=4), ignore, ignore, Interruption())
    assert manifest_of(job).units


def test_a_writer_whose_unfinished_files_are_gone_stops_and_says_so(tmp_path: Path) -> None:
    with Claim(tmp_path / "out", writer="a") as claim:
        shutil.rmtree(claim.folder.temporary)
        with pytest.raises(CommitError, match="another process removed unfinished files"), claim.committing():
            NewFile(claim.files, claim.folder.temporary / "shard")


def test_one_that_loses_the_manifest_changes_nothing_of_the_winners_job(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both begin in an empty folder with other rows; the lease of the first counts as left behind while it stands still."""
    out, others = tmp_path / "shared", tmp_path / "others.jsonl"
    others.write_text("".join(json.dumps({"question": f"Who is {row}?"}) + "\n" for row in range(20)))
    late, winner = scripted_job(tmp_path / "rows.jsonl", out), scripted_job(others, out)
    cut_plan, begun = sharing._cut, list[int]()  # pyright: ignore[reportPrivateUsage]

    def cut(*given: Any) -> Any:
        if not begun:
            begun.append(1)
            (out / "_units/input.lease").unlink()
            assert run(winner, shared=Shared(units=2)).exit_code == 0
        return cut_plan(*given)

    monkeypatch.setattr(sharing, "_cut", cut)
    with scripted_engine():
        with pytest.raises(OutputError, match="holds the run of another job"):
            run(late, shared=Shared(units=2))
        assert check(out).exit_code == 0
        # What a winner was killed before it wrote is written by the next one that has the same rows.
        for name in ("row_digests.parquet", "job.json"):
            before = (out / name).read_bytes()
            (out / name).unlink()
            assert run(winner, shared=Shared(units=2)).exit_code == 0
            assert (out / name).read_bytes() == before


def test_one_that_ends_after_the_run_is_complete_joins_and_leaves_the_summary(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closed its books before the last sample was there, and still holds its share of the lock when the other one ends."""
    folder, close = OutputFolder(Path(job.output.path)), running.close_shared
    told: list[bytes] = []

    def early(*given: Any) -> Any:
        if told:
            return close(*given)
        told.append(b"")
        assert run(job, shared=Shared()).exit_code == 0
        assert folder.success.exists() and folder.journals()
        told[0] = folder.summary.read_bytes()
        return Books(40, 0, 0)

    monkeypatch.setattr(running, "close_shared", early)
    with scripted_engine():
        assert run(job, shared=Shared(units=5)).exit_code == 0
    assert folder.summary.read_bytes() == told[0] and not folder.journals() and not folder.temporaries.exists()
    assert len(folder.shards()) == 1 and check(folder.path).exit_code == 0


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, CommitError),
        (errno.EDQUOT, CommitError),
        (errno.EIO, CommitError),
        (errno.ESTALE, CommitError),
        (errno.ENOENT, CommitError),
        (errno.EACCES, OutputError),
        (errno.EROFS, OutputError),
    ],
)
def test_a_task_that_starts_while_the_storage_fails_is_to_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    """As one that runs then; a run alone is refused, since nobody starts it again by itself."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text('{"question": "What is 1?"}\n')

    def refuse(*given: object) -> None:
        raise OSError(code, os.strerror(code))

    for place, name in ((DurableFiles, "write"), (Leases, "take"), (ArraySpool, "append"), (sharing, "write_units")):
        with monkeypatch.context() as patch, pytest.raises((CommitError, OutputError)) as caught:
            patch.setattr(place, name, refuse)
            run(scripted_job(rows, out), shared=Shared(units=2))
        assert caught.type is kind and os.strerror(code) in str(caught.value), name
    with monkeypatch.context() as patch, pytest.raises(OutputError):
        patch.setattr(DurableFiles, "write", refuse)
        run(scripted_job(rows, out))
    assert not out.exists() or not any((out / "data").iterdir())


@pytest.mark.parametrize("place", ["_tmp", "."])
def test_a_task_whose_folder_is_removed_as_it_starts_is_to_be_started_again(
    job: Job, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    out, probe = Path(job.output.path), claims.probe

    def probed(folder: OutputFolder) -> None:
        shutil.rmtree(out / place)
        probe(folder)

    with monkeypatch.context() as patch, pytest.raises(CommitError, match="run the same command again"):
        patch.setattr(claims, "probe", probed)
        Shared().claim(out, ignore, Interruption())
    with scripted_engine():
        assert run(job, shared=Shared(units=2)).exit_code == 0


@pytest.mark.parametrize("late", [False, True])
def test_a_manifest_that_is_removed_while_a_task_runs_is_written_again(
    job: Job, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    folder, finish, before = OutputFolder(Path(job.output.path)), Recorder.finish, list[bytes]()

    def finished(self: Recorder, *given: Any) -> Any:
        done = finish(self, *given) if late else None
        before.append(folder.manifest.read_bytes())
        folder.manifest.unlink()
        return done if late else finish(self, *given)

    monkeypatch.setattr(Recorder, "finish", finished)
    with scripted_engine():
        assert run(job, shared=Shared(units=2)).exit_code == 0
    assert [folder.manifest.read_bytes()] == before and check(folder.path).exit_code == 0
    folder.manifest.unlink()
    nobody: Any = None
    with Claim(folder.path, writer="a") as claim, pytest.raises(DamageError, match=r"manifest\.json was removed"):
        close_shared(job, claim, nobody, nobody, Interruption(), ignore, ignore)
