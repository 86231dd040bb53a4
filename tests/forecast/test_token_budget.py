"""Token budget and running samples follow the cost model: more where a step costs much however small it is, fewer where not,
and fewer where the tail would be long."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from forecast.test_roofline import LLAMA_1B

from tokabatch.forecast.assumed_lengths import DrawnLengths
from tokabatch.forecast.devices import KNOWN
from tokabatch.forecast.profile import Profile, unmeasured_gpu
from tokabatch.forecast.roofline import H200, Roofline
from tokabatch.forecast.simulate import simulate
from tokabatch.forecast.token_budget import (
    FEWEST,
    MEAN_SHARE,
    MOST,
    Survival,
    assumed_survival,
    expected_seconds,
    prefill_tokens,
    running_samples,
)
from tokabatch.scheduling.contracts import Requests, SamplingParams
from tokabatch.scheduling.scheduler import SchedulerLimits

ROOFLINE = Roofline(LLAMA_1B, KNOWN["h200"].rates)
SMALL = replace(
    LLAMA_1B, vocab_size=49_152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, intermediate_size=1536
)


def launching(seconds: float) -> Profile:
    """The roofline plus a fixed number of seconds for each step."""
    return Profile(ROOFLINE, (seconds, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0))


def test_weights_read_once_want_thousands_of_tokens():
    wanted = {"h200": 8192, "h100": 8192, "a100": 4096, "l40s": 16_384}
    assert {key: prefill_tokens(Roofline(LLAMA_1B, KNOWN[key].rates).seconds) for key in wanted} == wanted


def test_the_fixed_cost_decides():
    found = [prefill_tokens(launching(seconds).seconds) for seconds in (0.0, 0.0005, 0.001, 0.002, 1.0)]
    assert found == [8192, 16_384, 16_384, 32_768, MOST]


@pytest.mark.parametrize("fixed", [0.0, 0.02, 1.0])
def test_the_fixed_cost_is_a_fiftieth_of_the_tokens(fixed):
    """Tokens of 1 ms each: 0.02 s is what a thousand of them may carry."""
    tokens = prefill_tokens(lambda work: fixed + 0.001 * work.tokens)
    assert tokens == {0.0: FEWEST, 0.02: 1024, 1.0: MOST}[fixed]


def test_tokens_that_cost_nothing_set_no_bound():
    assert prefill_tokens(lambda work: 0.01) == MOST


def survival_of(count: int, max_tokens: int, given: bool = False) -> Survival:
    return assumed_survival([max_tokens], [given], np.array([float(count)]))


def test_the_smaller_a_model_the_more_of_its_samples_run():
    many = survival_of(1_000_000, 320)
    found = [running_samples(unmeasured_gpu(Roofline(spec, H200)).seconds, 1_000_000, many) for spec in (SMALL, LLAMA_1B)]
    assert found == [24_576, 12_288]


def test_without_a_cost_of_steps_few_run_at_once():
    assert running_samples(lambda work: 1e-6 * work.tokens, 1_000_000, survival_of(1_000_000, 320)) == FEWEST


def test_samples_that_cost_nothing_all_run_at_once():
    assert running_samples(lambda work: 1e-3 + 0 * work.tokens, 20_000, survival_of(20_000, 320)) >= 16_384


@pytest.mark.parametrize(("count", "found"), [(84_416, 24_576), (21_104, 24_576), (10_000, 12_288), (1000, 768)])
def test_no_more_samples_run_than_gain_time(count, found):
    """84,416 samples of at most 320 tokens are GSM8K with 64 of each question."""
    cost, spread = unmeasured_gpu(Roofline(SMALL, H200)).seconds, survival_of(count, 320)
    assert running_samples(cost, count, spread) == found
    best = min(expected_seconds(cost, count, number, spread) for number in (8192, 16_384, 24_576))
    assert expected_seconds(cost, count, found, spread) <= 1.015 * best


def test_samples_of_a_given_length_run_in_full_waves():
    """9,824 samples of 200 tokens, 8,192 at once: most steps of the second wave would hold 1,632."""
    cost, spread = unmeasured_gpu(Roofline(SMALL, H200)).seconds, survival_of(9824, 200, given=True)
    waves = {number: expected_seconds(cost, 9824, number, spread) for number in (8192, 12_288)}
    assert waves[12_288] < 0.95 * waves[8192]
    assert running_samples(cost, 9824, spread) >= 12_288


def test_lengths_spread_as_the_kinds_of_samples_do():
    found = assumed_survival([100, 10, 7], [True, True, True], np.array([1.0, 3.0, 0.0]))
    assert len(found.alive) * found.width == 100 and found.alive[0] == 1
    assert found.alive[int(9 / found.width)] == 1 and found.alive[int(12 / found.width)] == 0.25


def test_the_fluid_model_has_the_steps_of_a_simulated_run():
    """Against the scheduler itself, on lengths of the distribution that is assumed."""
    limit, count, running = 64, 6000, 1000
    spread = survival_of(count, limit)
    limits = SchedulerLimits(16, 30_000, running, 8 * running, 6, None)
    requests = Requests(
        row_index=np.arange(count, dtype=np.int64),
        tokens=np.full(8 * count, 2, np.int32),
        start=np.arange(count, dtype=np.int64) * 8,
        length=np.full(count, 8, np.int32),
        lcp=np.zeros(count, np.int32),
        params=np.zeros(count, np.int32),
        sampling=(SamplingParams(max_tokens=limit),),
    )
    lengths = DrawnLengths(-MEAN_SHARE * limit * np.log(1 - np.linspace(0, 1 - 1e-9, 10_001)))
    done = simulate(requests, limits, lambda work: 1.0, lengths)
    seconds = expected_seconds(lambda work: 1.0, count, running, spread)
    assert seconds == pytest.approx(done.seconds, rel=0.1)
