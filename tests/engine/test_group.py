"""A worker of several ranks is one worker: whatever happens to a rank, it is lost as a whole, and nothing of it is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from support import scripted_worker, tiny_models, token_device
from support.ranks import TinyJob, run
from support.scripted_worker import Script

from tokabatch import engine
from tokabatch.engine.executor import GroupExecutor
from tokabatch.engine.heartbeat import Patience
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.engine.worker import WorkerSpec
from tokabatch.errors import StepDropped, WorkerLost
from tokabatch.model.families import read_spec
from tokabatch.parallel.mesh import Mesh
from tokabatch.runner.replica import Replica
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

PROMPTS = [[row // 2, 2, 3, 4, 5, 6, 7, row] for row in range(6)]
PARAMS = SamplingParams(n=4, max_tokens=10, ignore_eos=True)
FORKED = multiprocessing.get_context("forkserver").Process
LIMITS = SchedulerLimits(4, 200, 16, 64, 16, GroupingLimits(2, 1))


@pytest.fixture(autouse=True)
def meeting_places(tmp_path, monkeypatch):
    """Ranks are forked from a server that has imported everything, and meet in a folder of the test's."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tokabatch.engine.executor", "support.scripted_worker"])
    folder = tmp_path / "meeting"
    folder.mkdir()
    monkeypatch.setattr(engine.executor, "TemporaryDirectory", partial(tempfile.TemporaryDirectory, dir=folder))
    yield
    assert not list(folder.iterdir()), "where the ranks met was left behind"


def processes(executor: GroupExecutor) -> list[psutil.Process]:
    return [psutil.Process(rank.process.pid) for rank in executor._ranks]


def scripted(folder: Path, patience: Patience | None = None, **faults) -> GroupExecutor:
    script = Script(LIMITS, PROMPTS, folder, **faults)
    return GroupExecutor(script, 2, 1, scripted_worker.build, patience, FORKED)


def scheduler(limits: SchedulerLimits = LIMITS, vocab_size: int = token_device.VOCAB) -> Scheduler:
    requests = token_device.make_requests(PROMPTS, [PARAMS])
    return Scheduler(requests, limits, StopRules(requests.sampling, [], vocab_size, None))


def test_a_killed_rank_costs_no_sample(tmp_path):
    folder = tiny_models.build("llama", tmp_path / "llama", vocab_size=300)
    sizes = ReplicaSizes(4, 200, 16, 64, 16, 2, 1)
    spec = WorkerSpec(folder, read_spec(folder), torch.float64, "cpu", "torch_paged", sizes)
    make = partial(GroupExecutor, spec, 2, 1, starter=FORKED)
    told: list[str] = []
    replica = Replica(scheduler(vocab_size=300), make, depth=2, max_restarts=3, tell=told.append)
    done, ever = {}, []
    for step, completions in enumerate(replica.run()):
        done |= {(each.row_index, each.sample_index): each.token_ids.tolist() for each in completions}
        if step in (0, 6):
            ever += processes(replica._executor)
        if step == 5:
            os.kill(ever[1].pid, signal.SIGKILL)
    replica.close()
    assert replica.counts.restarts == {"killed": 1} and "rank 1 was killed by signal 9 (SIGKILL)" in told[0]
    expected = run(Mesh.single(), TinyJob(folder, PROMPTS, [PARAMS], LIMITS))
    assert done == {key: each.token_ids.tolist() for key, each in expected.items()}
    assert not any(process.is_running() for process in ever)


def test_a_rank_that_stands_still_is_a_hang_of_the_worker(tmp_path):
    executor = scripted(tmp_path, Patience(step=60.0, warming=60.0, silence=2.0, loading=60.0))
    executor.start()
    ranks = processes(executor)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    with pytest.raises(WorkerLost, match=r"rank 1 hung \(it did not respond") as lost:
        executor._receive()
    assert lost.value.cause == "hung"
    _, alive = psutil.wait_procs(ranks, timeout=30.0)
    assert not alive, "a rank outlived the others"
    executor.close()


def test_a_step_without_memory_ends_the_ranks_and_says_why(tmp_path):
    executor = scripted(tmp_path, memory_tokens=1)
    executor.start()
    with pytest.raises(StepDropped, match="no memory for a step"):
        executor.submit(scheduler().schedule())
        executor.collect()
    with pytest.raises(WorkerLost) as lost:
        executor.resume()
    assert lost.value.cause == "out of memory"
    executor.close()


def test_ranks_that_die_while_they_load_are_a_lost_worker(tmp_path):
    executor = scripted(tmp_path, dies_loading=1)
    with pytest.raises(WorkerLost, match=r"died \(exit code 3\)"):
        executor.start()
    executor.close()
    scripted(tmp_path).close()
