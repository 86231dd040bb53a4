"""The page-use curve against counting every sequence at every step, and the length model on lengths of a known kind."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.scheduling.forecast import Forecast
from tokabatch.scheduling.lengths import LengthModel


@st.composite
def running(draw):
    size = draw(st.sampled_from([1, 2, 4, 16]))
    count = draw(st.integers(0, 12))
    computed = np.array([draw(st.integers(0, 60)) for _ in range(count)], np.int32)
    shared = np.array([draw(st.integers(0, int(c) // size)) for c in computed], np.int32)
    remaining = np.array([draw(st.integers(1, 30)) for _ in range(count)], np.int32)
    return size, computed, shared, remaining


def pages_at(step: int, size: int, computed, shared, remaining) -> int:
    alive = remaining > step
    return int((-(-(computed + step + 1) // size) - shared)[alive].sum())


@settings(max_examples=200, deadline=None)
@given(running(), running())
def test_the_curve_and_admission_equal_counting(now, candidates):
    size, computed, shared, remaining = now
    _, new_computed, new_shared, new_remaining = candidates
    new_shared = np.minimum(new_shared, new_computed // size)
    held, steps = np.array([3, 2], np.int32), np.array([4, 50], np.int32)
    horizon = max([1, *remaining.tolist(), *new_remaining.tolist()])
    forecast = Forecast(size, computed, shared, remaining, held, steps, horizon)

    def used(step: int, admitted: int) -> int:
        total = pages_at(step, size, computed, shared, remaining) + int(held[steps > step].sum())
        return total + pages_at(step, size, new_computed[:admitted], new_shared[:admitted], new_remaining[:admitted])

    assert forecast.curve.tolist() == [used(step, 0) for step in range(forecast.num_bins)]
    count = len(new_computed)
    capacity = int(forecast.curve.max()) + 40
    got = forecast.admit(capacity, new_computed, new_shared, new_remaining, np.zeros(count, np.int32), np.ones(count, np.int32))
    fits = [n for n in range(count + 1) if all(used(step, n) <= capacity for step in range(horizon))]
    expected = 0
    while expected + 1 in fits:
        expected += 1
    assert got.tolist() == [1] * expected + [0] * (count - expected)


def test_many_alike_are_admitted_as_far_as_they_fit():
    none = np.zeros(0, np.int32)
    forecast = Forecast(4, none, none, none, none, none, 8)
    one = np.array([0], np.int32)
    got = forecast.admit(21, one, one, np.array([8], np.int32), np.array([1], np.int32), np.array([50], np.int32))
    assert got.tolist() == [10]


def test_long_horizons_never_promise_more_than_there_is():
    rng = np.random.default_rng(0)
    computed = rng.integers(0, 500, 40).astype(np.int32)
    remaining = rng.integers(1, 30_000, 40).astype(np.int32)
    zero = np.zeros(40, np.int32)
    none = np.zeros(0, np.int32)
    forecast = Forecast(16, computed, zero, remaining, none, none, 1)
    exact = max(pages_at(int(step) - 1, 16, computed, zero, remaining) for step in np.sort(remaining))
    assert exact <= int(forecast.curve.max()) <= exact * 1.05


def test_lengths_are_learned_from_finished_and_running_samples():
    rng = np.random.default_rng(0)
    model = LengthModel(4000)
    before = int(model.remaining(np.zeros(1, np.int32), np.array([4000], np.int32))[0])
    lengths = np.minimum(rng.geometric(1 / 200, 3000), 4000).astype(np.int32)
    # Half of them are still running at a random point: to call those finished would halve the estimate.
    cut = rng.integers(1, 400, 3000).astype(np.int32)
    done = lengths <= cut
    model.observe(lengths[done], np.ones(int(done.sum()), np.bool_))
    model.refresh(cut[~done])
    after = model.remaining(np.array([0, 100], np.int32), np.array([4000, 4000], np.int32))
    assert before > 1000
    assert np.all(np.abs(after - 200) < 60), "a memoryless length has the same remainder at every age"


def test_expected_remainder_respects_the_limit():
    model = LengthModel(100)
    generated = np.array([0, 50, 99], np.int32)
    assert np.all(model.remaining(generated, np.array([10, 51, 100], np.int32)) <= [10, 1, 1])
