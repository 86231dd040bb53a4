"""Run a module at the pace of a GPU that is not here: python -m benchmarks.absent_gpu GPU MODULE [ARGUMENT ...]

Jobs and servers in it are sized for that GPU (`h200` and other keys of `tokabatch plan --simulate`), and steps of a scripted
engine take the time of its roofline: what the host does beside steps is as it would be there. No weights are read, so that a
checkpoint may be a sparse file.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch

from benchmarks.scripted_engine import Script, build_paced_worker
from tokabatch.engine.executor import Executor, ProcessExecutor
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.forecast import cost_model
from tokabatch.forecast.devices import known_device
from tokabatch.job import Job
from tokabatch.runner import make_replica, run
from tokabatch.serve import server
from tokabatch.workload import open_model, prepare
from tokabatch.workload.prepare import Demand


@contextmanager
def absent_gpu(key: str) -> Generator[None]:
    """Inside, the engine of jobs and servers is a scripted one at the pace of this device."""
    device = known_device(key)

    def maker(job: Job, workload: Demand, sizes: ReplicaSizes, *_: object) -> Callable[[], Executor]:
        cost, _ = cost_model.cost_model(workload, device, None)
        script = Script(workload.spec.vocab_size, workload.eos_token_ids[0], slots=sizes.max_running)
        return partial(ProcessExecutor, (script, sizes, cost), build_paced_worker)

    opens = open_model.open_without_weights
    sized = partial(cost_model.size_replica, absent=device)
    with ExitStack() as patches:
        for module, name, value in (
            (open_model, "open_without_weights", lambda job, **_: opens(job, absent_gpu=True)),
            (prepare, "open_without_weights", lambda job, **_: opens(job, absent_gpu=True)),
            (run, "size_replica", sized),
            (server, "size_replica", sized),
            (make_replica, "executor_maker", maker),
            (server, "executor_maker", maker),
            (torch.cuda, "get_device_name", lambda: device.rates.name),
        ):
            patches.enter_context(mock.patch.object(module, name, value))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpu")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    sys.argv = [chosen.module, *chosen.arguments]
    with absent_gpu(chosen.gpu):
        runpy.run_module(chosen.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
