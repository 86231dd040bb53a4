"""A replica whose worker is killed, hangs, runs out of memory or meets a row that kills it: the samples are those of an
undisturbed run, and what happened is counted and reported."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
from support import scripted_worker, token_device
from support.processes import started_with
from support.scripted_worker import Script

from tokabatch.engine.executor import ProcessExecutor
from tokabatch.engine.heartbeat import Patience
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.errors import EngineError, StepDropped, Stopped, WorkerLost
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.replica import Replica
from tokabatch.scheduling.contracts import Completion, SamplingParams, StepBatch, StepResult
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

PROMPTS = [[row // 2, 2, 3, 4, 5, 6, 7, row] for row in range(6)]
LIMITS = SchedulerLimits(4, 200, 16, 64, 16, GroupingLimits(2, 1))
PARAMS = SamplingParams(n=4, max_tokens=30, ignore_eos=True)
FORKED = multiprocessing.get_context("forkserver").Process
SHORT = Patience(step=2.0, warming=60.0, silence=2.5, loading=60.0)
"""For hangs. Elsewhere a busy machine must not pass for one."""


class Run:
    """One scheduler's work on scripted workers."""

    def __init__(self, script: Script, *, patience: Patience | None = None, max_restarts: int | None = 20) -> None:
        self.requests = token_device.make_requests(PROMPTS, [PARAMS])
        self.stops = StopRules(self.requests.sampling, [token_device.EOS], token_device.VOCAB, None)
        self.scheduler = Scheduler(self.requests, LIMITS, self.stops)
        self.told: list[str] = []
        self.stop = Interruption()
        self.done: dict[tuple[int, int], Completion] = {}
        self.make = partial(ProcessExecutor, script, scripted_worker.build, patience, FORKED)
        self.options = {"depth": 2, "max_restarts": max_restarts}

    def complete(self, each_step: Callable[[int, int], None] = lambda step, pid: None) -> None:
        """`each_step` is called with the number of steps done and the worker's pid."""
        replica = Replica(self.scheduler, self.make, stop=self.stop, tell=self.told.append, **self.options)
        self.counts = replica.counts
        try:
            for steps, completions in enumerate(replica.run(), 1):
                for completion in completions:
                    key = (completion.row_index, completion.sample_index)
                    assert key not in self.done
                    self.done[key] = completion
                each_step(steps, getattr(replica._executor, "pid", 0))
        finally:
            replica.close()

    def check(self, errors: frozenset[int] = frozenset()) -> None:
        assert set(self.done) == {(row, sample) for row in range(len(PROMPTS)) for sample in range(PARAMS.n)}
        for (row, sample), completion in self.done.items():
            if row in errors:
                assert completion.error_code == "worker_crash" and completion.error_message
                continue
            assert completion.error_code is None
            expected = token_device.expected_output(row, sample, len(PROMPTS[row]), PARAMS)
            assert completion.token_ids.tolist() == expected
        assert not workers(), "a worker was left behind"


OTHERS: list[psutil.Process] = []
"""What other modules' tests have running when these begin."""


def workers() -> list[psutil.Process]:
    """Processes that these tests have started, but for multiprocessing's own, which stay until the end."""
    own = psutil.Process().children()
    helpers = started_with("resource_tracker", own) + started_with("forkserver", own)
    return [child for child in psutil.Process().children(recursive=True) if child not in helpers and child not in OTHERS]


@pytest.fixture(scope="module", autouse=True)
def quick_starts() -> None:
    """Scripted workers use no device and are forked from a server that has imported everything."""
    OTHERS.extend(psutil.Process().children(recursive=True))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tokabatch.engine.executor", "support.scripted_worker"])


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Script]:
    return lambda **faults: Script(LIMITS, PROMPTS, tmp_path, **faults)


def test_a_killed_worker_costs_no_sample(script):
    run = Run(script())

    def kill(step: int, pid: int) -> None:
        if step in (7, 30):
            os.kill(pid, signal.SIGKILL)

    run.complete(kill)
    run.check()
    assert run.counts.restarts == {"killed": 2}
    assert run.scheduler.counts.requeued > 0 and run.scheduler.counts.recomputed_tokens > 0
    assert len(run.told) == 2 and "signal 9 (SIGKILL)" in run.told[0] and "keep their tokens" in run.told[0]


def test_death_is_noticed_at_once(script):
    executor = ProcessExecutor(script(sleep={1: 60.0}), scripted_worker.build, starter=FORKED)
    executor.start()
    executor.submit(Run(script()).scheduler.schedule())
    seen: list[float] = []

    def kill() -> None:
        time.sleep(0.5)
        os.kill(executor.pid, signal.SIGKILL)
        seen.append(time.monotonic())

    threading.Thread(target=kill).start()
    with pytest.raises(WorkerLost) as lost:
        executor.collect()
    # Long before the step would end.
    assert lost.value.cause == "killed" and time.monotonic() - seen[0] < 20.0
    executor.close()


@pytest.mark.parametrize("queued", [0, 40])
def test_a_stopped_worker_is_a_hang_even_where_the_pipe_is_full(script, queued):
    run = Run(script())
    executor = ProcessExecutor(script(), scripted_worker.build, SHORT, FORKED)
    executor.start()
    step = run.scheduler.schedule()
    executor.submit(step)
    executor.collect()
    os.kill(executor.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(WorkerLost) as lost:
        for _ in range(queued * 100):
            executor.submit(step)
        executor.submit(step)
        executor.collect()
    assert lost.value.cause == "hung" and "did not respond" in str(lost.value)
    assert SHORT.silence - 1.0 < time.monotonic() - began < SHORT.silence + 10.0
    executor.close()


def test_a_hung_step_is_noticed_and_the_run_continues(script):
    run = Run(script(sleep={25: 3600.0}), patience=SHORT)
    run.complete()
    run.check()
    assert run.counts.restarts == {"hung": 1}
    # Step 24's result may wait behind the launch of step 25, which never returns.
    assert re.search("(step 25 was|steps 24 to 25 were) not done after", run.told[0])


def test_loading_and_the_first_steps_may_take_their_time(script):
    run = Run(script(load_seconds=4.0, sleep={1: 4.0}), patience=SHORT)
    run.complete()
    run.check()
    assert not run.counts.restarts


def test_an_error_in_the_worker_restarts_its_process(script):
    run = Run(script(raises={9: "CUDA error: an illegal memory access was encountered"}))
    pids: set[int] = set()
    run.complete(lambda step, pid: pids.add(pid))
    run.check()
    assert run.counts.restarts == {"failed": 1} and len(pids) == 2
    assert "illegal memory access" in run.told[0] and "keep their tokens" in run.told[0] and "Traceback" in run.told[0]


def test_rows_that_kill_the_worker_become_error_rows(script):
    run = Run(script(poison=frozenset([3])))
    run.complete()
    run.check(errors=frozenset([3]))
    # Twice together, three halvings of the six rows, twice alone.
    assert run.counts.restarts == {"killed": run.counts.restarts.total()} and run.counts.restarts.total() <= 7
    assert any("row 3 has killed the worker again, running alone" in text for text in run.told)


def test_no_memory_halves_the_steps_and_says_so(script):
    run = Run(script(memory_tokens=34))
    run.complete()
    run.check()
    assert run.counts.dropped_steps == 1 and not run.counts.restarts
    assert run.scheduler.limits.max_step_tokens == 32
    assert "no memory for a step of" in run.told[0] and "steps of at most 32 tokens" in run.told[0]


def test_no_memory_a_second_time_restarts_the_worker(script):
    run = Run(script(memory_tokens=17))
    run.complete()
    run.check()
    assert run.counts.dropped_steps == 3 and run.counts.restarts == {"out of memory": 1}
    assert run.scheduler.limits.max_step_tokens == 16
    assert "engine.kv_cache_tokens" in run.told[1]


class DiesResuming:
    """The first of these has no memory for a step, and is gone when it is asked to go on."""

    made = 0
    sizes = ReplicaSizes(4, 200, 16, 64, 16, 2, 1)

    def __init__(self) -> None:
        DiesResuming.made += 1
        self.first = DiesResuming.made == 1
        self.results: list[StepResult] = []

    def start(self) -> None:
        self.device = token_device.TokenDevice(LIMITS)
        self.device.prompts = PROMPTS

    def submit(self, step: StepBatch) -> None:
        self.results.append(self.device.run(step))

    def collect(self) -> StepResult:
        if self.first:
            raise StepDropped("no memory for a step of 64 tokens")
        return self.results.pop(0)

    def resume(self) -> None:
        raise WorkerLost("the worker process was killed by signal 9 (SIGKILL)", "killed")

    def close(self) -> None:
        """Nothing is held."""


def test_a_worker_that_dies_before_it_continues_with_smaller_steps_is_replaced(script):
    run = Run(script())
    run.make = DiesResuming
    run.complete()
    run.check()
    assert run.counts.dropped_steps == 1 and run.counts.restarts == {"killed": 1}


def test_deaths_while_loading_are_survived_and_counted(script):
    run = Run(script(dies_loading=3))
    run.complete()
    run.check()
    assert run.counts.restarts == {"died": 3} and run.scheduler.counts.requeued == 0


def test_a_worker_that_never_gets_on_is_given_up(script):
    run = Run(script(dies_loading=100), max_restarts=2)
    with pytest.raises(EngineError, match=r"number 3 without a sample finished.*engine\.max_restarts"):
        run.complete()
    assert run.counts.restarts == {"died": 3}


def test_a_worker_that_says_why_it_cannot_start_is_tried_twice(tmp_path):
    run = Run(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(WorkerLost, match="AttributeError"):
        run.complete()
    assert run.counts.restarts == {"failed": 1}


def test_without_a_process_of_its_own_a_fault_is_the_end(script):
    run = Run(script(raises={4: "CUDA error"}), max_restarts=None)
    with pytest.raises(WorkerLost, match="CUDA error"):
        run.complete()


@pytest.mark.parametrize("when", ["loading", "stepping"])
def test_a_request_to_stop_breaks_into_waiting(script, when):
    run = Run(script(load_seconds=60.0) if when == "loading" else script(sleep={5: 60.0}))
    before = signal.signal(signal.SIGUSR2, lambda number, frame: run.stop.request(75))
    try:
        timer = threading.Timer(1.0 if when == "loading" else 2.0, os.kill, (os.getpid(), signal.SIGUSR2))
        timer.start()
        began = time.monotonic()
        with pytest.raises(Stopped) as stopped:
            run.complete()
        assert stopped.value.exit_code == 75 and time.monotonic() - began < 30.0
        assert not workers()
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize(("few", "most"), [(1, 2), (100, 3)])
def test_one_step_more_is_in_flight_while_few_samples_run(monkeypatch, few, most):
    monkeypatch.setattr("tokabatch.runner.replica.FEW_RUNNING", few)
    requests = token_device.make_requests(PROMPTS, [PARAMS])
    stops = StopRules(requests.sampling, [token_device.EOS], token_device.VOCAB, None)
    scheduler, device = Scheduler(requests, LIMITS, stops), token_device.TokenDevice(LIMITS)
    device.prompts = PROMPTS
    waiting: list[StepResult] = []
    deepest = 0

    class Device:
        sizes = ReplicaSizes(4, 200, 16, 64, 16, 2, 1)

        def start(self) -> None: ...

        def submit(self, step: StepBatch) -> None:
            nonlocal deepest
            waiting.append(device.run(step))
            deepest = max(deepest, len(waiting))

        def collect(self) -> StepResult:
            return waiting.pop(0)

        def resume(self) -> None: ...

        def close(self) -> None: ...

    for _ in zip(range(9), Replica(scheduler, Device, depth=2, depth_of_few=3).run(), strict=False):
        pass
    assert deepest == most
