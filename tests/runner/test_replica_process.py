"""A replica in a process of its own yields the samples of one in this process, however slowly they are taken, and whatever
happens to the process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import psutil
import pytest
from support import token_device

from tokabatch.engine.sizing import ReplicaSizes
from tokabatch.errors import EngineError, Stopped
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.replica import Replica, Standing
from tokabatch.runner.replica_process import Build, ReplicaProcess, can_fork
from tokabatch.scheduling.contracts import Completion, Requests, SamplingParams, StepBatch, StepResult
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stopping import StopRules

PROMPTS = [[row // 2, 2, 3, 4, 5, 6, 7, row] for row in range(8)]
LIMITS = SchedulerLimits(4, 200, 16, 64, 16, GroupingLimits(2, 1))
PARAMS = SamplingParams(n=6, max_tokens=30, ignore_eos=True)
EXPECTED = {
    (row, sample): token_device.expected_output(row, sample, len(PROMPTS[row]), PARAMS)
    for row in range(len(PROMPTS))
    for sample in range(PARAMS.n)
}

pytestmark = pytest.mark.skipif(not can_fork(), reason="a process of threads is forked on Linux alone")


class Device:
    """An executor inside the replica's process; each step takes `seconds`."""

    sizes = ReplicaSizes(4, 200, 16, 64, 16, 2, 1)

    def __init__(self, seconds: float = 0.0, load_seconds: float = 0.0) -> None:
        self.device, self.waiting = token_device.TokenDevice(LIMITS), list[StepResult]()
        self.device.prompts = PROMPTS
        self.seconds, self.load_seconds = seconds, load_seconds

    def start(self) -> None:
        time.sleep(self.load_seconds)

    def submit(self, step: StepBatch) -> None:
        self.waiting.append(self.device.run(step))

    def collect(self) -> StepResult:
        time.sleep(self.seconds)
        return self.waiting.pop(0)

    def resume(self) -> None: ...

    def close(self) -> None: ...


class Work:
    """What is to do, and what of it is done."""

    def __init__(self, make: Callable[[], Device] = Device, **options: float) -> None:
        self.requests = token_device.make_requests(PROMPTS, [PARAMS])
        self.done: dict[tuple[int, int], list[int]] = {}
        self.told: list[str] = []
        self.stop = Interruption()
        self.make = make
        self.replica = ReplicaProcess(
            self.build(self.requests), self.rebuild, stop=self.stop, tell=self.told.append, interval=0.0, **options
        )

    def build(self, requests: Requests) -> Build:
        stops = StopRules(requests.sampling, [token_device.EOS], token_device.VOCAB, None)
        scheduler = Scheduler(requests, LIMITS, stops)
        return partial(Replica, scheduler, self.make, depth=2, num_samples=len(EXPECTED))

    def rebuild(self, lost: Standing) -> Build:
        """Rows of which anything is missing, whole."""
        left = [row for row in range(len(PROMPTS)) if any((row, sample) not in self.done for sample in range(PARAMS.n))]
        for key in [key for key in self.done if key[0] in left]:
            del self.done[key]
        return self.build(self.requests.take(np.array(left, np.int64)))

    def take(self, completions: list[Completion]) -> None:
        for completion in completions:
            key = (completion.row_index, completion.sample_index)
            assert key not in self.done
            self.done[key] = completion.token_ids.tolist()

    def run(self) -> Iterator[None]:
        try:
            for completions in self.replica.run():
                self.take(completions)
                yield
        finally:
            self.replica.close()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = psutil.Process().children(recursive=True)
    yield
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []


@pytest.mark.parametrize("pause", [0.0, 0.02], ids=["taken at once", "taken slowly"])
def test_samples_and_figures_are_those_of_a_replica_in_this_process(pause, monkeypatch):
    monkeypatch.setattr("tokabatch.runner.replica_process.MAX_UNSENT", 1)
    work = Work()
    for _ in work.run():
        time.sleep(pause)
    here = Work().build(work.requests)(stop=Interruption(), tell=print)
    for _ in here.run():
        pass
    assert work.done == EXPECTED
    assert work.replica.standing().scheduled == here.standing().scheduled
    steps, expected = work.replica.steps(), here.steps()
    assert len(steps) == len(expected) > 0
    assert all((steps[name] == expected[name]).all() for name in steps.columns if name != "seconds")


def test_another_process_goes_on_where_one_was_killed():
    work = Work(partial(Device, 0.005), max_restarts=3)
    kills = 0
    for _ in work.run():
        if kills < 2 and len(work.done) > 12 * (kills + 1):
            assert work.replica._process is not None
            os.kill(work.replica._process.pid or 0, signal.SIGKILL)
            kills += 1
    assert work.done == EXPECTED
    assert len(work.told) == kills == 2 and "killed by signal 9" in work.told[0]


def test_a_process_that_stands_still_is_killed_and_another_goes_on(monkeypatch):
    monkeypatch.setattr("tokabatch.runner.replica_process.BEAT_SECONDS", 0.1)
    work = Work(partial(Device, 0.005, load_seconds=2.0), max_restarts=1, hang_seconds=1.0)
    stopped = False
    for _ in work.run():
        if work.done and not stopped:
            assert work.replica._process is not None
            os.kill(work.replica._process.pid or 0, signal.SIGSTOP)
            stopped = True
    assert work.done == EXPECTED
    assert len(work.told) == 1 and "no sign of life" in work.told[0]


def test_a_process_that_is_killed_again_and_again_is_given_up(monkeypatch):
    monkeypatch.setattr(Device, "start", lambda self: os.kill(os.getpid(), signal.SIGKILL))
    work = Work(max_restarts=2)
    with pytest.raises(EngineError, match=r"signal 9.*engine\.max_restarts"):
        list(work.run())
    assert len(work.told) == 2


def test_a_fault_of_the_scheduler_is_told_with_its_place(monkeypatch):
    def fail(self: Scheduler, result: StepResult) -> list[Completion]:
        raise AssertionError("the books do not close")

    monkeypatch.setattr(Scheduler, "apply", fail)
    with pytest.raises(EngineError, match=r"(?s)the books do not close.*please report.*Traceback.*in fail"):
        list(Work().run())


def test_what_is_finished_when_the_run_is_stopped_is_handed_over():
    work = Work(partial(Device, 0.005))
    for completions in work.replica.run():
        work.take(completions)
        if work.done:
            break
    before = dict(work.done)
    work.take(work.replica.stop())
    work.replica.close()
    assert before.items() <= work.done.items() <= EXPECTED.items() and len(work.done) < len(EXPECTED)
    assert work.replica.standing().scheduled.finished == len(work.done)


def test_a_stop_breaks_into_loading():
    work = Work(partial(Device, load_seconds=60.0))
    began = time.monotonic()
    signal.signal(signal.SIGALRM, lambda *_: work.stop.request(75))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(Stopped):
        list(work.run())
    assert work.replica.stop() == [] and time.monotonic() - began < 5.0
