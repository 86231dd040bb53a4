"""Another policy for the scheduler, written in one file: one from scratch, and one that changes a single answer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import HealthCheck, given, settings
from support import token_device as device
from support.scheduling_jobs import jobs

from tokabatch.arrays import Int32, Int64
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.kv.manager import KVCacheManager
from tokabatch.scheduling.kv.prefix_tree import PromptPages
from tokabatch.scheduling.kv.slots import Slots
from tokabatch.scheduling.lengths.length_estimates import LengthEstimates
from tokabatch.scheduling.policy.forecast_policy import ForecastPolicy
from tokabatch.scheduling.policy.policy import Candidates
from tokabatch.scheduling.scheduler import SchedulerLimits
from tokabatch.scheduling.work import Work

MOST = 3


class ThreeAtATime:
    """At most three samples run; prompts with few samples left come first, and the youngest samples give way."""

    def __init__(self, work: Work, kv: KVCacheManager, lengths: LengthEstimates) -> None:
        self.kv = kv

    def order(self, waiting: list[PromptPages]) -> list[PromptPages]:
        return sorted(waiting, key=lambda prompt: prompt.num_pending)

    def admit(self, candidates: Candidates) -> Int32:
        before = np.cumsum(candidates.counts) - candidates.counts
        return np.clip(MOST - len(self.kv.slots.order) - before, 0, candidates.counts)

    def hold(self, decoding: Int64) -> Int64:
        running = len(self.kv.slots.order)
        assert running <= MOST
        return decoding

    def rank(self, slots: Int64) -> Int64:
        return slots[np.argsort(self.kv.slots.admitted[slots], kind="stable")]

    def invalidate(self) -> None:
        pass


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(jobs())
def test_a_policy_written_from_scratch_gets_every_sample_done(job):
    prompts, params, limits, depth = job
    completions, _ = device.drive(device.make_requests(prompts, params), limits, prompts, depth, policy=ThreeAtATime)
    assert len(completions) == sum(params[row % len(params)].n for row in range(len(prompts)))
    for (row, sample), got in completions.items():
        assert got.token_ids.tolist() == device.expected_output(row, sample, len(prompts[row]), params[row % len(params)])


class OnePromptAfterAnother(ForecastPolicy):
    """No prompt is begun before all samples of the last one are admitted."""

    def admit(self, candidates: Candidates) -> Int32:
        counts = super().admit(candidates)
        counts[1:] = 0
        return counts


def test_one_answer_can_be_replaced_alone():
    prompts = [[i, i + 1, i + 2] for i in range(4)]
    requests = device.make_requests(prompts, [SamplingParams(n=8, max_tokens=6, ignore_eos=True)])
    limits = SchedulerLimits(4, 64, 8, 32, 16, GroupingLimits(2, 1))
    for policy, in_order in ((OnePromptAfterAnother, True), (ForecastPolicy, False)):
        rows = [row for row, _ in device.drive(requests, limits, prompts, policy=policy)[0]]
        assert (rows == sorted(rows)) is in_order


class LastPromptsFirst(ForecastPolicy):
    """Prompts that have been open before come in in the opposite of their order."""

    def order(self, waiting: list[PromptPages]) -> list[PromptPages]:
        return waiting[::-1]


def test_samples_that_begin_in_another_order_are_opened_at_once_and_run_in_that_of_the_plan(monkeypatch):
    prompts = [[1, 2, 3, i] for i in range(6)]
    requests = device.make_requests(prompts, [SamplingParams(n=6, max_tokens=9)])
    calls: list[str] = []
    for owner, name in ((Slots, "open"), (KVCacheManager, "take_changes")):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, name=name, method=method: calls.append(name) or method(*given))
    limits = SchedulerLimits(4, 200, 14, 20, 16, GroupingLimits(2, 1))
    completions, _ = device.drive(requests, limits, prompts, policy=LastPromptsFirst)
    assert len(completions) == 36
    assert ("open", "open") not in pairwise(calls), "a step opens the slots of its samples in several calls"
