"""pass@k against the definition: exact binomials, and every choice of k samples counted."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokabatch.scoring.pass_at_k import estimate, ks_of


def exact(n: int, c: int, k: int) -> Fraction:
    return 1 - Fraction(comb(n - c, k), comb(n, k))


@given(st.integers(1, 60), st.data())
def test_equals_the_binomials(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.lists(st.integers(0, n), min_size=1, max_size=8))
    k = data.draw(st.integers(1, n))
    values = estimate(np.full(len(correct), n), np.array(correct), k)
    np.testing.assert_allclose(values, [float(exact(n, c, k)) for c in correct], rtol=1e-12, atol=1e-12)


@given(st.lists(st.tuples(st.integers(3, 40), st.integers(0, 3)), min_size=1), st.integers(1, 3))
def test_problems_may_have_different_numbers_of_samples(counts: list[tuple[int, int]], k: int) -> None:
    n, c = np.array(counts).T
    expected = [float(exact(samples, correct, k)) for samples, correct in counts]
    np.testing.assert_allclose(estimate(n, c, k), expected, atol=1e-12)


@pytest.mark.parametrize("n", [10_000, 1_000_000])
def test_is_stable_for_many_samples(n: int) -> None:
    for c, k in [(0, 1), (0, n), (1, 1), (1, n // 2), (1, n - 1), (1, n), (3, n - 3), (5, 100)]:
        # C(n - c, k) / C(n, k) as a product over the samples that are right.
        wrong = prod((Fraction(max(n - k - i, 0), n - i) for i in range(c)), start=Fraction(1))
        assert estimate(np.array([n]), np.array([c]), k)[0] == pytest.approx(float(1 - wrong), abs=1e-10)
    assert estimate(np.array([n]), np.array([n]), n)[0] == 1.0


def test_is_the_share_of_the_choices_that_hold_a_right_one() -> None:
    samples = [True, False, False, True, False, False]
    for k in range(1, 7):
        choices = [any(choice) for choice in combinations(samples, k)]
        assert estimate(np.array([6]), np.array([2]), k)[0] == pytest.approx(sum(choices) / len(choices))


def curve(n: np.ndarray, c: np.ndarray) -> list[float]:
    return [float(estimate(n, c, k).mean()) for k in ks_of(n)]


def test_the_curve_has_powers_of_two_and_n() -> None:
    assert ks_of(np.array([100, 100])) == (1, 2, 4, 8, 16, 32, 64, 100)
    assert curve(np.array([100, 100]), np.array([0, 100])) == [0.5] * 8
    assert ks_of(np.array([1])) == (1,)
    assert ks_of(np.array([8, 9])) == (1, 2, 4, 8)


def test_the_curve_climbs() -> None:
    random = np.random.default_rng(0)
    values = curve(np.full(50, 30), random.integers(0, 6, 50))
    assert values == sorted(values) and 0 < values[0] < values[-1] < 1


def test_nothing_gives_an_empty_curve() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert ks_of(none) == () and ks_of(np.array([0, 3])) == ()
