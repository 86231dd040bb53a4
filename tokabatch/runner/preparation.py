"""Finished samples on their way to tables: decoded, judged where the job verifies, and built. In this process, or in others."""

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
"""Samples made into a table at once; fewer when time is over."""
LOOKED_AT = 512
"""Samples that come in before those that wait are looked at again."""


class Preparing(Protocol):
    """What makes tables of finished samples, each once it has its verdict."""

    @property
    def num_waiting(self) -> int:
        """Samples that have not come as tables."""
        ...

    def add(self, completions: Completions) -> None: ...

    def tables(self, received: int, *, everything: bool) -> Iterator[pa.Table]:
        """Tables that are to be taken now, of samples behind those that have been `received` so far; with `everything` all for
        which there are verdicts. A table is taken when the next one is asked for."""
        ...

    def keeps_up(self) -> bool:
        """Whether more may be added; waits a fraction of a second for that, in which `tables` may come to have some."""
        ...

    def is_done(self, goes_on: Callable[[], bool]) -> bool:
        """Whether `tables` has everything; waits a fraction of a second for that. Some seconds after the run no longer
        `goes_on` samples without a verdict are made into tables, too (`NOT_JUDGED`)."""
        ...

    def check(self) -> None:
        """Raise the error for which some samples never come as tables; all that do, come all the same."""
        ...

    def close(self) -> None:
        """End the processes of the judge."""
        ...


class Preparation:
    """See `Preparing`: in this process."""

    def __init__(
        self,
        job: Job,
        workload: Workload,
        tables: SampleTables,
        clock: Callable[[], float],
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """The first number of `part` is that of this one of so many as the second says: each has its part of the judges that
        the job may have, of which as many begin together as there are replicas for it."""
        self._store, self._tables = workload.store, tables
        self._judging = None
        if job.verify is not None:
            place, count = part
            judges, at_once = most_judges(job.verify), -(-workload.layout.replicas // count)
            most = max(1, judges // count + (place < judges % count))
            self._judging = Judging(job.verify, workload.store, tables, clock, at_once, most)
        self.waiting = WaitingSamples()
        self._arrived = 0
        """Samples that have come in since the last look at which are ready."""

    @property
    def num_waiting(self) -> int:
        return len(self.waiting.finished)

    def add(self, completions: Completions, numbers: Int64 | None = None) -> None:
        """Each has its number, if that is looked at."""
        given = repeat(0) if numbers is None else numbers.tolist()
        # From here on they are not lost.
        self.waiting = self.waiting.joined_by([FinishedSample(*pair) for pair in zip(completions, given, strict=False)])
        self._arrived += len(completions)
        if self._judging is not None:
            self._judging.submit(self.waiting.finished)

    def tables(self, received: int, *, everything: bool) -> Iterator[pa.Table]:
        self._settle(received)
        # A look at all that wait for verdicts takes longer than to record a few: not with every message.
        few = self._judging is not None and self._arrived < LOOKED_AT and self.waiting.bytes < PIECE_BYTES
        if few and not everything:
            return
        self._arrived, ready = 0, len(self.waiting.finished)
        if self._judging is not None:
            self.waiting, ready = self.waiting.ready_first()
        if not everything and ready < BATCH_SAMPLES and self.waiting.bytes < PIECE_BYTES:
            return
        for piece in self.waiting.pieces(ready, self._store):
            for table in self._tables.build(piece, ()):
                yield table
                self._settle(self.waiting.begin + table.num_rows)

    def numbers(self, count: int) -> Int64:
        """Of the samples of a table that `tables` has yielded, shape [count]."""
        return np.array([each.number for each in self.waiting.finished[:count]], np.int64)

    def keeps_up(self) -> bool:
        return self._judging is None or self._judging.keeps_up(self.waiting.finished)

    def is_done(self, goes_on: Callable[[], bool]) -> bool:
        if self._judging is None:
            return True
        # An exception may have come between `add` taking samples over and handing them in.
        self._judging.submit(self.waiting.finished)
        return self._judging.is_done(self.waiting.finished, goes_on)

    def check(self) -> None: ...

    def start_judges(self) -> None:
        """Start another judge where those there are too few: to be called now and then while there are samples."""
        if self._judging is not None:
            self._judging.grow()

    def hurry(self) -> None:
        """Wait for no verdict any more: samples that have none are NOT_JUDGED."""
        self.close()

    def close(self) -> None:
        if self._judging is not None:
            self._judging.close()

    def _settle(self, received: int) -> None:
        """Let go of the samples whose tables are taken, whatever came in between."""
        self.waiting = self.waiting.behind(received)
