"""One simulated run: the real scheduler, a device that computes nothing, seconds from a cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tokabatch.forecast.assumed_lengths import Lengths
from tokabatch.forecast.step_log import StepLog, Steps, StepState, tail_seconds
from tokabatch.forecast.step_work import Number, StepWork, measure_work
from tokabatch.scheduling.contracts import Requests, StepBatch, StepResult
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.lengths.predictor import LengthPredictor
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stopping import StopRules

STOP, GO_ON = 1, 0
"""The two tokens of this device."""


class SimulatedDevice:
    """Computes nothing: answers steps, in order, with tokens that end each sample with `STOP` at its length, which its row and
    number alone decide."""

    def __init__(self, requests: Requests, lengths: Lengths, num_slots: int) -> None:
        self._lengths = lengths
        self._prompt_length = np.zeros(int(requests.row_index.max(initial=0)) + 1, np.int32)
        self._prompt_length[requests.row_index] = requests.length
        self._end = np.zeros(num_slots, np.int64)
        """For each slot the computed positions at which its sample draws its last token."""

    def run(self, step: StepBatch) -> StepResult:
        inits = step.inits
        if len(inits.slot):
            length = self._lengths(inits.row, inits.sample).astype(np.int64)
            self._end[inits.slot] = self._prompt_length[inits.row] + length - 1
        sampled = np.flatnonzero(step.run_samples)
        ended = step.run_start[sampled] + step.run_length[sampled] >= self._end[step.run_slot[sampled]]
        return StepResult.of_tokens(step.index, np.where(ended, STOP, GO_ON).astype(np.int32))


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a simulated run did. `steps` holds every step with its predicted seconds."""

    steps: Steps
    counts: SchedulerCounts
    num_pages: int

    @property
    def seconds(self) -> float:
        return self.steps.seconds

    @property
    def output_tokens_per_second(self) -> float:
        return self.counts.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def kv_use(self) -> float:
        """Mean share of the pages in use, weighted by time, while samples wait to be admitted."""
        busy = self.steps["waiting"] > 0
        seconds = self.steps["seconds"] * busy
        return float((self.steps["pages"] * seconds).sum() / (seconds.sum() * self.num_pages)) if busy.any() else 0.0

    @property
    def tail_seconds(self) -> float:
        return tail_seconds(self.steps)

    @property
    def waste(self) -> float:
        """Share of all computed tokens that were computed again after preemptions."""
        counts = self.counts
        return counts.recomputed_tokens / max(counts.prefilled_tokens + counts.output_tokens, 1)

    @property
    def waited(self) -> float:
        """Steps that running samples sat out for want of pages, over output tokens."""
        return self.counts.waited_steps / max(self.counts.output_tokens, 1)


def simulate(
    requests: Requests,
    limits: SchedulerLimits,
    cost: Callable[[StepWork], Number],
    lengths: Lengths,
    predictor: LengthPredictor | None = None,
) -> Simulation:
    """Run the whole workload. The tokens of `requests` are read but their values do not matter; `predictor` replaces the
    scheduler's own learning of lengths."""
    # The device's stop token stands for all that ends a sample; one whose length is given stays as it is.
    sampling = (
        replace(params, stop=(), stop_token_ids=(), ignore_eos=params.has_given_length, logprobs=None)
        for params in requests.sampling
    )
    requests = replace(requests, sampling=tuple(sampling))
    scheduler = Scheduler(requests, limits, StopRules(requests.sampling, [STOP], STOP + 1, None), predictor)
    device = SimulatedDevice(requests, lengths, limits.max_running)
    total, finished = int(requests.num_samples().sum()), len(scheduler.settle_pages(limits.num_pages))
    trace = StepLog()
    while not scheduler.done:
        step = scheduler.schedule()
        assert step is not None, "the scheduler is stuck"
        running, pages = scheduler.num_running, scheduler.kv.pool.num_used
        work = measure_work(step, limits.page_size)
        done = len(scheduler.apply(device.run(step)))
        state = StepState(float(cost(work)), running, total - finished - running, pages, limits.num_pages, done)
        finished += done
        trace.add(work, state)
    return Simulation(trace.steps(), scheduler.counts, limits.num_pages)
