"""Every sample of a plan is with one holder at any time, and runs are long stretches cut where prompts share least."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import token_device

from tokabatch.runner.ledger import Ledger, Part, to_give
from tokabatch.runner.member_process import packed, unpacked
from tokabatch.scheduling.contracts import Completion, Drawn, Requests, SamplingParams


def completion(row: int, sample: int) -> Completion:
    return Completion(row, sample, np.zeros(1, np.int32), "length", None, 1, 0)


def keys(requests: Requests) -> list[tuple[int, int]]:
    return [(int(row), sample) for place, row in enumerate(requests.row_index) for sample in requests.samples(place).tolist()]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_happens_each_sample_is_finished_once(data):
    count = data.draw(st.integers(1, 12))
    prompts = [data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)) for _ in range(count)]
    params = [
        SamplingParams(n=n, max_tokens=m)
        for n, m in data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 90)), min_size=1, max_size=3))
    ]
    requests = token_device.make_requests(prompts, params)
    wanted = sorted(keys(requests))
    flags = np.array(data.draw(st.lists(st.booleans(), min_size=len(wanted), max_size=len(wanted))), np.bool_)
    rows = np.array([row for row, _ in wanted])
    drawn = Drawn(np.searchsorted(rows, np.arange(count + 1)), flags)
    done = {key for key, flag in zip(wanted, flags.tolist(), strict=True) if flag}
    ledger = Ledger(requests.without(drawn))
    assert ledger.left == len(wanted) - len(done)
    members = data.draw(st.integers(1, 4))
    held: list[list[tuple[int, int]]] = [[] for _ in range(members)]
    for turn in range(400):
        if not ledger.left:
            break
        member = data.draw(st.integers(0, members - 1)) if turn < 40 else turn % members
        kind = (
            data.draw(st.sampled_from(["run", "finish", "give", "lose"]))
            if turn < 40
            else ("run", "finish")[turn // members % 2]
        )
        if kind == "run":
            run = ledger.next_run(member, members, whole=members == 1)
            if run is not None:
                run = unpacked(packed(run))
                added = keys(ledger.plan.part(run.prompts, run.first, run.stop))
                assert len(added) == len(run) > 0
                held[member] += added
        elif kind == "finish" and held[member]:
            ended = held[member][: data.draw(st.integers(1, 5)) if turn < 40 else None]
            ledger.finish(member, [completion(*key) for key in ended])
            assert not done & set(ended)
            done |= set(ended)
            held[member] = held[member][len(ended) :]
        elif kind == "give" and held[member]:
            row, sample = held[member].pop()
            (prompt,) = ledger.prompts([row])
            one = np.array([sample], np.int32)
            assert ledger.give_back(member, Part(np.array([prompt], np.int32), one, one + 1)) == 1
        elif kind == "lose":
            assert ledger.give_back(member) == len(held[member])
            held[member] = []
        assert sum(map(len, held)) <= ledger.left and [ledger.held(number) for number in range(members)] == list(map(len, held))
    assert done == set(wanted) and ledger.finished_prompts == len(ledger.plan)


def test_runs_are_cut_where_prompts_share_least_and_become_small():
    prompts = [[family, 1, 2, 3, 4, row] for family in range(16) for row in range(8)]
    ledger = Ledger(token_device.make_requests(prompts, [SamplingParams(max_tokens=20)]))
    sizes: list[int] = []
    for turn in range(1000):
        run = ledger.next_run(turn % 2, 2)
        if run is None:
            break
        assert (run.prompts[0] % 8 == 0 and len(run) % 8 == 0) or len(run) < 8, "a family was cut"
        sizes.append(len(run))
        ledger.finish(turn % 2, [completion(*key) for key in keys(ledger.plan.part(run.prompts, run.first, run.stop))])
    assert sum(sizes) == len(prompts) and sizes[0] >= 24 and sizes[-1] <= 4


def test_few_prompts_with_many_samples_are_cut_between_samples():
    ledger = Ledger(token_device.make_requests([[1, 2, 3]], [SamplingParams(n=1000, max_tokens=50)]))
    first, second = ledger.next_run(0, 2), ledger.next_run(1, 2)
    assert first is not None and second is not None
    assert (first.first.tolist(), first.stop.tolist()) == ([0], [250]) and second.first.tolist() == [250]


def test_a_prompt_that_costs_more_than_its_samples_is_not_cut():
    ledger = Ledger(token_device.make_requests([[1] * 900, [2] * 900], [SamplingParams(n=8, max_tokens=10)]))
    run = ledger.next_run(0, 2)
    assert run is not None and run.stop.tolist() == [8]


def test_a_member_has_not_more_than_its_share_while_others_load():
    ledger = Ledger(token_device.make_requests([[row] for row in range(40)], [SamplingParams(max_tokens=5)]))
    while ledger.next_run(0, 2) is not None:
        pass
    assert 18 <= ledger.held(0) <= 20


def test_a_large_plan_crosses_the_pipe_in_few_bytes():
    prompts = np.arange(100_000, dtype=np.int32)
    part = Part(prompts, np.zeros_like(prompts), np.full_like(prompts, 4))
    assert len(pickle.dumps(packed(part))) < 10_000
    assert np.array_equal(unpacked(packed(part)).prompts, prompts)


def test_samples_that_may_not_begin_yet_and_such_as_are_cancelled():
    requests = token_device.make_requests([[1, 2], [1, 3]], [SamplingParams(n=8, max_tokens=4)])
    ledger = Ledger(requests, np.array([4, 4]))
    run = ledger.next_run(0, 1, whole=True)
    assert run is not None and keys(ledger.plan.part(run.prompts, run.first, run.stop)) == [
        (r, s) for r in (0, 1) for s in range(4)
    ]
    assert (ledger.left, ledger.has_free) == (16, False)
    ledger.begin(1, 6)
    ledger.finish(0, [completion(0, 0), completion(0, 2)])
    # Of row 0 the samples from 1 on, of which number 2 is finished, and 1 and 3 are with the member.
    assert ledger.cancel(0, 1) == [0] and ledger.cancel(0, 1) == []
    assert ledger.left == 8 and ledger.finished_prompts == 1
    ledger.finish(0, [completion(0, 3), completion(1, 0)])
    given = Part(np.array([0, 1], np.int32), np.array([1, 1], np.int32), np.array([2, 4], np.int32))
    assert ledger.give_back(0, given) == 3, "but for what was cancelled on its way"
    run = ledger.next_run(0, 1, whole=True)
    assert run is not None and keys(ledger.plan.part(run.prompts, run.first, run.stop)) == [(1, s) for s in range(1, 6)]
    assert ledger.left == 7


def test_what_may_begin_is_looked_for_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 20_000
    requests = token_device.make_requests([[row % 7] for row in range(rows)], [SamplingParams(n=8, max_tokens=4)])
    ledger, scanned = Ledger(requests, np.full(rows, 2)), list[int]()
    assert len(ledger.next_run(0, 1, whole=True) or ()) == 2 * rows
    free_parts = Ledger._free_parts  # pyright: ignore[reportPrivateUsage]

    def noted(self: Ledger, begin: int = 0, stop: int | None = None) -> Part:
        scanned.append((8 * rows if stop is None else stop) - begin)
        return free_parts(self, begin, stop)

    monkeypatch.setattr(Ledger, "_free_parts", noted)
    last, *others = (int(ledger.plan.row_index[place]) for place in (rows - 9, rows - 10, 40, 41))
    for row in others:
        ledger.begin(row, 4)
    run = ledger.next_run(0, 1, whole=True)
    assert run is not None
    assert sorted(keys(ledger.plan.part(run.prompts, run.first, run.stop))) == [
        (row, sample) for row in sorted(others) for sample in (2, 3)
    ]
    ledger.begin(last, 4)
    scanned.clear()
    assert len(ledger.next_run(0, 1, whole=True) or ()) == 2 and sum(scanned) < 200


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stretches_hold_each_sample_once_and_none_is_empty(data):
    """However many of them one prompt's samples are cut into."""
    count, n = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 20))
    prompts = [data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)) for _ in range(count)]
    requests = token_device.make_requests(prompts, [SamplingParams(n=n, max_tokens=40)])
    ledger = Ledger(requests)
    found: list[tuple[int, int]] = []
    for part in ledger.stretches(data.draw(st.integers(1, 300))):
        row, sample = ledger.samples(part)
        assert len(row)
        found += zip(row.tolist(), sample.tolist(), strict=True)
    assert sorted(found) == sorted(keys(requests))


def of_equal(rows: int) -> Ledger:
    return Ledger(token_device.make_requests([[row] for row in range(rows)], [SamplingParams(max_tokens=5)]))


def part_of(first: int, stop: int) -> Part:
    prompts = np.arange(first, stop, dtype=np.int32)
    return Part(prompts, np.zeros_like(prompts), np.ones_like(prompts))


def given_to(ledger: Ledger, member: int, members: int) -> int:
    """Return how many samples a member is given until it has its share."""
    before = ledger.held(member)
    while ledger.next_run(member, members) is not None:
        pass
    return ledger.held(member) - before


@pytest.mark.parametrize(("headway", "given"), [(0.0, 30), (18.0, 21), (-20.0, 40)])
def test_running_samples_of_others_count_as_what_is_left_of_them(headway, given):
    """Of 60 samples another runs 20 and 40 are free: the equal share is 30 if these have just begun, 21 if they are nearly
    done, and all that is free if they take twice as long as others."""
    ledger = of_equal(60)
    ledger.take_over(1, part_of(0, 20))
    ledger.note_headway(1, headway)
    assert ledger.work(1) == 20 - headway
    assert given - 1 <= given_to(ledger, 0, 2) <= given


def test_a_lost_member_has_no_headway_any_more():
    ledger = of_equal(40)
    ledger.take_over(1, part_of(0, 20))
    ledger.note_headway(1, 19.0)
    assert ledger.give_back(1) == 20
    ledger.take_over(1, part_of(0, 20))
    assert ledger.work(1) == 20 and 19 <= given_to(ledger, 0, 2) <= 20


def test_the_last_sample_is_given_to_whoever_has_none_whatever_the_others_told():
    ledger = of_equal(3)
    ledger.take_over(1, part_of(0, 2))
    ledger.note_headway(1, 2.0)
    ledger.note_headway(0, 5.0)
    assert ledger.work(0) == 0.0 and ledger.next_run(0, 4) is not None and not ledger.has_free


def test_what_one_gives_another_depends_on_what_is_left_of_the_running_samples():
    # 100 run and 60 wait here, 100 run there.
    assert to_give(160.0, 60, 100.0) == 30
    assert to_give(160.0 - 95, 60, 60.0) == 2, "those that run here are nearly done"
    assert to_give(160.0, 60, 220.0) == 0, "those that run there take long"
    assert to_give(1.2, 1, 0.0) == 1 and to_give(1.0, 1, 0.0) == 0 and to_give(500.0, 7, 0.0) == 7
