"""The state of a run in progress, and what is shown of it: snapshots for the display, and the summary at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from tokabatch.errors import UsageError
from tokabatch.forecast.cost_model import device_name, price_steps
from tokabatch.forecast.profile import SavedProfile
from tokabatch.forecast.step_log import Steps, tail_seconds
from tokabatch.job import Job
from tokabatch.report.progress import Phase, Progress, ProgressSnapshot
from tokabatch.report.summary import RunSummary
from tokabatch.runner.fleet import Fleet
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.recorder import Recorder, Tally
from tokabatch.runner.replica import Standing
from tokabatch.runner.resume import Start
from tokabatch.runner.supply import Supply
from tokabatch.scheduling.completion_batch import Completions


class Replicas(Protocol):
    """Runs the steps of a run; see `Replica`."""

    def run(self) -> Iterator[Completions]: ...
    def stop(self) -> Completions: ...
    def standing(self, *, foresee: bool = False) -> Standing: ...
    def steps(self) -> Steps: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Clock:
    """The phase of a run, its times, and when the display is updated."""

    progress: Progress
    begun: float
    load_seconds: float = 0.0
    shown_phase: Phase | None = None
    next_show: float = 0.0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def loaded(self) -> None:
        """Record that the model is loaded; further calls have no effect."""
        self.load_seconds = self.load_seconds or self.elapsed

    def is_due(self, phase: Phase) -> bool:
        """Return whether the display should be updated now: at each new phase, and then at its own interval."""
        if self.progress.interval is None:
            return False
        return phase != self.shown_phase or self.elapsed >= self.next_show

    def shown(self, phase: Phase) -> None:
        """Record that a snapshot has been made; the interval to the next one begins now."""
        self.shown_phase, self.next_show = phase, self.elapsed + (self.progress.interval or 0.0)


@dataclass(frozen=True, slots=True)
class RunState:
    """The parts of a run in progress."""

    job: Job
    started: Start
    replica: Replicas
    recorder: Recorder
    clock: Clock
    stop: Interruption
    supply: Supply | None
    """The source of work if other processes write to the folder as well."""

    def goes_on(self) -> bool:
        """Update the display and renew leases; call this while the run is waiting. Return False if the run should stop."""
        if self.supply is not None:
            self.supply.sign()
        self.show(self.clock.shown_phase or "generating")
        return not self.stop.poll()

    def show(self, phase: Phase) -> None:
        """Update the display if that is due."""
        if not self.clock.is_due(phase):
            return
        workload, standing = self.started.left, self.replica.standing(foresee=True)
        counts = standing.scheduled
        left = int(workload.num_samples.sum())
        self.clock.progress.update(
            ProgressSnapshot(
                phase=phase,
                elapsed=self.clock.elapsed,
                rows_done=workload.store.num_rows - len(workload.requests) + counts.finished_prompts,
                rows_total=workload.store.num_rows,
                samples_done=workload.samples_total - left + counts.finished,
                samples_total=workload.samples_total,
                errors=self.recorder.tally.errors,
                tokens_in=counts.prefilled_tokens,
                tokens_out=counts.output_tokens,
                kv_used=standing.kv_used,
                running=standing.running,
                waiting=standing.waiting,
                tokens_left=standing.tokens_left,
            )
        )
        self.clock.shown(phase)


def summarise(
    state: RunState, tally: Tally, steps: Steps, profile: SavedProfile | None, exit_code: int, *, stalled: bool
) -> RunSummary:
    """Return the figures of a run that has ended with this exit code and tally."""
    seconds, workload = state.clock.elapsed, state.started.left
    standing = state.replica.standing()
    counts, replica, limits = standing.scheduled, standing.counts, standing.limits
    shares = state.replica.shares() if isinstance(state.replica, Fleet) else ()
    # Times of all replicas, told of one.
    num = max(1, len(shares))
    predicted: tuple[float, str] | None = None
    with suppress(UsageError):  # on a device whose rates are not known
        predicted = price_steps(workload, steps, profile) if len(steps) else None
    return RunSummary(
        rows=workload.store.num_rows,
        samples=workload.samples_total,
        ok=tally.ok,
        errors=tally.errors,
        cancelled=tally.cancelled,
        prompt_tokens=counts.prompt_tokens,
        cached_tokens=counts.cached_tokens,
        cacheable_tokens=workload.sharing().saved_tokens,
        prefilled_tokens=counts.prefilled_tokens,
        output_tokens=counts.output_tokens,
        # Not known of a tally made of what is in the folder.
        kept_tokens=tally.output_tokens if tally is state.recorder.tally else None,
        seconds=seconds,
        load_seconds=state.clock.load_seconds,
        steps=counts.steps,
        output_path=str(state.job.output.path),
        exit_code=exit_code,
        layout=str(workload.layout),
        stalled=stalled,
        earlier=state.started.committed.samples,
        preemptions=counts.preemptions,
        recomputed_tokens=counts.recomputed_tokens,
        waited_steps=counts.waited_steps,
        max_running=limits.max_running,
        max_step_tokens=limits.max_step_tokens,
        host_seconds=replica.host_seconds,
        restarts=tuple(sorted(replica.restarts.items())),
        requeued=counts.requeued,
        dropped_steps=replica.dropped_steps,
        launch_seconds=replica.launch_seconds,
        step_seconds=steps.seconds / num,
        tail_seconds=tail_seconds(steps) / num,
        num_pages=limits.num_pages,
        device=device_name(workload.device),
        itemsize=workload.dtype.itemsize,
        kv_use=steps.mean("pages") / max(steps.mean("capacity"), 1.0),
        replicas=shares if num > 1 else (),
        predicted_seconds=predicted[0] / num if predicted else None,
        predicted_by=predicted[1] if predicted else "",
        error_counts=tuple(sorted(tally.error_counts.items())),
        verifies=state.job.verify is not None,
        stops_rows=state.job.verify is not None and state.job.verify.stop is not None,
        unverified=tally.unverified,
        unverified_reasons=tally.unverified_reasons,
        notes=workload.notes,
    )
