"""From finished samples to rows on disk: judged, made into tables, handed to the shard writer, counted.

Samples wait here, then in the writer. `WaitingSamples` counts the rows that the writer had taken before them, so that wherever
an exception strikes, what is handed over and what is not can be told apart: nothing is lost, and nothing handed over twice.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.job import Job
from tokabatch.output.claim import Claim
from tokabatch.output.existing_results import Committed
from tokabatch.output.schema import UnsampledRow, verdict_names
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.output.shards import Shard, count_cancelled, count_ok, write_parquet
from tokabatch.output.units import Units
from tokabatch.output.unwritable import CANNOT_BE_WRITTEN, mended
from tokabatch.runner.judging import Judging
from tokabatch.runner.row_stops import RowStops
from tokabatch.runner.sample_tables import SampleTables, is_of_rows
from tokabatch.runner.waiting_samples import PIECE_BYTES, FinishedSample, WaitingSamples
from tokabatch.scheduling.contracts import NO_COUNTS, WORKER_CRASH, Completion
from tokabatch.scoring.early_stopping import Outcome
from tokabatch.scoring.judge import ANSWER
from tokabatch.scoring.pool import NOT_JUDGED
from tokabatch.workload.prepare import Workload

BATCH_SAMPLES = 2048
"""Samples made into a table at once; fewer when `flush_seconds` are over."""
LOOKED_AT = 512
"""Samples that come in before those that wait are looked at again."""
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
    """Samples without a verdict, mostly for want of a reference answer; pass@k counts them as wrong."""
    _reasons: Counter[str]

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
        """The most frequent ones of this start, each with its count."""
        return tuple(f"{reason} ({count:,} samples)" for reason, count in self._reasons.most_common(SHOWN_REASONS))

    def add(self, table: pa.Table, *, judged: bool, sign: int = 1) -> None:
        """Count the samples of a table, or with a `sign` of -1 take them back; `judged` ones have columns of verdicts."""
        ok = count_ok(table)
        for code in table["error_code"].drop_null().to_pylist():
            self.error_counts[code] += sign
        self.ok += sign * ok
        self.cancelled += sign * count_cancelled(table)
        if not judged:
            return
        good = table.filter(pc.call_function("equal", [table["status"], "ok"]))
        self.unverified += sign * good["correct"].null_count
        for reason, count in Counter(good["verify_error"].drop_null().to_pylist()).items():
            if reason in self._reasons or len(self._reasons) < MAX_REASONS:
                self._reasons[reason] += sign * count


class Recorder:
    """Takes completions in any order. `finish` commits the rest; nothing is lost before that but to a crash. The tally begins
    with what is `committed` already. Every method that writes raises CommitError where the output folder takes no more; what
    was not committed then is kept, and the next call tries again."""

    def __init__(
        self,
        job: Job,
        workload: Workload,
        claim: Claim,
        committed: Committed,
        clock: Callable[[], float] = time.monotonic,
        units: Units | None = None,
        stops: RowStops[FinishedSample] | None = None,
    ) -> None:
        """`units` are those of a run that several processes write; samples of units that are not opened are dropped. With
        `stops`, rows stop: a sample is recorded once all before it of its row are judged, if it is wanted then."""
        self._store = workload.store
        self._tables = SampleTables(workload, verdict_names(workload.output_schema) if job.verify else [])
        self._judging = None
        if job.verify:
            self._judging = Judging(job.verify, workload.store, self._tables, clock, workload.layout.replicas)
        self.writer = ShardWriter(
            claim,
            workload.output_schema,
            rows_per_shard=job.output.rows_per_shard,
            flush_seconds=job.output.flush_seconds,
            earlier=committed.shards,
            unit_of=None if units is None else units.of,
            clock=clock,
        )
        """What commits; units are opened there."""
        self._num_samples = workload.samples_total
        self._claim = claim
        self._clock = clock
        self._waiting = WaitingSamples(self.writer.num_rows)
        self._stops = stops
        self._unjudged: list[FinishedSample] = []
        """Where rows stop: samples whose verdict has not been passed to `stops`."""
        self._arrived = 0
        """Samples that have come in since the last look at which are ready."""
        self._oldest: float | None = None
        """When the first sample that is not committed yet came in."""
        self.tally = Tally.of(committed)
        self.took_error = False
        """Whether a sample that ended in an error is recorded: where rows stop, not one that is held or left out."""

    def fail(self, failures: Sequence[UnsampledRow]) -> None:
        """Rows that never became prompts, and samples that are cancelled."""
        self._accept(failures, ())
        self._flush()

    def add(self, completions: Sequence[Completion], goes_on: Callable[[], bool] = lambda: True) -> None:
        """Samples that the scheduler finished; on disk after at most `flush_seconds` from their verdicts. Where the judge is
        too far behind this waits for it, and commits what is judged meanwhile, as long as the run `goes_on`, which is asked
        several times a second."""
        finished = list(map(FinishedSample, completions))
        if self._stops is None:
            self._accept((), finished)
        else:
            for each in finished:
                row, sample = each.completion.row_index, each.completion.sample_index
                if self._stops.wants(row, sample):
                    self._stops.hold(row, sample, each)
                    self._unjudged.append(each)
        if self._judging is None:
            self._commit_due(len(completions))
            return
        self._judging.submit(self._pending)
        self._commit_due(len(completions))
        while not self._judging.keeps_up(self._pending) and goes_on():
            self._commit_due(0, waits=True)

    def _commit_due(self, arrived: int, *, waits: bool = False) -> None:
        """Record what is judged, and commit what is due; so many samples have `arrived` just now, or the run `waits` for
        verdicts."""
        self._follow_verdicts()
        waiting = self._waiting
        if self._oldest is None and (waiting.finished or waiting.num_unsampled):
            self._oldest = self._clock()
        # A look at all that wait for verdicts takes longer than to record a few: not with every message.
        self._arrived += arrived
        if self._judging is None or waits or self._arrived >= LOOKED_AT or waiting.bytes >= PIECE_BYTES:
            ready = len(waiting.finished) if self._judging is None else sum(each.is_ready for each in waiting.finished)
            self._arrived = 0
            if ready + waiting.num_unsampled >= BATCH_SAMPLES or (ready and waiting.bytes >= PIECE_BYTES):
                self._flush()
        # Where many came in just now, they are decoded first.
        if arrived < BATCH_SAMPLES and self.writer.nears_end(self._num_samples - self.writer.num_rows):
            self._commit(self.writer.commit)
        if self._oldest is not None and self.writer.is_due(self._oldest):
            self._flush()
            self._commit(self.writer.commit)
            self._oldest = self._clock() if self._waiting.finished else None

    def finish(self, goes_on: Callable[[], bool] = lambda: True) -> tuple[Shard, ...]:
        """Commit everything and return all shards. Once the run no longer `goes_on`, which is asked several times a second,
        verdicts are waited for a few seconds more: samples that have none by then are committed without. Where rows stop,
        samples behind one that is missing or not judged are not committed."""
        if self._judging is not None:
            self._judging.submit(self._pending)
            while not self._judging.is_done([*self._waiting.finished, *self._unjudged], goes_on):
                self._commit_due(0, waits=True)
        self._follow_verdicts()
        self._flush()
        return self._commit(self.writer.close)

    def close(self) -> None:
        """End the processes of the judge."""
        if self._judging is not None:
            self._judging.close()

    @property
    def _pending(self) -> Sequence[FinishedSample]:
        """Those among which the judge's next samples are."""
        return self._waiting.finished if self._stops is None else self._unjudged

    def _accept(self, unsampled: Sequence[UnsampledRow], finished: Sequence[FinishedSample]) -> None:
        """From here on they are not lost."""
        self.took_error = self.took_error or any(each.completion.error_code is not None for each in finished)
        self._waiting = self._waiting.joined_by(unsampled, finished)

    def _follow_verdicts(self) -> None:
        """Where rows stop: take in what has been judged, and accept what is decided by that."""
        if self._stops is None:
            return
        unjudged, self._unjudged = self._unjudged, []
        for each in unjudged:
            completion, verdict = each.completion, each.verdict
            if completion.error_code is None and (verdict is None or verdict.error == NOT_JUDGED):
                self._unjudged.append(each)
                continue
            row, right = completion.row_index, verdict is not None and verdict.correct is True
            answer = None if verdict is None else verdict.columns.get(ANSWER)
            self._stops.judge(row, completion.sample_index, Outcome(right, answer))
            if completion.error_code == WORKER_CRASH:
                # The others of the row would kill workers, too.
                self._stops.give_up(row, partial(_same_error, completion))
        self._accept(self._stops.take_cancelled(), self._stops.take_kept())

    def _flush(self) -> None:
        self._settle()
        ready = len(self._waiting.finished)
        if self._judging is not None:
            self._waiting, ready = self._waiting.ready_first()
        with self._claim.committing():
            for piece in self._waiting.pieces(ready, self._store):
                for table in self._tables.build(*piece):
                    self.writer.take(table)
                    self._settle()
                    self._count(table)
                    self._commit(self.writer.commit_due)

    def _settle(self) -> None:
        """Let go of the samples that the writer has taken, whatever came in between."""
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
            self._count(table, -1)
            self._count(repaired)
        return repaired

    def _count(self, table: pa.Table, sign: int = 1) -> None:
        self.tally.add(table, judged=self._judging is not None, sign=sign)


def _same_error(completion: Completion, sample: int) -> FinishedSample:
    """Another sample of the row, which ends as that one did without having begun."""
    empty = replace(completion, sample_index=sample, token_ids=completion.token_ids[:0], counts=NO_COUNTS)
    return FinishedSample(replace(empty, logprobs=None, top_ids=None, top_logprobs=None))
