"""One replica at work: steps go from the scheduler to the worker, results back, whatever happens to the worker meanwhile.

A lost worker is replaced by a new one, up to `max_restarts` times in a row without a finished sample, and the scheduler takes
back what the old one had. A worker without memory for a step is asked for smaller ones; a second time it is replaced.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tokabatch.engine.executor import Executor
from tokabatch.engine.sizing import ReplicaSizes
from tokabatch.errors import EngineError, ModelError, StepDropped, UsageError, WorkerLost
from tokabatch.interruption import Interruption
from tokabatch.messages import Completion, StepResult
from tokabatch.scheduling.kv.hydragen_groups import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.stopwatch import Stopwatch

FEW_RUNNING = 1024
"""Samples up to which a GPU's step is shorter than the way of its result to the scheduler and of the next step back: one step
more is kept in flight then."""
FAILED_STARTS = 2
"""A worker that says itself why it cannot start is not tried more often in a row."""


@dataclass(slots=True)
class ReplicaCounts:
    """What the summary tells of a replica beside the scheduler's counts."""

    host_seconds: float = 0.0
    """CPU time of the scheduler."""
    launch_seconds: float = 0.0
    """CPU time of the worker's launches."""
    restarts: Counter[str] = field(default_factory=Counter[str])
    """Workers lost, by cause."""
    dropped_steps: int = 0
    """Steps that the device had no memory for."""


def scheduler_limits(sizes: ReplicaSizes) -> SchedulerLimits:
    """What the scheduler of a replica of these sizes may use."""
    return SchedulerLimits(
        page_size=sizes.page_size,
        num_pages=sizes.num_pages,
        max_running=sizes.max_running,
        max_step_tokens=sizes.max_step_tokens,
        max_pages_per_sequence=sizes.max_pages_per_sequence,
        grouping=GroupingLimits(sizes.min_group, sizes.min_prefix_pages) if sizes.min_group else None,
    )


class Replica:
    """Runs the scheduler's work on workers that `make` makes. Without `max_restarts` a worker cannot be replaced."""

    def __init__(
        self,
        scheduler: Scheduler,
        make: Callable[[], Executor],
        *,
        depth: int,
        depth_of_few: int | None = None,
        counts: ReplicaCounts,
        max_restarts: int | None = None,
        stop: Interruption | None = None,
        tell: Callable[[str], None] | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        """`depth` steps are in flight at most, `depth_of_few` while few samples run; `tell` takes what a person should know,
        `watch` is told of every step."""
        self._scheduler = scheduler
        self._make = make
        self._depth = depth
        self._depth_of_few = depth_of_few or depth
        self._max_restarts = max_restarts
        self._stop = stop or Interruption()
        self._tell = tell or (lambda text: None)
        self._counts = counts
        self._watch = watch or Stopwatch(0)
        self._barren = 0
        """Workers lost since a sample was finished."""
        self._drops = 0
        """Steps that this worker has dropped."""
        self._executor = make()

    def start(self) -> list[Completion]:
        """Load the model; returns the samples that its KV cache does not hold, as errors. Raises what the worker raises,
        EngineError when none can be started, and Stopped."""
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
                return self._scheduler.settle_pages(self._executor.sizes.num_pages)

    def advance(self) -> list[Completion]:
        """Go on until the next result or fault; returns the samples that it finished. Raises Stopped while waiting, EngineError
        when no worker can be kept alive, and ModelError when another one meets other files."""
        try:
            result = self._next_result()
        except StepDropped as fault:
            return self._make_smaller(fault)
        except WorkerLost as fault:
            return self._replace_worker(fault)
        self._counts.launch_seconds += result.launch_seconds
        with self._scheduling():
            completions = self._scheduler.apply(result)
        self._watch.collected(len(completions))
        if completions:
            self._barren = 0
        return completions

    def close(self) -> None:
        self._executor.close()

    def _next_result(self) -> StepResult:
        """Keep `depth` steps in flight and wait for the oldest."""
        scheduler = self._scheduler
        while scheduler.num_in_flight < (self._depth_of_few if self._few_run() else self._depth):
            with self._scheduling():
                step = scheduler.schedule()
            if step is None:
                break
            with self._stop.at_once():
                self._executor.submit(step)
            self._watch.submitted(step, scheduler)
        if not scheduler.num_in_flight:
            raise EngineError("the scheduler has samples left but nothing to run; please report this with the job file")
        with self._stop.at_once():
            return self._executor.collect()

    def _few_run(self) -> bool:
        return 0 < len(self._scheduler.sequences.order) <= FEW_RUNNING

    def _make_smaller(self, fault: StepDropped) -> list[Completion]:
        """The step is dropped and the steps are halved; what was under way is computed again. Once for each worker."""
        self._counts.dropped_steps += 1
        self._drops += 1
        if self._drops > 1:
            remedy = "lower engine.kv_cache_tokens, engine.max_running or engine.max_step_tokens"
            return self._replace_worker(WorkerLost(f"{fault}, again; {remedy}", "out of memory"))
        scheduler = self._scheduler
        scheduler.lost_device()
        scheduler.halve()
        self._watch.restart()
        limits = scheduler.limits
        self._tell(
            f"{fault}. The run goes on with steps of at most {limits.max_step_tokens:,} tokens and {limits.max_running:,} "
            "samples (engine.max_step_tokens, engine.max_running)"
        )
        try:
            self._executor.resume()
        except WorkerLost as lost:
            return self._replace_worker(lost)
        return []

    def _replace_worker(self, fault: WorkerLost) -> list[Completion]:
        before = self._scheduler.counts.requeued
        completions = self._scheduler.lost_device(str(fault).splitlines()[0])
        for row in sorted({completion.row_index for completion in completions}):
            self._tell(f"row {row} has killed the worker again, running alone: it becomes an error row (worker_crash)")
        if completions:
            self._barren = 0
        self._renew(fault, f"{self._scheduler.counts.requeued - before:,} running samples keep their tokens and go on")
        try:
            completions += self.start()
        except UsageError as error:
            # The job could be started once: it is not the job that is wrong. The model's files may have been replaced since.
            kind = ModelError if isinstance(error, ModelError) else EngineError
            raise kind(f"{fault}\nNo other worker can be started: {error}") from error
        return completions

    def _renew(self, fault: WorkerLost, consequence: str) -> None:
        """Put a new worker, not yet started, in the place of a lost one. Raises where no other is to be started."""
        self._executor.close()
        self._note(fault, consequence)
        self._executor = self._make()

    def _note(self, fault: WorkerLost, consequence: str) -> None:
        """Count a lost worker, and say so. Raises where another is not to be started."""
        self._stop.check()
        if self._max_restarts is None:
            raise fault
        self._counts.restarts[fault.cause] += 1
        self._barren += 1
        if self._barren > self._max_restarts:
            raise EngineError(
                f"{fault}\nThat was worker number {self._barren} without a sample finished in between "
                "(engine.max_restarts); giving up. What is finished is committed."
            ) from fault
        reason, *details = str(fault).splitlines()
        self._tell(f"{reason}. Starting another (restart {self._counts.restarts.total()}); {consequence}")
        if details:
            self._tell("\n".join(details))

    @contextmanager
    def _scheduling(self) -> Generator[None]:
        """Counts the CPU time of what runs inside as the scheduler's."""
        begin = time.thread_time()
        yield
        self._counts.host_seconds += time.thread_time() - begin
