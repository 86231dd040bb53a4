"""Token budget and running samples follow the cost model: more where a step costs much however small it is, fewer where not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from forecast.test_roofline import LLAMA_1B

from tokabatch.forecast.devices import KNOWN
from tokabatch.forecast.profile import Profile
from tokabatch.forecast.roofline import Roofline
from tokabatch.forecast.token_budget import FEWEST, MOST, STEP_SECONDS, prefill_tokens, running_samples

ROOFLINE = Roofline(LLAMA_1B, KNOWN["h200"].rates)


def launching(seconds: float) -> Profile:
    """The roofline and so many seconds for each step."""
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


def test_the_smaller_a_model_the_more_of_its_samples_run():
    small = replace(
        LLAMA_1B, vocab_size=49_152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, intermediate_size=1536
    )
    found = {spec.hidden_size: running_samples(Roofline(spec, KNOWN["h200"].rates).seconds) for spec in (small, LLAMA_1B)}
    assert found == {576: 32_768, 2048: 8192}


@pytest.mark.parametrize("each", [1e-4, 1e-6, 0.0])
def test_what_a_step_costs_beside_is_a_twentieth_of_its_samples(each):
    samples = running_samples(lambda work: each * work.tokens)
    assert samples == (MOST if not each else 2 ** int(math.log2(max(FEWEST, min(MOST, STEP_SECONDS / (0.05 * each) + 20)))))
