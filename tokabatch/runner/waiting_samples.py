"""Buffers of finished samples that the shard writer has not accepted yet: first as samples, then as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from tokabatch.arrays import Int64
from tokabatch.input.store.tokenized_input import InputStore
from tokabatch.output.schema import UnsampledRow
from tokabatch.scheduling.contracts import Completion
from tokabatch.scoring.judge import Verdict
from tokabatch.scoring.pool import Ticket

PIECE_BYTES = 64 << 20
"""The estimated memory of waiting samples, and of a table, in bytes; a larger sample gets a table of its own."""
TOKEN_BYTES, LOGPROB_BYTES, ALTERNATIVE_BYTES = 24, 16, 16
"""Estimated bytes of a token with its text, of its log-probability, and of one alternative."""
SAMPLE_BYTES = 1024


@dataclass(slots=True)
class FinishedSample:
    """A sample with its text, once decoded, and its verdict, once judged. A sample that will not be judged has no `ticket`."""

    completion: Completion
    number: int
    """The number by which the process that sent the sample identifies it."""
    text: str | None = None
    ticket: Ticket | None = None

    @property
    def verdict(self) -> Verdict | None:
        return None if self.ticket is None else self.ticket.verdict

    @property
    def is_ready(self) -> bool:
        """Whether it has its verdict, or needs none because it is an error."""
        return self.completion.error_code is not None or self.verdict is not None

    @property
    def num_bytes(self) -> int:
        """The estimated memory in bytes, without the columns of its row."""
        completion, tokens = self.completion, len(self.completion.token_ids)
        alternatives = 0 if completion.top_ids is None else completion.top_ids.size
        scored = 0 if completion.logprobs is None else tokens
        return SAMPLE_BYTES + tokens * TOKEN_BYTES + scored * LOGPROB_BYTES + alternatives * ALTERNATIVE_BYTES


@dataclass(frozen=True, slots=True)
class WaitingSamples:
    """Samples to be made into tables, in this order; the first has number `begin`, counted over the whole run. It is immutable
    and replaced in one assignment, so that an exception cannot leave it inconsistent."""

    begin: int = 0
    finished: tuple[FinishedSample, ...] = ()
    bytes: int = 0

    def joined_by(self, finished: Sequence[FinishedSample]) -> WaitingSamples:
        more = sum(each.num_bytes for each in finished)
        return replace(self, finished=(*self.finished, *finished), bytes=self.bytes + more)

    def ready_first(self) -> tuple[WaitingSamples, int]:
        """Return the same samples with those that are ready moved to the front, and the number of these."""
        # Other threads set verdicts meanwhile: order and number are of the same look at each.
        flags = [each.is_ready for each in self.finished]
        order = sorted(range(len(flags)), key=lambda at: not flags[at])
        return replace(self, finished=tuple(self.finished[at] for at in order)), sum(flags)

    def behind(self, number: int) -> WaitingSamples:
        """Return the samples from this number on."""
        taken = self.finished[: number - self.begin]
        left = self.bytes - sum(each.num_bytes for each in taken)
        return WaitingSamples(number, self.finished[len(taken) :], left)

    def pieces(self, ready: int, store: InputStore, most: int) -> Iterator[tuple[FinishedSample, ...]]:
        """Yield the first `ready` samples in pieces of at most `most` samples and PIECE_BYTES."""
        if not ready:
            return
        finished = self.finished[:ready]
        carried = store.row_bytes(np.array([each.completion.row_index for each in finished], np.int64))
        for begin, end in _cuts(carried + np.array([each.num_bytes for each in finished], np.int64), most):
            yield finished[begin:end]


@dataclass(frozen=True, slots=True)
class WaitingRows:
    """What is passed to the writer next: failed rows, then tables of finished samples, then cancelled samples, which must not
    be on disk before the sample that stopped their row. The first sample becomes row `row` of the writer. It is immutable and
    replaced in one assignment."""

    row: int
    received: int = 0
    """The number of finished samples received as tables so far, including those that were not kept and those already
    written."""
    failures: tuple[UnsampledRow, ...] = ()
    tables: tuple[pa.Table, ...] = ()
    bytes: int = 0
    """Of the tables."""
    cancelled: tuple[UnsampledRow, ...] = ()

    def __len__(self) -> int:
        """Return the number of samples."""
        unsampled = sum(each.num_samples for each in (*self.failures, *self.cancelled))
        return unsampled + sum(table.num_rows for table in self.tables)

    def joined_by(self, unsampled: Sequence[UnsampledRow], table: pa.Table | None, received: int = 0) -> WaitingRows:
        """Return these rows and further ones, with `received` samples in total. Of the further rows without a sample, those
        with an error have failed and the others are cancelled."""
        more = () if table is None or not table.num_rows else (table,)
        return WaitingRows(
            self.row,
            self.received + received,
            (*self.failures, *(each for each in unsampled if each.error is not None)),
            (*self.tables, *more),
            self.bytes + sum(each.nbytes for each in more),
            (*self.cancelled, *(each for each in unsampled if each.error is None)),
        )

    def behind(self, row: int) -> WaitingRows:
        """Return what is left after the writer has accepted all samples before this row."""
        if row == self.row:
            return self
        failures, taken = _unsampled_behind(self.failures, row - self.row)
        tables: list[pa.Table] = []
        for table in self.tables:
            skipped = min(taken, table.num_rows)
            taken -= skipped
            if skipped < table.num_rows:
                tables.append(table.slice(skipped))
        cancelled, _ = _unsampled_behind(self.cancelled, taken)
        size = sum(table.nbytes for table in tables)
        return WaitingRows(row, self.received, failures, tuple(tables), size, cancelled)


def unsampled_pieces(rows: Sequence[UnsampledRow], store: InputStore) -> Iterator[Sequence[UnsampledRow]]:
    """Yield the rows in pieces of at most PIECE_BYTES; a row may be divided between pieces."""
    sizes = store.row_bytes(np.array([row.row_index for row in rows], np.int64)) + SAMPLE_BYTES
    parts: list[UnsampledRow] = []
    part_bytes: list[int] = []
    for row, size in zip(rows, sizes.tolist(), strict=True):
        # One row may have more samples than a piece holds.
        count = max(1, PIECE_BYTES // max(size, 1))
        for begin in range(0, row.num_samples, count):
            parts.append(replace(row, samples=row.samples[begin : begin + count]))
            part_bytes.append(size * parts[-1].num_samples)
    for begin, end in _cuts(np.array(part_bytes, np.int64)):
        yield parts[begin:end]


def _unsampled_behind(rows: Sequence[UnsampledRow], taken: int) -> tuple[tuple[UnsampledRow, ...], int]:
    """Return `rows` without their first `taken` samples, and by how many `taken` exceeds their number."""
    left: list[UnsampledRow] = []
    for each in rows:
        skipped = min(taken, each.num_samples)
        taken -= skipped
        if skipped < each.num_samples:
            left.append(replace(each, samples=each.samples[skipped:]))
    return tuple(left), taken


def _cuts(sizes: Int64, most: float = math.inf) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges of at most `most` items and PIECE_BYTES in total, or of a single larger item."""
    begin = held = 0
    for place, size in enumerate(sizes.tolist()):
        if place > begin and (held + size > PIECE_BYTES or place - begin >= most):
            yield begin, place
            begin, held = place, 0
        held += size
    if len(sizes):
        yield begin, len(sizes)
