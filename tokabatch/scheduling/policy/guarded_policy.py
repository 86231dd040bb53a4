"""The cases in which a step overrides its policy, whichever policy it is.

Alone: nothing runs, so the first candidate is admitted, or the run would make no progress. Short: running samples wait for a
page in this step, so none is admitted. Confined: only some prompts may be admitted, because a worker has died of what it ran
or because one prompt is to get pages before all others; prompts never begun are excluded too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.scheduling.kv.prefix_tree import PromptPages
from tokabatch.scheduling.policy.policy import Candidates, Policy


@dataclass(frozen=True, slots=True)
class Case:
    """The conditions of a step that override any policy."""

    alone: bool = False
    """Nothing runs or is in flight."""
    short: bool = False
    """Running samples wait for a page in this step."""
    confined_to: frozenset[int] | None = None
    """The only prompts of which samples may be admitted; None means all."""


class GuardedPolicy:
    """Wraps a `Policy` and restricts its answers to the `case` of the current step."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.case = Case()

    def order(self, waiting: list[PromptPages]) -> list[PromptPages]:
        """See `Policy`; prompts outside `confined_to` are left out."""
        allowed = self.case.confined_to
        return self._policy.order(waiting if allowed is None else [prompt for prompt in waiting if prompt.request in allowed])

    def admit(self, candidates: Candidates) -> Int32:
        """See `Policy`; the counts never exceed the candidates'."""
        case, counts = self.case, np.zeros_like(candidates.counts)
        asked = candidates if case.confined_to is None else candidates.begun()
        if case.short or not len(asked.counts):
            return counts
        counts[: len(asked.counts)] = np.minimum(self._policy.admit(asked), asked.counts)
        if case.alone:
            counts[0] = max(1, counts[0])
        return counts

    def hold(self, decoding: Int64) -> Int64:
        """See `Policy`."""
        return self._policy.hold(decoding)

    def rank(self, slots: Int64) -> Int64:
        """See `Policy`."""
        return self._policy.rank(slots)

    def invalidate(self) -> None:
        """See `Policy`."""
        self._policy.invalidate()
