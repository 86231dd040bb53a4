"""kill -9 at any instant: nothing is lost, doubled or torn, and run again the table becomes that of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from crash.conftest import Reference, Scene
from support.forked_runs import ForkServer

KILLS, SAMPLED_KILLS = 200, 12
pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]


class Killer:
    """Kills runs of one scene on one server until it has done so `count` times."""

    engine: ClassVar[dict[str, Any]] = {}

    def __init__(self, server: ForkServer, scene: Scene, reference: list[dict[str, Any]], folder: Path, seed: int) -> None:
        self.server, self.scene, self.reference, self.folder = server, scene, reference, folder
        self.random = random.Random(seed)
        self.kills = 0
        self.at_kill: list[float] = []
        """The share of the samples that was committed at each kill."""
        self.failure: BaseException | None = None

    def work(self, count: int, seconds: float, mutant: str | None = None) -> None:
        """Uniform over a run of `seconds`; a killed run is killed again, or let go to its end."""
        try:
            for number in range(10 * count):
                if self.kills >= count:
                    return
                self._one_folder(self.folder / str(number), count, seconds, mutant)
        except BaseException as error:
            self.failure = error

    def _one_folder(self, out: Path, count: int, seconds: float, mutant: str | None) -> None:
        job = self.scene.job(out, engine=self.engine)
        while self.kills < count:
            pid = self.server.start(job, apart="replicas" in self.engine, mutant=mutant)
            time.sleep(self.random.uniform(0, seconds))
            self._kill(pid)
            ended = self.server.wait()
            if ended.signal is None:
                assert ended.code == 0, ended
                break
            self.kills += 1
            self.at_kill.append(self.scene.checker.check(out) / self.scene.checker.samples)
            if self.random.random() < 0.5:
                break
        ended = self.server.run(job, apart="replicas" in self.engine, mutant=mutant)
        assert ended.code == 0, ended
        self.scene.checker.check_complete(out, self.reference)

    def _kill(self, pid: int) -> None:
        with suppress(ProcessLookupError):  # It may have ended, or have no group of its own yet.
            os.killpg(pid, signal.SIGKILL)


class MainKiller(Killer):
    """Kills the main process of a run of two replicas: theirs end with it."""

    engine: ClassVar[dict[str, Any]] = {"replicas": 2}

    def _kill(self, pid: int) -> None:
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(pid)
            children = main.children(recursive=True)
            main.kill()
            _, alive = psutil.wait_procs(children, timeout=20)
            assert not alive, "processes outlived the run"


class ChildKiller(Killer):
    """Kill one random process of a run, which then continues by itself."""

    engine: ClassVar[dict[str, Any]] = {"process": True, "max_restarts": 1000}
    ranks: ClassVar[int] = 1

    def _one_folder(self, out: Path, count: int, seconds: float, mutant: str | None) -> None:
        pid = self.server.start(self.scene.job(out, engine=self.engine), apart=True, ranks=self.ranks, mutant=mutant)
        ends = time.monotonic() + self.random.uniform(0.2, 1.0) * seconds
        while time.monotonic() < ends and self.kills < count:
            time.sleep(self.random.uniform(0, seconds / 4))
            with suppress(psutil.NoSuchProcess):
                victims = self._victims(psutil.Process(pid))
                if victims:
                    self.random.choice(victims).kill()
                    self.kills += 1
        ended = self.server.wait()
        assert ended.code == 0, ended
        self.scene.checker.check_complete(out, self.reference)

    def _victims(self, main: psutil.Process) -> list[psutil.Process]:
        return main.children(recursive=True)


class MemberKiller(ChildKiller):
    """Kills a member of a fleet of two: its scheduler, whose worker ends with it."""

    engine: ClassVar[dict[str, Any]] = {"replicas": 2, "max_restarts": 1000}

    def _victims(self, main: psutil.Process) -> list[psutil.Process]:
        return main.children()


class RankKiller(ChildKiller):
    """Kills one of the four ranks of a fleet of two, whose workers have two each."""

    engine: ClassVar[dict[str, Any]] = {"replicas": 2, "max_restarts": 1000}
    ranks: ClassVar[int] = 2

    def _victims(self, main: psutil.Process) -> list[psutil.Process]:
        return [rank for member in main.children() for rank in member.children()]


def measure(server: ForkServer, scene: Scene, folder: Path) -> float:
    begin = time.perf_counter()
    assert server.run(scene.job(folder)).code == 0
    return time.perf_counter() - begin


@pytest.mark.parametrize(
    "victim",
    [Killer, ChildKiller, MainKiller, MemberKiller, RankKiller],
    ids=["the process group", "one random child", "main of a fleet", "a member of a fleet", "a rank of a fleet"],
)
def test_kills_at_any_instant_lose_double_and_tear_nothing(
    victim: type[Killer],
    servers: list[ForkServer],
    long_scene: Scene,
    undisturbed: Reference,
    tmp_path: Path,
    all_faults: bool,
) -> None:
    reference, seconds = undisturbed(long_scene), measure(servers[0], long_scene, tmp_path / "timed")
    count = (KILLS if all_faults else SAMPLED_KILLS) // len(servers)
    killers = [victim(server, long_scene, reference, tmp_path / str(i), seed=i) for i, server in enumerate(servers)]
    threads = [threading.Thread(target=killer.work, args=(count, seconds)) for killer in killers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for killer in killers:
        if killer.failure is not None:
            raise killer.failure
    assert sum(killer.kills for killer in killers) == count * len(servers)
    at = sorted(share for killer in killers for share in killer.at_kill)
    if at and all_faults:
        assert at[len(at) // 10] < 0.3 and at[-len(at) // 10] > 0.5, "the kills were not spread over the run"
