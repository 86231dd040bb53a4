"""One run, from the job to the summary. The function `run` shows the architecture.

job ─► start (rows, prompts, plan order; what is done already) ─► sizes ─► scheduler ⇄ executor ─► recorder (shards) ─► summary
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

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
    Stopped,
    TokabatchError,
    UsageError,
)
from tokabatch.forecast.cost_model import device_name, has_known_rates, read_profile, size_replica
from tokabatch.forecast.profile import SavedProfile
from tokabatch.forecast.step_log import Steps
from tokabatch.job import Job
from tokabatch.number_text import counted
from tokabatch.output.claim import Claim
from tokabatch.output.excerpts import finish_reasons
from tokabatch.output.existing_results import read_committed
from tokabatch.output.folder import OutputFolder
from tokabatch.output.joining import join_small
from tokabatch.output.leases import Leases
from tokabatch.output.manifest import Books, mark_success, read_summary, write_summary
from tokabatch.output.shards import claimed_shards
from tokabatch.output.steps import write_steps
from tokabatch.parallel.layout import Layout
from tokabatch.report.progress import ExpendableProgress, Progress, ProgressSnapshot, default_progress
from tokabatch.report.run_estimates import read_estimates, read_estimator
from tokabatch.report.summary import RunSummary
from tokabatch.runner.fleet import Fleet
from tokabatch.runner.fork_server import ForkServer
from tokabatch.runner.forked import can_fork
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.make_replica import make_replica
from tokabatch.runner.member import Cluster
from tokabatch.runner.preparers import num_preparers
from tokabatch.runner.recorder import Recorder, Tally
from tokabatch.runner.resume import OnRows, Start, start
from tokabatch.runner.reuse import Reuse
from tokabatch.runner.run_state import Clock, Replicas, RunState, summarise
from tokabatch.runner.shared import ONE_WRITER, Shared, close_shared, cut_earlier_run, join_as_last, start_shared
from tokabatch.runner.stopping_replica import StoppingReplica
from tokabatch.runner.supply import Supply
from tokabatch.storage.listing import is_there
from tokabatch.storage.write_errors import is_full, reason
from tokabatch.workload.open_model import pick_device

OF_THE_WORK = frozenset({"this_start", "output_path"})
"""What a summary keeps of the start that did the work, when a later one finds nothing to compute."""

MakeReplicas = Callable[[Job, Start, ReplicaSizes, Claim, Interruption, Progress, Supply | None], Replicas]


def run(
    job: Job,
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
    fresh: bool = False,
) -> RunSummary:
    """As `tokabatch.run`. `make` creates what runs the steps; `seconds_before` is what the caller has spent; it counts as
    loading. `fresh` says that this process has imported torch only now. Raises UsageError and EngineError."""
    with ExitStack() as held:
        if fresh and cluster is None and make is make_replica and (server := ForkServer.if_possible()) is not None:
            held.callback(server.close)
            make = partial(make_replica, starter=server.process)
        clock = Clock(ExpendableProgress(progress or default_progress()), time.perf_counter() - seconds_before)
        reuse = Reuse(overwrite, retry_errors, repair)
        stop = should_stop if isinstance(should_stop, Interruption) else Interruption(should_stop)
        profile, on_rows, tell = read_profile(job), partial(_reading, clock, stop), clock.progress.message
        if cluster is not None and shared is not None:
            raise UsageError(ONE_WRITER)
        if shared is not None:
            reuse.refuse_sharing()
            job.refuse_sharing()
            # What is in the folder comes from units, which are divided between processes.
            job = job.model_copy(update={"engine": job.engine.model_copy(update={"process": True})})
            cut_earlier_run(job, shared, on_rows, tell, stop)
        layout = None
        if cluster is not None:
            layout = cluster.layout(job.engine, pick_device(job))
            # The layout of this host is none of the run's.
            job = job.model_copy(update={"engine": job.engine.model_copy(update={"process": True, "replicas": 1})})
            make = partial(make_replica, cluster=cluster)
        out = Path(job.output.path)
        claim = held.enter_context(Claim(out) if shared is None else shared.claim(out, tell, stop))
        return _run_in_folder(job, claim, clock, stop, profile, reuse, shared, make, layout)


def _run_in_folder(
    job: Job,
    claim: Claim,
    clock: Clock,
    stop: Interruption,
    profile: SavedProfile | None,
    reuse: Reuse,
    shared: Shared | None,
    make: MakeReplicas,
    layout: Layout | None,
) -> RunSummary:
    """As `run`. When it returns, no file of the folder is open or mapped, so that the claim can remove files on NFS as well,
    where removing a file in use only renames it."""
    on_rows, tell = partial(_reading, clock, stop), clock.progress.message
    with ExitStack() as workers:
        stalled, before = False, {} if reuse.overwrite else _earlier_summary(claim)
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
        recorder = Recorder(
            job,
            workload,
            claim,
            started.committed,
            units=units,
            stops=started.stops,
            processes=num_preparers(job, workload.layout.replicas) if can_fork() else 0,
            tell=tell,
        )
        workers.callback(workload.store.close)
        workers.callback(recorder.close)
        sizes = size_replica(job, workload, profile)
        if profile is None and not has_known_rates(workload.device):
            tell(
                f"the rates of {device_name(workload.device)} are not known: steps take up to "
                f"{counted(sizes.max_step_tokens, 'token')} and their time is not predicted. Fit a profile to this run "
                "(`tokabatch profile`) and name it as engine.profile"
            )
        supply = None
        if shared is not None and leases is not None and units is not None:
            supply = Supply(claim, started, units, leases, recorder, shared.first(units), tell)
        replica = make(job, started, sizes, claim, stop, clock.progress, supply)
        # Closed last: what is finished is committed first, a GPU's process takes a second to end.
        workers.callback(replica.close)
        state = RunState(job, started, replica, recorder, clock, stop, supply)
        complete = False
        try:
            exit_code, complete = _complete(state, claim, leases, on_rows)
            tally = recorder.tally if supply is None else _tally(state, claim)
        except CommitError as error:
            replica.stop()
            exit_code = EXIT_STOPPED
            with suppress(OSError, TokabatchError):
                recorder.finish(lambda: False)
                # Where only joining small files took more room than there was, the run is complete. Some may be joined.
                is_full_disk = isinstance(error.__cause__, OSError) and is_full(error.__cause__)
                shards = claimed_shards(claim) if is_full_disk and supply is None else ()
                if shards and (books := mark_success(claim, shards, started.left.samples_total)).closed:
                    exit_code, complete = _exit_code(books, job.errors.max_fraction, 0, None), True
            tell(_describe_unjoined(error) if complete else f"error: {error}")
            tally = _tally(state, claim)
            stalled = not complete and tally.ok + tally.errors + tally.cancelled == started.committed.samples
            if stalled and before.get("stalled"):
                exit_code = EXIT_STALLED
                tell("error: the previous start committed nothing either: fix the cause before you start it again")
        except BaseException:
            # Whatever it is: what is finished is on disk before the caller hears of it.
            _commit_finished(state)
            raise
        if exit_code == EXIT_COMPLETE and complete and 0 < tally.ok <= tally.unverified:
            # No judge has worked, which a script would take for samples that are all wrong.
            exit_code = EXIT_ERRORS
        steps = replica.steps()
        summary = _summary(claim.folder, summarise(state, tally, steps, profile, exit_code, stalled=stalled), tell)
        # A start that is killed has removed the summary and leaves none.
        has_steps = before.get("steps_of_all_starts", True) if before else not started.committed.samples
        summary = replace(summary, steps_of_all_starts=has_steps)
        with suppress(OSError, CommitError):
            # Where the disk is full, or another run writes, the summary goes to the caller alone.
            claim.check_lock()
            # Unless another has completed the run since this one closed its books.
            if supply is None or complete or not is_there(claim.files, claim.folder.success):
                _write_record(claim, summary.to_dict(), steps)
        if supply is not None:
            try:
                with claim.committing():
                    join_as_last(job, claim, workload, stop, tell)
            except CommitError as error:
                tell(f"error: {error}")
                if complete and not is_there(claim.files, claim.folder.success):
                    # Every sample is there, and the next start says so.
                    summary = replace(summary, exit_code=EXIT_STOPPED)
    return summary


def _complete(state: RunState, claim: Claim, leases: Leases | None, on_rows: OnRows) -> tuple[int, bool]:
    """Compute what is left and commit it. Return the exit code, and whether the run is complete. Raises CommitError."""
    job, started, supply, tell = state.job, state.started, state.supply, state.clock.progress.message
    exit_code = EXIT_COMPLETE if supply is not None else _record_failures(state)
    if exit_code == EXIT_COMPLETE and (len(started.left.requests) or (supply is not None and started.has_more)):
        exit_code = _generate(state)
        if job.trace and (taken := np.count_nonzero(state.replica.steps()["replica"] == job.trace.replica)) < job.trace.start:
            tell(
                f"warning: nothing was traced: the run had {counted(int(taken), 'step')}, and trace.start is "
                f"{job.trace.start}; write less"
            )
    state.show("writing")
    with claim.committing():
        books = _close_books(state, claim, leases, on_rows)
    if not books.closed and started.stops is not None and (held := started.stops.num_held):
        tell(f"{counted(held, 'finished sample')} will be computed again: earlier samples of the same row are not judged yet")
    if books.unjudged:
        tell(
            f"{counted(books.unjudged, 'finished sample is', 'finished samples are')} not judged yet, and nothing is estimated "
            "before: the same command judges what is left"
        )
    stopped = exit_code or (0 if books.closed else state.stop.poll())
    abandoned = None if supply is None else supply.abandoned
    return _exit_code(books, job.errors.max_fraction, stopped, abandoned), books.closed


def _describe_unjoined(error: CommitError) -> str:
    why = f": {reason(error.__cause__)}" if isinstance(error.__cause__, OSError) else ""
    return f"every sample is committed and the run is complete; small files may be left that are not joined{why}"


def _summary(folder: OutputFolder, summary: RunSummary, tell: Callable[[str], None]) -> RunSummary:
    """Return the summary, with what the output folder says of the finished samples."""
    with suppress(OSError, UsageError):
        summary = replace(summary, finish_reasons=tuple(sorted(finish_reasons(folder).items())))
    if summary.verifies and not summary.pending:
        try:
            summary = replace(summary, estimates=read_estimates(folder) or (), estimator=read_estimator(folder))
        except Exception as error:
            tell(f"warning: nothing is estimated of the verdicts, which are committed: {error}")
    return summary


def _exit_code(books: Books, max_fraction: float, stopped: int, abandoned: bool | None) -> int:
    """Return the exit code of a run that was `stopped` with a code or, if that is 0, had nothing left to do. `abandoned` is
    whether units are left that other writers took over and have not completed; None if there are no other writers."""
    if books.closed:
        # Stopped or not: where nothing is missing there is nothing to run again for.
        return EXIT_ERRORS if books.errors > max_fraction * books.samples else EXIT_COMPLETE
    if stopped:
        return stopped
    if abandoned is None:
        return EXIT_STOPPED if books.unjudged and not books.pending else EXIT_BOOKS
    # The others complete it. But if only verdicts are missing, there may be no other left to add them.
    return EXIT_STOPPED if abandoned or (books.unjudged and not books.pending) else EXIT_COMPLETE


def _close_books(state: RunState, claim: Claim, leases: Leases | None, on_rows: OnRows) -> Books:
    """Commit the rest and, if no sample is missing, join the small shards and mark the run as complete."""
    shards, samples = state.recorder.finish(state.goes_on), state.started.left.samples_total
    if leases is not None:
        return close_shared(state.job, claim, leases, state.started.left, state.stop, state.clock.progress.message, on_rows)
    if claim.journal is not None and Books.of(samples, shards).closed:
        join_small(claim, state.job.output.rows_per_shard, state.stop.poll, state.clock.progress.message)
        shards = claimed_shards(claim)
    return mark_success(claim, shards, samples)


def _tally(state: RunState, claim: Claim) -> Tally:
    """Return the tally of what is in the folder."""
    names = claim.committed if state.supply is None else None
    return Tally.of(read_committed(claim.folder, state.started.left.samples_of_row, names=names))


def _write_record(claim: Claim, summary: dict[str, Any], steps: Steps) -> None:
    """Write the summary and the steps. If nothing was left to compute, keep the figures of the previous start's work."""
    earlier = _earlier_summary(claim)
    if earlier and not len(steps):
        write_summary(claim, {**earlier, **{name: summary[name] for name in summary.keys() - OF_THE_WORK}})
        return
    if len(steps) or not claim.folder.steps():
        write_steps(claim, steps.columns)
    # Last: it says whether the steps are there.
    write_summary(claim, summary)


def _earlier_summary(claim: Claim) -> dict[str, Any]:
    """Return how the previous start ended, according to the folder."""
    try:
        return read_summary(claim.folder)
    except DamageError:
        return {}


def _reading(clock: Clock, stop: Interruption, rows: int, errors: int) -> None:
    clock.progress.update(ProgressSnapshot("reading", clock.elapsed, rows_done=rows, errors=errors))
    stop.check()


def _record_failures(state: RunState) -> int:
    """Record the rows that never became prompts, up to the first one if the job stops at errors, and return the exit code so
    far."""
    failures = state.started.left.failures
    state.recorder.fail(state.started.cancelled)
    if not failures or state.job.errors.policy != "stop":
        state.recorder.fail(failures)
        return EXIT_COMPLETE
    first = failures[0]
    state.recorder.fail([first])
    why = f"row {first.row_index} is an error row ({first.error.code}: {first.error.message})"
    last = len(failures) == 1 and not len(state.started.left.requests)
    then = "It was the last one missing" if last else "Run the same command again to continue after it"
    state.clock.progress.message(f"error: {why}, and errors.policy is stop. {then}")
    return EXIT_STOPPED


def _commit_finished(state: RunState) -> None:
    """Commit finished samples after an exception. If that fails as well, show a message and keep the first exception."""
    try:
        state.recorder.finish(lambda: False)
    except STOPS:
        raise
    except BaseException as error:
        state.clock.progress.message(
            f"warning: the last finished samples are not committed and will be computed again: {error}"
        )


def _generate(state: RunState) -> int:
    """Record the finished samples of the replica until none is left or the run is stopped, and return the exit code so far."""
    recorder, unwritable = state.recorder, state.recorder.tally.unwritable
    state.show("loading")
    try:
        for completions in state.replica.run():
            state.clock.loaded()
            recorder.add(completions, state.goes_on)
            if state.started.stops is not None and isinstance(state.replica, StoppingReplica | Fleet):
                state.replica.follow(state.started.stops.take_changes())
            state.show("generating")
            exit_code = state.stop.poll()
            failed = recorder.took_error or recorder.tally.unwritable > unwritable
            if state.job.errors.policy == "stop" and failed:
                exit_code = exit_code or EXIT_STOPPED
            if exit_code:
                break
        else:
            return EXIT_COMPLETE
    except Stopped as stopped:
        exit_code = stopped.exit_code
    recorder.add(state.replica.stop(), state.goes_on)
    return exit_code
