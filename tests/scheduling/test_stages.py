"""A worker of several pipeline stages: its steps in flight share no sample, and each takes its part of those that run."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.token_device import EOS, VOCAB, TokenDevice, expected_output, make_requests

from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules


def drive(prompts, params, limits):
    """The whole job with one step more in flight than there are stages; returns completions and the decodes of each step, with
    the samples that ran."""
    requests = make_requests(prompts, [params])
    scheduler = Scheduler(requests, limits, StopRules(requests.sampling, [EOS], VOCAB, None))
    device = TokenDevice(limits)
    device.prompts = prompts
    in_flight, done, decodes = deque(), {}, []
    while not scheduler.done:
        step = scheduler.schedule() if len(in_flight) <= limits.stages else None
        scheduler.check_integrity()
        if step is None:
            _, result = in_flight.popleft()
            for completion in scheduler.apply(result):
                done[completion.row_index, completion.sample_index] = completion
            continue
        decoding = step.run_slot[step.num_prefill_runs :]
        sampling = set(step.run_slot[step.run_samples].tolist()) | set(decoding.tolist())
        if not scheduler.counts.preemptions:
            assert all(not sampling & other for other, _ in in_flight), "a sample is in two steps in flight"
        # The device checks what every run reads; that the token is the one it drew last, too.
        np.testing.assert_array_equal(step.decode_ids, device.last[decoding])
        decodes.append((len(decoding), scheduler.num_running))
        in_flight.append((sampling, device.run(step)))
    return done, decodes, scheduler


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    stages=st.integers(2, 4),
    max_running=st.integers(1, 20),
    pages=st.sampled_from([0, 2, 200]),
    budget=st.sampled_from([0, 3, 40]),
)
def test_every_sample_is_right_on_several_stages(counts, stages, max_running, pages, budget):
    prompts = [[1, 2, 3, 4, 5, row, row + 1][: 3 + size % 5] for row, size in enumerate(counts)]
    params = SamplingParams(n=max(counts), max_tokens=12)
    grouping = GroupingLimits(2, 1)
    limits = SchedulerLimits(4, 7 + pages, max_running, max_running + budget, 6, grouping, stages)
    done, decodes, _ = drive(prompts, params, limits)
    assert len(done) == len(prompts) * params.n
    for (row, sample), completion in done.items():
        assert completion.token_ids.tolist() == expected_output(row, sample, len(prompts[row]), params)
    assert all(count <= -(-running // (stages + 1)) for count, running in decodes)


@pytest.mark.parametrize("stages", [2, 3])
def test_steps_in_flight_divide_those_that_run_evenly(stages):
    params = SamplingParams(n=60, max_tokens=40, ignore_eos=True)
    limits = SchedulerLimits(4, 2000, 60, 200, 12, None, stages)
    _, decodes, scheduler = drive([[1, 2, 3]], params, limits)
    steady = [count for count, running in decodes if running == 60 and count][5:-5]
    assert len(steady) > 50 and set(steady) == {60 // (stages + 1)}
    assert scheduler.counts.preemptions == 0
