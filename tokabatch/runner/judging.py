"""Judging of finished samples: each is decoded and submitted to the judges once, and the number of waiting samples is
limited."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tokabatch.arrays import Int64
from tokabatch.input.store.tokenized_input import InputStore
from tokabatch.job import VerifyConfig
from tokabatch.runner.sample_tables import SampleTables, is_of_rows
from tokabatch.runner.waiting_samples import FinishedSample
from tokabatch.scoring.judge import Verdict
from tokabatch.scoring.pool import Ticket, open_pool

SUBMITTED_SAMPLES = 2048
"""Samples that are decoded and submitted together."""
MOST_UNJUDGED = 4096
"""The most finished samples without a verdict; above that the run, and with it the replicas, pauses."""
KEPT_BYTES = 32 << 20
"""The estimated memory in bytes of rows that are cached for further samples; the rows of one batch may take more."""
ROW_BYTES = 500
"""The estimated bytes of a row's Python objects, in addition to its columns."""
LOOK_SECONDS, HURRIED_SECONDS = 0.2, 10.0
"""The most seconds that one call blocks for verdicts, and that all calls do after the run has been stopped."""


class Judging:
    """The judge of a run and the samples submitted to it."""

    def __init__(
        self,
        config: VerifyConfig,
        store: InputStore,
        tables: SampleTables,
        at_once: int,
        most: int,
    ) -> None:
        """Use at most `most` processes, of which `at_once` are started together."""
        self._pool = open_pool(config, at_once, most)
        self._store = store
        self._rows: dict[int, Mapping[str, Any]] = {}
        self._row_bytes = 0
        """The rows read last and their estimated memory: the samples of a row arrive in many messages."""
        self._tables = tables
        self._deadline = math.inf

    def submit(self, samples: Sequence[FinishedSample]) -> None:
        """Submit the samples that are not errors and have not been submitted yet, which come after those that have. A sample
        whose tokens or row cannot be read gets a verdict with the reason."""
        new: list[FinishedSample] = []
        for each in reversed(samples):
            if each.ticket is not None:
                break
            if each.completion.error_code is None:
                new.append(each)
        new.reverse()
        for begin in range(0, len(new), SUBMITTED_SAMPLES):
            self._submit_some(new[begin : begin + SUBMITTED_SAMPLES])

    def keeps_up(self, samples: Sequence[FinishedSample]) -> bool:
        """Block for at most LOOK_SECONDS until all but the last MOST_UNJUDGED of `samples` have verdicts. Return whether they
        have."""
        return self._pool.wait(_tickets(samples[: max(0, len(samples) - MOST_UNJUDGED)]), LOOK_SECONDS)

    def is_done(self, samples: Sequence[FinishedSample], goes_on: Callable[[], bool]) -> bool:
        """Block for at most LOOK_SECONDS until all `samples` have verdicts, and return whether they have. HURRIED_SECONDS after
        `goes_on` has become False, the judge is stopped, and the remaining samples are NOT_JUDGED."""
        if self._pool.wait(_tickets(samples), LOOK_SECONDS):
            return True
        if not goes_on() and self._deadline == math.inf:
            self._deadline = time.monotonic() + HURRIED_SECONDS
        if time.monotonic() >= self._deadline:
            self._pool.close()
        return False

    def grow(self) -> None:
        """Start another process of the judge if the existing ones fall behind."""
        self._pool.grow()

    def close(self) -> None:
        """Stop the processes of the judge."""
        self._pool.close()

    def _submit_some(self, new: Sequence[FinishedSample], *, again: bool = False) -> None:
        completions = [each.completion for each in new]
        try:
            texts = self._tables.texts(completions)
            rows = self._input_rows([each.row_index for each in completions])
        except BaseException as error:
            if not is_of_rows(error):
                raise
            if len(new) > 1 or not again:
                for part in (new[: len(new) // 2], new[len(new) // 2 :]):
                    if part:
                        self._submit_some(part, again=len(new) == 1)
                return
            new[0].ticket = Ticket("", {})
            new[0].ticket.verdict = Verdict.none(f"{type(error).__name__}: {error}")
            return
        answers = self._tables.answers(completions, texts)
        for each, text, ticket in zip(new, texts, self._pool.submit(answers, rows), strict=True):
            each.text, each.ticket = text, ticket

    def _input_rows(self, row_indices: Sequence[int]) -> list[Mapping[str, Any]]:
        missing = np.array(sorted({row for row in row_indices if row not in self._rows}), np.int64)
        if len(missing):
            size = self._size(missing)
            if self._row_bytes + size > KEPT_BYTES:
                self._rows, self._row_bytes = {}, 0
                missing = np.array(sorted(set(row_indices)), np.int64)
                size = self._size(missing)
            self._rows |= zip(missing.tolist(), self._store.input_rows(missing), strict=True)
            self._row_bytes += size
        return [self._rows[row] for row in row_indices]

    def _size(self, rows: Int64) -> int:
        return int(self._store.row_bytes(rows).sum()) + ROW_BYTES * len(rows)


def _tickets(samples: Sequence[FinishedSample]) -> list[Ticket]:
    return [each.ticket for each in samples if each.ticket is not None]
