"""What the scheduler's side sees when the worker's process cannot start, breaks in a step, or is killed."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import tiny_models, token_device

from tokabatch.engine.executor import ProcessExecutor
from tokabatch.engine.sizing import ReplicaSizes
from tokabatch.engine.worker import WorkerSpec
from tokabatch.errors import EngineError, ModelError
from tokabatch.messages import SamplingParams, StepBatch
from tokabatch.model.families import read_spec
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stopping import StopRules


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
    with pytest.raises(ModelError):
        ProcessExecutor(replace(spec, folder=tmp_path))


def test_the_cause_of_a_broken_step_arrives_with_steps_in_flight(spec, steps):
    executor = ProcessExecutor(spec)
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
    executor.submit(steps[0])
    executor.collect()
    os.kill(executor._process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="exit code -9"):
        executor.submit(steps[1])
        executor.collect()


def test_close_ends_the_process(spec):
    executor = ProcessExecutor(spec)
    executor.close()
    assert executor._process.exitcode == 0
