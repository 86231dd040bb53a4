"""The whole engine on a tiny model (`tiny_models`), in float64 on the CPU: one replica, scheduled in any way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from tokabatch.engine.executor import Executor, InProcessExecutor
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.engine.worker import WorkerSpec
from tokabatch.model.families import read_spec
from tokabatch.scheduling.contracts import Completion, Requests, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

VOCAB, EOS = 97, 2
HEADER = [5, 9, 9, 41, 3, 77, 60, 12, 12, 8, 30, 31, 90, 4, 4, 4, 17, 66, 23]
"""The beginning of most prompts."""


def sizes_of(limits: SchedulerLimits) -> ReplicaSizes:
    """What a worker has to have for these limits."""
    group = limits.grouping
    numbers = limits.page_size, limits.num_pages, limits.max_running, limits.max_step_tokens, limits.max_pages_per_sequence
    return ReplicaSizes(*numbers, group.min_group if group else 0, group.min_pages if group else 1)


def worker_spec(folder: Path, limits: SchedulerLimits, draws: Sequence[SamplingParams] = ()) -> WorkerSpec:
    """`draws` are those for which penalties are made ready."""
    return WorkerSpec(folder, read_spec(folder), torch.float64, "cpu", "torch_paged", sizes_of(limits), draws=tuple(draws))


def generate(
    spec: WorkerSpec,
    requests: Requests,
    limits: SchedulerLimits,
    depth: int,
    make: Callable[[WorkerSpec], Executor] = InProcessExecutor,
    *,
    losses: Sequence[int] = (),
    given_later: int = 0,
) -> tuple[dict[tuple[int, int], Completion], Scheduler]:
    """All samples by (row, number), and the scheduler, on a worker that is lost after each of so many steps and made again. The
    last `given_later` prompts come while the others run."""

    def start() -> Executor:
        executor = make(spec)
        executor.start()
        return executor

    executor, first = start(), len(requests) - given_later
    scheduler = Scheduler(requests.take(np.arange(first)), limits, StopRules(requests.sampling, [EOS], VOCAB, None))
    later = [requests.take(np.arange(first, len(requests)))] if given_later else []
    done: dict[tuple[int, int], Completion] = {}
    steps = 0
    while not scheduler.done or later:
        step = scheduler.schedule() if scheduler.num_in_flight < depth else None
        scheduler.check_integrity()
        if step is not None:
            executor.submit(step)
            steps += 1
            if steps == 3 and later:
                scheduler.extend(later.pop())
            if steps in losses:
                scheduler.lost_device()
                executor.close()
                executor = start()
            continue
        if not scheduler.num_in_flight and later:
            scheduler.extend(later.pop())
            continue
        for completion in scheduler.apply(executor.collect()):
            assert (completion.row_index, completion.sample_index) not in done
            done[completion.row_index, completion.sample_index] = completion
    executor.close()
    assert scheduler.kv.pool.num_used == 0
    return done, scheduler


@st.composite
def schedules(draw: st.DrawFn, longest: int) -> tuple[SchedulerLimits, int]:
    """Limits from roomy to barely possible for samples of up to `longest` tokens, one to three steps in flight."""
    page_size = draw(st.sampled_from([1, 2, 4, 8, 16]))
    pages = -(-longest // page_size)
    max_running = draw(st.integers(1, 12))
    limits = SchedulerLimits(
        page_size=page_size,
        num_pages=pages + 1 + draw(st.sampled_from([0, 1, 3, 10, 100])),
        max_running=max_running,
        max_step_tokens=max_running + draw(st.sampled_from([0, 1, 5, 40])),
        max_pages_per_sequence=pages,
        grouping=draw(st.sampled_from([None, GroupingLimits(1, 1), GroupingLimits(2, 1), GroupingLimits(3, 2)])),
    )
    return limits, draw(st.integers(1, 3))
