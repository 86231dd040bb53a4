"""Which samples continue when pages run short: the count against stepping through it, and what waiting saves on a whole
workload."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shortsighted import Shortsighted

from tokabatch.arrays import Int32, Int64
from tokabatch.forecast.assumed_lengths import uniform
from tokabatch.forecast.simulate import STOP, SimulatedDevice, Simulation, simulate
from tokabatch.scheduling.contracts import Requests, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.policy.forecast_policy import finishing
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

ENTRY = st.tuples(st.integers(0, 30), st.integers(0, 40))


def stays_within(free: int, number: int, rank: list[int], end: list[int], pages: list[int], samples: int) -> bool:
    """Step by step, at a page a step: are there always pages for all samples of the first `number`?"""
    inside = [i for i in range(len(rank)) if rank[i] < number]
    for step in range(1, max(end, default=0) + 1):
        freed = sum(pages[i] for i in inside if end[i] < step)
        taken = step * sum(1 for i in inside if i < samples and end[i] >= step)
        if taken > free + freed:
            return False
    return True


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 200), st.lists(ENTRY, min_size=1, max_size=40), st.lists(ENTRY, max_size=5), st.randoms())
def test_samples_that_may_continue_have_pages_to_their_ends(free, samples, prompts, random):
    count = len(samples)
    rank = random.sample(range(count), count) + [random.randrange(-1, count) for _ in prompts]
    end = [max(1, steps) for _, steps in samples] + [steps for _, steps in prompts]
    pages = [held for held, _ in samples + prompts]
    found = finishing(
        free=free,
        page_size=1,
        rank=np.array(rank, np.int32),
        end=np.array(end, np.int64),
        pages=np.array(pages, np.int32),
        grows=np.arange(len(rank)) < count,
    )
    assert found == 0 or stays_within(free, found, rank, end, pages, count)
    assert found == count or not stays_within(free, found + 1, rank, end, pages, count)


def test_pages_fill_over_as_many_steps_as_they_hold_tokens():
    def count(page_size: int) -> int:
        return finishing(
            free=10,
            page_size=page_size,
            rank=np.arange(8, dtype=np.int32),
            end=np.full(8, 20, np.int64),
            pages=np.zeros(8, np.int32),
            grows=np.ones(8, np.bool_),
        )

    assert [count(page_size) for page_size in (2, 4, 16)] == [1, 2, 8]


def requests_of(count: int, max_tokens: int) -> Requests:
    return Requests(
        row_index=np.arange(count, dtype=np.int64),
        tokens=np.full(count * 40, 2, np.int32),
        start=np.arange(count, dtype=np.int64) * 40,
        length=np.full(count, 40, np.int32),
        lcp=np.zeros(count, np.int32),
        params=np.zeros(count, np.int32),
        sampling=(SamplingParams(max_tokens=max_tokens),),
    )


def limits_of(num_pages: int, max_tokens: int) -> SchedulerLimits:
    return SchedulerLimits(16, num_pages, 1024, 4096, -(-(40 + max_tokens) // 16), GroupingLimits(4, 2))


def run(lengths, count: int, max_tokens: int, num_pages: int, predictor=None) -> Simulation:
    limits = limits_of(num_pages, max_tokens)
    done = simulate(requests_of(count, max_tokens), limits, lambda work: 1.0, lengths, predictor)
    assert done.counts.finished == count
    return done


def spread(row: Int64, sample: Int32) -> Int32:
    """Exponential around 80."""
    return (1 - 80 * np.log(1 - uniform(row, sample, 5))).astype(np.int32)


def short_or_endless(row: Int64, sample: Int32) -> Int32:
    never = uniform(row, sample, 1) < 0.2
    return np.where(never, 100_000, 30 + 60 * uniform(row, sample, 2)).astype(np.int32)


def test_samples_wait_for_others_to_end_and_are_not_computed_again():
    done = run(spread, 3000, 1024, 1200, Shortsighted())
    assert done.counts.waited_steps > 0
    assert done.waste < 0.005
    assert done.kv_use > 0.97


def test_endless_samples_found_out_late_wait_early():
    done = run(short_or_endless, 4000, 512, 2400)
    assert done.counts.waited_steps > 0
    assert done.waste < 0.01


@pytest.mark.parametrize("num_pages", [37, 40, 60])
def test_the_smallest_caches_get_through(num_pages):
    assert run(short_or_endless, 40, 512, num_pages, Shortsighted()).counts.output_tokens > 0


def test_every_step_that_a_sample_sits_out_is_counted():
    requests, limits = requests_of(200, 512), limits_of(60, 512)
    scheduler = Scheduler(requests, limits, StopRules(requests.sampling, [STOP], STOP + 1, None), Shortsighted())
    device, seq, waited = SimulatedDevice(requests, short_or_endless, limits.max_running), scheduler.kv.slots, 0
    while not scheduler.done:
        ready = seq.order[seq.on_device[seq.order] & (seq.length > seq.computed)[seq.order]]
        epoch = seq.epoch[ready].copy()
        step = scheduler.schedule()
        assert step is not None
        stays = ready[seq.epoch[ready] == epoch]
        waited += len(stays) - int(np.isin(stays, step.run_slot).sum())
        scheduler.apply(device.run(step))
    assert scheduler.counts.preemptions > 0
    assert scheduler.counts.waited_steps == waited > 0
