"""One run, from the job to the report. Read `run` and you have read the architecture.

job ─► start (rows, prompts, plan order; what is done already) ─► sizes ─► scheduler ⇄ executor ─► recorder (shards) ─► summary
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokabatch.engine.replica_sizes import ReplicaSizes
from tokabatch.errors import (
    EXIT_BOOKS,
    EXIT_COMPLETE,
    EXIT_ERRORS,
    EXIT_STALLED,
    EXIT_STOPPED,
    STOPS,
    CommitError,
    DamageError,
    OutputError,
    Stopped,
    TokabatchError,
    UsageError,
)
from tokabatch.forecast.cost_model import device_name, has_known_rates, price_steps, read_profile, size_replica
from tokabatch.forecast.profile import SavedProfile
from tokabatch.forecast.step_log import Steps, tail_seconds
from tokabatch.job import Job
from tokabatch.output.existing_results import read_committed
from tokabatch.output.folder import Claim
from tokabatch.output.joining import join_small
from tokabatch.output.leases import Leases
from tokabatch.output.manifest import Books, mark_success, read_summary, write_summary
from tokabatch.output.shards import shard_number
from tokabatch.output.steps import write_steps
from tokabatch.report.progress import ExpendableProgress, NullProgress, Phase, Progress, ProgressSnapshot
from tokabatch.report.run_estimates import read_estimates, read_estimator
from tokabatch.report.summary import RunSummary
from tokabatch.runner.fleet import Fleet
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.make_replica import make_replica
from tokabatch.runner.member import Cluster
from tokabatch.runner.recorder import Recorder
from tokabatch.runner.replica import Standing
from tokabatch.runner.resume import Reuse, Start, start
from tokabatch.runner.shared import Shared, close_shared, cut_earlier_run, join_as_last, start_shared
from tokabatch.runner.stopping_replica import StoppingReplica
from tokabatch.runner.supply import Supply
from tokabatch.scheduling.contracts import Completion
from tokabatch.storage.listing import is_there
from tokabatch.workload.open_model import pick_device


class Replicas(Protocol):
    """What does the steps of a run; see `Replica`."""

    def run(self) -> Iterator[list[Completion]]: ...
    def stop(self) -> list[Completion]: ...
    def standing(self, *, foresee: bool = False) -> Standing: ...
    def steps(self) -> Steps: ...
    def close(self) -> None: ...


MakeReplicas = Callable[[Job, Start, ReplicaSizes, Claim, Interruption, Progress, Supply | None], Replicas]


def run(
    job: Job | Mapping[str, Any] | str | Path,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | Interruption | None = None,
    *,
    overwrite: bool = False,
    retry_errors: bool = False,
    repair: bool = False,
    shared: Shared | None = None,
    make: MakeReplicas = make_replica,
    seconds_before: float = 0.0,
    cluster: Cluster | None = None,
) -> RunSummary:
    """Complete every row of the job's input and write the output folder; a run that the folder holds is continued.

    `job` may also be what `Job.load` takes: the path of a job file, or a mapping of the same shape.
    `overwrite` deletes it instead; `retry_errors` runs its error rows again; `repair` computes again what damaged files held,
    for which DamageError is raised otherwise. Raises UsageError before any weights load for a job that cannot work or is not
    the one whose run the folder holds, EngineError when the engine breaks. `should_stop` is asked between steps, an
    Interruption also breaks into waiting and loading; then what is finished is committed, and the summary has the exit code
    130 or the Interruption's. Where the folder takes no more it is 75, or 2 when the start before had to end so, too, and
    neither committed anything. While the input is still read there is nothing to commit: it ends in Stopped (a
    KeyboardInterrupt) and leaves the folder as it was.
    `shared`: others may write into the folder at the same time, each computing units of the plan. The run ends when all of them
    are complete or with others; what these have not committed is pending in the summary. `make` makes what does the steps.
    `seconds_before`: that the caller spent before; they count as loading.
    `cluster`: its hosts run the replicas; this process plans and is the only one that writes.
    """
    job = job if isinstance(job, Job) else Job.load(job)
    clock = _Clock(ExpendableProgress(progress or NullProgress()), time.perf_counter() - seconds_before)
    reuse = Reuse(overwrite, retry_errors, repair)
    stop = should_stop if isinstance(should_stop, Interruption) else Interruption(should_stop)
    profile, on_rows, tell = read_profile(job), partial(_reading, clock, stop), clock.progress.message
    if shared is not None:
        if reuse != Reuse():
            raise OutputError(
                "--shared only computes missing samples; use --overwrite, --retry-errors or --repair in a run without --shared"
            )
        job.refuse_sharing()
        # What is in the folder comes from units, which are divided between processes.
        job = job.model_copy(update={"engine": job.engine.model_copy(update={"process": True})})
        cut_earlier_run(job, shared, on_rows, tell, stop)
    layout = None
    if cluster is not None:
        if shared is not None:
            raise UsageError("on a cluster one process writes, and --shared is for several; give one of the two")
        layout = cluster.layout(job.engine, pick_device(job))
        # The layout of this host is none of the run's.
        job = job.model_copy(update={"engine": job.engine.model_copy(update={"process": True, "replicas": 1})})
        make = partial(make_replica, cluster=cluster)
    out = Path(job.output.path)
    with Claim(out) if shared is None else shared.claim(out, tell, stop) as claim, ExitStack() as workers:
        stalled, stalled_before = False, not overwrite and bool(_earlier_summary(claim).get("stalled"))
        leases, units = None, None
        if shared is None:
            started = start(job, claim, on_rows, reuse, tell, stop.at_once)
        else:
            leases = Leases(claim, shared.holder, shared.lease_seconds)
            workers.callback(leases.close)
            started, units = start_shared(job, claim, leases, shared, on_rows, tell, stop)
        if layout is not None:
            started = replace(started, left=replace(started.left, layout=layout))
        workload = started.left
        recorder = Recorder(job, workload, claim, started.committed, units=units, stops=started.stops)
        workers.callback(workload.store.close)
        workers.callback(recorder.close)
        sizes = size_replica(job, workload, profile)
        if profile is None and not has_known_rates(workload.device):
            clock.progress.message(
                f"the rates of {device_name(workload.device)} are not known: steps take up to {sizes.max_step_tokens:,} tokens "
                "and its time is not predicted. Fit a profile to this run (`tokabatch profile`) and name it "
                "as engine.profile"
            )
        supply = None
        if shared is not None and leases is not None and units is not None:
            supply = Supply(claim, started, units, leases, recorder, shared.first(units), tell)
        replica = make(job, started, sizes, claim, stop, clock.progress, supply)
        # Closed last: what is finished is committed first, a GPU's process takes a second to end.
        workers.callback(replica.close)
        parts = _Parts(job, started, replica, recorder, clock, stop, supply)
        complete = False
        try:
            exit_code = EXIT_COMPLETE if supply is not None else _record_failures(parts)
            if exit_code == EXIT_COMPLETE and (len(workload.requests) or (supply is not None and started.has_more)):
                exit_code = _generate(parts)
                if job.trace and (taken := _steps_of(replica, job.trace.replica)) < job.trace.start:
                    clock.progress.message(
                        f"nothing was traced: the run had {taken} steps, and trace.start is {job.trace.start}; write less"
                    )
            parts.show("writing")
            with claim.committing():
                books = _close_books(parts, claim)
            if not books.closed and started.stops is not None and (held := started.stops.num_held):
                clock.progress.message(
                    f"{held:,} finished samples stand behind others of their rows that are not judged: they are computed again"
                )
            complete = books.closed
            if books.closed:
                # Stopped or not: where nothing is missing there is nothing to run again for.
                exit_code = EXIT_ERRORS if books.errors > job.errors.max_fraction * books.samples else EXIT_COMPLETE
            elif supply is None:
                exit_code = exit_code or parts.stop.poll() or EXIT_BOOKS
            elif not exit_code:
                # The others complete it, or it is to be run again.
                exit_code = EXIT_STOPPED if supply.abandoned else EXIT_COMPLETE
            if supply is not None:
                parts = _recounted(parts, claim)
        except CommitError as error:
            clock.progress.message(str(error))
            replica.stop()
            with suppress(TokabatchError):
                recorder.finish(lambda: True)
            exit_code, parts = EXIT_STOPPED, _recounted(parts, claim)
            found = parts.recorder
            stalled = found.num_ok + found.num_errors + found.num_cancelled == started.committed.samples
            if stalled and stalled_before:
                exit_code = EXIT_STALLED
                clock.progress.message("the start before this one committed nothing either: fix that before the next start")
        except BaseException:
            # Whatever it is: what is finished is on disk before the caller hears of it.
            _commit_finished(parts)
            raise
        steps = replica.steps()
        summary = _summary(parts, steps, profile, exit_code, stalled=stalled)
        if summary.verifies and not summary.pending:
            found, how = read_estimates(claim.folder.path) or (), read_estimator(claim.folder.path)
            summary = replace(summary, estimates=found, estimator=how)
        with suppress(OSError, CommitError):
            # Where the disk is full, or another run writes, the summary goes to the caller alone.
            claim.check_lock()
            _write_record(claim, summary.to_dict(), steps)
        if supply is not None and complete:
            try:
                with claim.committing():
                    join_as_last(job, claim, workload, stop, tell)
            except CommitError as error:
                tell(str(error))
                if not is_there(claim.files, claim.folder.success):
                    # Every sample is there, and the next start says so.
                    summary = replace(summary, exit_code=EXIT_STOPPED)
    return summary


def _steps_of(replica: Replicas, number: int) -> int:
    """How many steps the replica of this number took."""
    return int(np.count_nonzero(replica.steps()["replica"] == number))


def _close_books(parts: _Parts, claim: Claim) -> Books:
    """Commit the rest, and where nothing is missing join the small shards and mark the run as complete."""
    shards, samples = parts.recorder.finish(parts.stop.poll), parts.started.left.samples_total
    if parts.supply is not None:
        return close_shared(claim, parts.started.left)
    if claim.journal is not None and sum(shard.rows for shard in shards) == samples:
        join_small(claim, parts.job.output.rows_per_shard, parts.stop.poll, parts.clock.progress.message)
        shards = tuple(
            sorted((shard for shard, _ in claim.journal.shards.values()), key=lambda shard: shard_number(shard.name))
        )
    return mark_success(claim, shards, samples)


def _recounted(parts: _Parts, claim: Claim) -> _Parts:
    """The same, counting what is in the folder."""
    workload, names = parts.started.left, claim.committed if parts.supply is None else None
    committed = read_committed(claim.folder, workload.samples_of_row, names=names)
    return replace(parts, recorder=Recorder(parts.job, workload, claim, committed))


def _write_record(claim: Claim, summary: dict[str, Any], steps: Steps) -> None:
    """Where nothing was left to do, the figures of the work are those of the start before."""
    earlier = _earlier_summary(claim)
    if earlier and not len(steps):
        told = ("rows", "samples", "ok", "errors", "cancelled", "exit_code", "stalled")
        write_summary(claim, {**earlier, **{name: summary[name] for name in told}})
        return
    write_summary(claim, summary)
    if len(steps) or not claim.folder.steps():
        write_steps(claim, steps.columns)


def _earlier_summary(claim: Claim) -> dict[str, Any]:
    """How the start before ended, as far as the folder says."""
    try:
        return read_summary(claim.folder)
    except DamageError:
        return {}


@dataclass(slots=True)
class _Clock:
    """Where the run stands in time, and the display of it."""

    progress: Progress
    begun: float
    load_seconds: float = 0.0
    shown_phase: Phase | None = None
    next_show: float = 0.0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def loaded(self) -> None:
        """The model is; what comes after the first time is not heard."""
        self.load_seconds = self.load_seconds or self.elapsed

    def is_due(self, phase: Phase) -> bool:
        """Whether the display takes a snapshot now: at each new phase, and as often as it can show one."""
        if self.progress.interval is None:
            return False
        return phase != self.shown_phase or self.elapsed >= self.next_show

    def shown(self, phase: Phase) -> None:
        """The next snapshot is due after an interval from now: what making this one took does not count."""
        self.shown_phase, self.next_show = phase, self.elapsed + (self.progress.interval or 0.0)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a run is made of while it goes on."""

    job: Job
    started: Start
    replica: Replicas
    recorder: Recorder
    clock: _Clock
    stop: Interruption
    supply: Supply | None = None
    """Where others write, too: what gives this run its work."""

    def show(self, phase: Phase) -> None:
        """Tell the display where the run stands, if that is due."""
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
                errors=self.recorder.num_errors,
                tokens_in=counts.prompt_tokens,
                tokens_out=counts.output_tokens,
                kv_used=standing.kv_used,
                running=standing.running,
                waiting=standing.waiting,
                tokens_left=standing.tokens_left,
            )
        )
        self.clock.shown(phase)


def _reading(clock: _Clock, stop: Interruption, rows: int, errors: int) -> None:
    clock.progress.update(ProgressSnapshot("reading", clock.elapsed, rows_done=rows, errors=errors))
    stop.check()


def _record_failures(parts: _Parts) -> int:
    """The rows that never became prompts; the run's exit code so far. Where the job stops at an error, it is the first one."""
    failures = parts.started.left.failures
    parts.recorder.fail(parts.started.cancelled)
    if not failures or parts.job.errors.policy != "stop":
        parts.recorder.fail(failures)
        return EXIT_COMPLETE
    first = failures[0]
    parts.recorder.fail([first])
    why = f"row {first.row_index} is an error row ({first.error.code}: {first.error.message})"
    last = len(failures) == 1 and not len(parts.started.left.requests)
    then = "It was the last one missing" if last else "Run the same command again to continue after it"
    parts.clock.progress.message(f"errors.policy is stop: {why}. {then}")
    return EXIT_STOPPED


def _commit_finished(parts: _Parts) -> None:
    """Commit what is finished after an exception; where that fails, too, say so and let the first one be heard."""
    try:
        parts.recorder.finish(lambda: True)
    except STOPS:
        raise
    except BaseException as error:
        parts.clock.progress.message(f"the last finished samples are not committed and will be computed again: {error}")


def _generate(parts: _Parts) -> int:
    """Record what the replica finishes until all is done, or the run is to stop; the run's exit code so far."""
    recorder, unwritable = parts.recorder, parts.recorder.num_unwritable
    parts.show("loading")
    try:
        for completions in parts.replica.run():
            parts.clock.loaded()
            recorder.add(completions)
            if parts.started.stops is not None and isinstance(parts.replica, StoppingReplica | Fleet):
                parts.replica.follow(parts.started.stops.take_changes())
            parts.show("generating")
            exit_code = parts.stop.poll()
            failed = recorder.took_error or recorder.num_unwritable > unwritable
            if parts.job.errors.policy == "stop" and failed:
                exit_code = exit_code or EXIT_STOPPED
            if exit_code:
                break
        else:
            return EXIT_COMPLETE
    except Stopped as stopped:
        exit_code = stopped.exit_code
    recorder.add(parts.replica.stop())
    return exit_code


def _summary(parts: _Parts, steps: Steps, profile: SavedProfile | None, exit_code: int, *, stalled: bool) -> RunSummary:
    seconds, workload, recorder = parts.clock.elapsed, parts.started.left, parts.recorder
    standing = parts.replica.standing()
    counts, replica, limits = standing.scheduled, standing.counts, standing.limits
    shares = parts.replica.shares() if isinstance(parts.replica, Fleet) else ()
    # Times of all replicas, told of one.
    num = max(1, len(shares))
    predicted: tuple[float, str] | None = None
    with suppress(UsageError):  # on a device whose rates are not known
        predicted = price_steps(workload, steps, profile) if len(steps) else None
    return RunSummary(
        rows=workload.store.num_rows,
        samples=workload.samples_total,
        ok=recorder.num_ok,
        errors=recorder.num_errors,
        cancelled=recorder.num_cancelled,
        prompt_tokens=counts.prompt_tokens,
        cached_tokens=counts.cached_tokens,
        cacheable_tokens=workload.sharing().saved_tokens,
        prefilled_tokens=counts.prefilled_tokens,
        output_tokens=counts.output_tokens,
        seconds=seconds,
        load_seconds=parts.clock.load_seconds,
        steps=counts.steps,
        output_path=str(parts.job.output.path),
        exit_code=exit_code,
        layout=str(workload.layout),
        stalled=stalled,
        earlier=parts.started.committed.samples,
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
        error_counts=tuple(sorted(recorder.error_counts.items())),
        verifies=parts.job.verify is not None,
        unverified=recorder.num_unverified,
        unverified_reasons=recorder.unverified_reasons,
    )
