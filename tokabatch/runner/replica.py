"""The loop of one replica: steps go from the scheduler to a worker and results come back; lost workers are replaced.

`Replica.run` is the loop: schedule, submit, collect, apply; its caller records what it yields. The rest of the module is what
happens to a fault. A lost worker is replaced by a new one, up to `max_restarts` times in a row without a finished sample, and
the scheduler takes back what the old one had. After a step that a worker had no memory for, steps are halved; after a second
one the worker is replaced.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from tokabatch.arrays import Int32
from tokabatch.engine.executor import Executor
from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.errors import EngineError, ModelError, StepDropped, UsageError, WorkerLost
from tokabatch.forecast.step_log import Steps
from tokabatch.number_text import counted
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.step_times import Stopwatch
from tokabatch.scheduling.contracts import Completion, Requests
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits

FEW_RUNNING = 4096
"""The number of running samples up to which a small model's step may take less time than sending its result to the scheduler
and the next step back: one more step is kept in flight then."""
FAILED_STARTS = 2
"""The most attempts in a row to start a worker that reports why it cannot start."""


@dataclass(slots=True)
class ReplicaCounts:
    """The figures of a replica in the summary, besides the scheduler's counts."""

    host_seconds: float = 0.0
    """CPU seconds of the scheduler."""
    launch_seconds: float = 0.0
    """CPU seconds of the worker's launches."""
    restarts: Counter[str] = field(default_factory=Counter[str])
    """The number of lost workers, by cause."""
    dropped_steps: int = 0
    """The number of steps that did not fit in the device's memory."""


@dataclass(frozen=True, slots=True)
class Standing:
    """The state of a replica's work, as copies of its figures."""

    scheduled: SchedulerCounts
    counts: ReplicaCounts
    limits: SchedulerLimits
    running: int
    waiting: int
    """The numbers of samples that are running, and that are neither running nor finished."""
    used_pages: int
    tokens_left: int | None
    """The output tokens still expected, according to the lengths so far; None unless requested."""

    @classmethod
    def before(cls, limits: SchedulerLimits) -> Standing:
        """Return the standing before any work."""
        return cls(SchedulerCounts(), ReplicaCounts(), limits, 0, 0, 0, None)

    @property
    def kv_used(self) -> float:
        """The fraction of the KV pages in use."""
        return self.used_pages / self.limits.num_pages


def scheduler_limits(sizes: ReplicaSizes, stages: int = 1) -> SchedulerLimits:
    """Return the limits of the scheduler of a replica with these sizes, whose worker has `stages` pipeline stages."""
    return SchedulerLimits(
        page_size=sizes.page_size,
        num_pages=sizes.num_pages,
        max_running=sizes.max_running,
        max_step_tokens=sizes.max_step_tokens,
        max_pages_per_sequence=sizes.max_pages_per_sequence,
        grouping=GroupingLimits(sizes.min_group, sizes.min_prefix_pages) if sizes.min_group else None,
        stages=stages,
        alike=sizes.alike,
    )


class Replica:
    """Runs the scheduler's steps on workers that `make` creates; if `max_restarts` is None, lost workers are not replaced."""

    def __init__(
        self,
        scheduler: Scheduler,
        make: Callable[[], Executor],
        *,
        depth: int,
        depth_of_few: int | None = None,
        max_restarts: int | None = None,
        stop: Interruption | None = None,
        tell: Callable[[str], None] | None = None,
        name_row: Callable[[int], str] = "row {}".format,
        num_samples: int = 0,
        counts: ReplicaCounts | None = None,
        keeps_steps: bool = True,
    ) -> None:
        """At most `depth` steps are in flight, `depth_of_few` while few samples are running. `tell` is called with messages for
        the user, in which `name_row` names rows. `num_samples` is the number of samples to draw. `counts` are those of the
        replica that this one replaces."""
        self.scheduler = scheduler
        self.counts = counts or ReplicaCounts()
        self._make = make
        self._depth = depth
        self._depth_of_few = depth_of_few or depth
        self._max_restarts = max_restarts
        self._stop = stop or Interruption()
        self._tell = tell or (lambda text: None)
        self._name_row = name_row
        self._watch = Stopwatch(num_samples, keeps=keeps_steps)
        self._barren = 0
        """The number of workers lost since the last finished sample."""
        self._drops = 0
        """The number of steps that this worker has dropped."""
        self._executor: Executor | None = None
        self._making = threading.Lock()

    def run(self) -> Iterator[list[Completion]]:
        """Load the model and run steps until every sample is finished; yield the results of `start` and of each `step`."""
        yield self.start()
        while not self.scheduler.done:
            yield self.step()

    def start(self) -> list[Completion]:
        """Load the model. Return the samples that do not fit in its KV cache, as errors. Raises the error of the first worker
        if it cannot start, EngineError if no worker can be kept alive, and Stopped."""
        self._make_executor()
        return self._start_worker()

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[Completion]:
        """Have the next steps computed and take in the oldest one's result; returns the samples that it finished. To be called
        while the scheduler is not done. `meanwhile` is called once while the worker has steps to compute. Raises EngineError
        when no worker can be kept alive, ModelError when another one meets other files, and Stopped."""
        scheduler, watch, executor = self.scheduler, self._watch, self._executor
        assert executor is not None
        try:
            few = 0 < scheduler.num_running <= FEW_RUNNING
            while scheduler.num_in_flight < (self._depth_of_few if few else self._depth):
                began = time.thread_time()
                step = scheduler.schedule()
                self.counts.host_seconds += time.thread_time() - began
                if step is None:
                    break
                with self._stop.at_once():
                    executor.submit(step)
                watch.submitted(step, scheduler)
            if not scheduler.num_in_flight:
                raise EngineError("the scheduler has samples left but nothing to run; please report this with the job file")
            meanwhile()
            with self._stop.at_once():
                result = executor.collect()
            began = time.thread_time()
            completions = scheduler.apply(result)
            self.counts.host_seconds += time.thread_time() - began
            self.counts.launch_seconds += result.launch_seconds
            watch.collected(len(completions))
        except StepDropped as fault:
            completions = self._halve_steps(fault)
        except WorkerLost as fault:
            completions = self._replace_worker(fault)
        if completions:
            self._barren = 0
        return completions

    def extend(self, requests: Requests) -> list[Completion]:
        """See `Scheduler`."""
        if self.scheduler.done:
            # The time until now counts for no step.
            self._watch.restart()
        self._watch.num_samples += int(requests.num_samples().sum())
        return self.scheduler.extend(requests)

    def give_back(self, most: int) -> list[Requests]:
        """Remove and return at most `most` samples that were never admitted, the last ones of the plan, for another
        replica."""
        taken: list[Requests] = []
        while most > 0 and (requests := self.scheduler.give_back(most)) is not None:
            count = int(requests.num_samples().sum())
            self._watch.num_samples -= count
            most -= count
            taken.append(requests)
        return taken

    def withdraw(self, row: int, first: int = 0) -> Int32:
        """Remove the unfinished samples of a row from number `first` on, running ones included, and return their numbers,
        ascending."""
        samples = self.scheduler.cancel(row, first)
        self._watch.num_samples -= len(samples)
        return samples

    @property
    def waiting(self) -> int:
        """The number of samples that are neither running nor finished."""
        return self._watch.waiting(self.scheduler)

    def standing(self, *, foresee: bool = False) -> Standing:
        """Return the current standing, with `foresee` including the expected output tokens."""
        scheduler = self.scheduler
        waiting = self.waiting
        return Standing(
            replace(scheduler.counts),
            replace(self.counts, restarts=self.counts.restarts.copy()),
            scheduler.limits,
            scheduler.num_running,
            waiting,
            scheduler.kv.pool.num_used,
            scheduler.expected_tokens_left(waiting) if foresee else None,
        )

    def steps(self) -> Steps:
        """Return the steps whose results have arrived."""
        return self._watch.steps()

    def stop(self) -> list[Completion]:
        """Stop the work and return the finished samples that were not yielded yet."""
        return []

    def close(self) -> None:
        """End the worker. May be called from another thread, even while a worker is being created."""
        with self._making:
            if self._executor is not None:
                self._executor.close()

    def _start_worker(self) -> list[Completion]:
        """Load the model. Return the samples that do not fit in its KV cache, as errors."""
        assert self._executor is not None
        failures = 0
        while True:
            try:
                with self._stop.at_once():
                    self._executor.start()
            except WorkerLost as fault:
                failures += fault.cause == "failed"
                if failures >= FAILED_STARTS:
                    raise
                self._renew(fault, "it was being started")
            else:
                self._drops = 0
                self._watch.restart()
                return self.scheduler.settle_pages(self._executor.sizes.num_pages)

    def _halve_steps(self, fault: StepDropped) -> list[Completion]:
        """Drop the step and halve the limits of later steps; the steps in flight are computed again. At most once for each
        worker."""
        assert self._executor is not None
        self.counts.dropped_steps += 1
        self._drops += 1
        if self._drops > 1:
            remedy = "lower engine.kv_cache_tokens, engine.max_running or engine.max_step_tokens"
            return self._replace_worker(WorkerLost(f"{fault}, again; {remedy}", "out of memory"))
        self.scheduler.lost_device()
        self.scheduler.halve()
        self._watch.restart()
        limits = self.scheduler.limits
        self._tell(
            f"warning: {fault}. The run continues with steps of at most {counted(limits.max_step_tokens, 'token')} and "
            f"{counted(limits.max_running, 'sample')} (engine.max_step_tokens, engine.max_running)"
        )
        try:
            self._executor.resume()
        except WorkerLost as lost:
            return self._replace_worker(lost)
        return []

    def _replace_worker(self, fault: WorkerLost) -> list[Completion]:
        """Return the samples that are given up because they crashed their worker, as errors."""
        before = self.scheduler.counts.requeued
        completions = self.scheduler.lost_device(str(fault).splitlines()[0])
        for row in sorted({completion.row_index for completion in completions}):
            self._tell(
                f"warning: {self._name_row(row)} has killed the worker again, running alone: it becomes an error row "
                "(worker_crash)"
            )
        if completions:
            self._barren = 0
        requeued = self.scheduler.counts.requeued - before
        one, several = "running sample keeps its tokens and continues", "running samples keep their tokens and continue"
        kept = counted(requeued, one, several)
        self._renew(fault, kept)
        try:
            completions += self._start_worker()
        except UsageError as error:
            # The job could be started once: it is not the job that is wrong. The model's files may have been replaced since.
            kind = ModelError if isinstance(error, ModelError) else EngineError
            raise kind(f"{fault}\nNo other worker can be started: {error}") from error
        return completions

    def _renew(self, fault: WorkerLost, consequence: str) -> None:
        """Replace a lost worker by a new one, not started yet, and show a message. Raises if no further worker may be
        started."""
        self.close()
        self._stop.check()
        if self._max_restarts is None:
            raise fault
        self.counts.restarts[fault.cause] += 1
        self._barren += 1
        if self._barren > self._max_restarts:
            raise EngineError(
                f"{fault}\nThat was worker number {self._barren} without a sample finished in between "
                "(engine.max_restarts); giving up. What is finished is committed."
            ) from fault
        reason, *details = str(fault).splitlines()
        told = f"warning: {reason}. Starting another (restart {self.counts.restarts.total()}); {consequence}"
        self._tell("\n".join((told, *details)))
        self._make_executor()

    def _make_executor(self) -> None:
        with self._making:
            self._executor = self._make()
