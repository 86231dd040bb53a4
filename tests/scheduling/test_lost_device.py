"""The scheduler when the worker is lost: on an empty cache everybody still gets their own tokens, and a prompt that kills
workers is found."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import token_device as device
from support.scheduling_jobs import jobs

from tokabatch.scheduling.contracts import SamplingParams, StepBatch, StepResult
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.quarantine import Quarantine
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules


class Crash(Exception):
    """The scripted worker died."""


def drive(
    requests, limits, prompts, depth: int, before: Callable[[int, StepBatch, device.TokenDevice], None], suspect: bool = True
):
    """Run to the end; `before(number, step, device)` may raise Crash, whereupon the device is replaced by an empty one.
    Returns completions by (row, sample), the number of crashes and the scheduler."""
    scheduler = Scheduler(requests, limits, StopRules(requests.sampling, [device.EOS], device.VOCAB, None))
    results: deque[StepResult] = deque()
    completions = {}
    crashes = number = 0

    def fresh() -> device.TokenDevice:
        empty = device.TokenDevice(limits)
        empty.prompts = prompts
        return empty

    worker = fresh()
    while not scheduler.done:
        number += 1
        assert number < 50_000, "no progress"
        batch = scheduler.schedule() if len(results) < depth else None
        scheduler.check_integrity()
        try:
            if batch is not None:
                before(number, batch, worker)
                results.append(worker.run(batch))
                continue
            assert results, "the scheduler is stuck"
            done = scheduler.apply(results.popleft())
        except Crash:
            crashes += 1
            worker = fresh()
            results.clear()
            done = scheduler.lost_device("signal 11" if suspect else None)
        scheduler.check_integrity()
        for completion in done:
            key = (completion.row_index, completion.sample_index)
            assert key not in completions
            completions[key] = completion
    assert scheduler.kv.pool.num_used == 0 and not len(scheduler.kv.tree), "pages or prompts leaked"
    return completions, crashes, scheduler


def check_all(completions, prompts, params, without: frozenset[int] = frozenset()) -> None:
    expected = {(row, sample) for row in range(len(prompts)) for sample in range(params[row % len(params)].n)}
    assert set(completions) == expected
    for (row, sample), got in completions.items():
        row_params = params[row % len(params)]
        tokens = device.expected_output(row, sample, len(prompts[row]), row_params)
        if row in without:
            assert got.error_code in (None, "worker_crash")
            assert got.token_ids.tolist() == (tokens if got.error_code is None else tokens[: len(got.token_ids)])
        else:
            assert got.error_code is None and got.token_ids.tolist() == tokens


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(jobs(), st.sets(st.integers(1, 60), max_size=12))
def test_a_lost_worker_changes_no_token(job, lost_at):
    prompts, params, limits, depth = job

    def before(number: int, step: StepBatch, worker: device.TokenDevice) -> None:
        if number in lost_at:
            raise Crash

    requests = device.make_requests(prompts, params)
    completions, crashes, scheduler = drive(requests, limits, prompts, depth, before, suspect=False)
    check_all(completions, prompts, params)
    assert crashes <= len(lost_at)
    assert scheduler.counts.output_tokens == sum(len(c.token_ids) for c in completions.values())
    assert scheduler.counts.prompt_tokens == sum(len(p) * params[row % len(params)].n for row, p in enumerate(prompts))
    assert scheduler.counts.cached_tokens == sum(c.counts.cached_tokens for c in completions.values())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(jobs(), st.data())
def test_rows_that_kill_workers_become_error_rows_and_cost_no_other(job, data):
    prompts, params, limits, depth = job
    poison = data.draw(st.sets(st.integers(0, len(prompts) - 1), min_size=1, max_size=2))
    fatal = data.draw(st.integers(0, 3))

    def before(number: int, step: StepBatch, worker: device.TokenDevice) -> None:
        """Row r of `poison` kills the worker when it computes `fatal` positions behind its prompt, or later."""
        names = worker.identity | {
            int(slot): (int(row), int(sample))
            for slot, row, sample in zip(step.inits.slot, step.inits.row, step.inits.sample, strict=True)
        }
        for slot, start, length in zip(step.run_slot.tolist(), step.run_start, step.run_length, strict=True):
            row = names[slot][0]
            if row in poison and start + length >= len(prompts[row]) + fatal:
                raise Crash

    requests = device.make_requests(prompts, params)
    completions, crashes, _ = drive(requests, limits, prompts, depth, before)
    check_all(completions, prompts, params, frozenset(poison))
    short = {row for row in poison if params[row % len(params)].max_tokens <= fatal}
    ended = {row for row in poison if all(completions[row, s].error_code is None for s in range(params[row % len(params)].n))}
    assert all(row in short or completions[row, 0].token_ids.tolist()[-1:] == [device.EOS] for row in ended)
    # Twice together, a halving for each power of two, twice alone; and the search may begin anew while others come in.
    assert crashes <= 40 * len(poison)


def test_the_search_takes_logarithmically_many_crashes():
    prompts = [[i % 40, i // 40, 1] for i in range(200)]
    limits = SchedulerLimits(4, 4000, 256, 2048, 8, GroupingLimits(2, 1))
    params = [SamplingParams(n=1, max_tokens=12, ignore_eos=True)]
    poison = 137

    def before(number: int, step: StepBatch, worker: device.TokenDevice) -> None:
        rows = {int(row) for row in step.inits.row} | {
            worker.identity[int(s)][0] for s in step.run_slot if s in worker.identity
        }
        if poison in rows:
            raise Crash

    completions, crashes, scheduler = drive(device.make_requests(prompts, params), limits, prompts, 2, before)
    check_all(completions, prompts, params, frozenset([poison]))
    assert [key for key, c in completions.items() if c.error_code] == [(poison, 0)]
    assert crashes <= 2 + 8 + 2
    assert scheduler.counts.requeued > 0 and scheduler.counts.preemptions == 0


def test_crashes_with_progress_between_them_accuse_no_row():
    prompts = [[i, i + 1] for i in range(4)]
    limits = SchedulerLimits(4, 64, 8, 32, 16, None)
    params = [SamplingParams(n=1, max_tokens=40, ignore_eos=True)]
    seen: Counter[int] = Counter()

    def before(number: int, step: StepBatch, worker: device.TokenDevice) -> None:
        seen[0] += 1
        if seen[0] % 10 == 0:
            raise Crash

    completions, crashes, _ = drive(device.make_requests(prompts, params), limits, prompts, 1, before)
    assert crashes >= 4
    check_all(completions, prompts, params)


def test_smaller_steps_after_halving(small_limits):
    prompts = [[i, i + 1, i + 2] for i in range(9)]
    requests = device.make_requests(prompts, [SamplingParams(n=3, max_tokens=9)])
    scheduler = Scheduler(requests, small_limits, StopRules(requests.sampling, [device.EOS], device.VOCAB, None))
    sizes = []
    for _ in range(3):
        worker = device.TokenDevice(small_limits)
        worker.prompts = prompts
        for _ in range(2):
            step = scheduler.schedule()
            sizes.append((step.num_tokens, len(step.run_slot)))
            scheduler.apply(worker.run(step))
        scheduler.lost_device()
        scheduler.halve()
        scheduler.check_integrity()
    assert max(tokens for tokens, _ in sizes[2:4]) <= 16 and max(runs for _, runs in sizes[4:6]) <= 8
    for _ in range(3):
        scheduler.halve()
    assert (scheduler.limits.max_step_tokens, scheduler.limits.max_running, scheduler.kv.slots.num_free) == (1, 1, 1)


def test_pages_that_a_dropped_step_was_to_clear_are_cleared_by_the_next(small_limits):
    requests = device.make_requests([[1, 2, 3]])
    scheduler = Scheduler(requests, small_limits, StopRules(requests.sampling, [device.EOS], device.VOCAB, None))
    scheduler.kv.pool.clears = True
    dropped = scheduler.schedule()
    assert len(dropped.clear_pages)
    scheduler.lost_device()
    assert np.array_equal(scheduler.schedule().clear_pages, dropped.clear_pages)


class TestQuarantine:
    def running(self, *requests: int, count: int = 0) -> dict[tuple[int, int], int]:
        return {(request, 0): count for request in requests}

    def test_a_second_crash_at_the_same_place_runs_halves(self) -> None:
        quarantine = Quarantine()
        assert quarantine.crash(self.running(*range(8)), 1) is None and quarantine.trial is None
        assert quarantine.crash(self.running(*range(8)), 1) is None and quarantine.trial == {0, 1, 2, 3}
        # The first half gets past the point: the second is tried.
        quarantine.advance(self.running(0, 1, 2, 3, count=1), ())
        assert quarantine.trial == {4, 5, 6, 7}

    def test_suspects_that_are_over_before_their_turn_hold_up_no_row(self) -> None:
        quarantine = Quarantine()
        for _ in range(2):
            quarantine.crash(self.running(*range(8)), 1)
        quarantine.crash(self.running(0, 1, 2, 3), 1)
        assert quarantine.trial == {0, 1}
        quarantine.advance({}, self.running(2, 3, 4))
        quarantine.advance(self.running(0, 1, count=1), ())
        assert quarantine.trial == {5, 6, 7}
        quarantine.advance({}, self.running(5, 6, 7))
        assert quarantine.trial is None and not quarantine.active

    def test_only_crashes_alone_condemn(self) -> None:
        quarantine = Quarantine()
        for _ in range(2):
            quarantine.crash(self.running(3), 1)
        assert quarantine.trial == {3}
        assert quarantine.crash(self.running(3, 5), 1) is None
        assert quarantine.crash(self.running(3), 1) is None
        assert quarantine.crash(self.running(3), 1) == 3
        assert not quarantine.active and quarantine.trial is None

    def test_a_crash_while_loading_accuses_no_row(self) -> None:
        quarantine = Quarantine()
        for _ in range(5):
            assert quarantine.crash({}, 0) is None
        assert not quarantine.active

    @pytest.mark.parametrize("over", [True, False])
    def test_suspects_clear_themselves_by_getting_on_or_ending(self, over: bool) -> None:
        quarantine = Quarantine()
        quarantine.crash({(1, 0): 5, (2, 0): 7}, 2)
        quarantine.advance({(1, 0): 7, (2, 0): 8}, ())
        assert quarantine.active
        quarantine.advance({} if over else {(2, 0): 9}, [(2, 0)] if over else [])
        assert not quarantine.active
