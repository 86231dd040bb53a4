"""Records finished samples: they are made into tables with their verdicts, passed to the shard writer and counted.

Tables are buffered here and then in the writer. `WaitingRows` counts the rows that the writer has accepted and the samples that
have been made into tables. Wherever an exception interrupts, these counts show what has been passed on, so that no row is lost
or passed on twice.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.job import Job
from tokabatch.number_text import counted, others_text
from tokabatch.output.claim import Claim
from tokabatch.output.existing_results import Committed
from tokabatch.output.schema import UnsampledRow, verdict_names
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.output.shards import Shard, count_cancelled, count_ok, count_without_verdict, write_parquet
from tokabatch.output.units import Units
from tokabatch.output.unwritable import CANNOT_BE_WRITTEN, mended
from tokabatch.runner.preparation import BATCH_SAMPLES, Preparation, Preparing
from tokabatch.runner.preparers import Preparers
from tokabatch.runner.row_stops import RowStops
from tokabatch.runner.sample_tables import SampleTables, is_of_rows
from tokabatch.runner.waiting_samples import PIECE_BYTES, WaitingRows, unsampled_pieces
from tokabatch.scheduling.completion_batch import Completions, PackedCompletions
from tokabatch.scheduling.contracts import NOT_JUDGED, WORKER_CRASH, SampleCounts
from tokabatch.scoring.early_stopping import Outcome
from tokabatch.scoring.judge import ANSWER
from tokabatch.workload.prepare import Workload

TableRow = tuple[pa.Table, int]
"""One row of a table."""
FOLLOW_SECONDS = 0.02
"""Seconds between collecting verdicts if rows stop by them, even if few samples have arrived."""
SHOWN_REASONS, MAX_REASONS = 3, 1000
_Result = TypeVar("_Result")


@dataclass(slots=True)
class Tally:
    """How the samples of a run ended, those committed by earlier starts included."""

    ok: int
    cancelled: int
    error_counts: Counter[str]
    """By error code."""
    unverified: int
    """Good samples that the judge could not judge, mostly for want of a reference answer; pass@k counts them as wrong."""
    _reasons: Counter[str]
    _beyond: int = 0
    """Samples whose reasons are further ones than are kept."""
    output_tokens: int = 0
    """Of the samples of this start that are ok."""

    @classmethod
    def of(cls, committed: Committed) -> Tally:
        return cls(committed.ok, committed.cancelled, committed.error_counts.copy(), committed.unverified, Counter())

    @property
    def errors(self) -> int:
        return sum(self.error_counts.values())

    @property
    def unwritable(self) -> int:
        """Samples that became error rows because a column of theirs cannot be written."""
        return self.error_counts[CANNOT_BE_WRITTEN]

    @property
    def unverified_reasons(self) -> tuple[str, ...]:
        """The most frequent ones of this start, each with its count, and how many others there are."""
        shown = [f"{reason} ({counted(count, 'sample')})" for reason, count in self._reasons.most_common(SHOWN_REASONS)]
        others = others_text(self._reasons, SHOWN_REASONS, self._beyond)
        return (*shown, others) if others else tuple(shown)

    def add(self, table: pa.Table, *, judged: bool, sign: int = 1) -> None:
        """Count the samples of a table, or with a `sign` of -1 take them back; `judged` ones have columns of verdicts."""
        ok = count_ok(table)
        for code in table["error_code"].drop_null().to_pylist():
            self.error_counts[code] += sign
        self.ok += sign * ok
        self.output_tokens += sign * (pc.call_function("sum", [table["num_output_tokens"]]).as_py() or 0)
        self.cancelled += sign * count_cancelled(table)
        if not judged:
            return
        good = table.select(["verify_error"]).filter(pc.call_function("equal", [table["status"], "ok"]))
        self.unverified += sign * count_without_verdict(table)
        for reason, count in Counter(good["verify_error"].drop_null().to_pylist()).items():
            if reason == NOT_JUDGED:
                continue
            if reason in self._reasons or len(self._reasons) < MAX_REASONS:
                self._reasons[reason] += sign * count
            else:
                self._beyond += sign * count


class Recorder:
    """Records completions, which may arrive in any order. `finish` commits the rest; before that, only a crash can lose
    samples. The tally begins with the samples that are `committed` already. Every method that writes raises CommitError if the
    output folder cannot be written; the rows are kept, and the next call tries again."""

    def __init__(
        self,
        job: Job,
        workload: Workload,
        claim: Claim,
        committed: Committed,
        units: Units | None = None,
        stops: RowStops[TableRow] | None = None,
        *,
        processes: int = 0,
        tell: Callable[[str], None] = print,
    ) -> None:
        """`units` are those of a run that several processes write; samples of units that are not open are dropped. With
        `stops`, a sample is recorded when all earlier samples of its row have been judged, unless the row has stopped by then.
        Packed samples from other processes are prepared in `processes` further processes, others in this one. A message is
        shown if one of those processes is lost."""
        self._store = workload.store
        self._tables = SampleTables(workload, verdict_names(workload.output_schema) if job.verify else [])
        self._preparing: Preparing = Preparation(job, workload, self._tables)
        self._preparers = None
        if processes:
            self._preparers = Preparers(job, workload, self._tables, processes, tell, hurried=stops is not None)
        self.writer = ShardWriter(
            claim,
            workload.output_schema,
            rows_per_shard=job.output.rows_per_shard,
            flush_seconds=job.output.flush_seconds,
            earlier=committed.shards,
            unit_of=None if units is None else units.of,
        )
        """What commits; units are opened there."""
        self._num_samples = workload.samples_total
        self._judges = job.verify is not None
        self._claim = claim
        self._waiting = WaitingRows(self.writer.num_rows)
        self._stops = stops
        self._oldest: float | None = None
        """The time at which the first sample that is not committed yet arrived."""
        self._follow_at = 0.0
        """The time at which verdicts are collected next, if rows stop by them."""
        self.tally = Tally.of(committed)
        self.took_error = False
        """Whether a sample that ended in an error is recorded: if rows stop, only when its row has reached it."""

    def fail(self, failures: Sequence[UnsampledRow]) -> None:
        """Record rows that never became prompts, and cancelled samples."""
        self._accept(failures, None)
        self._flush()

    def add(self, completions: Completions, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Record samples that the scheduler has finished; they are on disk at most `flush_seconds` after their verdicts. If the
        judge is too far behind, block until it has caught up, and commit what is judged meanwhile, as long as `goes_on`, which
        is called several times a second, returns True."""
        if self._preparers is not None and isinstance(completions, PackedCompletions):
            self._preparing = self._preparers
            if self._stops is None:
                self.took_error = self.took_error or bool(completions.failed.any())
        self._preparing.add(completions)
        self._commit_due(len(completions))
        while not self._preparing.keeps_up() and goes_on():
            self._commit_due(0, waits=True)

    def _commit_due(self, arrived: int, *, waits: bool = False) -> None:
        """Record what is ready and commit what is due. `arrived` is the number of new samples; `waits` is whether the run is
        blocked until verdicts arrive."""
        now = time.monotonic()
        self._receive(everything=waits or (self._stops is not None and now >= self._follow_at))
        if self._oldest is None and (len(self._waiting) or self._preparing.num_waiting):
            self._oldest = now
        if len(self._waiting) >= BATCH_SAMPLES:
            self._hand_over()
        # Where many came in just now, decoding them comes before the early commit.
        if arrived < BATCH_SAMPLES and self.writer.nears_end(self._num_samples - self.writer.num_rows):
            self._commit(self.writer.commit)
        if self._oldest is not None and self.writer.is_due(self._oldest):
            self._flush()
            self._commit(self.writer.commit)
            self._oldest = time.monotonic() if self._preparing.num_waiting else None

    def finish(self, goes_on: Callable[[], bool] = lambda: True) -> tuple[Shard, ...]:
        """Commit everything and return all shards; then raise the error because of which samples could not be prepared, if
        there is one. `goes_on` is called several times a second; once it returns False, verdicts may still arrive for a few
        seconds, and samples that have none by then are committed without. If rows stop, samples after one that is missing or
        not judged are not committed."""
        while not self._preparing.is_done(goes_on):
            self._commit_due(0, waits=True)
        self._flush()
        shards = self._commit(self.writer.close)
        self._preparing.check()
        return shards

    def close(self) -> None:
        """Stop the judges and the processes that prepare samples."""
        self._preparing.close()

    def _accept(self, unsampled: Sequence[UnsampledRow], table: pa.Table | None, received: int = 0) -> None:
        """Add rows to those that the writer gets next; from here on they are not lost."""
        failed = table is not None and table["error_code"].null_count < table.num_rows
        self.took_error = self.took_error or failed
        self._waiting = self._waiting.joined_by(unsampled, table, received)

    def _receive(self, *, everything: bool) -> None:
        """Collect the tables that are ready."""
        if everything:
            self._follow_at = time.monotonic() + FOLLOW_SECONDS
        with self._claim.committing():
            for table in self._preparing.tables(self._waiting.received, everything=everything):
                if self._stops is None:
                    self._accept((), table, table.num_rows)
                else:
                    self._accept((), None, table.num_rows)
                    self._follow(table, self._stops)
                if self._waiting.bytes >= PIECE_BYTES:
                    self._hand_over()

    def _follow(self, table: pa.Table, stops: RowStops[TableRow]) -> None:
        """Apply verdicts to rows that stop, and accept the samples that are kept."""
        columns = (table[name] for name in ("row_index", "sample_index", "error_code", "correct", "verify_error"))
        answers = table[ANSWER].to_pylist() if ANSWER in table.schema.names else [None] * table.num_rows
        finished = list(zip(*(each.to_pylist() for each in columns), strict=True))
        for place, (row, sample, code, correct, reason) in enumerate(finished):
            stops.hold(row, sample, (table, place))
            if reason == NOT_JUDGED:
                continue
            stops.judge(row, sample, Outcome(correct is True, answers[place]))
            if code == WORKER_CRASH:
                # The others of the row would kill workers, too.
                stops.give_up(row, partial(_same_error, (table, place)))
        self._accept(stops.take_cancelled(), _together(stops.take_kept()))
        held = [place for place, (row, sample, *_) in enumerate(finished) if stops.holds(row, sample)]
        if 0 < len(held) < table.num_rows:
            # Only these stay in memory, not the rows of the table that have been recorded.
            rest = table.take(held)
            for number, place in enumerate(held):
                row, sample, *_ = finished[place]
                stops.hold(row, sample, (rest, number))

    def _flush(self) -> None:
        """Pass all that is ready to the writer."""
        self._settle()
        self._receive(everything=True)
        self._hand_over()

    def _hand_over(self) -> None:
        """Pass the buffered rows to the writer, which commits full shards."""
        self._settle()
        waiting = self._waiting
        with self._claim.committing():
            for failed in unsampled_pieces(waiting.failures, self._store):
                for table in self._tables.build((), failed):
                    self._take(table)
            if waiting.tables:
                self._take(waiting.tables[0] if len(waiting.tables) == 1 else pa.concat_tables(waiting.tables).combine_chunks())
            for cancelled in unsampled_pieces(waiting.cancelled, self._store):
                for table in self._tables.build((), cancelled):
                    self._take(table)

    def _take(self, table: pa.Table) -> None:
        self.writer.take(table)
        self._settle()
        self.tally.add(table, judged=self._judges)
        self._commit(self.writer.commit_due)

    def _settle(self) -> None:
        """Drop the rows that the writer has accepted, even if an exception interrupted the call that passed them on."""
        self._waiting = self._waiting.behind(self.writer.num_rows)

    def _commit(self, commit: Callable[[], _Result]) -> _Result:
        with self._claim.committing():
            try:
                return commit()
            except BaseException as error:
                if not is_of_rows(error):
                    raise
            self.writer.mend(self._mended)
            return commit()

    def _mended(self, table: pa.Table) -> pa.Table:
        repaired = mended(table, lambda part: write_parquet(part, io.BytesIO()))
        if repaired is not table:
            self.tally.add(table, judged=self._judges, sign=-1)
            self.tally.add(repaired, judged=self._judges)
        return repaired


def _together(rows: Sequence[TableRow]) -> pa.Table | None:
    """Return a table of these rows; None if there are none."""
    if not rows:
        return None
    tables = list({id(table): table for table, _ in rows}.values())
    begins = np.cumsum([0, *(table.num_rows for table in tables)])
    begin = {id(table): place for table, place in zip(tables, begins.tolist(), strict=False)}
    return pa.concat_tables(tables).take(pa.array([begin[id(table)] + place for table, place in rows], pa.int64()))


def _same_error(row: TableRow, sample: int) -> TableRow:
    """Return another sample of the same row of the input, which ends as this one did, without having begun."""
    table = row[0].take([row[1]])
    for name, value in (("sample_index", sample), *((f"num_{field.name}", 0) for field in fields(SampleCounts))):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array([value], pa.int32()))
    return table, 0
