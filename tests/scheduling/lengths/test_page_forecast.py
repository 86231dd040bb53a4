"""Page use ahead against a count step by step, and admission against trying every number of candidates."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tokabatch.arrays import Int32
from tokabatch.scheduling.lengths.page_forecast import Claims, Forecast


def pages_at(step: int, size: int, claims: Claims, first: int) -> int:
    """Pages that the first claims hold at a step, by the definition."""
    total = 0
    for computed, shared, remaining, prompt in list(
        zip(claims.computed, claims.shared, claims.remaining, claims.prompt_pages, strict=True)
    )[:first]:
        if step < remaining:
            total += -(-(int(computed) + step + 1) // size) - int(shared) + int(prompt)
    return total


def claims_of(rng: np.random.Generator, count: int, size: int, longest: int) -> Claims:
    computed = rng.integers(0, 60, count).astype(np.int32)
    return Claims(
        computed=computed,
        shared=(rng.random(count) * (computed // size + 1)).astype(np.int32),
        remaining=rng.integers(1, longest + 1, count).astype(np.int32),
        prompt_pages=rng.integers(0, 4, count).astype(np.int32),
    )


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 3, 8, 16]),
    st.integers(0, 12),
    st.integers(0, 9),
    st.integers(0, 4),
    st.sampled_from([3, 30, 90]),
)
def test_curve_and_admission_are_exact(seed, size, num_running, num_new, num_held, longest):
    rng = np.random.default_rng(seed)
    running, new = claims_of(rng, num_running, size, longest), claims_of(rng, num_new, size, longest)
    running = Claims(running.computed, running.shared, running.remaining, np.zeros_like(running.computed))
    held = rng.integers(0, 6, num_held).astype(np.int32)
    held_steps = rng.integers(0, longest + 20, num_held).astype(np.int32)
    forecast = Forecast(size, running, held, held_steps, new.remaining)
    horizon = max([1, *running.remaining.tolist(), *new.remaining.tolist()])

    def used(step: int, admitted: int) -> int:
        total = pages_at(step, size, running, num_running) + pages_at(step, size, new, admitted)
        return total + sum(int(p) for p, steps in zip(held, held_steps, strict=True) if step < max(1, steps))

    for step, value in zip(forecast.steps.tolist(), forecast.curve.tolist(), strict=True):
        assert value == used(step, 0)
    # The steps at hand hold the peak, however many of the candidates come in.
    for admitted in range(num_new + 1):
        peak = max(used(step, admitted) for step in range(horizon))
        assert peak == max(used(step, admitted) for step in forecast.steps.tolist())
    capacity = int(forecast.curve.max()) + int(rng.integers(0, 30))
    fitting = [n for n in range(num_new + 1) if all(used(step, n) <= capacity for step in range(horizon))]
    assert forecast.admit(capacity, new) == max(fitting)


def test_the_far_future_is_exact_too():
    rng = np.random.default_rng(0)
    count = 300
    running = Claims(
        computed=rng.integers(0, 5000, count).astype(np.int32),
        shared=np.zeros(count, np.int32),
        remaining=rng.integers(1, 32_000, count).astype(np.int32),
        prompt_pages=np.zeros(count, np.int32),
    )
    none = np.zeros(0, np.int32)
    forecast = Forecast(16, running, none, none, none)
    assert len(forecast.steps) == len(np.unique(running.remaining))
    for place in rng.integers(0, len(forecast.steps), 20):
        assert forecast.curve[place] == pages_at(int(forecast.steps[place]), 16, running, count)


def alike(count: int, remaining: int) -> Claims:
    one = np.ones(count, np.int32)
    return Claims(one * 0, one * 0, one * remaining, one * 0)


def test_a_margin_leaves_room_for_what_chance_may_bring():
    rng = np.random.default_rng(0)
    none = np.zeros(0, np.int32)
    remaining = rng.integers(1, 400, 500).astype(np.int32)
    computed = rng.integers(0, 300, 500).astype(np.int32)
    running = Claims(computed, np.zeros(500, np.int32), remaining, np.zeros(500, np.int32))
    candidates = alike(500, 400)
    forecast = Forecast(16, running, none, none, candidates.remaining)
    capacity = int(forecast.curve.max()) + 4000
    admitted = [forecast.admit(capacity, candidates, deviations) for deviations in (0.0, 2.0, 6.0)]
    assert admitted[0] > admitted[1] > admitted[2] > 0
    # The present is certain: no margin at the first step, when nothing has ended yet.
    assert forecast.spread[0] < forecast.spread.max()


def test_alike_candidates_come_in_as_far_as_they_fit():
    none: Int32 = np.zeros(0, np.int32)
    nothing = Claims(none, none, none, none)
    candidates = alike(50, 8)
    assert Forecast(4, nothing, none, none, candidates.remaining).admit(21, candidates) == 10
