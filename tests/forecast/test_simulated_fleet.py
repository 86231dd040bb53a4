"""A simulated fleet: every sample once, spread so that the replicas end together; ranks of a replica share its steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from forecast.test_roofline import LLAMA_1B
from support import token_device as device

from tokabatch.forecast.assumed_lengths import Unstopped, lognormal
from tokabatch.forecast.profile import unmeasured_gpu
from tokabatch.forecast.ranks import SUM_SECONDS, seconds_of_ranks
from tokabatch.forecast.roofline import H200, Roofline
from tokabatch.forecast.simulate import FleetRules, simulate
from tokabatch.forecast.step_work import StepWork
from tokabatch.runner.ledger import Ledger, to_give, wants_more
from tokabatch.scheduling.contracts import Drawn, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits

LIMITS = SchedulerLimits(4, 4000, 100, 400, 40, GroupingLimits(2, 1))


def requests_of(rows: int, n: int):
    rng = np.random.default_rng(0)
    header = rng.integers(0, device.VOCAB, 21).tolist()
    prompts = [header + rng.integers(0, device.VOCAB, rng.integers(1, 9)).tolist() for _ in range(rows)]
    return device.make_requests(prompts, [SamplingParams(n=n, max_tokens=100)])


def of(members: int) -> FleetRules:
    return FleetRules(members, Ledger, wants_more, to_give)


def seconds(work: StepWork) -> float:
    return 0.01 + 0.001 * float(work.tokens)


@pytest.mark.parametrize(("rows", "n"), [(600, 4), (3, 800)])
@pytest.mark.parametrize("members", [2, 3])
def test_replicas_share_the_work_and_end_together(members, rows, n):
    requests, lengths = requests_of(rows, n), lognormal(25, 0.7)
    alone = simulate(requests, LIMITS, seconds, lengths)
    done = simulate(requests, LIMITS, seconds, lengths, fleet=of(members))
    assert done.counts.finished == rows * n
    assert done.counts.output_tokens == alone.counts.output_tokens
    assert done.steps["finished"].sum() == rows * n
    assert done.seconds < 1.15 * alone.seconds / members
    assert min(done.busy) > 0.85 * done.seconds and len(done.busy) == members
    assert done.counts.prefilled_tokens < alone.counts.prefilled_tokens + members * 21 * 8 + 0.1 * alone.counts.prefilled_tokens


def test_only_what_is_left_is_drawn():
    requests = requests_of(20, 5)
    flags = np.arange(100) % 3 == 0
    left = replace(requests, drawn=Drawn(np.arange(0, 101, 5), flags)).without(Drawn(np.arange(0, 101, 5), flags))
    done = simulate(left, LIMITS, seconds, lognormal(25, 0.7), fleet=of(2))
    assert done.counts.finished == int((~flags).sum())


def test_a_replica_that_begins_late_ends_with_the_other():
    """Samples of one length run in waves; those of the late replica are nearly done when the other begins its last wave."""
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    requests = device.make_requests([[row % 50, row // 50] for row in range(400)], [params])
    done = simulate(requests, LIMITS, seconds, Unstopped(), fleet=replace(of(2), starts=(0.0, 3.0)))
    assert done.counts.finished == 400 and done.counts.output_tokens == 400 * 50
    assert min(done.busy) > 0.97 * done.seconds
    finished = np.bincount(done.steps["replica"].astype(int), done.steps["finished"])
    assert finished[0] > finished[1] + 40


def test_more_replicas_than_samples():
    done = simulate(requests_of(1, 2), LIMITS, seconds, lognormal(25, 0.7), fleet=of(4))
    assert done.counts.finished == 2 and sum(busy > 0 for busy in done.busy) <= 2


def test_stages_compute_a_part_of_the_samples_each():
    """Of 100 samples 34 are in a step of two stages: three cohorts, so that each has its tokens when its turn comes."""
    requests = requests_of(600, 4)
    done = simulate(requests, replace(LIMITS, stages=2), seconds, lognormal(25, 0.7))
    assert done.counts.finished == 2400
    assert done.steps["decoded"].max() <= 34 < done.steps["running"].max()


def decode(samples: int) -> StepWork:
    count = float(samples)
    return StepWork(tokens=count, sampled=count, sequences=count, decoded=count, decode_kv=count * 500)


def test_tensor_parallel_halves_large_steps_and_adds_the_sums():
    cost = Roofline(LLAMA_1B, H200)
    one, two = (float(seconds_of_ranks(cost, tensor, 1)(decode(8192))) for tensor in (1, 2))
    assert one == cost.seconds(decode(8192))
    assert 0.5 * one < two < 0.75 * one
    small = [float(seconds_of_ranks(cost, tensor, 1)(decode(1))) for tensor in (1, 2)]
    assert small[1] > small[0] / 2 + 2 * LLAMA_1B.num_layers * SUM_SECONDS


def test_a_stage_has_its_layers_but_every_step_is_launched():
    cost = unmeasured_gpu(Roofline(LLAMA_1B, H200))
    step = cost.coefficients[0]
    one, two = (float(seconds_of_ranks(cost, 1, pipeline)(decode(8192))) for pipeline in (1, 2))
    assert step + (one - step) / 2 < two < step + 0.6 * (one - step)
