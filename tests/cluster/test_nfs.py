"""Two hosts write one folder on a real NFS: the server is gone for a while, one writer is killed, another stops and wakes."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster.real_nfs import MOUNT, Nfs
from crash.conftest import Scene

from tokabatch.output.folder import OutputFolder
from tokabatch.output.leases import read_leases

ASKED = "TOKABATCH_TEST_NFS"
ROOT = Path(__file__).parents[2]
SECONDS = 400
"""For each thing that is waited for: a program starts there in a minute."""
pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not os.environ.get(ASKED), reason=f"takes minutes; {ASKED}=1 runs it, as root where apt-get works"),
]


@pytest.fixture
def nfs(tmp_path: Path) -> Iterator[Nfs]:
    nfs = Nfs(tmp_path / "nfs")
    nfs.folder.mkdir()
    try:
        # As it comes, but for how soon a host asks a server again that does not answer.
        obstacle = nfs.start("vers=4.2,hard,timeo=50")
        if obstacle:
            pytest.skip(obstacle)
        yield nfs
    finally:
        nfs.close()


class Task:
    """`tokabatch run --shared` on one of the hosts."""

    def __init__(self, nfs: Nfs, host: int, name: str, job: Path) -> None:
        self.nfs, self.host = nfs, host
        self.log, self._status = nfs.folder / f"{name}.log", nfs.folder / f"{name}.status"
        notes = nfs.folder / f"notes-{name}"
        notes.mkdir()
        command = f"{sys.executable} {ROOT}/tests/cluster/scripted_tokabatch.py 0.15 {notes} run {job} --quiet --shared"
        command = f"{command} --units 16 --lease 6 --task {name} >{self.log} 2>&1; echo $? >{self._status}"
        self._group = nfs.on(host, f"cd {ROOT}; setsid bash -c '{command}' >/dev/null 2>&1 </dev/null & echo $!").strip()

    def signal(self, name: str) -> None:
        self.nfs.on(self.host, f"kill -{name} -- -{self._group}")

    @property
    def status(self) -> str:
        """Its exit code; empty while it runs."""
        return self._status.read_text().strip() if self._status.exists() else ""


def wait_until(reached: Callable[[], bool], *tasks: Task) -> None:
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < deadline, [(task.status, task.log.read_text()[-2000:]) for task in tasks]
        time.sleep(0.2)


def test_whatever_befalls_server_and_hosts_each_sample_is_there_once(nfs: Nfs, tmp_path: Path) -> None:
    questions: list[str | None] = [f"What is {row}?" for row in range(200)]
    questions[7] = None
    scene = Scene(tmp_path, questions, n=4, rows_per_shard=50, flush_seconds=1.0)
    out, job = nfs.export / "out", tmp_path / "job.json"
    job.write_text(json.dumps(scene.job(MOUNT / "out")))
    folder = OutputFolder(out)

    def owners() -> set[str]:
        return {lease.holder.task for lease in read_leases(folder, time.time()) if lease.name.isdigit()}

    def committed() -> int:
        return len(folder.shards())

    one, two = Task(nfs, 1, "one", job), Task(nfs, 2, "two", job)
    wait_until(lambda: owners() == {"one", "two"} and committed() > 2, one, two)
    nfs.kill_server()
    time.sleep(2)
    nfs.serve()
    before = committed()
    wait_until(lambda: committed() > before + 1, one, two)
    two.signal("KILL")
    one.signal("STOP")
    assert 0 < scene.checker.check(out) < scene.checker.samples
    heir = Task(nfs, 2, "heir", job)
    wait_until(lambda: bool(heir.status), heir)
    assert heir.status == "0" and folder.success.exists(), heir.log.read_text()
    one.signal("CONT")
    wait_until(lambda: bool(one.status), one)
    # A server that was away may not know of its lock any more; then its unfinished files are gone, too.
    told = re.search("published first by another task|another process removed unfinished files", one.log.read_text())
    assert one.status in ("0", "75") and told, one.log.read_text()
    scene.checker.check_complete(out)
