"""When pages are short: which running samples wait for a step, and which one is preempted.

Prompts without running samples give up their pages first. Then the samples that need a page and rank last wait. If most of
the step would wait, the sample that ranks last of all is preempted instead: its pages are freed, and what they held is
computed again when the sample is readmitted.
"""

from __future__ import annotations

import numpy as np

from tokabatch.arrays import Int64
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.kv.manager import KVCacheManager
from tokabatch.scheduling.policy.policy import Policy

MOST_SHORT = 3 / 4
"""Largest share of a step's decoding samples that may wait for a page; above it, one sample is preempted."""


class Preemption:
    """Assigns pages to the decoding samples of one scheduler, and preempts samples when pages are short."""

    def __init__(self, kv: KVCacheManager, policy: Policy, counts: SchedulerCounts) -> None:
        self._kv = kv
        self._policy = policy
        self._counts = counts

    def make_room(self, decoding: Int64) -> tuple[Int64, int]:
        """Give each slot the page that its next position needs. Return the slots that have it, and how many wait for one."""
        kv, num_short = self._kv, 0
        needs = kv.at_page_end(decoding)
        while len(needs) > kv.num_free_pages:
            if kv.suspend_idle():
                continue
            if len(needs) - kv.num_free_pages <= MOST_SHORT * len(decoding):
                wait = self._policy.rank(needs)[kv.num_free_pages :]
                needs, decoding = np.setdiff1d(needs, wait), decoding[~np.isin(decoding, wait)]
                num_short = len(wait)
                break
            victim = self.preempt()
            needs, decoding = needs[needs != victim], decoding[decoding != victim]
        kv.grow(needs, np.ones(len(needs), np.int32))
        return decoding, num_short

    def preempt(self) -> int:
        """Preempt the sample that the policy ranks last, freeing its pages. Return its slot."""
        seq = self._kv.slots
        assert len(seq.order) > 1, "a single sample does not fit the pool; the job was sized wrongly"
        unfinished = seq.order[seq.length[seq.order] > seq.computed[seq.order]]
        victim = int(self._policy.rank(unfinished)[-1])
        self._counts.given_up_tokens += max(0, int(seq.computed[victim] - seq.sample_counts.cached_tokens[victim]))
        self._counts.preemptions += 1
        self._kv.requeue(victim)
        self._policy.invalidate()
        return victim
