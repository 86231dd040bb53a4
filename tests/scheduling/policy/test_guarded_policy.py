"""What holds whatever a policy answers: nothing hangs, and nothing is admitted that must not be."""

from __future__ import annotations

import numpy as np
import pytest
from support import token_device as device

from tokabatch.arrays import Int32
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.policy.forecast_policy import ForecastPolicy
from tokabatch.scheduling.policy.guarded_policy import Case, GuardedPolicy
from tokabatch.scheduling.policy.policy import Candidates
from tokabatch.scheduling.scheduler import SchedulerLimits


class Answers(ForecastPolicy):
    """Always gives the same answer, and records its calls."""

    def __init__(self, *answer: int) -> None:
        self.answer = np.array(answer, np.int32)
        self.asked: Candidates | None = None

    def admit(self, candidates: Candidates) -> Int32:
        self.asked = candidates
        return self.answer[: len(candidates.counts)]


def candidates() -> Candidates:
    """Two samples and one of prompts open before, and one of a prompt never begun."""
    numbers = [np.array(values, np.int32) for values in ([3, 4, 9], [2, 1, 1], [0, 5, 0], [0, 1, 6, 0], [10, 11, 12, 13])]
    return Candidates(2, *numbers)


@pytest.mark.parametrize(
    ("case", "answer", "admitted"),
    [
        (Case(), [2, 1, 1], [2, 1, 1]),
        (Case(), [9, 0, 0], [2, 0, 0]),
        (Case(alone=True), [0, 0, 0], [1, 0, 0]),
        (Case(short=True), [2, 1, 1], [0, 0, 0]),
        (Case(confined_to=frozenset((3, 4))), [2, 1, 1], [2, 1, 0]),
        (Case(alone=True, confined_to=frozenset((3, 4))), [0, 0, 0], [1, 0, 0]),
    ],
)
def test_how_many_come_in(case, answer, admitted):
    policy = GuardedPolicy(Answers(*answer))
    policy.case = case
    assert policy.admit(candidates()).tolist() == admitted


def test_confined_a_policy_does_not_see_prompts_never_begun():
    policy = GuardedPolicy(inner := Answers(1, 1, 1))
    policy.case = Case(alone=True, confined_to=frozenset((3,)))
    policy.admit(candidates())
    assert inner.asked is not None
    assert (inner.asked.request.tolist(), inner.asked.samples.tolist(), inner.asked.lengths.tolist()) == (
        [3, 4],
        [0, 1, 6],
        [10, 11, 12],
    )


def test_confined_with_none_waiting_nothing_is_admitted_though_nothing_runs():
    policy = GuardedPolicy(Answers(1))
    policy.case = Case(alone=True, confined_to=frozenset((3,)))
    empty = np.zeros(0, np.int32)
    one = np.array([1], np.int32)
    assert policy.admit(Candidates(0, one, one, empty, one, one)).tolist() == [0]


class NobodyComesIn(ForecastPolicy):
    def admit(self, candidates: Candidates) -> Int32:
        return np.zeros_like(candidates.counts)


def test_a_policy_that_admits_nothing_gets_every_sample_done_one_by_one():
    prompts = [[i, i + 1, i + 2] for i in range(3)]
    requests = device.make_requests(prompts, [SamplingParams(n=2, max_tokens=4, ignore_eos=True)])
    limits = SchedulerLimits(4, 64, 8, 32, 16, GroupingLimits(2, 1))
    completions, scheduler = device.drive(requests, limits, prompts, policy=NobodyComesIn)
    assert len(completions) == 6 and scheduler.counts.steps == 6 * 4
