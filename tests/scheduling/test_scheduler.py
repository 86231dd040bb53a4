"""The scheduler against a device that checks every read: any limits, any prompts, the same outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import token_device as device
from support.scheduling_jobs import jobs

from tokabatch.scheduling.contracts import Alike, Drawn, SamplingParams
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(jobs())
def test_any_schedule_gives_every_sample_its_own_tokens(job):
    prompts, params, limits, depth = job
    requests = device.make_requests(prompts, params)
    completions, scheduler = device.drive(requests, limits, prompts, depth)
    for row, prompt in enumerate(prompts):
        row_params = params[row % len(params)]
        for sample in range(row_params.n):
            got = completions.pop((row, sample))
            assert got.token_ids.tolist() == device.expected_output(row, sample, len(prompt), row_params)
            ended = got.token_ids[-1] == device.EOS and not row_params.ignore_eos
            assert got.finish_reason == ("stop" if ended else "length")
            assert got.num_prompt_tokens == len(prompt)
    assert not completions
    assert scheduler.counts.prompt_tokens == sum(len(p) * params[row % len(params)].n for row, p in enumerate(prompts))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(jobs(), st.integers(0, 2**32), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_only_the_missing_samples_are_drawn_and_they_are_the_same_ones(job, seed, share):
    """Whatever was drawn before (holes anywhere, whole prompts done), the rest comes out as in one go."""
    prompts, params, limits, depth = job
    wanted = [params[row % len(params)].n for row in range(len(prompts))]
    start = np.concatenate(([0], np.cumsum(wanted))).astype(np.int64)
    drawn = Drawn(start, np.random.default_rng(seed).random(start[-1]) < share)
    requests = device.make_requests(prompts, params).without(drawn)
    assert (requests.num_samples() > 0).all()
    for before, after in zip(range(len(requests) - 1), range(1, len(requests)), strict=True):
        assert requests.lcp[after] == common(requests.prompt(before), requests.prompt(after))
    completions = device.drive(requests, limits, prompts, depth)[0] if len(requests) else {}
    missing = {(row, n) for row in range(len(prompts)) for n in range(wanted[row]) if not drawn.flags[start[row] + n]}
    assert set(completions) == missing
    for (row, sample), got in completions.items():
        expected = device.expected_output(row, sample, len(prompts[row]), params[row % len(params)])
        assert got.token_ids.tolist() == expected


def common(a, b) -> int:
    differs = np.flatnonzero(a[: len(b)] != b[: len(a)])
    return int(differs[0]) if len(differs) else min(len(a), len(b))


def test_a_shared_prefix_is_prefilled_once(small_limits):
    header = list(range(16))
    prompts = [[*header, i, i + 1, i + 2] for i in range(5)]
    requests = device.make_requests(prompts, [SamplingParams(n=4, max_tokens=3, ignore_eos=True)])
    _, scheduler = device.drive(requests, small_limits, prompts)
    # The header once, each prompt's own three tokens once, and one token for each further sample.
    assert scheduler.counts.prefilled_tokens == 16 + 5 * 3 + 5 * 3
    assert scheduler.counts.preemptions == 0


def long_winded(max_tokens: int) -> SamplingParams:
    """Samples that the scheduler expects to stop and that never do: longer than any forecast expects."""
    return SamplingParams(n=2, max_tokens=max_tokens, ignore_eos=True, stop_token_ids=(device.VOCAB + 1,))


@pytest.mark.parametrize("depth", [1, 3])
def test_preemption_keeps_tokens_when_the_forecast_was_wrong(depth):
    prompts = [[i, i + 1] for i in range(6)]
    limits = SchedulerLimits(2, 30, 6, 12, 26, GroupingLimits(2, 1))
    params = long_winded(50)
    completions, scheduler = device.drive(device.make_requests(prompts, [params]), limits, prompts, depth)
    assert scheduler.counts.preemptions > 0
    assert scheduler.counts.recomputed_tokens > 0
    assert len(completions) == 12
    assert all(
        c.token_ids.tolist() == device.expected_output(row, sample, 2, params) for (row, sample), c in completions.items()
    )


def test_known_lengths_are_never_preempted():
    prompts = [[i, i + 1] for i in range(6)]
    limits = SchedulerLimits(2, 30, 6, 12, 26, None)
    params = SamplingParams(n=2, max_tokens=24, ignore_eos=True)
    _, scheduler = device.drive(device.make_requests(prompts, [params]), limits, prompts)
    assert scheduler.counts.preemptions == 0


def test_samples_of_one_given_length_run_in_waves_of_equal_size():
    """Pages for 14 of 20 samples: 14 and 6 would leave half of the device idle in the second wave."""
    prompts = [[i, i + 1] for i in range(20)]
    limits = SchedulerLimits(2, 14 * 8, 20, 60, 8, None)
    params = SamplingParams(max_tokens=14, ignore_eos=True)
    requests, most = device.make_requests(prompts, [params]), {}
    for alike in (None, Alike(20, 8)):
        scheduler = Scheduler(requests, replace(limits, alike=alike), StopRules([params], [], device.VOCAB, None))
        assert not scheduler.settle_pages(limits.num_pages)
        runner, running, finished = device.TokenDevice(limits), [], 0
        runner.prompts = prompts
        while not scheduler.done:
            finished += len(scheduler.apply(runner.run(scheduler.schedule())))
            running.append(scheduler.num_running)
        assert finished == 20
        most[alike is not None] = max(running)
    assert most == {False: 14, True: 11}


def test_hydragen_levels_nest(small_limits):
    prompts = [[1] * 8 + [2] * 8 + [i] for i in range(2)] + [[1] * 8 + [3] * 8 + [i] for i in range(2)]
    requests = device.make_requests(prompts, [SamplingParams(n=2, max_tokens=4, ignore_eos=True)])
    scheduler_class = device.Scheduler
    scheduler = scheduler_class(requests, small_limits, device.StopRules(requests.sampling, [], device.VOCAB, None))
    runner = device.TokenDevice(small_limits)
    runner.prompts = prompts
    deepest = 0
    while not scheduler.done:
        batch = scheduler.schedule()
        deepest = max(deepest, len({tuple(level.page_start) for level in batch.prefix_levels if len(level.slot)}))
        scheduler.apply(runner.run(batch))
    assert deepest >= 2


@pytest.mark.parametrize("num_running", [64])
def test_books_close_at_size(num_running):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, device.VOCAB, rng.integers(1, 40)).tolist() for _ in range(150)]
    params = [SamplingParams(n=2, max_tokens=50)]
    limits = SchedulerLimits(8, 300, num_running, 128, 12, GroupingLimits(2, 1))
    completions, scheduler = device.drive(device.make_requests(prompts, params), limits, prompts, 2, integrity=False)
    assert len(completions) == 300
    assert scheduler.counts.output_tokens == sum(len(c.token_ids) for c in completions.values())


def test_two_prompts_that_share_a_page_do_not_take_turns_for_ever():
    """Three pages: each prompt takes two, one of them shared, and a sample needs one more to begin."""
    prompts = [
        [0, 2, 1, 0, 1, 0, 0, 3, 2], [0, 2, 1, 1], [0, 2, 1, 3], [0, 2, 1, 0, 1, 0, 0, 3, 2], [0, 2, 1, 0, 0, 0, 0, 1],
        [0, 2, 1, 1, 2, 1], [0, 2, 1, 2], [0, 2, 1, 0, 1, 0, 0, 3, 2], [0, 2, 1, 3, 1, 2, 3, 1, 2], [0, 2, 1, 0],
    ]  # fmt: skip
    params = SamplingParams(n=2, max_tokens=1)
    limits = SchedulerLimits(8, 3, 4, 9, 2, None)
    completions, _ = device.drive(device.make_requests(prompts, [params]), limits, prompts, 1)
    assert len(completions) == 2 * len(prompts)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(jobs(), st.data())
def test_a_sample_that_does_not_fit_the_cache_costs_its_row_alone(job, data):
    """Any number of pages; and another number once the worker has been replaced."""
    prompts, params, limits, _ = job
    needed = [-(-(len(p) + params[row % len(params)].max_tokens) // limits.page_size) + 1 for row, p in enumerate(prompts)]
    most = data.draw(st.lists(st.integers(0, max(needed) + 1), min_size=2, max_size=2))
    requests = device.make_requests(prompts, params)
    scheduler = Scheduler(requests, limits, StopRules(requests.sampling, [device.EOS], device.VOCAB, None))
    completions, steps = {}, 0
    for pages, last in zip(most, (False, True), strict=True):
        for error in scheduler.settle_pages(pages):
            completions[error.row_index, error.sample_index] = error
            assert error.error_code == "kv_cache_overflow" and needed[error.row_index] > pages
            shown = (len(prompts[error.row_index]), needed[error.row_index] * limits.page_size, pages * limits.page_size)
            assert all(f"{number:,}" in error.error_message for number in shown)
        scheduler.check_integrity()
        worker = device.TokenDevice(replace(limits, num_pages=pages))
        worker.prompts = prompts
        steps = 0
        while not scheduler.done and (last or steps < 3):
            batch = scheduler.schedule()
            scheduler.check_integrity()
            for done in scheduler.apply(worker.run(batch)):
                assert (done.row_index, done.sample_index) not in completions
                completions[done.row_index, done.sample_index] = done
            steps += 1
        scheduler.lost_device()
    assert sorted(completions) == [
        (row, sample) for row in range(len(prompts)) for sample in range(params[row % len(params)].n)
    ]
    for (row, sample), got in completions.items():
        expected = device.expected_output(row, sample, len(prompts[row]), params[row % len(params)])
        if got.error_code is None:
            assert got.token_ids.tolist() == expected
        else:
            assert got.token_ids.tolist() == expected[: len(got.token_ids)]
        assert (got.error_code is None) or needed[row] > min(most)
    assert scheduler.counts.finished == len(completions) and scheduler.counts.finished_prompts == len(prompts)
