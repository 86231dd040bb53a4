"""Rows that stop early: where they stop follows from their samples alone, and pass@k is recovered without bias."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokabatch.scoring.early_stopping import GOES_ON, Outcome, StopRule, Tallies, estimate_stopped, opened
from tokabatch.scoring.pass_at_k import estimate

RULES = st.builds(StopRule, st.integers(1, 3)) | st.builds(StopRule, st.none(), st.integers(1, 4))
OUTCOMES = st.lists(st.builds(Outcome, st.booleans(), st.sampled_from([None, "a", "b"])), min_size=1, max_size=24)


def stop_after(rule: StopRule, outcomes: Sequence[Outcome | None]) -> int | None:
    """How many samples a row takes, by the definition: the shortest prefix that the rule is content with."""
    for number in range(1, len(outcomes) + 1):
        prefix = [outcome for outcome in outcomes[:number] if outcome is not None]
        if len(prefix) < number:
            return None
        votes = Counter(outcome.answer for outcome in prefix if outcome.answer is not None)
        if rule.after_correct is not None and sum(outcome.correct for outcome in prefix) == rule.after_correct:
            return number
        if rule.majority is not None and max(votes.values(), default=0) == rule.majority:
            return number
    return None


@given(RULES, OUTCOMES, st.randoms(use_true_random=False))
def test_the_order_of_verdicts_decides_nothing(rule: StopRule, outcomes: list[Outcome], order: random.Random) -> None:
    """Verdicts come in any order, of whatever is open: every moment that decides gives the same number."""
    expected = stop_after(rule, outcomes)
    known: list[Outcome | None] = [None] * len(outcomes)
    stop: int | None = None
    numbers = list(range(len(outcomes)))
    order.shuffle(numbers)
    tallies = Tallies(rule, 3)
    for number in numbers:
        known[number] = outcomes[number]
        tallies.add(1, number, outcomes[number])
        stop = None if tallies.stop[1] == GOES_ON else tallies.stop[1]
        assert stop == stop_after(rule, known)
        front = known.index(None) if None in known else len(known)
        assert tallies.judged.tolist() == [0, front if stop is None else stop, 0]
    assert stop == expected
    assert tallies.stop[[0, 2]].tolist() == [GOES_ON, GOES_ON], "of another row"


def test_a_cancelled_sample_ends_its_row() -> None:
    tallies = Tallies(StopRule(after_correct=1), 1)
    for number in (2, 0, 1):
        tallies.add(0, number, None if number == 2 else Outcome(False))
    assert (tallies.stop[0], tallies.judged[0]) == (2, 2)


@given(RULES, OUTCOMES, st.integers(1, 64))
def test_waves_open_what_the_rule_needs(rule: StopRule, outcomes: list[Outcome], num_samples: int) -> None:
    """Opened in waves, a row always continues or is done, and is done where it would be with all samples open."""
    outcomes = (outcomes * 64)[:num_samples]
    judged, computed = 0, 0
    while True:
        wave = opened(num_samples, judged)
        assert wave > judged or judged == num_samples
        computed = max(computed, wave)
        found = stop_after(rule, outcomes[:wave])
        if found is not None or wave == num_samples:
            break
        judged = wave
    expected = stop_after(rule, outcomes)
    assert found == expected
    if expected is not None:
        assert computed <= max(4, 2 * expected)


def test_examples() -> None:
    right, wrong = Outcome(True, "7"), Outcome(False, "8")
    assert stop_after(StopRule(after_correct=1), [wrong, right, right]) == 2
    assert stop_after(StopRule(after_correct=2), [wrong, right, None, right]) is None
    assert stop_after(StopRule(after_correct=2), [right, wrong, right]) == 3
    assert stop_after(StopRule(majority=2), [right, wrong, wrong]) == 3
    assert stop_after(StopRule(majority=1), [Outcome(False), wrong]) == 2
    assert [opened(40, judged) for judged in (0, 3, 4, 8, 31, 32, 40)] == [4, 4, 8, 16, 32, 40, 40]


def of_all_draws(p: Fraction, n: int, r: int, k: int) -> tuple[Fraction, Fraction]:
    """The expectation of the estimate, and of Chen's formula on the counts as they are, over every sequence of n draws."""
    total = naive = Fraction(0)
    for draws in product((True, False), repeat=n):
        weight = Fraction(1)
        for draw in draws:
            weight *= p if draw else 1 - p
        outcomes = [Outcome(draw) for draw in draws]
        stop = stop_after(StopRule(after_correct=r), outcomes)
        size = n if stop is None else stop
        c = sum(draws[:size])
        value = estimate_stopped(np.array([size]), np.array([c]), np.array([stop is not None]), k)[0]
        total += weight * Fraction(float(value)).limit_denominator(10**9)
        if size >= k:
            naive += weight * Fraction(float(estimate(np.array([size]), np.array([c]), k)[0])).limit_denominator(10**9)
        else:
            naive += weight
    return total, naive


@pytest.mark.parametrize("p", [Fraction(1, 10), Fraction(1, 2), Fraction(7, 10)])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_no_bias_over_every_sequence_of_draws(p: Fraction, r: int) -> None:
    n = 8
    for k in range(1, n + 1):
        truth = 1 - (1 - p) ** k
        found, naive = of_all_draws(p, n, r, k)
        assert float(found) == pytest.approx(float(truth), abs=1e-8), k
        if k == 1:
            assert float(naive) > float(truth) + 0.003


def test_ten_thousand_rows_recover_every_pass_at_k() -> None:
    """p of each row from a Beta; n = 64, stopped after one right sample and after three."""
    random_numbers = np.random.default_rng(0)
    n, rows = 64, 10_000
    p = random_numbers.beta(0.6, 1.4, rows)
    draws = random_numbers.random((rows, n)) < p[:, None]
    cumulative = draws.cumsum(axis=1)
    for r in (1, 3):
        reached = cumulative[:, -1] >= r
        size = np.where(reached, (cumulative >= r).argmax(axis=1) + 1, n)
        correct = np.where(reached, r, cumulative[:, -1])
        assert size.sum() < 0.55 * rows * n, "over 45 % of the samples are saved"
        for k in (1, 2, 4, 8, 16, 32, 64):
            each = estimate_stopped(size, correct, reached, k)
            truth = 1 - (1 - p) ** k
            spread = (each - truth).std(ddof=1) / rows**0.5
            assert abs(each.mean() - truth.mean()) < 3 * spread + 1e-12, (r, k)
            if k <= 4:
                naive = np.ones(rows)
                enough = size >= k
                naive[enough] = estimate(size[enough], correct[enough], k)
                assert naive.mean() - truth.mean() > 10 * spread, (r, k)
