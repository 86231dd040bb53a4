"""From finished samples to rows on disk: decode, verify, add the input's columns, hand to the shard writer.

Samples wait here, then in the writer. `_Waiting` counts the rows that the writer had taken before them, so that wherever an
exception strikes, what is handed over and what is not can be told apart: nothing is lost, and nothing handed over twice.

Samples become tables in pieces of PIECE_BYTES, whatever their rows carry. A piece that cannot be built is halved until the
samples stand alone whose columns are at fault; these become error rows that keep the rest.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from tokabatch.arrays import Int64
from tokabatch.errors import STOPS, TokabatchError
from tokabatch.job import Job
from tokabatch.output.existing_results import Committed
from tokabatch.output.folder import Claim
from tokabatch.output.schema import (
    CANNOT_BE_WRITTEN,
    CORRECT,
    FailedRow,
    build_piecemeal,
    build_table,
    cut_at_stop,
    key_table,
    mended,
    sample_keys,
    text_token_ids,
)
from tokabatch.output.shards import Shard, ShardWriter, count_ok, write_parquet
from tokabatch.scheduling.contracts import Completion
from tokabatch.scoring.pass_at_k import curve
from tokabatch.scoring.verifiers import load_verifier
from tokabatch.workload import Workload

BATCH_SAMPLES = 2048
"""Samples made into a table at once; fewer when `flush_seconds` are over."""
PIECE_BYTES = 64 << 20
"""Memory of the samples that wait, and of one table, both by estimate; a sample that takes more has a table of its own."""
TOKEN_BYTES, LOGPROB_BYTES, ALTERNATIVE_BYTES = 24, 16, 16
"""By estimate: a token with its text, its logprob, one alternative to it."""
SAMPLE_BYTES = 1024
SHOWN_REASONS, MAX_REASONS, MAX_REASON = 3, 1000, 200
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What the writer will take next, failed rows first, then finished samples in the order they came; the first sample will be
    its row number `row`. Replaced in one assignment."""

    row: int
    failures: tuple[FailedRow, ...] = ()
    completions: tuple[Completion, ...] = ()
    bytes: int = 0
    """Of the finished samples."""

    def behind(self, row: int) -> _Waiting:
        """What is left when the writer has taken all samples before that row."""
        taken, failures = row - self.row, list[FailedRow]()
        for failure in self.failures:
            skipped = min(taken, failure.num_samples)
            taken -= skipped
            if skipped < failure.num_samples:
                failures.append(replace(failure, samples=failure.samples[skipped:]))
        completions = self.completions[taken:]
        return _Waiting(row, tuple(failures), completions, sum(map(_own_bytes, completions)))


@dataclass(slots=True)
class _Verdicts:
    """Of one table; `reasons` counts why samples have none."""

    values: list[bool | None]
    reasons: Counter[str]


class Recorder:
    """Takes completions in any order. `finish` commits the rest; nothing is lost before that but to a crash. The books begin
    with what is `committed` already. Every method that writes raises CommitError where the output folder takes no more; what
    was not committed then is kept, and the next call tries again."""

    def __init__(
        self, job: Job, workload: Workload, claim: Claim, committed: Committed, clock: Callable[[], float] = time.monotonic
    ) -> None:
        store = workload.store
        self._tokenizer = workload.tokenizer
        self._store = store
        self._answer = job.verify.answer if job.verify else None
        self._verify = load_verifier(job.verify.kind) if job.verify else None
        self._schema = workload.output_schema
        self._writer = ShardWriter(
            claim,
            self._schema,
            rows_per_shard=job.output.rows_per_shard,
            flush_seconds=job.output.flush_seconds,
            earlier=committed.shards,
        )
        self._claim = claim
        self._clock = clock
        self._flush_seconds = job.output.flush_seconds
        self._waiting = _Waiting(self._writer.num_rows)
        self._oldest: float | None = None
        """When the first sample that is not committed yet came in."""
        self._num_samples = committed.drawn.counts()
        self._num_correct = committed.correct.copy()
        self.num_unverified = committed.unverified
        """Samples that the verifier cannot judge, mostly for want of a reference answer; pass@k counts them as wrong."""
        self._reasons: Counter[str] = Counter()
        self.error_counts = committed.error_counts.copy()
        self.num_ok = committed.ok

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

    def fail(self, failures: Sequence[FailedRow]) -> None:
        """Rows that never became prompts."""
        self._accept(failures, ())
        self._flush()

    def add(self, completions: Sequence[Completion]) -> None:
        """Samples that the scheduler finished; on disk after at most `flush_seconds`."""
        self._accept((), completions)
        if completions and self._oldest is None:
            self._oldest = self._clock()
        if len(self._waiting.completions) >= BATCH_SAMPLES or self._waiting.bytes >= PIECE_BYTES:
            self._flush()
        if self._oldest is not None and self._clock() - self._oldest >= self._flush_seconds:
            self._flush()
            self._commit(self._writer.commit)
            self._oldest = None

    def finish(self) -> tuple[Shard, ...]:
        """Commit everything and return all shards."""
        self._flush()
        return self._commit(self._writer.close)

    def pass_at_k(self) -> tuple[tuple[int, float], ...] | None:
        """The curve over the rows seen so far; None when nothing is verified."""
        if self._verify is None:
            return None
        seen = self._num_samples > 0
        return tuple((point.k, point.value) for point in curve(self._num_samples[seen], self._num_correct[seen]))

    def _accept(self, failures: Sequence[FailedRow], completions: Sequence[Completion]) -> None:
        """From here on they are not lost."""
        waiting, held = self._waiting, sum(map(_own_bytes, completions))
        self._waiting = _Waiting(
            waiting.row,
            (*waiting.failures, *failures),
            (*waiting.completions, *completions),
            waiting.bytes + held,
        )

    def _flush(self) -> None:
        self._settle()
        waiting = self._waiting
        with self._claim.committing():
            for piece in self._pieces(waiting.completions, waiting.failures):
                for table, verdicts in self._tables(*piece):
                    self._writer.take(table)
                    self._settle()
                    self._count(table, verdicts)
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
            self._count(table, None, -1)
            self._count(repaired, None)
        return repaired

    def _pieces(
        self, completions: Sequence[Completion], failures: Sequence[FailedRow]
    ) -> Iterator[tuple[Sequence[Completion], Sequence[FailedRow]]]:
        """The same in their order, no more at a time than PIECE_BYTES hold."""
        if failures:
            each = self._store.row_bytes(np.array([f.row_index for f in failures], np.int64)) + SAMPLE_BYTES
            parts = [part for failure, size in zip(failures, each.tolist(), strict=True) for part in _split(failure, size)]
            for begin, end in _cuts(np.array([size for _, size in parts], np.int64)):
                yield (), [part for part, _ in parts[begin:end]]
        if completions:
            carried = self._store.row_bytes(np.array([c.row_index for c in completions], np.int64))
            for begin, end in _cuts(carried + np.array([_own_bytes(c) for c in completions], np.int64)):
                yield completions[begin:end], ()

    def _tables(
        self, completions: Sequence[Completion], failures: Sequence[FailedRow]
    ) -> Iterator[tuple[pa.Table, _Verdicts | None]]:
        try:
            whole = self._table(self._schema, completions, failures)
        except BaseException as error:
            if not _is_of_rows(error):
                raise
        else:
            yield whole
            return
        if len(completions) + len(failures) > 1:
            c, f = len(completions) // 2, len(failures) // 2
            for part in ((completions[:c], ()), (completions[c:], ()), ((), failures[:f]), ((), failures[f:])):
                if part[0] or part[1]:
                    yield from self._tables(*part)
            return
        key = key_table(completions, failures)
        yield build_piecemeal(self._schema, key, lambda schema: self._table(schema, completions, failures)[0]), None

    def _table(
        self, schema: pa.Schema, completions: Sequence[Completion], failures: Sequence[FailedRow]
    ) -> tuple[pa.Table, _Verdicts | None]:
        """`schema` is the output's, or a part of it."""
        rows, _ = sample_keys(completions, failures)
        carried = [name for name in self._store.column_schema.names if name in schema.names]
        judged = self._verify is not None and CORRECT.name in schema.names
        answer = [self._answer] if judged and self._answer is not None and self._answer not in carried else []
        columns = self._store.columns(rows, carried + answer)
        texts = self._texts(completions) if judged or "text" in schema.names else [""] * len(completions)
        verdicts = self._judge(completions, texts, columns) if judged else None
        ids = self._store.ids(rows) if "id" in schema.names else []
        table = build_table(
            schema, completions, failures, texts=texts, ids=ids, columns=columns, correct=verdicts and verdicts.values
        )
        return table, verdicts

    def _texts(self, completions: Sequence[Completion]) -> list[str]:
        texts = self._tokenizer.decode_batch([text_token_ids(completion) for completion in completions])
        least = [self._store.sampling[self._store.params[completion.row_index]].min_tokens for completion in completions]
        if not any(least):
            return [cut_at_stop(text, c.stop_reason) for text, c in zip(texts, completions, strict=True)]
        # What the first `min_tokens` tokens say ended nothing.
        passed = self._tokenizer.decode_batch([c.token_ids[:count] for c, count in zip(completions, least, strict=True)])
        cut = zip(texts, completions, passed, strict=True)
        return [cut_at_stop(text, completion.stop_reason, len(before)) for text, completion, before in cut]

    def _judge(self, completions: Sequence[Completion], texts: Sequence[str], columns: pa.Table) -> _Verdicts:
        """None for a sample that cannot be judged. Whatever a verifier raises concerns one sample alone."""
        verdicts = _Verdicts([], Counter())
        for place, (completion, text) in enumerate(zip(completions, texts, strict=True)):
            verdict: bool | None = None
            if completion.error_code is None:
                try:
                    verdict = self._verdict(text, columns, place)
                except KeyboardInterrupt:
                    raise
                except ValueError as error:
                    verdicts.reasons[str(error)[:MAX_REASON]] += 1
                except BaseException as error:
                    verdicts.reasons[f"the verifier raised {type(error).__name__}: {error}"[:MAX_REASON]] += 1
            verdicts.values.append(verdict)
        return verdicts

    def _verdict(self, text: str, columns: pa.Table, place: int) -> bool:
        assert self._verify is not None and self._answer is not None
        right: Any = self._verify(text, columns[self._answer][place].as_py())
        if not isinstance(right, bool | np.bool_):
            raise TypeError(f"it returned {right!r}, not True or False")
        return bool(right)

    def _count(self, table: pa.Table, verdicts: _Verdicts | None, sign: int = 1) -> None:
        rows, ok = table["row_index"].to_numpy(), count_ok(table)
        np.add.at(self._num_samples, rows, sign)
        for code in table["error_code"].drop_null().to_pylist():
            self.error_counts[code] += sign
        self.num_ok += sign * ok
        if self._verify is None:
            return
        correct = table[CORRECT.name]
        np.add.at(self._num_correct, rows[correct.fill_null(False).to_numpy()], sign)
        self.num_unverified += sign * (ok - (len(correct) - correct.null_count))
        for reason, count in (verdicts.reasons if verdicts else {}).items():
            if reason in self._reasons or len(self._reasons) < MAX_REASONS:
                self._reasons[reason] += count


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


def _split(failure: FailedRow, size: int) -> Iterator[tuple[FailedRow, int]]:
    """The samples of a failed row, each of so many bytes, in parts of PIECE_BYTES; and what each part takes."""
    count = max(1, PIECE_BYTES // max(size, 1))
    for begin in range(0, failure.num_samples, count):
        samples = failure.samples[begin : begin + count]
        yield replace(failure, samples=samples), size * len(samples)
