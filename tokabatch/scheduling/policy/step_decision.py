"""What a step computes: which samples decode, how the remaining tokens are divided among prefills, and what is admitted.

In this order: running samples decode, as far as the policy allows and pages are free (`preemption`); prefills under way
continue, oldest first; waiting samples are admitted with the tokens that are left (`admission`). If nothing at all could run,
idle prompts are suspended, a sample is preempted or the quarantine is released, and the step is decided again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokabatch.arrays import Int64
from tokabatch.scheduling.counts import SchedulerCounts
from tokabatch.scheduling.kv.manager import KVCacheManager, Runs
from tokabatch.scheduling.lengths.length_estimates import LengthEstimates
from tokabatch.scheduling.policy.admission import Admission
from tokabatch.scheduling.policy.guarded_policy import Case, GuardedPolicy
from tokabatch.scheduling.policy.policy import Policy
from tokabatch.scheduling.policy.preemption import Preemption
from tokabatch.scheduling.quarantine import Quarantine
from tokabatch.scheduling.work import Work


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What the slots compute in a step."""

    decoding: Int64
    """Slots that compute the token drawn last, shape [D]."""
    runs: Runs
    """Slots that compute tokens from the host (prefill), and how many, in plan order."""
    num_waiting: int
    """Samples that could decode in this step but wait for pages."""


class StepDecisions:
    """Decides the steps of one scheduler. `policy` constructs its policy, which is wrapped in a `GuardedPolicy`."""

    def __init__(
        self,
        work: Work,
        kv: KVCacheManager,
        lengths: LengthEstimates,
        counts: SchedulerCounts,
        quarantine: Quarantine,
        policy: Callable[[Work, KVCacheManager, LengthEstimates], Policy],
    ) -> None:
        self._kv = kv
        self._lengths = lengths
        self._counts = counts
        self._quarantine = quarantine
        self._policy = GuardedPolicy(policy(work, kv, lengths))
        self._preemption = Preemption(kv, self._policy, counts)
        self._admission = Admission(work, kv, lengths, self._policy)

    def invalidate(self) -> None:
        """See `Policy`."""
        self._policy.invalidate()

    def decide(self, max_tokens: int, stages: int, *, in_flight: bool) -> StepDecision | None:
        """Decide the next step, of at most `max_tokens` tokens, for a worker of `stages` pipeline stages; assign pages and open
        slots for it. `in_flight` says that results of earlier steps are outstanding. Return None if nothing can be computed
        before they arrive."""
        slots = self._kv.slots
        while True:
            ready, prefilling = slots.runnable()
            if stages > 1:
                received = slots.length[ready] == slots.prompt_length[ready] + slots.generated[ready]
                # In plan order, so that samples that share a prefix stay in one step.
                ready = ready[received][: -(-len(slots.order) // (stages + 1))]
            going = self._policy.hold(ready)
            decoding, num_short = self._preemption.make_room(going)
            budget = max_tokens - len(decoding)
            prefill = self._continue_prefill(prefilling[slots.request[prefilling] >= 0], budget)
            if self._lengths.refresh():
                self._policy.invalidate()
            alone = not len(slots.order) and not in_flight
            self._policy.case = Case(alone, num_short > 0, self._quarantine.trial)
            admitted = self._admission.admit(budget - int(prefill.tokens.sum()), self._counts.steps + 1)
            runs = Runs.joined((prefill, admitted))
            if len(decoding) or len(runs.slots):
                by_plan = np.lexsort((slots.admitted[runs.slots], slots.request[runs.slots]))
                runs = Runs(runs.slots[by_plan], runs.tokens[by_plan])
                return StepDecision(decoding, runs, len(ready) - len(going) + num_short)
            if in_flight or not (len(slots.order) or self._quarantine.active):
                return None
            if not len(slots.order):
                # Only the quarantine keeps samples from being admitted.
                self._quarantine.release()
            elif not self._kv.suspend_idle():
                self._preemption.preempt()

    def _continue_prefill(self, slots: Int64, budget: int) -> Runs:
        """Divide the token budget among prefills under way, oldest first. Each gets all pages that it needs, or waits. Return
        what they compute."""
        seq = self._kv.slots
        take = seq.prefill_chunks(slots, seq.length[slots], budget)
        slots, take = slots[take > 0], take[take > 0]
        keep = np.cumsum(self._kv.missing_pages(slots, take)) <= self._kv.num_free_pages
        runs = Runs(slots[keep], take[keep])
        self._kv.grow(*runs)
        return runs
