"""A simulated run does what a run would: the same steps as a device that draws the same lengths, and books that close."""

from __future__ import annotations

import numpy as np
import pytest
from forecast.test_roofline import LLAMA_1B
from support import token_device as device

from tokabatch.forecast.assumed_lengths import DrawnLengths, Unstopped, lognormal, observed
from tokabatch.forecast.roofline import H200, Roofline
from tokabatch.forecast.simulate import simulate
from tokabatch.scheduling.contracts import SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import SchedulerLimits

COST = Roofline(LLAMA_1B, H200).seconds


class Scripted:
    """The lengths that the token device's script comes to."""

    def __init__(self, prompts: list[list[int]], params: SamplingParams) -> None:
        self._prompts, self._params = prompts, params

    def __call__(self, row, sample):
        outputs = [
            device.expected_output(int(r), int(s), len(self._prompts[int(r)]), self._params)
            for r, s in zip(row, sample, strict=True)
        ]
        return np.array([len(o) if o[-1] == device.EOS else 10**6 for o in outputs], np.int32)


def test_the_steps_are_those_of_a_run_with_the_same_lengths():
    rng = np.random.default_rng(0)
    header = rng.integers(0, device.VOCAB, 21).tolist()
    prompts = [header + rng.integers(0, device.VOCAB, rng.integers(1, 9)).tolist() for _ in range(30)]
    params = SamplingParams(n=4, max_tokens=40)
    limits = SchedulerLimits(4, 40, 20, 60, 18, GroupingLimits(2, 1))
    requests = device.make_requests(prompts, [params])
    _, scheduler = device.drive(requests, limits, prompts)
    done = simulate(requests, limits, COST, Scripted(prompts, params))
    assert done.counts == scheduler.counts
    assert done.counts.preemptions > 0, "the cache is meant to be short"
    assert len(done.steps) == done.counts.steps
    assert done.steps["sampled"].sum() == done.counts.output_tokens
    assert done.steps["finished"].sum() == 120
    assert (done.steps["pages"] <= 40).all()


def test_stop_strings_and_logprobs_of_the_job_do_not_matter():
    requests = device.make_requests([[1, 2], [3]], [SamplingParams(n=2, max_tokens=9, stop=("x",), logprobs=2)])
    limits = SchedulerLimits(4, 60, 4, 60, 8, None)
    assert simulate(requests, limits, COST, DrawnLengths(np.array([5.0]))).counts.output_tokens == 4 * 5
    assert simulate(requests, limits, COST, Unstopped()).counts.output_tokens == 4 * 9


def test_lengths_are_keyed_and_have_their_distribution():
    rows, samples = np.repeat(np.arange(5000), 4), np.tile(np.arange(4, dtype=np.int32), 5000)
    lengths = lognormal(300, 0.8)(rows, samples)
    assert lengths.mean() == pytest.approx(300, rel=0.02)
    assert np.log(lengths).std() == pytest.approx(0.8, rel=0.03)
    some = np.array([17, 3, 17])
    assert lognormal(300, 0.8)(some, np.array([2, 0, 2], np.int32)).tolist() == lengths[some * 4 + [2, 0, 2]].tolist()
    assert np.corrcoef(lengths[0::4], lengths[1::4])[0, 1] < 0.05
    again = observed(lengths)(rows, samples)
    assert np.quantile(again, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(lengths, [0.1, 0.5, 0.9]), rel=0.02)


def test_the_whole_future_is_learned_from_a_cache_that_holds_a_tenth_of_it():
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 30_000, 40).tolist() for _ in range(1500)]
    requests = device.make_requests(prompts, [SamplingParams(max_tokens=400)])
    limits = SchedulerLimits(16, 1200, 1500, 3000, 28, None)
    done = simulate(requests, limits, COST, lognormal(80, 0.7))
    assert done.counts.finished == 1500
    assert done.kv_use > 0.8
    assert done.waste < 0.02
