"""Each file of a run's folder is damaged, cut, replaced, removed, made unreadable or moved, and others are added: in a folder
that is complete, one that is not, and one that is being written. The table says what `run` and `verify` make of it, and what
brings back the table of an undisturbed run."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crash.conftest import Reference, Scene, share
from support.forked_runs import Ended, ForkServer
from support.output_checker import table
from support.privileges import as_anyone

from tokabatch.errors import OutputError
from tokabatch.output.integrity import check as read_back

pytestmark = [
    pytest.mark.crash,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("error::ResourceWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]
SHARD, LAST = "data/part-00000.parquet", "data/part-00001.parquet"


def flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, other: Path) -> None:
    os.truncate(path, 0)


def replace(path: Path, other: Path) -> None:
    """By the file of that name of another job's run."""
    shutil.copyfile(other, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def remove(path: Path, other: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def forbid(path: Path, other: Path) -> None:
    path.chmod(0)


def move(path: Path, other: Path) -> None:
    path.rename(path.with_name("part-00099.parquet") if path.is_file() else away(path))


def away(folder: Path) -> Path:
    """Beside the output folder."""
    return (folder if folder.name == "out" else folder.parent).with_name("away")


def add_copy(path: Path, other: Path) -> None:
    shutil.copyfile(path, path.with_name("part-00077.parquet"))


def add_of_another_job(path: Path, other: Path) -> None:
    shutil.copyfile(other, path.with_name("part-00077.parquet"))


def add_foreign(path: Path, other: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), path.with_name("part-00077.parquet"))


def add_garbage(path: Path, other: Path) -> None:
    path.with_name("part-00077.parquet").write_bytes(b"PAR1 not Parquet")


def add_folder(path: Path, other: Path) -> None:
    path.with_name("part-00077.parquet").mkdir()


def add_notes(path: Path, other: Path) -> None:
    path.with_name("notes.txt").write_text("mine")


@dataclass(frozen=True)
class Case:
    """`run` and `verify` are exit codes of the two, told with `message`; `recovery` is what makes the folder whole: the same
    command `again`, with `--repair`, or with the harm taken back first (`undo`)."""

    state: str
    file: str
    harm: Callable[[Path, Path], None]
    run: int
    verify: int
    message: str
    recovery: str

    def __str__(self) -> str:
        return f"{self.state} {self.file.split('/')[-1]} {self.harm.__name__}"


def cases() -> list[Case]:
    found: list[Case] = []

    def of(states: str, file: str, harms: str, run: int, verify: int, message: str, recovery: str) -> None:
        for state in states.split():
            found.extend(Case(state, file, globals()[harm], run, verify, message, recovery) for harm in harms.split())

    ended, every = "complete unfinished", "complete unfinished running"
    of(ended, SHARD, "flip truncate empty", 4, 4, "part-00000.parquet is damaged", "repair")
    of(ended, SHARD, "replace", 4, 4, "part-00000.parquet is damaged: it belongs to another run", "repair")
    of("running", SHARD, "flip truncate empty replace", 4, 4, "part-00000.parquet is not what was committed", "repair")
    of(ended, SHARD, "remove", 4, 4, "part-00000.parquet is missing", "repair")
    of("running", SHARD, "remove move", 4, 4, "part-00000.parquet is gone", "repair")
    of(ended, SHARD, "move", 4, 4, "part-00000.parquet is missing", "repair")
    of(ended, LAST, "flip remove", 4, 4, "part-00001.parquet is", "repair")
    of(every, SHARD, "forbid", 2, 2, "part-00000.parquet cannot be read: Permission denied", "undo")
    of(ended, SHARD, "add_copy", 2, 4, "part-00077.parquet holds sample", "undo")
    of(ended, SHARD, "add_of_another_job", 2, 4, "part-00077.parquet belongs to another run", "undo")
    of(ended, SHARD, "add_foreign", 2, 4, "part-00077.parquet was not written by this run", "undo")
    of(ended, SHARD, "add_garbage", 2, 4, "part-00077.parquet is not a readable Parquet file", "undo")
    of(ended, SHARD, "add_folder", 2, 4, "no run wrote (data/part-00077.parquet)", "undo")
    of(ended, SHARD, "add_notes", 2, 4, "no run wrote (data/notes.txt)", "undo")
    of("running", SHARD, "add_copy add_of_another_job add_foreign add_folder", 2, 4, "part-00077.parquet was put there", "undo")
    of(ended, "data", "remove move", 4, 4, "part-00000.parquet is missing", "repair")
    of("running", "data", "move", 75, 75, "data was moved, replaced or removed", "undo")
    of(ended, "data", "forbid", 2, 2, "data cannot be read: Permission denied", "undo")
    of(ended, "manifest.json", "flip truncate empty", 4, 4, "manifest.json is damaged", "undo")
    of(ended, "manifest.json", "replace", 2, 4, "holds the run of another job", "undo")
    of(ended, "manifest.json", "remove", 2, 2, "no manifest.json", "undo")
    of(ended, "manifest.json", "forbid", 2, 2, "manifest.json cannot be read: Permission denied", "undo")
    of(ended, "commits.jsonl", "flip truncate", 4, 4, "commits", "repair")
    of(ended, "commits.jsonl", "empty", 4, 4, "commits.jsonl is damaged: it is empty", "repair")
    of(ended, "commits.jsonl", "replace", 4, 4, "commits.jsonl belongs to another run than manifest.json", "repair")
    of(ended, "commits.jsonl", "remove", 4, 4, "commits.jsonl is missing", "repair")
    of(ended, "commits.jsonl", "forbid", 2, 2, "commits.jsonl cannot be read: Permission denied", "undo")
    of("running", "commits.jsonl", "flip truncate replace remove forbid", 0, 0, "", "again")
    of("running", "manifest.json", "flip remove replace forbid", 0, 0, "", "again")
    of("running", LAST, "flip truncate remove", 4, 4, "part-00001.parquet is", "repair")
    of("running", SHARD, "add_notes", 0, 4, "", "undo")
    of("complete", "_SUCCESS", "flip truncate empty replace", 0, 4, "", "again")
    of("complete", "_SUCCESS", "remove", 0, 75, "", "again")
    of("complete", "_SUCCESS", "forbid", 2, 2, "_SUCCESS cannot be read: Permission denied", "undo")
    of("complete", "summary.json", "flip truncate empty remove replace", 0, 0, "", "again")
    of("complete", "summary.json", "forbid", 2, 0, "summary.json cannot be read: Permission denied", "undo")
    of(every, "job.json", "flip truncate remove replace", 0, 0, "", "again")
    of("complete", "job.json", "forbid", 2, 0, "job.json cannot be read: Permission denied", "undo")
    of("unfinished", "job.json", "forbid", 2, 75, "job.json cannot be read: Permission denied", "undo")
    of(every, "row_digests.parquet", "truncate remove replace", 0, 0, "", "again")
    of("complete", "row_digests.parquet", "forbid", 2, 0, "row_digests.parquet cannot be read: Permission denied", "undo")
    of("unfinished", "row_digests.parquet", "forbid", 0, 0, "", "again")
    of("running", "row_digests.parquet", "forbid", 0, 0, "", "undo")
    of("complete", "steps-00000.parquet", "flip truncate remove replace forbid", 0, 0, "", "again")
    of("unfinished", "_input/index.json", "flip truncate remove", 0, 0, "", "again")
    of("unfinished running", "_input/tokens.bin", "flip remove", 0, 0, "", "again")
    of("unfinished running", "_input", "remove", 0, 0, "", "again")
    of("unfinished running", "_input", "forbid", 0, 0, "", "undo")
    of("unfinished", "_tmp", "remove", 0, 0, "", "again")
    of("unfinished", "_tmp", "forbid", 2, 75, "_tmp", "undo")
    of("running", "_tmp", "remove", 75, 75, "cannot be written any more: No such file or directory", "again")
    of(ended, "_lock", "remove replace", 0, 0, "", "again")
    of("running", "_lock", "remove replace", 75, 75, "its lock (_lock) was removed", "again")
    of(ended, "_lock", "forbid", 2, 2, "Permission denied", "undo")
    of("running", "", "move", 75, 75, "was moved, replaced or removed", "undo")
    return found


class Folders:
    """A folder in each state, copied for each case, and one of another job."""

    def __init__(self, server: ForkServer, scene: Scene, folder: Path) -> None:
        self.server, self.scene, self.folder = server, scene, folder
        self.other = folder / "other"
        assert server.run(self.job(self.other, generation={"seed": 1})).code == 0
        assert server.run(self.job(folder / "complete")).code == 0
        calls = server.run(self.job(folder / "calls")).calls
        # The call that publishes the third shard; the first link is that of the trial at the start.
        last = [at for at, call in enumerate(calls) if call == "link"][3]
        self._begun = max(at for at, call in enumerate(calls[:last]) if call == "open_new")
        """The call with which the third shard begins."""
        killed = server.run(self.job(folder / "unfinished"), fault={"kind": "kill", "at": last, "moment": "before"})
        assert killed.signal == signal.SIGKILL and len(list((folder / "unfinished" / "data").iterdir())) == 2

    def job(self, out: Path, **sections: Any) -> dict[str, Any]:
        return self.scene.job(out, **sections)

    def harm(self, server: ForkServer, case: Case, out: Path) -> Ended:
        """How the run ends that meets the harm."""
        if case.state != "running":
            shutil.copytree(self.folder / case.state, out)
            case.harm(out / case.file, self.other / case.file)
            return self.run(server, case, out)
        pid = self.start_suspended(server, out, powerless=case.harm is forbid)
        try:
            case.harm(out / case.file, self.other / case.file)
        finally:
            os.kill(pid, signal.SIGCONT)
            ended = server.wait()
        return ended

    def start_suspended(self, server: ForkServer, out: Path, **wrong: Any) -> int:
        """Start a run; return its process id when it is suspended: two of its three shards are published, and it has not looked
        at the folder for the last time."""
        pid = server.start(self.job(out), fault={"kind": "suspend", "at": self._begun}, **wrong)
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.002)
        assert (out / LAST).exists()
        return pid

    def run(self, server: ForkServer, case: Case, out: Path, **flags: bool) -> Ended:
        return server.run(self.job(out), step_seconds=0, powerless=case.harm is forbid, flags=flags)

    def undo(self, case: Case, out: Path) -> None:
        if case.harm is forbid:
            (out / case.file).chmod(0o755)
        elif case.harm is move:
            place = out / case.file
            if place.exists():  # `verify` of nothing made nothing; a run may have.
                shutil.rmtree(place)
            away(place).rename(place)
        elif case.harm.__name__.startswith("add"):
            for name in ("part-00077.parquet", "notes.txt"):
                added = out / "data" / name
                if added.exists():
                    remove(added, added)
        else:
            shutil.copyfile(self.folder / case.state / case.file, out / case.file)


@pytest.fixture(scope="module")
def folders(server: ForkServer, short_scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(server, short_scene, tmp_path_factory.mktemp("folders"))


def verified(out: Path) -> tuple[int, str]:
    """The exit code of `tokabatch check`, and the files that it names or what it says."""
    try:
        found = as_anyone(lambda: read_back(out))
    except OutputError as error:
        return error.exit_code, str(error)
    return found.exit_code, "; ".join(f"{fault.file} {fault.problem}" for fault in found.faults)


def test_every_file_harmed_in_every_way(
    servers: list[ForkServer], folders: Folders, undisturbed: Reference, tmp_path: Path
) -> None:
    reference, failures = undisturbed(folders.scene), list[str]()

    def work(server: ForkServer, case: Case) -> None:
        try:
            check(server, case, folders, reference, tmp_path / str(case) / "out")
        except AssertionError as error:
            failures.append(f"{case}: {error!s:.800}")

    share(servers, cases(), work)
    assert not failures, "\n\n".join(failures)


def check(server: ForkServer, case: Case, folders: Folders, reference: list[dict[str, Any]], out: Path) -> None:
    """Hold one line of the table against what happens in the new folder `out`."""
    out.parent.mkdir()
    scene = folders.scene
    ended = folders.harm(server, case, out)
    assert ended.code == case.run and case.message in ended.message, ended
    if case.state != "running" and case.run != 0:
        code, told = verified(out)
        named = "notes.txt" if case.harm is add_notes else "part-0" if "data" in case.file else case.file
        assert code == case.verify and (code != 4 or named in told), told
        before = shards(out)
        refused = folders.run(server, case, out)
        assert (refused.code, refused.message) == (ended.code, ended.message), "the second start made more of it"
        assert shards(out) == before, "a refusal touched a file"
    kept = shards(out)
    if case.recovery == "undo":
        folders.undo(case, out)
    mended = folders.run(server, case, out, repair=case.recovery == "repair")
    assert mended.code == 0, mended
    scene.checker.check_complete(out, reference)
    assert verified(out) == (0, "")
    if case.state == "complete" and case.file == "commits.jsonl":
        assert shards(out) == kept, "_SUCCESS tells the digests, too"
    if case.recovery == "repair" and case.file == SHARD and case.state == "complete":
        others = {name: content for name, content in kept.items() if name not in ("part-00000.parquet", "part-00099.parquet")}
        assert others.items() <= shards(out).items(), "more was computed again than what was damaged"


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "data").glob("part*") if path.is_file()}


@pytest.mark.parametrize("file", ["_SUCCESS", "summary.json", "job.json", "row_digests.parquet", "steps-00000.parquet"])
def test_what_verify_says_of_the_small_files(file: str, folders: Folders, tmp_path: Path) -> None:
    """Results are whole without them, but `_SUCCESS` must not say what is not so."""
    out = tmp_path / "out"
    shutil.copytree(folders.folder / "complete", out)
    truncate(out / file, out)
    code, told = verified(out)
    assert (code, file in told) == ((4, True) if file == "_SUCCESS" else (0, False))


def test_a_complete_run_changes_nothing_whatever_interrupts_it(folders: Folders, tmp_path: Path) -> None:
    out, job = tmp_path / "out", folders.job(tmp_path / "out")
    shutil.copytree(folders.folder / "complete", out)
    before = everything(out)
    calls = folders.server.run(job).calls
    assert calls and everything(out) == before
    for at in range(len(calls)):
        for fault in ({"kind": "kill", "at": at, "moment": "after"}, {"kind": "failing", "at": at, "error": "EIO"}):
            folders.server.run(job, fault=fault)
            assert everything(out) == before, (calls[at], fault)
    assert folders.server.run(job).code == 0 and everything(out) == before


def everything(out: Path) -> dict[str, tuple[str, int]]:
    """The digest and the time of every file but the lock and what is unfinished."""
    files = [path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] not in ("_tmp", "_lock")]
    return {
        str(path.relative_to(out)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files
    }


def test_a_second_run_in_the_place_of_a_moved_folder_is_left_alone(
    servers: list[ForkServer], folders: Folders, undisturbed: Reference, tmp_path: Path
) -> None:
    first, second = servers
    out, away, scene = tmp_path / "out", tmp_path / "away", folders.scene
    pid = folders.start_suspended(first, out)
    out.rename(away)
    second.start(folders.job(out), step_seconds=0.02)
    while not (out / "manifest.json").exists():
        time.sleep(0.002)
    os.kill(pid, signal.SIGCONT)
    assert second.wait().code == 0
    ended = first.wait()
    assert ended.code == 75 and "was moved, replaced or removed" in ended.message
    scene.checker.check_complete(out, undisturbed(scene))
    assert scene.checker.check(away) > 0
    assert second.run(folders.job(away)).code == 0
    assert table(away) == undisturbed(scene)


def test_a_repair_that_is_killed_anywhere_is_completed_by_the_same_command(
    servers: list[ForkServer], folders: Folders, undisturbed: Reference, tmp_path: Path
) -> None:
    """Until the damaged file is gone the record names it: it is not taken for a foreign one."""
    scene, reference, damaged = folders.scene, undisturbed(folders.scene), tmp_path / "damaged"
    shutil.copytree(folders.folder / "complete", damaged)
    truncate(damaged / SHARD, damaged)
    shutil.copytree(damaged, tmp_path / "calls")
    calls = servers[0].run(scene.job(tmp_path / "calls"), step_seconds=0, flags={"repair": True}).calls
    first = [at for at, call in enumerate(calls) if call == "link"][1]

    def work(server: ForkServer, at: int) -> None:
        out = tmp_path / str(at)
        shutil.copytree(damaged, out)
        fault = {"kind": "kill", "at": at, "moment": "after"}
        # A call that fails, such as the removal of what is not there, has no end at which to be killed.
        ended = server.run(scene.job(out), step_seconds=0, flags={"repair": True}, fault=fault)
        assert ended.signal == signal.SIGKILL or calls[at] == "remove"
        again = server.run(scene.job(out), step_seconds=0, flags={"repair": True})
        assert again.code == 0, (at, calls[at], again)
        scene.checker.check_complete(out, reference)

    share(servers, [at for at in range(first) if calls[at] in ("replace", "remove")], work)
