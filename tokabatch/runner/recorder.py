"""From finished samples to rows on disk: decode, verify, add the input's columns, hand to the shard writer.

Samples wait here, then in the writer. `_Waiting` counts the rows that the writer had taken before them, so that wherever an
exception strikes, what is handed over and what is not can be told apart: nothing is lost, and nothing handed over twice.

Samples become tables in pieces of PIECE_BYTES, whatever their rows carry. A piece that cannot be built is halved until the
samples stand alone whose columns are at fault; these become error rows that keep the rest.
"""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokabatch.arrays import Int64
from tokabatch.errors import STOPS, TokabatchError
from tokabatch.job import Job
from tokabatch.output.claim import Claim
from tokabatch.output.existing_results import Committed
from tokabatch.output.reasoning import split_reasoning
from tokabatch.output.schema import UnsampledRow, build_table, input_names, sample_keys, sample_texts, verdict_names
from tokabatch.output.shard_writer import ShardWriter
from tokabatch.output.shards import Shard, count_cancelled, count_ok, write_parquet
from tokabatch.output.units import Units
from tokabatch.output.unwritable import CANNOT_BE_WRITTEN, build_piecemeal, key_table, mended
from tokabatch.runner.row_stops import RowStops
from tokabatch.scheduling.contracts import NO_COUNTS, WORKER_CRASH, Completion
from tokabatch.scoring.early_stopping import Outcome
from tokabatch.scoring.judge import ANSWER, Verdict, verdict_columns
from tokabatch.scoring.pool import NOT_JUDGED, Ticket, open_pool
from tokabatch.workload.prepare import Workload

BATCH_SAMPLES = 2048
"""Samples made into a table at once; fewer when `flush_seconds` are over."""
PIECE_BYTES = 64 << 20
"""Memory of the samples that wait, and of one table, both by estimate; a sample that takes more has a table of its own."""
TOKEN_BYTES, LOGPROB_BYTES, ALTERNATIVE_BYTES = 24, 16, 16
"""By estimate: a token with its text, its logprob, one alternative to it."""
SAMPLE_BYTES = 1024
TAG_TOKENS = 16
"""Of a prompt's end are looked at for a tag."""
LOOK_SECONDS, HURRIED_SECONDS = 0.2, 10.0
SHOWN_REASONS, MAX_REASONS = 3, 1000
MOST_UNJUDGED = 4096
"""Finished samples that may wait for their verdicts; where there are more, the run waits, and the replicas with it."""
_Result = TypeVar("_Result")


@dataclass(slots=True)
class _Finished:
    """A sample, and what becomes of it: its text, once it is decoded, and its verdict, once there is one. A sample that is not
    judged has no `ticket`."""

    completion: Completion
    text: str | None = None
    ticket: Ticket | None = None

    @property
    def verdict(self) -> Verdict | None:
        return None if self.ticket is None else self.ticket.verdict


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What the writer will take next: failed rows, then finished samples in the order they came, then cancelled ones, which are
    never on disk before the sample that stopped their row. The first sample will be its row number `row`. Replaced in one
    assignment."""

    row: int
    failures: tuple[UnsampledRow, ...] = ()
    finished: tuple[_Finished, ...] = ()
    bytes: int = 0
    """Of the finished samples."""
    cancelled: tuple[UnsampledRow, ...] = ()

    @property
    def num_unsampled(self) -> int:
        return sum(each.num_samples for each in (*self.failures, *self.cancelled))

    def behind(self, row: int) -> _Waiting:
        """What is left when the writer has taken all samples before that row."""
        failures, taken = _unsampled_behind(self.failures, row - self.row)
        finished, taken = self.finished[taken:], max(0, taken - len(self.finished))
        cancelled, _ = _unsampled_behind(self.cancelled, taken)
        return _Waiting(row, failures, finished, sum(_own_bytes(each.completion) for each in finished), cancelled)


def _unsampled_behind(rows: Sequence[UnsampledRow], taken: int) -> tuple[tuple[UnsampledRow, ...], int]:
    """What is left of `rows` without their first `taken` samples, and how many more than theirs were taken."""
    left: list[UnsampledRow] = []
    for each in rows:
        skipped = min(taken, each.num_samples)
        taken -= skipped
        if skipped < each.num_samples:
            left.append(replace(each, samples=each.samples[skipped:]))
    return tuple(left), taken


class Recorder:
    """Takes completions in any order. `finish` commits the rest; nothing is lost before that but to a crash. The books begin
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
        stops: RowStops[_Finished] | None = None,
    ) -> None:
        """`units` are those of a run that several processes write; samples of units that are not opened are dropped. With
        `stops`, rows stop: a sample is recorded once all before it of its row are judged, if it is wanted then."""
        store = workload.store
        self._tokenizer = workload.tokenizer
        self._tokenizer.get_ready_to_decode()
        self._store = store
        self._pool = open_pool(job.verify) if job.verify else None
        self._schema = workload.output_schema
        self._tags = workload.tags
        self._verdict_names = verdict_names(self._schema) if job.verify else []
        self._writer = ShardWriter(
            claim,
            self._schema,
            rows_per_shard=job.output.rows_per_shard,
            flush_seconds=job.output.flush_seconds,
            earlier=committed.shards,
            unit_of=None if units is None else units.of,
            clock=clock,
        )
        self._num_samples = workload.samples_total
        self._claim = claim
        self._clock = clock
        self._waiting = _Waiting(self._writer.num_rows)
        self._stops = stops
        self._unjudged: list[_Finished] = []
        """Where rows stop: samples whose verdict `stops` has not been told."""
        self._oldest: float | None = None
        """When the first sample that is not committed yet came in."""
        self.num_unverified = committed.unverified
        """Samples without a verdict, mostly for want of a reference answer; pass@k counts them as wrong."""
        self._reasons: Counter[str] = Counter()
        self.error_counts = committed.error_counts.copy()
        self.num_ok = committed.ok
        self.num_cancelled = committed.cancelled
        self.took_error = False
        """Whether a sample that ended in an error is recorded: where rows stop, not one that is held or left out."""

    @property
    def writer(self) -> ShardWriter:
        """What commits; units are opened there."""
        return self._writer

    @property
    def num_errors(self) -> int:
        return sum(self.error_counts.values())

    @property
    def num_unwritable(self) -> int:
        """Samples that became error rows here, because a column of theirs cannot be written."""
        return self.error_counts[CANNOT_BE_WRITTEN]

    @property
    def unverified_reasons(self) -> tuple[str, ...]:
        """The most frequent ones of this run, each with its count."""
        return tuple(f"{reason} ({count:,} samples)" for reason, count in self._reasons.most_common(SHOWN_REASONS))

    def fail(self, failures: Sequence[UnsampledRow]) -> None:
        """Rows that never became prompts, and samples that are cancelled."""
        self._accept(failures, ())
        self._flush()

    def add(self, completions: Sequence[Completion]) -> None:
        """Samples that the scheduler finished; on disk after at most `flush_seconds` from their verdicts. Waits where the judge
        is too far behind."""
        self._take(completions)
        self._submit()
        pending = self._waiting.finished if self._stops is None else self._unjudged
        if self._pool is not None and (excess := len(pending) - MOST_UNJUDGED) > 0:
            self._pool.wait(_tickets(pending[:excess]))
        self._follow_verdicts()
        waiting, ready = self._waiting, self._ready()
        if self._oldest is None and (waiting.finished or waiting.num_unsampled):
            self._oldest = self._clock()
        rows = len(ready) + waiting.num_unsampled
        if rows >= BATCH_SAMPLES or (ready and waiting.bytes >= PIECE_BYTES):
            self._flush()
        # Where many came in just now, they are decoded first.
        if len(completions) < BATCH_SAMPLES and self._writer.nears_end(self._num_samples - self._writer.num_rows):
            self._commit(self._writer.commit)
        if self._oldest is not None and self._writer.is_due(self._oldest):
            self._flush()
            self._commit(self._writer.commit)
            self._oldest = self._clock() if self._waiting.finished else None

    def finish(self, hurry: Callable[[], object] = lambda: False) -> tuple[Shard, ...]:
        """Commit everything and return all shards. Once `hurry` says so, verdicts are waited for HURRIED_SECONDS more: samples
        that have none by then are committed without. Where rows stop, samples behind one that is missing or not judged are not
        committed."""
        self._submit()
        if self._pool is not None:
            tickets, deadline = _tickets([*self._waiting.finished, *self._unjudged]), math.inf
            while not self._pool.wait(tickets, LOOK_SECONDS):
                deadline = min(deadline, self._clock() + HURRIED_SECONDS) if hurry() else deadline
                if self._clock() >= deadline:
                    self._pool.close()
        self._follow_verdicts()
        self._flush()
        return self._commit(self._writer.close)

    def close(self) -> None:
        """End the processes of the judge."""
        if self._pool is not None:
            self._pool.close()

    def _take(self, completions: Sequence[Completion]) -> None:
        finished = list(map(_Finished, completions))
        if self._stops is None:
            self._accept((), finished)
            return
        for each in finished:
            row, sample = each.completion.row_index, each.completion.sample_index
            if self._stops.wants(row, sample):
                self._stops.hold(row, sample, each)
                self._unjudged.append(each)

    def _accept(self, unsampled: Sequence[UnsampledRow], finished: Sequence[_Finished]) -> None:
        """From here on they are not lost."""
        waiting, held = self._waiting, sum(_own_bytes(each.completion) for each in finished)
        self.took_error = self.took_error or any(each.completion.error_code is not None for each in finished)
        failures = [each for each in unsampled if each.error is not None]
        cancelled = [each for each in unsampled if each.error is None]
        self._waiting = _Waiting(
            waiting.row,
            (*waiting.failures, *failures),
            (*waiting.finished, *finished),
            waiting.bytes + held,
            (*waiting.cancelled, *cancelled),
        )

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

    def _submit(self) -> None:
        """Give the judge what it has not been given. A sample whose tokens or row cannot be had is not judged: what its columns
        make of that is told there."""
        if self._pool is None:
            return
        finished = self._waiting.finished if self._stops is None else self._unjudged
        new = [each for each in finished if each.ticket is None and each.completion.error_code is None]
        for begin in range(0, len(new), BATCH_SAMPLES):
            self._submit_some(new[begin : begin + BATCH_SAMPLES])

    def _submit_some(self, new: Sequence[_Finished], *, again: bool = False) -> None:
        assert self._pool is not None
        try:
            texts = self._texts([each.completion for each in new])
            rows = self._store.input_rows(np.array([each.completion.row_index for each in new], np.int64))
        except BaseException as error:
            if not _is_of_rows(error):
                raise
            if len(new) > 1 or not again:
                for part in (new[: len(new) // 2], new[len(new) // 2 :]):
                    if part:
                        self._submit_some(part, again=len(new) == 1)
                return
            new[0].ticket = Ticket("", {})
            new[0].ticket.verdict = Verdict.none(f"{type(error).__name__}: {error}")
            return
        answers = texts
        if self._tags is not None:
            answers = [answer or "" for _, answer in self._split([each.completion for each in new], texts)]
        for each, text, ticket in zip(new, texts, self._pool.submit(answers, rows), strict=True):
            each.text, each.ticket = text, ticket

    def _ready(self) -> tuple[_Finished, ...]:
        """The finished samples in front of the first that waits for its verdict."""
        finished = self._waiting.finished
        if self._pool is None:
            return finished
        late = (i for i, each in enumerate(finished) if each.completion.error_code is None and each.verdict is None)
        return finished[: next(late, len(finished))]

    def _flush(self) -> None:
        self._settle()
        with self._claim.committing():
            for piece in self._pieces(self._ready()):
                for table in self._tables(*piece):
                    self._writer.take(table)
                    self._settle()
                    self._count(table)
                    self._commit(self._writer.commit_due)

    def _settle(self) -> None:
        """Let go of the samples that the writer has taken, whatever came in between."""
        self._waiting = self._waiting.behind(self._writer.num_rows)

    def _commit(self, commit: Callable[[], _Result]) -> _Result:
        with self._claim.committing():
            try:
                return commit()
            except BaseException as error:
                if not _is_of_rows(error):
                    raise
            self._writer.mend(self._mended)
            return commit()

    def _mended(self, table: pa.Table) -> pa.Table:
        repaired = mended(table, _encode)
        if repaired is not table:
            self._count(table, -1)
            self._count(repaired)
        return repaired

    def _pieces(self, finished: Sequence[_Finished]) -> Iterator[tuple[Sequence[_Finished], Sequence[UnsampledRow]]]:
        """What waits, in the order of `_Waiting`, no more at a time than PIECE_BYTES hold; of the finished samples, these first
        ones, and what is behind them where they are all."""
        waiting = self._waiting
        for part in self._unsampled_pieces(waiting.failures):
            yield (), part
        if finished:
            carried = self._store.row_bytes(np.array([each.completion.row_index for each in finished], np.int64))
            for begin, end in _cuts(carried + np.array([_own_bytes(each.completion) for each in finished], np.int64)):
                yield finished[begin:end], ()
        for part in self._unsampled_pieces(waiting.cancelled if len(finished) == len(waiting.finished) else ()):
            yield (), part

    def _unsampled_pieces(self, rows: Sequence[UnsampledRow]) -> Iterator[list[UnsampledRow]]:
        each = self._store.row_bytes(np.array([row.row_index for row in rows], np.int64)) + SAMPLE_BYTES
        parts = [part for row, size in zip(rows, each.tolist(), strict=True) for part in _split(row, size)]
        for begin, end in _cuts(np.array([size for _, size in parts], np.int64)):
            yield [part for part, _ in parts[begin:end]]

    def _tables(self, finished: Sequence[_Finished], failures: Sequence[UnsampledRow]) -> Iterator[pa.Table]:
        try:
            whole = self._table(self._schema, finished, failures)
        except BaseException as error:
            if not _is_of_rows(error):
                raise
        else:
            yield whole
            return
        if len(finished) + len(failures) > 1:
            c, f = len(finished) // 2, len(failures) // 2
            for part in ((finished[:c], ()), (finished[c:], ()), ((), failures[:f]), ((), failures[f:])):
                if part[0] or part[1]:
                    yield from self._tables(*part)
            return
        key = key_table([each.completion for each in finished], failures)
        yield build_piecemeal(self._schema, key, lambda schema: self._table(schema, finished, failures))

    def _table(self, schema: pa.Schema, finished: Sequence[_Finished], failures: Sequence[UnsampledRow]) -> pa.Table:
        """`schema` is the output's, or a part of it."""
        completions = [each.completion for each in finished]
        rows, _ = sample_keys(completions, failures)
        wanted = set(input_names(schema).values())
        columns = self._store.columns(rows, [name for name in self._store.column_schema.names if name in wanted])
        texts = [""] * len(completions)
        split = self._tags is not None and not {"reasoning_text", "answer_text"}.isdisjoint(schema.names)
        if "text" in schema.names or split:
            texts = [each.text for each in finished if each.text is not None]
            texts = texts if len(texts) == len(finished) else self._texts(completions)
        more = verdict_columns([each.verdict for each in finished], self._verdict_names)
        if split:
            parts = self._split(completions, texts)
            more |= {"reasoning_text": [part for part, _ in parts], "answer_text": [part for _, part in parts]}
        ids = self._store.ids(rows) if "id" in schema.names else []
        completions = [
            replace(each, error_message=f"{line}: {each.error_message}")
            if each.error_message and (line := self._store.places.line(each.row_index))
            else each
            for each in completions
        ]
        return build_table(schema, completions, failures, texts=texts, ids=ids, columns=columns, more=more)

    def _split(self, completions: Sequence[Completion], texts: Sequence[str]) -> list[tuple[str | None, str | None]]:
        """The thinking and the answer of each text. Whether the prompt began the thinking is looked at where the text does not
        tell."""
        assert self._tags is not None
        tags, parts = self._tags, list[tuple[str | None, str | None]]()
        for completion, text in zip(completions, texts, strict=True):
            begun = False
            if tags.end not in text:
                tail = self._store.prompt(completion.row_index)[-TAG_TOKENS:].tolist()
                begun = self._tokenizer.decode_batch([tail], skip_special_tokens=False)[0].rstrip().endswith(tags.begin)
            parts.append(split_reasoning(text, tags, begun=begun))
        return parts

    def _texts(self, completions: Sequence[Completion]) -> list[str]:
        least = [self._store.sampling[self._store.params[completion.row_index]].min_tokens for completion in completions]
        return sample_texts(completions, least, self._tokenizer.decode_batch)

    def _count(self, table: pa.Table, sign: int = 1) -> None:
        ok = count_ok(table)
        for code in table["error_code"].drop_null().to_pylist():
            self.error_counts[code] += sign
        self.num_ok += sign * ok
        self.num_cancelled += sign * count_cancelled(table)
        if self._pool is None:
            return
        good = table.filter(pc.call_function("equal", [table["status"], "ok"]))
        self.num_unverified += sign * good["correct"].null_count
        for reason, count in Counter(good["verify_error"].drop_null().to_pylist()).items():
            if reason in self._reasons or len(self._reasons) < MAX_REASONS:
                self._reasons[reason] += sign * count


def _same_error(completion: Completion, sample: int) -> _Finished:
    """Another sample of the row, which ends as that one did without having begun."""
    empty = replace(completion, sample_index=sample, token_ids=completion.token_ids[:0], counts=NO_COUNTS)
    return _Finished(replace(empty, logprobs=None, top_ids=None, top_logprobs=None))


def _tickets(finished: Sequence[_Finished]) -> list[Ticket]:
    return [each.ticket for each in finished if each.ticket is not None]


def _is_of_rows(error: BaseException) -> bool:
    """Whether to look for the rows that an exception may be of: it neither ends the program, nor comes from the system (PyArrow
    raises OSError without a number for what it cannot encode), nor says itself what to do."""
    return not isinstance(error, (*STOPS, TokabatchError)) and not (isinstance(error, OSError) and error.errno is not None)


def _encode(table: pa.Table) -> None:
    write_parquet(table, io.BytesIO())


def _own_bytes(completion: Completion) -> int:
    tokens = len(completion.token_ids)
    alternatives = 0 if completion.top_ids is None else completion.top_ids.size
    scored = 0 if completion.logprobs is None else tokens
    return SAMPLE_BYTES + tokens * TOKEN_BYTES + scored * LOGPROB_BYTES + alternatives * ALTERNATIVE_BYTES


def _cuts(sizes: Int64) -> Iterator[tuple[int, int]]:
    """Consecutive ranges whose sizes add up to PIECE_BYTES at most, or of one that is larger by itself."""
    begin = held = 0
    for place, size in enumerate(sizes.tolist()):
        if place > begin and held + size > PIECE_BYTES:
            yield begin, place
            begin, held = place, 0
        held += size
    if len(sizes):
        yield begin, len(sizes)


def _split(failure: UnsampledRow, size: int) -> Iterator[tuple[UnsampledRow, int]]:
    """The samples of a failed row, each of so many bytes, in parts of PIECE_BYTES; and what each part takes."""
    count = max(1, PIECE_BYTES // max(size, 1))
    for begin in range(0, failure.num_samples, count):
        samples = failure.samples[begin : begin + count]
        yield replace(failure, samples=samples), size * len(samples)
