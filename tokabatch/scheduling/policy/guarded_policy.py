"""The cases of a step in which a policy is not free to answer, whichever policy it is.

Alone: nothing runs, so the first candidate comes in, or the run would stand still. Short: running samples wait for a page in
this very step, so nothing comes in. Confined: a worker has died of what it ran, or of all prompts only one is to get pages,
so no others come in, those never begun included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Int32, Int64
from tokabatch.scheduling.kv.prefix_tree import PromptPages
from tokabatch.scheduling.policy.policy import Candidates, Policy


@dataclass(frozen=True, slots=True)
class Case:
    """What a step is like, as far as it binds every policy."""

    alone: bool = False
    """Nothing runs or is in flight."""
    short: bool = False
    """Running samples wait for a page in this step."""
    confined_to: frozenset[int] | None = None
    """The only prompts that may come in; None is all."""


class GuardedPolicy:
    """Another `Policy`, within the `case` of the step that is being decided."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.case = Case()

    def order(self, waiting: list[PromptPages]) -> list[PromptPages]:
        """See `Policy`; confined, the others are left out."""
        allowed = self.case.confined_to
        return self._policy.order(waiting if allowed is None else [prompt for prompt in waiting if prompt.request in allowed])

    def admit(self, candidates: Candidates) -> Int32:
        """See `Policy`; never more than there are."""
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
