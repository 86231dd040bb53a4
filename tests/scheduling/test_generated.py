"""Outputs of running samples: what went in comes out, and memory follows what is stored."""

from __future__ import annotations

import numpy as np
import pytest

from tokabatch.scheduling.generated import STAGED_VALUES, Outputs, unscored


def append(outputs: Outputs, slots: np.ndarray, step: int, alternatives: int) -> None:
    """One token a slot, every value a different number."""
    base = slots * 100_000 + step
    top = base[:, None] * 10 + np.arange(max(alternatives, 0))
    outputs.append(
        slots,
        base.astype(np.int32),
        (base / 7).astype(np.float32),
        top.astype(np.int32),
        (top / 3).astype(np.float32),
    )


@pytest.mark.parametrize("reports", [[-1], [0], [-1, 0, 5], [20, 3, 3], [-1, 700]])
def test_what_went_in_comes_out_for_any_company_order_and_restart(reports):
    rng = np.random.default_rng(0)
    outputs, expected = Outputs(7, max(reports)), {slot: [] for slot in range(7)}
    asked = np.resize(np.array(reports, np.int32), 7)
    outputs.open(np.arange(7), asked)
    for step in range(3000):
        slots = np.flatnonzero(rng.random(7) < 0.6)
        append(outputs, slots, step, max(reports))
        for slot in slots.tolist():
            expected[slot].append(slot * 100_000 + step)
        if step % 137 == 0:
            # One is preempted and comes back in another's slot, whose sample has ended.
            slot, other = rng.permutation(7)[:2].tolist()
            kept, numbers = outputs.read(np.array([slot]))[0], expected[slot]
            outputs.close(np.array([slot, other]))
            outputs.open(np.array([slot, other]), asked[[other, slot]])
            outputs.restore(other, kept)
            asked[[slot, other]] = asked[[other, slot]]
            expected[slot], expected[other] = [], numbers
        slot = int(rng.integers(7))
        assert outputs.tokens(np.array([slot]))[0].tolist() == expected[slot]
        if step % 13 == 0:
            some = rng.permutation(7)[:3]
            assert [each.tokens.tolist() for each in outputs.read(some)] == [expected[s] for s in some.tolist()]
        assert outputs.count.tolist() == [len(expected[s]) for s in range(7)]
    for slot in range(7):
        known, got, numbers = int(asked[slot]), outputs.read(np.array([slot]))[0], np.array(expected[slot], np.int64)
        assert got.tokens.tolist() == numbers.tolist()
        assert (got.logprobs is None) == (known < 0) and (got.top_ids is None) == (known <= 0)
        if known >= 0:
            assert np.array_equal(got.logprobs, (numbers / 7).astype(np.float32))
        if known > 0:
            top = numbers[:, None] * 10 + np.arange(known)
            assert np.array_equal(got.top_ids, top) and np.array_equal(got.top_logprobs, (top / 3).astype(np.float32))


def test_memory_follows_what_is_stored_and_no_step_moves_much():
    slots, alternatives = 1024, 20
    outputs, everyone = Outputs(slots, alternatives), np.arange(1024)
    asks, row = np.full(slots, alternatives, np.int32), 4 * (2 + 2 * alternatives)
    empty = outputs.num_bytes
    assert empty == slots * 4 * STAGED_VALUES
    outputs.open(everyone, asks)
    one = np.array([5])
    for step in range(3000):
        append(outputs, one, step, alternatives)
    assert outputs.num_bytes - empty <= 1.5 * 3000 * row
    outputs.close(one)
    assert outputs.num_bytes == empty
    moved, store = [], outputs._store
    outputs._store = lambda full: moved.append(len(full)) or store(full)
    outputs.open(everyone, asks)
    worst = 0
    for step in range(200):
        moved.clear()
        append(outputs, everyone, step, alternatives)
        worst = max([worst, *moved])
    # A ring holds 16 of these rows.
    assert worst == slots // 16
    assert outputs.num_bytes - empty <= 1.5 * slots * 200 * row


def test_a_sample_that_reports_much_makes_the_others_no_larger():
    outputs = Outputs(64, 5000)
    outputs.open(np.arange(64), np.append(np.full(63, -1), 5000).astype(np.int32))
    empty = outputs.num_bytes
    for step in range(2000):
        append(outputs, np.arange(63), step, 0)
    assert outputs.num_bytes - empty <= 1.5 * 63 * 4 * 2000


def test_a_sample_put_back_without_a_token_leaves_nothing_to_the_next_in_its_slot():
    outputs, slot = Outputs(1, 2), np.array([0])
    for alternatives in (-1, 2):
        outputs.open(slot, np.array([alternatives], np.int32))
        outputs.restore(0, unscored(np.zeros(0, np.int32), alternatives))
        outputs.close(slot)
    outputs.open(slot, np.array([-1], np.int32))
    for step in range(2 * STAGED_VALUES):
        append(outputs, slot, step, 0)
    assert outputs.tokens(slot)[0].tolist() == list(range(2 * STAGED_VALUES))
