"""From finished samples to rows on disk: decode, verify, add the input's columns, hand to the shard writer.

Keeps the running books: what is ok, what is an error, and how many samples of each row are right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from tokabatch.data.committed import Committed
from tokabatch.data.folder import Claim
from tokabatch.data.output import FailedRow, build_table, cut_at_stop, sample_keys, text_token_ids
from tokabatch.data.shards import Shard, ShardWriter
from tokabatch.experiments.pass_at_k import curve
from tokabatch.experiments.verifiers import load_verifier
from tokabatch.job import Job
from tokabatch.messages import Completion, Int64
from tokabatch.preparation import Prepared

BATCH_SAMPLES = 256
"""Samples made into a table at once; fewer when `flush_seconds` are over. The next steps wait meanwhile: 256 are done within
the step in flight, 2,048 left a GPU idle for four steps (benchmarks/LOG.md)."""
SHOWN_REASONS = 3


class Recorder:
    """Takes completions in any order. `finish` commits the rest; nothing is lost before that but to a crash. The books begin
    with what is `committed` already. Every method that writes raises CommitError where the output folder takes no more."""

    def __init__(
        self, job: Job, prepared: Prepared, claim: Claim, committed: Committed, clock: Callable[[], float] = time.monotonic
    ) -> None:
        store = prepared.store
        self._tokenizer = prepared.tokenizer
        self._store = store
        self._answer = job.verify.answer if job.verify else None
        self._verify = load_verifier(job.verify.kind) if job.verify else None
        self._schema = prepared.output_schema
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
        self._waiting: list[Completion] = []
        self._oldest: float | None = None
        """When the first sample that is not committed yet came in."""
        self._num_samples = committed.drawn.counts()
        self._num_correct = committed.correct.copy()
        self.num_unverified = committed.unverified
        """Samples whose reference answer the verifier does not understand; pass@k counts them as wrong."""
        self.unverified_reasons: list[str] = []
        self.error_counts = committed.error_counts.copy()
        self.num_ok = committed.ok

    @property
    def num_errors(self) -> int:
        return sum(self.error_counts.values())

    def fail(self, failures: Sequence[FailedRow]) -> None:
        """Rows that never became prompts."""
        for begin in range(0, len(failures), BATCH_SAMPLES):
            self._write([], failures[begin : begin + BATCH_SAMPLES])
            self._commit_due()

    def add(self, completions: list[Completion]) -> None:
        """Samples that the scheduler finished; on disk after at most `flush_seconds`."""
        self._waiting += completions
        if completions and self._oldest is None:
            self._oldest = self._clock()
        if len(self._waiting) >= BATCH_SAMPLES:
            self._flush()
        if self._oldest is not None and self._clock() - self._oldest >= self._flush_seconds:
            self._flush()
            with self._claim.committing():
                self._writer.commit()
            self._oldest = None

    def finish(self) -> tuple[Shard, ...]:
        """Commit everything and return all shards."""
        self._flush()
        with self._claim.committing():
            return self._writer.close()

    def pass_at_k(self) -> tuple[tuple[int, float], ...] | None:
        """The curve over the rows seen so far; None when nothing is verified."""
        if self._verify is None:
            return None
        seen = self._num_samples > 0
        return tuple((point.k, point.value) for point in curve(self._num_samples[seen], self._num_correct[seen]))

    def _flush(self) -> None:
        if self._waiting:
            self._write(self._waiting, ())
            # The writer has them: a commit that fails now can be tried again, and repeats none.
            self._waiting = []
            self._commit_due()

    def _commit_due(self) -> None:
        with self._claim.committing():
            self._writer.commit_due()

    def _write(self, completions: Sequence[Completion], failures: Sequence[FailedRow]) -> None:
        rows, _ = sample_keys(completions, failures)
        texts = self._texts(completions)
        columns = self._store.columns(rows)
        correct = self._judge(rows[: len(completions)], completions, texts)
        table = build_table(
            self._schema, completions, failures, texts=texts, ids=self._store.ids(rows), columns=columns, correct=correct
        )
        self._writer.take(table)
        np.add.at(self._num_samples, rows, 1)
        self.error_counts.update(c.error_code for c in completions if c.error_code is not None)
        for failure in failures:
            self.error_counts[failure.error.code] += failure.num_samples
        self.num_ok += sum(c.error_code is None for c in completions)

    def _texts(self, completions: Sequence[Completion]) -> list[str]:
        texts = self._tokenizer.decode_batch([text_token_ids(completion) for completion in completions])
        return [cut_at_stop(text, c.stop_reason) for text, c in zip(texts, completions, strict=True)]

    def _judge(self, rows: Int64, completions: Sequence[Completion], texts: Sequence[str]) -> list[bool | None] | None:
        """Each sample's verdict; None for a sample whose reference cannot be compared with."""
        if self._verify is None or self._answer is None:
            return None
        if not completions:
            return []
        answers = self._store.columns(rows, [self._answer]).column(0).to_pylist()
        verdicts: list[bool | None] = []
        for row, completion, text, answer in zip(rows.tolist(), completions, texts, answers, strict=True):
            try:
                right = completion.error_code is None and self._verify(text, answer)
            except ValueError as error:
                self.num_unverified += 1
                if len(self.unverified_reasons) < SHOWN_REASONS and str(error) not in self.unverified_reasons:
                    self.unverified_reasons.append(str(error))
                verdicts.append(None)
                continue
            self._num_correct[row] += right
            verdicts.append(right)
        return verdicts
