"""What a start finds in its output folder, and how it continues from there.

The folder's run is continued sample by sample: those in its shards are done, the rest is left to do. Nothing of an earlier run
changes before the job is known to be the same (or the user chose to start over).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from tokabatch.input.fingerprint import UNKNOWN, Fingerprint
from tokabatch.input.store.kept_input import keep_input
from tokabatch.input.store.row_digests import RowDigests
from tokabatch.job import Job, VerifyConfig
from tokabatch.number_text import counted
from tokabatch.output.claim import Claim
from tokabatch.output.existing_results import (
    Committed,
    drop_errors,
    fit_columns,
    list_misfits,
    nothing_committed,
    read_committed,
    remove_shards,
    replace_shard,
)
from tokabatch.output.folder import OutputFolder
from tokabatch.output.inspection import Inspection, inspect
from tokabatch.output.journal import Shard
from tokabatch.output.manifest import (
    Manifest,
    job_is_whole,
    settings_digest,
    versions_here,
    write_manifest,
)
from tokabatch.output.probe import describe_others
from tokabatch.output.remedy import begin_record, refuse_faults, refuse_other_verdicts, refuse_unrecorded
from tokabatch.output.same_job import EarlierRun, find_run
from tokabatch.output.schema import UnsampledRow, verdict_fields
from tokabatch.runner.judge_again import judge_again, num_lacking
from tokabatch.runner.reuse import Reuse
from tokabatch.runner.row_stops import RowStops
from tokabatch.scoring.early_stopping import StopRule
from tokabatch.scoring.pool import open_pool
from tokabatch.storage.listing import Mark, consistently
from tokabatch.storage.write_errors import reading_input, unwritable
from tokabatch.workload.prepare import Workload, prepare

OnRows = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Start:
    """`workload` is the whole job, `committed` what is done of it, `left` what is left to do. If rows stop early, `stops`
    includes what is committed, and `cancelled` are the samples that it cancels and that are not committed as cancelled."""

    workload: Workload
    committed: Committed
    left: Workload
    stops: RowStops[Any] | None = None
    cancelled: tuple[UnsampledRow, ...] = ()

    @property
    def has_more(self) -> bool:
        """Whether anything is left to do."""
        return bool(len(self.left.requests) or self.left.failures or self.cancelled)

    def introduce(self, tell: Callable[[str], None]) -> None:
        """Tell the user what was noted of the input, and how much of the run is there already."""
        for note in self.workload.notes:
            tell(note)
        if self.committed.samples:
            tell(
                f"continuing, with {self.committed.samples:,} of {counted(self.workload.samples_total, 'sample')} already there"
            )

    @classmethod
    def after(cls, committed: Committed, workload: Workload, job: Job, folder: OutputFolder) -> Start:
        drawn = committed.drawn
        if job.verify is None or job.verify.stop is None:
            return cls(workload, committed, workload.without(drawn))
        rule = StopRule(job.verify.stop.after_correct, job.verify.stop.majority)
        stops: RowStops[Any] = RowStops(rule, workload.samples_of_row, drawn)
        if committed.samples:
            stops = RowStops.of_folder(rule, workload.samples_of_row, drawn, folder)
        cancelled = stops.take_cancelled()
        decided = drawn.flags.copy()
        for each in cancelled:
            decided[drawn.start[each.row_index] + each.samples] = True
        return cls(workload, committed, workload.without(replace(drawn, flags=decided)), stops, tuple(cancelled))


def start(
    job: Job,
    claim: Claim,
    on_rows: OnRows,
    reuse: Reuse,
    tell: Callable[[str], None],
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    replaceable: bool = True,
) -> Start:
    """Prepare the job and claim its output folder, whose manifest then describes the run. Raises UsageError; `tell` receives a
    sentence for the user if the folder holds results; `reading` is entered while the folder is unchanged. If `replaceable`, the
    run of another job that has only error rows is deleted."""
    folder = claim.folder
    earlier = None if reuse.overwrite else find_run(folder, retry_errors=reuse.retry_errors, replaceable=replaceable)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    clock = cache(lambda: earlier.manifest.started if earlier and not earlier.worthless else now)
    scratch = folder.temporary / "input"
    with reading_input(folder.path), reading():
        scratch.mkdir()
        compare, begun = (earlier.compare, bool(folder.shards())) if earlier else (None, False)
        workload = prepare(job, scratch, on_rows, compare=compare, kept=folder.input, clock=clock, begun=begun)
        found = None if earlier is None else consistently(lambda: inspect(folder, earlier.manifest), folder.path)
        if earlier is None and not reuse.overwrite:
            workload = workload.with_notes(describe_others(folder))
    try:
        if earlier is not None and earlier.worthless:
            workload = workload.with_notes(earlier.describe_worthless())
            claim.discard()
            _write_start(job, claim, workload, describe_run(job, workload, clock()), ())
            started = Start.after(nothing_committed(workload.samples_of_row), workload, job, folder)
        elif earlier is not None and found is not None:
            manifest = describe_run(job, workload, clock(), earlier.manifest, found.run)
            started = _continue(job, claim, workload, manifest, earlier, found, reuse, tell, on_rows)
        else:
            if reuse.overwrite:
                shards = folder.shards()
                if shards:
                    size = counted(sum(shard.bytes for shard in shards), "byte")
                    tell(f"--overwrite: deleting {counted(len(shards), 'file')}, {size}, of the run in {folder.path}")
                claim.discard()
            _write_start(job, claim, workload, describe_run(job, workload, clock()), ())
            started = Start.after(nothing_committed(workload.samples_of_row), workload, job, folder)
    except OSError as error:
        # Nothing has been computed: the job is refused.
        raise unwritable(folder.path, error) from error
    if started.has_more and not workload.taken_over:
        keep_input(workload.store, workload.origin, claim.files, scratch, folder.input)
    started.introduce(tell)
    return started


def _continue(
    job: Job,
    claim: Claim,
    workload: Workload,
    manifest: Manifest,
    earlier: EarlierRun,
    found: Inspection,
    reuse: Reuse,
    tell: Callable[[str], None],
    on_rows: OnRows,
) -> Start:
    """Take over the earlier run. Its good files stay; damaged ones are computed again if that was requested."""
    folder = claim.folder
    refuse_faults(folder, earlier.manifest, found, repair=reuse.repair)
    refuse_other_verdicts(folder, earlier.manifest, found)
    if reuse.repair and (bad := found.to_repair):
        tell(f"--repair: computing again what {', '.join(bad)} held")
        begin_record(claim, manifest, found.marked, found.damaged)
        claim.reopen()
        remove_shards(claim, bad)
    started = _find_samples(folder, workload, job, errors=not reuse.retry_errors)
    if not reuse.repair:
        refuse_unrecorded(folder, earlier.manifest, found)
    if earlier.repaired and not reuse.retry_errors:
        tell(f"{counted(earlier.repaired, 'error row')} changed in the input; --retry-errors runs error rows again")
    done = not started.has_more
    unjudged = job.verify is not None and any(num_lacking(file, "unjudged") for _, file in found.good)
    same = (earlier.manifest.rows, earlier.manifest.samples) == (manifest.rows, manifest.samples)
    sealed = done and not unjudged and found.sealed and same and job_is_whole(folder, earlier.manifest)
    if sealed and (not earlier.manifest.run or RowDigests.read(folder.row_digests) is not None):
        # Nothing in the folder changes, whatever happens from here on.
        return replace(started, committed=replace(started.committed, shards=tuple(shard for shard, _ in found.good)))
    _write_start(job, claim, workload, manifest, found.marked, keep_summary=done and not reuse.retry_errors)
    if reuse.retry_errors:
        dropped = drop_errors(claim, reopen=job.verify is not None and job.verify.stop is not None)
        if dropped:
            tell(f"running {counted(dropped, 'error row')} again")
    misfits, names = list_misfits(folder, workload.output_schema)
    if misfits:
        told = ", ".join(names[:5]) + ", …" * (len(names) > 5)
        tell(f"the new rows change the columns ({told}): rewriting {counted(len(misfits), 'file')}")
        fit_columns(claim, misfits, workload.output_schema, workload.store.columns)
    if unjudged and job.verify is not None:
        judge_left(claim, job.verify, workload, tell, on_rows)
    return _find_samples(folder, workload, job) if reuse.retry_errors or misfits or unjudged else started


def judge_left(claim: Claim, verify: VerifyConfig, workload: Workload, tell: Callable[[str], None], on_rows: OnRows) -> None:
    """Give verdicts to the samples that an earlier start was stopped before it had judged, and with them to their files."""
    left = [file for file in claim.folder.shards() if num_lacking(file, "unjudged")]
    tell(f"judging the samples that the previous start had not judged yet ({counted(len(left), 'file')})")
    pool = open_pool(verify)

    def rows_of(table: pa.Table) -> list[dict[str, Any]]:
        return workload.store.input_rows(table["row_index"].to_numpy())

    def on_judged(more: int) -> None:
        on_rows(workload.store.num_rows, len(workload.failures))

    try:
        own = verdict_fields(pool.load().columns)
        for file in left:
            judged = judge_again(file, own, pool, on_judged, rows_of, "unjudged")
            replace_shard(claim, file, [table for table, _ in judged])
    finally:
        pool.close()


def _write_start(
    job: Job,
    claim: Claim,
    workload: Workload,
    manifest: Manifest,
    shards: Collection[tuple[Shard, Mark]],
    *,
    keep_summary: bool = False,
) -> None:
    """Write what the run is into the folder; `shards` are there. The record of commits begins before the marks of an earlier
    end are removed, which may be the only record."""
    begin_record(claim, manifest, shards)
    claim.reopen(keep_summary=keep_summary)
    # Once its error samples are removed, a repaired row is identified by these alone.
    claim.write(claim.folder.row_digests, workload.store.digests.to_parquet())
    write_manifest(claim, manifest, job.given())


def preview(job: Job, scratch: Path, on_rows: OnRows | None = None, *, absent_gpu: bool = False) -> Start:
    """Do the same for a plan: read what is there, change nothing, need no weights. Raises the same refusals, except for those
    of the device, and of the dtype that follows it, if the plan is for a GPU that is not in this machine."""
    folder = OutputFolder(Path(job.output.path))
    earlier = find_run(folder, replaceable=True)
    elsewhere = absent_gpu and job.model.dtype == "auto"

    def compare(now: Fingerprint, *rows: Any) -> None:
        if earlier is not None:
            earlier.compare(replace(now, settings={**now.settings, "model.dtype": UNKNOWN}) if elsewhere else now, *rows)

    begun = earlier is not None and bool(folder.shards())
    workload = prepare(
        job,
        scratch,
        on_rows,
        weights=False,
        compare=compare,
        clock=lambda: earlier.manifest.started if earlier and not earlier.worthless else "",
        absent_gpu=absent_gpu,
        begun=begun,
    )
    if earlier is None:
        workload = workload.with_notes(describe_others(folder))
        return Start.after(nothing_committed(workload.samples_of_row), workload, job, folder)
    if earlier.worthless:
        workload = workload.with_notes(earlier.describe_worthless())
        return Start.after(nothing_committed(workload.samples_of_row), workload, job, folder)
    found = consistently(lambda: inspect(folder, earlier.manifest), folder.path)
    refuse_faults(folder, earlier.manifest, found)
    refuse_other_verdicts(folder, earlier.manifest, found)
    started = consistently(lambda: _find_samples(folder, workload, job), folder.path)
    refuse_unrecorded(folder, earlier.manifest, found)
    return started


def _find_samples(folder: OutputFolder, workload: Workload, job: Job, *, errors: bool = True) -> Start:
    committed = read_committed(folder, workload.samples_of_row, schema=workload.output_schema, errors=errors)
    return Start.after(committed, workload, job, folder)


def describe_run(job: Job, workload: Workload, started: str, earlier: Manifest | None = None, recorded: str = "") -> Manifest:
    """Return the manifest of this start; if it continues an `earlier` run, `recorded` is the run in the record of commits."""
    manifest = Manifest(
        started=started,
        working_folder=os.getcwd(),
        model_path=str(workload.folder),
        versions=versions_here(),
        rows=workload.store.num_rows,
        samples=workload.samples_total,
        job=job.model_copy(update={"generation": workload.generation}).to_dict(),
        fingerprint=workload.fingerprint,
        run=uuid.uuid4().hex,
        fingerprint_sha256=settings_digest(workload.fingerprint),
    )
    if earlier is None:
        return manifest
    if (earlier.rows, earlier.samples) == (manifest.rows, manifest.samples):
        manifest = replace(manifest, units=earlier.units, units_sha256=earlier.units_sha256)
    if not earlier.run:
        # Of a version that named no runs; a start that was cut short may have named it in the record already.
        return replace(manifest, run=recorded or manifest.run)
    return replace(manifest, run=earlier.run, fingerprint_sha256=earlier.fingerprint_sha256)
