"""One run, from the job to the report. Read `run` and you have read the architecture.

job ─► start (rows, prompts, plan order; what is done already) ─► sizes ─► scheduler ⇄ executor ─► recorder (shards) ─► summary
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import torch

from tokabatch.attention import choose_backend
from tokabatch.costs.profile import Profile
from tokabatch.costs.trace import Steps, tail_seconds
from tokabatch.data.committed import read_committed
from tokabatch.data.folder import Claim, OutputFolder, check_output
from tokabatch.data.manifest import Books, mark_success, read_manifest, read_summary, write_summary
from tokabatch.data.steps import write_steps
from tokabatch.engine.executor import WORKER_NAME, Executor, InProcessExecutor, ProcessExecutor
from tokabatch.engine.heartbeat import Patience
from tokabatch.engine.sizing import ReplicaSizes, decide_sizes, page_bytes
from tokabatch.engine.warm_up import kinds_of_drawing
from tokabatch.engine.worker import TraceSpec, WorkerSpec
from tokabatch.errors import CommitError, EngineError, OutputError, Stopped, UsageError
from tokabatch.interruption import Interruption
from tokabatch.job import Job
from tokabatch.model.families import read_spec
from tokabatch.model.spec import tensor_shapes
from tokabatch.prediction import Scenario, predict_run, price_steps, profile_run
from tokabatch.preparation import Prepared, special_ids
from tokabatch.recorder import Recorder
from tokabatch.replica import Replica, ReplicaCounts
from tokabatch.report.outlook import Outlook
from tokabatch.report.progress import NullProgress, Phase, Progress, ProgressSnapshot
from tokabatch.report.summary import KvFacts, ModelFacts, PlanReport, RunSummary
from tokabatch.resumption import Reuse, Start, preview, start
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.grouping import GroupingLimits
from tokabatch.scheduling.scheduler import Scheduler, SchedulerLimits
from tokabatch.scheduling.stopping import StopRules, TokenText
from tokabatch.stopwatch import Stopwatch

SHOW_SECONDS = 0.1
EXIT_COMPLETE, EXIT_ERRORS, EXIT_BOOKS, EXIT_STOPPED = 0, 3, 4, 75


def run(
    job: Job,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | Interruption | None = None,
    *,
    overwrite: bool = False,
    retry_errors: bool = False,
) -> RunSummary:
    """Complete every row of the job's input and write the output folder; a run that the folder holds is continued.

    `overwrite` deletes it instead; `retry_errors` runs its error rows again. Raises UsageError before any weights load for a
    job that cannot work or is not the one whose run the folder holds, EngineError when the engine breaks. `should_stop` is
    asked between steps, an Interruption also breaks into waiting and loading; then what is finished is committed, and the
    summary has the exit code 130 or the Interruption's. While the input is still read there is nothing to commit: it ends in
    Stopped (a KeyboardInterrupt) and leaves the folder as it was.
    """
    _refuse_in_worker()
    clock, replica_counts, reuse = _Clock(progress or NullProgress()), ReplicaCounts(), Reuse(overwrite, retry_errors)
    stop = should_stop if isinstance(should_stop, Interruption) else Interruption(should_stop)
    with Claim(Path(job.output.path)) as claim, ExitStack() as workers:
        started = start(job, claim, partial(_reading, clock, stop), reuse, clock.progress.message, stop.at_once)
        prepared, recorder = started.prepared, Recorder(job, started.prepared, claim, started.committed)
        workers.callback(prepared.store.close)
        sizes = decide_sizes(job.engine, prepared.spec, prepared.dtype, prepared.workload(), prepared.device)
        scheduler = Scheduler(prepared.requests, _limits(sizes), _stop_rules(prepared))
        watch = Stopwatch(int(prepared.num_samples.sum()))
        try:
            exit_code = _record_failures(job, prepared, recorder, clock.progress)
            if exit_code == EXIT_COMPLETE and len(prepared.requests):
                make = _executors(job, prepared, sizes, clock.progress)
                exit_code = _complete(job, prepared, scheduler, make, recorder, clock, stop, replica_counts, workers, watch)
                _check_trace(job, scheduler.counts, clock.progress)
            clock.show("writing", prepared, scheduler, recorder)
            with claim.committing():
                books = mark_success(claim, recorder.finish(), prepared.samples_total)
            exit_code = exit_code or _judge(books, job)
        except CommitError as error:
            clock.progress.message(str(error))
            exit_code, committed = EXIT_STOPPED, read_committed(claim.folder, prepared.samples_of_row)
            recorder = Recorder(job, prepared, claim, committed)
        steps = watch.steps()
        summary = _summary(job, started, scheduler, replica_counts, recorder, clock, steps, exit_code)
        with suppress(OSError):
            # Where the disk is full the summary goes to the caller alone.
            write_summary(claim, summary.to_dict())
            write_steps(claim, steps.columns)
    return summary


def _refuse_in_worker() -> None:
    """A script that calls `run` where it stands calls it again in the worker's process, which imports the script."""
    if multiprocessing.current_process().name == WORKER_NAME:
        raise UsageError('a script must call tokabatch.run under `if __name__ == "__main__":`, for its worker imports it, too')


def plan(job: Job) -> PlanReport:
    """Check everything that can be checked without weights, and count. Writes nothing that stays. Raises UsageError."""
    with _planned(job) as (previewed, sizes):
        return _plan_report(job, previewed, sizes)


def plan_and_simulate(job: Job, scenario: Scenario) -> tuple[PlanReport, Outlook]:
    """The same, and the whole run simulated under a scenario. Raises UsageError for one that cannot be."""
    with _planned(job) as (previewed, sizes):
        outlook = predict_run(previewed.prepared, _limits(sizes), scenario)
        return _plan_report(job, previewed, sizes), outlook


def profile(out: Path, to: Path, device: str | None = None) -> Profile:
    """Fit a profile to the steps that a run recorded in its output folder; `device` as in `Scenario`. Raises UsageError."""
    folder = OutputFolder(out)
    manifest, summary = read_manifest(folder), read_summary(folder)
    if manifest is None:
        raise OutputError(f"{out}: no run has written here; give the folder that the job names as output.path")
    return profile_run(out, read_spec(Path(manifest.model_path)), to, device, int(summary.get("itemsize", 2)))


@contextmanager
def _planned(job: Job) -> Generator[tuple[Start, ReplicaSizes]]:
    check_output(Path(job.output.path))
    with tempfile.TemporaryDirectory(prefix="tokabatch-plan-") as scratch:
        previewed = preview(job, Path(scratch))
        prepared = previewed.prepared
        yield previewed, decide_sizes(job.engine, prepared.spec, prepared.dtype, prepared.workload(), prepared.device)
        prepared.store.close()


@dataclass(slots=True)
class _Clock:
    """Where the run stands in time, and the display of it."""

    progress: Progress
    begun: float = field(default_factory=time.perf_counter)
    load_seconds: float = 0.0
    shown_phase: Phase | None = None
    next_show: float = 0.0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def loaded(self) -> None:
        self.load_seconds = self.elapsed

    def reading(self, rows: int, errors: int) -> None:
        self.progress.update(ProgressSnapshot("reading", self.elapsed, rows_done=rows, errors=errors))

    def show(self, phase: Phase, prepared: Prepared, scheduler: Scheduler, recorder: Recorder) -> None:
        """Tell the display where the run stands, a few times a second at most."""
        if phase == self.shown_phase and self.elapsed < self.next_show:
            return
        self.shown_phase, self.next_show = phase, self.elapsed + SHOW_SECONDS
        counts, running = scheduler.counts, len(scheduler.sequences.order)
        left = int(prepared.num_samples.sum())
        waiting = max(0, left - counts.finished - running)
        self.progress.update(
            ProgressSnapshot(
                phase=phase,
                elapsed=self.elapsed,
                rows_done=prepared.store.num_rows - len(prepared.requests) + counts.finished_prompts,
                rows_total=prepared.store.num_rows,
                samples_done=prepared.samples_total - left + counts.finished,
                samples_total=prepared.samples_total,
                errors=recorder.num_errors,
                tokens_in=counts.prompt_tokens,
                tokens_out=counts.output_tokens,
                kv_used=scheduler.pool.num_used / scheduler.pool.num_pages,
                running=running,
                waiting=waiting,
                tokens_left=scheduler.expected_tokens_left(waiting),
            )
        )


def _reading(clock: _Clock, stop: Interruption, rows: int, errors: int) -> None:
    clock.reading(rows, errors)
    stop.check()


def _record_failures(job: Job, prepared: Prepared, recorder: Recorder, progress: Progress) -> int:
    """The rows that never became prompts; the run's exit code so far. Where the job stops at an error, it is the first one."""
    if not prepared.failures or job.errors.policy != "stop":
        recorder.fail(prepared.failures)
        return EXIT_COMPLETE
    first = prepared.failures[0]
    recorder.fail([first])
    why = f"row {first.row_index} is an error row ({first.error.code}: {first.error.message})"
    progress.message(f"errors.policy is stop: {why}. Run the same command again to go on behind it")
    return EXIT_STOPPED


def _judge(books: Books, job: Job) -> int:
    if not books.closed:
        return EXIT_BOOKS
    return EXIT_ERRORS if books.errors > job.errors.max_fraction * books.samples else EXIT_COMPLETE


def _complete(
    job: Job,
    prepared: Prepared,
    scheduler: Scheduler,
    make: Callable[[], Executor],
    recorder: Recorder,
    clock: _Clock,
    stop: Interruption,
    counts: ReplicaCounts,
    workers: ExitStack,
    watch: Stopwatch,
) -> int:
    """Load the model and step until every sample is finished; the run's exit code so far. The worker is closed with `workers`:
    what is finished is committed first, a GPU's process takes a second to end."""
    depth = job.engine.queue_depth
    replica = Replica(
        scheduler,
        make,
        depth=(2 if prepared.device == "cuda" else 1) if depth == "auto" else depth,
        counts=counts,
        max_restarts=job.engine.max_restarts if _runs_apart(job, prepared) else None,
        stop=stop,
        tell=clock.progress.message,
        watch=watch,
    )
    workers.callback(replica.close)
    clock.show("loading", prepared, scheduler, recorder)
    try:
        replica.start()
        clock.loaded()
        while not scheduler.done:
            completions = replica.advance()
            recorder.add(completions)
            clock.show("generating", prepared, scheduler, recorder)
            if asked := stop.poll():
                return asked
            if job.errors.policy == "stop" and any(c.error_code is not None for c in completions):
                return EXIT_STOPPED
    except Stopped as stopped:
        return stopped.exit_code
    except EngineError:
        recorder.finish()
        raise
    return EXIT_COMPLETE


def _runs_apart(job: Job, prepared: Prepared) -> bool:
    """Whether the worker has a process of its own: on a GPU, or when the job asks for it."""
    return prepared.device == "cuda" if job.engine.process == "auto" else job.engine.process


def _executors(job: Job, prepared: Prepared, sizes: ReplicaSizes, progress: Progress) -> Callable[[], Executor]:
    """What makes the replica's executor, and another where that one is lost."""
    backend = choose_backend(prepared.device, prepared.dtype)
    if prepared.device == "cuda" and backend == "torch_paged":
        progress.message(
            f"attention runs in plain torch, many times slower than FlashInfer's kernels: those need model.dtype bfloat16 or "
            f'float16 (it is {str(prepared.dtype).removeprefix("torch.")}) and `pip install -e ".[gpu]"`'
        )
    spec = WorkerSpec(
        folder=prepared.folder,
        spec=prepared.spec,
        dtype=prepared.dtype,
        device=prepared.device,
        backend=backend,
        sizes=sizes,
        fp8=job.model.quantization == "fp8",
        kv_dtype=torch.float8_e4m3fn if job.engine.kv_cache_dtype == "fp8" else None,
        draws=kinds_of_drawing(prepared.requests.sampling),
        trace=job.trace and TraceSpec(Path(job.trace.path), job.trace.start, job.trace.steps),
    )
    if _runs_apart(job, prepared):
        return partial(ProcessExecutor, spec, patience=Patience.of(job.engine.hang_seconds))
    return partial(InProcessExecutor, spec)


def _check_trace(job: Job, counts: SchedulerCounts, progress: Progress) -> None:
    if job.trace and counts.steps < job.trace.start:
        progress.message(
            f"nothing was traced: the run had {counts.steps} steps, and trace.start is {job.trace.start}; write less"
        )


def _limits(sizes: ReplicaSizes) -> SchedulerLimits:
    return SchedulerLimits(
        page_size=sizes.page_size,
        num_pages=sizes.num_pages,
        max_running=sizes.max_running,
        max_step_tokens=sizes.max_step_tokens,
        max_pages_per_sequence=sizes.max_pages_per_sequence,
        grouping=GroupingLimits(sizes.min_group, sizes.min_prefix_pages) if sizes.min_group else None,
    )


def _stop_rules(prepared: Prepared) -> StopRules:
    tokenizer, sampling = prepared.tokenizer, prepared.requests.sampling
    text = None
    if any(params.stop for params in sampling):
        text = TokenText(tokenizer.piece_texts(), tokenizer.decode_batch, special_ids(tokenizer))
    return StopRules(sampling, prepared.eos_token_ids, prepared.spec.vocab_size, text)


def _summary(
    job: Job,
    started: Start,
    scheduler: Scheduler,
    replica: ReplicaCounts,
    recorder: Recorder,
    clock: _Clock,
    steps: Steps,
    exit_code: int,
) -> RunSummary:
    prepared, counts, seconds = started.prepared, scheduler.counts, clock.elapsed
    predicted = _predicted(prepared, steps)
    return RunSummary(
        rows=prepared.store.num_rows,
        samples=prepared.samples_total,
        ok=recorder.num_ok,
        errors=recorder.num_errors,
        prompt_tokens=counts.prompt_tokens,
        cached_tokens=counts.cached_tokens,
        cacheable_tokens=prepared.sharing().saved_tokens,
        prefilled_tokens=counts.prefilled_tokens,
        output_tokens=counts.output_tokens,
        seconds=seconds,
        load_seconds=clock.load_seconds,
        steps=counts.steps,
        output_path=str(job.output.path),
        exit_code=exit_code,
        earlier=started.committed.samples,
        preemptions=counts.preemptions,
        recomputed_tokens=counts.recomputed_tokens,
        host_seconds=replica.host_seconds,
        restarts=tuple(sorted(replica.restarts.items())),
        requeued=counts.requeued,
        dropped_steps=replica.dropped_steps,
        launch_seconds=replica.launch_seconds,
        step_seconds=steps.seconds,
        tail_seconds=tail_seconds(steps),
        num_pages=scheduler.pool.num_pages,
        itemsize=prepared.dtype.itemsize,
        kv_use=steps.mean("pages") / scheduler.pool.num_pages,
        predicted_seconds=predicted[0] if predicted else None,
        predicted_by=predicted[1] if predicted else "",
        error_counts=tuple(sorted(recorder.error_counts.items())),
        pass_at_k=recorder.pass_at_k(),
        unverified=recorder.num_unverified,
        unverified_reasons=tuple(recorder.unverified_reasons),
    )


def _predicted(prepared: Prepared, steps: Steps) -> tuple[float, str] | None:
    """What a cost model says of the steps taken; None without steps, or on a device whose rates are not known."""
    try:
        return price_steps(prepared, steps) if len(steps) else None
    except UsageError:
        return None


def _plan_report(job: Job, previewed: Start, sizes: ReplicaSizes) -> PlanReport:
    prepared = previewed.prepared
    spec, store, sharing = prepared.spec, prepared.store, prepared.sharing()
    model = ModelFacts(
        path=str(prepared.folder),
        family=spec.family,
        parameters=sum(prod(shape) for shape in tensor_shapes(spec).values()),
        layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        dtype=str(prepared.dtype).removeprefix("torch."),
    )
    per_page = page_bytes(job.engine, spec, prepared.dtype)
    requests = prepared.requests
    limits = [params.max_tokens for params in requests.sampling]
    first = store.first_prompt_row
    ids = store.prompt(first).tolist() if first is not None else []
    return PlanReport(
        model=model,
        kv=KvFacts(per_page // sizes.page_size, sizes.page_size, sizes.num_pages),
        rows=store.num_rows,
        samples=prepared.samples_total,
        prompt_tokens=sharing.total_tokens,
        unique_tokens=sharing.unique_tokens,
        max_output_tokens=sum(limits[p] * int(n) for p, n in zip(requests.params, prepared.num_samples, strict=True)),
        longest_prompt=int(requests.length.max(initial=0)),
        first_prompt=prepared.tokenizer.decode_batch([ids], skip_special_tokens=False)[0],
        first_token_ids=tuple(ids),
        settings=prepared.settings,
        error_counts=prepared.error_counts,
        notes=_plan_notes(job, previewed),
    )


def _plan_notes(job: Job, previewed: Start) -> tuple[str, ...]:
    """What a person should know before running: what is there already, how the prompts were made, and the first fault of each
    kind."""
    prepared, done = previewed.prepared, previewed.committed.samples
    store = prepared.store
    left = prepared.samples_total - done
    notes = [f"{job.output.path} holds {done:,} of these samples; a run computes the other {left:,}"] if done else []
    notes += ["text prompts go through the tokenizer's chat template"] if store.chat else []
    if store.hidden_rows:
        notes.append(
            f"{store.hidden_rows:,} rows spell a special token in their text; it is encoded as plain text "
            "(prompt.special_tokens: allow takes it as the token)"
        )
    seen: set[str] = set()
    for failure in prepared.failures:
        if failure.error.code not in seen:
            seen.add(failure.error.code)
            notes.append(f"row {failure.row_index}: {failure.error.code}: {failure.error.message}")
    return tuple(notes)
