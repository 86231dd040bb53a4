"""An array of tasks under a real Slurm: told to stop ahead of the time limit, preempted, on a drained node, killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.real_slurm import Slurm
from crash.conftest import Scene

from tokabatch.cluster.slurm import Array, batch_script
from tokabatch.output.folder import OutputFolder
from tokabatch.output.leases import read_leases

ASKED = "TOKABATCH_TEST_SLURM"
TASKS = 8
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not os.environ.get(ASKED), reason=f"takes minutes; {ASKED}=1 runs it, as root where apt-get works"),
]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path / "slurm")
    slurm.folder.mkdir()
    try:
        obstacle = slurm.start()
        if obstacle:
            pytest.skip(obstacle)
        yield slurm
    finally:
        slurm.close()


def test_whatever_happens_to_the_tasks_each_sample_is_there_once(slurm: Slurm, tmp_path: Path) -> None:
    questions: list[str | None] = [f"What is {row}?" for row in range(400)]
    questions[7] = None
    scene = Scene(tmp_path, questions, n=8, rows_per_shard=50, flush_seconds=1.0)
    out, job, notes = tmp_path / "out", tmp_path / "a job.json", tmp_path / "notes"
    notes.mkdir()
    given = scene.job(out)
    given["engine"]["max_running"] = 8
    job.write_text(json.dumps(given))
    program = Path(__file__).parent / "scripted_tokabatch.py"
    array = Array(
        TASKS, time="3", seconds_ahead=90, options=("comment=of two words",), command=f"{sys.executable} {program} 0.25 {notes}"
    )
    script = slurm.folder / "job.sbatch"
    script.write_text(batch_script(job, ("--lease", "6"), array, tmp_path))
    slurm.run("sbatch", str(script))
    folder = OutputFolder(out)

    def owners() -> dict[int, str]:
        return {lease.holder.pid: lease.holder.task for lease in read_leases(folder, time.time()) if lease.name.isdigit()}

    slurm.wait_until(lambda: len(set(owners().values())) == TASKS, 300)
    killed = next(iter(owners()))
    os.kill(killed, signal.SIGKILL)
    slurm.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    # Takes all of the other node: its tasks are preempted.
    slurm.run("sbatch", "--partition=high", "--nodelist=n1", "--ntasks=4", "--wrap=sleep 3", "--job-name=urgent")
    restarted: set[str] = set()

    def over() -> bool:
        for line in slurm.run("squeue", "-h", "-r", "-t", "pending", "-o", "%i %r").splitlines():
            name, _, why = line.partition(" ")
            restarted.add(name)
            if why == "BeginTime":
                # Slurm holds what is requeued back for two minutes.
                slurm.run("scontrol", "update", f"jobid={name}", "starttime=now")
        return not slurm.run("squeue", "-h").strip()

    slurm.wait_until(over, 500)
    logs = "\n".join(path.read_text() for path in slurm.folder.glob("tokabatch-a-job-*.log")) + slurm.run("sinfo", "-R")
    scene.checker.check_complete(out)
    assert len(restarted) >= 5, logs
    assert "SIGUSR1" in logs and "SIGTERM" in logs, logs
    # What a task has finished is computed again only where it was killed.
    finished = {int(path.name.partition("-")[2]): path.read_text().split("\n")[:-1] for path in notes.iterdir()}
    times = Counter(key for keys in finished.values() for key in keys)
    assert {key for key, count in times.items() if count > 1} <= set(finished[killed])
