"""Work that comes and goes while a scheduler runs: added, given back to another one, cancelled."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import token_device as device
from support.scheduling_jobs import jobs
from support.shortsighted import Shortsighted

from tokabatch.scheduling.contracts import Completion, Requests, SamplingParams, StepResult
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.step_builder import SamplingTable
from tokabatch.scheduling.stop_conditions import StopRules, TokenText


def rules(requests: Requests) -> StopRules:
    return StopRules(requests.sampling, [device.EOS], device.VOCAB, None)


class Replica:
    """A scheduler with a device of its own, up to `depth` steps in flight; integrity is checked after every call."""

    def __init__(self, requests: Requests, limits: SchedulerLimits, prompts: dict[int, list[int]], depth: int, short: bool):
        self.scheduler = Scheduler(requests, limits, rules(requests), Shortsighted() if short else None)
        self.device = device.TokenDevice(limits)
        self.device.prompts = prompts
        self.depth = depth
        self.results: deque[StepResult] = deque()

    def step(self) -> list[Completion]:
        batch = self.scheduler.schedule() if len(self.results) < self.depth else None
        self.scheduler.check_integrity()
        if batch is not None:
            self.results.append(self.device.run(batch))
            return []
        assert self.results or self.scheduler.done, "the scheduler is stuck"
        completions = self.scheduler.apply(self.results.popleft()) if self.results else []
        self.scheduler.check_integrity()
        return completions


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(jobs(), st.data())
def test_every_sample_is_finished_once_or_cancelled(job, data):
    """Two schedulers hand prompts to each other, at any moment, while rows are added and cancelled and workers die."""
    prompts, params, limits, depth = job
    rows = dict(enumerate(prompts))
    wanted = {(row, sample) for row in rows for sample in range(params[row % len(params)].n)}
    of_row = {row: params[row % len(params)] for row in rows}
    requests = device.make_requests(prompts, params)
    short = data.draw(st.booleans())
    first = Replica(requests, limits, rows, depth, short)
    second = Replica(requests.take(np.zeros(0, np.int64)), limits, rows, depth, short)
    done: dict[tuple[int, int], Completion] = {}
    cancelled: set[tuple[int, int]] = set()

    def note(completions: list[Completion]) -> None:
        for completion in completions:
            key = completion.row_index, completion.sample_index
            assert key not in done and key not in cancelled
            done[key] = completion

    for kind in data.draw(
        st.lists(st.sampled_from(["step", "step", "extend", "other", "give", "cancel", "lose", "forget"]), max_size=40)
    ):
        one, other = (first, second) if data.draw(st.booleans()) else (second, first)
        if kind == "step":
            for _ in range(data.draw(st.integers(1, 4))):
                note(one.step())
        elif kind in ("extend", "other"):
            new = data.draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=3))
            base = len(rows)
            kinds = params if kind == "extend" else [SamplingParams(n=2, max_tokens=min(p.max_tokens for p in params), top_k=7)]
            more = device.make_requests(new, kinds)
            more = replace(more, row_index=more.row_index + base, sampling=tuple(kinds))
            rows.update({base + i: prompt for i, prompt in enumerate(new)})
            of_row.update({base + i: kinds[i % len(kinds)] for i in range(len(new))})
            wanted |= {(base + i, sample) for i in range(len(new)) for sample in range(of_row[base + i].n)}
            note(one.scheduler.extend(more))
        elif kind == "give":
            most = data.draw(st.integers(1, 8))
            given_back = one.scheduler.give_back(most)
            one.scheduler.check_integrity()
            if given_back is not None:
                assert 0 < given_back.num_samples().sum() <= most
                note(other.scheduler.extend(given_back))
        elif kind == "cancel":
            row, start = data.draw(st.sampled_from(sorted(rows))), data.draw(st.integers(0, 3))
            for replica in (first, second):
                gone = {(row, sample) for sample in replica.scheduler.cancel(row, start).tolist()}
                assert not gone & (cancelled | set(done)) and all(sample >= start for _, sample in gone)
                cancelled |= gone
                replica.scheduler.check_integrity()
            assert {key for key in wanted if key[0] == row and key[1] >= start} <= cancelled | set(done)
        elif kind == "forget":
            one.scheduler.compact(least=1)
        else:
            one.results.clear()
            note(one.scheduler.lost_device())
            one.device = device.TokenDevice(limits)
            one.device.prompts = rows
        one.scheduler.check_integrity()
        other.scheduler.check_integrity()
    for replica in (first, second):
        steps = 0
        while not replica.scheduler.done:
            note(replica.step())
            steps += 1
            assert steps < 10_000
        assert replica.scheduler.kv.pool.num_used == 0 and not len(replica.scheduler.kv.tree), "pages or prompts leaked"
    assert set(done) | cancelled == wanted and not set(done) & cancelled
    for (row, sample), completion in done.items():
        assert completion.token_ids.tolist() == device.expected_output(row, sample, len(rows[row]), of_row[row])


def test_the_last_prompts_are_given_back_first_and_the_last_samples_of_one(small_limits):
    prompts = [[1, 2, 3], [1, 2, 4], [5, 6]]
    requests = device.make_requests(prompts, [SamplingParams(n=4, max_tokens=5, ignore_eos=True)])
    scheduler = Replica(requests, small_limits, dict(enumerate(prompts)), 1, False).scheduler
    back = scheduler.give_back(6)
    assert back is not None
    assert [(int(row), back.samples(i).tolist()) for i, row in enumerate(back.row_index)] == [(1, [2, 3]), (2, [0, 1, 2, 3])]
    assert scheduler.give_back(100).num_samples().tolist() == [4, 2]
    assert scheduler.give_back(1) is None and scheduler.done


def test_added_prompts_share_what_the_last_ones_hold():
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    limits = SchedulerLimits(4, 64, 8, 32, 16, GroupingLimits(2, 1))
    sampling = [SamplingParams(n=1, max_tokens=8, ignore_eos=True)]
    rows = {0: prompts[0], 1: [*prompts[0][:8], 1, 1]}
    replica = Replica(device.make_requests(prompts, sampling), limits, rows, 1, False)
    for _ in range(4):
        replica.step()
    more = device.make_requests([rows[1]], sampling)
    replica.scheduler.extend(replace(more, row_index=more.row_index + 1))
    while not replica.scheduler.done:
        replica.step()
    assert replica.scheduler.counts.cached_tokens == 8


def test_a_prompt_cancelled_in_the_middle_of_its_prefill_does_not_hold_up_the_next():
    """The second prompt has two of the four pages computed that it shares with the third, a step of it in flight."""
    limits = SchedulerLimits(4, 64, 8, 12, 16, GroupingLimits(2, 1))
    rows = {0: [1, 2, 3], 1: [2] * 30, 2: [2] * 17 + [3]}
    sampling = [SamplingParams(max_tokens=25, ignore_eos=True)]
    replica = Replica(device.make_requests(list(rows.values()), sampling), limits, rows, 2, False)
    scheduler = replica.scheduler
    replica.step()
    assert scheduler.kv.tree[1].computed == 9
    assert scheduler.cancel(1).tolist() == [0]
    scheduler.check_integrity()
    replica.step()
    assert scheduler.num_running == 2 and scheduler.counts.cached_tokens == 8
    completions = []
    while not scheduler.done:
        completions += replica.step()
    assert {each.row_index: each.token_ids.tolist() for each in completions} == {
        row: device.expected_output(row, 0, len(rows[row]), sampling[0]) for row in (0, 2)
    }


def test_a_prompt_that_is_added_and_does_not_fit_is_an_error(small_limits):
    requests = device.make_requests([[1]], [SamplingParams(max_tokens=2)])
    scheduler = Scheduler(requests, small_limits, rules(requests))
    longer = device.make_requests([[1] * 70], [SamplingParams(max_tokens=2)])
    (error,) = scheduler.extend(replace(longer, row_index=longer.row_index + 1))
    assert (error.row_index, error.error_code) == (1, "kv_cache_overflow")


def test_work_without_an_end_takes_no_more_memory_than_what_is_there_of_it(small_limits):
    """Prompts come and go, one of them long; sampling parameters that come again are one kind, and each has a stop string."""
    text = TokenText(
        [f"<{token}>" for token in range(device.VOCAB)], lambda lists: ["".join(f"<{t}>" for t in ids) for ids in lists], {}
    )
    nothing = device.make_requests([[1]]).take(np.zeros(0, np.int64))
    scheduler = Scheduler(nothing, small_limits, StopRules(nothing.sampling, [device.EOS], device.VOCAB, text))
    model, waiting, done = device.TokenDevice(small_limits), dict[int, SamplingParams](), dict[int, Completion]()
    model.prompts = {}
    largest = [0, 0]
    for turn in range(400):
        if turn < 300:
            long = SamplingParams(max_tokens=60, ignore_eos=True, seed=turn)
            given = [
                SamplingParams(max_tokens=2, stop=(f"<{turn % 5}>",)),
                long if turn % 40 == 0 else SamplingParams(max_tokens=1),
            ]
            more = device.make_requests([[1, 2, turn % 7], [1, 2, 3]], given)
            more = replace(more, row_index=2 * turn + more.row_index, key=2 * turn + more.row_index)
            rows = zip(more.row_index.tolist(), more.params.tolist(), strict=True)
            waiting |= {row: given[kind] for row, kind in rows}
            model.prompts |= {int(row): more.prompt(place).tolist() for place, row in enumerate(more.row_index)}
            scheduler.extend(more)
        for _ in range(3):
            step = scheduler.schedule()
            for completion in scheduler.apply(model.run(step)) if step is not None else ():
                assert completion.row_index not in done
                done[completion.row_index] = completion
        scheduler.check_integrity()
        scheduler.compact(least=16)
        largest = [max(pair) for pair in zip(largest, (len(scheduler.work), len(scheduler.work.sampling)), strict=True)]
    assert scheduler.done and set(done) == set(waiting)
    assert largest[0] < 250 and largest[1] < 20, largest
    for row, completion in done.items():
        whole = device.expected_output(row, 0, 3, waiting[row])
        stop = next((f"<{token}>" for token in whole if f"<{token}>" in waiting[row].stop), None)
        ends = whole if stop is None else whole[: [f"<{token}>" for token in whole].index(stop) + 1]
        assert completion.token_ids.tolist() == ends and (stop is None or completion.stop_reason == stop)


def test_settings_of_new_prompts_are_looked_at_alone(monkeypatch):
    """Where each request has a seed of its own there are as many settings as prompts."""
    looked_at: list[int] = []
    extend = SamplingTable.extend

    def counted(table: SamplingTable, sampling: Sequence[SamplingParams]) -> None:
        looked_at.append(len(sampling))
        extend(table, sampling)

    def has_given_length(params: SamplingParams) -> bool:
        asked.append(params)
        return True

    asked: list[SamplingParams] = []
    monkeypatch.setattr(SamplingParams, "has_given_length", property(has_given_length))
    monkeypatch.setattr(SamplingTable, "extend", counted)
    limits = SchedulerLimits(4, 64, 8, 64, 16, None)
    requests, prompts = device.make_requests([[3]], [SamplingParams(max_tokens=2)]), {0: [3]}
    replica = Replica(requests, limits, prompts, 1, False)
    drawn: dict[int, list[int]] = {}
    for row in range(1, 30):
        prompts[row] = [3, row]
        more = device.make_requests([prompts[row]], [SamplingParams(seed=row, max_tokens=2, presence_penalty=row / 20)])
        replica.scheduler.extend(replace(more, row_index=more.row_index + row))
        while not replica.scheduler.done:
            drawn |= {each.row_index: each.token_ids.tolist() for each in replica.step()}
        replica.scheduler.compact(least=1 if row % 10 == 0 else 10_000)
    # All of those that are left, once after some have been forgotten; otherwise one at a time.
    assert max(looked_at) <= 2 and len(drawn) == 30 and len(asked) < 40
