"""The record of a run's steps adds up to its time, however many were in flight."""

from __future__ import annotations

from collections import deque

import pytest
from support import token_device as device

from tokabatch.runner.step_times import Stopwatch
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules


@pytest.mark.parametrize("depth", [1, 3])
def test_seconds_add_up_and_counts_are_those_of_the_run(depth):
    prompts = [[i, i + 1, i + 2] for i in range(8)]
    requests = device.make_requests(prompts, [SamplingParams(n=3, max_tokens=12)])
    limits = SchedulerLimits(4, 60, 6, 20, 5, None)
    scheduler = Scheduler(requests, limits, StopRules(requests.sampling, [device.EOS], device.VOCAB, None))
    runner = device.TokenDevice(limits)
    runner.prompts = prompts
    now = 100.0
    watch = Stopwatch(24, clock=lambda: now)
    results, finished = deque(), 0
    while not scheduler.done:
        step = scheduler.schedule() if scheduler.num_in_flight < depth else None
        if step is not None:
            results.append(runner.run(step))
            watch.submitted(step, scheduler)
            continue
        now += 0.5
        done = len(scheduler.apply(results.popleft()))
        finished += done
        watch.collected(done)
    steps = watch.steps()
    assert steps.seconds == pytest.approx(0.5 * scheduler.counts.steps) == pytest.approx(now - 100)
    assert steps["finished"].sum() == finished == 24
    assert steps["waiting"][0] == 24 - steps["running"][0] > 0
    assert steps["tokens"].sum() == steps["decoded"].sum() + scheduler.counts.prefilled_tokens
