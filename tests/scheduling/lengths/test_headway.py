"""How much of the running samples' work is done, by which a fleet divides its plan."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from support import token_device

from tokabatch.forecast.simulate import GO_ON, STOP, SimulatedDevice
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

LIMITS = SchedulerLimits(4, 10_000, 100, 400, 80, GroupingLimits(2, 1))


def running(rows: int, params: SamplingParams, lengths: np.ndarray) -> Iterator[tuple[int, float]]:
    """Run samples of these lengths, one a row; yield the number that run and the headway after each step."""
    requests = token_device.make_requests([[row] for row in range(rows)], [params])
    scheduler = Scheduler(requests, LIMITS, StopRules(requests.sampling, [STOP], max(STOP, GO_ON) + 1, None))
    device = SimulatedDevice(requests, lambda row, sample: lengths[row].astype(np.int32), LIMITS.max_running)
    while not scheduler.done:
        step = scheduler.schedule()
        assert step is not None
        scheduler.apply(device.run(step))
        yield scheduler.num_running, scheduler.headway


def test_samples_of_a_given_length_count_as_what_is_left_of_them():
    steps = list(running(100, SamplingParams(max_tokens=40, ignore_eos=True), np.full(100, 40)))
    assert [count for count, _ in steps] == [100] * 39 + [0]
    # The next 30 tokens count.
    assert [headway for _, headway in steps] == pytest.approx([0.0] * 10 + [100 * k / 30 for k in range(1, 30)] + [0.0])


def test_samples_that_go_on_where_most_end_early_count_as_more_than_one():
    lengths = np.where(np.random.default_rng(0).random(1000) < 0.8, 4, 100)
    last = [(count, headway) for count, headway in running(1000, SamplingParams(max_tokens=200), lengths) if count][-60:-40]
    assert all(headway < -count / 2 for count, headway in last)
