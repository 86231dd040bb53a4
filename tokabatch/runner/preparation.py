"""Preparation of finished samples for recording: they are decoded, judged if the job verifies, and made into tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Protocol

import numpy as np
import pyarrow as pa

from tokabatch.arrays import Int64
from tokabatch.job import Job
from tokabatch.runner.judging import Judging
from tokabatch.runner.sample_tables import SampleTables
from tokabatch.runner.waiting_samples import PIECE_BYTES, FinishedSample, WaitingSamples
from tokabatch.scheduling.completion_batch import Completions
from tokabatch.scoring.pool import most_judges
from tokabatch.workload.prepare import Workload

BATCH_SAMPLES = 2048
"""The samples of a full table."""
LOOKED_AT = 512
"""New samples after which all waiting ones are checked for verdicts again."""


class Preparing(Protocol):
    """Makes tables of finished samples, each sample after its verdict has arrived."""

    @property
    def num_waiting(self) -> int:
        """The samples that have been added and not yet returned in tables."""
        ...

    def add(self, completions: Completions) -> None:
        """Add finished samples."""
        ...

    def tables(self, received: int, *, everything: bool) -> Iterator[pa.Table]:
        """Yield the tables that are ready, after the first `received` samples; with `everything`, also tables that are not
        full. A table counts as received when the next one is requested."""
        ...

    def keeps_up(self) -> bool:
        """Return whether more samples may be added. If not, block for a fraction of a second first, after which `tables` may
        have some."""
        ...

    def is_done(self, goes_on: Callable[[], bool]) -> bool:
        """Return whether `tables` can yield all samples. If not, block for a fraction of a second first. Some seconds after
        `goes_on` has become False, samples without a verdict are made into tables as well (`NOT_JUDGED`)."""
        ...

    def check(self) -> None:
        """Raise the error because of which some samples will never be in a table. The tables of the others are complete."""
        ...

    def close(self) -> None:
        """Stop the processes."""
        ...


class Preparation:
    """See `Preparing`: in this process."""

    def __init__(self, job: Job, workload: Workload, tables: SampleTables, part: tuple[int, int] = (0, 1)) -> None:
        """`part` is the number of this instance and how many there are. Each gets an equal part of the judges that the job may
        have, and starts as many at once as it has replicas."""
        self._store, self._tables = workload.store, tables
        self._judging = None
        if job.verify is not None:
            place, count = part
            judges, at_once = most_judges(job.verify), -(-workload.layout.replicas // count)
            most = max(1, judges // count + (place < judges % count))
            self._judging = Judging(job.verify, workload.store, tables, at_once, most)
        self.waiting = WaitingSamples()
        self._arrived = 0
        """The samples that have been added since the last check for verdicts."""

    @property
    def num_waiting(self) -> int:
        return len(self.waiting.finished)

    def add(self, completions: Completions, numbers: Int64 | None = None) -> None:
        """Add samples, with a number for each if `numbers` will be called."""
        given = repeat(0) if numbers is None else numbers.tolist()
        self._accept([FinishedSample(each, number) for each, number in zip(completions, given, strict=False)])
        self._arrived += len(completions)
        if self._judging is not None:
            self._judging.submit(self.waiting.finished)

    def tables(self, received: int, *, everything: bool) -> Iterator[pa.Table]:
        self._settle(received)
        # Checking all waiting samples takes longer than recording a few, so it is not done with every message.
        few = self._judging is not None and self._arrived < LOOKED_AT and self.waiting.bytes < PIECE_BYTES
        if few and not everything:
            return
        self._arrived, ready = 0, len(self.waiting.finished)
        if self._judging is not None:
            self.waiting, ready = self.waiting.ready_first()
        if not everything and ready < BATCH_SAMPLES and self.waiting.bytes < PIECE_BYTES:
            return
        if not everything and self.waiting.bytes < PIECE_BYTES:
            ready -= ready % BATCH_SAMPLES
        for piece in self.waiting.pieces(ready, self._store, BATCH_SAMPLES):
            for table in self._tables.build(piece, ()):
                yield table
                self._settle(self.waiting.begin + table.num_rows)

    def numbers(self, count: int) -> Int64:
        """Return the numbers of the samples of the table that `tables` has just yielded, shape [count]."""
        return np.array([each.number for each in self.waiting.finished[:count]], np.int64)

    def keeps_up(self) -> bool:
        return self._judging is None or self._judging.keeps_up(self.waiting.finished)

    def is_done(self, goes_on: Callable[[], bool]) -> bool:
        if self._judging is None:
            return True
        # An exception may have interrupted `add` before it submitted the samples.
        self._judging.submit(self.waiting.finished)
        return self._judging.is_done(self.waiting.finished, goes_on)

    def check(self) -> None: ...

    def start_judges(self) -> None:
        """Start another judge if there are too few. Call this regularly while there are samples."""
        if self._judging is not None:
            self._judging.grow()

    def close(self) -> None:
        """Stop judging: samples without a verdict become NOT_JUDGED."""
        if self._judging is not None:
            self._judging.close()

    def _accept(self, finished: list[FinishedSample]) -> None:
        """Add samples in a single assignment, so that an exception loses none of them."""
        self.waiting = self.waiting.joined_by(finished)

    def _settle(self, received: int) -> None:
        """Drop the first `received` samples, whose tables have been taken."""
        self.waiting = self.waiting.behind(received)
