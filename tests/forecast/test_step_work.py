"""The counts of a step against a loop over its queries, for steps that a real scheduler decides."""

from __future__ import annotations

import numpy as np
from support import token_device as device

from tokabatch.forecast.step_work import measure_work
from tokabatch.scheduling.contracts import SamplingParams, StepBatch
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules


def count_slowly(step: StepBatch, page_size: int) -> dict[str, int]:
    """Query by query: what each one sees by itself, and what each group reads for it."""
    counts = dict.fromkeys(("prefill_pairs", "prefill_kv", "decode_kv", "prefix_pairs", "prefix_kv", "groups"), 0)
    for run in range(len(step.run_slot)):
        skipped = int(step.run_skip[run]) * page_size
        positions = range(int(step.run_start[run]), int(step.run_start[run] + step.run_length[run]))
        seen = [position + 1 - skipped for position in positions]
        if run < step.num_prefill_runs:
            counts["prefill_pairs"] += sum(seen)
            counts["prefill_kv"] += max(seen)
        else:
            counts["decode_kv"] += sum(seen)
    for level in step.prefix_levels:
        for start, stop, first, last in zip(
            level.token_start, level.token_stop, level.page_start, level.page_stop, strict=True
        ):
            counts["prefix_pairs"] += sum(int(last - first) * page_size for _ in range(start, stop))
            counts["prefix_kv"] += int(last - first) * page_size
            counts["groups"] += 1
    return counts


def test_counts_equal_a_loop_over_queries():
    rng = np.random.default_rng(3)
    header = rng.integers(0, device.VOCAB, 19).tolist()
    prompts = [header + rng.integers(0, device.VOCAB, rng.integers(1, 12)).tolist() for _ in range(9)]
    requests = device.make_requests(prompts, [SamplingParams(n=3, max_tokens=9)])
    limits = SchedulerLimits(4, 200, 11, 30, 12, GroupingLimits(2, 1))
    scheduler = Scheduler(requests, limits, StopRules(requests.sampling, [device.EOS], device.VOCAB, None))
    runner = device.TokenDevice(limits)
    runner.prompts = prompts
    grouped = 0
    while not scheduler.done:
        step = scheduler.schedule()
        work = measure_work(step, 4)
        for name, value in count_slowly(step, 4).items():
            assert getattr(work, name) == value, name
        assert (work.tokens, work.sampled, work.sequences) == (step.num_tokens, step.run_samples.sum(), len(step.run_slot))
        grouped += work.groups > 0
        scheduler.apply(runner.run(step))
    assert grouped > 3
