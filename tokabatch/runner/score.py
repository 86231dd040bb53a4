"""Judge what a run has computed again, perhaps by another judge: no sampling, no model, no input.

The shards carry their samples' texts and the columns of their rows. Each is replaced as a whole by one with the new verdicts,
which names its judge in its metadata: interrupted at any point, the folder holds the same samples, and the same command
completes the work. The manifest names the new judge before the first file changes, so that no run continues with verdicts of
two kinds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokabatch.errors import EXIT_COMPLETE, EXIT_ERRORS, EXIT_STOPPED, JobError, OutputError, Stopped
from tokabatch.input.files.arrow_rows import python_rows
from tokabatch.input.fingerprint import is_of_verify, verify_section, verify_settings
from tokabatch.input.store.json_types import parse_json_texts
from tokabatch.job import Job
from tokabatch.number_text import counted
from tokabatch.output.claim import Claim
from tokabatch.output.existing_results import replace_shard
from tokabatch.output.export_target import check_target
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import Inspection, inspect, recorded_shards
from tokabatch.output.manifest import (
    VERIFIER_KEY,
    Books,
    Manifest,
    mark_success,
    read_manifest,
    read_summary,
    write_manifest,
    write_summary,
)
from tokabatch.output.remedy import begin_record, refuse_faults, refuse_unrecorded
from tokabatch.output.schema import (
    SAMPLE_SCHEMA,
    row_names,
    verdict_fields,
    verdict_names,
)
from tokabatch.output.shards import (
    PARQUET_OPTIONS,
    claimed_shards,
    count_ok,
    count_without_verdict,
    open_shard,
)
from tokabatch.output.status import read_status
from tokabatch.report.progress import NullProgress, Progress, ProgressSnapshot
from tokabatch.report.run_estimates import read_estimates, read_estimator
from tokabatch.runner.interruption import Interruption
from tokabatch.runner.judge_again import Which, judge_again, num_lacking
from tokabatch.runner.judging_job import job_to_judge, manifest_to_judge
from tokabatch.scheduling.contracts import NOT_JUDGED
from tokabatch.scoring.estimates import Estimate
from tokabatch.scoring.pool import JudgePool, open_pool
from tokabatch.storage.atomic_files import DurableFiles, write_whole
from tokabatch.storage.listing import ListedFile, consistently
from tokabatch.storage.write_errors import unwritable

_LIMITS = ("verify.processes=", "verify.seconds=", "verify.memory_bytes=", "verify.allow_code_execution=")
"""Overrides on which no verdict depends, or none that is given."""
_UNTOUCHED = "stopped before the first verdict: the folder is as it was"


@dataclass(frozen=True, slots=True)
class Scored:
    """The result: the numbers of `judged` samples and `files`; `reasons` counts why samples have no verdict. `done` of the
    run's `samples` exist, and `estimates` are computed from those."""

    judged: int
    files: int
    reasons: Counter[str]
    done: int
    samples: int
    estimates: tuple[Estimate, ...] = ()
    right: int = 0
    """Samples judged right; counted for a file of verdicts alone."""
    silent: bool = False
    """Whether there are samples, and the judge could judge none of them."""
    stops_rows: bool = False
    """Whether verdicts stopped rows, so that the folder's cannot be replaced."""
    section: str = ""
    """The section `verify` that a job must have to continue the run, if overrides say how the folder is judged."""


def score(
    path: Path,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    stop: Interruption | None = None,
) -> Scored:
    """Judge the samples in the output folder `path` by the verifier of its job, with `overrides` of keys under `verify`. Of
    files that this judge has judged already, only the samples without a verdict are judged again, as the cause may be gone;
    none if verdicts have stopped rows (verify.stop).

    Raises UsageError if there is no run, another process writes there, or the judge cannot be used, and Stopped if `stop`
    interrupts it: verdicts that are there by then are kept, and its message says so.
    """
    stop, display = stop or Interruption(), _Display(progress or NullProgress())
    manifest_to_judge(OutputFolder(path))
    with Claim(path) as claim:
        manifest = manifest_to_judge(claim.folder)
        job = job_to_judge(claim.folder, manifest, overrides, display.progress.message)
        assert job.verify is not None
        pool = open_pool(job.verify)
        try:
            with stop.at_once(_UNTOUCHED):
                own = verdict_fields(pool.load().columns)
                found = consistently(partial(inspect, claim.folder, manifest), path)
                refuse_faults(claim.folder, manifest, found)
                refuse_unrecorded(claim.folder, manifest, found)
                earlier = {name: value for name, value in manifest.fingerprint.settings.items() if is_of_verify(name)}
                if job.verify.stop is not None and verify_settings(job.verify) != earlier:
                    raise OutputError(
                        f"{path}: rows were stopped by the verdicts that this folder holds (verify.stop), so other verdicts of "
                        "the samples that are there estimate nothing. They can be written beside it: --to verdicts.parquet"
                    )
                settings = {name: value for name, value in manifest.fingerprint.settings.items() if not is_of_verify(name)}
                fingerprint = replace(manifest.fingerprint, settings={**settings, **verify_settings(job.verify)})
                manifest = replace(manifest, fingerprint=fingerprint, job={**manifest.job, "verify": job.to_dict()["verify"]})
                files = [file for _, file in found.good]
                _check_columns(files, job, manifest.id_column)
                # Rows that were stopped by verdicts would have gone on or stopped elsewhere by others.
                which: Which = "missing" if job.verify.stop is None else "unjudged"
                left: dict[ListedFile, Which] = {}
                for file in files:
                    if not _is_judged(file, manifest):
                        left[file] = "all"
                    elif num_lacking(file, which):
                        left[file] = which
                if which == "unjudged":
                    lacking = sum(num_lacking(file, "missing") - num_lacking(file, which) for file in files)
                    if lacking:
                        what = "without a verdict: not judged again, as verdicts stop rows (verify.stop)"
                        display.progress.message(f"{counted(lacking, 'sample')} {what}")
            try:
                scored = _rejudge(claim, manifest, job, found, left, own, pool, display, stop)
                decides = any(not each.startswith(_LIMITS) for each in overrides)
                return replace(scored, section=verify_section(manifest.fingerprint.settings) if decides else "")
            except OSError as error:
                raise unwritable(path, error) from error
        finally:
            pool.close()


def score_to(
    path: Path,
    target: Path,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    stop: Interruption | None = None,
) -> Scored:
    """Judge the samples that are committed in the output folder `path` now, even while a run writes there, and write the
    verdicts atomically to `target` (.parquet): one row for each sample, with its id, row and number. The folder is not changed.
    Raises the errors of `score`, and OutputError if the file cannot be written."""
    stop, display, folder = stop or Interruption(), _Display(progress or NullProgress()), OutputFolder(path)
    words = f"stopped: {target} is not written, and the same command begins from the start"
    manifest = manifest_to_judge(folder)
    check_target(folder, target, (".parquet",))
    job = job_to_judge(folder, manifest, overrides, display.progress.message)
    assert job.verify is not None
    pool = open_pool(job.verify)
    try:
        with stop.at_once(words):
            own = verdict_fields(pool.load().columns)

        def on_judged(more: int) -> None:
            display.add(more)
            if stop.poll():
                raise Stopped(words, stop.poll())

        def judge() -> pa.Table:
            files = recorded_shards(folder, manifest)
            _check_columns(files, job, manifest.id_column)
            display.begin(sum(num_lacking(file, "all") for file in files))
            names = [*("id", "row_index", "sample_index", "status"), *(field.name for field in own)]
            rows_of = partial(_carried_rows, manifest)
            parts = [table.select(names) for file in files for table, _ in judge_again(file, own, pool, on_judged, rows_of)]
            return pa.concat_tables(parts) if parts else SAMPLE_SCHEMA.empty_table().select(names[:4])

        with stop.at_once(words):
            verdicts = consistently(judge, path)
    finally:
        pool.close()
    sink = pa.BufferOutputStream()
    pq.write_table(verdicts, sink, **PARQUET_OPTIONS)
    try:
        write_whole(DurableFiles(), target.with_name(f".{target.name}.partial"), target, sink.getvalue().to_pybytes())
    except OSError as error:
        raise OutputError(f"--to {target} cannot be written: {error.strerror}; name a file elsewhere") from error
    reasons = Counter[str](verdicts["verify_error"].drop_null().to_pylist() if verdicts.num_columns > 4 else ())
    right = int(np.count_nonzero(verdicts["correct"].fill_null(False))) if verdicts.num_columns > 4 else 0
    judged = count_ok(verdicts)
    silent = 0 < judged <= count_without_verdict(verdicts)
    return Scored(judged, 1, reasons, verdicts.num_rows, manifest.samples, right=right, silent=silent)


def _rejudge(
    claim: Claim,
    manifest: Manifest,
    job: Job,
    found: Inspection,
    left: Mapping[ListedFile, Which],
    own: Sequence[pa.Field[Any]],
    pool: JudgePool,
    display: _Display,
    stop: Interruption,
) -> Scored:
    begin_record(claim, manifest, found.marked)
    done = sum(shard.rows for shard, _ in found.good)
    stops_rows = job.verify is not None and job.verify.stop is not None
    scored = Scored(0, len(left), Counter(), done, manifest.samples, stops_rows=stops_rows)
    known = read_manifest(claim.folder)
    summary = read_summary(claim.folder)

    def begin() -> None:
        # From here on the folder is not complete, whatever happens, and nothing is said of the verdicts.
        claim.reopen(keep_summary=True)
        if summary:
            # Stopped, until it is done or stopped by a signal whose exit code is written then.
            ended = {"exit_code": EXIT_STOPPED} if summary.get("exit_code") in (EXIT_COMPLETE, EXIT_ERRORS) else {}
            write_summary(claim, {**summary, "estimates": {}, "pass_at_k": None, "unverified": None, **ended})
        write_manifest(claim, manifest, job.given())

    is_other = known is None or known.marks != manifest.marks
    if not left and is_other:
        begin()
    display.begin(sum(num_lacking(file, which) for file, which in left.items()))

    def on_judged(more: int) -> None:
        display.add(more)
        if stop.poll():
            # The remaining samples of the file become NOT_JUDGED, and the next score judges them.
            pool.close()

    for number, (file, which) in enumerate(left.items()):
        tables: list[pa.Table] = []
        before = scored.judged
        for table, judged in judge_again(file, own, pool, on_judged, partial(_carried_rows, manifest), which):
            tables.append(table)
            scored.reasons.update(table["verify_error"].drop_null().to_pylist())
            scored = replace(scored, judged=scored.judged + judged)
        is_whole = not scored.reasons[NOT_JUDGED]
        if number == 0 and is_whole and is_other:
            _refuse_silent(file, tables)
        # A stop loses no earlier verdicts for the sake of samples without any.
        has_verdict = not is_other or any(table["correct"].null_count < table.num_rows for table in tables)
        if is_whole or (scored.judged > before and (number or has_verdict)):
            if number == 0:
                begin()
            replace_shard(claim, file, tables)
        elif number == 0:
            raise Stopped(_UNTOUCHED, stop.poll())
        if stop.poll() and not (is_whole and number + 1 == len(left)):
            if summary:
                write_summary(claim, {**read_summary(claim.folder), "exit_code": stop.poll()})
            raise Stopped(_stopped(claim.folder.path, scored.judged, display.total), stop.poll())
    return _close(claim, manifest, job, scored, summary)


def _close(claim: Claim, manifest: Manifest, job: Job, scored: Scored, summary: Mapping[str, Any]) -> Scored:
    """Return the result with what all verdicts estimate. Record the same in the folder's summary, if it had one, and mark the
    run as complete, if it is."""
    shards = claimed_shards(claim)
    books = Books.of(manifest.samples, shards)
    without_verdict = read_status(claim.folder.path).without_verdict or 0
    silent = 0 < books.ok <= without_verdict
    scored = replace(scored, estimates=read_estimates(claim.folder) or (), silent=silent)
    if summary:
        estimates = {each.name: [each.value, each.low, each.high] for each in scored.estimates}
        pass_at_k = {name[5:]: values[0] for name, values in estimates.items() if name.startswith("pass@")}
        figures: dict[str, Any] = {
            "verifies": True,
            "estimates": estimates,
            "estimator": read_estimator(claim.folder),
            "pass_at_k": pass_at_k or None,
            "unverified": without_verdict,
        }
        if books.closed:
            # Also a run that was stopped with nothing but verdicts missing.
            too_many = books.errors > job.errors.max_fraction * manifest.samples
            figures["exit_code"] = EXIT_ERRORS if silent or too_many else EXIT_COMPLETE
        write_summary(claim, {**summary, **figures})
    # Last: a folder with the mark is left alone by every later start, so that its figures must be there.
    mark_success(claim, shards, manifest.samples)
    return scored


def _refuse_silent(file: ListedFile, tables: Sequence[pa.Table]) -> None:
    """Raise JobError if the judge fails for every sample of the first file, where the file's own verdicts would be lost for
    that. A judge that returns None has judged."""
    ok = sum(map(count_ok, tables))
    if not 0 < ok <= sum(map(count_without_verdict, tables)):
        return
    with open_shard(file) as parquet:
        if "correct" not in verdict_names(parquet.schema_arrow):
            return
        earlier: pa.Table = parquet.read(["correct"])
    reasons = [each for table in tables for each in table["verify_error"].drop_null().to_pylist()]
    if earlier["correct"].null_count < earlier.num_rows and "it returned None" not in reasons:
        raise JobError(
            f"verify: the judge gives no verdict for any of the first {counted(ok, 'sample')}, because {reasons[0]}; correct "
            "it. The verdicts that the folder holds stay as they are"
        )


def _stopped(path: Path, judged: int, total: int) -> str:
    kept = f"the verdicts of {judged:,} of {counted(total, 'sample')} are kept"
    return f"stopped: {kept}; `tokabatch score {quote(str(path))}` judges the others"


@dataclass(slots=True)
class _Display:
    """What is shown of the samples that are judged: `done` of `total`."""

    progress: Progress
    begun: float = field(default_factory=time.perf_counter)
    done: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        self.progress.update(ProgressSnapshot("judging", 0.0))

    def begin(self, total: int) -> None:
        self.done, self.total = 0, total
        self.add(0)

    def add(self, more: int) -> None:
        self.done += more
        elapsed = time.perf_counter() - self.begun
        self.progress.update(ProgressSnapshot("judging", elapsed, samples_done=self.done, samples_total=self.total))


def _carried_rows(manifest: Manifest, table: pa.Table) -> list[dict[str, Any]]:
    """Return the input's row of each sample, as far as the output carries it."""
    names = row_names(table.schema, manifest.id_column)
    named = table.select(list(names)).rename_columns(list(names.values()))
    rows = python_rows(named) if names else [{} for _ in range(table.num_rows)]
    parse_json_texts(rows, named.schema.with_metadata(table.schema.metadata))
    return rows


def _check_columns(files: Sequence[ListedFile], job: Job, id_column: str | None) -> None:
    """Raise OutputError if the column of the reference is not in the output."""
    for file in files[:1]:
        with open_shard(file) as parquet:
            found = parquet.schema_arrow
        answer = job.verify.answer if job.verify else None
        names = list(row_names(found, id_column).values())
        if answer is not None and answer not in names:
            raise OutputError(
                f"verify.answer: the output has no column {answer!r} (see output.columns); it has {', '.join(names)}"
            )


def _is_judged(file: ListedFile, manifest: Manifest) -> bool:
    """Return whether the verdicts of a shard are this judge's."""
    with open_shard(file) as parquet:
        judged_by = (parquet.schema_arrow.metadata or {}).get(VERIFIER_KEY)
    return judged_by == manifest.marks[VERIFIER_KEY]
