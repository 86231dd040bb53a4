"""A device made of token ids: its cache remembers which token was written where, so that every read can be checked."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tokabatch.scheduling.contracts import Requests, SamplingParams, StepBatch, StepResult
from tokabatch.scheduling.policy.forecast_policy import ForecastPolicy
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stop_conditions import StopRules

VOCAB = 50
EOS = 7


def next_token(row: int, sample: int, position: int) -> int:
    """The scripted model: any token but EOS half of the time early on, so that lengths spread."""
    bits = (row * 1_000_003 + sample * 7919 + position * 104_729 + 12345) * 2654435761 & 0xFFFFFFFF
    return EOS if bits % 23 == 0 else (bits >> 8) % VOCAB


def make_requests(prompts: list[list[int]], params: list[SamplingParams] | None = None) -> Requests:
    """Prompts in any order; the table comes out in plan order with their LCPs."""
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i], i))
    ordered = [prompts[i] for i in order]
    lcp = [0] * len(prompts)
    for i in range(1, len(ordered)):
        a, b = ordered[i - 1], ordered[i]
        while lcp[i] < min(len(a), len(b)) and a[lcp[i]] == b[lcp[i]]:
            lcp[i] += 1
    sampling = params or [SamplingParams()]
    length = np.array([len(p) for p in ordered], np.int32)
    return Requests(
        row_index=np.array(order, np.int64),
        tokens=np.array([t for p in ordered for t in p], np.int32),
        start=(np.cumsum(length) - length).astype(np.int64),
        length=length,
        lcp=np.array(lcp, np.int32),
        params=np.array([i % len(sampling) for i in order], np.int32),
        sampling=tuple(sampling),
    )


@dataclass
class TokenDevice:
    """Executes steps on a cache of token ids and asserts that every run reads exactly its own context."""

    limits: SchedulerLimits
    table: np.ndarray = field(init=False)
    cache: np.ndarray = field(init=False)
    last: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.table = np.full((self.limits.max_running, self.limits.max_pages_per_sequence), -1, np.int32)
        self.cache = np.full((self.limits.num_pages, self.limits.page_size), -1, np.int64)
        self.last = np.full(self.limits.max_running, -1, np.int64)
        self.context: dict[int, list[int]] = {}
        self.identity: dict[int, tuple[int, int]] = {}

    def run(self, step: StepBatch) -> StepResult:
        size = self.limits.page_size
        cells = list(zip(step.table_slot.tolist(), step.table_column.tolist(), strict=True))
        assert len(set(cells)) == len(cells), "a page-table cell is set twice in one step"
        for slot, row, sample in zip(step.inits.slot, step.inits.row, step.inits.sample, strict=True):
            self.identity[int(slot)] = (int(row), int(sample))
            self.context[int(slot)] = []
            self.table[slot] = -1
        self.table[step.table_slot, step.table_column] = step.table_page
        self.cache[step.clear_pages] = -1
        self.cache[step.copy_dst] = self.cache[step.copy_src]
        assert step.num_tokens <= self.limits.max_step_tokens
        written: list[tuple[int, int, int]] = []
        offset = 0
        for run in range(len(step.run_slot)):
            slot, start, length = int(step.run_slot[run]), int(step.run_start[run]), int(step.run_length[run])
            if run < step.num_prefill_runs:
                tokens = step.token_ids[offset : offset + length].tolist()
                offset += length
            else:
                tokens = [int(self.last[slot])]
            for position, token in enumerate(tokens, start):
                page = int(self.table[slot, position // size])
                assert page >= 0, "a position without a page"
                self.cache[page, position % size] = token
                written.append((page, position % size, slot))
        assert offset == len(step.token_ids)
        assert len({w[:2] for w in written}) == len(written), "two runs write one cache position in a step"
        self._check_levels(step)
        sampled = []
        for run in np.nonzero(step.run_samples)[0]:
            slot = int(step.run_slot[run])
            end = int(step.run_start[run] + step.run_length[run])
            pages = self.table[slot, : -(-end // size)]
            seen = self.cache[pages].ravel()[:end].tolist()
            row, sample = self.identity[slot]
            assert seen == self.expected(row, sample, end), "a run read a context that is not its own"
            self.last[slot] = next_token(row, sample, end)
            sampled.append(self.last[slot])
        return StepResult.of_tokens(step.index, np.array(sampled, np.int32))

    def expected(self, row: int, sample: int, end: int) -> list[int]:
        prompt = self.prompts[row]
        return prompt[:end] + [next_token(row, sample, p) for p in range(len(prompt), end)]

    def _check_levels(self, step: StepBatch) -> None:
        size = self.limits.page_size
        run_of = np.repeat(np.arange(len(step.run_slot)), step.run_length)
        covered = np.zeros(len(run_of), np.int64)
        for level in step.prefix_levels:
            groups = zip(level.token_start, level.token_stop, level.slot, level.page_start, level.page_stop, strict=True)
            for start, stop, slot, first, last in groups:
                assert (covered[start:stop] == first).all(), "levels do not follow on one another"
                covered[start:stop] = last
                for run in np.unique(run_of[start:stop]):
                    assert (self.table[step.run_slot[run], first:last] == self.table[slot, first:last]).all()
                    assert step.run_start[run] >= last * size, "a query inside the prefix it attends to without a mask"
        assert np.array_equal(covered, step.run_skip[run_of])


def drive(
    requests: Requests,
    limits: SchedulerLimits,
    prompts: list[list[int]],
    depth: int = 1,
    integrity: bool = True,
    policy=ForecastPolicy,
):
    """Run to the end with up to `depth` steps in flight; returns completions by (row, sample) and the scheduler."""
    stops = StopRules(requests.sampling, [EOS], VOCAB, None)
    scheduler = Scheduler(requests, limits, stops, policy=policy)
    device = TokenDevice(limits)
    device.prompts = prompts
    results: deque[StepResult] = deque()
    completions = {}
    steps = 0
    while not scheduler.done:
        steps += 1
        assert steps < 100_000
        batch = scheduler.schedule() if len(results) < depth else None
        if integrity:
            scheduler.check_integrity()
        if batch is not None:
            results.append(device.run(batch))
        elif results:
            for completion in scheduler.apply(results.popleft()):
                key = (completion.row_index, completion.sample_index)
                assert key not in completions
                completions[key] = completion
            if integrity:
                scheduler.check_integrity()
        else:
            raise AssertionError("the scheduler is stuck")
    assert scheduler.kv.pool.num_used == 0 and not len(scheduler.kv.tree), "pages or prompts leaked"
    return completions, scheduler


def expected_output(row: int, sample: int, prompt_length: int, params: SamplingParams) -> list[int]:
    output: list[int] = []
    while len(output) < params.max_tokens:
        output.append(next_token(row, sample, prompt_length + len(output)))
        if output[-1] == EOS and not params.ignore_eos:
            break
    return output
