"""Times the steps of a run: for each, its work, what ran and waited, and the wall-clock time until its result was applied.

A step's seconds run from the previous result to its own, so that they add up to the run: the host's work in between counts,
unless a step was in flight meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from tokabatch.forecast.step_log import StepLog, Steps, StepState
from tokabatch.forecast.step_work import StepWork, measure_work
from tokabatch.scheduling.contracts import StepBatch
from tokabatch.scheduling.scheduler import Scheduler


class Stopwatch:
    """Records every step handed to the device and every result applied, both in order."""

    def __init__(self, num_samples: int, clock: Callable[[], float] = time.perf_counter, *, keeps: bool = True) -> None:
        """`keeps` is False if `steps` is never read and the work has no end."""
        self._keeps = keeps
        self._trace = StepLog()
        self._clock = clock
        self._last = clock()
        self.num_samples = num_samples
        """Samples to draw in all, those not finished and those finished."""
        self._in_flight: deque[tuple[StepWork, int, int, int, int]] = deque()

    def restart(self) -> None:
        """The device starts over: steps in flight are lost, and the time until now counts for no step."""
        self._in_flight.clear()
        self._last = self._clock()

    def submitted(self, step: StepBatch, scheduler: Scheduler) -> None:
        """Record that a step was handed to the device."""
        running, waiting = scheduler.num_running, self.waiting(scheduler)
        work = measure_work(step, scheduler.limits.page_size)
        self._in_flight.append((work, running, waiting, scheduler.kv.pool.num_used, scheduler.kv.pool.num_pages))

    def waiting(self, scheduler: Scheduler) -> int:
        """Return the number of samples that are neither finished nor running."""
        return max(0, self.num_samples - scheduler.counts.finished - scheduler.num_running)

    def collected(self, num_finished: int) -> None:
        """Record that the oldest step's result was applied."""
        work, running, waiting, pages, capacity = self._in_flight.popleft()
        now = self._clock()
        if self._keeps:
            self._trace.add(work, StepState(now - self._last, running, waiting, pages, capacity, num_finished))
        self._last = now

    def steps(self) -> Steps:
        """Return the steps whose results were applied."""
        return self._trace.steps()
