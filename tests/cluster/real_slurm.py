"""A real Slurm of two nodes on this machine, from Debian's packages: unpacked into a folder, nothing is installed.

Needs root, for slurmd does, and the packages or a network to fetch them from. Messages are not signed (auth/none): it is for
tests alone.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from cluster.debian_packages import unpack

PACKAGES = ("slurmctld", "slurmd", "slurm-client")
NODES = ("n1", "n2")
CPUS = 4
"""Of each node, as Slurm sees it: so many tasks run there at once."""
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
PluginDir={root}/usr/lib/x86_64-linux-gnu/slurm-wlm
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,sched_min_interval=0,requeue_delay=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 OverSubscribe=NO
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF OverSubscribe=NO
"""


class Slurm:
    """Started by `start`, which returns why it cannot, else an empty string; ended by `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "root"
        self._running: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """In which Slurm's commands are found."""
        libraries = self.root / "usr/lib/x86_64-linux-gnu"
        return {
            **os.environ,
            "PATH": f"{self.root}/usr/bin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{libraries}:{libraries}/slurm-wlm",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def start(self) -> str:
        if os.geteuid():
            return "a Slurm of one's own needs root"
        obstacle = unpack(PACKAGES, self.folder, self.root, "TOKABATCH_TEST_SLURM_PACKAGES")
        if obstacle:
            return obstacle
        if not (self.root / "usr/sbin/slurmd-wlm").exists():
            return "Slurm is installed here otherwise than by Debian's packages"
        host, ports = socket.gethostname(), _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        text = CONFIGURATION.format(host=f"{host}(127.0.0.1)", ports=ports, root=self.root, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        programs = self.root / "usr/sbin"
        self._serve(programs / "slurmctld-wlm", "-D")
        for node in NODES:
            self._serve(programs / "slurmd-wlm", "-D", "-N", node, "-d", str(programs / "slurmstepd-wlm"))
        try:
            self.wait_until(lambda: self.run("sinfo", "-h", "-p", "low", "-o", "%D%t").strip() == f"{len(NODES)}idle", 30)
        except AssertionError:
            return f"the nodes do not come up: {self.run('sinfo')}; {(self.folder / 'daemons.log').read_text()[-800:]}"
        return ""

    def run(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, cwd=self.folder)
        return done.stdout + done.stderr

    def wait_until(self, reached: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"not reached: {self.run('squeue', '-a')}"
            time.sleep(0.1)

    def close(self) -> None:
        self.run("scancel", "--user=root", "--signal=KILL")
        self.run("scancel", "--user=root")
        for process in reversed(self._running):
            process.terminate()
        for process in self._running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _serve(self, program: Path, *arguments: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._running.append(
                subprocess.Popen([program, *arguments], env=self.environment, stdout=log, stderr=log, cwd=self.folder)
            )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
