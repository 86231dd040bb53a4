"""What the scheduler's side sees when the worker's process cannot start, breaks in a step, or is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from support import tiny_models, token_device
from support.processes import started_with

from tokabatch.engine.executor import ProcessExecutor
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.engine.worker import WorkerSpec
from tokabatch.errors import EngineError, ModelError
from tokabatch.model.families import read_spec
from tokabatch.scheduling.contracts import SamplingParams, StepBatch
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> WorkerSpec:
    folder = tiny_models.build("llama", tmp_path_factory.mktemp("models") / "llama")
    return WorkerSpec(folder, read_spec(folder), torch.float32, "cpu", "torch_paged", ReplicaSizes(4, 16, 2, 32, 8, 0, 1))


@pytest.fixture
def steps() -> list[StepBatch]:
    """The first steps of a small job, as a scheduler three steps ahead decides them."""
    requests = token_device.make_requests([[1, 2, 3]], [SamplingParams(max_tokens=6, ignore_eos=True)])
    scheduler = Scheduler(requests, SchedulerLimits(4, 16, 2, 32, 8, None), StopRules(requests.sampling, [], 97, None))
    return [step for step in (scheduler.schedule() for _ in range(3)) if step is not None]


def test_a_model_that_cannot_load_is_the_users_error(spec, tmp_path):
    executor = ProcessExecutor(replace(spec, folder=tmp_path))
    with pytest.raises(ModelError):
        executor.start()
    executor.close()


def test_the_cause_of_a_broken_step_arrives_with_steps_in_flight(spec, steps):
    executor = ProcessExecutor(spec)
    executor.start()
    broken = replace(steps[1], run_slot=np.full_like(steps[1].run_slot, 99))
    with pytest.raises(EngineError, match="IndexError"):
        executor.submit(steps[0])
        executor.submit(broken)
        executor.collect()
        for _ in range(50):
            executor.submit(steps[2])
        executor.collect()
    executor.close()


def test_a_killed_worker_is_noticed(spec, steps):
    executor = ProcessExecutor(spec)
    executor.start()
    executor.submit(steps[0])
    executor.collect()
    os.kill(executor.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="signal 9"):
        executor.submit(steps[1])
        executor.collect()


def test_close_ends_the_process(spec):
    executor = ProcessExecutor(spec)
    executor.start()
    executor.close()
    assert executor._ranks[0].process.exitcode == 0


PARENT = """
import os, sys
sys.path.insert(0, {support!r})
from pathlib import Path
from support.scripted_worker import Script, build
from tokabatch.engine.executor import ProcessExecutor
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules
from support.token_device import make_requests
limits = SchedulerLimits(4, 16, 2, 32, 8, None)
if {when!r} == "loading":
    os.write(1, b"0\\n")
executor = ProcessExecutor(Script(limits, [[1, 2, 3]], Path({marks!r}), load_seconds={load}, sleep={{1: 300.0}}), build)
executor.start()
os.write(1, f"{{executor.pid}}\\n".encode())
requests = make_requests([[1, 2, 3]], [SamplingParams(max_tokens=6)])
executor.submit(Scheduler(requests, limits, StopRules(requests.sampling, [], 97, None)).schedule())
executor.collect()
"""


@pytest.mark.parametrize("when", ["loading", "stepping", "stopped"])
def test_no_orphan_is_left_when_the_parent_is_killed(when, tmp_path):
    script = tmp_path / "parent.py"
    load = 300.0 if when == "loading" else 0.0
    script.write_text(PARENT.format(support=str(Path(__file__).parent.parent), marks=str(tmp_path), load=load, when=when))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if when == "loading":
        while not started_with("spawn_main", psutil.Process(parent.pid).children()):
            time.sleep(0.05)
    if when == "stopped":
        os.kill(pid, signal.SIGSTOP)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert family
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=30.0)
    assert not alive


def test_signals_for_the_parent_leave_the_worker_alone(spec, steps):
    executor = ProcessExecutor(spec)
    executor.start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(executor.pid, number)
    executor.submit(steps[0])
    executor.collect()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    executor.close()


def test_an_executor_that_was_never_started_closes(spec):
    ProcessExecutor(spec).close()
