"""One replica in this process whose rows may stop: the counterpart of `Fleet` where there is no other process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tokabatch.forecast.step_log import Steps
from tokabatch.runner.ledger import Ledger, wants_more
from tokabatch.runner.replica import Replica, Standing
from tokabatch.runner.row_stops import RowLimits
from tokabatch.scheduling.contracts import Completion, Requests

IDLE_SECONDS = 0.01
"""How long to pause while everything that may begin is finished and verdicts are pending."""


class StoppingReplica:
    """See `Replica`. `build` makes it for the samples that may be begun first."""

    def __init__(self, ledger: Ledger, build: Callable[[Requests], Replica]) -> None:
        self._ledger = ledger
        self._first_left = ledger.left
        first = self._begin()
        assert first is not None, "a row that goes on has a sample to begin"
        self._replica = build(first)

    def run(self) -> Iterator[list[Completion]]:
        """As `Replica.run`; an empty list while verdicts are to come."""
        replica = self._replica
        yield self._finish(replica.start())
        while self._ledger.left:
            completions: list[Completion] = []
            if wants_more(replica.waiting, replica.scheduler.num_running) and (more := self._begin()) is not None:
                completions = replica.extend(more)
            elif replica.scheduler.done:
                time.sleep(IDLE_SECONDS)
            if not replica.scheduler.done:
                completions += replica.step()
            yield self._finish(completions)

    def follow(self, changes: Sequence[RowLimits]) -> None:
        """See `Fleet`."""
        for change in changes:
            self._ledger.begin(change.row, change.begin)
            if self._ledger.cancel(change.row, change.end):
                self._replica.withdraw(change.row, change.end)

    def standing(self, *, foresee: bool = False) -> Standing:
        """Return the progress of the work; cancelled samples count as finished."""
        standing = self._replica.standing(foresee=foresee)
        finished = self._first_left - self._ledger.left
        scheduled = replace(standing.scheduled, finished=finished, finished_prompts=self._ledger.finished_prompts)
        return replace(standing, scheduled=scheduled, waiting=max(0, self._ledger.left - standing.running))

    def steps(self) -> Steps:
        return self._replica.steps()

    def stop(self) -> list[Completion]:
        return self._replica.stop()

    def close(self) -> None:
        self._replica.close()

    def _begin(self) -> Requests | None:
        """Return all samples that may begin and have not."""
        part = self._ledger.next_run(0, 1, whole=True)
        return None if part is None else self._ledger.plan.part(part.prompts, part.first, part.stop)

    def _finish(self, completions: list[Completion]) -> list[Completion]:
        self._ledger.finish(0, completions)
        return completions
